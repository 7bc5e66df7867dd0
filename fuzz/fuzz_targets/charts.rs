//! Charts of any floats: they end, and are SVG.
#![no_main]

use fastflux::plot::losses::{self, LossPoint};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|values: Vec<(bool, u16, f64, Option<f64>)>| {
    let points: Vec<LossPoint> = values
        .iter()
        .take(64)
        .map(|(first, step, loss, held_out)| LossPoint {
            phase: if *first { "double.01" } else { "finetune" },
            step: usize::from(*step),
            loss: Some(*loss),
            held_out: *held_out,
        })
        .collect();
    let svg = losses::svg_of(&points).expect("a chart");
    assert!(svg.contains("</svg>"));
});
