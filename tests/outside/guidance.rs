//! Guidance by a negative prompt for FLUX.1 equals diffusers', and models without guidance embedding are not taken for
//! schnell in silence.

use std::{fs, path::Path};

use crate::common::*;

#[test]
fn true_cfg_equals_diffusers() {
    let work = folder();
    for name in ["dev", "schnell"] {
        let reference = golden(&format!("{name}/true_cfg.safetensors"));
        let pipe = golden(&format!("{name}/pipe"));
        let args = ["verify", "--json", "--model", &pipe, "--reference"];
        let out = json(work.path(), &[&args[..], &[&reference]].concat());
        assert_eq!(out["ok"], true, "{name}: {out}");
        assert_eq!(out["tensors"].as_array().unwrap().len(), 4, "{name}");
        assert_eq!(out["unknown"].as_array().unwrap().len(), 0, "{name}");
        // what is not compared is said
        let missing = out["not_in_reference"].to_string();
        for part in ["CLIP", "T5", "transformer", "VAE", "blocks"] {
            assert!(missing.contains(part), "{name}: {missing}");
        }
    }
}

/// The pixels of a PNG.
fn pixels(path: &Path) -> Vec<u8> {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}

/// A recorded image (1, 3, height, width) as the bytes of a PNG's pixels.
fn recorded(reference: &str, name: &str) -> Vec<u8> {
    let bytes = fs::read(reference).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    let values: Vec<f32> = tensor
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let area = values.len() / 3;
    let byte = |value: f32| (value * 255.0).round() as u8;
    (0..area)
        .flat_map(|i| (0..3).map(move |c| (i, c)))
        .map(|(i, c)| byte(values[c * area + i]))
        .collect()
}

#[test]
fn images_away_from_a_negative_prompt_are_those_of_diffusers() {
    let work = folder();
    let prompts = [
        "a photo of a small red house under a tall tree, at night",
        "Two dogs run, & the sea",
    ];
    for (name, prompt, size, seed, scale, negative) in [
        (
            "dev",
            prompts[0],
            ["64", "48"],
            "1234",
            "2.5",
            Some("rain, and a green car"),
        ),
        ("schnell", prompts[1], ["48", "32"], "4321", "4", None),
    ] {
        let pipe = golden(&format!("{name}/pipe"));
        let [width, height] = size;
        let args = [
            "generate", "--model", &pipe, "--prompt", prompt, "--seed", seed,
        ];
        let size = ["--steps", "3", "--width", width, "--height", height];
        let mut guided = vec![
            "--true-cfg",
            scale,
            "--output",
            "guided.png",
            "--force",
            "--json",
        ];
        if let Some(negative) = negative {
            guided.extend(["--negative-prompt", negative]);
        }
        let out = json(work.path(), &[&args[..], &size, &guided].concat());
        let shown = out["images"][0]["true_cfg"].as_f64().unwrap();
        assert_eq!(shown.to_string(), scale);
        let reference = golden(&format!("{name}/true_cfg.safetensors"));
        let wanted = recorded(&reference, "pipeline.seeded_image");
        let worst = |got: &[u8]| {
            assert_eq!(got.len(), wanted.len());
            let off = got.iter().zip(&wanted).map(|(a, b)| a.abs_diff(*b));
            off.max().unwrap()
        };
        assert!(
            worst(&pixels(&work.path().join("guided.png"))) <= 1,
            "{name}"
        );
        let plain = ["--output", "plain.png", "--force"];
        ok(work.path(), &[&args[..], &size, &plain].concat());
        assert!(worst(&pixels(&work.path().join("plain.png"))) > 1, "{name}");
    }
}

#[test]
fn a_model_that_is_not_distilled_gets_no_four_steps_in_silence() {
    let work = folder();
    let w = work.path();
    let generate = |model: &str, more: &[&str]| {
        let args = [
            "generate", "--prompt", "a", "--json", "--force", "--model", model,
        ];
        let size = ["--width", "32", "--height", "32", "--output", "x.png"];
        let out = fastflux(w, &[&args[..], &size, more].concat());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        let out: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        (out["images"][0].clone(), said)
    };
    // by its scheduler
    copy(Path::new(&golden("schnell/pipe")), &w.join("pipe"));
    let (image, said) = generate("pipe", &[]);
    assert_eq!(image["steps"], 4);
    assert!(!said.contains("--true-cfg"), "{said}");
    let scheduler = w.join("pipe/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap();
    let dynamic = text.replace(
        "\"use_dynamic_shifting\": false",
        "\"use_dynamic_shifting\": true",
    );
    fs::write(&scheduler, dynamic).unwrap();
    let (image, said) = generate("pipe", &[]);
    assert_eq!(
        (&image["steps"], &image["true_cfg"]),
        (&28.into(), &3.5.into())
    );
    for word in [
        "without distillation",
        "28 steps",
        "--true-cfg 1",
        "--steps",
    ] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let (image, _) = generate("pipe", &["--true-cfg", "1"]);
    assert!(image["true_cfg"].is_null());
    // a bare file: by its name, by the flag, or a guess that is said
    let base = golden("schnell/pipe");
    let parts = [
        "--text-encoders",
        &base,
        "--vae",
        &golden("schnell/pipe/vae"),
    ];
    let json = golden("schnell/pipe/transformer/config.json");
    let parts = [&parts[..], &["--config", &json]].concat();
    for (name, flags, steps, word) in [
        ("flux-dev-De_Distilled.safetensors", &[][..], 28, "its name"),
        ("model.safetensors", &["--true-cfg", "3"], 28, "--true-cfg"),
        ("model.safetensors", &[], 4, "de-distilled"),
        ("flux1-schnell.safetensors", &[], 4, ""),
    ] {
        fs::copy(golden("schnell/bfl.safetensors"), w.join(name)).unwrap();
        let (image, said) = generate(name, &[&parts[..], flags].concat());
        assert_eq!(image["steps"], steps, "{name}: {said}");
        assert!(said.contains(word), "{name}: {said}");
        assert_eq!(said.contains("hint"), !word.is_empty(), "{name}: {said}");
    }
    // what is pruned from it remembers
    let recipe = r#"{"calibration": {"num-prompts": 4, "steps": 2, "width": 32, "height": 32}, "score": {"held-out": 4}}"#;
    fs::write(w.join("recipe.json"), recipe).unwrap();
    let args = ["prune", "--model", "pipe", "--recipe", "recipe.json"];
    ok(
        w,
        &[&args[..], &["--blocks", "single.01", "--output", "pruned"]].concat(),
    );
    let (image, _) = generate("pruned", &[]);
    assert_eq!(
        (&image["steps"], &image["true_cfg"]),
        (&28.into(), &3.5.into())
    );
}

#[test]
fn negative_prompts_are_refused_where_they_would_do_nothing() {
    let work = folder();
    let args = ["generate", "--prompt", "a", "--model"];
    let (schnell, flux2) = (golden("schnell/pipe"), golden("flux2/pipe"));
    let negative = [&args[..], &[&schnell, "--negative-prompt", "b"]].concat();
    refused(work.path(), &negative, &["--negative-prompt", "--true-cfg"]);
    let cfg = [&args[..], &[&flux2, "--true-cfg", "2"]].concat();
    refused(work.path(), &cfg, &["--true-cfg", "--guidance"]);
    let dev = golden("dev/pipe");
    let cfg = ["calibrate", "--model", &dev, "--true-cfg", "2"];
    refused(work.path(), &cfg, &["--true-cfg", "guidance embedding"]);
    let cfg = [&args[..], &[&dev, "--true-cfg", "0.5"]].concat();
    misused(work.path(), &cfg, &["--true-cfg"]);
}
