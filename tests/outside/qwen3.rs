//! Qwen3 is found by its tensors, as the other parts are: in a folder, in a file of any name, in float8, in a whole pipeline.

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::Value;

use crate::{
    common::*,
    tensors::{below, read, write},
};

/// How far the hidden states are from those of diffusers; and that token ids are the same.
fn error_of(folder: &Path, args: &[&str]) -> f64 {
    let reference = golden("flux2/reference.safetensors");
    let verify = ["verify", "--json", "--reference", &reference];
    let out = fastflux(folder, &[&verify[..], args].concat());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{said}"));
    let tensors = report["tensors"].as_array().unwrap();
    let of = |name: &str| tensors.iter().find(|t| t["name"] == name).unwrap();
    assert_eq!(of("qwen.input_ids")["ok"], true);
    of("qwen.hidden")["relative"].as_f64().unwrap()
}

const ENCODER: &str = "flux2/pipe/text_encoder/model.safetensors";

/// A folder with the tokenizer alone.
fn tokenizer(folder: &Path) {
    let to = folder.join("only-tokenizer/tokenizer");
    copy(Path::new(&golden("flux2/pipe/tokenizer")), &to);
}

#[test]
fn it_opens_from_a_file_of_any_name_and_from_whole_pipelines() {
    let work = folder();
    let w = work.path();
    tokenizer(w);
    let pipe = golden("flux2/pipe");
    // with the projection to words, as the language model has it
    let mut encoder = read(ENCODER);
    encoder.push((
        "lm_head.weight".to_owned(),
        Dtype::BF16,
        vec![1, 1],
        vec![0, 0],
    ));
    write(&w.join("whatever.sft"), &encoder);
    let named = "whatever.sft,only-tokenizer";
    let args = ["--model", &pipe, "--text-encoders", named];
    assert!(error_of(w, &args) <= 1e-5);
    // among other files in a folder
    fs::create_dir(w.join("among")).unwrap();
    write(&w.join("among/x.safetensors"), &encoder);
    fs::copy(
        golden("dev/pipe/text_encoder/model.safetensors"),
        w.join("among/clip.safetensors"),
    )
    .unwrap();
    copy(
        Path::new(&golden("flux2/pipe/tokenizer")),
        &w.join("among/tokenizer"),
    );
    let args = ["--model", &pipe, "--text-encoders", "among"];
    assert!(error_of(w, &args) <= 1e-5);
    // everything in one file
    let mut whole = below("model.diffusion_model.", read("flux2/bfl.safetensors"));
    whole.extend(below("text_encoders.qwen3_4b.transformer.", read(ENCODER)));
    write(&w.join("whole.safetensors"), &whole);
    let config = golden("flux2/pipe/transformer/config.json");
    let vae = golden("flux2/pipe/vae");
    let args = [
        "--model",
        "whole.safetensors",
        "--config",
        &config,
        "--vae",
        &vae,
    ];
    let args = [&args[..], &["--text-encoders", "only-tokenizer"]].concat();
    assert!(error_of(w, &args) <= 1e-5);
}

#[test]
fn its_scales_act() {
    let work = folder();
    let w = work.path();
    tokenizer(w);
    let pipe = golden("flux2/pipe");
    // a weight as twice itself times a scale of a half, next to bf16 as in float8
    let mut encoder = read(ENCODER);
    let name = "model.layers.0.self_attn.o_proj.weight";
    let weight = encoder.iter_mut().find(|t| t.0 == name).unwrap();
    for value in weight.3.chunks_exact_mut(2) {
        let bits = u16::from_le_bytes([value[0], value[1]]);
        // one more in the exponent is twice the number
        let doubled = if bits & 0x7f80 == 0 {
            bits
        } else {
            bits + 0x80
        };
        value.copy_from_slice(&doubled.to_le_bytes());
    }
    write(&w.join("twice.safetensors"), &encoder);
    let args = |file: &str| ["--model", &pipe, "--text-encoders", file].map(str::to_owned);
    let error = |file: &str| {
        let args = args(&format!("{file},only-tokenizer"));
        error_of(w, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert!(error("twice.safetensors") > 1e-4);
    let half = 0.5f32.to_le_bytes().to_vec();
    let scale = name.replace(".weight", ".scale_weight");
    encoder.push((scale, Dtype::F32, vec![], half));
    encoder.push(("scaled_fp8".to_owned(), Dtype::F8_E4M3, vec![0], vec![]));
    write(&w.join("scaled.safetensors"), &encoder);
    assert!(error("scaled.safetensors") <= 1e-5);
}

#[test]
fn it_is_checked_before_anything_is_computed() {
    let work = folder();
    let w = work.path();
    tokenizer(w);
    let pipe = golden("flux2/pipe");
    let mut other = read(ENCODER);
    other.retain(|t| !t.0.contains("layers.20."));
    write(&w.join("cut.safetensors"), &other);
    fs::copy(
        golden("dev/pipe/text_encoder/model.safetensors"),
        w.join("clip.safetensors"),
    )
    .unwrap();
    fs::copy(golden(ENCODER), w.join("whole.safetensors")).unwrap();
    for (file, words) in [
        (
            "cut.safetensors,only-tokenizer",
            &["cut.safetensors", "hidden state"][..],
        ),
        (
            "clip.safetensors,only-tokenizer",
            &["clip.safetensors", "Qwen3"],
        ),
        ("whole.safetensors", &["tokenizer", "--text-encoders"]),
        ("only-tokenizer", &["only-tokenizer", "Qwen3"]),
    ] {
        let args = ["--model", &pipe, "--text-encoders", file];
        let calibrate = ["calibrate", "--dry-run"];
        refused(w, &[&calibrate[..], &args].concat(), words);
        let generate = ["generate", "--prompt", "a"];
        refused(w, &[&generate[..], &args].concat(), words);
    }
}
