//! What `verify` does not compare is said: silence is not agreement.

use std::{fs, path::Path};

use serde_json::Value;

use crate::common::*;

/// The recording of `dev` with its bytes changed, and what `verify` makes of it: exit code and JSON.
fn verify(folder: &Path, change: impl Fn(&mut Vec<u8>)) -> (Option<i32>, Value, String) {
    let mut bytes = fs::read(golden("dev/reference.safetensors")).unwrap();
    change(&mut bytes);
    fs::write(folder.join("r.safetensors"), bytes).unwrap();
    let pipe = golden("dev/pipe");
    let args = ["verify", "--json", "--model", &pipe, "--reference"];
    let out = fastflux(folder, &[&args[..], &["r.safetensors"]].concat());
    let json = serde_json::from_slice(&out.stdout).unwrap_or_default();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    (out.status.code(), json, said)
}

fn find(bytes: &[u8], part: &str) -> usize {
    let at = bytes.windows(part.len()).position(|w| w == part.as_bytes());
    at.unwrap()
}

/// Calls a tensor otherwise, in as many letters.
fn rename<'a>(from: &'a str, to: &'a str) -> impl Fn(&mut Vec<u8>) + 'a {
    assert_eq!(from.len(), to.len());
    move |bytes| {
        let at = find(bytes, &format!("\"{from}\"")) + 1;
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
}

#[test]
fn tensors_that_nothing_is_compared_with_are_named_and_fail() {
    let work = folder();
    let (code, all, _) = verify(work.path(), |_| ());
    assert_eq!((code, &all["ok"]), (Some(0), &Value::Bool(true)));
    assert_eq!(all["not_in_reference"].as_array().unwrap().len(), 0);
    let compared = all["tensors"].as_array().unwrap().len();
    for (from, to, orphans) in [
        // an unknown name, a block that the model has not, an input without its output
        ("clip.pooled", "clip.poolid", &["clip.poolid"][..]),
        (
            "blocks.single_blocks.2.x",
            "blocks.single_blocks.9.x",
            &["blocks.single_blocks.9.x"],
        ),
        ("vae.image", "vae.imago", &["vae.imago", "vae.latents"]),
        (
            "transformer.velocity",
            "transformer.velocitx",
            &["transformer.velocitx"],
        ),
    ] {
        let (code, out, said) = verify(work.path(), rename(from, to));
        assert_eq!(
            (code, &out["ok"]),
            (Some(1), &Value::Bool(false)),
            "{from}: {said}"
        );
        assert_eq!(out["unknown"], serde_json::json!(orphans), "{from}");
        assert_eq!(
            out["tensors"].as_array().unwrap().len(),
            compared - 1,
            "{from}"
        );
        assert!(
            !out["not_in_reference"].as_array().unwrap().is_empty()
                || to.starts_with("clip")
                || to.starts_with("vae")
        );
    }
}

#[test]
fn a_recording_with_numbers_that_are_none_is_named_itself() {
    let work = folder();
    for name in [
        "t5.hidden",
        "transformer.txt",
        "pipeline.latents",
        "blocks.double_blocks.1.img",
    ] {
        for bad in [f32::NAN, f32::INFINITY] {
            let (code, _, said) = verify(work.path(), |bytes| {
                let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
                let at = 8 + header + json[name]["data_offsets"][0].as_u64().unwrap() as usize;
                bytes[at + 8..at + 12].copy_from_slice(&bad.to_le_bytes());
            });
            assert_eq!(code, Some(1), "{name}");
            for word in [
                "r.safetensors",
                name,
                "NaN or infinite",
                "reference is damaged",
            ] {
                assert!(said.contains(word), "{name}: {word}: {said}");
            }
        }
    }
}

#[test]
fn other_programs_open_flux2_by_rules_of_its_own() {
    let work = folder();
    let w = work.path();
    let config = r#"{"_class_name": "Flux2Transformer2DModel", "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 128,
        "num_attention_heads": 1, "joint_attention_dim": 48, "in_channels": 16, "guidance_embeds": false,
        "axes_dims_rope": [32, 32, 32, 32]}"#;
    fs::write(w.join("shape.json"), config).unwrap();
    copy(Path::new(&golden("flux2/pipe")), &w.join("pipe"));
    fs::remove_dir_all(w.join("pipe/transformer")).unwrap();
    fs::write(w.join("pipe/fastflux.json"), r#"{"text-length": 24}"#).unwrap();
    let whole = "pipe/flux.safetensors";
    ok(w, &["init", "--config", "shape.json", "--output", whole]);
    let recipe = r#"{"calibration": {"num-prompts": 2, "steps": 1, "width": 32, "height": 32}}"#;
    fs::write(w.join("recipe.json"), recipe).unwrap();
    let prune = |form: &str, layout: &str| {
        let output = format!("{form}-{layout}");
        let args = ["prune", "--model", "pipe", "--recipe", "recipe.json"];
        let last = ["--blocks", "double.01,single.02", "--layout", layout];
        let to = ["--form", form, "--output", &output];
        ok(w, &[&args[..], &last, &to].concat());
    };
    let check = |program: &str, file: &str, opens: bool, words: &[&str]| {
        let out = fastflux(w, &["verify", "--target", program, file, "--json"]);
        let report: Value = serde_json::from_slice(&out.stdout).unwrap();
        let how = report["how"].as_str().unwrap();
        assert_eq!(report["opens"], opens, "{program} {file}: {how}");
        assert_eq!(out.status.success(), opens);
        for word in words {
            assert!(how.contains(word), "{program} {file}: {how}");
        }
    };
    let stock = "`Flux2Transformer2DModel.from_";
    check(
        "diffusers",
        whole,
        true,
        &[stock, "config=", "num_layers=2"],
    );
    for program in ["comfyui", "sdcpp"] {
        check(program, whole, true, &["2 double and 3 single"]);
        // heads of another size, which a file says by its norms alone
        let other = golden("flux2/bfl.safetensors");
        check(program, &other, false, &["heads of 128", "16"]);
    }
    for form in ["linear", "conditioned", "modulated"] {
        prune(form, "original");
        let file = format!("{form}-original/flux.safetensors");
        check("diffusers", &file, true, &["FastFlux2Transformer2DModel"]);
        check("comfyui", &file, false, &["Load fastflux model"]);
        check("sdcpp", &file, false, &["--form remove"]);
    }
    prune("remove", "original");
    let file = "remove-original/flux.safetensors";
    check(
        "diffusers",
        file,
        true,
        &[stock, "num_layers=1, num_single_layers=2"],
    );
    for program in ["comfyui", "sdcpp"] {
        check(program, file, true, &["1 double and 2 single"]);
    }
    for (form, word) in [("linear", "FastFlux2Transformer2DModel"), ("remove", stock)] {
        prune(form, "diffusers");
        check("diffusers", &format!("{form}-diffusers"), true, &[word]);
    }
}
