//! `calibrate`, `merge-stats`, `score` and `plan`.

use std::{collections::BTreeMap, fs, path::Path, process::Stdio, time::Duration};

use serde_json::Value;

use crate::common::*;

/// Several units, few noised latents.
const UNITS: &str = r#"{"calibration": {"num-prompts": 24, "steps": 3, "noise-levels-per-image": 1.5, "batch": 5}, "score": {"held-out": 16}}"#;

pub(crate) fn calibrate(folder: &Path, output: &str, more: &[&str]) -> Value {
    fs::write(folder.join("units.json"), UNITS).unwrap();
    let args = [
        "calibrate",
        "--recipe",
        "units.json",
        "--output",
        output,
        "--json",
    ];
    json(folder, &[&args, more].concat())
}

/// All tensors of a file as numbers.
fn tensors(path: &Path) -> BTreeMap<String, Vec<f64>> {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |view: &safetensors::tensor::TensorView| -> Vec<f64> {
        let data = view.data();
        match view.dtype() {
            safetensors::Dtype::F64 => data
                .chunks(8)
                .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            safetensors::Dtype::F32 => data
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            other => panic!("{other:?}"),
        }
    };
    file.iter()
        .map(|(name, view)| (name.to_owned(), numbers(&view)))
        .collect()
}

#[test]
fn merged_shards_equal_one_run() {
    let work = folder();
    let whole = calibrate(work.path(), "whole.safetensors", &[]);
    assert_eq!(whole["complete"], true);
    assert!(whole["units"].as_u64().unwrap() >= 5);
    for i in 1..=3 {
        let (shard, output) = (format!("{i}/3"), format!("part{i}.safetensors"));
        let part = calibrate(work.path(), &output, &["--shard", &shard]);
        assert_eq!(part["complete"], false);
    }
    let parts = [
        "part2.safetensors",
        "part3.safetensors",
        "part1.safetensors",
    ];
    refused(
        work.path(),
        &["merge-stats", parts[0], parts[1]],
        &["missing"],
    );
    refused(
        work.path(),
        &["merge-stats", parts[0], parts[0]],
        &["part2.safetensors", "overlapping"],
    );
    refused(
        work.path(),
        &["prune", "--stats", parts[0], "--output", "p"],
        &["part2.safetensors", "merge-stats"],
    );
    let merge = ["merge-stats", "--output", "merged.safetensors"];
    ok(work.path(), &[&merge, &parts[..]].concat());
    let (whole, merged) = (
        tensors(&work.path().join("whole.safetensors")),
        tensors(&work.path().join("merged.safetensors")),
    );
    assert!(whole.keys().eq(merged.keys()));
    assert_eq!(whole.keys().filter(|k| k.contains("gram")).count(), 30);
    for (name, values) in &whole {
        let scale = values.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        for (a, b) in values.iter().zip(&merged[name]) {
            assert!((a - b).abs() <= 1e-9 * scale, "{name}: {a} {b}");
        }
    }
    let other = calibrate(
        work.path(),
        "other.safetensors",
        &["--seed", "1", "--shard", "1/3"],
    );
    assert_eq!(other["complete"], false);
    refused(
        work.path(),
        &["merge-stats", parts[0], "other.safetensors"],
        &["other.safetensors", "seed"],
    );
}

#[test]
fn a_killed_calibration_goes_on_and_ends_with_the_same_bytes() {
    let work = folder();
    let w = work.path();
    calibrate(w, "whole.safetensors", &[]);
    let args = [
        "calibrate",
        "--recipe",
        "units.json",
        "--save-every",
        "0",
        "--output",
        "stats.safetensors",
    ];
    let partial = w.join("stats.safetensors.partial");
    let mut kills = 0;
    // killed later each time, by half as much again, until it gets through
    let mut wait = Duration::from_millis(60);
    loop {
        let mut child = command(w, &args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(wait);
        wait += wait / 2;
        let _ = child.kill();
        if child.wait().unwrap().success() {
            assert!(!partial.exists());
            break;
        }
        kills += 1;
        if w.join("stats.safetensors").exists() {
            break; // killed after the last thing it does: what it left must be whole all the same
        }
    }
    assert!(kills > 0, "nothing was killed");
    assert!(!w.join("stats.safetensors.partial.tmp").exists());
    let [whole, resumed] =
        ["whole", "stats"].map(|n| fs::read(w.join(format!("{n}.safetensors"))).unwrap());
    assert!(whole == resumed, "after {kills} kills");
    // unfinished work of other settings is not gone on with
    fs::rename(w.join("stats.safetensors"), &partial).unwrap();
    refused(
        w,
        &[&args[..], &["--seed", "7"]].concat(),
        &["partial", "seed", "delete"],
    );
}

#[test]
fn statistics_of_another_model_are_refused() {
    let work = folder();
    calibrate(work.path(), "stats.safetensors", &[]);
    let model = golden("dev/pipe");
    for command in [
        ["prune", "--output", "p"],
        ["score", "--output", "s.json"],
        ["plan", "--output", "p.json"],
    ] {
        let more = ["--stats", "stats.safetensors", "--model", &model];
        refused(
            work.path(),
            &[&command[..], &more].concat(),
            &["another model", "calibrate"],
        );
    }
    let whole = fs::read(work.path().join("stats.safetensors")).unwrap();
    fs::write(
        work.path().join("cut.safetensors"),
        &whole[..whole.len() / 2],
    )
    .unwrap();
    for file in [
        "cut.safetensors",
        "nowhere.safetensors",
        &golden("dev/bfl.safetensors"),
    ] {
        refused(
            work.path(),
            &["prune", "--stats", file, "--output", "p"],
            &[file],
        );
    }
}

#[test]
fn images_with_captions_serve_as_well() {
    let work = folder();
    let w = work.path();
    let drawn = [
        "generate",
        "--prompt",
        "a red circle at the left on a white background",
        "--num-images",
        "9",
        "--steps",
        "4",
        "--output",
        "photos",
    ];
    ok(w, &drawn);
    let args = [
        "calibrate",
        "--images",
        "photos",
        "--output",
        "stats.safetensors",
        "--json",
    ];
    refused(w, &args, &["photos", "caption"]);
    for entry in list(&w.join("photos")) {
        fs::write(
            entry.with_extension("txt"),
            "a red circle at the left on a white background",
        )
        .unwrap();
    }
    let stats = json(w, &args);
    assert_eq!(stats["recipe"]["source"], "images");
    assert_eq!(stats["recipe"]["num-prompts"], 8);
    // 8 images, 4 noised latents of each, 16 tokens
    assert_eq!(stats["blocks"][0]["tokens"]["img"], 512.0);
    fs::create_dir(w.join("none")).unwrap();
    refused(
        w,
        &["calibrate", "--images", "none", "--output", "s.safetensors"],
        &["none", "no image"],
    );
}

#[test]
fn what_a_calibration_takes_is_said_before_it_starts() {
    let work = folder();
    let w = work.path();
    let all = json(w, &["calibrate", "--dry-run", "--json"]);
    assert_eq!(all["blocks_with_sums"], 15);
    let few = json(
        w,
        &[
            "calibrate",
            "--dry-run",
            "--json",
            "--stats-memory",
            "1.7MB",
        ],
    );
    assert_eq!(few["blocks_with_sums"], 3);
    // nothing is summed if nothing is to be chosen
    let plan = |more: &[&str]| json(w, &[&["prune", "--dry-run", "--json"], more].concat());
    let (chosen, given) = (plan(&[]), plan(&["--blocks", "single.03"]));
    assert_eq!(given["blocks_with_sums"], 0);
    assert_eq!(given["forwards"]["statistics"], 0);
    assert!(given["bytes"]["host"].as_u64() < chosen["bytes"]["host"].as_u64());
    assert!(list(w).is_empty());
    let stats = calibrate(w, "stats.safetensors", &["--stats-memory", "1.7MB"]);
    let rows = |block: &&Value| block["rows"]["img"].as_f64().unwrap() > 0.0;
    assert_eq!(
        stats["blocks"]
            .as_array()
            .unwrap()
            .iter()
            .filter(rows)
            .count(),
        3
    );
    // the candidates are what blocks are chosen from
    let args = [
        "prune",
        "--stats",
        "stats.safetensors",
        "--ratio",
        "0.07",
        "--output",
        "p",
        "--json",
    ];
    let pruned = json(w, &args);
    assert_eq!(pruned["replaced"].as_array().unwrap().len(), 1);
}

#[test]
fn fewer_tokens_can_enter_the_sums() {
    let work = folder();
    let stats = calibrate(
        work.path(),
        "few.safetensors",
        &["--tokens-per-forward", "32"],
    );
    let forwards = 24f64 * 1.5 / 5.0;
    let rows = stats["blocks"][0]["rows"]["img"].as_f64().unwrap();
    assert!(
        rows <= 32.0 * (forwards + 5.0) && rows >= 32.0 * forwards.floor(),
        "{rows}"
    );
    assert_eq!(stats["blocks"][0]["tokens"]["img"], 36.0 * 16.0);
}
