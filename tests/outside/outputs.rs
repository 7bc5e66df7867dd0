//! What outputs may and may not replace, and what is left of a run that ends early.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::common::*;

#[test]
fn force_replaces_neither_inputs_nor_what_others_wrote() {
    let work = folder();
    let w = work.path();
    copy(Path::new(&golden("dev/pipe")), &w.join("pipe"));
    let q = "--model pipe --num-prompts 4 --steps 1 --width 32 --height 32 --force";
    let q: Vec<&str> = q.split(' ').collect();
    let with = |first: &[&'static str], more: &[&'static str]| [first, &q, more].concat();
    refused(
        w,
        &with(&["prune"], &["--output", "pipe"]),
        &["`pipe`", "did not write"],
    );
    refused(w, &with(&["prune"], &["--output", "."]), &["`.`"]);
    fs::create_dir(w.join("mine")).unwrap();
    fs::write(w.join("mine/thesis.txt"), "years").unwrap();
    refused(
        w,
        &with(&["prune"], &["--output", "mine"]),
        &["thesis.txt", "did not write"],
    );
    let file = "pipe/transformer/diffusion_pytorch_model.safetensors";
    refused(
        w,
        &with(&["calibrate"], &["--output", file]),
        &[file, "reads"],
    );
    refused(
        w,
        &with(&["score"], &["--output", "scores.svg"]),
        &["scores.svg", ".json"],
    );
    refused(w, &with(&["score"], &["--output", "mine"]), &["a folder"]);
    let convert = ["convert", "--model", "pipe", "--dtype", "bf16", "--force"];
    let into = |output| [&convert[..], &["--output", output]].concat();
    refused(w, &into(file), &["reads"]);
    refused(w, &into("mine/thesis.txt/x"), &["not a folder"]);
    // what fastflux wrote is replaced
    ok(w, &into("wide"));
    ok(w, &into("wide"));
    let again = ["convert", "--model", "wide", "--dtype", "f16", "--force"];
    refused(
        w,
        &[&again[..], &["--output", "wide"]].concat(),
        &["`wide`", "reads"],
    );
    assert_eq!(fs::read(w.join("mine/thesis.txt")).unwrap(), b"years");
}

#[test]
#[cfg(unix)]
fn a_closed_stderr_does_not_stop_the_work() {
    let work = folder();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let args = [
        "generate", "--steps", "1", "--prompt", "x", "--output", "a.png",
    ];
    let status = command(work.path(), &args)
        .stdout(Stdio::null())
        .stderr(writer)
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    assert!(work.path().join("a.png").is_file());
}

#[test]
#[cfg(target_os = "linux")]
fn names_that_are_no_text_are_written_all_the_same() {
    use std::os::unix::ffi::OsStrExt;
    let work = folder();
    let name = std::ffi::OsStr::from_bytes(b"\xff.safetensors");
    let out = command(work.path(), &["convert", "--dtype", "bf16", "--output"])
        .arg(name)
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    assert!(work.path().join(name).is_file());
}

#[test]
#[cfg(target_os = "linux")]
fn stopped_by_a_signal_nothing_half_written_stays() {
    use std::os::unix::process::ExitStatusExt;
    let work = folder();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/flux1/dev.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    // a gigabyte: seconds of work
    config["num_layers"] = 1.into();
    config["num_single_layers"] = 1.into();
    let outside = folder();
    let path = outside.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    let path = path.to_str().unwrap();
    let args = ["init", "--config", path, "--output", "big.safetensors"];
    let mut child = command(work.path(), &args)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while list(work.path()).is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let pid = child.id().to_string();
    assert!(
        Command::new("sh") // has a kill of its own
            .args(["-c", "kill -TERM \"$0\"", &pid])
            .status()
            .unwrap()
            .success()
    );
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(15), "{status}");
    assert_eq!(list(work.path()), Vec::<std::path::PathBuf>::new());
}

#[test]
#[cfg(target_os = "linux")]
fn a_limit_on_file_sizes_is_an_error() {
    let work = folder();
    let binary = assert_cmd::cargo::cargo_bin!("fastflux");
    let script = "ulimit -f 8; exec \"$0\" convert --dtype bf16 --output c.safetensors";
    let out = Command::new("sh")
        .args(["-c", script])
        .arg(binary)
        .current_dir(work.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{message}");
    assert!(message.contains("`c.safetensors`"), "{message}");
    assert_eq!(list(work.path()), Vec::<std::path::PathBuf>::new());
}
