//! Any bytes as a picture, scaled to a small size.
#![no_main]

use fastflux::sample::image;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.png");
    std::fs::write(&path, bytes).expect("a file");
    // the decoder's time grows with the pixels; the program's own bound is tested elsewhere
    if let Ok(image) = image::read(&path)
        && image.rgb.len() < 1 << 22
    {
        let _ = image::covering(&image, 32, 32);
        let _ = image::within(&image, 64);
    }
});
