//! Patches and what goes with a published model: a patch makes its base the pruned model, byte for byte; cards, notices, and
//! what other programs open.

use std::{fs, path::Path};

use crate::common::{fastflux, folder, golden, json, ok, quick_prune, refused};

/// The tensors of a model as `convert` writes them in its own format.
fn tensors(folder: &Path, args: &[&str], output: &str) -> Vec<u8> {
    let convert = ["convert", "--dtype", "f32", "--output", output];
    ok(folder, &[&convert[..], args].concat());
    let bytes = fs::read(folder.join(output)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

#[test]
fn a_patch_makes_its_base_the_pruned_model() {
    let folder = folder();
    let folder = folder.path();
    quick_prune(
        folder,
        "a",
        &["--blocks", "double.01,single.02-03,single.07"],
    );
    quick_prune(folder, "b", &["--blocks", "single.04", "--form", "remove"]);
    let report = json(
        folder,
        &[
            "diff",
            "--model",
            "a",
            "--model",
            "b",
            "--output",
            "p.safetensors",
            "--json",
        ],
    );
    let level = |i: usize| report["levels"][i]["level"].as_str().unwrap().to_owned();
    assert_eq!([level(0), level(1)], ["27", "7"], "{report}");
    let size = |key: &str| report["levels"][0][key].as_u64().unwrap();
    assert!(size("bytes") < size("of") / 2, "{report}");
    for (model, level) in [("a", "27"), ("b", "7")] {
        let patched = [
            "--model",
            "bundled",
            "--patch",
            "p.safetensors",
            "--level",
            level,
        ];
        let got = tensors(folder, &patched, &format!("{model}.patched.safetensors"));
        assert!(
            got == tensors(folder, &["--model", model], &format!("{model}.safetensors")),
            "{model}"
        );
    }
    // its images are those of the pruned model
    let draw = |args: &[&str], output: &str| {
        let generate = [
            "generate",
            "--prompt",
            "a red circle on a white background",
            "--steps",
            "2",
            "--output",
            output,
        ];
        ok(folder, &[&generate[..], args].concat());
    };
    draw(&["--model", "a"], "a.png");
    draw(
        &["--patch", "p.safetensors", "--level", "27"],
        "patched.png",
    );
    let report = json(
        folder,
        &[
            "eval",
            "--patch",
            "p.safetensors",
            "--level",
            "27",
            "--model",
            "bundled",
            "--num-prompts",
            "1",
            "--steps",
            "1",
            "--json",
        ],
    );
    assert!(
        report["models"][0]["against_baseline"].is_object(),
        "{report}"
    );
    refused(
        folder,
        &["inspect", "--patch", "p.safetensors"],
        &["--level 27 or 7"],
    );
    refused(
        folder,
        &["inspect", "--patch", "p.safetensors", "--level", "30"],
        &["30", "27, 7"],
    );
    refused(folder, &["inspect", "--patch", "a.png"], &["a.png"]);
    refused(
        folder,
        &["diff", "--model", "bundled", "--output", "q.safetensors"],
        &["bundled", "nothing replaced"],
    );
    // one sentence that names both
    let other = golden("dev/pipe");
    let args = [
        "inspect",
        "--model",
        &other,
        "--patch",
        "p.safetensors",
        "--level",
        "7",
    ];
    refused(
        folder,
        &args,
        &["p.safetensors", "`bundled`", &other, "another model"],
    );
}

#[test]
fn prune_writes_a_patch_that_opens_by_itself() {
    let folder = folder();
    let folder = folder.path();
    let blocks = ["--blocks", "double.01,single.02"];
    quick_prune(folder, "whole", &blocks);
    quick_prune(folder, "small", &[&blocks[..], &["--patch"]].concat());
    assert!(!folder.join("small/flux.safetensors").exists());
    let patch = "small/patch.safetensors";
    let whole = tensors(folder, &["--model", "whole"], "whole.safetensors");
    assert!(whole == tensors(folder, &["--patch", patch], "named.safetensors"));
    assert!(whole == tensors(folder, &["--model", "small"], "folder.safetensors"));
    assert!(whole == tensors(folder, &["--model", patch], "file.safetensors"));
}

#[test]
fn output_folders_have_a_card_and_a_notice() {
    let folder = folder();
    let folder = folder.path();
    quick_prune(
        folder,
        "pruned",
        &["--blocks", "single.02", "--layout", "diffusers"],
    );
    ok(
        folder,
        &[
            "convert", "--model", "pruned", "--dtype", "f8e4m3", "--output", "small",
        ],
    );
    for output in ["pruned", "small"] {
        let card = fs::read_to_string(folder.join(output).join("README.md")).unwrap();
        let (yaml, text) = card
            .strip_prefix("---\n")
            .unwrap()
            .split_once("---\n")
            .unwrap();
        assert!(
            yaml.contains("license: apache-2.0\n") && yaml.contains("- pruned\n"),
            "{yaml}"
        );
        assert!(
            !yaml.contains("base_model:"),
            "the bundled model is not on the hub: {yaml}"
        );
        assert!(text.contains("| single.02 | linear |"), "{text}");
        assert!(folder.join(output).join("NOTICE").is_file());
    }
    // what only has a LoRA in its weights is as large as before
    let (model, lora) = (golden("dev/pipe"), golden("lora/kohya.safetensors"));
    let convert = ["convert", "--model", &model, "--lora", &lora];
    let more = ["--dtype", "bf16", "--output", "merged"];
    ok(folder, &[&convert[..], &more].concat());
    let card = fs::read_to_string(folder.join("merged/README.md")).unwrap();
    for words in [
        "# pipe, written by fastflux",
        "The LoRA `kohya.safetensors` is in the weights",
        "--model pipe --lora kohya.safetensors",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }
    let card = fs::read_to_string(folder.join("pruned/README.md")).unwrap();
    for words in [
        "library_name: diffusers",
        "velocity error",
        "fastflux prune",
        "trust_remote_code",
    ] {
        assert!(card.contains(words), "{words}: {card}");
    }
}

#[test]
fn what_other_programs_open_follows_from_their_loaders_rules() {
    let folder = folder();
    let folder = folder.path();
    let config = r#"{"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 128,
        "num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8, "in_channels": 64, "guidance_embeds": true,
        "axes_dims_rope": [16, 56, 56]}"#;
    fs::write(folder.join("shape.json"), config).unwrap();
    ok(
        folder,
        &[
            "init",
            "--config",
            "shape.json",
            "--output",
            "base.safetensors",
        ],
    );
    let check = |program: &str, file: &str| {
        let out = fastflux(folder, &["verify", "--target", program, file, "--json"]);
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(out.status.success(), report["opens"].as_bool().unwrap());
        (
            out.status.success(),
            report["how"].as_str().unwrap().to_owned(),
        )
    };
    let plain = |program: &str| check(program, "base.safetensors");
    assert!(plain("comfyui").0);
    let (opens, how) = plain("diffusers");
    assert!(opens && how.contains("num_layers=2"), "{how}");
    let (opens, how) = plain("sdcpp");
    assert!(!opens && how.contains("3072"), "{how}");
    quick_prune(folder, "linear", &["--blocks", "single.02"]);
    for (program, word) in [
        ("comfyui", "axes"),
        ("diffusers", "FastFluxTransformer2DModel"),
        ("sdcpp", "axes"),
    ] {
        let (_, how) = check(program, "linear/flux.safetensors");
        assert!(how.contains(word), "{program}: {how}");
    }
    quick_prune(
        folder,
        "folder",
        &["--blocks", "single.02", "--layout", "diffusers"],
    );
    let (opens, how) = check("diffusers", "folder");
    assert!(opens && how.contains("trust_remote_code"), "{how}");
    crate::common::misused(folder, &["verify", "--target", "comfyui"], &["FILE"]);
    crate::common::misused(folder, &["verify", "--target", "a1111", "x"], &["sdcpp"]);
    crate::common::misused(folder, &["verify"], &["--reference"]);
}

#[test]
fn images_are_laid_out_as_other_scorers_read_them() {
    let folder = folder();
    let folder = folder.path();
    let scene = |colour: &str| format!("a {colour} circle on a white background");
    let lines = ["red", "blue", "green"]
        .map(|c| format!("{{\"tag\": \"x\", \"prompt\": \"{}\"}}\n", scene(c)));
    fs::write(folder.join("metadata.jsonl"), lines.concat()).unwrap();
    fs::create_dir_all(folder.join("dpg")).unwrap();
    fs::write(folder.join("dpg/7.txt"), scene("red")).unwrap();
    fs::write(folder.join("photo.json"), format!("[\"{}\"]", scene("red"))).unwrap();
    let export = |suite: &str, prompts: &str, more: &[&str]| {
        let args = [
            "eval",
            "--model",
            "bundled",
            "--export",
            suite,
            "--prompts",
            prompts,
            "--steps",
            "1",
            "--output",
            suite,
            "--json",
        ];
        json(folder, &[&args[..], more].concat())
    };
    let report = export("geneval", "metadata.jsonl", &["--shard", "1/2"]);
    assert_eq!(
        (report["prompts"][0].as_u64(), report["there"].as_u64()),
        (Some(2), Some(0)),
        "{report}"
    );
    assert!(
        folder.join("geneval/00002/samples/0003.png").is_file()
            && !folder.join("geneval/00001").exists()
    );
    let line = fs::read_to_string(folder.join("geneval/00000/metadata.jsonl")).unwrap();
    assert_eq!(line, lines[0].trim());
    // what is there is not drawn again
    let first = folder.join("geneval/00000/samples/0000.png");
    let before = fs::read(&first).unwrap();
    fs::remove_dir_all(folder.join("geneval/00002")).unwrap();
    let report = export("geneval", "metadata.jsonl", &[]);
    assert_eq!(
        (report["prompts"][0].as_u64(), report["there"].as_u64()),
        (Some(3), Some(1)),
        "{report}"
    );
    assert!(
        fs::read(&first).unwrap() == before
            && folder.join("geneval/00001/samples/0003.png").is_file()
    );
    assert_eq!(json_file(&folder.join("geneval.json"))["seed"], 10_000);
    export("dpg", "dpg", &[]);
    let side = |path: &str| {
        png::Decoder::new(std::io::Cursor::new(fs::read(folder.join(path)).unwrap()))
            .read_info()
            .unwrap()
            .info()
            .width
    };
    assert_eq!(side("dpg/7.png"), 2 * 64);
    export("hpsv2", "photo.json", &[]);
    assert_eq!(side("hpsv2/photo/00000.jpg"), 64);
}

fn json_file(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}
