//! What a killed run needs to go on: one file with the trained values, the moments of the optimiser and where the run was,
//! replaced atomically. Random numbers are drawn from seed and step alone, so nothing of them is saved.

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use candle::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    log::{Entry, PhaseReport},
    trainables::Values,
};
use crate::{
    checkpoint::{Checkpoint, Source, save, with_hint},
    files::{
        Files,
        output::{check_folder, is_temporary, resumes_from},
    },
};

/// The metadata key of the progress.
const KEY: &str = "fastflux-training";
/// The file's stem.
const STEM: &str = "state";
/// Stem of the file next to it with the teacher's images, so that a resumed run need not sample them again.
pub const IMAGES_STEM: &str = "images";
/// What earlier versions called it.
const OLD_IMAGES_STEM: &str = "pictures";
/// Folder next to it with the bundled model, pruned, if no model was named.
pub const PRUNED: &str = "pruned";

/// How far a run is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// The phase it is in: the sandwiches in order, then the finetuning.
    pub phase: usize,
    /// Steps done in this phase.
    pub step: usize,
    /// Held-out loss before the first step of this phase.
    pub before: Option<f64>,
    /// The best held-out loss of this phase and the step that had it.
    pub best: Option<(f64, usize)>,
    /// Evaluations of the held-out loss since the best.
    #[serde(alias = "looks")]
    pub evaluations: usize,
    /// Finished phases.
    pub reports: Vec<PhaseReport>,
    /// The log so far.
    pub log: Vec<Entry>,
}

/// A saved run.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// How far it was.
    pub progress: Progress,
    /// Every trained value as it was.
    pub values: Values,
    /// The values that had the best held-out loss of the phase.
    pub best: Values,
    /// Moments in this phase: mean gradients and, of what AdamW moves, mean squared gradients.
    pub moments: [Values; 2],
}

/// Where a run is saved.
#[derive(Clone, Debug)]
pub struct StateFile {
    folder: PathBuf,
    /// Everything that must be the same for a run to go on.
    settings: Value,
}

const PARTS: [&str; 4] = ["value.", "best.", "mean.", "square."];

impl StateFile {
    /// In `folder`, for a run of these settings.
    pub fn new(folder: &Path, settings: Value) -> Self {
        for stem in [STEM, IMAGES_STEM] {
            resumes_from(&folder.join(format!("{stem}.safetensors")));
        }
        Self {
            folder: folder.to_path_buf(),
            settings,
        }
    }

    /// The saved run; `None` if there is none.
    ///
    /// # Errors
    /// When the file is damaged or of another run; the message names the first setting that differs.
    pub fn load(&self) -> Result<Option<Saved>> {
        let files = Files::folder(&self.folder);
        let name = self.path().display().to_string();
        if !self.path().exists() {
            return Ok(None);
        }
        let Some(checkpoint) = Checkpoint::open_if_present(&files, STEM)? else {
            return Ok(None);
        };
        let again = "hint: --restart starts over; or take back what was changed";
        let text = checkpoint
            .metadata
            .get(KEY)
            .with_context(|| format!("`{name}` is not a saved training run\n{again}"))?;
        let found: Value =
            serde_json::from_str(text).with_context(|| format!("`{name}` is damaged\n{again}"))?;
        let mut found = from_bits(found);
        if let Some(recipe) = found.pointer_mut("/settings/recipe") {
            rename_old(recipe);
        }
        if let Some(what) = difference("", &found["settings"], &self.settings) {
            bail!("`{name}` is of a run with other settings: {what}\n{again}");
        }
        let progress = serde_json::from_value(found["progress"].clone())
            .with_context(|| format!("`{name}` is damaged\n{again}"))?;
        let mut parts: [Values; 4] = Default::default();
        for (key, source) in checkpoint.iter() {
            let found = PARTS.iter().zip(&mut parts).find_map(|(prefix, values)| {
                key.strip_prefix(prefix)
                    .map(|rest| (rest.to_owned(), values))
            });
            let (rest, values) =
                found.with_context(|| format!("`{name}` holds an unknown tensor `{key}`"))?;
            values.insert(rest, source.tensor(&Device::Cpu)?.copy()?);
        }
        let [values, best, mean, square] = parts;
        Ok(Some(Saved {
            progress,
            values,
            best,
            moments: [mean, square],
        }))
    }

    /// Writes a run, replacing what was saved before.
    ///
    /// # Errors
    /// When the folder is not writable or the disk is full; what was saved before is then still there.
    pub fn save(&self, saved: &Saved) -> Result<()> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot create `{}`", self.folder.display()))?;
        let mut checkpoint = Checkpoint::default();
        let [mean, square] = &saved.moments;
        for (prefix, values) in PARTS.iter().zip([&saved.values, &saved.best, mean, square]) {
            for (name, value) in values {
                let value: &Tensor = value;
                checkpoint.insert(format!("{prefix}{name}"), Source::dense(value)?);
            }
        }
        let all = serde_json::json!({ "settings": self.settings, "progress": saved.progress });
        let text = serde_json::to_string(&to_bits(all))?;
        checkpoint.metadata.insert(KEY.to_owned(), text);
        let again = "free some space and start it again: it goes on from what was saved last";
        with_hint(save::write(&checkpoint, &self.path()), again).context("cannot save the run")
    }

    fn path(&self) -> PathBuf {
        self.folder.join(format!("{STEM}.safetensors"))
    }
}

/// Takes everything away that runs put into their folder, temporaries that killed ones left included; and the folder,
/// unless it holds something else.
///
/// # Errors
/// When something cannot be removed.
pub fn remove(folder: &Path) -> Result<()> {
    let remove = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                // a pruned model of another hand may lie there: what says that we wrote it is its marker
                let pruned = || check_folder(&entry.path(), true).is_ok();
                if is_temporary(&name) || name == PRUNED && pruned() {
                    std::fs::remove_dir_all(entry.path())?;
                }
            } else if is_ours(&name) {
                std::fs::remove_file(entry.path())?;
            }
        }
        match std::fs::remove_dir(folder) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
            result => result,
        }
    };
    match remove() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("cannot remove `{}`", folder.display())),
    }
}

/// Whether a run writes a file of this name into its folder.
fn is_ours(name: &str) -> bool {
    let whole = name.strip_suffix(".tmp").unwrap_or(name);
    let partial = whole.strip_suffix(".json").unwrap_or(whole);
    if partial.strip_suffix(".partial") == Some(PRUNED) {
        return true; // the calibration of the bundled model, and what was compared
    }
    let stem = whole.strip_suffix(".safetensors").unwrap_or_default();
    is_temporary(name) || [STEM, IMAGES_STEM, OLD_IMAGES_STEM].contains(&stem)
}

/// Gives keys of a recipe that an earlier version wrote the names of today.
fn rename_old(recipe: &mut Value) {
    rename(recipe, "finish", "finetune");
    if let Some(data) = recipe.get_mut("data") {
        rename(data, "samples", "num-prompts");
    }
}

fn rename(object: &mut Value, old: &str, new: &str) {
    if let Some(object) = object.as_object_mut()
        && let Some(value) = object.shift_remove(old)
    {
        object.insert(new.to_owned(), value);
    }
}

/// How a float is written: its bits, since the parser of JSON may be off by the last one of them.
const BITS: &str = "f64:";

/// Every float as a text of its bits.
fn to_bits(value: Value) -> Value {
    match value {
        Value::Number(n) if n.is_f64() => {
            let bits = n.as_f64().unwrap_or_default().to_bits();
            Value::String(format!("{BITS}{bits:016x}"))
        }
        Value::Array(values) => values.into_iter().map(to_bits).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, to_bits(v))).collect(),
        other => other,
    }
}

/// The inverse of [`to_bits`].
fn from_bits(value: Value) -> Value {
    match value {
        Value::String(text) => {
            let bits = text
                .strip_prefix(BITS)
                .and_then(|hex| u64::from_str_radix(hex, 16).ok());
            bits.map_or(Value::String(text), |bits| {
                Value::from(f64::from_bits(bits))
            })
        }
        Value::Array(values) => values.into_iter().map(from_bits).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, from_bits(v))).collect(),
        other => other,
    }
}

/// The first setting in which two runs differ, as `name: saved X, now Y`.
fn difference(name: &str, saved: &Value, now: &Value) -> Option<String> {
    if let (Value::Object(saved), Value::Object(now)) = (saved, now) {
        let keys = saved
            .keys()
            .chain(now.keys().filter(|k| !saved.contains_key(*k)));
        for key in keys {
            let name = if name.is_empty() {
                key.clone()
            } else {
                format!("{name}.{key}")
            };
            let value =
                |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or(Value::Null);
            if let Some(found) = difference(&name, &value(saved), &value(now)) {
                return Some(found);
            }
        }
        return None;
    }
    (saved != now).then(|| format!("`{name}` was {saved} and is {now} now"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn saved() -> Saved {
        let value = Tensor::randn(0f32, 1.0, (3, 2), &Device::Cpu).unwrap();
        let values = Values::from([("double.01.linear.img.weight".to_owned(), value)]);
        Saved {
            progress: Progress {
                phase: 1,
                step: 7,
                best: Some((0.1 + 0.2, 5)),
                ..Progress::default()
            },
            values: values.clone(),
            best: Values::new(),
            moments: [values.clone(), values],
        }
    }

    #[test]
    fn what_is_saved_comes_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(&folder.path().join("run"), json!({ "seed": 1 }));
        assert!(file.load().unwrap().is_none());
        let before = saved();
        file.save(&before).unwrap();
        let after = file.load().unwrap().unwrap();
        assert_eq!(after.progress.best, before.progress.best);
        assert_eq!((after.progress.phase, after.progress.step), (1, 7));
        let bits = |v: &Values| -> Vec<u32> {
            let all = v
                .values()
                .flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            all.map(f32::to_bits).collect()
        };
        assert_eq!(bits(&after.values), bits(&before.values));
        assert_eq!(bits(&after.moments[1]), bits(&before.moments[1]));
        assert!(after.best.is_empty());
        std::fs::write(folder.path().join("run/notes"), "mine").unwrap();
        // what runs leave that are killed while they write
        for left in [
            ".fastflux-aB3aB3aB3aB3aB3a",
            "state.safetensors.tmp",
            "images.safetensors",
        ] {
            std::fs::write(folder.path().join("run").join(left), "half").unwrap();
        }
        std::fs::create_dir_all(folder.path().join("run/.fastflux-ZzZzZzZzZzZzZzZz/old")).unwrap();
        remove(&folder.path().join("run")).unwrap();
        assert!(file.load().unwrap().is_none() && folder.path().join("run/notes").exists());
        std::fs::remove_file(folder.path().join("run/notes")).unwrap();
        remove(&folder.path().join("run")).unwrap();
        assert!(!folder.path().join("run").exists());
    }

    #[test]
    fn every_float_comes_back_to_the_bit() {
        let mut x = 0.012_345f64;
        for _ in 0..2000 {
            x = (x * 1.618_033_988_749_895).fract() + 1e-7;
            let value = json!({ "loss": [x, 3, "f64", null], "n": 1e-300 * x });
            let text = serde_json::to_string(&to_bits(value.clone())).unwrap();
            assert_eq!(from_bits(serde_json::from_str(&text).unwrap()), value);
        }
    }

    #[test]
    fn a_run_that_an_earlier_version_saved_is_resumed() {
        let folder = tempfile::tempdir().unwrap();
        let file = |key: &str| {
            let settings = json!({ "recipe": { key: { "steps": 3 }, "steps": 2 } });
            StateFile::new(folder.path(), settings)
        };
        file("finish").save(&saved()).unwrap();
        assert!(file("finetune").load().unwrap().is_some());
        let old = json!({ "phase": 1, "step": 7, "before": 0.5, "best": [0.3, 5], "looks": 2, "reports": [], "log": [] });
        let progress: Progress = serde_json::from_value(old).unwrap();
        assert_eq!((progress.step, progress.evaluations), (7, 2));
    }

    #[test]
    fn a_run_of_other_settings_is_refused_by_the_setting() {
        let folder = tempfile::tempdir().unwrap();
        let file = |rank| {
            let settings = json!({ "recipe": { "lora": { "rank": rank }, "steps": 3 } });
            StateFile::new(folder.path(), settings)
        };
        file(8).save(&saved()).unwrap();
        let error = file(16).load().unwrap_err().to_string();
        assert!(
            error.contains("`recipe.lora.rank` was 8 and is 16 now"),
            "{error}"
        );
        file(8).load().unwrap();
    }
}
