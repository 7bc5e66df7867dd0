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
    /// Most memory that a step took beyond the weights, in bytes; measured on the CPU if there is one model.
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

impl Row {
    /// What all rows of one table share.
    fn heading(&self) -> String {
        format!(
            "{}, batch {}, {} + {} tokens",
            self.dtype, self.batch, self.image_tokens, self.text_tokens
        )
    }

    fn cells(&self, models: usize) -> Vec<String> {
        let t = &self.time;
        let what = if models > 1 && self.what == "step" {
            format!("step of {}", self.model)
        } else {
            self.what.clone()
        };
        let speed_up = self.speed_up.map(|s| format!("{s:.2}×"));
        vec![
            what,
            format!("{:.3}", 1e3 * t.median),
            format!("{:.0} %", 100.0 * (t.high - t.low) / t.median),
            ui::flops(self.flops as f64),
            ui::bytes(self.bytes as f64),
            format!("{:.0} %", 100.0 * self.share_of_peak_flops),
            format!("{:.0} %", 100.0 * self.share_of_peak_bytes),
            speed_up.unwrap_or_default(),
        ]
    }
}

/// What a terminal shows of a measurement; `spread` is from quartile to quartile, as a share of the median.
const HEADER: [&str; 8] = [
    "", "ms", "spread", "FLOPs", "bytes", "product", "copy", "speed",
];

impl Report {
    /// What a terminal shows: a table for each number format, batch and size, at most 80 columns wide.
    pub fn table(&self) -> String {
        let mut models: Vec<&str> = self.rows.iter().map(|row| row.model.as_str()).collect();
        models.sort_unstable();
        models.dedup();
        let tables = self
            .rows
            .chunk_by(|a, b| a.heading() == b.heading())
            .map(|rows| {
                let heading = rows.first().map(Row::heading).unwrap_or_default();
                let cells: Vec<_> = rows.iter().map(|row| row.cells(models.len())).collect();
                let table = ui::table(&HEADER, &cells, &[1, 2, 3, 4, 5, 6, 7]);
                format!("{}, {heading}\n{table}", models.join(" and "))
            });
        tables.collect::<Vec<_>>().join("\n\n")
    }
}
