//! What `train-sandwich` refuses, in one clear message each.

use crate::{
    common::fastflux,
    sandwich::{prepared, refused, train},
};

#[test]
fn what_cannot_be_trained_is_refused() {
    let golden = format!("{}/tests/golden/dev/pipe", env!("CARGO_MANIFEST_DIR"));
    refused(
        &["train-sandwich", "--model", &golden],
        &["nothing replaced", "fastflux prune"],
    );
    refused(
        &train(&["--teacher", &golden]),
        &["is not the model", "--teacher"],
    );
    refused(
        &["train-sandwich", "--model", "pruned", "--rank", "0"],
        &["--rank 0"],
    );
    refused(
        &["train-sandwich", "--model", "pruned", "--rank", "129"],
        &["--rank 129", "128"],
    );
    refused(
        &train(&["--prompts", "empty.txt"]),
        &["--prompts", "no prompt"],
    );
    refused(&train(&["--lr=-1"]), &["--lr"]);
    refused(
        &[
            "train-sandwich",
            "--model",
            "pruned",
            "--log",
            "recipe.json",
        ],
        &["--log", "exists already", "--force"],
    );
    refused(&train(&["--log", "/dev/full"]), &["--log", "/dev/full"]);
    refused(&train(&["--lr", "1e20"]), &["step", "learning rate"]);
    // the same command meets its own state, another one that of other settings
    refused(
        &train(&["--lr", "1e19"]),
        &["`recipe.optimiser.lr`", "--restart"],
    );
    refused(
        &train(&["--log", "pruned/flux.safetensors", "--force"]),
        &["--log", "reads"],
    );
    let existing = train(&["--output", "pruned"]);
    let out = fastflux(prepared(), &existing);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("--force"));
}

#[test]
fn a_run_saved_with_other_settings_is_refused_by_the_setting() {
    let folder = prepared();
    // diverges, so that a state is left behind
    let args = |seed| {
        let mut args = train(&["--output", "other", "--lr", "1e20", "--seed"]);
        args.push(seed);
        args
    };
    assert_eq!(fastflux(folder, &args("1")).status.code(), Some(1));
    assert!(folder.join("other.state/state.safetensors").exists());
    let out = fastflux(folder, &args("2"));
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(
        text.contains("`recipe.seed` was 1 and is 2 now") && text.contains("--restart"),
        "{text}"
    );
}
