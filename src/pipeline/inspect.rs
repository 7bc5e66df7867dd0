//! What a checkpoint holds, from its header alone, for `--json` and as a table.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::{OpenedLora, Pipeline};
use crate::{
    checkpoint::{keys, lora::RecordedLora, record::Record},
    layout::{BlockId, BlockKind, BlockSpec, FluxConfig, TextModel},
    model::cost,
    sample::size::ImageSize,
    ui,
};

/// What a checkpoint holds.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// How the model is called.
    pub model: String,
    /// Its family, for people.
    pub family: String,
    /// Whose names the tensors have: original or diffusers.
    pub format: &'static str,
    /// Sizes and layout.
    pub config: FluxConfig,
    /// Double blocks of the unpruned model.
    pub double_blocks: usize,
    /// Single blocks of the unpruned model.
    pub single_blocks: usize,
    /// Blocks that were replaced.
    pub replaced_blocks: usize,
    /// Numbers by number format.
    pub dtypes: BTreeMap<String, usize>,
    /// Numbers of the transformer.
    pub parameters: usize,
    /// Bytes of the transformer.
    pub bytes: usize,
    /// Cost of one step.
    pub step: StepReport,
    /// Every entry of the layout.
    pub blocks: Vec<BlockReport>,
    /// What opens the model that it was pruned from.
    pub base: Option<String>,
    /// LoRA files that are added to the weights as they are read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora: Vec<LoraReport>,
    /// LoRA files that are in the weights.
    #[serde(rename = "merged-lora", skip_serializing_if = "Vec::is_empty")]
    pub merged_lora: Vec<RecordedLora>,
    /// What was done to the base, a sentence each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<String>,
    /// The recipe that made it.
    pub recipe: Option<Value>,
    /// The program that made it.
    #[serde(skip)]
    tool: Option<String>,
}

/// One LoRA file.
#[derive(Clone, Debug, Serialize)]
pub struct LoraReport {
    /// As it was named.
    pub file: String,
    /// What it is multiplied by.
    pub weight: f32,
    /// Its tensors that act on this transformer.
    pub tensors: usize,
    /// Its tensors that act on text encoders.
    pub text_tensors: usize,
    /// All of its tensors.
    pub of: usize,
    /// Blocks that it would act on and that are replaced.
    pub replaced: Vec<BlockId>,
}

impl LoraReport {
    fn new(opened: &OpenedLora) -> Self {
        let OpenedLora { lora, applied } = opened;
        Self {
            file: lora.name.clone(),
            weight: lora.recorded.weight,
            tensors: applied.tensors,
            text_tensors: applied.text,
            of: applied.total,
            replaced: applied.of_blocks.keys().copied().collect(),
        }
    }
}

/// Cost of one step at batch 1.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct StepReport {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Image tokens.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Operations of matrix products.
    pub matmul_flops: u64,
    /// Operations of attention.
    pub attention_flops: u64,
    /// All operations.
    pub flops: u64,
    /// Bytes of weights that are read.
    pub weight_bytes: usize,
}

/// One entry of the layout.
#[derive(Clone, Debug, Serialize)]
pub struct BlockReport {
    /// The block, or the first that a layer stands for.
    pub block: BlockId,
    /// Double or single.
    pub kind: &'static str,
    /// `kept`, or the form of the layer.
    pub state: String,
    /// As the layout has it.
    pub spec: BlockSpec,
    /// Numbers.
    pub parameters: usize,
    /// Bytes.
    pub bytes: usize,
    /// Operations of one step.
    pub flops: u64,
}

impl InspectReport {
    /// Of a model that generates images of `size` from `text` tokens.
    pub fn new(pipeline: &Pipeline, size: ImageSize, text: usize) -> Self {
        let config = &pipeline.config;
        let total = cost::model(config, size.tokens(), text);
        let mut dtypes: BTreeMap<String, usize> = BTreeMap::new();
        for (_, source) in pipeline.transformer.iter() {
            *dtypes.entry(source.format().to_string()).or_default() += source.elements();
        }
        let bytes = pipeline.transformer.bytes();
        let record = pipeline.record.as_ref();
        Self {
            model: pipeline.name.clone(),
            family: pipeline.family(),
            format: if pipeline.diffusers {
                "diffusers"
            } else {
                "original"
            },
            config: config.clone(),
            double_blocks: config.original_blocks(BlockKind::Double),
            single_blocks: config.original_blocks(BlockKind::Single),
            replaced_blocks: config.replaced().map(|r| r.replaces.len()).sum(),
            dtypes,
            parameters: pipeline.transformer.parameters(),
            bytes,
            step: StepReport {
                width: size.width,
                height: size.height,
                image_tokens: size.tokens(),
                text_tokens: text,
                matmul_flops: total.matmul_flops,
                attention_flops: total.attention_flops,
                flops: total.flops(),
                weight_bytes: bytes,
            },
            blocks: blocks(pipeline, size.tokens(), text),
            base: record.map(|r| r.base.clone()),
            lora: pipeline.lora.iter().map(LoraReport::new).collect(),
            merged_lora: record.map_or_else(Vec::new, |r| r.lora.clone()),
            steps: record.map(Record::steps).unwrap_or_default(),
            recipe: record.map(|r| r.recipe.clone()),
            tool: record.map(|r| r.tool.clone()),
        }
    }

    /// As a table.
    pub fn text(&self) -> String {
        let (config, step) = (&self.config, &self.step);
        let dtypes: Vec<&str> = self.dtypes.keys().map(String::as_str).collect();
        let mut lines = vec![
            format!("model       {}", self.model),
            format!("family      {}", self.family),
            format!(
                "blocks      {} double + {} single, {} replaced",
                self.double_blocks, self.single_blocks, self.replaced_blocks
            ),
            format!(
                "width       {} = {} heads × {}, MLP {}, rotary axes {:?}, theta {}",
                config.hidden_size,
                config.num_heads,
                config.head_dim(),
                config.mlp_size,
                config.axes_dims,
                config.theta
            ),
            format!(
                "inputs      {} channels in, {} out, {}, guidance {}",
                config.in_channels,
                config.out_channels,
                match config.family.text {
                    TextModel::ClipAndT5 => {
                        format!("T5 {}, CLIP {}", config.context_in_dim, config.vec_in_dim)
                    }
                    // only dev has a guidance embedding, and it was trained with another text encoder
                    TextModel::Qwen3 if config.guidance_embed => {
                        format!("Mistral 3 × {}", config.context_in_dim / 3)
                    }
                    TextModel::Qwen3 => format!("Qwen3 3 × {}", config.context_in_dim / 3),
                },
                if config.guidance_embed {
                    "embedded"
                } else {
                    "none"
                }
            ),
            format!(
                "parameters  {} in {} ({}, {} names)",
                ui::count(self.parameters as f64),
                ui::bytes(self.bytes as f64),
                dtypes.join(" + "),
                self.format
            ),
            format!(
                "one step    {} at {}×{} with {} text tokens",
                ui::flops(step.flops as f64),
                step.width,
                step.height,
                step.text_tokens,
            ),
            format!(
                "            {} matrix products, {} attention; reads {}",
                ui::flops(step.matmul_flops as f64),
                ui::flops(step.attention_flops as f64),
                ui::bytes(self.bytes as f64)
            ),
        ];
        if let (Some(base), Some(tool)) = (&self.base, &self.tool) {
            lines.push(format!("made        from {base} by {tool}"));
        }
        // of one step everything is in the table
        if self.steps.len() > 1 {
            let steps = self.steps.iter().map(|step| format!("            {step}"));
            lines.extend(steps);
        }
        for lora in &self.merged_lora {
            lines.push(format!(
                "with        {} × {}",
                lora.file.display(),
                lora.weight
            ));
        }
        for lora in &self.lora {
            lines.push(format!(
                "LoRA        {} × {}: {} of {} tensors, {} more for text encoders",
                lora.file, lora.weight, lora.tensors, lora.of, lora.text_tensors
            ));
        }
        lines.push(String::new());
        let cells: Vec<Vec<String>> = self
            .blocks
            .iter()
            .map(|row| {
                vec![
                    row.block.to_string(),
                    row.state.clone(),
                    ui::count(row.parameters as f64),
                    ui::bytes(row.bytes as f64),
                    ui::flops(row.flops as f64),
                ]
            })
            .collect();
        lines.push(ui::table(
            &["block", "state", "parameters", "bytes", "per step"],
            &cells,
            &[2, 3, 4],
        ));
        lines.join("\n")
    }
}

/// What stands in a slot: `kept`, or the form of the replacement and further blocks it stands for.
fn state(spec: &BlockSpec) -> String {
    match spec {
        BlockSpec::Original(_) => "kept".to_owned(),
        BlockSpec::Replaced(r) => {
            let joint = if r.joint { ", joint" } else { "" };
            let run = if r.replaces.len() > 1 {
                format!(" for {} blocks", r.replaces.len())
            } else {
                String::new()
            };
            format!("{}{joint}{run}", r.form)
        }
    }
}

fn blocks(pipeline: &Pipeline, image: usize, text: usize) -> Vec<BlockReport> {
    let mut sizes: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (name, source) in pipeline.transformer.iter() {
        if let Some(key) = keys::parse(name) {
            let entry = sizes
                .entry(format!("{}.{}", key.kind.prefix(), key.slot))
                .or_default();
            entry.0 += source.elements();
            entry.1 += source.byte_len();
        }
    }
    let slots = pipeline.config.slots();
    let rows = slots.into_iter().map(|(spec, prefix)| {
        let (parameters, bytes) = prefix
            .and_then(|p| sizes.get(&p).copied())
            .unwrap_or_default();
        BlockReport {
            block: spec.id(),
            kind: spec.kind().as_str(),
            state: state(spec),
            spec: spec.clone(),
            parameters,
            bytes,
            flops: cost::block(&pipeline.config, spec, image, text).flops(),
        }
    });
    rows.collect()
}
