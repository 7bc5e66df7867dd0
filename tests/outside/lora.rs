//! LoRA files from the outside: every dialect computes what diffusers and PEFT do, on whole and on pruned models, wherever a
//! model is opened; what cannot be applied is refused or named. The files are made by `scripts/golden_lora.py`.

use std::{fs, path::Path};

use serde_json::Value;

use crate::common::{fastflux, folder, golden, json, ok, refused};

/// Every dialect, as a file or a folder in `tests/golden/lora`.
const DIALECTS: [&str; 14] = [
    "diffusers",
    "metadata",
    "bias",
    "dora",
    "peft",
    "kohya",
    "comfyui",
    "comfyui_alpha",
    "xlabs",
    "onetrainer",
    "loha",
    "lokr",
    "dora_scale",
    "difference",
];

pub(crate) fn lora(name: &str) -> String {
    match name {
        "peft" => golden("lora/peft"),
        name => golden(&format!("lora/{name}.safetensors")),
    }
}

fn reference(name: &str) -> String {
    golden(&format!("lora/{name}.reference.safetensors"))
}

/// Whether `args`, of `verify`, agree with a recording, and what it prints.
fn agrees(folder: &Path, args: &[&str]) -> (bool, String) {
    let out = fastflux(folder, &[&["verify", "--json"], args].concat());
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    (
        out.status.success(),
        text + &String::from_utf8_lossy(&out.stderr),
    )
}

#[test]
fn every_dialect_computes_what_diffusers_and_peft_do() {
    let folder = folder();
    let models = [golden("dev/pipe"), golden("dev/bfl.safetensors")];
    let config = golden("dev/pipe/transformer/config.json");
    for name in DIALECTS {
        for model in &models {
            let reference = reference(name);
            let args = [
                "--model",
                model,
                "--config",
                &config,
                "--reference",
                &reference,
            ];
            let (same, text) = agrees(
                folder.path(),
                &[&args[..], &["--lora", &lora(name)]].concat(),
            );
            assert!(same, "{name}: {text}");
        }
        let args = ["--model", &models[0], "--reference", &reference(name)];
        assert!(!agrees(folder.path(), &args).0, "{name} changes nothing");
    }
}

#[test]
fn text_encoders_get_their_part() {
    let folder = folder();
    let (model, reference) = (golden("dev/pipe"), reference("text"));
    let args = ["--model", &model, "--reference", &reference];
    let (same, text) = agrees(
        folder.path(),
        &[&args[..], &["--lora", &lora("text")]].concat(),
    );
    assert!(same, "{text}");
    assert!(!agrees(folder.path(), &args).0);
}

#[test]
fn weights_scale_and_add_up() {
    let folder = folder();
    let (model, name) = (golden("dev/pipe"), lora("kohya"));
    let args = ["--model", &model, "--reference", &reference("kohya")];
    let with = |weights: &[&str]| {
        let given: Vec<String> = weights.iter().map(|w| format!("{name}:{w}")).collect();
        let given = given.iter().flat_map(|lora| ["--lora", lora]);
        agrees(
            folder.path(),
            &args.into_iter().chain(given).collect::<Vec<_>>(),
        )
    };
    for weights in [&["1"][..], &["0.25", "0.75"], &["-1", "2"]] {
        let (same, text) = with(weights);
        assert!(same, "{weights:?}: {text}");
    }
    for weights in [&["0.5"][..], &["-1"], &["0"]] {
        assert!(!with(weights).0, "{weights:?}");
    }
}

/// The tensors of a file as `convert --dtype f32` writes them.
pub(crate) fn tensors(folder: &Path, args: &[&str], output: &str) -> Vec<u8> {
    let file = format!("{output}.safetensors");
    ok(
        folder,
        &[&["convert", "--dtype", "f32", "--output", &file], args].concat(),
    );
    let bytes = fs::read(folder.join(file)).unwrap();
    // what follows the header
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

/// Merged and then pruned is pruned and then merged, in every dialect; keys of blocks that are gone are counted.
#[test]
fn on_pruned_models_block_numbers_are_those_of_the_original() {
    let folder = folder();
    let folder = folder.path();
    fs::write(
        folder.join("plan.json"),
        r#"{"replace": [{"replaces": ["double.00"], "form": "remove"}, {"replaces": ["single.01"], "form": "remove"}]}"#,
    )
    .unwrap();
    fs::write(
        folder.join("recipe.json"),
        r#"{"calibration": {"samples": 2, "draws": 1, "steps": 1}, "fit": {"refit": "none"}}"#,
    )
    .unwrap();
    let model = golden("dev/pipe");
    let prune = |more: &[&str], output: &str| {
        let args = [
            "prune",
            "--plan",
            "plan.json",
            "--recipe",
            "recipe.json",
            "--output",
            output,
        ];
        ok(folder, &[&args[..], more].concat());
    };
    prune(&["--model", &model], "pruned");
    for name in DIALECTS {
        let lora = lora(name);
        let output = format!("{name}.pruned");
        prune(&["--model", &model, "--lora", &lora], &output);
        let pruned_with = tensors(folder, &["--model", &output], &format!("{name}.a"));
        let args = ["--model", "pruned", "--lora", &lora];
        // rounded to the file's bfloat16 once, as `prune` does
        let out = format!("{name}.b");
        ok(
            folder,
            &[
                &[
                    "convert",
                    "--dtype",
                    "bf16",
                    "--output",
                    &format!("{out}.bf16.safetensors"),
                ],
                &args[..],
            ]
            .concat(),
        );
        let merged = tensors(
            folder,
            &["--model", &format!("{out}.bf16.safetensors")],
            &out,
        );
        assert!(
            pruned_with == merged,
            "{name}: pruned with it is not merged into the pruned one"
        );
        let plain = tensors(folder, &["--model", "pruned"], &format!("{name}.plain"));
        assert!(plain != merged, "{name}: nothing was merged");
    }
    // 2 of 4 of the blocks of double.00, all of single.01
    let out = fastflux(
        folder,
        &["inspect", "--model", "pruned", "--lora", &lora("xlabs")],
    );
    let note = String::from_utf8_lossy(&out.stderr);
    assert!(
        note.contains(
            "6 of its 14 tensors fall away, as the blocks double.00, single.01 are replaced"
        ),
        "{note}"
    );
}

#[test]
fn every_command_that_opens_a_model_takes_one() {
    let folder = folder();
    let folder = folder.path();
    let (model, lora) = (golden("dev/pipe"), lora("comfyui"));
    let with: [&str; 4] = ["--model", &model, "--lora", &lora];
    let run = |args: &[&str]| ok(folder, &[args, &with[..]].concat());
    let report: Value = serde_json::from_str(&run(&["inspect", "--json"])).unwrap();
    assert_eq!(report["lora"][0]["tensors"], 24, "{report}");
    run(&["bench", "--size", "32", "--seconds", "0.01", "--step-only"]);
    run(&[
        "generate", "--prompt", "x", "--steps", "1", "--width", "32", "--height", "32", "--output",
        "with.png",
    ]);
    let args = [
        "generate",
        "--prompt",
        "x",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--output",
        "without.png",
    ];
    ok(folder, &[&args[..], &["--model", &model]].concat());
    let [with_it, without] =
        ["with.png", "without.png"].map(|name| fs::read(folder.join(name)).unwrap());
    assert_ne!(with_it, without);
    let calibrate = [
        "calibrate",
        "--num-prompts",
        "2",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--output",
    ];
    run(&[&calibrate[..], &["with.safetensors"]].concat());
    // statistics with it are not taken for those without it, and the other way round
    let plan = [
        "plan",
        "--ratio",
        "0.2",
        "--stats",
        "with.safetensors",
        "--output",
        "plan.json",
    ];
    run(&plan);
    refused(
        folder,
        &[&["plan", "--force"], &plan[1..], &["--model", &model]].concat(),
        &["another model", "comfyui.safetensors"],
    );
    refused(
        folder,
        &[
            &["plan", "--force"],
            &plan[1..],
            &with[..2],
            &["--lora", &format!("{lora}:0.5")],
        ]
        .concat(),
        &["another model"],
    );
}

#[test]
fn a_pruned_model_is_compared_with_the_base_and_the_same_lora() {
    let folder = folder();
    let folder = folder.path();
    let (model, lora) = (golden("dev/pipe"), lora("comfyui"));
    fs::write(
        folder.join("quick.json"),
        r#"{"calibration": {"samples": 2, "draws": 1, "steps": 1, "width": 32, "height": 32}}"#,
    )
    .unwrap();
    let prune = [
        "prune",
        "--recipe",
        "quick.json",
        "--blocks",
        "single.01",
        "--model",
        &model,
        "--output",
    ];
    ok(folder, &[&prune[..], &["pruned", "--lora", &lora]].concat());
    let inspected = json(folder, &["inspect", "--model", "pruned", "--json"]);
    assert!(
        inspected["merged-lora"][0]["file"]
            .as_str()
            .unwrap()
            .ends_with("comfyui.safetensors"),
        "{inspected}"
    );
    let eval = [
        "eval",
        "--model",
        "pruned",
        "--num-prompts",
        "1",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "32",
        "--json",
    ];
    let report = json(folder, &[&eval[..], &["--output", "report"]].concat());
    assert!(
        report["baseline"]["name"]
            .as_str()
            .unwrap()
            .contains("comfyui.safetensors"),
        "{report}"
    );
    let error = report["models"][0]["against_baseline"]["velocity_error"].as_f64();
    assert!(error.is_none_or(|error| error < 0.1), "{report}");
}
