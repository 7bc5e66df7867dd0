//! GGUF: writing. ComfyUI-GGUF opens what has FLUX's original names and the architecture `flux`.

use std::io::{BufWriter, Write};

use anyhow::{Context, Result, ensure};
use candle::quantized::GgmlDType;

use super::{
    Checkpoint,
    gguf::{MAGIC, RECORD, number},
    keys, record,
};
use crate::quant::QuantType;

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
/// `GGML_QNT_VERSION`: the layout of the blocks.
const QUANTISATION_VERSION: u32 = 2;

/// What a file with linear layers says of itself.
const LAYERS: &str = "FLUX with linear layers in the place of some transformer blocks (tensors `*_blocks.N.linear.*`), which fastflux opens. \
ComfyUI-GGUF loads it without an error but runs these blocks on random weights; stable-diffusion.cpp refuses it.";

/// Which formats most of a file is in, as llama.cpp counts them (`general.file_type`).
fn file_type(packed: QuantType) -> u32 {
    match packed {
        QuantType::Blocks(GgmlDType::Q8_0) => 7,
        QuantType::Blocks(GgmlDType::Q4K) => 14,
        _ => 0,
    }
}

/// Writes all tensors; `written` is told the bytes of each that is done.
///
/// # Errors
/// When `file` takes no more, or a tensor is in a format that GGUF has not.
pub(super) fn write(
    checkpoint: &Checkpoint,
    main: QuantType,
    file: &mut std::fs::File,
    written: &mut dyn FnMut(usize),
) -> Result<()> {
    let header = header(checkpoint, main)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header)?;
    let mut total = header.len();
    for (name, source) in checkpoint.iter() {
        source
            .write_to(&mut out)
            .with_context(|| format!("tensor `{name}`"))?;
        let bytes = source.byte_len();
        let padded = bytes.next_multiple_of(ALIGNMENT);
        out.write_all(&[0; ALIGNMENT][..padded - bytes])?;
        total += padded;
        written(bytes);
    }
    out.flush()?;
    let arrived = out.get_ref().metadata()?.len();
    ensure!(
        arrived == total as u64,
        "{arrived} of {total} bytes arrived"
    );
    Ok(())
}

fn header(checkpoint: &Checkpoint, main: QuantType) -> Result<Vec<u8>> {
    let record = checkpoint.metadata.get(record::KEY);
    let mut keys = checkpoint.names().filter_map(keys::parse);
    let has_layers = keys.any(|key| key.of_replacement());
    let mut out = MAGIC.to_vec();
    let u32 = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
    let u64 = |out: &mut Vec<u8>, value: usize| out.extend((value as u64).to_le_bytes());
    let text = |out: &mut Vec<u8>, text: &str| {
        u64(out, text.len());
        out.extend(text.as_bytes());
    };
    let string = |out: &mut Vec<u8>, key: &str, value: &str| {
        text(out, key);
        u32(out, 8);
        text(out, value);
    };
    let integer = |out: &mut Vec<u8>, key: &str, value: u32| {
        text(out, key);
        u32(out, 4);
        u32(out, value);
    };
    u32(&mut out, VERSION);
    u64(&mut out, checkpoint.len());
    u64(
        &mut out,
        3 + usize::from(record.is_some()) + usize::from(has_layers),
    );
    string(&mut out, "general.architecture", "flux");
    integer(
        &mut out,
        "general.quantization_version",
        QUANTISATION_VERSION,
    );
    integer(&mut out, "general.file_type", file_type(main));
    if has_layers {
        string(&mut out, "general.description", LAYERS);
    }
    if let Some(record) = record {
        string(&mut out, RECORD, record);
    }
    let mut offset = 0;
    for (name, source) in checkpoint.iter() {
        text(&mut out, name);
        u32(&mut out, source.shape().len() as u32);
        for size in source.shape().iter().rev() {
            u64(&mut out, *size);
        }
        let number = number(source.format())
            .with_context(|| format!("tensor `{name}`: GGUF has no {}", source.format()))?;
        u32(&mut out, number);
        u64(&mut out, offset);
        offset += source.byte_len().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}
