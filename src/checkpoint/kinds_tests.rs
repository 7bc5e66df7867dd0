//! The kinds of files that people have, each with the values that it stands for.

use std::fmt::Write as _;

use candle::{DType, Device};
use serde_json::{Value, json};

use super::{Checkpoint, config, part::Part};
use crate::files::Blob;

/// A tensor of a file: dtype, shape, bytes.
type Tensor<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    let each = values.iter().map(|v| half::bf16::from_f32(*v));
    each.flat_map(half::bf16::to_le_bytes).collect()
}

/// The bytes of a safetensors file.
fn safetensors(tensors: &[Tensor], metadata: Option<Value>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    if let Some(metadata) = metadata {
        header.insert("__metadata__".to_owned(), metadata);
    }
    for (name, dtype, shape, bytes) in tensors {
        let at = data.len();
        data.extend(bytes);
        header.insert(
            (*name).to_owned(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, data.len()] }),
        );
    }
    let header = serde_json::to_vec(&Value::Object(header)).unwrap();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(data);
    out
}

fn open(bytes: Vec<u8>) -> anyhow::Result<Checkpoint> {
    Checkpoint::from_blob("file", &Blob::Static(Box::leak(bytes.into_boxed_slice())))
}

/// The values of a transformer's tensor.
fn values(file: &Checkpoint, name: &str) -> Vec<f32> {
    let taken = Part::Transformer.take(file, "").unwrap();
    let tensor = taken
        .expect(name)
        .unwrap()
        .tensor_as(DType::F32, &Device::Cpu)
        .unwrap();
    // what is served to the model, with its scale
    let scale = taken.expect(name).unwrap();
    let served = scale.values(0..scale.elements()).unwrap();
    assert_eq!(
        tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        served
    );
    served
}

const LAYER: &str = "double_blocks.0.img_attn.proj";
const WEIGHT: &str = "double_blocks.0.img_attn.proj.weight";
/// 1, 2, -4 and 0.5 in e4m3, and in e5m2.
const E4M3: [u8; 4] = [0x38, 0x40, 0xc8, 0x30];
const E5M2: [u8; 4] = [0x3c, 0x40, 0xc4, 0x38];
const NUMBERS: [f32; 4] = [1.0, 2.0, -4.0, 0.5];

fn name(suffix: &str) -> String {
    format!("{LAYER}.{suffix}")
}

#[test]
fn scales_act_in_every_spelling() {
    let quant = br#"{"format": "float8_e4m3fn"}"#.to_vec();
    let one = |dtype: &'static str, bytes: &[u8]| (WEIGHT, dtype, vec![2, 2], bytes.to_vec());
    let header = json!({ "_quantization_metadata": json!({ "layers": { LAYER: { "format": "float8_e4m3fn" } } }).to_string() });
    let [old, new, comfy] = ["scale_weight", "weight_scale", "comfy_quant"].map(name);
    let scale = |name| -> Tensor { (name, "F32", vec![], f32s(&[0.5])) };
    let rows = |name| -> Tensor { (name, "F32", vec![2, 1], f32s(&[0.5, 2.0])) };
    let marker: Tensor = ("scaled_fp8", "F8_E4M3", vec![0], vec![]);
    let comfy_quant: Tensor = (&comfy, "U8", vec![quant.len()], quant.clone());
    let halved = NUMBERS.map(|v| 0.5 * v);
    let by_rows = [0.5, 1.0, -8.0, 1.0];
    let cases: Vec<(Vec<Tensor>, Option<Value>, [f32; 4])> = vec![
        (vec![one("F8_E4M3", &E4M3), scale(&old)], None, halved),
        (
            vec![one("F8_E4M3", &E4M3), scale(&old), marker.clone()],
            None,
            halved,
        ),
        (vec![one("F8_E4M3", &E4M3), scale(&new)], None, halved),
        (
            vec![one("F8_E4M3", &E4M3), scale(&new), comfy_quant.clone()],
            None,
            halved,
        ),
        (
            vec![one("F8_E4M3", &E4M3), scale(&new)],
            Some(header.clone()),
            halved,
        ),
        (vec![one("F8_E4M3", &E4M3), rows(&old)], None, by_rows),
        (vec![one("F8_E5M2", &E5M2), scale(&old)], None, halved),
        (vec![one("F8_E5M2", &E5M2)], None, NUMBERS),
        (
            vec![one("U8", &E4M3), scale(&new), comfy_quant],
            None,
            halved,
        ),
        (vec![one("U8", &E4M3), scale(&new)], Some(header), halved),
        (
            vec![one("BF16", &bf16s(&NUMBERS)), scale(&old)],
            None,
            halved,
        ),
        (vec![one("F32", &f32s(&NUMBERS)), rows(&new)], None, by_rows),
    ];
    for (tensors, metadata, expected) in cases {
        let names: Vec<_> = tensors.iter().map(|t| (t.0, t.1)).collect();
        let file = open(safetensors(&tensors, metadata)).unwrap();
        assert_eq!(values(&file, WEIGHT), expected, "{names:?}");
        // below any wrapper, next to another part in a format that is not read
        let wrapped: Vec<(String, Tensor)> = tensors
            .iter()
            .map(|t| (format!("model.diffusion_model.{}", t.0), t.clone()))
            .collect();
        let mut all: Vec<Tensor> = wrapped
            .iter()
            .map(|(name, t)| (name.as_str(), t.1, t.2.clone(), t.3.clone()))
            .collect();
        let other = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q";
        let [weight, nvfp4] = ["weight", "comfy_quant"].map(|leaf| format!("{other}.{leaf}"));
        let quant = br#"{"format": "nvfp4"}"#.to_vec();
        all.push((&weight, "U8", vec![1], vec![0]));
        all.push((&nvfp4, "U8", vec![quant.len()], quant));
        if !names
            .iter()
            .any(|(name, dtype)| *dtype == "U8" && *name == WEIGHT)
        {
            let file = open(safetensors(&all, None)).unwrap();
            assert_eq!(values(&file, WEIGHT), expected, "{names:?} below a wrapper");
            assert!(
                Part::T5
                    .take(&file, "text_encoders.t5xxl.transformer.")
                    .is_err()
            );
        }
    }
}

#[test]
fn a_scale_that_cannot_be_used_is_named() {
    let [scale, comfy] = ["weight_scale", "comfy_quant"].map(name);
    let quant = br#"{"format": "mxfp8"}"#.to_vec();
    for (tensors, word) in [
        (
            vec![
                (WEIGHT, "U8", vec![2, 2], E4M3.to_vec()),
                (scale.as_str(), "F32", vec![], f32s(&[0.5])),
            ],
            "U8",
        ),
        (
            vec![
                (WEIGHT, "F8_E4M3", vec![2, 2], E4M3.to_vec()),
                (scale.as_str(), "F32", vec![3], f32s(&[0.5; 3])),
            ],
            "[3]",
        ),
        (
            vec![
                ("double_blocks.0.x", "F32", vec![1], f32s(&[1.0])),
                (scale.as_str(), "F32", vec![], f32s(&[0.5])),
            ],
            "no `double",
        ),
        (
            vec![
                (WEIGHT, "U8", vec![2, 2], E4M3.to_vec()),
                (comfy.as_str(), "U8", vec![quant.len()], quant.clone()),
            ],
            "mxfp8",
        ),
    ] {
        let file = open(safetensors(&tensors, None)).unwrap();
        let error = format!("{:#}", Part::Transformer.take(&file, "").unwrap_err());
        assert!(error.contains(word) && error.contains(LAYER), "{error}");
    }
}

#[test]
fn projections_in_different_formats_are_fused() {
    let name = |part: &str| format!("transformer_blocks.0.attn.{part}.weight");
    let [q, k, v, scale] = ["to_q", "to_k", "to_v", "to_v"].map(name);
    let scale = scale.replace(".weight", ".scale_weight");
    let tensors = [
        (q.as_str(), "BF16", vec![1, 2], bf16s(&[1.0, 2.0])),
        (k.as_str(), "F32", vec![1, 2], f32s(&[3.0, 4.0])),
        (v.as_str(), "F8_E4M3", vec![1, 2], vec![0x38, 0x40]),
        (scale.as_str(), "F32", vec![], f32s(&[10.0])),
    ];
    let file = open(safetensors(&tensors, None)).unwrap();
    let original = config::canonical(&file).unwrap();
    let fused = original
        .expect("double_blocks.0.img_attn.qkv.weight")
        .unwrap();
    let expected = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0];
    assert_eq!(fused.values(0..6).unwrap(), expected);
    assert_eq!(
        fused.rows(1..3).unwrap().values(0..4).unwrap(),
        expected[2..]
    );
    let loaded = fused.tensor_as(DType::BF16, &Device::Cpu).unwrap();
    assert_eq!(loaded.dims(), [3, 2]);
    let bytes = fused.bytes().unwrap().into_owned();
    assert_eq!(bytes, f32s(&expected));
}

#[test]
fn files_that_end_too_early_or_too_late_say_by_how_much() {
    let whole = safetensors(
        &[("double_blocks.0.a", "F32", vec![250], vec![0; 1000])],
        None,
    );
    let trailing = [&whole[..], &[0; 4096]].concat();
    let file = open(trailing).unwrap();
    assert_eq!(file.len(), 1);
    assert!(
        file.notes[0].contains("4096 bytes follow"),
        "{:?}",
        file.notes
    );
    let cut = open(whole[..whole.len() - 100].to_vec())
        .unwrap_err()
        .to_string();
    let words = format!("100 of {} bytes are missing", whole.len());
    assert!(
        cut.contains(&words) && cut.contains("fetch the file again"),
        "{cut}"
    );
    let in_header = open(whole[..20].to_vec()).unwrap_err().to_string();
    assert!(in_header.contains("bytes are missing"), "{in_header}");
    let text = open(b"hello, this is no checkpoint at all".to_vec())
        .unwrap_err()
        .to_string();
    assert!(!text.contains("fetch the file again"), "{text}");
}

#[test]
fn names_that_would_write_to_a_terminal_are_refused() {
    let evil = "double_blocks.0.a\u{1b}[2J\nhint: run this";
    let error = open(safetensors(&[(evil, "F32", vec![1], f32s(&[1.0]))], None)).unwrap_err();
    let text = error.to_string();
    assert!(
        !text.contains(['\u{1b}', '\n']) && text.contains("no name"),
        "{text}"
    );
}

/// The bytes of a GGUF file: tensors with ggml's type, and metadata as (key, type, bytes).
fn gguf(
    tensors: &[(&str, u32, Vec<u64>, u64)],
    metadata: &[(String, u32, Vec<u8>)],
    data: &[u8],
) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, kind, bytes) in metadata {
        out.extend(text(key));
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    }
    for (name, kind, shape, offset) in tensors {
        out.extend(text(name));
        out.extend((shape.len() as u32).to_le_bytes());
        // the innermost first
        shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}

#[test]
fn tensors_of_gguf_have_the_shape_that_they_had() {
    // 32 values of q8_0 with scale 1: 0, 1, 2, …
    let mut block = half::f16::from_f32(1.0).to_le_bytes().to_vec();
    block.extend(0..32u8);
    for (kind, width) in [(4u32, 4usize), (5, 4), (10, 8), (11, 8)] {
        let mut shape = kind.to_le_bytes().to_vec();
        shape.extend(2u64.to_le_bytes());
        for d in [8u64, 4] {
            shape.extend(&d.to_le_bytes()[..width]);
        }
        let key = format!("comfy.gguf.orig_shape.{WEIGHT}");
        let file = open(gguf(
            &[(WEIGHT, 8, vec![1, 32], 0)],
            &[(key, 9, shape)],
            &block,
        ))
        .unwrap();
        assert_eq!(file.expect(WEIGHT).unwrap().shape(), [8, 4], "type {kind}");
        let expected: Vec<f32> = (0..32u8).map(f32::from).collect();
        assert_eq!(values(&file, WEIGHT), expected);
        let rows = file.expect(WEIGHT).unwrap().rows(0..8).unwrap();
        assert_eq!(rows.values(0..32).unwrap(), expected);
    }
}

#[test]
fn gguf_is_judged_by_its_tensors() {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let arch = |name: &str| vec![("general.architecture".to_owned(), 8, text(name))];
    let tensors = [(WEIGHT, 0, vec![2, 2], 0)];
    let data = f32s(&NUMBERS);
    for name in ["flux", "pig", "cow", "llama"] {
        let file = open(gguf(&tensors, &arch(name), &data)).unwrap();
        assert_eq!(values(&file, WEIGHT), NUMBERS);
    }
    let other = open(gguf(
        &[("a.weight", 0, vec![2, 2], 0)],
        &arch("cow\n\u{1b}x"),
        &data,
    ))
    .unwrap();
    let error = config::canonical(&other).unwrap_err().to_string();
    assert!(error.contains("`cow\\n\\u{1b}x`"), "{error}");
    for (kind, word) in [
        (20, "IQ4_NL"),
        (23, "IQ4_XS"),
        (16, "IQ2_XXS"),
        (39, "MXFP4"),
        (77, "77"),
    ] {
        let error = open(gguf(&[(WEIGHT, kind, vec![2, 2], 0)], &[], &data)).unwrap_err();
        assert!(format!("{error:#}").contains(word), "{error:#}");
    }
    let overlapping = [
        (WEIGHT, 0, vec![2, 16], 0),
        ("double_blocks.0.b", 0, vec![2], 32),
    ];
    let error = format!(
        "{:#}",
        open(gguf(&overlapping, &[], &[0; 128])).unwrap_err()
    );
    assert!(
        error.contains("overlap") && error.contains("double_blocks.0.b"),
        "{error}"
    );
    let mut cut = String::new();
    let error = open(gguf(&[(WEIGHT, 0, vec![2, 16], 0)], &[], &[0; 100])).unwrap_err();
    write!(cut, "{error:#}").unwrap();
    assert!(
        cut.contains("28 of") && cut.contains("fetch the file again"),
        "{cut}"
    );
}
