//! LoRA on packed weights, LoRA that cannot be applied, and those that training kept.

use std::{fs, path::Path};

use crate::{
    common::{fastflux, folder, golden, ok, refused},
    lora::{lora, tensors},
};

#[test]
fn packed_weights_keep_their_size_and_get_it_when_they_run() {
    let folder = folder();
    let folder = folder.path();
    let model = golden("dev/pipe");
    for (flag, format, file) in [
        ("--dtype", "f8e4m3", "f8.safetensors"),
        ("--gguf", "q8_0", "q8.gguf"),
    ] {
        ok(
            folder,
            &["convert", "--model", &model, flag, format, "--output", file],
        );
        for name in ["kohya", "diffusers", "lokr", "dora"] {
            let lora = lora(name);
            let wide = format!("{name}.{file}.safetensors");
            ok(
                folder,
                &[
                    "convert", "--model", file, "--lora", &lora, "--dtype", "f32", "--output",
                    &wide,
                ],
            );
            let draw = |model: &[&str], output: &str| {
                let args = [
                    "generate", "--prompt", "x", "--steps", "2", "--width", "32", "--height", "32",
                    "--output", output,
                ];
                let parts = [
                    "--text-encoders",
                    &golden("dev/pipe"),
                    "--vae",
                    &golden("dev/pipe/vae"),
                ]
                .map(str::to_owned);
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                ok(folder, &[&args[..], &parts, model].concat());
                fs::read(folder.join(output)).unwrap()
            };
            let run = draw(
                &["--model", file, "--lora", &lora],
                &format!("{name}.{file}.run.png"),
            );
            let merged = draw(&["--model", &wide], &format!("{name}.{file}.merged.png"));
            let without = draw(&["--model", file], &format!("{name}.{file}.without.png"));
            assert_eq!(pixels(&run), pixels(&merged), "{name} on {file}");
            assert_ne!(pixels(&run), pixels(&without), "{name} on {file}");
        }
    }
}

/// The pixels of a PNG, without what is written about them.
fn pixels(png: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png))
        .read_info()
        .unwrap();
    let mut out = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut out).unwrap();
    out
}

#[test]
fn what_cannot_be_applied_is_refused_by_name() {
    let folder = folder();
    let folder = folder.path();
    let model = golden("dev/pipe");
    let factors = |name: &str, down: (usize, usize), up: (usize, usize)| {
        let (a, b) = (4 * down.0 * down.1, 4 * up.0 * up.1);
        let header = format!(
            r#"{{"{name}.lora_down.weight": {{"dtype": "F32", "shape": [{}, {}], "data_offsets": [0, {a}]}},
                 "{name}.lora_up.weight": {{"dtype": "F32", "shape": [{}, {}], "data_offsets": [{a}, {}]}}}}"#,
            down.0,
            down.1,
            up.0,
            up.1,
            a + b
        );
        crate::common::safetensors(&folder.join("x.safetensors"), &header, &vec![0; a + b]);
    };
    let inspect = ["inspect", "--model", &model, "--lora", "x.safetensors"];
    for (name, down, up, words) in [
        (
            "lora_unet_input_blocks_4_1_proj_in",
            (4, 128),
            (128, 4),
            &["SDXL", "x.safetensors"][..],
        ),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            (4, 768),
            (320, 4),
            &["Stable Diffusion 1.5"],
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            (4, 32),
            (64, 4),
            &["FLUX.2"],
        ),
        (
            "diffusion_model.img_in",
            (4, 128),
            (32, 4),
            &["control LoRA", "128"],
        ),
        (
            "diffusion_model.double_blocks.0.img_attn.proj",
            (4, 48),
            (48, 4),
            &["another model", "[48, 48]", "[32, 32]"],
        ),
        (
            "diffusion_model.double_blocks.7.img_attn.proj",
            (4, 32),
            (32, 4),
            &["double block 7", "2 double"],
        ),
        (
            "diffusion_model.double_blocks.0.img_attn.what",
            (4, 32),
            (32, 4),
            &["img_attn.what"],
        ),
    ] {
        factors(name, down, up);
        refused(folder, &inspect, words);
    }
    for wrong in [
        golden("dev/bfl.safetensors"),
        golden("lora/kohya.reference.safetensors"),
    ] {
        refused(folder, &["inspect", "--lora", &wrong], &["no LoRA"]);
    }
    refused(
        folder,
        &["inspect", "--lora", "nothing.safetensors"],
        &["nothing.safetensors", "does not exist"],
    );
    for of_hub in [
        "owner/name",
        "https://huggingface.co/owner/name/resolve/main/x.safetensors",
    ] {
        refused(
            folder,
            &["inspect", "--lora", of_hub],
            &[of_hub, "does not exist", "hf download"],
        );
    }
    crate::common::misused(
        folder,
        &["inspect", "--lora", "nothing.safetensors:much"],
        &["much"],
    );
}

/// The numbers of a model, f32, one tensor after another.
fn numbers(folder: &Path, args: &[&str], output: &str) -> Vec<f32> {
    let bytes = tensors(folder, args, output);
    let (numbers, _) = bytes.as_chunks();
    numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn what_training_kept_is_applied_as_it_would_have_been_merged() {
    let folder = folder();
    let folder = folder.path();
    // slots behind double.01 are not the original's numbers
    let plan = r#"{"replace": [{"replaces": ["double.01"], "form": "remove"}, {"replaces": ["double.03"], "form": "linear"}]}"#;
    fs::write(folder.join("plan.json"), plan).unwrap();
    let prune = [
        "prune",
        "--plan",
        "plan.json",
        "--num-prompts",
        "8",
        "--steps",
        "2",
        "--output",
        "pruned",
    ];
    ok(folder, &prune);
    fs::write(
        folder.join("recipe.json"),
        r#"{ "evaluate-every": 2, "data": { "steps": 2, "held-out": 12 }, "optimiser": { "lr": 1e-3, "warmup": 1 } }"#,
    )
    .unwrap();
    let train = |more: &[&str]| {
        let args = [
            "train-sandwich",
            "--model",
            "pruned",
            "--num-prompts",
            "16",
            "--steps",
            "4",
            "--finetune",
            "0",
        ];
        let last = [
            "--batch",
            "8",
            "--rank",
            "4",
            "--recipe",
            "recipe.json",
            "--output",
        ];
        ok(folder, &[&args[..], &last, more].concat());
    };
    train(&["merged"]);
    train(&["kept", "--keep-lora"]);
    let merged = numbers(folder, &["--model", "merged"], "a");
    let plain = numbers(folder, &["--model", "kept"], "b");
    // rounded to the file's own format once, as training does
    let args = [
        "convert",
        "--dtype",
        "bf16",
        "--model",
        "kept",
        "--lora",
        "kept/lora.safetensors",
        "--output",
        "c.safetensors",
    ];
    ok(folder, &args);
    let applied = numbers(folder, &["--model", "c.safetensors"], "d");
    let differing = |other: &[f32]| {
        let pairs = merged.iter().zip(other);
        pairs
            .filter(|(a, b)| (*a - *b).abs() > 1e-6 * a.abs())
            .count()
    };
    assert_eq!(merged.len(), applied.len());
    let (before, after) = (differing(&plain), differing(&applied));
    assert!(
        before > 10_000 && after * 1000 < before,
        "{before} numbers differ without the LoRA, {after} with it"
    );
    // a patch holds the factors, not the weights with them, and opens as the model does
    ok(
        folder,
        &["diff", "--model", "kept", "--output", "patch.safetensors"],
    );
    let patch = ["--patch", "patch.safetensors"];
    assert!(numbers(folder, &patch, "e") == plain);
    let with_lora = ["--lora", "patch.safetensors", "--output", "f.safetensors"];
    ok(folder, &[&args[..3], &patch, &with_lora].concat());
    let size = |file: &str| fs::metadata(folder.join(file)).unwrap().len();
    assert!(numbers(folder, &["--model", "f.safetensors"], "g") == applied);
    ok(
        folder,
        &[
            "diff",
            "--model",
            "merged",
            "--output",
            "merged.safetensors",
        ],
    );
    assert!(size("patch.safetensors") < size("merged.safetensors"));
    let out = fastflux(folder, &[&["inspect"][..], &patch].concat());
    assert!(String::from_utf8_lossy(&out.stderr).contains("--lora patch.safetensors"));
    // it is named, and is for this model alone
    let out = fastflux(folder, &["inspect", "--model", "kept"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("--lora kept/lora.safetensors"));
    refused(
        folder,
        &["inspect", "--lora", "kept/lora.safetensors"],
        &["another pruned model"],
    );
}
