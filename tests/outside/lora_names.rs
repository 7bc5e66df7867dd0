//! Names and number formats that LoRA files come with besides those of `scripts/golden_lora.py`, each with the numbers that it
//! must give; and what is refused by name.

use std::{collections::BTreeMap, path::Path};

use safetensors::Dtype;

use crate::{
    common::{folder, golden, ok, refused},
    tensors::{Tensors, of_file, write},
};

/// A module of the small pipeline, 32×32, under the original, diffusers' and kohya's name.
const ORIGINAL: &str = "double_blocks.1.img_attn.proj";
const DIFFUSERS: &str = "transformer_blocks.1.attn.to_out.0";
const KOHYA: &str = "lora_unet_double_blocks_1_img_attn_proj";
const WIDTH: usize = 32;
const RANK: usize = 2;

/// Numbers of a factor, which float8 has too: ±0.5, ±1, ±2.
fn number(i: usize) -> f32 {
    let size = [0.5, 1.0, 2.0][i * 7 % 3];
    if i * 5 % 4 < 2 { size } else { -size }
}

fn f32s(name: &str, shape: &[usize], values: impl Iterator<Item = f32>) -> Tensors {
    let data = values.flat_map(f32::to_le_bytes).collect();
    vec![(name.to_owned(), Dtype::F32, shape.to_vec(), data)]
}

fn one(name: &str, value: f32) -> Tensors {
    f32s(name, &[], [value].into_iter())
}

/// A (2, 32) and B (32, 2) under these names.
fn factors(down: &str, up: &str) -> Tensors {
    let numbers = |from: usize| (from..from + RANK * WIDTH).map(number);
    let down = f32s(down, &[RANK, WIDTH], numbers(0));
    [down, f32s(up, &[WIDTH, RANK], numbers(100))].concat()
}

/// The same in float8.
fn in_float8(tensors: Tensors) -> Tensors {
    let byte = |value: &[u8; 4]| match f32::from_le_bytes(*value) {
        x if x.abs() < 0.75 => 0x30 | u8::from(x < 0.0) << 7,
        x if x.abs() < 1.5 => 0x38 | u8::from(x < 0.0) << 7,
        x => 0x40 | u8::from(x < 0.0) << 7,
    };
    let packed = tensors.into_iter().map(|(name, _, shape, data)| {
        let data = data.as_chunks().0.iter().map(byte).collect();
        (name, Dtype::F8_E4M3, shape, data)
    });
    packed.collect()
}

/// B·A in its rows.
fn product() -> Vec<f32> {
    let cell = |row: usize, column: usize| {
        (0..RANK).map(move |k| number(100 + RANK * row + k) * number(WIDTH * k + column))
    };
    (0..WIDTH * WIDTH)
        .map(|i| cell(i / WIDTH, i % WIDTH).sum())
        .collect()
}

fn numbers(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let tensors = of_file(path).into_iter();
    let floats = |data: Vec<u8>| {
        let (numbers, _) = data.as_chunks();
        numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    tensors
        .map(|(name, _, _, data)| (name, floats(data)))
        .collect()
}

/// Merges `lora` and compares every tensor of the model with what it was plus what is `expected`.
fn adds(folder: &Path, lora: &Tensors, weight: &str, expected: &[(&str, Vec<f32>)]) {
    let names: Vec<&str> = lora.iter().map(|(name, ..)| name.as_str()).collect();
    write(&folder.join("x.safetensors"), lora);
    let given = format!("x.safetensors{weight}");
    let args = ["convert", "--dtype", "f32", "--force", "--output"];
    let model = ["--model", &golden("dev/pipe")].map(str::to_owned);
    let model = [model[0].as_str(), model[1].as_str()];
    if !folder.join("plain.safetensors").exists() {
        ok(
            folder,
            &[&args[..], &["plain.safetensors"], &model].concat(),
        );
    }
    let with = ["merged.safetensors", "--lora", &given];
    ok(folder, &[&args[..], &with, &model].concat());
    let [plain, merged] =
        ["plain", "merged"].map(|name| numbers(&folder.join(format!("{name}.safetensors"))));
    assert_eq!(plain.len(), merged.len());
    for (tensor, before) in &plain {
        let after = &merged[tensor];
        match expected.iter().find(|(name, _)| name == tensor) {
            None => assert!(before == after, "{names:?} changes {tensor}"),
            Some((_, change)) => {
                assert_eq!(change.len(), before.len());
                for ((before, after), change) in before.iter().zip(after).zip(change) {
                    let away = (before + change - after).abs();
                    assert!(away < 1e-5, "{names:?}: {after}, not {before} + {change}");
                }
            }
        }
    }
}

#[test]
fn names_of_adapters_and_wrappers_are_read_past() {
    let work = folder();
    let w = work.path();
    let weight = format!("{ORIGINAL}.weight");
    for prefix in [
        "pipe.transformer.",
        "transformer.module.",
        "base_model.model.model.",
        "transformer.base_model.model.",
        "_orig_mod.",
    ] {
        let [a, b] = ["A", "B"].map(|x| format!("{prefix}{DIFFUSERS}.lora_{x}.weight"));
        adds(w, &factors(&a, &b), "", &[(&weight, product())]);
    }
    // an adapter that is not called `default`, with a bias
    let named = |part: &str| format!("transformer.{DIFFUSERS}.lora_{part}");
    let lora = factors(&named("A.style.weight"), &named("B.style.weight"));
    let bias: Vec<f32> = (0..WIDTH).map(number).collect();
    let lora = [
        lora,
        f32s(&named("B.style.bias"), &[WIDTH], bias.iter().copied()),
    ]
    .concat();
    let half = |values: &[f32]| values.iter().map(|x| x / 2.0).collect();
    let changes = [
        (weight.as_str(), half(&product())),
        (&format!("{ORIGINAL}.bias"), half(&bias)),
    ];
    adds(w, &lora, ":0.5", &changes);
    // DoRA's magnitudes: twice the length of each row is twice the row
    let plain = numbers(&w.join("plain.safetensors"));
    let sum: Vec<f32> = plain[&weight]
        .iter()
        .zip(product())
        .map(|(w, d)| w + d)
        .collect();
    let length = |row: &[f32]| 2.0 * row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let lengths: Vec<f32> = sum.chunks(WIDTH).map(length).collect();
    let magnitude = named("magnitude_vector.style");
    let factors = factors(&named("A.style.weight"), &named("B.style.weight"));
    let lora = [factors, f32s(&magnitude, &[WIDTH], lengths.into_iter())].concat();
    let change = sum
        .iter()
        .zip(&plain[&weight])
        .map(|(sum, w)| 2.0 * sum - w);
    adds(w, &lora, "", &[(&weight, change.collect())]);
    // two adapters in one file: neither is taken for the other
    let other = named("A.other.weight");
    let more = f32s(&other, &[RANK, WIDTH], (0..RANK * WIDTH).map(number));
    write(&w.join("x.safetensors"), &[lora, more].concat());
    let inspect = ["inspect", "--lora", "x.safetensors"];
    refused(w, &inspect, &["lora_A.style.weight", "two adapters"]);
}

#[test]
fn alpha_and_scales_are_heeded_in_every_format() {
    let work = folder();
    let w = work.path();
    let weight = format!("{ORIGINAL}.weight");
    let pair = || {
        factors(
            &format!("{KOHYA}.lora_down.weight"),
            &format!("{KOHYA}.lora_up.weight"),
        )
    };
    let alpha = format!("{KOHYA}.alpha");
    let times = |scale: f32| product().iter().map(|x| scale * x).collect();
    for (value, scale) in [(1.0, 0.5), (0.0, 0.0), (-2.0, -1.0)] {
        let lora = [pair(), one(&alpha, value)].concat();
        adds(w, &lora, "", &[(&weight, times(scale))]);
    }
    let whole = (
        alpha.clone(),
        Dtype::I64,
        vec![1],
        1i64.to_le_bytes().to_vec(),
    );
    adds(
        w,
        &[pair(), vec![whole]].concat(),
        ":-1",
        &[(&weight, times(-0.5))],
    );
    adds(w, &in_float8(pair()), "", &[(&weight, times(1.0))]);
    for (down, up) in [
        ("scale_weight", "scale_weight"),
        ("weight_scale", "weight_scale"),
    ] {
        let scales = [
            one(&format!("{KOHYA}.lora_down.{down}"), 0.25),
            one(&format!("{KOHYA}.lora_up.{up}"), 0.5),
        ];
        let lora = [in_float8(pair()), scales.concat()].concat();
        adds(w, &lora, "", &[(&weight, times(0.125))]);
    }
}

#[test]
fn differences_of_norms_are_added_to_their_scales() {
    let work = folder();
    let w = work.path();
    let numbers: Vec<f32> = (0..WIDTH / 2).map(number).collect();
    for (name, tensor) in [
        (
            "diffusion_model.double_blocks.0.txt_attn.norm.key_norm.diff",
            "double_blocks.0.txt_attn.norm.key_norm.scale",
        ),
        (
            "transformer.single_transformer_blocks.2.attn.norm_q.diff",
            "single_blocks.2.norm.query_norm.scale",
        ),
        (
            "lora_unet_single_blocks_1_norm_key_norm.w_norm",
            "single_blocks.1.norm.key_norm.scale",
        ),
    ] {
        let lora = f32s(name, &[WIDTH / 2], numbers.iter().copied());
        adds(
            w,
            &lora,
            ":2",
            &[(tensor, numbers.iter().map(|x| 2.0 * x).collect())],
        );
    }
}

#[test]
fn what_is_no_lora_to_add_is_called_what_it_is() {
    let work = folder();
    let w = work.path();
    let model = golden("dev/pipe");
    let inspect = ["inspect", "--model", &model, "--lora", "x.safetensors"];
    let of = |name: &str, shape: &[usize]| {
        let count = shape.iter().product();
        write(
            &w.join("x.safetensors"),
            &f32s(name, shape, (0..count).map(number)),
        );
    };
    for (end, shape, word) in [
        ("oft_blocks", &[4, 8, 8][..], "OFT"),
        ("on_input", &[1], "(IA)³"),
        ("a1.weight", &[2, 32], "GLoRA"),
        ("lokr_t2", &[2, 2, 1, 1], "convolutions"),
        ("lora_down.weight", &[0, 32], "empty"),
    ] {
        of(&format!("{KOHYA}.{end}"), shape);
        refused(w, &inspect, &["x.safetensors", word]);
    }
    for (name, word) in [
        ("lora_unet_conv_in.lora_down.weight", "Stable Diffusion"),
        (
            "diffusion_model.layers.0.attention.qkv.lora_A.weight",
            "Lumina",
        ),
        (
            "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "LTX-Video",
        ),
    ] {
        of(name, &[2, 32]);
        refused(w, &inspect, &["x.safetensors", word, "not for FLUX.1"]);
    }
    // CLIP's and T5's part in a model that has neither
    let (model, lora) = (golden("flux2/pipe"), golden("lora/text.safetensors"));
    let args = ["inspect", "--model", &model, "--lora", &lora];
    refused(
        w,
        &args,
        &["nothing of it applies", "this model has no CLIP or T5"],
    );
}
