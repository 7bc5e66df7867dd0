//! `train-sandwich` from the outside: it trains, goes on after a kill to the same bytes, and refuses what cannot be.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use serde_json::Value;

use crate::{
    common::{command, fastflux, json, ok, says},
    tensors,
};

/// Small, but with every kind of phase: two sandwiches that share a block, and the finetuning.
const SMALL: [&str; 14] = [
    "--num-prompts",
    "16",
    "--steps",
    "4",
    "--finetune",
    "4",
    "--batch",
    "8",
    "--rank",
    "4",
    "--save-every",
    "1",
    "--recipe",
    "recipe.json",
];

/// A folder with a pruned model (`pruned`) and a quick recipe in it, made once.
pub(crate) fn prepared() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let blocks = "double.01,double.03";
        let args = [
            "prune",
            "--blocks",
            blocks,
            "--num-prompts",
            "16",
            "--steps",
            "2",
        ];
        ok(folder.path(), &args);
        fs::write(
            folder.path().join("recipe.json"),
            r#"{ "evaluate-every": 2, "data": { "steps": 2, "held-out": 12 },
                 "optimiser": { "lr": 3e-5, "warmup": 1 }, "finetune": { "lr": 3e-5 } }"#,
        )
        .unwrap();
        fs::write(folder.path().join("empty.txt"), "\n  \n").unwrap();
        folder
    });
    folder.path()
}

pub(crate) fn train<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["train-sandwich", "--model", "pruned"];
    all.extend(SMALL);
    all.extend(args);
    all
}

/// What a run wrote that must be the same for the same seed.
fn bytes(folder: &Path, output: &str) -> [Vec<u8>; 2] {
    ["flux.safetensors", "sandwich.safetensors"]
        .map(|name| fs::read(folder.join(output).join(name)).unwrap())
}

/// Expects exit code 1, no panic, a message with all of `words`, and no output.
pub(crate) fn refused(args: &[&str], words: &[&str]) {
    let folder = prepared();
    let mut all = args.to_vec();
    all.extend(["--output", "refused"]);
    says(1, folder, &all, words);
    assert!(!folder.join("refused").exists());
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let folder = prepared();
    ok(
        folder,
        &train(&["--output", "whole", "--log", "whole.jsonl"]),
    );
    let args = train(&["--output", "killed", "--log", "killed.jsonl"]);
    let report = fs::read_to_string(folder.join("whole/training.json")).unwrap();
    let report: Value = serde_json::from_str(&report).unwrap();
    assert!(
        report["velocity_error"]["after"].as_f64() < report["velocity_error"]["before"].as_f64(),
        "nothing was trained: {report}"
    );
    let state = folder.join("killed.state");
    // pauses that differ from run to run, so that over time kills land everywhere
    let mut random = u64::from(std::process::id());
    let (mut kills, mut resumed) = (0, 0);
    loop {
        let mut child = command(folder, &args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let saved = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        // not before something new was saved: a slow machine must get ahead, too
        let before = saved(&state.join("state.safetensors"));
        let mut done = None;
        while done.is_none() && saved(&state.join("state.safetensors")) == before && kills < 12 {
            std::thread::sleep(Duration::from_millis(3));
            done = child.try_wait().unwrap();
        }
        if done.is_none() && kills < 12 {
            // the first ones at once: a fast machine must not get to the end
            if kills >= 3 {
                std::thread::sleep(Duration::from_micros((random >> 33) % 150_000));
            }
            child.kill().unwrap();
        }
        let out = child.wait_with_output().unwrap();
        kills += usize::from(out.status.code().is_none());
        resumed += usize::from(String::from_utf8_lossy(&out.stderr).contains("resuming the run"));
        if out.status.success() {
            break;
        }
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), None, "not killed, but failed: {text}");
    }
    assert!(
        kills >= 3 && resumed >= 2,
        "{kills} kills, {resumed} resumed"
    );
    assert!(
        bytes(folder, "killed") == bytes(folder, "whole"),
        "after {kills} kills the result is another one"
    );
    assert!(!state.exists(), "the state is left behind");
    // once more, as after a kill between the last write and the end
    ok(folder, &args);
    assert!(bytes(folder, "killed") == bytes(folder, "whole"));
    assert!(!state.exists(), "the state is left behind");
    let other = train(&["--output", "killed", "--seed", "7"]);
    let out = fastflux(folder, &other);
    assert_eq!(out.status.code(), Some(1), "another run's output");
    assert!(String::from_utf8_lossy(&out.stderr).contains("--force"));
    // the log has every step once
    let steps = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).unwrap();
        let lines = text.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().remove("tokens-per-second");
            line
        });
        lines.collect::<Vec<_>>()
    };
    assert_eq!(steps("killed.jsonl"), steps("whole.jsonl"));
    assert_eq!(steps("whole.jsonl").len(), 2 * (1 + 4) + 1 + 4);
}

#[test]
fn blocks_elsewhere_and_activations_computed_again_change_nothing() {
    let folder = prepared();
    ok(
        folder,
        &train(&["--output", "recomputed", "--gradient-checkpointing"]),
    );
    ok(folder, &train(&["--output", "offloaded", "--offload"]));
    assert!(bytes(folder, "recomputed") == bytes(folder, "offloaded"));
    // within a limit some blocks stay
    let dry = |flag: &str| {
        let report = json(folder, &train(&["--dry-run", "--json", flag]));
        report["peak_bytes"].as_f64().unwrap()
    };
    let between = f64::midpoint(dry("--offload"), dry("--gradient-checkpointing"));
    let limit = format!("{}B", between.floor());
    let out = fastflux(
        folder,
        &train(&["--output", "limited", "--max-vram", &limit]),
    );
    let talk = String::from_utf8_lossy(&out.stderr);
    let kept: Vec<usize> = talk
        .lines()
        .filter_map(|line| line.split_once(" blocks stay on the device"))
        .filter_map(|(before, _)| {
            let mut words = before.rsplit(' ');
            let (all, _, some) = (words.next()?, words.next()?, words.next()?);
            Some([some.parse().ok()?, all.parse().ok()?])
        })
        .flatten()
        .collect();
    assert!(
        matches!(kept[..], [some, all] if 0 < some && some < all),
        "{talk}"
    );
    assert!(bytes(folder, "limited") == bytes(folder, "offloaded"));
}

#[test]
fn a_kept_lora_leaves_the_weights_alone_and_has_the_names_of_peft() {
    let folder = prepared();
    let report = json(
        folder,
        &train(&["--output", "kept", "--keep-lora", "--json"]),
    );
    assert_eq!(report["phases"].as_array().unwrap().len(), 3);
    for phase in report["phases"].as_array().unwrap() {
        let (before, after) = (&phase["before"], &phase["after"]);
        assert!(
            after.as_f64().unwrap() <= before.as_f64().unwrap(),
            "{phase}"
        );
    }
    let pruned = tensors::of_file(&folder.join("pruned/flux.safetensors"));
    let kept = tensors::of_file(&folder.join("kept/flux.safetensors"));
    for (before, after) in pruned.iter().zip(&kept) {
        assert_eq!(before.0, after.0);
        let trained = before.0.contains(".linear.");
        assert!(trained || before == after, "{}", before.0);
    }
    assert!(pruned != kept, "nothing was trained");
    let lora = tensors::of_file(&folder.join("kept/lora.safetensors"));
    let has = |name: &str| lora.iter().any(|tensor| tensor.0 == name);
    for name in [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.2.attn.add_v_proj.lora_B.weight",
        "transformer.transformer_blocks.4.ff_context.net.0.proj.lora_B.weight",
        "transformer.transformer_blocks.4.norm1.linear.lora_A.weight",
    ] {
        assert!(
            has(name),
            "{name} is not in {:?}",
            lora.iter().map(|tensor| &tensor.0)
        );
    }
    // the healed model opens, and says that it is not whole; the pruned one has nothing to say
    for (model, warns) in [
        ("kept", true),
        ("kept/flux.safetensors", true),
        ("pruned", false),
    ] {
        let out = fastflux(folder, &["inspect", "--model", model]);
        let message = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{message}");
        let says = message.contains("lora.safetensors") && message.contains("not in its weights");
        assert_eq!(says, warns, "{model}: {message}");
    }
    ok(
        folder,
        &[
            "generate",
            "--model",
            "kept",
            "--prompt",
            "a red circle",
            "--steps",
            "1",
            "--output",
            "kept.png",
        ],
    );
    for name in ["loss.svg", "training.json"] {
        assert!(folder.join("kept").join(name).exists(), "{name}");
    }
}

/// Without `--keep-lora` the weights are those of the pruned model plus B·A, but for the rounding to bfloat16.
#[test]
fn a_merged_lora_is_the_kept_one_added_to_the_weights() {
    let folder = prepared();
    ok(folder, &train(&["--output", "kept-lora", "--keep-lora"]));
    ok(folder, &train(&["--output", "merged"]));
    let load = |path: &str| {
        candle::safetensors::load(folder.join(path), &candle::Device::Cpu)
            .unwrap()
            .into_iter()
            .map(|(name, tensor)| (name, tensor.to_dtype(candle::DType::F32).unwrap()))
            .collect::<std::collections::HashMap<_, _>>()
    };
    let (kept, lora) = (
        load("kept-lora/flux.safetensors"),
        load("kept-lora/lora.safetensors"),
    );
    let merged = load("merged/flux.safetensors");
    for (module, original) in [
        (
            "transformer_blocks.2.norm1.linear",
            "double_blocks.2.img_mod.lin",
        ),
        (
            "transformer_blocks.2.ff_context.net.2",
            "double_blocks.2.txt_mlp.2",
        ),
        (
            "transformer_blocks.4.attn.to_out.0",
            "double_blocks.4.img_attn.proj",
        ),
        (
            "transformer_blocks.4.ff.net.0.proj",
            "double_blocks.4.img_mlp.0",
        ),
    ] {
        let factor = |which: &str| &lora[&format!("transformer.{module}.lora_{which}.weight")];
        let delta = factor("B").matmul(factor("A")).unwrap();
        let weight = format!("{original}.weight");
        let (whole, base) = (&merged[&weight], &kept[&weight]);
        let largest = |t: &candle::Tensor| {
            let largest = t.abs().unwrap().max_all().unwrap();
            largest.to_scalar::<f32>().unwrap()
        };
        assert!(largest(&delta) > 1e-6, "{module} was not trained");
        let sum = (base + &delta).unwrap();
        // half a unit in the last of bfloat16's 8 bits, and what is left of f32's
        let allowed = (sum.abs().unwrap() * (0.5f64.powi(8) + 1e-6)).unwrap();
        let beyond = ((whole - &sum).unwrap().abs().unwrap() - allowed).unwrap();
        let beyond = beyond.max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(beyond <= 1e-12, "{weight} is {beyond} off");
    }
}

/// A limit on the size of files stops the saving half-way, as a full disk does: that is said, and training goes on, as the
/// model may find room all the same; this one does not.
#[cfg(unix)]
#[test]
fn a_full_disk_in_the_middle_leaves_a_run_that_goes_on_when_there_is_room() {
    let folder = prepared();
    ok(folder, &train(&["--output", "roomy"]));
    let args = train(&["--output", "cramped"]);
    let mut limited = Command::new("sh");
    limited
        .current_dir(folder)
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        // in blocks of 512 bytes: room for the images, not for the state; the signal ignored, writing fails instead
        .args(["-c", "trap '' XFSZ; ulimit -f 600; exec \"$@\"", "sh"])
        .arg(assert_cmd::cargo::cargo_bin!("fastflux"))
        .args(&args);
    let out = limited.output().unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    for word in [
        "the unfinished run is not saved: cannot save the run",
        "state.safetensors",
        "hint: free some space",
        "error: cannot write",
    ] {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(!folder.join("cramped").exists());
    // nothing half-written is left
    let left: Vec<_> = fs::read_dir(folder.join("cramped.state"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(left, ["images.safetensors"]);
    ok(folder, &args);
    assert!(bytes(folder, "cramped") == bytes(folder, "roomy"));
}

#[test]
fn a_dry_run_says_what_it_takes_and_does_nothing() {
    let folder = prepared();
    let report = json(folder, &train(&["--output", "dry", "--dry-run", "--json"]));
    assert_eq!(report["phases"].as_array().unwrap().len(), 3);
    assert!(report["peak_bytes"].as_f64().unwrap() > 1e6);
    assert!(!folder.join("dry").exists() && !folder.join("dry.state").exists());
    // with less memory than that, less is kept; with none there is nothing to be done
    assert_eq!(report["gradient_checkpointing"], false);
    let less = (report["peak_bytes"].as_f64().unwrap() * 0.95).floor();
    let few = ["--output", "dry", "--dry-run", "--json", "--max-vram"];
    let report = json(
        folder,
        &train(&[&few[..], &[format!("{less}B").as_str()]].concat()),
    );
    assert_eq!(report["gradient_checkpointing"], true);
    assert!(report["peak_bytes"].as_f64().unwrap() <= less);
    refused(
        &train(&["--dry-run", "--max-vram", "10KB"]),
        &["--max-vram", "hint:", "--batch"],
    );
}
