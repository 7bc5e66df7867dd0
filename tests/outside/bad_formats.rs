//! GGUF files that lie, scales that do not fit, and conversions that make no sense.

use std::fs;

use crate::common::*;

/// A GGUF header: version, tensors, metadata pairs, and what follows.
fn gguf(tensors: u64, pairs: u64, rest: &[u8]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(tensors.to_le_bytes());
    out.extend(pairs.to_le_bytes());
    out.extend(rest);
    out
}

fn text(text: &str) -> Vec<u8> {
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// One tensor's entry.
fn entry(shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = text("img_in.weight");
    out.extend((shape.len() as u32).to_le_bytes());
    out.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

#[test]
fn lying_gguf_files_are_refused_by_name() {
    let work = folder();
    let w = work.path();
    let architecture = |name: &str| {
        let kind = 8u32.to_le_bytes().to_vec();
        [text("general.architecture"), kind, text(name)].concat()
    };
    let mut array = text("tokens");
    array.extend(9u32.to_le_bytes());
    array.extend(0u32.to_le_bytes());
    array.extend(u64::MAX.to_le_bytes());
    let tensor = "img_in.weight";
    for (name, bytes, words) in [
        ("short", b"GGUF\x03".to_vec(), vec!["cut off"]),
        ("version", b"GGUF\x09\0\0\0".to_vec(), vec!["version is 9"]),
        ("tensors", gguf(u64::MAX, 0, &[]), vec!["cut off"]),
        ("pairs", gguf(0, u64::MAX, &[]), vec!["cut off"]),
        (
            "string",
            gguf(0, 1, &[0xff; 16]),
            vec!["lies about a length"],
        ),
        ("array", gguf(0, 1, &array), vec!["tokens", "cut off"]),
        (
            "llama",
            gguf(0, 1, &architecture("llama")),
            vec!["architecture `llama`"],
        ),
        (
            "type",
            gguf(1, 0, &entry(&[32, 2], 22, 0)),
            vec![tensor, "GGML type IQ2_S", "Q4_K"],
        ),
        (
            "dimensions",
            gguf(1, 0, &entry(&[1; 9], 0, 0)),
            vec![tensor, "9 dimensions"],
        ),
        (
            "shape",
            gguf(1, 0, &entry(&[u64::MAX, u64::MAX], 0, 0)),
            vec![tensor, "too many values"],
        ),
        (
            "row",
            gguf(1, 0, &entry(&[33, 2], 8, 0)),
            vec![tensor, "whole blocks of Q8_0"],
        ),
        (
            "offset",
            gguf(1, 0, &entry(&[2, 2], 0, u64::MAX)),
            vec![tensor, "offset 18446744073709551615"],
        ),
        (
            "far",
            gguf(1, 0, &entry(&[2, 2], 0, u64::MAX - 31)),
            vec!["cut off"],
        ),
        (
            "data",
            gguf(1, 0, &entry(&[1 << 20, 1 << 10], 0, 0)),
            vec!["cut off"],
        ),
    ] {
        // whatever its extension, the first bytes tell
        let file = format!("{name}.safetensors");
        fs::write(w.join(&file), bytes).unwrap();
        let words = [vec![file.as_str()], words].concat();
        refused(w, &["inspect", "--model", &file], &words);
    }
    ok(w, &["convert", "--gguf", "q8_0", "--output", "whole.gguf"]);
    let whole = fs::read(w.join("whole.gguf")).unwrap();
    for cut in [20, 100, 3000, whole.len() / 2, whole.len() - 100] {
        fs::write(w.join("cut.gguf"), &whole[..cut]).unwrap();
        refused(w, &["inspect", "--model", "cut.gguf"], &["cut.gguf"]);
    }
}

#[test]
fn scales_that_do_not_fit_and_senseless_conversions_are_refused() {
    let work = folder();
    let w = work.path();
    let scaled = |scale: &str, bytes: usize| {
        let header = format!(
            r#"{{"double_blocks.0.img_mod.lin.weight":{{"dtype":"F8_E4M3","shape":[2,4],"data_offsets":[0,8]}},"double_blocks.0.img_mod.lin.scale_weight":{{"dtype":"F32","shape":{scale},"data_offsets":[8,{}]}}}}"#,
            8 + bytes
        );
        safetensors(&w.join("scale.safetensors"), &header, &vec![0; 8 + bytes]);
    };
    scaled("[3]", 12);
    let inspect = ["inspect", "--model", "scale.safetensors"];
    refused(
        w,
        &inspect,
        &[
            "scale.safetensors",
            "double_blocks.0.img_mod.lin.scale_weight",
            "[3]",
            "[2, 4]",
        ],
    );
    let other = r#"{"double_blocks.0.img_mod.lin.weight":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"double_blocks.0.img_mod.lin.comfy_quant":{"dtype":"U8","shape":[18],"data_offsets":[2,20]}}"#;
    safetensors(
        &w.join("nvfp4.safetensors"),
        other,
        &[b"xx", &br#"{"format":"nvfp4"}"#[..]].concat(),
    );
    refused(
        w,
        &["inspect", "--model", "nvfp4.safetensors"],
        &[
            "nvfp4.safetensors",
            "`double_blocks.0.img_mod.lin`",
            "`nvfp4`",
        ],
    );
    refused(
        w,
        &["convert", "--dtype", "bf16", "--output", "a.gguf"],
        &["a.gguf", ".safetensors"],
    );
    refused(
        w,
        &["convert", "--dtype", "bf16", "--no-scale", "--output", "a"],
        &["--no-scale"],
    );
    for args in [
        &["--dtype", "bf16", "--gguf", "q8_0"][..],
        &["--gguf", "q5_k"],
        &[],
    ] {
        let out = fastflux(w, &[&["convert", "--output", "a"], args].concat());
        assert_eq!(out.status.code(), Some(2), "{args:?}");
    }
}
