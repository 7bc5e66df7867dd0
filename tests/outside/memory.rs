//! What is not on the device: streamed blocks, limits, tiles. The same numbers come out, whatever the memory.

use std::fs;

use crate::common::*;

/// Sizes of the bundled model in f32, bytes.
const WHOLE: u64 = 22_500_000;

#[test]
fn images_are_the_same_wherever_the_blocks_are() {
    let work = folder();
    let w = work.path();
    let draw = |output: &str, more: &[&str]| {
        let prompt = "a red circle left of a blue square on a white background";
        let args = ["generate", "--steps", "2", "--output", output, "--prompt"];
        let out = fastflux(w, &[&args, [prompt].as_slice(), more].concat());
        let talk = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{talk}");
        (fs::read(w.join(output)).unwrap(), talk)
    };
    let (want, talk) = draw("whole.png", &[]);
    assert!(!talk.contains("stay on the device"), "{talk}");
    let (got, talk) = draw("offload.png", &["--offload"]);
    assert!(
        got == want && talk.contains("0 of 15 blocks stay"),
        "{talk}"
    );
    let (got, talk) = draw("half.png", &["--max-vram", "16MB"]);
    assert!(got == want, "{talk}");
    let count: usize = {
        let at = talk.find(" of 15 blocks stay").unwrap();
        talk[..at].rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!((3..15).contains(&count), "{talk}");
    let (got, talk) = draw("enough.png", &["--max-vram", "1GiB"]);
    assert!(got == want && !talk.contains("blocks stay"), "{talk}");
    fs::create_dir(w.join("empty")).unwrap();
    let prompt = ["generate", "--prompt", "a fox", "--output", "fox.png"];
    let few = ["--max-vram", "2MB"];
    refused(
        w,
        &[prompt.as_slice(), &few].concat(),
        &["--max-vram", "two blocks at a time", "hint: allow"],
    );
}

/// The pixels of a PNG.
fn pixels(path: &std::path::Path) -> Vec<u8> {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}

#[test]
fn a_image_decoded_in_bands_is_the_image() {
    let work = folder();
    let w = work.path();
    let draw = |output: &str, tile: &str| {
        let prompt = "a red circle on a white background";
        let args = ["generate", "--steps", "2", "--output", output, "--prompt"];
        ok(
            w,
            &[&args, [prompt, "--vae-tile", tile].as_slice()].concat(),
        );
        pixels(&w.join(output))
    };
    let whole = draw("whole.png", "0");
    assert_eq!(whole.len(), 64 * 64 * 3);
    for tile in ["8", "24"] {
        let bands = draw(&format!("{tile}.png"), tile);
        let far = whole.iter().zip(&bands).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(far <= Some(1), "{tile}: {far:?}");
    }
}

/// What a process takes varies by more than the step of a model so small: the estimate is held against the largest tensor
/// of a block, the projection to queries, keys, values and MLP, by shapes.
#[test]
fn a_step_is_estimated_by_the_tensors_that_it_makes() {
    let work = folder();
    let w = work.path();
    let args = ["bench", "--seconds", "0", "--step-only", "--json"];
    let more = ["--size", "256", "--batch", "1,2"];
    let report = json(w, &[args.as_slice(), &more].concat());
    let rows = report["rows"].as_array().unwrap();
    let estimated = |row: usize| {
        rows[row]["estimated_activation_bytes"]
            .as_u64()
            .unwrap_or_else(|| panic!("{}", rows[row]))
    };
    assert_eq!(rows.len(), 2);
    assert_eq!(estimated(1), 2 * estimated(0));
    // (16² image and 12 text tokens) × (3 + 4) widths of 128 × 4 bytes
    let largest = (16 * 16 + 12) * 7 * 128 * 4;
    assert!(
        (2 * largest..5 * largest).contains(&estimated(0)),
        "{} where one tensor takes {largest}",
        estimated(0)
    );
}

#[test]
fn pruning_gives_the_same_bytes_without_a_block_on_the_device() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "whole", &["--blocks", "double.01,single.03"]);
    let more = ["--blocks", "double.01,single.03", "--offload"];
    quick_prune(w, "offload", &more);
    for file in ["flux.safetensors", "before-after.png", "plan.json"] {
        let read = |folder: &str| fs::read(w.join(folder).join(file)).unwrap();
        assert!(read("whole") == read("offload"), "{file}");
    }
    let estimate = |more: &[&str]| {
        let args = ["prune", "--dry-run", "--json", "--recipe", "quick.json"];
        json(w, &[&args, more].concat())
    };
    let (whole, few) = (estimate(&[]), estimate(&["--offload"]));
    assert_eq!(whole["blocks_on_the_device"], 15);
    assert_eq!(few["blocks_on_the_device"], 0);
    let weights = |estimate: &serde_json::Value| estimate["bytes"]["weights"].as_u64().unwrap();
    assert!(weights(&whole) > WHOLE - 500_000 && weights(&whole) < WHOLE + 500_000);
    assert!(weights(&few) < WHOLE / 3, "{}", weights(&few));
}

/// Noised latents that share a forward are part of what a calibration is: little memory takes blocks away, never noised latents.
#[test]
fn statistics_are_the_same_bytes_in_little_memory() {
    let work = folder();
    let w = work.path();
    let recipe = r#"{"calibration": {"num-prompts": 12, "steps": 2, "noise-levels-per-image": 1, "batch": 6}, "score": {"held-out": 8}}"#;
    fs::write(w.join("recipe.json"), recipe).unwrap();
    let calibrate = |output: &str, more: &[&str]| {
        let args = ["calibrate", "--recipe", "recipe.json", "--output", output];
        // the same room for sums, so that all of them are kept
        let sums = ["--stats-memory", "1GiB"];
        let out = fastflux(w, &[&args[..], &sums, more].concat());
        let talk = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.success(), "{talk}");
        (fs::read(w.join(output)).unwrap(), talk)
    };
    let (want, talk) = calibrate("whole.safetensors", &[]);
    assert!(!talk.contains("blocks stay"), "{talk}");
    let (got, talk) = calibrate("little.safetensors", &["--max-vram", "30MB"]);
    assert!(talk.contains("of 15 blocks stay"), "{talk}");
    assert!(got == want);
    let few = ["--output", "none.safetensors", "--max-vram", "8MB"];
    let args = [
        "calibrate",
        "--recipe",
        "recipe.json",
        "--stats-memory",
        "1GiB",
    ];
    refused(
        w,
        &[args.as_slice(), &few].concat(),
        &["--max-vram", "6 noised latents of", "calibration.batch"],
    );
}

#[test]
fn scores_and_reports_are_the_same_without_a_block_on_the_device() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let score = |output: &str, more: &[&str]| {
        let args = ["score", "--recipe", "quick.json", "--output", output];
        ok(w, &[&args, more].concat());
        fs::read(w.join(output)).unwrap()
    };
    let want = score("whole.json", &[]);
    assert!(score("offload.json", &["--offload"]) == want);
    quick_prune(w, "pruned", &["--blocks", "single.03"]);
    let eval = |output: &str, more: &[&str]| {
        let args = ["eval", "--model", "pruned", "--num", "4", "--steps", "2"];
        let output = ["--output", output, "--json"];
        json(w, &[&args, output.as_slice(), more].concat())
    };
    let clip = golden("clip");
    let scored = ["--clip", clip.as_str()];
    let (want, got) = (
        eval("whole", &scored),
        eval("offload", &[&scored[..], &["--offload"]].concat()),
    );
    for model in [&want["baseline"], &want["models"][0]] {
        let score = &model["clip_score"];
        assert_eq!(score["count"], 4);
        let mean = score["mean"].as_f64().unwrap();
        assert!(mean.abs() > 0.01 && mean.abs() < 100.0, "{mean}");
    }
    assert!(want["pairs"][0]["models"][0]["clip"].is_number());
    let page = fs::read_to_string(w.join("whole/report.html")).unwrap();
    assert!(page.contains("CLIP score"));
    let none = ["eval", "--model", "pruned", "--clip", "nowhere"];
    refused(w, &none, &["--clip", "`nowhere` does not exist", "hint:"]);
    let not = ["eval", "--model", "pruned", "--clip", "pruned"];
    refused(w, &not, &["model.safetensors"]);
    assert_eq!(want["pairs"], got["pairs"]);
    let error = |report: &serde_json::Value| report["models"][0]["against_baseline"].clone();
    assert_eq!(error(&want), error(&got));
}

#[test]
#[cfg(target_os = "linux")]
fn without_memory_there_is_advice_instead_of_an_abort() {
    let work = folder();
    let program = assert_cmd::cargo::cargo_bin!("fastflux");
    let draw = "generate --prompt x --width 512 --height 512 --steps 1 --output a.png";
    let line = format!(
        "ulimit -v 400000; exec '{}' {draw} --device cpu",
        program.display()
    );
    let mut shell = std::process::Command::new("sh");
    let out = shell
        .current_dir(work.path())
        .args(["-c", &line])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no more memory") && said.contains("--offload"),
        "{said}"
    );
    assert!(!work.path().join("a.png").exists());
}
