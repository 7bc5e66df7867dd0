//! What `--model` names: a transformer checkpoint with its configuration, and where the other components of its
//! pipeline are; loads them onto the device.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle::DType;
use serde_json::Value;

use crate::{
    checkpoint::{
        Checkpoint,
        config::{self, ConfigFile},
        lora::{Lora, LoraChoice},
        part::Part,
        record::{self, Record},
        with_hint,
    },
    files::Files,
    layout::FluxConfig,
    ui::Reporter,
};

pub mod card;
mod components;
pub mod convert;
pub mod decoder;
pub mod defaults;
pub mod diff;
mod family;
pub mod generate;
mod guidance;
pub mod inspect;
mod known;
pub mod load;
mod locate;
mod lora;
mod patch;
pub mod placement;
pub mod preflight;
pub mod prompts;
mod scheduler;
pub mod whole;

use components::Components;
pub use components::VaeFiles;
pub use defaults::Defaults;
use guidance::Evidence;
use locate::{DAMAGED, locate, speaks_of_flux};
pub use lora::OpenedLora;
pub use patch::PatchChoice;

/// How a user names a model and its parts.
#[derive(Clone, Debug, Default)]
pub struct ModelChoice {
    /// `--model`: nothing (the bundled model), a folder, a file, or a hub id.
    pub model: Option<String>,
    /// `--config`: JSON that says what tensors cannot.
    pub config: Option<PathBuf>,
    /// `--text-encoders`: a folder with text encoders and tokenizers, or files with commas between.
    pub text_encoders: Option<PathBuf>,
    /// `--vae`: a VAE file or folder.
    pub vae: Option<PathBuf>,
    /// `--fetch-base`: whether the model that a checkpoint says it was made of may be downloaded.
    pub fetch_base: bool,
    /// `--lora`: files that are added to the weights.
    pub lora: Vec<LoraChoice>,
    /// `--patch`: what makes `model` a pruned model.
    pub patch: Option<PatchChoice>,
    /// Who is told what is opened and downloaded.
    pub reporter: Reporter,
}

/// An opened model: headers and configs are read, weights are not.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// How messages and tables name the model.
    pub name: String,
    /// The `--model` value that opens it again from anywhere.
    pub model_ref: String,
    /// The transformer under the original names, with what LoRA files add to it.
    pub transformer: Checkpoint,
    /// Whether the file had diffusers' names.
    pub diffusers: bool,
    /// Sizes and layout.
    pub config: FluxConfig,
    /// What fastflux recorded, when it wrote the checkpoint.
    pub record: Option<Record>,
    /// The scheduler's configuration, in diffusers' form.
    pub scheduler: Value,
    /// Where the scheduler's configuration stands, for messages.
    pub scheduler_name: String,
    /// The model's own defaults.
    pub defaults: Defaults,
    /// What images are to be unlike, for a model that takes a negative prompt.
    pub negative_prompt: String,
    /// Scale of the negative prompt, if it is asked for.
    true_cfg: Option<f64>,
    /// Why a model without guidance embedding is taken as one that was not distilled.
    evidence: Option<Evidence>,
    /// The files that were added to it.
    pub lora: Vec<OpenedLora>,
    /// What is added to text encoders.
    text_lora: Vec<Lora>,
    /// Who is told about the work with it.
    pub reporter: Reporter,
    components: Components,
}

impl Pipeline {
    /// Opens what the user named; only headers and small files are read.
    ///
    /// # Errors
    /// When nothing is there, it is not a FLUX model, files are damaged, or configs contradict the tensors.
    pub fn open(choice: &ModelChoice) -> Result<Self> {
        Self::open_original(choice, None)
    }

    /// Opens the unpruned model that `of` was made from: what its files do not say (rotary axes, scheduler) is taken from
    /// there. Any other model is opened as [`Self::open`] does.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_original(choice: &ModelChoice, of: Option<&Record>) -> Result<Self> {
        let choice = &patch::resolved(choice)?;
        let located = locate(choice.model.as_deref(), &choice.reporter)?;
        for note in &located.raw.notes {
            choice.reporter.note(note);
        }
        let record = Record::read(&located.raw.name, &located.raw.metadata);
        let record = with_hint(record, DAMAGED)?;
        // diffusers' `save_pretrained` keeps it in config.json alone
        let of_config = |config: &ConfigFile| {
            let value = config.json.get(record::KEY)?.clone();
            Some(Record::from_value(&config.name, value))
        };
        let mut record = match record {
            Some(record) => Some(record),
            None => located.configs.iter().find_map(of_config).transpose()?,
        };
        let diffusers = crate::checkpoint::diffusers::is_diffusers(&located.raw);
        let mut transformer = with_hint(config::canonical(&located.raw), DAMAGED)?;
        if let Some(file) = &choice.patch {
            let (patched, of) = patch::apply(file, &transformer, &located.model_ref)?;
            (transformer, record) = (patched, Some(of));
        }
        let mut configs = Vec::new();
        if let Some(path) = &choice.config {
            configs.push(ConfigFile::read(path).context("--config")?);
        }
        configs.extend(located.configs);
        configs.extend(metadata_config(&located.raw));
        if choice.patch.is_some() {
            patch::forget_counts(&mut configs);
        }
        let known = match (&record, of) {
            (None, Some(of)) if record::fingerprint(&transformer)? == of.base_fingerprint => {
                configs.push(ConfigFile {
                    name: "the record of the pruned model".to_owned(),
                    json: serde_json::json!({ "axes_dims_rope": of.axes_dims, "theta": of.theta }),
                });
                Some(of)
            }
            _ => record.as_ref(),
        };
        let config = config::infer(&transformer, record.as_ref(), &configs)?;
        let (scheduler, scheduler_name) = scheduler::of_model(
            &configs,
            located.pipeline.as_ref(),
            known,
            &config,
            &located.raw.name,
            &choice.reporter,
        )?;
        let defaults = defaults::of_model(
            located.pipeline.as_ref(),
            record.as_ref(),
            &located.raw.name,
        )?
        .with_distilled(&config, located.pipeline.as_ref(), &located.model_ref)?
        .or_of(known)?;
        let folder = located.pipeline.as_ref();
        let kept = match &choice.patch {
            Some(patch) => Some(patch.path.clone()),
            None => folder.map(|files| PathBuf::from(files.describe(LORA_FILE))),
        };
        let kept = kept.as_deref().filter(|_| record.is_some());
        if let Some(record) = &record {
            lora::note_kept(record, (kept, folder), choice, &located.raw.name)?;
        }
        let lora = lora::apply(choice, &mut transformer, &config, kept)?;
        let mut text_lora = lora::for_text(record.as_ref(), &choice.reporter);
        text_lora.extend(lora.iter().map(|opened| opened.lora.clone()));
        choice.reporter.detail(format!(
            "opened `{}`: {} tensors, {}",
            located.model_ref,
            transformer.len(),
            crate::ui::bytes(transformer.bytes() as f64)
        ));
        let mut choice = choice.clone();
        let folder = located.pipeline.as_ref().and_then(Files::on_disk);
        let base = known.and_then(|record| known::base_of(record, folder));
        choice.fill_from(base.as_ref());
        let mut pipeline = Self {
            name: lora::name(&patch::name(&choice), &lora),
            model_ref: located.model_ref,
            transformer,
            diffusers,
            scheduler,
            scheduler_name,
            defaults,
            negative_prompt: String::new(),
            true_cfg: None,
            evidence: None,
            lora,
            text_lora,
            reporter: choice.reporter.clone(),
            components: Components {
                choice,
                inside: holds_more(&located.raw).then(|| located.raw.clone()),
                own: located.pipeline,
                base: record.as_ref().map(|r| r.base.clone()),
                place: base.map(|base| base.model),
                hub: components::hub(&config),
            },
            config,
            record,
        };
        let released = pipeline.has_released_scheduler();
        let (locator, scheduler) = (&pipeline.model_ref, &pipeline.scheduler);
        if let Some(evidence) = guidance::evidence(&pipeline.config, locator, scheduler, released) {
            pipeline.undistill(evidence);
        }
        Ok(pipeline)
    }

    /// The model this one was pruned from, with the same LoRA, or itself.
    ///
    /// # Errors
    /// When the base cannot be opened, or is not the model the record says.
    pub fn base(&self) -> Result<Self> {
        self.base_with(&ModelChoice {
            reporter: self.reporter.clone(),
            ..ModelChoice::default()
        })
    }

    /// The same with flags for what lies next to the transformer; `choice.model` and `choice.lora` count for nothing.
    ///
    /// # Errors
    /// As [`Self::base`].
    pub fn base_with(&self, choice: &ModelChoice) -> Result<Self> {
        let Some(record) = &self.record else {
            return Ok(self.clone());
        };
        let context = || format!("`{}` was pruned from `{}`", self.name, record.base);
        let mut lora = lora::choices(record).with_context(context)?;
        lora.extend(self.shared_lora());
        let choice = ModelChoice {
            model: Some(self.base_ref(&record.base)?),
            lora,
            patch: None,
            ..choice.clone()
        };
        let base = Self::open_original(&choice, Some(record)).with_context(context)?;
        let fingerprint = record::fingerprint(&base.transformer.unadapted())?;
        ensure!(
            fingerprint == record.base_fingerprint,
            "`{}` is not the model that `{}` was pruned from (fingerprint {fingerprint}, expected {})",
            record.base,
            self.name,
            record.base_fingerprint
        );
        Ok(base)
    }

    /// What to record of a checkpoint with this layout that `recipe` made of this model.
    ///
    /// # Errors
    /// When a configuration next to the model is damaged.
    pub fn record_of(&self, config: &FluxConfig, recipe: Value) -> Result<Record> {
        let before = self.record.as_ref();
        Ok(Record {
            version: record::VERSION,
            tool: record::software(),
            base: before.map_or_else(|| self.public_name(), |r| known::name_of(&r.base)),
            base_fingerprint: match before {
                Some(before) => before.base_fingerprint.clone(),
                None => {
                    let fingerprint = record::fingerprint(&self.transformer.unadapted())?;
                    self.remember(&fingerprint);
                    fingerprint
                }
            },
            lora: self.recorded_lora(),
            layout: config.layout.clone(),
            axes_dims: config.axes_dims.clone(),
            theta: config.theta,
            scheduler: self.scheduler.clone(),
            parts: record::RecordedParts::default(),
            defaults: serde_json::to_value(self.recorded_defaults()?)?,
            earlier: before.map_or_else(Vec::new, |r| {
                [&r.earlier[..], std::slice::from_ref(&r.recipe)].concat()
            }),
            recipe,
        })
    }

    /// Bytes that a weight of the transformer takes in memory when it computes in `dtype`, on average: packed ones stay
    /// packed.
    pub fn bytes_of_a_weight(&self, dtype: DType) -> f64 {
        let bytes = self.transformer.bytes_loaded(dtype) as f64;
        bytes / self.transformer.parameters().max(1) as f64
    }
}

/// Whether a file holds other parts than the transformer.
fn holds_more(raw: &Checkpoint) -> bool {
    [Part::Clip, Part::T5, Part::Qwen3, Part::Vae]
        .into_iter()
        .any(|part| part.is_in(raw))
}

/// The `config` that some tools store in a file's metadata.
fn metadata_config(raw: &Checkpoint) -> Option<ConfigFile> {
    let json: Value = serde_json::from_str(raw.metadata.get("config")?).ok()?;
    let json = json.get("transformer").cloned().unwrap_or(json);
    speaks_of_flux(&json).then(|| ConfigFile {
        name: format!("{}: metadata `config`", raw.name),
        json,
    })
}

/// The LoRA that `train-sandwich --keep-lora` writes next to the checkpoint.
pub const LORA_FILE: &str = "lora.safetensors";
