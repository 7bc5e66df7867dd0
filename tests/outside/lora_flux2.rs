//! LoRA for FLUX.2 in every dialect, on whole and on pruned models, against weights that were merged exactly. The files are
//! made by `scripts/golden_lora_flux2.py`.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{
    common::{copy, fastflux, folder, golden, ok, refused},
    lora::tensors,
};

/// Every dialect, as a file in `tests/golden/flux2/lora`.
const DIALECTS: [&str; 12] = [
    "peft",
    "base_model",
    "sformer",
    "onetrainer",
    "ai_toolkit",
    "comfyui",
    "kohya",
    "underscores",
    "lokr",
    "lycoris",
    "fused",
    "dora",
];

fn lora(name: &str) -> String {
    golden(&format!("flux2/lora/{name}.safetensors"))
}

/// How far the velocity is from the one recorded with merged weights.
fn error(folder: &Path, name: &str, more: &[&str]) -> f64 {
    let reference = golden(&format!("flux2/lora/{name}.reference.safetensors"));
    let args = ["verify", "--json", "--reference", &reference];
    let out = fastflux(folder, &[&args[..], more].concat());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let out: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|_| panic!("{said}"));
    let compared = out["tensors"].as_array().unwrap();
    assert_eq!(compared.len(), 1, "{out}");
    compared[0]["relative"].as_f64().unwrap()
}

#[test]
fn every_dialect_computes_what_merged_weights_do() {
    let folder = folder();
    let folder = folder.path();
    let config = golden("flux2/pipe/transformer/config.json");
    let files = ["pipe", "bfl.safetensors"].map(|name| golden(&format!("flux2/{name}")));
    for name in DIALECTS {
        for model in &files {
            let model = ["--model", model, "--config", &config];
            let with = error(
                folder,
                name,
                &[&model[..], &["--lora", &lora(name)]].concat(),
            );
            assert!(with < 1e-5, "{name}: {with}");
            assert!(error(folder, name, &model) > 0.01, "{name} changes nothing");
        }
    }
}

/// Merged and then pruned is pruned and then merged; block numbers are those of the unpruned model.
#[test]
fn on_pruned_models_they_change_what_is_left() {
    let folder = folder();
    let folder = folder.path();
    let plan = r#"{"replace": [{"replaces": ["single.00"], "form": "remove"}]}"#;
    fs::write(folder.join("plan.json"), plan).unwrap();
    let recipe = r#"{"calibration": {"num-prompts": 2, "steps": 1, "width": 32, "height": 32}, "fit": {"refit-projections": "none"}}"#;
    fs::write(folder.join("recipe.json"), recipe).unwrap();
    // short texts, and no images of it: time
    copy(Path::new(&golden("flux2/pipe")), &folder.join("pipe"));
    fs::write(folder.join("pipe/fastflux.json"), r#"{"text-length": 24}"#).unwrap();
    let prune = |more: &[&str], output: &str| {
        let args = ["prune", "--model", "pipe", "--plan", "plan.json"];
        let last = ["--recipe", "recipe.json", "--output", output];
        ok(folder, &[&args[..], &last, more].concat());
    };
    prune(&[], "pruned");
    let plain = tensors(folder, &["--model", "pruned"], "plain");
    for name in DIALECTS {
        let lora = lora(name);
        prune(&["--lora", &lora], name);
        let expected = tensors(folder, &["--model", name], &format!("{name}.a"));
        // rounded to the file's bfloat16 once, as `prune` does
        let file = format!("{name}.bf16.safetensors");
        let args = ["convert", "--dtype", "bf16", "--output", &file];
        ok(
            folder,
            &[&args[..], &["--model", "pruned", "--lora", &lora]].concat(),
        );
        let merged = tensors(folder, &["--model", &file], &format!("{name}.b"));
        assert!(expected == merged, "{name}: the order makes a difference");
        assert!(plain != merged, "{name}: nothing was merged");
    }
}

#[test]
fn those_of_another_family_are_refused_by_name() {
    let folder = folder();
    let model = golden("flux2/pipe");
    for name in ["comfyui", "kohya", "onetrainer"] {
        let lora = golden(&format!("lora/{name}.safetensors"));
        let args = ["inspect", "--model", &model, "--lora", &lora];
        refused(folder.path(), &args, &[&lora, "FLUX.1", "not for FLUX.2"]);
    }
    for name in ["kohya", "peft", "ai_toolkit"] {
        let args = [
            "inspect",
            "--model",
            &golden("dev/pipe"),
            "--lora",
            &lora(name),
        ];
        refused(folder.path(), &args, &[&lora(name)]);
    }
}
