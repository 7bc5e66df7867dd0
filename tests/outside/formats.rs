//! Number formats: converting there and back, what is lost, and files that lie.

use std::{fs, path::Path};

use safetensors::Dtype;
use serde_json::Value;

use crate::common::*;

/// Relative error of the velocity that diffusers recorded for the small golden model.
fn velocity_error(folder: &Path, model: &str) -> f64 {
    let (pipe, reference) = (golden("dev/pipe"), golden("dev/reference.safetensors"));
    let vae = golden("dev/pipe/vae");
    let args = [
        "verify",
        "--model",
        model,
        "--text-encoders",
        &pipe,
        "--vae",
        &vae,
        "--reference",
        &reference,
        "--json",
    ];
    let out: Value = serde_json::from_slice(&fastflux(folder, &args).stdout).unwrap();
    let tensors = out["tensors"].as_array().unwrap();
    let velocity = tensors
        .iter()
        .find(|t| t["name"] == "transformer.velocity")
        .unwrap();
    velocity["relative"].as_f64().unwrap()
}

#[test]
fn every_format_is_written_and_read_and_costs_what_its_bits_cost() {
    let work = folder();
    let (w, pipe) = (work.path(), golden("dev/pipe"));
    for (output, flags, format, least, most) in [
        ("f32.safetensors", vec!["--dtype", "f32"], "F32", 0.0, 1e-5),
        (
            "bf16.safetensors",
            vec!["--dtype", "bf16"],
            "BF16",
            // the golden weights are bf16 numbers
            0.0,
            1e-5,
        ),
        (
            "f8.safetensors",
            vec!["--dtype", "f8e4m3"],
            "F8_E4M3",
            1e-3,
            0.1,
        ),
        (
            "plain8.safetensors",
            vec!["--dtype", "f8e4m3", "--no-scale"],
            "F8_E4M3",
            1e-3,
            0.1,
        ),
        ("q8.gguf", vec!["--gguf", "q8_0"], "Q8_0", 1e-4, 2e-2),
    ] {
        let args = ["convert", "--model", &pipe, "--json", "--output", output];
        let dry = json(w, &[&args[..], &["--dry-run"], &flags[..]].concat());
        assert!(!w.join(output).exists(), "{output}");
        let out = json(w, &[&args[..], &flags[..]].concat());
        assert_eq!(dry["bytes"], out["bytes"], "{output}");
        let inspected = json(w, &["inspect", "--model", output, "--json"]);
        assert_eq!(inspected["parameters"], out["parameters"], "{output}");
        assert_eq!(inspected["bytes"], out["bytes"], "{output}");
        assert!(inspected["dtypes"][format].as_u64() > Some(0), "{output}");
        let error = velocity_error(w, output);
        assert!(
            (least..most).contains(&error),
            "{output}: the velocity is off by {error}"
        );
        refused(w, &[&args[..], &flags[..]].concat(), &[output, "--force"]);
    }
    // widened, GGUF's numbers are the same
    let args = ["--dtype", "f32", "--output", "back.safetensors"];
    ok(w, &[&["convert", "--model", "q8.gguf"], &args[..]].concat());
    let (packed, back) = (
        velocity_error(w, "q8.gguf"),
        velocity_error(w, "back.safetensors"),
    );
    assert!((packed - back).abs() < 1e-7, "{packed} {back}");
}

#[test]
fn narrow_rows_fall_back_and_say_so() {
    let work = folder();
    let w = work.path();
    let out = fastflux(w, &["convert", "--gguf", "q4_k", "--output", "q4"]);
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{message}");
    assert!(
        message.contains("no multiple of 256") && message.contains("Q8_0"),
        "{message}"
    );
    let inspected = json(w, &["inspect", "--model", "q4", "--json"]);
    for format in ["Q4_K", "Q8_0", "F32"] {
        assert!(inspected["dtypes"][format].as_u64() > Some(0), "{format}");
    }
    let prompt = ["--prompt", "a red circle", "--steps", "2"];
    let args = ["generate", "--model", "q4", "--output", "a.png"];
    ok(w, &[&args[..], &prompt[..]].concat());
}

#[test]
fn packed_models_are_pruned_and_pruned_models_packed() {
    let work = folder();
    let w = work.path();
    let convert = |args: &[&str]| ok(w, &[&["convert"], args].concat());
    convert(&["--dtype", "f8e4m3", "--output", "f8.safetensors"]);
    convert(&["--gguf", "q8_0", "--output", "q8.gguf"]);
    for (model, output) in [("f8.safetensors", "from8"), ("q8.gguf", "fromq")] {
        let out = quick_prune(w, output, &["--model", model, "--blocks", "single.03"]);
        assert!(out["velocity_error"].as_f64().unwrap() < 0.1, "{model}");
    }
    let bytes = |path: &str| fs::read(w.join(path)).unwrap();
    let (before, after) = (bytes("f8.safetensors"), bytes("from8/flux.safetensors"));
    let before = safetensors::SafeTensors::deserialize(&before).unwrap();
    let after = safetensors::SafeTensors::deserialize(&after).unwrap();
    for name in [
        "scaled_fp8",
        "double_blocks.1.img_attn.qkv.weight",
        "double_blocks.1.img_attn.qkv.scale_weight",
        "single_blocks.1.linear2.weight",
        "single_blocks.1.linear2.scale_weight",
    ] {
        let (before, after) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
        assert_eq!(before.dtype(), after.dtype(), "{name}");
        assert_eq!(before.data(), after.data(), "{name}");
    }
    let new = after.tensor("single_blocks.3.linear.img.weight").unwrap();
    assert_eq!(new.dtype(), safetensors::Dtype::BF16);
    // the pruned model again, in GGUF with its record
    convert(&["--model", "from8", "--gguf", "q8_0", "--output", "p.gguf"]);
    let inspected = json(w, &["inspect", "--model", "p.gguf", "--json"]);
    assert_eq!(inspected["replaced_blocks"], 1);
    let args = ["generate", "--model", "p.gguf", "--output", "a.png"];
    ok(w, &[&args[..], &["--prompt", "x", "--steps", "2"]].concat());
}

#[test]
fn packed_models_draw_the_same_image_wherever_their_blocks_are() {
    let work = folder();
    let w = work.path();
    let prompt = "a red circle left of a blue square on a white background";
    for (model, format) in [
        ("f8.safetensors", ["--dtype", "f8e4m3"]),
        ("q8.gguf", ["--gguf", "q8_0"]),
    ] {
        ok(w, &[&["convert", "--output", model], &format[..]].concat());
        let draw = |output: &str, more: &[&str]| {
            let args = ["generate", "--model", model, "--steps", "2"];
            let what = ["--force", "--output", output, "--prompt", prompt];
            let out = fastflux(w, &[&args[..], &what, more].concat());
            let talk = String::from_utf8(out.stderr).unwrap();
            assert!(out.status.success(), "{model}: {talk}");
            let staying = talk.find(" of 15 blocks stay").map(|at| {
                let count = talk[..at].rsplit(' ').next().unwrap();
                count.parse::<usize>().unwrap()
            });
            (fs::read(w.join(output)).unwrap(), staying)
        };
        let (whole, staying) = draw("whole.png", &[]);
        assert_eq!(staying, None, "{model}");
        let (offloaded, staying) = draw("offload.png", &["--offload"]);
        assert!(offloaded == whole && staying == Some(0), "{model}");
        // two thirds of the packed weights, and what is computed
        let (some, staying) = draw("some.png", &["--max-vram", "5MB"]);
        let staying = staying.unwrap();
        assert!(
            some == whole && (2..15).contains(&staying),
            "{model}: {staying}"
        );
    }
}

/// Without its record a packed file is a model of its own: what is pruned from it has it as its teacher.
fn without_record(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let found: Vec<usize> = [&b"\"fastflux\":"[..], b"fastflux.record"]
        .iter()
        .filter_map(|key| bytes.windows(key.len()).position(|part| part == *key))
        .collect();
    let [at] = found[..] else {
        panic!("{}: one record", path.display())
    };
    let at = at + usize::from(bytes[at] == b'"');
    bytes[at] = b'x';
    fs::write(path, bytes).unwrap();
}

#[test]
fn models_pruned_from_packed_ones_are_trained() {
    let work = folder();
    let w = work.path();
    let tiny = format!("{}/configs/tiny", env!("CARGO_MANIFEST_DIR"));
    let (vae, config) = (
        format!("{tiny}/vae"),
        format!("{tiny}/transformer/config.json"),
    );
    let parts = ["--text-encoders", &tiny, "--vae", &vae, "--config", &config];
    fs::write(
        w.join("recipe.json"),
        r#"{ "data": { "steps": 2, "held-out": 8, "width": 64, "height": 64 }, "steps": 4,
             "evaluate-every": 2, "optimiser": { "lr": 3e-5, "warmup": 1 },
             "finetune": { "steps": 4, "lr": 3e-5 } }"#,
    )
    .unwrap();
    for (model, format, kept) in [
        ("f8.safetensors", ["--dtype", "f8e4m3"], Dtype::F8_E4M3),
        ("q8.gguf", ["--gguf", "q8_0"], Dtype::BF16),
    ] {
        ok(w, &[&["convert", "--output", model], &format[..]].concat());
        // with its own file as the teacher GGML's blocks are shared, which pruning has rounded
        for own in [false, true] {
            if own && kept != Dtype::BF16 {
                continue;
            }
            let size = ["--width", "64", "--height", "64"];
            let mut more = vec!["--model", model, "--blocks", "double.01"];
            let (name, mut teacher) = (format!("{kept:?}-{own}"), vec![]);
            if own {
                without_record(&w.join(model));
                more.extend(parts);
                more.extend(size);
                teacher.extend(parts);
                teacher.extend(["--teacher", model]);
            }
            quick_prune(w, &name, &more);
            let train = |output: &str, teacher: &[&str], more: &[&str]| {
                let args = [
                    "train-sandwich",
                    "--model",
                    &name,
                    "--recipe",
                    "recipe.json",
                ];
                let few = [
                    "--num-prompts",
                    "8",
                    "--batch",
                    "8",
                    "--rank",
                    "4",
                    "--json",
                ];
                let all = [&args[..], &few, &["--output", output], teacher, more].concat();
                let report = json(w, &all);
                let error = report["velocity_error"]["before"].as_f64().unwrap();
                assert!(error > 1e-6 && error < 0.05, "{name}: {error}");
                let trained = fs::read(w.join(output).join("flux.safetensors")).unwrap();
                (trained, report["phases"].clone())
            };
            // without flags: what the bare file does not say, the pruned model remembers
            let trained = train(&format!("{name}-whole"), &[], &["--gradient-checkpointing"]);
            let offloaded = train(&format!("{name}-offload"), &teacher, &["--offload"]);
            assert!(trained == offloaded, "{name}");
            if own {
                // so near its teacher that a few steps do not better it
                continue;
            }
            let (trained, _) = trained;
            let before = fs::read(w.join(&name).join("flux.safetensors")).unwrap();
            let before = safetensors::SafeTensors::deserialize(&before).unwrap();
            let after = safetensors::SafeTensors::deserialize(&trained).unwrap();
            let layer = "double_blocks.1.linear.img.weight";
            let of = |tensor: &str| {
                (
                    before.tensor(tensor).unwrap(),
                    after.tensor(tensor).unwrap(),
                )
            };
            assert!(of(layer).0.data() != of(layer).1.data(), "{name}");
            // what was trained is no longer packed
            let (was, is) = of("double_blocks.2.img_attn.qkv.weight");
            assert_eq!((was.dtype(), is.dtype()), (kept, Dtype::BF16), "{name}");
            assert!(was.data() != is.data(), "{name}");
        }
    }
}
