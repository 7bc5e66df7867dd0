//! What `bench` found, as a table and as `--json` has it.

use serde::Serialize;

use super::timing::{Machine, Timing};
use crate::{
    layout::{BlockKind, BlockSpec},
    ui,
};

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The program, `fastflux 0.1.0`.
    pub tool: String,
    /// The machine; timings are of it.
    pub machine: Machine,
    /// What the device reaches, one for each number format.
    pub peaks: Vec<PeakRow>,
    /// The measurements.
    pub rows: Vec<Row>,
}

/// What the device reaches in one number format.
#[derive(Clone, Debug, Serialize)]
pub struct PeakRow {
    /// `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Of a large matrix product.
    pub flops_per_second: f64,
    /// Of a large copy, reads and writes together.
    pub bytes_per_second: f64,
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The model, or the shape whose blocks these are.
    pub model: String,
    /// `step`, or the kind of block.
    pub what: String,
    /// `f32`, `bf16` or `f16`.
    pub dtype: String,
    /// Images in one forward.
    pub batch: usize,
    /// Image tokens of one image.
    pub image_tokens: usize,
    /// Text tokens of one image.
    pub text_tokens: usize,
    /// In seconds.
    pub time: Timing,
    /// Floating-point operations.
    pub flops: u64,
    /// Weights and tokens, read and written once.
    pub bytes: u64,
    /// By the median time.
    pub flops_per_second: f64,
    /// By the median time.
    pub bytes_per_second: f64,
    /// Share of the measured matrix product's speed.
    pub share_of_peak_flops: f64,
    /// Share of the measured copy's speed.
    pub share_of_peak_bytes: f64,
    /// Median of the first model's step by this one's, if there are two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed_up: Option<f64>,
    /// Most memory that a step took beyond the weights, in bytes; measured on the CPU where there is one model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activation_bytes: Option<u64>,
    /// The same as it is estimated before a model is run, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_activation_bytes: Option<u64>,
}

/// How rows name a kind of block.
pub(super) fn kind(spec: &BlockSpec) -> String {
    match spec {
        BlockSpec::Original(id) if id.kind == BlockKind::Double => "double".to_owned(),
        BlockSpec::Original(_) => "single".to_owned(),
        BlockSpec::Replaced(r) if r.joint => format!("{}, joint", r.form),
        BlockSpec::Replaced(r) => r.form.to_string(),
    }
}

impl Report {
    /// What a terminal shows.
    pub fn table(&self) -> String {
        let cells: Vec<Vec<String>> = self
            .rows
            .iter()
            .map(|row| {
                let t = &row.time;
                let speed_up = row
                    .speed_up
                    .map_or_else(String::new, |s| format!("{s:.2}x"));
                vec![
                    row.model.clone(),
                    row.what.clone(),
                    row.dtype.clone(),
                    row.batch.to_string(),
                    format!("{} + {}", row.image_tokens, row.text_tokens),
                    format!("{:.3}", 1e3 * t.median),
                    format!("{:.3} to {:.3}", 1e3 * t.low, 1e3 * t.high),
                    ui::flops(row.flops as f64),
                    ui::bytes(row.bytes as f64),
                    format!("{:.0} %", 100.0 * row.share_of_peak_flops),
                    format!("{:.0} %", 100.0 * row.share_of_peak_bytes),
                    speed_up,
                ]
            })
            .collect();
        let header = [
            "model",
            "what",
            "dtype",
            "batch",
            "tokens",
            "ms",
            "quartiles",
            "FLOPs",
            "bytes",
            "of product",
            "of copy",
            "speed",
        ];
        ui::table(&header, &cells, &[3, 4, 5, 6, 7, 8, 9, 10, 11])
    }
}
