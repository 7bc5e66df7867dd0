//! The binary from the outside: equality with recordings from diffusers, and the main job.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use std::{fs, path::Path};

use serde_json::Value;

mod alexnet;
mod architecture;
mod bad_formats;
mod bad_input;
mod bad_parts;
mod benchmark;
mod calibration;
mod common;
mod evaluation;
mod flux2;
mod formats;
mod guidance;
mod help;
mod image_inputs;
mod lora;
mod lora_applied;
mod lora_flux2;
mod lora_names;
mod memory;
mod names;
mod old_files;
mod outputs;
mod pages;
mod patch;
mod plans;
mod published;
mod qwen3;
mod resumed;
mod sandwich;
mod sandwich_refused;
mod settings;
mod shell;
mod tensors;
mod verification;

use common::*;

#[test]
fn every_component_equals_diffusers() {
    let work = folder();
    for (name, tensors) in [("dev", 17), ("schnell", 14), ("flux2", 14)] {
        let reference = golden(&format!("{name}/reference.safetensors"));
        let pipe = golden(&format!("{name}/pipe"));
        let config = golden(&format!("{name}/pipe/transformer/config.json"));
        let vae = golden(&format!("{name}/pipe/vae"));
        let original = golden(&format!("{name}/bfl.safetensors"));
        let folder_layout = vec!["--model", &pipe];
        let single_file = vec![
            "--model",
            &original,
            "--config",
            &config,
            "--text-encoders",
            &pipe,
            "--vae",
            &vae,
        ];
        for model in [folder_layout, single_file] {
            let args = ["verify", "--reference", &reference, "--json"];
            let out = json(work.path(), &[&args, model.as_slice()].concat());
            assert_eq!(out["ok"], true);
            let compared = out["tensors"].as_array().unwrap();
            assert!(
                compared.len() >= tensors,
                "{name}: only {} compared",
                compared.len()
            );
            for tensor in compared {
                let limit = match tensor["name"].as_str().unwrap() {
                    ids if ids.ends_with("input_ids") => 0.0,
                    late if late.starts_with("vae") || late.starts_with("pipeline") => 1e-4,
                    _ => 1e-5,
                };
                assert!(
                    tensor["relative"].as_f64().unwrap() <= limit,
                    "{name}: {tensor}"
                );
            }
        }
    }
}

#[test]
fn bfloat16_stays_near() {
    let work = folder();
    let (pipe, reference) = (golden("dev/pipe"), golden("dev/reference.safetensors"));
    let args = [
        "verify",
        "--model",
        &pipe,
        "--reference",
        &reference,
        "--dtype",
        "bf16",
        "--json",
    ];
    let out = fastflux(work.path(), &args);
    let out: Value = serde_json::from_slice(&out.stdout).unwrap();
    let tensors = out["tensors"].as_array().unwrap();
    let velocity = tensors
        .iter()
        .find(|t| t["name"] == "transformer.velocity")
        .unwrap();
    let relative = velocity["relative"].as_f64().unwrap();
    assert!(relative > 0.0 && relative <= 2e-2, "{relative}");
}

#[test]
fn another_model_fails_verification_and_the_first_difference_is_named() {
    let work = folder();
    // the same pipeline with one weight altered
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    copy(Path::new(&golden("dev/pipe")), &work.path().join("pipe"));
    let path = work.path().join("pipe").join(weights);
    let mut bytes = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors
        .tensor("single_transformer_blocks.1.proj_out.weight")
        .unwrap();
    let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
    let end = start + tensor.data().len();
    bytes[start..end].fill(0);
    fs::write(&path, bytes).unwrap();
    let reference = golden("dev/reference.safetensors");
    let out = fastflux(
        work.path(),
        &[
            "verify",
            "--model",
            "pipe",
            "--reference",
            &reference,
            "--json",
        ],
    );
    assert_eq!(out.status.code(), Some(1));
    let out: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(out["first_off"], "blocks.single_blocks.1.x");
}

#[test]
fn the_bundled_model_is_pruned_inspected_verified_and_drawn_with() {
    let work = folder();
    let out = quick_prune(work.path(), "pruned", &[]);
    assert_eq!(out["replaced"].as_array().unwrap().len(), 3);
    assert!(out["after"]["parameters"].as_u64() < out["before"]["parameters"].as_u64());
    let inspected = json(work.path(), &["inspect", "--model", "pruned", "--json"]);
    assert_eq!(inspected["replaced_blocks"], 3);
    assert_eq!(inspected["parameters"], out["after"]["parameters"]);
    assert_eq!(inspected["blocks"].as_array().unwrap().len(), 15);
    for file in [
        "flux.safetensors",
        "config.json",
        "plan.json",
        "scores.json",
        "before-after.png",
    ] {
        assert!(work.path().join("pruned").join(file).is_file(), "{file}");
    }
    // from another folder: the base is remembered
    let elsewhere = folder();
    let model = work.path().join("pruned").display().to_string();
    let prompt = "a red circle left of a blue square on a white background";
    ok(
        elsewhere.path(),
        &[
            "generate", "--model", &model, "--prompt", prompt, "--output", "a.png",
        ],
    );
    assert!(
        fs::read(elsewhere.path().join("a.png"))
            .unwrap()
            .starts_with(b"\x89PNG")
    );
    // the same seed gives the same bytes, and the plan replays
    let again = quick_prune(work.path(), "again", &["--plan", "pruned/plan.json"]);
    assert_eq!(again["replaced"], out["replaced"]);
    let bytes = |name: &str| fs::read(work.path().join(name).join("flux.safetensors")).unwrap();
    let tensors = |bytes: &[u8]| {
        bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..].to_vec()
    };
    assert_eq!(tensors(&bytes("pruned")), tensors(&bytes("again")));
}

#[test]
fn every_form_can_be_written_and_opened() {
    let work = folder();
    for form in ["linear", "conditioned", "modulated", "remove"] {
        let blocks = "double.01,single.00-01";
        let out = quick_prune(work.path(), form, &["--blocks", blocks, "--form", form]);
        assert!(out["velocity_error"].as_f64().unwrap().is_finite());
        let inspected = json(work.path(), &["inspect", "--model", form, "--json"]);
        assert_eq!(inspected["replaced_blocks"], 3, "{form}");
        assert_eq!(
            inspected["parameters"], out["after"]["parameters"],
            "{form}"
        );
        ok(
            work.path(),
            &[
                "generate",
                "--model",
                form,
                "--prompt",
                "a red circle",
                "--steps",
                "2",
                "--output",
                &format!("{form}.png"),
            ],
        );
    }
}

#[test]
fn kept_tensors_are_copied_byte_for_byte() {
    let work = folder();
    let recipe = QUICK.replace("head", "all");
    prune_by(&recipe, work.path(), "pruned", &["--blocks", "single.03"]);
    let before = fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("configs/tiny/transformer/diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    let after = fs::read(work.path().join("pruned/flux.safetensors")).unwrap();
    let (before, after) = (
        safetensors::SafeTensors::deserialize(&before).unwrap(),
        safetensors::SafeTensors::deserialize(&after).unwrap(),
    );
    let same = |theirs: &str, ours: &str| {
        assert_eq!(
            before.tensor(theirs).unwrap().data(),
            after.tensor(ours).unwrap().data(),
            "{ours}"
        );
    };
    same("x_embedder.weight", "img_in.weight");
    same(
        "single_transformer_blocks.1.proj_out.weight",
        "single_blocks.1.linear2.weight",
    );
    same(
        "transformer_blocks.4.ff.net.2.bias",
        "double_blocks.4.img_mlp.2.bias",
    );
    // behind the replaced block, and right ahead of it, only the output projections are fitted again
    same(
        "single_transformer_blocks.2.norm.linear.weight",
        "single_blocks.2.modulation.lin.weight",
    );
    same(
        "single_transformer_blocks.4.norm.linear.weight",
        "single_blocks.4.modulation.lin.weight",
    );
    for (theirs, ours) in [
        (
            "single_transformer_blocks.2.proj_out.weight",
            "single_blocks.2.linear2.weight",
        ),
        (
            "single_transformer_blocks.4.proj_out.weight",
            "single_blocks.4.linear2.weight",
        ),
        ("proj_out.weight", "final_layer.linear.weight"),
    ] {
        let (theirs, ours) = (before.tensor(theirs).unwrap(), after.tensor(ours).unwrap());
        assert_eq!(theirs.dtype(), ours.dtype());
        assert_ne!(theirs.data(), ours.data());
    }
    assert!(after.tensor("single_blocks.3.linear.img.weight").is_ok());
    assert!(after.tensor("single_blocks.3.linear1.weight").is_err());
}

#[test]
fn images_depend_on_the_seed_alone_and_carry_their_settings() {
    let work = folder();
    let prompt = "a green cross in the center on a black background";
    let draw = |name: &str, seed: &str| {
        ok(
            work.path(),
            &[
                "generate", "--prompt", prompt, "--steps", "3", "--seed", seed, "--output", name,
            ],
        );
        fs::read(work.path().join(name)).unwrap()
    };
    let (a, b, c) = (draw("a.png", "7"), draw("b.png", "7"), draw("c.png", "8"));
    assert_eq!(a, b);
    assert_ne!(a, c);
    let has = |text: &str| a.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(has(prompt) && has("seed\x007") && has("steps\x003") && has("size\x0064x64"));
    // what is there stays: names are numbered on
    let again = [
        "generate", "--prompt", prompt, "--steps", "3", "--seed", "7",
    ];
    let shown = ok(work.path(), &[&again[..], &["--output", "a.png"]].concat());
    assert_eq!(shown.trim(), "a-2.png");
    let second = fs::read(work.path().join("a-2.png")).unwrap();
    assert!(second == a && fs::read(work.path().join("a.png")).unwrap() == a);
    // every image of a prompt has a seed of its own, with which it is drawn alone
    let two = ["--images-per-prompt", "2", "--output", "two"];
    ok(work.path(), &[&again[..], &two].concat());
    let last = fs::read(work.path().join("two/000-01-seed8.png")).unwrap();
    assert!(furthest(&last, &c) <= 1);
    // several at once equal one by one
    fs::write(
        work.path().join("prompts.txt"),
        format!("a red circle\n{prompt}\n"),
    )
    .unwrap();
    let args = ["generate", "--prompt-file", "-", "--steps", "3"];
    let more = ["--seed", "7", "--output", "many/{number}.png"];
    let list = fs::File::open(work.path().join("prompts.txt")).unwrap();
    let out = command(work.path(), &[&args[..], &more[..]].concat())
        .stdin(list)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let many = fs::read(work.path().join("many/001.png")).unwrap();
    assert!(furthest(&many, &a) <= 1);
}

/// The largest difference between two PNG files' pixels, of 255.
fn furthest(a: &[u8], b: &[u8]) -> u8 {
    let (a, b) = (pixels(a), pixels(b));
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(&b);
    pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

/// The pixels of a PNG.
fn pixels(bytes: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes.to_vec()))
        .read_info()
        .unwrap();
    let mut out = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut out).unwrap();
    out
}
