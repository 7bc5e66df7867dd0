//! `eval` and `bench`.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

use crate::common::*;

const FEW: [&str; 6] = ["--num-prompts", "6", "--steps", "3", "--output", "report"];

fn eval(folder: &Path, args: &[&str]) -> Value {
    json(folder, &[&["eval", "--json"], args].concat())
}

pub(crate) fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path);
    let found = found.unwrap_or_else(|| panic!("`{path}` is missing"));
    found
        .as_f64()
        .unwrap_or_else(|| panic!("`{path}` is {found}"))
}

/// Numbers that do not depend on the clock or on memory.
fn without_timings(mut report: Value) -> Value {
    let strip = |model: &mut Value| {
        for key in ["step", "image_seconds", "speed_up", "peak_memory"] {
            model.as_object_mut().unwrap().remove(key);
        }
    };
    strip(&mut report["baseline"]);
    report["models"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .for_each(strip);
    report
}

#[test]
fn a_worse_model_has_worse_numbers_and_the_report_is_complete() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "good", &["--ratio", "0.1"]);
    quick_prune(
        w,
        "bad",
        &[
            "--blocks",
            "double.01,double.03,single.00,single.02",
            "--form",
            "remove",
        ],
    );
    // losses are drawn from the numbers, never from a chart that lies there
    fs::write(w.join("bad/loss.svg"), "<svg>of a stranger</svg>").unwrap();
    let log = r#"{"log":[{"phase":"finetune","step":1,"loss":0.5,"held-out":0.4},{"phase":"finetune","step":2,"loss":0.3,"held-out":0.3}]}"#;
    fs::write(w.join("bad/training.json"), log).unwrap();
    let models = ["--model", "good", "--model", "bad"];
    let report = eval(w, &[&models[..], &FEW].concat());

    let of = |i: usize, name: &str| number(&report, &format!("/models/{i}/{name}"));
    let (velocity, psnr) = (
        "against_baseline/velocity/error",
        "against_baseline/psnr/mean",
    );
    let (ssim, latent) = (
        "against_baseline/ssim/mean",
        "against_baseline/latent_mse/mean",
    );
    assert!(of(0, velocity) > 0.0 && of(0, velocity) < of(1, velocity) / 2.0);
    assert!(of(0, psnr) > of(1, psnr) + 2.0);
    assert!(of(0, ssim) > of(1, ssim) && of(0, ssim) < 1.0);
    assert!(of(0, latent) < of(1, latent));
    assert!(of(1, "parameters") < of(0, "parameters"));
    assert!(of(0, "parameters") < number(&report, "/baseline/parameters"));
    for i in [0, 1] {
        assert!(of(i, "step/median") > 0.0 && of(i, "speed_up") > 0.0);
        assert!(of(i, "image_seconds") > of(i, "step/median"));
        let times = report["models"][i]["against_baseline"]["velocity"]["by_time"].as_array();
        assert_eq!(times.unwrap().len(), 10);
        let score = &report["models"][i]["prompt_following"]["ok"];
        assert_eq!(score["attempts"], 6);
        assert!(score["low"].as_f64() <= score["share"].as_f64());
    }
    if cfg!(target_os = "linux") {
        assert!(number(&report, "/baseline/peak_memory/host") > 1e7);
    }
    let pairs = report["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 6);
    // captions of the grammar, none of the list that prune calibrates with
    let known =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tiny/prompts.txt"))
            .unwrap();
    for pair in pairs {
        let prompt = pair["prompt"].as_str().unwrap();
        assert!(known.lines().all(|line| line != prompt), "{prompt}");
        assert!(pair["baseline"]["ok"].is_boolean());
    }
    let worst = report["models"][1]["against_baseline"]["worst"].as_array();
    let worst: Vec<usize> = worst
        .unwrap()
        .iter()
        .map(|i| i.as_u64().unwrap() as usize)
        .collect();
    let psnr_of = |i: &usize| number(&pairs[*i], "/models/1/psnr");
    assert!(worst.is_sorted_by(|a, b| psnr_of(a) <= psnr_of(b)));

    // what was printed is what was written
    let written: Value =
        serde_json::from_slice(&fs::read(w.join("report/report.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    assert!(
        fs::read(w.join("report/images.png"))
            .unwrap()
            .starts_with(b"\x89PNG")
    );
    let page = fs::read_to_string(w.join("report/report.html")).unwrap();
    check_page(&page, 6 * 3);
    assert!(!page.contains("of a stranger"));
    assert!(page.contains("Training losses: bad") && page.contains("Scores of blocks"));
    if let Some(chromium) = chromium() {
        for width in [390, 1280] {
            check_in_browser(&chromium, w, &page, width, 6 * 3);
        }
    }

    // again, as it was
    let again = eval(w, &[&models[..], &FEW, &["--force"]].concat());
    assert_eq!(without_timings(again), without_timings(report));
}

/// Nothing is fetched, every image and chart is inside, and every tag is closed.
fn check_page(page: &str, images: usize) {
    assert_eq!(
        page.matches("src=\"data:image/png;base64,iVBOR").count(),
        images
    );
    assert_eq!(
        page.matches("src=\"").count(),
        page.matches("src=\"data:image/").count()
    );
    for outside in [
        "<link",
        "<script",
        "@import",
        "url(",
        "href=\"http",
        "src=\"http",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    for tag in [
        "section", "figure", "table", "svg", "main", "div", "dl", "details",
    ] {
        let open =
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert!(open > 0, "no <{tag}>");
        assert_eq!(open, page.matches(&format!("</{tag}>")).count(), "<{tag}>");
    }
    assert!(page.contains("name=\"viewport\"") && page.contains("prefers-color-scheme: dark"));
    // images may spell anything
    let text: String = page
        .split("base64,")
        .map(|part| part.split_once('"').map_or(part, |(_, text)| text))
        .collect();
    assert!(!text.contains("NaN") && !text.contains("inf"));
}

fn chromium() -> Option<String> {
    let names = [
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ];
    let there = |name: &&str| {
        Command::new(name)
            .arg("--version")
            .output()
            .is_ok_and(|out| out.status.success())
    };
    names.into_iter().find(there).map(str::to_owned)
}

/// Lays the page out at a width: nothing may be wider than the window, and every image must have been decoded.
fn check_in_browser(chromium: &str, folder: &Path, page: &str, width: u32, images: usize) {
    // a frame, as windows have a least width
    let probe = r#"<script>
addEventListener("load", () => {
  const images = [...document.images];
  const rects = [...document.querySelectorAll("main > *, .card, figure, .row img")].map(e => e.getBoundingClientRect());
  parent.document.title = JSON.stringify({
    width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth, images: images.length,
    broken: images.filter(i => i.naturalWidth === 0).length,
    empty: rects.filter(r => r.width < 8 || r.height < 8).length,
    beyond: rects.filter(r => r.right > document.documentElement.clientWidth + 1).length,
  });
});
</script></body>"#;
    fs::write(folder.join("probed.html"), page.replace("</body>", probe)).unwrap();
    let frame = format!(
        "<!DOCTYPE html><title>none</title><iframe src=\"probed.html\" style=\"width:{width}px;height:3000px;border:0\"></iframe>"
    );
    fs::write(folder.join("frame.html"), frame).unwrap();
    let profile = folder.join(format!("profile-{width}"));
    let out = Command::new(chromium)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--virtual-time-budget=10000",
        ])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(["--window-size=1400,3200", "--dump-dom"])
        .arg(format!("file://{}", folder.join("frame.html").display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&out.stdout).into_owned();
    let title = dom
        .split_once("<title>")
        .and_then(|(_, rest)| rest.split_once("</title>"));
    let seen: Value = serde_json::from_str(title.unwrap().0).unwrap_or_else(|_| panic!("{dom}"));
    // the bar to scroll down takes a little of the width
    let (room, scroll) = (number(&seen, "/width"), number(&seen, "/scroll"));
    assert!(room > f64::from(width) - 30.0, "{seen}");
    assert!(scroll <= room, "the page is wider than the window: {seen}");
    assert_eq!(seen["images"], images, "{seen}");
    for fault in ["broken", "empty", "beyond"] {
        assert_eq!(seen[fault], 0, "{seen}");
    }
}

#[test]
fn a_model_equals_itself() {
    let work = folder();
    let few = ["--num", "3", "--steps", "2", "--output", "deep/report"];
    let models = ["--model", "bundled", "--baseline", "bundled"];
    fs::write(
        work.path().join("prompts.txt"),
        "a photo of a cat\na red circle\n",
    )
    .unwrap();
    let prompts = ["--prompts", "prompts.txt"];
    let report = eval(work.path(), &[&models[..], &few, &prompts].concat());
    let distances = &report["models"][0]["against_baseline"];
    assert_eq!(distances["velocity"]["error"], 0.0);
    assert_eq!(distances["latent_mse"]["most"], 0.0);
    assert_eq!(distances["psnr"]["least"], 120.0);
    assert!((number(distances, "/ssim/least") - 1.0).abs() < 1e-12);
    // no captions of the grammar, no score; a short list is drawn from again with other noise
    assert!(report["models"][0].get("prompt_following").is_none());
    let pairs = report["pairs"].as_array().unwrap();
    assert_eq!(pairs[2]["prompt"], pairs[0]["prompt"]);
    assert_ne!(pairs[2]["seed"], pairs[0]["seed"]);
    assert!(work.path().join("deep/report/report.html").is_file());
}

#[test]
fn a_plan_is_judged_without_writing_a_model() {
    let work = folder();
    let plan = r#"{"source": "", "replace": [{"replaces": ["double.01"], "form": "linear"}], "reason": ""}"#;
    fs::write(work.path().join("plan.json"), plan).unwrap();
    fs::write(work.path().join("quick.json"), QUICK).unwrap();
    let before = list(work.path()).len();
    let args = [
        "--plan",
        "plan.json",
        "--recipe",
        "quick.json",
        "--num",
        "4",
        "--steps",
        "2",
    ];
    let report = eval(work.path(), &args);
    assert_eq!(
        list(work.path()).len(),
        before + 1,
        "the report and nothing else"
    );
    let model = &report["models"][0];
    assert_eq!(model["name"], "plan.json");
    assert_eq!(model["replaced"], serde_json::json!(["double.01"]));
    let error = number(model, "/against_baseline/velocity/error");
    assert!(error > 0.0 && error < 0.05, "{error}");
}

#[test]
fn bad_input_is_refused_before_any_drawing() {
    let work = folder();
    let w = work.path();
    let (dev, schnell) = (golden("dev/pipe"), golden("schnell/pipe"));
    fs::write(w.join("empty.txt"), "\n\n").unwrap();
    fs::create_dir(w.join("report")).unwrap();
    let new = ["--output", "new"];
    let no = |args: &[&str], words: &[&str]| {
        refused(w, &[&["eval"], args, &new].concat(), words);
    };
    fs::write(
        w.join("plan.json"),
        r#"{"source": "another", "replace": [], "reason": ""}"#,
    )
    .unwrap();
    no(&["--plan", "plan.json"], &["plan.json"]);
    no(&["--plan", "missing.json"], &["missing.json"]);
    no(&[], &["--model", "hint:", "prune"]);
    no(&["--model", "nowhere"], &["`nowhere` does not exist"]);
    no(&["--model", &dev], &["--baseline"]);
    no(
        &["--model", &dev, "--baseline", "nowhere"],
        &["--baseline", "nowhere"],
    );
    no(
        &["--model", &dev, "--baseline", "bundled"],
        &["different families", "width of the text"],
    );
    no(
        &["--model", &dev, "--model", &schnell, "--baseline", &dev],
        &["different families"],
    );
    let same = ["--model", "bundled", "--baseline", "bundled"];
    for (flag, value) in [
        ("--num", "0"),
        ("--steps", "0"),
        ("--num", "1000000000"),
        ("--width", "7"),
        ("--guidance", "NaN"),
    ] {
        misused(
            w,
            &[&["eval"], &same[..], &[flag, value], &new].concat(),
            &[flag],
        );
    }
    no(
        &[&same[..], &["--prompts", "empty.txt"]].concat(),
        &["empty.txt", "no prompt"],
    );
    no(
        &[&same[..], &["--prompts", "missing.txt"]].concat(),
        &["missing.txt"],
    );
    refused(
        w,
        &[&["eval", "--output", "report"], &same[..]].concat(),
        &["report", "--force"],
    );
    for (flag, value) in [
        ("--batch", "0"),
        ("--size", "17"),
        ("--text-tokens", "0"),
        ("--seconds", "-1"),
        ("--config", "nowhere.json"),
        ("--model", "nowhere"),
    ] {
        refused(w, &["bench", &format!("{flag}={value}")], &[value]);
    }
    // a trillion parameters fit nowhere
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/flux1/dev.json");
    let text = fs::read_to_string(config).unwrap();
    let mut huge: Value = serde_json::from_str(&text).unwrap();
    huge["num_single_layers"] = 1_000.into();
    fs::write(w.join("huge.json"), huge.to_string()).unwrap();
    refused(w, &["bench", "--config", "huge.json"], &["free", "hint:"]);
    refused(
        w,
        &["bench", "--against", &schnell],
        &["--against", "same inputs"],
    );
}
