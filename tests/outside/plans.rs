//! `score` and `plan`: files that are made, edited by hand, and carried out.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{calibration::calibrate, common::*};

#[test]
fn a_plan_made_of_scores_is_carried_out() {
    let work = folder();
    let w = work.path();
    calibrate(w, "stats.safetensors", &[]);
    let stats = ["--stats", "stats.safetensors"];
    let scores = json(w, &[&["score", "--json"], &stats[..]].concat());
    let blocks = scores["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), 15);
    for block in blocks {
        for metric in [
            "ablation",
            "removal",
            "relative_change",
            "cosine",
            "fit_error",
            "fit_residual",
        ] {
            assert!(
                block[metric].as_f64().unwrap() >= 0.0,
                "{metric} of {}",
                block["block"]
            );
        }
        assert!(
            block["ablation"].as_f64() < block["removal"].as_f64(),
            "{}",
            block["block"]
        );
        assert!(block["timesteps"].as_array().unwrap().len() > 5);
    }
    assert!(
        fs::read_to_string(w.join("scores.svg"))
            .unwrap()
            .contains("</svg>")
    );
    let plan = |name: &str, more: &[&str]| -> Value {
        let output = format!("{name}.json");
        let args = [
            "plan",
            "--scores",
            "scores.json",
            "--json",
            "--output",
            &output,
        ];
        json(w, &[&args[..], more].concat())
    };
    let least = |metric: &str| {
        let value = |b: &&Value| b[metric].as_f64().unwrap();
        let block = blocks.iter().min_by(|a, b| value(a).total_cmp(&value(b)));
        block.unwrap()["block"].as_str().unwrap().to_owned()
    };
    let replaced = |plan: &Value| -> Vec<String> {
        let runs = plan["plan"]["replace"].as_array().unwrap().iter();
        let ids = runs.flat_map(|run| run["replaces"].as_array().unwrap());
        ids.map(|id| id.as_str().unwrap().to_owned()).collect()
    };
    let one = plan("one", &["--ratio", "0.07"]);
    assert_eq!(replaced(&one), [least("ablation")]);
    let other = plan(
        "other",
        &["--ratio", "0.07", "--protect", &least("ablation")],
    );
    assert_ne!(replaced(&other), replaced(&one));
    let cheap = plan("cheap", &["--ratio", "0.07", "--metric", "cosine"]);
    assert_eq!(replaced(&cheap), [least("cosine")]);
    let small = plan("small", &["--budget-params", "4.5M"]);
    assert!(small["after"]["parameters"].as_u64().unwrap() <= 4_500_000);
    let fast = plan("fast", &["--target-speedup", "1.2"]);
    assert!(fast["speed_up"].as_f64().unwrap() >= 1.2);
    refused(
        w,
        &[
            "plan",
            "--scores",
            "scores.json",
            "--budget-params",
            "1K",
            "--output",
            "p.json",
        ],
        &["--budget-params", "1000", "leaves"],
    );
    misused(
        w,
        &[
            "plan",
            "--scores",
            "scores.json",
            "--target-speedup",
            "0.9",
            "--output",
            "p.json",
        ],
        &["--target-speedup"],
    );
    // what was estimated is what is written
    let args = [
        "prune",
        "--plan",
        "small.json",
        "--recipe",
        "units.json",
        "--output",
        "small",
        "--json",
    ];
    let pruned = json(w, &args);
    assert_eq!(pruned["after"]["parameters"], small["after"]["parameters"]);
    assert_eq!(pruned["after"]["bytes"], small["after"]["file_bytes"]);
    assert_eq!(pruned["after"]["flops_per_step"], small["after"]["flops"]);
}

#[test]
fn plans_that_make_no_sense_are_refused() {
    let work = folder();
    let w = work.path();
    let plan = |replace: &str| {
        let text = format!(r#"{{"source": "", "replace": [{replace}], "reason": ""}}"#);
        fs::write(w.join("plan.json"), text).unwrap();
    };
    let args = ["prune", "--plan", "plan.json", "--output", "p"];
    for (replace, words) in [
        (
            r#"{"replaces": ["double.07"], "form": "linear"}"#,
            &["double.07"][..],
        ),
        (
            r#"{"replaces": ["single.01"], "form": "linear"}, {"replaces": ["single.01"], "form": "remove"}"#,
            &["single.01", "twice"],
        ),
        (
            r#"{"replaces": ["single.01", "single.05"], "form": "linear"}"#,
            &["neighbours"],
        ),
        (
            r#"{"replaces": ["triple.01"], "form": "linear"}"#,
            &["plan.json", "triple.01"],
        ),
        (r#"{"replaces": [], "form": "linear"}"#, &["no block"]),
    ] {
        plan(replace);
        refused(w, &args, words);
    }
    fs::write(w.join("plan.json"), "{").unwrap();
    refused(w, &args, &["plan.json"]);
}

#[test]
fn several_ratios_are_drawn_against_speed_and_size() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let args = [
        "plan",
        "--recipe",
        "quick.json",
        "--ratio",
        "0.1,0.2",
        "--json",
    ];
    let report = json(w, &args);
    let points = report["points"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    for (chart, axis) in [
        ("plan.svg", "times as fast"),
        ("plan-size.svg", "million parameters"),
    ] {
        let svg = fs::read_to_string(w.join(chart)).unwrap();
        assert!(
            svg.contains(axis) && svg.contains("velocity error"),
            "{svg}"
        );
        assert_eq!(svg.matches("<circle").count(), 2, "{svg}");
    }
}

/// Training takes more memory than all else: on small cards it alone gets smaller images, the largest that fit.
#[test]
fn small_cards_train_on_smaller_images() {
    let work = folder();
    let w = work.path();
    copy(Path::new(&golden("dev/pipe")), &w.join("pipe"));
    fs::write(w.join("pipe/fastflux.json"), r#"{"size": 1024}"#).unwrap();
    for (card, side) in [
        ("48MiB", None),
        ("30MiB", Some(768)),
        ("24MiB", Some(512)),
        ("16MiB", Some(256)),
    ] {
        let report = json(w, &["plan", "--model", "pipe", "--for", card, "--json"]);
        let of = |place: usize, key: &str| report["commands"][place][key].clone();
        let wanted = side.map(|side| format!(" --width {side} --height {side}"));
        let command = of(3, "command");
        assert_eq!(
            command.as_str().unwrap(),
            format!(
                "fastflux train-sandwich --model pruned --output trained{}",
                wanted.unwrap_or_default()
            ),
            "{card}"
        );
        let takes = of(3, "memory_bytes").as_u64().unwrap();
        assert!(
            takes <= report["bytes"].as_u64().unwrap(),
            "{card}: {report}"
        );
        assert_eq!(report["size"], serde_json::json!([1024, 1024]));
        let calibrate = of(0, "command");
        assert!(
            !calibrate.as_str().unwrap().contains("--width"),
            "{calibrate}"
        );
    }
    // too small to train on at any size
    let report = json(w, &["plan", "--model", "pipe", "--for", "9MiB", "--json"]);
    assert!(report["commands"][3]["memory_bytes"].is_null(), "{report}");
    assert!(report["commands"][4]["memory_bytes"].is_u64(), "{report}");
}

/// What `plan --for` prints is copied into a shell: every part of the model is named, and lines that are broken go on.
#[cfg(unix)]
#[test]
fn the_commands_for_a_card_work_as_they_are_printed() {
    let work = folder();
    let w = work.path();
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/tiny");
    let weights = "transformer/diffusion_pytorch_model.safetensors";
    fs::create_dir(w.join("my models")).unwrap();
    fs::copy(
        format!("{tiny}/{weights}"),
        w.join("my models/flux.safetensors"),
    )
    .unwrap();
    let (config, vae) = (
        format!("{tiny}/transformer/config.json"),
        format!("{tiny}/vae"),
    );
    let named = [
        ("--model", "'my models/flux.safetensors'"),
        ("--config", &config),
        ("--text-encoders", tiny),
        ("--vae", &vae),
    ];
    let flags = named.map(|(flag, value)| [flag, value.trim_matches('\'')]);
    let text = ok(
        w,
        &[&["plan", "--for", "24GiB"], flags.as_flattened()].concat(),
    );
    assert!(
        text.lines()
            .all(|line| line.chars().count() <= 80 || line.contains(tiny)),
        "{text}"
    );
    let joined = text.replace(" \\\n ", "");
    let command = |name: &str| {
        let start = format!("fastflux {name} ");
        joined
            .lines()
            .find(|line| line.starts_with(&start))
            .unwrap()
            .to_owned()
    };
    for name in ["calibrate", "plan", "prune"] {
        for (flag, value) in named {
            assert!(
                command(name).contains(&format!(" {flag} {value}")),
                "{}",
                command(name)
            );
        }
    }
    let line = text
        .split("\n# ")
        .nth(1)
        .unwrap()
        .split_once('\n')
        .unwrap()
        .1;
    let program = command_line(w, &format!("{} --num-prompts 4 --dry-run", line.trim_end()));
    assert!(
        program.contains("my models/flux.safetensors on cpu, f32"),
        "{program}"
    );
}

/// What a shell makes of a line that begins with the program's name.
#[cfg(unix)]
fn command_line(folder: &Path, line: &str) -> String {
    let program = assert_cmd::cargo::cargo_bin!("fastflux")
        .display()
        .to_string();
    let line = line.replacen("fastflux", &program, 1);
    let mut shell = std::process::Command::new("sh");
    let out = shell
        .args(["-c", &line])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}
