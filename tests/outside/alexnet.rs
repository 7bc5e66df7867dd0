//! An AlexNet with the linear heads of LPIPS, as a safetensors file.

use std::collections::BTreeMap;

/// Its bytes, with random weights: under the names of the package `lpips`, or of torchvision for the network, as `prefix` of a
/// slice says.
pub(crate) fn alexnet(prefix: impl Fn(usize) -> String) -> Vec<u8> {
    let convs = [
        (0, 64, 3, 11),
        (3, 192, 64, 5),
        (6, 384, 192, 3),
        (8, 256, 384, 3),
        (10, 256, 256, 3),
    ];
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    for (slice, (number, out, input, side)) in convs.into_iter().enumerate() {
        let name = format!("{}{number}", prefix(slice));
        shapes.push((format!("{name}.weight"), vec![out, input, side, side]));
        shapes.push((format!("{name}.bias"), vec![out]));
        shapes.push((format!("lin{slice}.model.1.weight"), vec![1, out, 1, 1]));
    }
    let (mut header, mut data) = (BTreeMap::new(), Vec::new());
    let mut state = 1u32;
    for (name, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = (state >> 8) as f32 / 16_777_216.0;
            let value = if name.starts_with("lin") {
                value
            } else {
                0.1 * (value - 0.5)
            };
            data.extend(value.to_le_bytes());
        }
        let entry = serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name, entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}
