//! Every number of a recipe, and every flag that sets one, changes what is written: a setting that does nothing is worse
//! than none. The keys come from `configs/`, so a new one has to be entered here.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

use crate::{
    common::{folder, golden, ok},
    tensors,
};

/// How a setting is changed: by flags if there are some, or by a value in the recipe.
enum By {
    Flags(&'static [&'static str]),
    Recipe(Value),
    /// It decides how long a run may take or how its sums are rounded, and another test looks at it.
    Elsewhere,
}

use By::{Elsewhere, Flags, Recipe};

/// The leaves of a recipe: `fit.ridge` and so on.
fn keys(prefix: &str, value: &Value, out: &mut Vec<String>) {
    match value.as_object() {
        None => out.push(prefix.to_owned()),
        Some(map) => {
            for (key, value) in map {
                let prefix = if prefix.is_empty() {
                    key.clone()
                } else {
                    format!("{prefix}.{key}")
                };
                keys(&prefix, value, out);
            }
        }
    }
}

/// `recipe` with another value at `key`.
fn with(recipe: &Value, key: &str, value: &Value) -> Value {
    let mut recipe = recipe.clone();
    let mut place = &mut recipe;
    for part in key.split('.') {
        place = &mut place[part];
    }
    *place = value.clone();
    recipe
}

/// What a file holds that was computed: the tensors without the metadata, which name the recipe, or all of a JSON file.
fn computed(path: &Path) -> Vec<Vec<u8>> {
    if path.extension().is_some_and(|e| e == "json") {
        return vec![fs::read(path).unwrap()];
    }
    let tensors = tensors::of_file(path).into_iter();
    tensors
        .map(|(name, _, _, data)| [name.as_bytes(), &data].concat())
        .collect()
}

/// Runs `command` once as it is and once for every key with its change; what is in the files `written` must differ.
fn every_setting_acts(
    config: &str,
    recipe: &Value,
    command: &[&str],
    written: &[&str],
    changes: &[(&str, By)],
    work: &Path,
) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("configs")
        .join(config);
    let config: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let (mut all, mut named) = (Vec::new(), Vec::new());
    keys("", &config, &mut all);
    named.extend(changes.iter().map(|(key, _)| (*key).to_owned()));
    all.sort();
    named.sort();
    assert_eq!(
        all, named,
        "the keys of the recipe and those that are tried"
    );

    let run = |name: &str, recipe: &Value, flags: &[&str]| -> Vec<Vec<u8>> {
        let file = format!("{name}.json");
        fs::write(work.join(&file), recipe.to_string()).unwrap();
        let rest = ["--recipe", &file, "--output", name, "--quiet"];
        ok(work, &[command, &rest, flags].concat());
        let bytes = written
            .iter()
            .flat_map(|written| computed(&work.join(name).join(written)));
        let bytes = bytes.collect();
        fs::remove_dir_all(work.join(name)).unwrap();
        bytes
    };
    let base = run("base", recipe, &[]);
    assert!(
        base == run("same", recipe, &[]),
        "the same settings write other bytes"
    );
    let mut idle = BTreeMap::new();
    for (key, by) in changes {
        let got = match by {
            Elsewhere => continue,
            Flags(flags) => run("changed", recipe, flags),
            Recipe(value) => run("changed", &with(recipe, key, value), &[]),
        };
        if got == base {
            idle.insert(*key, "changes nothing");
        }
    }
    assert!(idle.is_empty(), "{idle:?}");
}

#[test]
fn every_setting_of_prune_acts() {
    let recipe = json!({
        "calibration": { "num-prompts": 6, "noise-levels-per-image": 2, "steps": 2 },
        "score": { "held-out": 8 }, "fit": {}, "ratio": 0.4
    });
    let (work, model) = (folder(), golden("dev/pipe"));
    let changes = [
        ("ratio", Flags(&["--ratio", "0.6"])),
        // `--images` sets it: tests in `calibration`
        ("calibration.source", Elsewhere),
        ("calibration.num-prompts", Flags(&["--num-prompts", "5"])),
        ("calibration.noise-levels-per-image", Recipe(json!(3))),
        ("calibration.steps", Flags(&["--steps", "3"])),
        ("calibration.guidance", Recipe(json!(2.0))),
        ("calibration.width", Flags(&["--width", "80"])),
        ("calibration.height", Flags(&["--height", "80"])),
        ("calibration.seed", Flags(&["--seed", "1"])),
        // which rows share a product shows in its last bits only
        ("calibration.batch", Elsewhere),
        (
            "calibration.tokens-per-forward",
            Flags(&["--tokens-per-forward", "40"]),
        ),
        ("score.held-out", Recipe(json!(16))),
        // on what the second choice is measured to cost: below
        ("score.refit-between-rounds", Elsewhere),
        ("fit.form", Flags(&["--form", "conditioned"])),
        ("fit.joint", Recipe(json!(true))),
        // of neighbours alone: below
        ("fit.collapse", Elsewhere),
        ("fit.ridge", Recipe(json!(0.001))),
        ("fit.sequential", Recipe(json!(false))),
        (
            "fit.refit-projections",
            Flags(&["--refit-projections", "head"]),
        ),
    ];
    let written = ["flux.safetensors", "scores.json"];
    every_setting_acts(
        "prune.json",
        &recipe,
        &["prune", "--model", &model],
        &written,
        &changes,
        work.path(),
    );

    let costs = |name: &str, recipe: &Value| {
        let file = format!("{name}-recipe.json");
        fs::write(work.path().join(&file), recipe.to_string()).unwrap();
        let output = format!("{name}.json");
        let args = ["plan", "--model", &model, "--ratio", "0.2,0.4", "--json"];
        let rest = ["--recipe", &file, "--output", &output];
        let report: Value =
            serde_json::from_str(&ok(work.path(), &[&args[..], &rest].concat())).unwrap();
        [0, 1].map(|k| report["points"][k]["velocity_error"].as_f64().unwrap())
    };
    let without = with(&recipe, "score.refit-between-rounds", &json!(false));
    let (with_refits, without) = (costs("with", &recipe), costs("without", &without));
    assert!(
        (with_refits[0] - without[0]).abs() <= 0.0,
        "{with_refits:?} {without:?}"
    );
    assert!(
        (with_refits[1] - without[1]).abs() > 0.0,
        "{with_refits:?} {without:?}"
    );

    let one_layer = |name: &str, recipe: &Value| {
        let file = format!("{name}.json");
        fs::write(work.path().join(&file), recipe.to_string()).unwrap();
        let args = [
            "prune",
            "--model",
            &model,
            "--blocks",
            "single.00-01",
            "--quiet",
            "--recipe",
        ];
        ok(
            work.path(),
            &[&args[..], &[&file, "--output", name]].concat(),
        );
        computed(&work.path().join(name).join("flux.safetensors"))
    };
    let apart = with(&recipe, "fit.collapse", &json!(false));
    assert!(one_layer("together", &recipe) != one_layer("apart", &apart));
}

#[test]
fn every_setting_of_train_sandwich_acts() {
    let (work, model) = (folder(), golden("dev/pipe"));
    let quick = [
        "--num-prompts",
        "6",
        "--steps",
        "2",
        "--output",
        "pruned",
        "--quiet",
    ];
    ok(
        work.path(),
        &[
            &[
                "prune",
                "--model",
                &model,
                "--blocks",
                "double.00,single.02",
            ],
            &quick[..],
        ]
        .concat(),
    );
    fs::write(
        work.path().join("prompts.txt"),
        "a red circle on a white background\na blue square on a black background\na green triangle on a white background\n",
    )
    .unwrap();
    let recipe = json!({
        "data": { "num-prompts": 8, "steps": 2, "held-out": 4, "batch": 2 },
        "sandwich": {}, "lora": { "rank": 4 }, "loss": {},
        "optimiser": { "lr": 1e-5, "warmup": 2 }, "steps": 3,
        "finetune": { "steps": 3, "lr": 1e-5 }, "evaluate-every": 1, "patience": 0
    });
    let changes = [
        ("seed", Flags(&["--seed", "1"])),
        ("data.num-prompts", Flags(&["--num-prompts", "9"])),
        ("data.steps", Recipe(json!(3))),
        ("data.guidance", Recipe(json!(2.0))),
        ("data.width", Flags(&["--width", "80"])),
        ("data.height", Flags(&["--height", "80"])),
        ("data.batch", Flags(&["--batch", "3"])),
        ("data.accumulate", Flags(&["--accumulate", "2"])),
        ("data.held-out", Recipe(json!(6))),
        ("data.cache", Flags(&["--cache", "1"])),
        ("sandwich.neighbours", Recipe(json!(2))),
        ("sandwich.order", Recipe(json!("downwards"))),
        ("sandwich.target", Recipe(json!("local"))),
        ("lora.rank", Flags(&["--rank", "5"])),
        ("lora.alpha", Flags(&["--alpha", "8"])),
        ("lora.targets", Recipe(json!(["attention"]))),
        ("loss.normalise", Recipe(json!("token"))),
        ("loss.text-weight", Recipe(json!(0.5))),
        ("optimiser.method", Recipe(json!("adamw"))),
        ("optimiser.momentum", Recipe(json!(0.5))),
        ("optimiser.lr", Flags(&["--lr", "2e-5"])),
        ("optimiser.layer-lr", Recipe(json!(1.0))),
        ("optimiser.warmup", Recipe(json!(1))),
        ("optimiser.final-lr", Recipe(json!(0.5))),
        ("optimiser.beta1", Recipe(json!(0.5))),
        ("optimiser.beta2", Recipe(json!(0.5))),
        ("optimiser.epsilon", Recipe(json!(1e-3))),
        ("optimiser.weight-decay", Recipe(json!(0.5))),
        ("optimiser.clip", Recipe(json!(1e-9))),
        ("steps", Flags(&["--steps", "4"])),
        ("finetune.steps", Flags(&["--finetune", "4"])),
        ("finetune.lr", Recipe(json!(2e-5))),
        ("finetune.blocks", Recipe(json!("sandwiches"))),
        // how soon a phase that gains nothing ends: below
        ("evaluate-every", Elsewhere),
        ("patience", Elsewhere),
    ];
    let written = ["flux.safetensors", "sandwich.safetensors"];
    let command = ["train-sandwich", "--model", "pruned"];
    every_setting_acts(
        "sandwich.json",
        &recipe,
        &command,
        &written,
        &changes,
        work.path(),
    );

    let none = [
        "train-sandwich",
        "--model",
        "pruned",
        "--recipe",
        "base.json",
        "--quiet",
    ];
    let written = |flags: &[&str]| {
        ok(
            work.path(),
            &[&none[..], &["--output", "other"], flags].concat(),
        );
        let bytes = computed(&work.path().join("other/flux.safetensors"));
        fs::remove_dir_all(work.path().join("other")).unwrap();
        bytes
    };
    let base = written(&[]);
    assert!(base != written(&["--no-lora"]));
    assert!(base != written(&["--prompts", "prompts.txt"]));

    // a step this small moves nothing, so the first look that may end a phase does
    let still = with(&recipe, "optimiser.lr", &json!(1e-300));
    let still = with(&still, "finetune.lr", &json!(1e-300));
    for (patience, every, steps) in [(0, 1, 3), (1, 1, 1), (2, 1, 2), (1, 2, 2)] {
        let recipe = with(&still, "patience", &json!(patience));
        let recipe = with(&recipe, "evaluate-every", &json!(every));
        fs::write(work.path().join("still.json"), recipe.to_string()).unwrap();
        let args = [
            "train-sandwich",
            "--model",
            "pruned",
            "--recipe",
            "still.json",
        ];
        ok(
            work.path(),
            &[&args[..], &["--output", "still", "--quiet"]].concat(),
        );
        let report = fs::read_to_string(work.path().join("still/training.json")).unwrap();
        let report: Value = serde_json::from_str(&report).unwrap();
        let phases = report["phases"].as_array().unwrap();
        assert!(
            phases.iter().all(|phase| phase["steps"] == steps),
            "{patience} {every}: {report}"
        );
        fs::remove_dir_all(work.path().join("still")).unwrap();
    }
}
