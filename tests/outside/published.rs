//! What is made for others: whole pipelines, cards with results, and the scorers that these name.

use std::{fs, path::Path};

use serde_json::Value;

use crate::{alexnet::alexnet, common::*};

/// Pruning settings for the small pipeline of tests/golden/dev.
pub(crate) const SMALL: [&str; 12] = [
    "--model",
    "pipe",
    "--blocks",
    "single.01",
    "--num-prompts",
    "4",
    "--steps",
    "1",
    "--width",
    "32",
    "--height",
    "32",
];

pub(crate) fn prune_small(folder: &Path, output: &str, more: &[&str]) {
    let args = ["prune", "--output", output];
    ok(folder, &[&args[..], &SMALL, more].concat());
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_whole_pipeline_is_one_without_its_base() {
    let work = folder();
    let w = work.path();
    copy(Path::new(&golden("dev/pipe")), &w.join("pipe"));
    fs::write(w.join("pipe/text_encoder/pytorch_model.bin"), "pickled").unwrap();
    fs::write(
        w.join("pipe/vae/diffusion_pytorch_model.fp16.safetensors"),
        "half",
    )
    .unwrap();
    prune_small(w, "whole", &["--whole"]);
    prune_small(w, "linked", &["--whole=link", "--form", "remove"]);
    let convert = ["convert", "--model", "whole", "--dtype", "f16"];
    ok(
        w,
        &[&convert[..], &["--whole", "--output", "again"]].concat(),
    );
    let original = read_json(&w.join("pipe/model_index.json"));
    for (folder, module, class) in [
        ("whole", "fastflux_flux", "FastFluxTransformer2DModel"),
        ("linked", "diffusers", "FluxTransformer2DModel"),
        ("again", "fastflux_flux", "FastFluxTransformer2DModel"),
    ] {
        let folder = w.join(folder);
        let mut index = read_json(&folder.join("model_index.json"));
        assert_eq!(index["transformer"], serde_json::json!([module, class]));
        index["transformer"] = original["transformer"].clone();
        assert_eq!(index, original);
        let config = read_json(&folder.join("transformer/config.json"));
        assert_eq!(config["_class_name"], class);
        // diffusers' own classes refuse it by this, and open what is FLUX with fewer blocks
        let kept_out = config["quantization_config"]["quant_method"].as_str();
        assert_eq!(
            kept_out.is_some_and(|text| text.contains("trust_remote_code=True")),
            module == "fastflux_flux"
        );
        for file in [
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
            "text_encoder_2/config.json",
            "tokenizer/tokenizer.json",
            "tokenizer_2/tokenizer.json",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/config.json",
        ] {
            let read = |root: &Path| fs::read(root.join(file)).unwrap();
            assert!(read(&folder) == read(&w.join("pipe")), "{file}");
        }
        assert_eq!(
            read_json(&folder.join("scheduler/scheduler_config.json")),
            read_json(&w.join("pipe/scheduler/scheduler_config.json"))
        );
        for left_out in [
            "text_encoder/pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ] {
            assert!(!folder.join(left_out).exists(), "{left_out}");
        }
    }
    let card = fs::read_to_string(w.join("whole/README.md")).unwrap();
    assert!(card.contains("DiffusionPipeline.from_pretrained(\"FOLDER\", trust_remote_code=True"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let inode = |path: &str| fs::metadata(w.join(path)).unwrap().ino();
        let file = "vae/diffusion_pytorch_model.safetensors";
        assert_eq!(
            inode(&format!("linked/{file}")),
            inode(&format!("pipe/{file}"))
        );
        assert_ne!(
            inode(&format!("whole/{file}")),
            inode(&format!("pipe/{file}"))
        );
    }
    fs::remove_dir_all(w.join("pipe")).unwrap();
    for model in ["whole", "linked", "again"] {
        let args = [
            "generate", "--prompt", "x", "--steps", "1", "--model", model,
        ];
        let size = ["--width", "32", "--height", "32", "--output", "image.png"];
        ok(w, &[&args[..], &size].concat());
    }
}

#[test]
fn a_whole_pipeline_is_refused_where_it_cannot_be_one() {
    let work = folder();
    let w = work.path();
    let (pipe, vae) = (golden("dev/pipe"), golden("dev/pipe/vae"));
    let vae = format!("{vae}/diffusion_pytorch_model.safetensors");
    let prune = [
        "prune",
        "--model",
        &pipe,
        "--blocks",
        "single.01",
        "--whole",
    ];
    refused(
        w,
        &[&prune[..], &["--vae", &vae]].concat(),
        &["VAE", "--whole", "config.json"],
    );
    refused(
        w,
        &[&prune[..], &["--patch"]].concat(),
        &["--patch and --whole"],
    );
    let convert = ["convert", "--model", &pipe, "--whole", "--output", "x"];
    refused(
        w,
        &[&convert[..], &["--gguf", "q8_0"]].concat(),
        &["bf16, f16 or f32"],
    );
    misused(
        w,
        &[&prune[..5], &["--whole=move"]].concat(),
        &["copy or link"],
    );
}

#[test]
fn results_of_eval_are_in_the_card() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "pruned", &["--blocks", "single.02"]);
    quick_prune(w, "theirs", &["--blocks", "single.02"]);
    fs::write(
        w.join("theirs/README.md"),
        "---\ntags:\n- mine\n---\nMine.\n",
    )
    .unwrap();
    let card = || fs::read_to_string(w.join("pruned/README.md")).unwrap();
    let before = card();
    fs::write(
        w.join("pruned/README.md"),
        before.clone() + "\nMy own words.\n",
    )
    .unwrap();
    let eval = |more: &[&str]| {
        let args = [
            "eval", "--steps", "2", "--force", "--model", "pruned", "--model", "theirs",
        ];
        json(w, &[&args[..], &["--json"], more].concat())
    };
    let report = eval(&["--num-prompts", "3"]);
    let once = card();
    let report = |path: &str| report.pointer(path).unwrap().as_f64().unwrap();
    let error = report("/models/0/against_baseline/velocity/error");
    let (yaml, text) = once
        .strip_prefix("---\n")
        .unwrap()
        .split_once("---\n")
        .unwrap();
    assert!(yaml.contains(&format!("value: {error:.5}\n")), "{yaml}");
    for words in [
        "model-index:\n",
        "type: text-to-image\n",
        "name: \"3 prompts (",
        "- type: psnr\n",
    ] {
        assert!(yaml.contains(words), "{words}: {yaml}");
    }
    assert!(
        text.contains(&format!("| velocity error |  | {error:.5} |")),
        "{text}"
    );
    assert!(text.contains("| prompts followed, % | ") && text.contains("My own words."));
    // the next results replace these
    eval(&["--num-prompts", "2"]);
    let twice = card();
    assert!(
        twice.contains("2 prompts (") && !twice.contains("3 prompts ("),
        "{twice}"
    );
    assert_eq!(twice.matches("model-index:").count(), 1);
    // nothing but the results has changed
    let bare = |card: &str| {
        let mut out = card.to_owned();
        for (begin, end) in [
            ("# results of", "# end of results\n"),
            ("<!-- results of", "<!-- end of results -->\n"),
        ] {
            if let Some((head, rest)) = out.clone().split_once(begin) {
                out = head.to_owned() + rest.split_once(end).unwrap().1;
            }
        }
        out
    };
    assert_eq!(bare(&twice), bare(&before) + "\nMy own words.\n");
    let theirs = fs::read_to_string(w.join("theirs/README.md")).unwrap();
    assert_eq!(theirs, "---\ntags:\n- mine\n---\nMine.\n");
}

#[test]
fn lpips_is_measured_and_every_number_names_its_reference() {
    let work = folder();
    let w = work.path();
    quick_prune(
        w,
        "pruned",
        &["--blocks", "double.01,single.02", "--form", "remove"],
    );
    fs::create_dir(w.join("lpips")).unwrap();
    let package = alexnet(|slice| format!("net.slice{}.", slice + 1));
    fs::write(w.join("lpips/alex.safetensors"), package).unwrap();
    let torchvision = alexnet(|_| "features.".to_owned());
    fs::write(w.join("torchvision.safetensors"), torchvision).unwrap();
    let eval = |lpips: &str| {
        let args = [
            "eval",
            "--model",
            "pruned",
            "--num-prompts",
            "4",
            "--steps",
            "2",
            "--force",
            "--json",
        ];
        json(w, &[&args[..], &["--lpips", lpips]].concat())
    };
    let report = eval("lpips");
    let mean = |report: &Value, path: &str| report.pointer(path).unwrap().as_f64().unwrap();
    let distance = mean(&report, "/models/0/against_baseline/lpips/mean");
    let seeds = mean(&report, "/two_seeds/lpips/mean");
    assert!(distance > 0.0 && distance < seeds, "{distance} {seeds}");
    assert!(report["pairs"][0]["models"][0]["lpips"].as_f64().unwrap() > 0.0);
    let same = mean(
        &eval("torchvision.safetensors"),
        "/models/0/against_baseline/lpips/mean",
    );
    assert!((same - distance).abs() < 1e-9);
    let references = report["metrics"].as_array().unwrap();
    let page = fs::read_to_string(w.join("report/report.html")).unwrap();
    for (metric, reference) in [
        ("velocity error", "FluxTransformer2DModel"),
        ("latent MSE", "torch.nn.functional.mse_loss"),
        ("PSNR", "skimage.metrics.peak_signal_noise_ratio"),
        ("SSIM", "skimage.metrics.structural_similarity"),
        ("prompts followed", "scripts/scenes.py"),
        ("LPIPS", "lpips.LPIPS"),
    ] {
        let found = references.iter().find(|one| one["metric"] == metric);
        let found = found.unwrap_or_else(|| panic!("{metric}"))["reference"].as_str();
        assert!(found.unwrap().contains(reference), "{metric}: {found:?}");
        assert!(page.contains(reference), "{reference}");
    }
    let card = fs::read_to_string(w.join("pruned/README.md")).unwrap();
    assert!(card.contains("- type: lpips\n"), "{card}");
    // refused before anything is drawn
    let refuse = |lpips: &str, more: &[&str], words: &[&str]| {
        let args = [
            "eval", "--model", "pruned", "--output", "no", "--lpips", lpips,
        ];
        refused(
            w,
            &[&args[..], more].concat(),
            &[&["--lpips"], words].concat(),
        );
    };
    refuse("nothing", &[], &["`nothing` does not exist"]);
    refuse("pruned", &[], &["neither an AlexNet nor a VGG"]);
    refuse("lpips", &["--width", "16", "--height", "16"], &["31×31"]);
}

#[test]
fn what_follows_is_named() {
    let work = folder();
    let w = work.path();
    quick_prune(w, "pruned", &["--blocks", "single.02"]);
    for (line, next) in [
        (
            "convert --model pruned --dtype f16 --output half",
            "generate --model half ",
        ),
        (
            "diff --model pruned --output p.safetensors",
            "generate --patch p.safetensors ",
        ),
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let out = fastflux(w, &args);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            said.contains(&format!("next: fastflux {next}")),
            "{line}: {said}"
        );
    }
}
