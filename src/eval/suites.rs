//! The field's own benchmarks: their prompt files, and how their scorers want images named. `export` draws them.
//!
//! Sources: `GenEval` `generation/diffusers_generate.py`, ELLA `dpg_bench/compute_dpg_bench.py`, `HPSv2` `hpsv2/evaluation.py`.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::sample::size::ImageSize;

/// A benchmark with prompts and a scorer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Suite {
    /// `evaluation_metadata.jsonl`; four images of each prompt.
    GenEval,
    /// A folder of text files; four images of each prompt, two by two in one file.
    Dpg,
    /// JSON lists of prompts, one for each style; one image of each.
    HpsV2,
}

impl FromStr for Suite {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "geneval" => Ok(Self::GenEval),
            "dpg" => Ok(Self::Dpg),
            "hpsv2" => Ok(Self::HpsV2),
            _ => Err("expected geneval, dpg or hpsv2".to_owned()),
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::GenEval => "GenEval",
            Self::Dpg => "DPG-Bench",
            Self::HpsV2 => "HPSv2",
        })
    }
}

/// One prompt of a suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) prompt: String,
    /// The folder or file, relative.
    pub(super) place: PathBuf,
    /// What lies next to the images, `GenEval`'s line.
    pub(super) line: Option<String>,
}

impl Suite {
    pub(super) fn images_per_prompt(self) -> usize {
        match self {
            Self::GenEval | Self::Dpg => 4,
            Self::HpsV2 => 1,
        }
    }

    /// The command of the suite's own repository.
    pub(super) fn scorer(self, output: &str, size: ImageSize) -> String {
        match self {
            Self::GenEval => format!(
                "python evaluation/evaluate_images.py {output} --outfile results.jsonl --model-path DETECTOR && python evaluation/summary_scores.py results.jsonl"
            ),
            Self::Dpg => format!(
                "accelerate launch dpg_bench/compute_dpg_bench.py --image-root-path {output} --resolution {} --pic-num 4",
                size.width
            ),
            Self::HpsV2 => format!(
                "python -c \"import hpsv2; hpsv2.evaluate('{output}', hps_version='v2.1')\""
            ),
        }
    }

    /// Whether an entry's last file is there.
    pub(super) fn is_done(self, place: &Path) -> bool {
        match self {
            Suite::GenEval => place.join("samples/0003.png").is_file(),
            Suite::Dpg | Suite::HpsV2 => place.is_file(),
        }
    }

    /// The prompts in the suite's own files.
    pub(super) fn read(self, path: &Path) -> Result<Vec<Entry>> {
        let entries = match self {
            Self::GenEval => {
                geneval(&read(path)?).with_context(|| format!("`{}`", path.display()))?
            }
            Self::Dpg => {
                let one = |file: PathBuf| {
                    let stem = file.file_stem().unwrap_or_default().to_owned();
                    Ok(Entry {
                        prompt: read(&file)?.trim().to_owned(),
                        place: Path::new(&stem).with_extension("png"),
                        line: None,
                    })
                };
                files(path, "txt")?
                    .into_iter()
                    .map(one)
                    .collect::<Result<_>>()?
            }
            Self::HpsV2 => {
                let style = |file: PathBuf| {
                    let name = file.file_stem().unwrap_or_default().to_owned();
                    let json = serde_json::from_str(&read(&file)?);
                    let list: Vec<Value> =
                        json.with_context(|| format!("`{}` is no list", file.display()))?;
                    let one = |(i, value): (usize, &Value)| {
                        let prompt = value.as_str().or_else(|| value["prompt"].as_str());
                        Ok(Entry {
                            prompt: prompt
                                .with_context(|| {
                                    format!("`{}`: prompt {i} is no text", file.display())
                                })?
                                .to_owned(),
                            place: Path::new(&name).join(format!("{i:05}.jpg")),
                            line: None,
                        })
                    };
                    list.iter().enumerate().map(one).collect::<Result<Vec<_>>>()
                };
                let files = if path.is_dir() {
                    files(path, "json")?
                } else {
                    vec![path.to_path_buf()]
                };
                files
                    .into_iter()
                    .map(style)
                    .collect::<Result<Vec<_>>>()?
                    .concat()
            }
        };
        ensure!(
            !entries.is_empty(),
            "--prompts: `{}` holds no prompt of {self}",
            path.display()
        );
        Ok(entries)
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("--prompts: cannot read `{}`", path.display()))
}

/// The files of a folder that end in `extension`, by name.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)
        .with_context(|| format!("--prompts: cannot list `{}`", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path()));
    let mut paths = paths.collect::<Result<Vec<PathBuf>>>()?;
    paths.retain(|path| path.extension().is_some_and(|e| e == extension));
    paths.sort();
    Ok(paths)
}

fn geneval(text: &str) -> Result<Vec<Entry>> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let entry = |(i, line): (usize, &str)| {
        let json: Value = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
        let prompt = json["prompt"].as_str();
        Ok(Entry {
            prompt: prompt
                .with_context(|| format!("line {} has no `prompt`", i + 1))?
                .to_owned(),
            place: PathBuf::from(format!("{i:05}")),
            line: Some(line.to_owned()),
        })
    };
    lines.enumerate().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suites_own_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let places = |suite: Suite, path: &Path| -> Vec<(String, String)> {
            let entries = suite.read(path).unwrap().into_iter();
            entries
                .map(|e| (e.place.display().to_string(), e.prompt))
                .collect()
        };
        let pair = |place: &str, prompt: &str| (place.to_owned(), prompt.to_owned());
        let jsonl = put(
            "g.jsonl",
            "{\"tag\": \"single_object\", \"prompt\": \"a bench\"}\n{\"prompt\": \"a cow\"}\n",
        );
        assert_eq!(
            places(Suite::GenEval, &jsonl),
            [pair("00000", "a bench"), pair("00001", "a cow")]
        );
        put("dpg/b.txt", "a fox\n");
        put("dpg/a.txt", "two foxes");
        assert_eq!(
            places(Suite::Dpg, &folder.path().join("dpg")),
            [pair("a.png", "two foxes"), pair("b.png", "a fox")]
        );
        put("hps/anime.json", r#"["a girl", "a boy"]"#);
        put("hps/photo.json", r#"[{"prompt": "a dog"}]"#);
        assert_eq!(
            places(Suite::HpsV2, &folder.path().join("hps")),
            [
                pair("anime/00000.jpg", "a girl"),
                pair("anime/00001.jpg", "a boy"),
                pair("photo/00000.jpg", "a dog")
            ]
        );
        let broken = put("x.jsonl", "{}\n");
        assert!(format!("{:#}", Suite::GenEval.read(&broken).unwrap_err()).contains("line 1"));
    }
}
