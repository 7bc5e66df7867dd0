//! What `--lora` takes: a file or the folder of an adapter, and a weight.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};

use super::recorded::RecordedLora;
use crate::files::parse_id;

/// What PEFT calls the weights of an adapter.
pub(super) const ADAPTER: &str = "adapter_model.safetensors";
/// Files in the folder of an adapter.
const IN_FOLDER: [&str; 3] = [
    ADAPTER,
    "pytorch_lora_weights.safetensors",
    "lora.safetensors",
];

/// `FILE[:WEIGHT]`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraChoice {
    /// A file, or the folder of an adapter.
    pub path: PathBuf,
    /// What it is multiplied by.
    pub weight: f32,
}

impl FromStr for LoraChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = |path: &str| Self {
            path: path.into(),
            weight: 1.0,
        };
        if text.is_empty() {
            return Err("expected FILE or FILE:WEIGHT".to_owned());
        }
        if Path::new(text).exists() {
            return Ok(whole(text));
        }
        let Some((path, weight)) = text.rsplit_once(':') else {
            return Ok(whole(text));
        };
        match weight.parse::<f32>() {
            Ok(weight) if weight.is_finite() && !path.is_empty() => Ok(Self {
                weight,
                ..whole(path)
            }),
            // `C:\x.safetensors`
            _ if weight.contains(['/', '\\']) => Ok(whole(text)),
            _ => Err(format!(
                "the weight `{weight}` is not a number (expected FILE:WEIGHT such as style.safetensors:0.8)"
            )),
        }
    }
}

/// The file of an adapter, which may be named by its folder.
pub(super) fn file_of(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        let name = path.display().to_string();
        let hint = if name.contains("://") || parse_id(&name).is_some() {
            "\nhint: name a file or a folder of this machine; `hf download` fetches those of the hub"
        } else {
            ""
        };
        ensure!(path.exists(), "--lora: `{name}` does not exist{hint}");
        return Ok(path.to_path_buf());
    }
    let known = IN_FOLDER.iter().map(|file| path.join(file));
    if let Some(file) = known.into_iter().find(|file| file.is_file()) {
        return Ok(file);
    }
    let entries = std::fs::read_dir(path)
        .with_context(|| format!("--lora: cannot list `{}`", path.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let files: Vec<PathBuf> = files
        .filter(|file| file.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    match files.as_slice() {
        [one] => Ok(one.clone()),
        [] => bail!("--lora: `{}` holds no .safetensors file", path.display()),
        _ => bail!(
            "--lora: `{}` holds several .safetensors files\nhint: name one of them",
            path.display()
        ),
    }
}

impl RecordedLora {
    /// The choice that adds it again.
    pub fn choice(&self) -> LoraChoice {
        LoraChoice {
            path: self.file.clone(),
            weight: self.weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_what_follows_the_last_colon() {
        let of = |text: &str| {
            text.parse::<LoraChoice>()
                .map(|c| (c.path.display().to_string(), c.weight))
        };
        assert_eq!(of("a.safetensors"), Ok(("a.safetensors".to_owned(), 1.0)));
        assert_eq!(
            of("a:b.safetensors:-0.5"),
            Ok(("a:b.safetensors".to_owned(), -0.5))
        );
        assert_eq!(
            of("C:\\x.safetensors"),
            Ok(("C:\\x.safetensors".to_owned(), 1.0))
        );
        for wrong in ["a.safetensors:", "a.safetensors:much", "a:nan", "a:inf", ""] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
