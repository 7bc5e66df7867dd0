//! Tensors that no FLUX has, and parts of a pipeline that are damaged or missing: named from headers alone.

use std::{fs, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::common::*;

/// The file again with other tensors: `change` gives name, dtype, shape and bytes of each, or takes it out.
fn changed(
    from: &str,
    to: &Path,
    change: impl Fn(&str) -> Option<(&'static str, Dtype, Vec<usize>)>,
) {
    let whole = fs::read(from).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let zeros = vec![0; 1 << 20];
    let changed: Vec<_> = tensors
        .iter()
        .map(|(name, old)| match change(name) {
            None => (name.to_owned(), old),
            Some((name, dtype, shape)) => {
                let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
                let view = TensorView::new(dtype, shape, &zeros[..bytes]).unwrap();
                (name.to_owned(), view)
            }
        })
        .collect();
    safetensors::serialize_to_file(changed, None, to).unwrap();
}

#[test]
fn tensors_that_no_flux_has_are_refused_from_the_header() {
    let work = folder();
    let config = golden("dev/pipe/transformer/config.json");
    let refuse = |words: &[&str]| {
        let args = ["inspect", "--model", "x.safetensors", "--config", &config];
        refused(work.path(), &args, words);
    };
    let path = work.path().join("x.safetensors");
    let one = |name: &'static str, new: &'static str, dtype: Dtype, shape: &'static [usize]| {
        changed(&golden("dev/bfl.safetensors"), &path, |found| {
            (found == name).then(|| (new, dtype, shape.to_vec()))
        });
    };
    let first = "img_in.weight";
    for shape in [&[0, 64][..], &[0, 0], &[0, 1 << 62]] {
        one(first, first, Dtype::F32, shape);
        refuse(&["x.safetensors", first, "empty"]);
    }
    let proj = "double_blocks.0.img_attn.proj.weight";
    for (dtype, said) in [
        (Dtype::I32, "I32"),
        (Dtype::U8, "U8"),
        (Dtype::BOOL, "BOOL"),
    ] {
        one(proj, proj, dtype, &[32, 32]);
        refuse(&["x.safetensors", proj, said, "hint:"]);
    }
    for extra in [
        "double_blocks.0.foo",
        "double_blocks.99999999999999999999.x",
        "img_in.foo",
    ] {
        let whole = fs::read(golden("dev/bfl.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let more = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
        let all = tensors.iter().chain([(extra, more)]);
        safetensors::serialize_to_file(all, None, &path).unwrap();
        refuse(&["x.safetensors", extra]);
    }
    let theirs = golden("dev/pipe/transformer/diffusion_pytorch_model.safetensors");
    for name in ["to_q.weight", "to_k.weight", "to_q.bias"] {
        changed(&theirs, &path, |found| {
            let hit = found == format!("transformer_blocks.0.attn.{name}");
            let names: &'static str = Box::leak(found.to_owned().into_boxed_str());
            hit.then(|| (names, Dtype::F32, Vec::new()))
        });
        let tensor = format!("transformer_blocks.0.attn.{name}");
        refuse(&["x.safetensors", &tensor, "single number"]);
    }
    let lora = r#"{"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    safetensors(&path, lora, &[0; 8]);
    refuse(&["x.safetensors", "it is a LoRA", "--lora"]);
    let shard =
        golden("schnell/pipe/transformer/diffusion_pytorch_model-00002-of-00004.safetensors");
    let words = ["2 of 4", "diffusion_pytorch_model.safetensors.index.json"];
    refused(work.path(), &["inspect", "--model", &shard], &words);
}

#[test]
fn a_part_that_is_damaged_or_missing_is_named_with_its_flag() {
    let work = folder();
    copy(Path::new(&golden("dev/pipe")), &work.path().join("pipe"));
    let refuse = |words: &[&str]| {
        let args = [
            "generate", "--model", "pipe", "--prompt", "x", "--steps", "1", "--output", "x.png",
        ];
        refused(work.path(), &args, words);
    };
    let [clip, t5, vae] = [
        (
            "text_encoder/model",
            "final_layer_norm.bias",
            "--text-encoders",
        ),
        (
            "text_encoder_2/model",
            "final_layer_norm.weight",
            "--text-encoders",
        ),
        (
            "vae/diffusion_pytorch_model",
            "decoder.conv_in.bias",
            "--vae",
        ),
    ]
    .map(|(file, tensor, flag)| (format!("pipe/{file}.safetensors"), tensor, flag));
    for (file, tensor, flag) in [clip, t5, vae] {
        let path = work.path().join(&file);
        let whole = fs::read(&path).unwrap();
        let mut nan = whole.clone();
        let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let (_, view) = tensors.iter().find(|(n, _)| n.ends_with(tensor)).unwrap();
        let start = view.data().as_ptr() as usize - whole.as_ptr() as usize;
        nan[start..start + view.data().len()].fill(0xff);
        fs::write(&path, nan).unwrap();
        refuse(&[&file, "NaN", flag]);
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        refuse(&[&file, "cut off", flag]);
        fs::write(&path, &whole).unwrap();
    }
    let json = |file: &str, key: &str, value: Value, words: &[&str]| {
        let path = work.path().join("pipe").join(file);
        let text = fs::read(&path).unwrap();
        let mut json: Value = serde_json::from_slice(&text).unwrap();
        json[key] = value;
        fs::write(&path, json.to_string()).unwrap();
        refuse(&[words, &[file, key]].concat());
        fs::write(&path, text).unwrap();
    };
    let many = 1u64 << 31;
    json(
        "text_encoder/config.json",
        "num_hidden_layers",
        many.into(),
        &[],
    );
    json("text_encoder_2/config.json", "num_layers", many.into(), &[]);
    json("vae/config.json", "sample_size", 0.into(), &["--width"]);
    json("vae/config.json", "layers_per_block", u64::MAX.into(), &[]);
    json("scheduler/scheduler_config.json", "shift", 0.into(), &[]);
    let defaults = work.path().join("pipe/fastflux.json");
    for (field, value) in [("steps", "0"), ("guidance", "-1"), ("size", "0")] {
        fs::write(&defaults, format!(r#"{{"{field}": {value}}}"#)).unwrap();
        refuse(&["fastflux.json", field, value]);
    }
    fs::remove_file(&defaults).unwrap();
    fs::remove_dir_all(work.path().join("pipe/text_encoder_2")).unwrap();
    refuse(&["`text_encoder_2`", "--text-encoders"]);
}
