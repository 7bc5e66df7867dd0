//! Small files that are read whole: JSON, texts, lists of prompts. What is no file is not opened.

use std::{fs::File, io::Read, path::Path};

use anyhow::{Context, Result, anyhow};

/// Bytes of the largest JSON, text or list of prompts that is read.
pub const MAX_SMALL: u64 = 64 << 20;

/// Fails at what is no file before it is opened: opening a pipe waits for somebody who writes into it.
pub(super) fn check_file(path: &Path) -> Result<()> {
    let meta =
        std::fs::metadata(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    // what a shell made of `<(command)`
    let of_shell = path.starts_with("/dev/fd") || path.starts_with("/proc/self/fd");
    if !meta.is_file() && !of_shell {
        let what = if meta.is_dir() {
            "a folder"
        } else {
            "a pipe or a device"
        };
        return Err(anyhow!("`{}` is {what}, not a file", path.display()));
    }
    Ok(())
}

/// The bytes of a small file, at most `most` of them.
///
/// # Errors
/// When it is no file, cannot be read, or is larger; the message names it.
pub fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let name = path.display();
    check_file(path)?;
    let file = File::open(path).with_context(|| format!("cannot open `{name}`"))?;
    let mut bytes = Vec::new();
    let read = file.take(most + 1).read_to_end(&mut bytes);
    read.with_context(|| format!("cannot read `{name}`"))?;
    if bytes.len() as u64 > most {
        return Err(anyhow!(
            "`{name}` is larger than {} MB, which no such file is",
            most >> 20
        ));
    }
    Ok(bytes)
}
