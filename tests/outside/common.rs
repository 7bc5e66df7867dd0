//! What the tests share: running the program, expecting success or one clear message, files to try it on.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

pub(crate) fn golden(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path);
    path.display().to_string()
}

/// Commands that compute on a device.
const COMPUTE: [&str; 9] = [
    "bench",
    "calibrate",
    "eval",
    "generate",
    "plan",
    "prune",
    "score",
    "train-sandwich",
    "verify",
];

/// `fastflux` in `folder`: on the CPU, as a build for GPUs would take one by itself, and bf16 with it; or in f32 on the
/// device that `FASTFLUX_TEST_DEVICE` names.
pub(crate) fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("fastflux"));
    command
        .current_dir(folder)
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("RUST_BACKTRACE");
    match std::env::var("FASTFLUX_TEST_DEVICE") {
        Err(_) => {
            command.env("CUDA_VISIBLE_DEVICES", "");
        }
        Ok(device) if COMPUTE.contains(&args[0]) && !args.contains(&"--device") => {
            command.args(["--device", &device]);
            if !args.contains(&"--dtype") {
                command.args(["--dtype", "f32"]);
            }
        }
        Ok(_) => {}
    }
    command
}

pub(crate) fn fastflux(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().unwrap()
}

pub(crate) fn ok(folder: &Path, args: &[&str]) -> String {
    let out = fastflux(folder, args);
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

pub(crate) fn json(folder: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ok(folder, args)).unwrap()
}

/// Runs, expects exit code 1 and a message with all of `words`, no panic, and nothing new in the folder.
pub(crate) fn refused(folder: &Path, args: &[&str], words: &[&str]) {
    fails_with(1, folder, args, words);
}

/// Refused by the command line itself: a value that its flag cannot have.
pub(crate) fn misused(folder: &Path, args: &[&str], words: &[&str]) {
    fails_with(2, folder, args, words);
}

fn fails_with(code: i32, folder: &Path, args: &[&str], words: &[&str]) {
    let before = list(folder);
    says(code, folder, args, words);
    assert_eq!(list(folder), before, "{args:?} left something behind");
}

/// Runs, expects exit code `code` and a message with all of `words`, nothing printed, and no panic.
pub(crate) fn says(code: i32, folder: &Path, args: &[&str], words: &[&str]) {
    let out = fastflux(folder, args);
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{args:?}: {message}");
    for word in words {
        assert!(
            message.contains(word),
            "{args:?}: `{word}` is not in: {message}"
        );
    }
    assert!(out.stdout.is_empty(), "{args:?} printed something");
}

pub(crate) fn list(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.sort();
    names
}

pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A safetensors file with this header and these bytes of data.
pub(crate) fn safetensors(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

/// Pruning settings that take a second; refitting all projections would take three more.
pub(crate) const QUICK: &str = r#"{"calibration": {"num-prompts": 8, "noise-levels-per-image": 4, "steps": 2}, "score": {"held-out": 16}, "fit": {"refit-projections": "head"}}"#;

pub(crate) fn quick_prune(folder: &Path, output: &str, more: &[&str]) -> Value {
    prune_by(QUICK, folder, output, more)
}

/// Prunes with `recipe`, which is left as `quick.json`.
pub(crate) fn prune_by(recipe: &str, folder: &Path, output: &str, more: &[&str]) -> Value {
    fs::write(folder.join("quick.json"), recipe).unwrap();
    let args = [
        "prune",
        "--recipe",
        "quick.json",
        "--output",
        output,
        "--json",
    ];
    json(folder, &[&args, more].concat())
}

/// Copies a folder.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
