//! Where models lie on this machine: a small file in the user's cache, by fingerprint. Checkpoints name the model that they
//! were made of, but hold no path, and no path in a stranger's checkpoint is followed.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Pipeline, locate::locate};
use crate::{
    checkpoint::{
        config,
        record::{self, Record},
    },
    files::{BUNDLED, MAX_SMALL, output, parse_file, parse_id, read_small},
    ui::Reporter,
};

/// Places that are remembered of one model.
const MAX_PLACES: usize = 8;

/// Where a model and its parts were.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(super) struct Place {
    /// What `--model` named, absolute.
    pub(super) model: String,
    /// What `--text-encoders` named, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) text_encoders: Option<PathBuf>,
    /// What `--vae` named, absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) vae: Option<PathBuf>,
}

type Places = BTreeMap<String, Vec<Place>>;

/// `fastflux/models.json` in the user's cache.
fn file() -> Option<PathBuf> {
    let set = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))?;
    Some(cache.join("fastflux/models.json"))
}

fn read() -> Places {
    let text = file().and_then(|path| read_small(&path, MAX_SMALL).ok());
    text.and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

/// The places of the model with this fingerprint that are still there, the latest first.
pub(super) fn places(fingerprint: &str) -> Vec<Place> {
    let mut places = read().remove(fingerprint).unwrap_or_default();
    places.retain(|place| Path::new(&place.model).exists());
    places.reverse();
    places
}

/// What a checkpoint calls its model: the name of a file or folder, or a hub id.
pub(super) fn name_of(model_ref: &str) -> String {
    let of_hub = parse_id(model_ref).is_some() || parse_file(model_ref).is_some();
    if model_ref == BUNDLED || (of_hub && !Path::new(model_ref).exists()) {
        return model_ref.to_owned();
    }
    let name = Path::new(model_ref).file_name();
    name.map_or_else(
        || model_ref.to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

impl Pipeline {
    /// How files call the model: without folders.
    pub fn public_name(&self) -> String {
        name_of(&self.model_ref)
    }

    /// Remembers where this model lies. Not worth failing for: without it the user names the model again.
    pub(super) fn remember(&self, fingerprint: &str) {
        if !Path::new(&self.model_ref).exists() {
            return;
        }
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let place = Place {
            model: self.model_ref.clone(),
            text_encoders: self.components.choice.text_encoders.as_ref().map(absolute),
            vae: self.components.choice.vae.as_ref().map(absolute),
        };
        let mut all = read();
        let places = all.entry(fingerprint.to_owned()).or_default();
        places.retain(|other| other.model != place.model && Path::new(&other.model).exists());
        places.push(place);
        let surplus = places.len().saturating_sub(MAX_PLACES);
        places.drain(..surplus);
        let Some(file) = file() else { return };
        let Ok(text) = serde_json::to_vec_pretty(&all) else {
            return;
        };
        let folder = file.parent().unwrap_or(Path::new("."));
        let _ = std::fs::create_dir_all(folder).map(|()| output::write_bytes(&file, &text));
    }
}

/// What opens the model that a record names: where this machine knows it, or next to `folder`, where it has the right
/// fingerprint, or the bundled model, or its hub id.
pub(super) fn base_of(record: &Record, folder: Option<&Path>) -> Option<Place> {
    let (base, wanted) = (&record.base, &record.base_fingerprint);
    let of = |model: &str| Place {
        model: model.to_owned(),
        ..Place::default()
    };
    if base == BUNDLED {
        return Some(of(BUNDLED));
    }
    let known = places(wanted);
    let same = known
        .iter()
        .find(|place| name_of(&place.model) == name_of(base));
    if let Some(place) = same.or(known.first()) {
        return Some(place.clone());
    }
    let name = Path::new(base).file_name()?;
    for folder in folder
        .into_iter()
        .flat_map(|folder| [Some(folder), folder.parent()])
        .flatten()
    {
        let path = folder.join(name);
        let text = path.to_string_lossy();
        let is_it = || {
            let located = locate(Some(&text), &Reporter::silent()).ok()?;
            let found = record::fingerprint(&config::canonical(&located.raw).ok()?).ok()?;
            (found == *wanted).then_some(())
        };
        if path.exists() && is_it().is_some() {
            return Some(of(&text));
        }
    }
    (parse_id(base).is_some() || parse_file(base).is_some()).then(|| of(base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hold_no_folders() {
        for (model_ref, name) in [
            (
                "/home/somebody/secret/flux1-dev.safetensors",
                "flux1-dev.safetensors",
            ),
            ("/home/somebody/flux", "flux"),
            (
                "black-forest-labs/FLUX.1-dev@main",
                "black-forest-labs/FLUX.1-dev@main",
            ),
            (BUNDLED, BUNDLED),
        ] {
            assert_eq!(name_of(model_ref), name);
        }
    }
}
