//! "Names like these → this": what a file is that is not what was asked for. Asked before any generic message.

use std::fmt;

mod kinds;

use self::kinds::{Kind, MERGE, OF_FLUX, OTHER, UNQUANTIZED};
use super::{Checkpoint, part::Part};

/// What a file is, and what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    what: &'static str,
    hint: &'static str,
}

impl Identity {
    /// How a sentence about the file begins: what is merely in a format that is not read is a FLUX transformer all the same.
    pub(super) fn beginning(self) -> &'static str {
        if self.hint == UNQUANTIZED {
            ""
        } else {
            "is not a FLUX transformer: it "
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nhint: {}", self.what, self.hint)
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, to_end) = match pattern.strip_suffix('$') {
        Some(pattern) => (pattern, true),
        None => (pattern, false),
    };
    match pattern.strip_prefix('^') {
        Some(start) => {
            let mut places = name.match_indices(start);
            places.any(|(at, _)| at == 0 || name.as_bytes()[at - 1] == b'.')
        }
        None if to_end => name.ends_with(pattern),
        None => name.contains(pattern),
    }
}

fn find(kinds: &[Kind], checkpoint: &Checkpoint) -> Option<Identity> {
    let has = |group: &&[&str]| {
        let mut names = checkpoint.names();
        names.any(|name| group.iter().any(|pattern| matches(pattern, name)))
    };
    let kind = kinds.iter().find(|kind| kind.evidence.iter().all(has))?;
    Some(Identity {
        what: kind.what,
        hint: kind.hint,
    })
}

/// What a file is that was to hold a FLUX transformer; `None` if it may hold one, or nothing is known about it.
pub(super) fn transformer(checkpoint: &Checkpoint) -> Option<Identity> {
    if let Some(mlx) = mlx(checkpoint) {
        return Some(mlx);
    }
    let is_base = |name: &str| {
        name.ends_with("img_in.weight")
            || name.ends_with("x_embedder.weight")
            || name.ends_with("img_in.weight._data")
    };
    let whole = checkpoint.names().any(is_base);
    let is_lora = |identity: &Identity| identity.hint == MERGE;
    // a model with a LoRA next to it is a model with tensors that are of no use
    if let Some(found) = find(&OF_FLUX, checkpoint).filter(|found| !(whole && is_lora(found))) {
        return Some(found);
    }
    let is_flux = Part::Transformer.is_in(checkpoint)
        && (whole
            || checkpoint
                .names()
                .any(|name| name.contains("double_blocks.")));
    let other = find(&OTHER, checkpoint);
    other.filter(|other| {
        !is_flux
            || other.what.contains("FLUX.2")
            || other.what.contains("Hunyuan")
            || other.what.contains("Qwen")
    })
}

/// MLX keeps weights as u32 with `scales` and `biases` next to them.
fn mlx(checkpoint: &Checkpoint) -> Option<Identity> {
    let packed = |name: &str| {
        let layer = name.strip_suffix(".weight")?;
        let u32s = checkpoint.get(name)?.format().to_string() == "U32";
        (u32s && checkpoint.contains(&format!("{layer}.scales"))).then_some(())
    };
    let of_mlx = checkpoint.metadata.contains_key("quantization_level")
        || checkpoint.names().find_map(packed).is_some();
    of_mlx.then_some(Identity {
        what: "is quantized for MLX",
        hint: UNQUANTIZED,
    })
}

/// What a file is by its first bytes, where it is neither safetensors nor GGUF.
pub(super) fn by_bytes(bytes: &[u8]) -> Option<Identity> {
    let start = &bytes[..bytes.len().min(1024)];
    let text = String::from_utf8_lossy(start).trim_start().to_lowercase();
    let pickle = "convert it to safetensors first: loading it would run code that it holds";
    let kinds = [
        (
            text.starts_with("version https://git-lfs"),
            "is a Git LFS pointer, not the file itself",
            "fetch the file: `git lfs pull`, or the hub's download",
        ),
        (
            text.starts_with("<!doctype") || text.starts_with("<html") || text.starts_with("<?xml"),
            "is an HTML page, not the file itself",
            "open it in a browser to see what the server says, and download the file again",
        ),
        (
            start.starts_with(b"PK\x03\x04"),
            "is a PyTorch checkpoint (.pt, .ckpt, .bin) or another zip archive, not safetensors",
            pickle,
        ),
        (
            start.starts_with(&[0x80, 2]) || start.starts_with(&[0x80, 4]),
            "is a PyTorch checkpoint (pickle), not safetensors",
            pickle,
        ),
        (
            start.starts_with(&[0x1f, 0x8b]) || start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]),
            "is compressed (gzip or zstd)",
            "unpack it first",
        ),
        (
            text.starts_with('{'),
            "is a JSON text, not safetensors",
            "name the file with the weights, or the folder that holds them",
        ),
        (
            start.starts_with(b"ggjt") || start.starts_with(b"lmgg") || start.starts_with(b"fmgg"),
            "is a GGML file from before GGUF",
            "use a .gguf or .safetensors file",
        ),
    ];
    let found = kinds.into_iter().find(|(is, ..)| *is);
    found.map(|(_, what, hint)| Identity { what, hint })
}

#[cfg(test)]
mod tests;
