//! Several ratios at once: what each saves, and what it costs in velocity error.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::{
    estimate::{ModelCost, Workload},
    plan::PruningPlan,
};
use crate::{checkpoint::output, layout::FluxConfig, ui};

/// A plan for one of several ratios.
#[derive(Clone, Debug)]
pub struct RatioPlan {
    /// Share of all blocks.
    pub ratio: f64,
    /// The blocks and what takes their place.
    pub plan: PruningPlan,
    /// Relative mean squared error of the velocity with the plain fits; `None` if the model was not run.
    pub velocity_error: Option<f64>,
}

/// One ratio of a curve.
#[derive(Clone, Debug, Serialize)]
pub struct CurvePoint {
    /// Share of all blocks.
    pub ratio: f64,
    /// Blocks that are replaced.
    pub blocks: usize,
    /// The plan's file.
    pub output: String,
    /// What the plan makes of the model.
    pub cost: ModelCost,
    /// How many times faster a step is, by arithmetic.
    pub speed_up: f64,
    /// Relative mean squared error of the velocity with the plain fits; `None` if the model was not run.
    pub velocity_error: Option<f64>,
}

/// What `plan` found for several ratios.
#[derive(Clone, Debug, Serialize)]
pub struct CurveReport {
    /// How the model is called.
    pub model: String,
    /// The ratios, ascending.
    pub points: Vec<CurvePoint>,
}

/// The file of a ratio's plan: `plan.json` becomes `plan-0.2.json`.
pub fn output_of(output: &Path, ratio: f64) -> PathBuf {
    let stem = output
        .file_stem()
        .and_then(|s| s.to_str())
        .unwrap_or("plan");
    output.with_file_name(format!("{stem}-{ratio}.json"))
}

impl CurveReport {
    /// Of plans for a model.
    pub fn new(
        model: &str,
        config: &FluxConfig,
        workload: Workload,
        plans: &[RatioPlan],
        output: &Path,
    ) -> Self {
        let before = ModelCost::for_config(config, workload);
        let point = |plan: &RatioPlan| {
            let cost = ModelCost::of_plan(config, &plan.plan, workload);
            CurvePoint {
                ratio: plan.ratio,
                blocks: plan.plan.blocks().count(),
                output: output_of(output, plan.ratio).display().to_string(),
                cost,
                speed_up: cost.speed_up(&before),
                velocity_error: plan.velocity_error,
            }
        };
        Self {
            model: model.to_owned(),
            points: plans.iter().map(point).collect(),
        }
    }

    /// As a table.
    pub fn text(&self) -> String {
        let row = |point: &CurvePoint| {
            let error = point.velocity_error;
            vec![
                point.ratio.to_string(),
                point.blocks.to_string(),
                ui::count(point.cost.parameters as f64),
                ui::bytes(point.cost.memory_bytes as f64),
                format!("{:.2}×", point.speed_up),
                error.map_or_else(|| "-".to_owned(), |error| format!("{error:.5}")),
            ]
        };
        let rows: Vec<Vec<String>> = self.points.iter().map(row).collect();
        let header = [
            "ratio",
            "blocks",
            "parameters",
            "memory",
            "speed",
            "velocity error",
        ];
        ui::table(&header, &rows, &[0, 1, 2, 3, 4, 5])
    }
}

/// Writes every plan into its file.
///
/// # Errors
/// When a file cannot be written.
pub fn write(plans: &[RatioPlan], output: &Path) -> Result<()> {
    for plan in plans {
        let path = output_of(output, plan.ratio);
        output::write_json(&path, &serde_json::to_value(&plan.plan)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ratio_has_a_file_of_its_own() {
        let of = |ratio| output_of(Path::new("a/plan.json"), ratio);
        assert_eq!(of(0.2), Path::new("a/plan-0.2.json"));
        assert_ne!(of(0.25), of(0.2));
    }
}
