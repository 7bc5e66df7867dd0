//! The marker of an output folder: a hidden file that lists what fastflux wrote there, so that `--force` replaces that and
//! nothing else.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The marker's name in the folder.
const NAME: &str = ".fastflux.json";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Marker {
    /// `fastflux 0.1.0`.
    written_by: String,
    /// Every file below the folder, with `/` between folders, sorted.
    files: Vec<String>,
}

/// Marks `folder` with the files that it holds.
pub(super) fn write(folder: &Path) -> io::Result<()> {
    let marker = Marker {
        written_by: format!("fastflux {}", env!("CARGO_PKG_VERSION")),
        files: files_below(folder)?
            .iter()
            .filter_map(|path| portable(path))
            .collect(),
    };
    fs::write(folder.join(NAME), serde_json::to_vec_pretty(&marker)?)
}

/// A file in `folder` that fastflux did not write.
pub(super) fn stranger(folder: &Path) -> io::Result<Option<PathBuf>> {
    let marker = fs::read(folder.join(NAME)).ok();
    let marker: Option<Marker> = marker.and_then(|text| serde_json::from_slice(&text).ok());
    // an old or a strange folder: nothing says that any of it is ours
    let marker = marker.unwrap_or_default();
    let ours = |path: &Path| {
        portable(path).is_some_and(|path| path == NAME || marker.files.contains(&path))
    };
    Ok(files_below(folder)?.into_iter().find(|path| !ours(path)))
}

/// Everything below `folder` that is no folder, relative to it, sorted; links are not followed.
fn files_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(below) = folders.pop() {
        for entry in fs::read_dir(folder.join(&below))? {
            let entry = entry?;
            let path = below.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// A relative path as the marker has it; `None` if it is not Unicode.
fn portable(path: &Path) -> Option<String> {
    let parts: Option<Vec<&str>> = path.iter().map(|part| part.to_str()).collect();
    Some(parts?.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_there_when_the_folder_was_marked_is_ours() {
        let work = tempfile::tempdir().unwrap();
        let folder = work.path();
        fs::create_dir(folder.join("transformer")).unwrap();
        for name in ["config.json", "transformer/a.safetensors"] {
            fs::write(folder.join(name), "x").unwrap();
        }
        // names alone say nothing
        assert!(stranger(folder).unwrap().is_some());
        write(folder).unwrap();
        assert_eq!(stranger(folder).unwrap(), None);
        for name in ["plan.json", "transformer/notes.txt"] {
            fs::write(folder.join(name), "mine").unwrap();
            assert_eq!(stranger(folder).unwrap(), Some(PathBuf::from(name)));
            fs::remove_file(folder.join(name)).unwrap();
        }
        fs::remove_file(folder.join("config.json")).unwrap();
        assert_eq!(stranger(folder).unwrap(), None);
        // a damaged marker vouches for nothing
        fs::write(folder.join(NAME), "{").unwrap();
        assert!(stranger(folder).unwrap().is_some());
    }
}
