//! LoRA files of every dialect, added to the tensors that a model is loaded from: sums are made when a tensor is read (see
//! `source::adapted`), so that every command, offloaded blocks and written files get them.
//!
//! Which dialect a file has follows from its names alone: endings say what a tensor is (`parts`), the rest which module
//! (`names`, `text`). Block numbers are those of the unpruned model.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::{Checkpoint, patch, record, scales};
use crate::{
    files::Blob,
    layout::{BlockId, BlockKind, BlockSpec, FluxConfig},
};

mod choice;
mod config;
mod foreign;
mod names;
mod parts;
pub mod recorded;
mod report;
mod text;

pub use choice::LoraChoice;
use choice::{ADAPTER, file_of};
use config::AdapterConfig;
use names::{Names, Place};
use parts::Parts;
pub use recorded::RecordedLora;
pub use report::Applied;
pub use text::TextEncoder;

pub use super::patch::LORA_LAYOUT as LAYOUT;
/// diffusers' copy of PEFT's configuration.
const ADAPTER_METADATA: &str = "lora_adapter_metadata";
/// An opened LoRA file: its header is read, its numbers are not.
#[derive(Clone, Debug)]
pub struct Lora {
    /// How messages name it.
    pub name: String,
    /// What identifies it in a record.
    pub recorded: RecordedLora,
    file: Checkpoint,
    modules: BTreeMap<String, Parts>,
    transformer: AdapterConfig,
    clip: AdapterConfig,
    t5: AdapterConfig,
    /// The pruned model that it was trained in and is for; `None`: it is for the unpruned model and all made from it.
    layout: Option<Vec<BlockSpec>>,
    /// Whether block numbers count the slots of that model, as earlier versions of fastflux wrote them.
    by_slots: bool,
}

impl Lora {
    /// Opens a file, or the folder of an adapter.
    ///
    /// # Errors
    /// When it is missing, damaged, or holds no LoRA.
    pub fn open(choice: &LoraChoice) -> Result<Self> {
        Self::open_in(choice, None)
    }

    /// The same; of a patch, the LoRA that a model was trained with: that of the level called `level`, or the only one.
    ///
    /// # Errors
    /// As [`Self::open`], and when there are several and none is named.
    pub fn open_in(choice: &LoraChoice, level: Option<&str>) -> Result<Self> {
        let path = file_of(&choice.path)?;
        let name = path.display().to_string();
        let mut file = Checkpoint::from_blob(&name, &Blob::map(&path)?)?;
        if let Some(lora) = patch::lora(&file, level)? {
            file = lora;
        }
        let fingerprint = record::fingerprint(&file)?;
        let file = scales::attached(file, &BTreeMap::new())?;
        let (modules, unknown) = parts::modules(&file)?;
        if let Some(first) = unknown.first() {
            if let Some(form) = foreign::form(&unknown) {
                bail!("`{name}` is {form}, which is not applied");
            }
            ensure!(
                !modules.is_empty(),
                "`{name}` holds no LoRA: its first tensor is `{first}`"
            );
            if let Some(what) = foreign::model(&file, &unknown) {
                bail!("`{name}` {what}, which is not applied");
            }
            bail!(
                "`{name}`: {} of its {} tensors are none that a LoRA has, the first is `{first}`",
                unknown.len(),
                file.len()
            );
        }
        ensure!(!modules.is_empty(), "`{name}` holds no tensors");
        let damaged = || format!("`{name}`");
        let of_peft = modules
            .keys()
            .any(|module| module.starts_with("base_model."))
            || path.file_name().is_some_and(|file| file == ADAPTER);
        let mut configs = [const { None }; 3];
        if let Some(json) = parts::metadata_json(&file, ADAPTER_METADATA)? {
            let parts = ["transformer", "text_encoder", "text_encoder_2"];
            configs = parts.map(|part| Some(AdapterConfig::of_part(&json, part)));
        } else if of_peft {
            let neighbour = path.with_file_name("adapter_config.json");
            if neighbour.is_file() {
                let text = std::fs::read_to_string(&neighbour)
                    .with_context(|| format!("cannot read `{}`", neighbour.display()))?;
                let json = serde_json::from_str(&text)
                    .with_context(|| format!("`{}` is not JSON", neighbour.display()))?;
                configs[0] = Some(AdapterConfig::new(json));
            }
        }
        let layout = parts::metadata_json(&file, LAYOUT)?
            .map(serde_json::from_value)
            .transpose()
            .with_context(damaged)?;
        let [transformer, clip, t5] = configs.map(Option::unwrap_or_default);
        Ok(Self {
            recorded: RecordedLora {
                file: std::path::absolute(&path).unwrap_or(path),
                weight: choice.weight,
                fingerprint,
                text: false,
            },
            name,
            file,
            modules,
            transformer,
            clip,
            t5,
            layout,
            by_slots: false,
        })
    }

    /// Takes a file that does not say for which pruned model it is, as earlier versions of fastflux wrote it, for one for
    /// `layout`.
    pub fn trained_in(&mut self, layout: &[BlockSpec]) {
        if self.layout.is_none() {
            self.layout = Some(layout.to_vec());
            self.by_slots = true;
        }
    }

    /// Whether it was trained next to the layers of one pruned model and is for that one only.
    pub fn is_of_pruned(&self) -> bool {
        self.layout.is_some()
    }

    /// Adds it to the tensors of a transformer, in its original names. `config` is that of the model, pruned or not.
    ///
    /// # Errors
    /// When a name or a shape is none of this model's, or nothing of the file applies.
    pub fn apply(&self, transformer: &mut Checkpoint, config: &FluxConfig) -> Result<Applied> {
        let ours = || {
            self.modules
                .iter()
                .filter(|(module, _)| text::module(module).is_none())
        };
        ensure!(
            self.layout
                .as_ref()
                .is_none_or(|layout| *layout == config.layout),
            "`{}` was trained next to the layers of another pruned model than this one",
            self.name
        );
        let names = Names::new(
            config,
            names::counts(ours().map(|(module, _)| module.as_str())),
        );
        let unknown = ours().filter(|(module, _)| names.place(module).is_none());
        let unknown: Vec<String> = unknown.map(|(module, _)| module.clone()).collect();
        if let Some(first) = unknown.first() {
            if let Some(what) = foreign::model(&self.file, &unknown) {
                bail!("`{}` {what}, not for {}", self.name, family(config));
            }
            bail!(
                "`{}`: {} of its {} modules are none of {}'s, the first is `{first}`",
                self.name,
                unknown.len(),
                self.modules.len(),
                family(config)
            );
        }
        let mut applied = Applied::new(self.file.len());
        let text = self.file.len() - ours().map(|(_, parts)| parts.len()).sum::<usize>();
        if config.shares_modulation() && text > 0 {
            applied.leave_out(None, "CLIP or T5", text);
        } else {
            applied.text = text;
        }
        for (module, parts) in ours() {
            let Some(place) = names.place(module) else {
                continue;
            };
            let block = place
                .block
                .map(|block| self.original(block, config))
                .transpose()?;
            let Some(target) = target(block, place.module, transformer, config) else {
                applied.leave_out(block, place.module, parts.len());
                continue;
            };
            let add = self.add(
                transformer,
                &target,
                (module, place),
                parts,
                config.hidden_size,
            );
            add.with_context(|| format!("`{}`: `{module}`", self.name))?;
            applied.tensors += parts.len();
        }
        ensure!(
            applied.tensors + applied.text > 0,
            "`{}`: nothing of it applies to `{}`: {}",
            self.name,
            transformer.name,
            applied.left_out()
        );
        Ok(applied)
    }

    /// The identity of the block that the file calls `block`.
    fn original(&self, block: BlockId, config: &FluxConfig) -> Result<BlockId> {
        let count = |kind: BlockKind| config.original_blocks(kind);
        let id = match &self.layout {
            Some(layout) if self.by_slots => in_slot(layout, block),
            _ => Some(block),
        };
        id.filter(|id| id.index < count(id.kind)).with_context(|| {
            format!(
                "`{}`: it is for a model with more blocks: it names {} block {}, and this one has {} double and {} single blocks",
                self.name,
                block.kind.as_str(),
                block.index,
                count(BlockKind::Double),
                count(BlockKind::Single)
            )
        })
    }

    fn add(
        &self,
        transformer: &mut Checkpoint,
        target: &str,
        (module, place): (&str, &Place),
        parts: &Parts,
        unit: usize,
    ) -> Result<()> {
        let changes = parts.changes(
            &self.name,
            &self.recorded.fingerprint,
            bare(module),
            self.recorded.weight,
            &self.transformer,
        )?;
        // norms have a scale where others have a weight
        let weight = (&["weight", "scale"][..], changes.weight);
        for (leaves, delta) in [weight, (&["bias"], changes.bias)] {
            let Some(delta) = delta else { continue };
            let found = leaves.iter().find_map(|leaf| {
                let name = format!("{target}.{leaf}");
                Some((transformer.get(&name)?, name))
            });
            let (tensor, name) =
                found.with_context(|| format!("this model has no `{target}.{}`", leaves[0]))?;
            let height = tensor.shape().first().copied().unwrap_or(1);
            let (map, rows) = place.part.rows(height, unit);
            let (shape, width) = (delta.shape()?, tensor.shape().get(1).copied().unwrap_or(1));
            if place.module == "img_in" && shape[0] == rows && shape[1] != width {
                bail!(
                    "it is a control LoRA: it widens the model's input from {width} to {} channels, which is not applied",
                    shape[1]
                );
            }
            ensure!(
                shape == [rows, width],
                "is for a weight of shape {shape:?}, this model's is [{rows}, {width}]: the file is for another model"
            );
            let adapted = tensor.adapted(&delta, map)?;
            transformer.insert(name, adapted);
        }
        Ok(())
    }

    /// Adds it to the tensors of a text encoder as `sample::text` names them. Number of tensors that were applied.
    ///
    /// # Errors
    /// When a name or a shape is none of the encoder's.
    pub fn apply_text(&self, encoder: TextEncoder, checkpoint: &mut Checkpoint) -> Result<usize> {
        let mut count = 0;
        let config = match encoder {
            TextEncoder::Clip => &self.clip,
            TextEncoder::T5 => &self.t5,
        };
        let mut names = None;
        for (module, parts) in &self.modules {
            let Some((_, bare)) = text::module(module).filter(|(other, _)| *other == encoder)
            else {
                continue;
            };
            let context = || format!("`{}`: `{module}`", self.name);
            let names = names.get_or_insert_with(|| text::names(checkpoint));
            let target = names.get(bare).with_context(|| {
                format!(
                    "{}: the text encoder `{}` has no such module",
                    context(),
                    checkpoint.name
                )
            })?;
            let (id, weight) = (&self.recorded.fingerprint, self.recorded.weight);
            let changes = parts
                .changes(&self.name, id, module, weight, config)
                .with_context(context)?;
            for (leaf, delta) in [("weight", changes.weight), ("bias", changes.bias)] {
                let Some(delta) = delta else { continue };
                let name = format!("{target}.{leaf}");
                let tensor = checkpoint.expect(&name).with_context(context)?;
                let height = tensor.shape().first().copied().unwrap_or(1);
                let (map, _) = names::Part::Whole.rows(height, 0);
                let adapted = tensor.adapted(&delta, map).with_context(context)?;
                checkpoint.insert(name, adapted);
            }
            count += parts.len();
        }
        Ok(count)
    }
}

/// The original module of a model, without `.weight`; `None` if the model has not got it.
fn target(
    block: Option<BlockId>,
    module: &str,
    transformer: &Checkpoint,
    config: &FluxConfig,
) -> Option<String> {
    let Some(id) = block else {
        let there = transformer.contains(&format!("{module}.weight"));
        return there.then(|| module.to_owned());
    };
    let mut slots = config.slots().into_iter();
    let slot = slots.find(|(spec, _)| **spec == BlockSpec::Original(id));
    slot.and_then(|(_, prefix)| Some(format!("{}.{module}", prefix?)))
}

/// The kept block in slot `slot` of a pruned model.
fn in_slot(layout: &[BlockSpec], slot: BlockId) -> Option<BlockId> {
    let mut slots = layout
        .iter()
        .filter(|spec| spec.kind() == slot.kind && spec.has_tensors());
    match slots.nth(slot.index)? {
        BlockSpec::Original(id) => Some(*id),
        BlockSpec::Replaced(_) => None,
    }
}

/// A module's name below the transformer, as PEFT's patterns have it.
fn bare(module: &str) -> &str {
    let prefixes = ["base_model.model.", "transformer.", "diffusion_model."];
    prefixes.iter().fold(module, |name, prefix| {
        name.strip_prefix(prefix).unwrap_or(name)
    })
}

fn family(config: &FluxConfig) -> &'static str {
    if config.shares_modulation() {
        "FLUX.2"
    } else {
        "FLUX.1"
    }
}

impl Checkpoint {
    /// The same tensors without what LoRA files add to them.
    #[must_use]
    pub fn unadapted(&self) -> Self {
        let mut out = self.clone();
        for (name, source) in self.iter() {
            out.insert(name, source.unadapted().clone());
        }
        out
    }
}
