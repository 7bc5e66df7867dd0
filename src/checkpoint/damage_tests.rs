//! Files with any byte changed or cut off: an error or other numbers, never a panic or a read beyond the file.

use candle::{Device, Tensor, quantized::GgmlDType};
use proptest::prelude::*;
use safetensors::Dtype;

use super::{Checkpoint, Source, StorageDType, save};
use crate::{files::Blob, quant::QuantType};

/// A small file of either format, with metadata, a matrix, a vector and, in GGUF, a quantized matrix.
fn file(gguf: bool) -> Vec<u8> {
    let mut checkpoint = Checkpoint::default();
    checkpoint
        .metadata
        .insert("format".to_owned(), "pt".to_owned());
    let dense = |shape: &[usize]| {
        let values = Tensor::ones(shape, candle::DType::F32, &Device::Cpu).unwrap();
        Source::dense(&values).unwrap()
    };
    checkpoint.insert("img_in.weight", dense(&[2, 64]));
    checkpoint.insert("img_in.bias", dense(&[2]));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    if gguf {
        let q8_0 = QuantType::Blocks(GgmlDType::Q8_0);
        let packed = dense(&[2, 64]).converted(StorageDType::Quantized(q8_0), None);
        checkpoint.insert("txt_in.weight", packed);
        save::write_gguf(&checkpoint, q8_0, &path, &mut |_| ()).unwrap();
    } else {
        let half = dense(&[3]).converted(StorageDType::Plain(Dtype::F16), None);
        checkpoint.insert("txt_in.bias", half);
        save::write(&checkpoint, &path).unwrap();
    }
    std::fs::read(path).unwrap()
}

/// Opens the bytes and reads every tensor that the header promises.
fn read(bytes: Vec<u8>) {
    let blob = Blob::Static(Box::leak(bytes.into_boxed_slice()));
    let Ok(checkpoint) = Checkpoint::from_blob("file", &blob) else {
        return;
    };
    for (name, source) in checkpoint.iter() {
        if let Ok(bytes) = source.bytes() {
            assert_eq!(bytes.len(), source.byte_len(), "{name}");
        }
    }
}

#[test]
fn whole_files_are_read() {
    for gguf in [false, true] {
        let blob = Blob::Static(Box::leak(file(gguf).into_boxed_slice()));
        let checkpoint = Checkpoint::from_blob("file", &blob).unwrap();
        assert_eq!(checkpoint.len(), 3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_do_no_harm(
        gguf: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = file(gguf);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        read(bytes);
    }

    #[test]
    fn files_that_are_cut_off_do_no_harm(gguf: bool, end: prop::sample::Index) {
        let mut bytes = file(gguf);
        bytes.truncate(end.index(bytes.len()));
        read(bytes);
    }

    #[test]
    fn bytes_without_order_do_no_harm(
        magic in prop::sample::select(vec![&b""[..], b"GGUF\x03\0\0\0", b"\x20\0\0\0\0\0\0\0{"]),
        rest in prop::collection::vec(any::<u8>(), 0..256),
    ) {
        read([magic, &rest].concat());
    }
}
