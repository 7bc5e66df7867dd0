//! Files that are damaged or contradict each other, and arguments that make no sense: one clear message each.

use std::{fs, path::Path};

use serde_json::Value;

use crate::common::*;

#[test]
fn damaged_files_are_refused_by_name() {
    let work = folder();
    let path = |name: &str| work.path().join(name);
    let whole = fs::read(golden("dev/bfl.safetensors")).unwrap();
    fs::write(path("empty.safetensors"), b"").unwrap();
    fs::write(path("cut.safetensors"), &whole[..whole.len() / 2]).unwrap();
    fs::write(path("short.safetensors"), &whole[..5]).unwrap();
    fs::write(
        path("lfs.safetensors"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    )
    .unwrap();
    let mut lies = whole.clone();
    lies[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(path("lies.safetensors"), lies).unwrap();
    safetensors(&path("garbage.safetensors"), "not json at all", b"");
    let overlap = r#"{"img_in.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"txt_in.weight":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    safetensors(&path("overlap.safetensors"), overlap, &[0; 12]);
    safetensors(
        &path("dtype.safetensors"),
        r#"{"img_in.weight":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
        &[0; 8],
    );
    safetensors(
        &path("length.safetensors"),
        r#"{"img_in.weight":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        &[0; 8],
    );
    safetensors(
        &path("gpt.safetensors"),
        r#"{"model.layers.0.mlp.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        &[0; 8],
    );
    for name in [
        "empty", "cut", "short", "lfs", "lies", "garbage", "overlap", "dtype", "length",
    ] {
        let file = format!("{name}.safetensors");
        refused(work.path(), &["inspect", "--model", &file], &[&file]);
        refused(
            work.path(),
            &[
                "generate", "--prompt", "x", "--model", &file, "--output", "x.png",
            ],
            &[&file],
        );
    }
    refused(
        work.path(),
        &["inspect", "--model", "gpt.safetensors"],
        &[
            "not a FLUX transformer",
            "model.layers.0.mlp.weight",
            "img_in.weight",
        ],
    );
    refused(
        work.path(),
        &["inspect", "--model", "nowhere"],
        &["`nowhere` does not exist"],
    );
    let vae = golden("dev/pipe/vae/diffusion_pytorch_model.safetensors");
    refused(
        work.path(),
        &["inspect", "--model", &vae],
        &["not a FLUX transformer"],
    );
}

#[test]
fn incomplete_and_contradicting_models_are_refused_by_name() {
    let work = folder();
    copy(
        Path::new(&golden("schnell/pipe")),
        &work.path().join("pipe"),
    );
    let shard = work
        .path()
        .join("pipe/transformer/diffusion_pytorch_model-00002-of-00004.safetensors");
    fs::rename(&shard, work.path().join("aside")).unwrap();
    refused(
        work.path(),
        &["inspect", "--model", "pipe"],
        &[
            "diffusion_pytorch_model-00002-of-00004.safetensors",
            "does not exist",
        ],
    );
    fs::rename(work.path().join("aside"), &shard).unwrap();
    let config = work.path().join("pipe/transformer/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["num_layers"] = 7.into();
    fs::write(&config, json.to_string()).unwrap();
    refused(
        work.path(),
        &["inspect", "--model", "pipe"],
        &["config.json", "num_layers", "7"],
    );
    fs::write(&config, text).unwrap();
    ok(work.path(), &["inspect", "--model", "pipe"]);
    fs::write(work.path().join("pipe/tokenizer_2/tokenizer.json"), "{}").unwrap();
    refused(
        work.path(),
        &[
            "generate", "--model", "pipe", "--prompt", "x", "--output", "x.png",
        ],
        &["tokenizer"],
    );
}

#[test]
fn bad_arguments_are_refused_before_any_work() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("typo.json"), r#"{"fit": {"rigde": 1}}"#).unwrap();
    fs::write(w.join("empty.txt"), "\n \n").unwrap();
    fs::write(w.join("latin1.txt"), [0xe9, 0x0a]).unwrap();
    fs::write(w.join("file"), "x").unwrap();
    fs::create_dir(w.join("there")).unwrap();
    for ratio in ["0", "1", "1.5", "NaN"] {
        misused(
            w,
            &["prune", "--ratio", ratio, "--output", "p"],
            &["--ratio", "above 0 and below 1"],
        );
    }
    refused(
        w,
        &["prune", "--ratio", "0.01", "--output", "p"],
        &["--ratio"],
    );
    refused(w, &["prune", "--output", "there"], &["there", "--force"]);
    refused(w, &["prune", "--output", "file/p"], &["file"]);
    refused(
        w,
        &["prune", "--recipe", "typo.json", "--output", "p"],
        &["typo.json", "rigde"],
    );
    refused(
        w,
        &["prune", "--prompts", "empty.txt", "--output", "p"],
        &["empty.txt", "no prompt"],
    );
    refused(
        w,
        &["prune", "--prompts", "latin1.txt", "--output", "p"],
        &["latin1.txt", "UTF-8"],
    );
    refused(
        w,
        &["prune", "--blocks", "double.09", "--output", "p"],
        &["--blocks", "double.09"],
    );
    refused(
        w,
        &[
            "prune",
            "--blocks",
            "double.00-04,single.00-09",
            "--output",
            "p",
        ],
        &["every block"],
    );
    misused(
        w,
        &["generate", "--prompt", "x", "--width", "0"],
        &["--width", "'0'", "a number from"],
    );
    misused(
        w,
        &["generate", "--prompt", "x", "--height", "1000000"],
        &["--height", "'1000000'", "a number from"],
    );
    misused(
        w,
        &["generate", "--prompt", "x", "--steps", "0"],
        &["--steps", "'0'", "a number from"],
    );
    for flag in ["--steps", "--images-per-prompt", "--max-sequence-length"] {
        misused(
            w,
            &["generate", "--prompt", "x", flag, "1000000000"],
            &[flag, "1000000000"],
        );
    }
    fs::write(w.join("many.txt"), "x\n".repeat(11)).unwrap();
    let many = [
        "generate",
        "--prompt-file",
        "many.txt",
        "--images-per-prompt",
    ];
    refused(w, &[&many[..], &["10000"]].concat(), &["110000 images"]);
    misused(
        w,
        &["inspect", "--text-tokens", "18446744073709551615"],
        &["--text-tokens", "18446744073709551615"],
    );
    misused(
        w,
        &["generate", "--prompt", "x", "--images-per-prompt", "0"],
        &["--images-per-prompt", "'0'"],
    );
    refused(
        w,
        &["generate", "--prompt", "x", "--output", "image.jpg"],
        &["image.jpg"],
    );
    #[cfg(not(feature = "cuda"))]
    refused(
        w,
        &["generate", "--prompt", "x", "--device", "cuda"],
        &["--device cuda", "--features cuda"],
    );
    let usage = fastflux(w, &["generate", "--prompt", "x", "--device", "tpu"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_weight_that_is_not_a_number_is_traced_to_its_block() {
    let work = folder();
    copy(Path::new(&golden("dev/pipe")), &work.path().join("pipe"));
    let path = work
        .path()
        .join("pipe/transformer/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors
        .tensor("single_transformer_blocks.1.proj_out.weight")
        .unwrap()
        .data();
    let start = data.as_ptr() as usize - bytes.as_ptr() as usize;
    // all bits set is NaN in every float format
    bytes[start..start + 4].fill(0xff);
    fs::write(&path, bytes).unwrap();
    refused(
        work.path(),
        &["prune", "--model", "pipe", "--output", "p"],
        &["single.01", "NaN", "timestep 1.000"],
    );
    refused(
        work.path(),
        &[
            "generate", "--model", "pipe", "--prompt", "x", "--output", "x.png",
        ],
        &["NaN"],
    );
}

#[test]
fn missing_and_misshapen_tensors_are_named_from_the_header() {
    let work = folder();
    let config = golden("dev/pipe/transformer/config.json");
    let whole = fs::read(golden("dev/bfl.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
    for name in [
        "time_in.out_layer.bias",
        "double_blocks.1.txt_mod.lin.weight",
        "single_blocks.2.modulation.lin.bias",
    ] {
        let kept = tensors.iter().filter(|(n, _)| !n.ends_with(name));
        safetensors::serialize_to_file(kept, None, &work.path().join("lacking.safetensors"))
            .unwrap();
        let args = [
            "inspect",
            "--model",
            "lacking.safetensors",
            "--config",
            &config,
        ];
        refused(work.path(), &args, &["lacking.safetensors", name]);
    }
    let name = "double_blocks.0.img_mlp.2.weight";
    let bent = tensors.iter().map(|(n, t)| {
        let shape = if n.ends_with(name) {
            t.shape().iter().rev().copied().collect()
        } else {
            t.shape().to_vec()
        };
        (
            n,
            safetensors::tensor::TensorView::new(t.dtype(), shape, t.data()).unwrap(),
        )
    });
    safetensors::serialize_to_file(bent, None, &work.path().join("bent.safetensors")).unwrap();
    let args = [
        "inspect",
        "--model",
        "bent.safetensors",
        "--config",
        &config,
    ];
    refused(work.path(), &args, &["bent.safetensors", name, "expected"]);
}

#[test]
fn damaged_work_of_an_earlier_run_is_to_be_deleted() {
    let work = folder();
    fs::write(work.path().join("s.safetensors.partial"), b"half").unwrap();
    refused(
        work.path(),
        &[
            "calibrate",
            "--num-prompts",
            "4",
            "--output",
            "s.safetensors",
        ],
        &["s.safetensors.partial", "hint: delete the file"],
    );
}
