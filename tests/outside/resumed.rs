//! Long work that is killed goes on where it was, and its output has the same bytes.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::common::*;

/// Runs `args`, kills it once `file` is there, runs it again to the end; what the second run says.
fn killed_and_resumed(folder: &Path, args: &[&str], file: &str) -> String {
    let mut child = command(folder, args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let mut finished = None;
    while !folder.join(file).exists() && finished.is_none() {
        assert!(begun.elapsed() < Duration::from_secs(300), "no `{file}`");
        std::thread::sleep(Duration::from_millis(1));
        finished = child.try_wait().unwrap();
    }
    assert!(finished.is_none(), "`{file}` was not seen: {finished:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(folder.join(file).exists(), "finished before it was killed");
    let out = fastflux(folder, args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{said}");
    assert!(!folder.join(file).exists(), "{file} is left");
    said
}

fn same(folder: &Path, a: &str, b: &str) {
    let read = |name: &str| fs::read(folder.join(name)).unwrap();
    assert!(read(a) == read(b), "{a} and {b} differ");
}

/// Many held-out noised latents, so that comparing takes a while.
const RECIPE: &str = r#"{"calibration": {"num-prompts": 8, "noise-levels-per-image": 4, "steps": 2}, "score": {"held-out": 32}, "fit": {"refit-projections": "none"}}"#;

#[test]
fn scores_and_choices_go_on() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("recipe.json"), RECIPE).unwrap();
    let score = [
        "score",
        "--recipe",
        "recipe.json",
        "--save-every",
        "0",
        "--output",
    ];
    ok(w, &[&score[..], &["whole.json"]].concat());
    let args = [&score[..], &["killed.json"]].concat();
    let said = killed_and_resumed(w, &args, "killed.json.partial.json");
    assert!(said.contains("killed.json.partial.json"), "{said}");
    assert!(said.contains("forwards are done"), "{said}");
    same(w, "whole.json", "killed.json");
    same(w, "whole.svg", "killed.svg");
    // other options are no continuation
    let prune = [
        "prune",
        "--recipe",
        "recipe.json",
        "--save-every",
        "0",
        "--output",
    ];
    ok(w, &[&prune[..], &["whole"]].concat());
    let args = [&prune[..], &["killed"]].concat();
    killed_and_resumed(w, &args, "killed.partial.json");
    for file in [
        "flux.safetensors",
        "plan.json",
        "scores.json",
        "before-after.png",
    ] {
        same(w, &format!("whole/{file}"), &format!("killed/{file}"));
    }
}

#[test]
fn unfinished_work_of_other_options_is_named() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("recipe.json"), RECIPE).unwrap();
    let journal = r#"{"settings": "other", "measured": {}}"#;
    fs::write(w.join("s.json.partial.json"), journal).unwrap();
    let args = ["score", "--recipe", "recipe.json", "--output", "s.json"];
    refused(w, &args, &["s.json.partial.json", "other options"]);
    fs::write(w.join("s.json.partial.json"), "{").unwrap();
    refused(w, &args, &["s.json.partial.json", "delete the file"]);
}

#[test]
fn evaluations_go_on() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "pruned", &[]);
    let eval = [
        "eval",
        "--model",
        "pruned",
        "--num-prompts",
        "48",
        "--steps",
        "4",
    ];
    let eval = [&eval[..], &["--save-every", "0", "--output"]].concat();
    ok(w, &[&eval[..], &["whole"]].concat());
    let args = [&eval[..], &["killed"]].concat();
    let said = killed_and_resumed(w, &args, "killed.images.partial");
    assert!(said.contains("going on from"), "{said}");
    same(w, "whole/images.png", "killed/images.png");
    // with other options it is no continuation
    let left = w.join("other.images.partial");
    safetensors(&left, r#"{"__metadata__":{"fastflux-eval":"{}"}}"#, &[]);
    let args = [&eval[..], &["other"]].concat();
    refused(w, &args, &["other.images.partial", "other options"]);
}

/// Stops a run of `args` by a signal once `file` is there; what it says.
#[cfg(unix)]
fn stopped(folder: &Path, args: &[&str], file: &str) -> String {
    let mut child = command(folder, args);
    let child = child.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = child.spawn().unwrap();
    let begun = Instant::now();
    while !folder.join(file).exists() {
        assert!(begun.elapsed() < Duration::from_secs(300), "no `{file}`");
        std::thread::sleep(Duration::from_millis(1));
    }
    let id = child.id().to_string();
    let mut kill = std::process::Command::new("kill");
    assert!(kill.args(["-TERM", &id]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    assert!(!out.status.success(), "finished before it was stopped");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
#[cfg(unix)]
fn a_training_that_is_stopped_before_it_saved_leaves_nothing() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "pruned", &["--blocks", "single.02"]);
    let before = list(w);
    // images for minutes
    let train = "train-sandwich --model pruned --num-prompts 4000 --output trained";
    let args: Vec<&str> = train.split(' ').collect();
    let said = stopped(w, &args, "trained.state/lock");
    assert!(!said.contains("goes on from"), "{said}");
    assert_eq!(list(w), before);
}

#[test]
#[cfg(unix)]
fn what_is_stopped_says_where_it_goes_on() {
    let work = folder();
    let w = work.path();
    // long enough to be stopped on any machine
    let long = RECIPE.replace("32", "640");
    fs::write(w.join("recipe.json"), long).unwrap();
    let args = "score --recipe recipe.json --save-every 0 --output s.json";
    let args: Vec<&str> = args.split(' ').collect();
    let said = stopped(w, &args, "s.json.partial.json");
    assert!(said.contains("goes on from `s.json.partial"), "{said}");
}
