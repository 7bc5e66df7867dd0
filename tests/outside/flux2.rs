//! FLUX.2: what is its own, and the main job on a tiny random model of it.

use std::{fs, path::Path};

use serde_json::Value;

use crate::common::*;

/// The pipeline of the golden files with short texts, in a folder of its own.
fn model(folder: &Path) -> String {
    let to = folder.join("pipe");
    copy(Path::new(&golden("flux2/pipe")), &to);
    fs::write(to.join("fastflux.json"), r#"{"text-length": 24}"#).unwrap();
    to.display().to_string()
}

#[test]
fn an_undistilled_model_is_guided_by_a_second_velocity() {
    let work = folder();
    let pipe = golden("flux2/pipe");
    let (vae, original) = (golden("flux2/pipe/vae"), golden("flux2/bfl.safetensors"));
    let config = golden("flux2/pipe/transformer/config.json");
    let reference = golden("flux2/base.safetensors");
    // a bare file does not say that it was distilled
    let out = json(
        work.path(),
        &[
            "verify",
            "--json",
            "--model",
            &original,
            "--config",
            &config,
            "--text-encoders",
            &pipe,
            "--vae",
            &vae,
            "--reference",
            &reference,
        ],
    );
    assert_eq!(out["tensors"].as_array().unwrap().len(), 4);
    assert_eq!(out["ok"], true);
    // the pipeline says that it was, and then there is no second velocity
    let args = ["verify", "--model", &pipe, "--reference", &reference];
    let out = fastflux(work.path(), &args);
    assert_eq!(out.status.code(), Some(1));
    let size = ["--width", "32", "--height", "32", "--steps", "2"];
    let generate = |model: &str, more: &[&str]| {
        let args = ["generate", "--prompt", "a", "--model", model, "--force"];
        let args = [&args[..], &size, &["--output", "x.png"], more].concat();
        ok(work.path(), &args);
        fs::read(work.path().join("x.png")).unwrap()
    };
    let base = model(work.path());
    let index = Path::new(&base).join("model_index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(
        &index,
        text.replace("\"is_distilled\": true", "\"is_distilled\": false"),
    )
    .unwrap();
    let plain = generate(&base, &["--guidance", "1"]);
    let guided = generate(&base, &["--guidance", "4"]);
    let negative = generate(&base, &["--negative-prompt", "a dog"]);
    assert!(plain != guided && guided != negative && plain != negative);
    let args = ["generate", "--prompt", "a", "--model", &pipe];
    refused(
        work.path(),
        &[&args[..], &["--negative-prompt", "b"]].concat(),
        &["--negative-prompt", "distilled"],
    );
}

#[test]
fn the_rotary_axes_of_a_bare_file_are_four_equal_parts() {
    let work = folder();
    let config = work.path().join("config.json");
    let (file, reference) = (
        golden("flux2/bfl.safetensors"),
        golden("flux2/reference.safetensors"),
    );
    let errors = |more: &[&str]| {
        let args = ["verify", "--json", "--model", &file];
        let args = [&args[..], &["--reference", &reference], more].concat();
        let out = fastflux(work.path(), &args);
        let out: Value = serde_json::from_slice(&out.stdout).unwrap();
        out["tensors"].clone()
    };
    let bare = errors(&[]);
    fs::write(&config, r#"{"axes_dims_rope": [4, 4, 4, 4]}"#).unwrap();
    assert_eq!(bare, errors(&["--config", "config.json"]));
    fs::write(&config, r#"{"axes_dims_rope": [4, 2, 6, 4]}"#).unwrap();
    assert_ne!(bare, errors(&["--config", "config.json"]));
}

#[test]
fn reference_images_are_refused_by_name() {
    let work = folder();
    let pipe = golden("flux2/pipe");
    fs::write(work.path().join("no.png"), "no image").unwrap();
    let args = ["generate", "--prompt", "a", "--model", &pipe, "--image"];
    let with = |file: &str, words: &[&str]| {
        refused(work.path(), &[&args[..], &[file]].concat(), words);
    };
    with("no.png", &["--image", "no.png", "neither a PNG nor a JPEG"]);
    with("nothing.png", &["--image", "nothing.png"]);
    let image = golden("flux2/reference.png");
    let args = ["generate", "--prompt", "a", "--image", &image, "--image"];
    refused(
        work.path(),
        &[&args[..], &[&image]].concat(),
        &["--image", "one reference image"],
    );
}

fn velocity_error(folder: &Path, baseline: &str, model: &str) -> f64 {
    let args = [
        "eval",
        "--json",
        "--baseline",
        baseline,
        "--model",
        model,
        "--num-prompts",
        "4",
        "--output",
        "report",
        "--force",
    ];
    let size = ["--width", "32", "--height", "32"];
    let report: Value = json(folder, &[&args[..], &size].concat());
    let error = &report["models"][0]["against_baseline"]["velocity"]["error"];
    error.as_f64().unwrap()
}

#[test]
fn it_is_calibrated_with_reference_images() {
    let work = folder();
    let w = work.path();
    let (pipe, image) = (model(w), golden("flux2/reference.png"));
    let size = ["--width", "32", "--height", "32"];
    let calibrate = |output: &str, more: &[&str]| {
        let args = ["calibrate", "--model", &pipe, "--num-prompts", "4"];
        let args = [&args[..], &size, &["--output", output], more].concat();
        ok(w, &args);
    };
    calibrate("plain.safetensors", &[]);
    calibrate("edits.safetensors", &["--image", &image]);
    let prune = |stats: &str, output: &str| {
        let args = ["prune", "--model", &pipe, "--stats", stats];
        let args = [
            &args[..],
            &["--blocks", "single.01", "--output", output, "--json"],
        ]
        .concat();
        json(w, &args)
    };
    // statistics remember their reference images: fits behind replaced blocks see them too
    prune("plain.safetensors", "a");
    prune("edits.safetensors", "b");
    let weights = |folder: &str| fs::read(w.join(folder).join("flux.safetensors")).unwrap();
    assert!(weights("a") != weights("b"));
    refused(
        w,
        &["calibrate", "--model", &pipe, "--image", "nothing.png"],
        &["--image", "nothing.png"],
    );
}

#[test]
fn it_is_pruned_in_every_form_trained_and_converted() {
    let work = folder();
    let w = work.path();
    let pipe = model(w);
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let size = ["--width", "32", "--height", "32"];
    let prune = |output: &str, more: &[&str]| {
        let args = ["prune", "--model", &pipe, "--recipe", "quick.json"];
        let args = [&args[..], &size, &["--output", output, "--json"], more].concat();
        json(w, &args)
    };
    for form in ["linear", "conditioned", "modulated", "remove"] {
        prune(form, &["--blocks", "single.01", "--form", form]);
        let error = velocity_error(w, &pipe, form);
        assert!(error > 0.0 && error < 0.5, "{form}: {error}");
        let blocks = json(w, &["inspect", "--model", form, "--json"]);
        assert_eq!(blocks["replaced_blocks"], 1, "{form}");
    }
    // shared modulation makes a modulated layer as large as a linear one
    let parameters =
        |model: &str| json(w, &["inspect", "--model", model, "--json"])["parameters"].clone();
    assert_eq!(parameters("modulated"), parameters("linear"));
    // under diffusers' names it is the same model
    prune(
        "theirs",
        &["--blocks", "single.01", "--layout", "diffusers"],
    );
    let [ours, theirs] = ["linear", "theirs"].map(|model| velocity_error(w, &pipe, model));
    assert_eq!(ours.to_bits(), theirs.to_bits());
    let config = fs::read_to_string(w.join("theirs/transformer/config.json")).unwrap();
    assert!(config.contains("FastFlux2Transformer2DModel"), "{config}");

    let recipe =
        r#"{"data": {"num-prompts": 8, "held-out": 8}, "steps": 4, "finetune": {"steps": 2}}"#;
    fs::write(w.join("train.json"), recipe).unwrap();
    ok(
        w,
        &[
            "train-sandwich",
            "--model",
            "linear",
            "--recipe",
            "train.json",
            "--output",
            "trained",
        ],
    );
    let trained = velocity_error(w, &pipe, "trained");
    assert!(trained > 0.0 && trained < 0.5, "{trained}");

    for (name, flags) in [
        ("f8.safetensors", ["--dtype", "f8e4m3"]),
        ("q8.gguf", ["--gguf", "q8_0"]),
    ] {
        let args = ["convert", "--model", "linear", "--output", name];
        ok(w, &[&args[..], &flags].concat());
        let error = velocity_error(w, "linear", name);
        assert!(error > 0.0 && error < 0.02, "{name}: {error}");
    }
}

#[test]
fn what_is_of_flux2_but_not_klein_is_said_by_name() {
    let work = folder();
    let w = work.path();
    let pipe = model(w);
    let image = golden("flux2/reference.png");
    let edit = |file: &str, from: &str, to: &str| {
        let path = w.join("pipe").join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    };
    let generate = ["generate", "--model", &pipe, "--prompt", "a"];
    let calibrate = ["calibrate", "--dry-run", "--model", &pipe];
    // klein's KV variant: the same without reference images
    edit(
        "model_index.json",
        "Flux2KleinPipeline",
        "Flux2KleinKVPipeline",
    );
    for args in [&generate[..], &calibrate] {
        let args = [args, &["--image", &image]].concat();
        refused(w, &args, &["--image", "KV variant", "hint"]);
    }
    let size = ["--width", "32", "--height", "32", "--steps", "1"];
    ok(w, &[&generate[..], &size, &["--output", "x.png"]].concat());
    // dev's text encoder
    edit("text_encoder/config.json", "\"qwen3\"", "\"mistral3\"");
    for args in [&generate[..], &calibrate] {
        refused(w, args, &["mistral3", "FLUX.2-dev", "--text-encoders"]);
    }
}

#[test]
fn a_file_that_lacks_a_modulation_is_a_damaged_flux2() {
    let work = folder();
    for lacks in ["single_stream_modulation", "double_stream_modulation_img"] {
        let mut tensors = crate::tensors::read("flux2/bfl.safetensors");
        tensors.retain(|tensor| !tensor.0.starts_with(lacks));
        crate::tensors::write(&work.path().join("x.safetensors"), &tensors);
        let args = ["inspect", "--model", "x.safetensors"];
        refused(
            work.path(),
            &args,
            &["x.safetensors", &format!("lacks the tensor `{lacks}")],
        );
    }
}
