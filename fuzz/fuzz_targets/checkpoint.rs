//! Any bytes as a checkpoint (safetensors or GGUF): opened, told what it is, taken apart, and every tensor read.
#![no_main]

use fastflux::{
    checkpoint::{Checkpoint, config, part::Part},
    files::Blob,
};
use libfuzzer_sys::fuzz_target;

/// Numbers that are read of one file.
const MOST: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let owned = Box::into_raw(bytes.to_vec().into_boxed_slice());
    // SAFETY: it was made above, and is freed below, when nothing reads it any more
    read(&Blob::Static(unsafe { &*owned }));
    // SAFETY: as above; leaked bytes would be a find of their own
    drop(unsafe { Box::from_raw(owned) });
});

fn read(blob: &Blob) {
    let Ok(file) = Checkpoint::from_blob("file", blob) else {
        return;
    };
    if let Ok(transformer) = config::canonical(&file) {
        let _ = config::infer(&transformer, None, &[]);
    }
    for part in Part::ALL {
        for prefix in part.prefixes(&file) {
            let Ok(taken) = part.take(&file, &prefix) else {
                continue;
            };
            if taken.iter().map(|(_, source)| source.elements()).sum::<usize>() > MOST {
                continue;
            }
            for (_, source) in taken.iter() {
                let _ = source.tensor(&candle::Device::Cpu);
                let _ = source.ends(16);
            }
        }
    }
}
