//! What is not on the device: streamed blocks, limits, tiles. The same numbers come out, whatever the memory.

use std::fs;

use crate::common::*;

/// Sizes of the bundled model in f32, bytes.
const WHOLE: u64 = 22_500_000;

#[test]
fn pictures_are_the_same_wherever_the_blocks_are() {
    let work = folder();
    let w = work.path();
    let draw = |output: &str, more: &[&str]| {
        let prompt = "a red circle left of a blue square on a white background";
        let args = ["generate", "--steps", "2", "--output", output, "--prompt"];
        let out = fastflux(w, &[&args, [prompt].as_slice(), more].concat());
        let talk = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{talk}");
        (fs::read(w.join(output)).unwrap(), talk)
    };
    let (want, talk) = draw("whole.png", &[]);
    assert!(!talk.contains("stay on the device"), "{talk}");
    let (got, talk) = draw("offload.png", &["--offload"]);
    assert!(
        got == want && talk.contains("0 of 15 blocks stay"),
        "{talk}"
    );
    let (got, talk) = draw("half.png", &["--max-vram", "16MB"]);
    assert!(got == want, "{talk}");
    let count: usize = {
        let at = talk.find(" of 15 blocks stay").unwrap();
        talk[..at].rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!((3..15).contains(&count), "{talk}");
    let (got, talk) = draw("enough.png", &["--max-vram", "1GiB"]);
    assert!(got == want && !talk.contains("blocks stay"), "{talk}");
    fs::create_dir(w.join("empty")).unwrap();
    let prompt = ["generate", "--prompt", "a fox", "--output", "fox.png"];
    let few = ["--max-vram", "2MB"];
    refused(
        w,
        &[prompt.as_slice(), &few].concat(),
        &["--max-vram", "two blocks at a time", "hint: allow"],
    );
}

#[test]
fn pruning_gives_the_same_bytes_without_a_block_on_the_device() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "whole", &["--blocks", "double.01,single.03"]);
    let more = ["--blocks", "double.01,single.03", "--offload"];
    quick_prune(w, "offload", &more);
    for file in ["flux.safetensors", "before-after.png", "plan.json"] {
        let read = |folder: &str| fs::read(w.join(folder).join(file)).unwrap();
        assert!(read("whole") == read("offload"), "{file}");
    }
    let demand = |more: &[&str]| {
        let args = ["prune", "--dry-run", "--json", "--recipe", "quick.json"];
        json(w, &[&args, more].concat())
    };
    let (whole, few) = (demand(&[]), demand(&["--offload"]));
    assert_eq!(whole["blocks_on_the_device"], 15);
    assert_eq!(few["blocks_on_the_device"], 0);
    let weights = |demand: &serde_json::Value| demand["bytes"]["weights"].as_u64().unwrap();
    assert!(weights(&whole) > WHOLE - 500_000 && weights(&whole) < WHOLE + 500_000);
    assert!(weights(&few) < WHOLE / 3, "{}", weights(&few));
}

#[test]
fn scores_and_reports_are_the_same_without_a_block_on_the_device() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let score = |output: &str, more: &[&str]| {
        let args = ["score", "--recipe", "quick.json", "--output", output];
        ok(w, &[&args, more].concat());
        fs::read(w.join(output)).unwrap()
    };
    let want = score("whole.json", &[]);
    assert!(score("offload.json", &["--offload"]) == want);
    quick_prune(w, "pruned", &["--blocks", "single.03"]);
    let eval = |output: &str, more: &[&str]| {
        let args = ["eval", "--model", "pruned", "--num", "4", "--steps", "2"];
        let output = ["--output", output, "--json"];
        json(w, &[&args, output.as_slice(), more].concat())
    };
    let (want, got) = (eval("whole", &[]), eval("offload", &["--offload"]));
    assert_eq!(want["pairs"], got["pairs"]);
    let error = |report: &serde_json::Value| report["models"][0]["against_baseline"].clone();
    assert_eq!(error(&want), error(&got));
}
