//! Finds the transformer that a `--model` value names: bundled, folder, file or hub.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    checkpoint::{
        Checkpoint,
        config::ConfigFile,
        output::{DIFFUSERS_STEM, ORIGINAL_STEM},
        with_hint,
    },
    files::{BUNDLED, Blob, Files, parse_id},
    ui::Reporter,
};

/// A transformer as found on disk, before anything is known about it.
pub(super) struct Located {
    pub(super) raw: Checkpoint,
    pub(super) model_ref: String,
    /// Config files next to the weights.
    pub(super) configs: Vec<ConfigFile>,
    /// The folder of the whole pipeline, when there is one.
    pub(super) pipeline: Option<Files>,
}

/// What `--model` takes.
const NAME_ONE: &str =
    "name a folder, a .safetensors or .gguf file, or a hub id such as black-forest-labs/FLUX.1-dev";
/// What to do about a file that is damaged.
pub(super) const DAMAGED: &str = "fetch the file again, or name another with --model";

/// Finds the transformer that a `--model` value names.
pub(super) fn locate(model: Option<&str>, reporter: &Reporter) -> Result<Located> {
    let Some(model) = model.filter(|m| *m != BUNDLED) else {
        return in_pipeline(Files::bundled());
    };
    let path = Path::new(model);
    if path.is_dir() {
        return in_folder(path);
    }
    if path.is_file() {
        return in_file(path);
    }
    // something is there, so it is no hub id: a device, a pipe, or a link that leads nowhere
    if path.symlink_metadata().is_ok() {
        match path.metadata() {
            Err(error) => {
                bail!("`{model}` is a link that leads nowhere ({error})\nhint: {NAME_ONE}")
            }
            Ok(_) => bail!("`{model}` is neither a folder nor a file\nhint: {NAME_ONE}"),
        }
    }
    match parse_id(model) {
        Some((repo, revision)) if !model.starts_with(['.', '/', '~']) => {
            let files = Files::hub(&repo, revision.as_deref(), reporter)?;
            in_pipeline_or_bare(&files)?.with_context(|| {
                format!(
                    "the hub repository `{model}` holds no FLUX transformer in diffusers layout"
                )
            })
        }
        _ => bail!("`{model}` does not exist\nhint: {NAME_ONE}"),
    }
}

fn in_folder(path: &Path) -> Result<Located> {
    let files = Files::folder(path);
    if let Some(located) = in_pipeline_or_bare(&files)? {
        return Ok(located);
    }
    let is_weights = |name: &String| {
        Path::new(name)
            .extension()
            .is_some_and(|e| e == "safetensors" || e == "gguf")
    };
    let weights: Vec<String> = files.list()?.into_iter().filter(is_weights).collect();
    match weights.as_slice() {
        [one] => in_file(&path.join(one)),
        [] => bail!(
            "`{}` holds no FLUX model: there is no transformer/ folder and no .safetensors or .gguf file",
            path.display()
        ),
        many => bail!(
            "`{}` holds several .safetensors or .gguf files ({}); name one of them",
            path.display(),
            many.join(", ")
        ),
    }
}

/// A whole pipeline, or a bare transformer folder; `None` when it is neither.
fn in_pipeline_or_bare(files: &Files) -> Result<Option<Located>> {
    if !files.sub("transformer").list()?.is_empty() {
        return in_pipeline(files.clone()).map(Some);
    }
    let stems = [DIFFUSERS_STEM, ORIGINAL_STEM];
    for stem in stems {
        if let Some(raw) = with_hint(Checkpoint::open_if_present(files, stem), DAMAGED)? {
            return Ok(Some(Located {
                raw,
                model_ref: files.model_ref(),
                configs: config_file(files, "config.json")?,
                pipeline: Some(files.clone()),
            }));
        }
    }
    Ok(None)
}

fn in_pipeline(files: Files) -> Result<Located> {
    let transformer = files.sub("transformer");
    let raw = with_hint(Checkpoint::open(&transformer, DIFFUSERS_STEM), DAMAGED)?;
    Ok(Located {
        raw,
        model_ref: files.model_ref(),
        configs: config_file(&transformer, "config.json")?,
        pipeline: Some(files),
    })
}

fn in_file(path: &Path) -> Result<Located> {
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let files = Files::folder(folder);
    let name = path
        .file_name()
        .and_then(|n| n.to_str())
        .context("the file name is not UTF-8")?;
    let raw = if name.ends_with(".index.json") {
        with_hint(Checkpoint::open_index(&files, name), DAMAGED)?
    } else {
        check_whole(path, &files, name)?;
        let blob = Blob::map(path)?;
        with_hint(
            Checkpoint::from_blob(&path.display().to_string(), &blob),
            DAMAGED,
        )?
    };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    Ok(Located {
        raw,
        model_ref: absolute.display().to_string(),
        configs: config_file(&files, "config.json")?,
        pipeline: Some(files),
    })
}

/// Fails at one of several shards, `…-00002-of-00003.safetensors`, and names their index.
fn check_whole(path: &Path, files: &Files, name: &str) -> Result<()> {
    let Some((stem, shard)) = shard(name) else {
        return Ok(());
    };
    let index = format!("{stem}.safetensors.index.json");
    let (path, place) = (path.display(), files.describe(&index));
    ensure!(
        files.get(&index)?.is_some(),
        "`{path}` is only shard {shard} of a model\nhint: put all shards and their index `{index}` next to it, and name the index with --model"
    );
    bail!("`{path}` is only shard {shard} of a model\nhint: name their index: --model {place}")
}

/// The stem of a shard's name, and which one it is of how many; `None` for the name of a whole file.
fn shard(name: &str) -> Option<(&str, String)> {
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let (number, count): (usize, usize) = (number.parse().ok()?, count.parse().ok()?);
    (count > 1).then(|| (stem, format!("{number} of {count}")))
}

/// A JSON file next to the weights, when it is there and speaks of a FLUX transformer.
fn config_file(files: &Files, name: &str) -> Result<Vec<ConfigFile>> {
    let json = files.json(name)?.filter(speaks_of_flux);
    Ok(json
        .map(|json| ConfigFile {
            name: files.describe(name),
            json,
        })
        .into_iter()
        .collect())
}

pub(super) fn speaks_of_flux(json: &Value) -> bool {
    let class = json.get("_class_name").and_then(Value::as_str);
    let known = ["FluxTransformer", "Flux2Transformer"];
    class.is_some_and(|c| known.iter().any(|name| c.contains(name)))
        || json.get("axes_dims_rope").is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_shard_says_which_it_is() {
        let (stem, which) = shard("a-b-00002-of-00003.safetensors").unwrap();
        assert_eq!((stem, which.as_str()), ("a-b", "2 of 3"));
        for whole in [
            "x.safetensors",
            "x-00001-of-00001.safetensors",
            "best-of-3.safetensors",
        ] {
            assert_eq!(shard(whole), None, "{whole}");
        }
    }

    #[test]
    #[cfg(unix)]
    fn what_is_there_and_no_file_is_no_hub_id() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        for (model, word) in [("/dev/null", "neither"), (link.to_str().unwrap(), "link")] {
            let Err(error) = locate(Some(model), &Reporter::silent()) else {
                panic!("{model} was opened")
            };
            let error = error.to_string();
            assert!(error.contains(word) && error.contains(model), "{error}");
        }
    }
}
