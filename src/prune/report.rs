//! What `prune` and `plan` found, for `--json` and as tables.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use super::{
    Pruned,
    estimate::{ModelCost, Workload},
    plan::PruningPlan,
    recipe::PruneRecipe,
    select::{GreedySelection, RankedPlan},
};
use crate::{
    calibrate::Calibrator,
    checkpoint::Checkpoint,
    fit::layers::Layers,
    layout::{BlockId, FluxConfig, Form},
    model::cost,
    pipeline::Pipeline,
    score::{BlockScore, Metric, measure},
    ui,
};

/// All that is known of every block after the greedy choice.
pub fn scores_of(selection: &GreedySelection) -> Vec<BlockScore> {
    let measured = BTreeMap::from([(Metric::Ablation, selection.greedy.alone.clone())]);
    measure::of_blocks(&selection.stats, &selection.fits, &measured)
}

/// What `prune` did.
#[derive(Clone, Debug, Serialize)]
pub struct PruneReport {
    /// The folder that was written.
    pub output: String,
    /// How the model is called.
    pub model: String,
    /// Blocks that were replaced.
    pub replaced: Vec<BlockId>,
    /// Relative mean squared error of the pruned model's velocity on held-out noised latents.
    pub velocity_error: f64,
    /// The model as it was.
    pub before: Size,
    /// The pruned model.
    pub after: Size,
    /// What stands for the replaced blocks.
    pub layers: Vec<LayerReport>,
    /// Scores of every block; `None` if the plan was given.
    pub blocks: Option<Vec<BlockScore>>,
    /// The image before and after, if there is a VAE.
    pub image: Option<String>,
    /// What was asked for, nothing left open.
    pub recipe: PruneRecipe,
    /// Every block of the model, for the table.
    #[serde(skip)]
    all: Vec<BlockId>,
    /// Blocks of the unpruned model.
    #[serde(skip)]
    total: usize,
}

/// Size and cost of a model.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Numbers.
    pub parameters: usize,
    /// Bytes of the checkpoint.
    pub bytes: usize,
    /// Floating-point operations of one step.
    pub flops_per_step: u64,
}

/// The layer that stands for one or more blocks.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// The blocks.
    pub replaces: Vec<BlockId>,
    /// What kind of layer.
    pub form: Form,
    /// Share of the change that the layer leaves: 1 − R².
    pub fit_error: Option<Streams>,
    /// The ridge that was used, relative to the mean diagonal.
    pub ridge: Option<Streams>,
}

/// A number for each stream.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Streams {
    /// Text tokens.
    pub txt: f64,
    /// Image tokens.
    pub img: f64,
}

impl PruneReport {
    /// Of what was pruned and written; velocity error, scores and image are set by the caller.
    pub(super) fn new(
        calibrator: &Calibrator,
        recipe: &PruneRecipe,
        pruned: &Pruned,
        written: &Checkpoint,
        output: &Path,
    ) -> Self {
        let pipeline = calibrator.pipeline;
        let resolved = &calibrator.options;
        let (image, text) = (resolved.size.tokens(), resolved.text_tokens);
        let size = |config: &FluxConfig, checkpoint: &Checkpoint| Size {
            parameters: checkpoint.parameters(),
            bytes: checkpoint.bytes(),
            flops_per_step: cost::model(config, image, text).flops(),
        };
        let layer = |r: &crate::layout::Replacement| {
            let first = r.replaces.first();
            let layers = first.and_then(|id| pruned.fits.layers.get(id));
            let fits = layers.and_then(Layers::fits);
            LayerReport {
                replaces: r.replaces.clone(),
                form: r.form,
                fit_error: fits.map(|[txt, img]| Streams {
                    txt: txt.error,
                    img: img.error,
                }),
                ridge: fits.map(|[txt, img]| Streams {
                    txt: txt.ridge,
                    img: img.ridge,
                }),
            }
        };
        Self {
            output: output.display().to_string(),
            model: pipeline.name.clone(),
            replaced: pruned.plan.blocks().collect(),
            velocity_error: 0.0,
            before: size(&pipeline.config, &pipeline.transformer),
            after: size(&pruned.config, written),
            layers: pruned.plan.replace.iter().map(layer).collect(),
            blocks: None,
            image: None,
            recipe: recipe.clone(),
            all: pipeline.config.kept_ids(),
            total: pipeline.config.original_ids().count(),
        }
    }

    /// As tables.
    pub fn text(&self) -> String {
        let number =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
        let rows: Vec<Vec<String>> = self
            .all
            .iter()
            .map(|id| {
                let scored = self.blocks.iter().flatten().find(|s| s.block == *id);
                let value = |metric| scored.and_then(|s| s.scores.get(&metric).copied());
                let layer = self.layers.iter().find(|l| l.replaces.contains(id));
                let error = layer.and_then(|l| l.fit_error);
                vec![
                    id.to_string(),
                    number(value(Metric::Ablation)),
                    number(value(Metric::RelativeChange)),
                    layer.map_or_else(|| "kept".to_owned(), |l| l.form.to_string()),
                    error.map_or_else(String::new, |e| format!("{:.3} / {:.3}", e.txt, e.img)),
                ]
            })
            .collect();
        let header = [
            "block",
            "importance",
            "‖y−x‖/‖x‖",
            "",
            "fit error, text / image",
        ];
        let (b, a) = (&self.before, &self.after);
        let totals = [
            change(
                "parameters",
                b.parameters as f64,
                a.parameters as f64,
                ui::count,
            ),
            change("bytes", b.bytes as f64, a.bytes as f64, ui::bytes),
            change(
                "per step",
                b.flops_per_step as f64,
                a.flops_per_step as f64,
                ui::flops,
            ),
        ];
        format!(
            "{}\n\n{}\n\n{} of {} blocks replaced\nvelocity error {:.4} against `{}` (relative MSE, held-out noised latents)",
            ui::table(&header, &rows, &[1, 2]),
            ui::table(&["", "before", "after", ""], &totals, &[1, 2, 3]),
            self.replaced.len(),
            self.total,
            self.velocity_error,
            self.model
        )
    }
}

/// A row of a table: what it is, before, after, and by how much it changed.
fn change(what: &str, before: f64, after: f64, unit: fn(f64) -> String) -> Vec<String> {
    let change = format!("{:+.1} %", 100.0 * (after / before - 1.0));
    vec![what.to_owned(), unit(before), unit(after), change]
}

/// What `plan` chose, and what that saves.
#[derive(Clone, Debug, Serialize)]
pub struct PlanReport {
    /// The file that was written.
    pub output: String,
    /// How the model is called.
    pub model: String,
    /// The plan.
    pub plan: PruningPlan,
    /// Importance of every block, by name.
    pub importance: BTreeMap<String, f64>,
    /// Image tokens that arithmetic and memory are counted for.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// The model as it is.
    pub before: ModelCost,
    /// The model that the plan makes of it.
    pub after: ModelCost,
    /// How many times faster a step is, by arithmetic.
    pub speed_up: f64,
    /// Every block of the model, for the table.
    #[serde(skip)]
    all: Vec<BlockId>,
    /// Blocks of the unpruned model.
    #[serde(skip)]
    total: usize,
}

impl PlanReport {
    /// Of a plan for `pipeline` that was written to `output`.
    pub fn new(pipeline: &Pipeline, ranked: RankedPlan, workload: Workload, output: &Path) -> Self {
        let config = &pipeline.config;
        let before = ModelCost::for_config(config, workload);
        let after = ModelCost::of_plan(config, &ranked.plan, workload);
        let importance = ranked.importance.iter();
        Self {
            output: output.display().to_string(),
            model: pipeline.name.clone(),
            importance: importance.map(|(id, v)| (id.to_string(), *v)).collect(),
            plan: ranked.plan,
            image_tokens: workload.image_tokens,
            text_tokens: workload.text_tokens,
            before,
            after,
            speed_up: after.speed_up(&before),
            all: config.kept_ids(),
            total: config.original_ids().count(),
        }
    }

    /// As tables.
    pub fn text(&self) -> String {
        let row = |id: &BlockId| {
            let run = self.plan.replace.iter().find(|r| r.replaces.contains(id));
            let state = match run {
                None => "kept".to_owned(),
                Some(run) if run.replaces.len() > 1 => {
                    format!("{} (one layer for {})", run.form, run.replaces.len())
                }
                Some(run) => run.form.to_string(),
            };
            let name = id.to_string();
            let importance = self.importance.get(&name);
            let importance = importance.map_or_else(|| "-".to_owned(), |v| format!("{v:.5}"));
            vec![name, importance, state]
        };
        let rows: Vec<Vec<String>> = self.all.iter().map(row).collect();
        let (b, a) = (&self.before, &self.after);
        let count =
            |what, before: u64, after: u64, unit| change(what, before as f64, after as f64, unit);
        let totals = [
            count("parameters", b.parameters, a.parameters, ui::count),
            count("file", b.file_bytes, a.file_bytes, ui::bytes),
            count("memory", b.memory_bytes, a.memory_bytes, ui::bytes),
            count("per step", b.flops, a.flops, ui::flops),
            vec![
                "speed-up".to_owned(),
                String::new(),
                format!("{:.2}×", self.speed_up),
                String::new(),
            ],
        ];
        format!(
            "{}\n\n{}\n\n{} of {} blocks replaced ({}); for {} image and {} text tokens, by arithmetic",
            ui::table(&["block", "importance", ""], &rows, &[1]),
            ui::table(&["", "before", "after", ""], &totals, &[1, 2, 3]),
            self.plan.blocks().count(),
            self.total,
            self.plan.reason,
            self.image_tokens,
            self.text_tokens,
        )
    }
}
