//! What `--model` names: a transformer checkpoint with its configuration, and where the other parts of its
//! pipeline are.
//!
//! Resolves names and reads headers and configs; loading weights is left to `model` and `sample`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use candle::DType;
use serde_json::Value;

use crate::{
    checkpoint::{
        Checkpoint, advise,
        config::{self, ConfigFile},
        record::{self, Record, RecordedParts},
    },
    files::{BUNDLED, Blob, Files},
    layout::{BlockKind, FluxConfig},
};

pub mod defaults;
mod locate;

pub use defaults::Defaults;
use defaults::{MAX_SIDE, MIN_SIDE};
use locate::{DAMAGED, locate, speaks_of_flux};

/// The file with a model's own defaults for `generate`.
const DEFAULTS_FILE: &str = "fastflux.json";
/// Where text encoders and VAE of a bare FLUX.1 transformer come from: the same files as FLUX.1-dev's, under Apache-2.0.
const FLUX1_PARTS: &str = "black-forest-labs/FLUX.1-schnell";

/// How a user names a model and its parts.
#[derive(Clone, Debug, Default)]
pub struct ModelChoice {
    /// `--model`: nothing (the bundled model), a folder, a file, or a hub id.
    pub model: Option<String>,
    /// `--config`: JSON that says what tensors cannot.
    pub config: Option<PathBuf>,
    /// `--text-encoders`: a folder with text encoders and tokenizers.
    pub text_encoders: Option<PathBuf>,
    /// `--vae`: a VAE file or folder.
    pub vae: Option<PathBuf>,
}

impl ModelChoice {
    /// Fills in what flags left open from where it was before, as far as it is still there.
    fn take_parts(&mut self, parts: Option<&RecordedParts>) {
        let Some(parts) = parts else {
            return;
        };
        let there = |path: &Option<PathBuf>| path.clone().filter(|path| path.exists());
        self.text_encoders = self
            .text_encoders
            .take()
            .or_else(|| there(&parts.text_encoders));
        self.vae = self.vae.take().or_else(|| there(&parts.vae));
    }
}

/// Where a model's VAE is.
#[derive(Clone, Debug)]
pub enum VaeFiles {
    /// A folder in diffusers layout (`config.json` and weights).
    Folder(Files),
    /// One file, with diffusers or original names, and its name for messages.
    File(String, Blob),
}

/// An opened model: headers and configs are read, weights are not.
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// How messages and tables name the model.
    pub name: String,
    /// The `--model` value that opens it again from anywhere.
    pub locator: String,
    /// The transformer under the original names.
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
    parts: Parts,
}

/// Where to look for text encoders and VAE, in this order: flags, the model's own folder, its base model.
#[derive(Clone, Debug)]
struct Parts {
    choice: ModelChoice,
    own: Option<Files>,
    base: Option<String>,
    flux1: bool,
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
        let found = locate(choice.model.as_deref())?;
        let record = Record::read(&found.raw.name, &found.raw.metadata);
        let record = advise(record, DAMAGED)?;
        let diffusers = crate::checkpoint::diffusers::is_diffusers(&found.raw);
        let transformer = advise(config::canonical(&found.raw), DAMAGED)?;
        let mut configs = Vec::new();
        if let Some(path) = &choice.config {
            configs.push(ConfigFile::read(path).context("--config")?);
        }
        configs.extend(found.configs);
        configs.extend(metadata_config(&found.raw));
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
        let flux1 =
            config.head_dim() == 128 && config.context_in_dim == 4096 && config.vec_in_dim == 768;
        let (scheduler, scheduler_name) = scheduler(
            &configs,
            found.pipeline.as_ref(),
            known,
            &config,
            &found.raw.name,
        )?;
        let defaults = defaults(found.pipeline.as_ref(), record.as_ref(), &found.raw.name)?;
        if let Some(record) = &record {
            warn_of_kept_lora(record, found.pipeline.as_ref(), &found.raw.name)?;
        }
        let mut choice = choice.clone();
        choice.take_parts(known.map(|r| &r.parts));
        Ok(Self {
            name: choice.model.clone().unwrap_or_else(|| BUNDLED.to_owned()),
            locator: found.locator,
            transformer,
            diffusers,
            config,
            scheduler,
            scheduler_name,
            defaults,
            parts: Parts {
                choice,
                own: found.pipeline,
                base: record.as_ref().map(|r| r.base.clone()),
                flux1,
            },
            record,
        })
    }

    /// The model this one was pruned from, or itself.
    ///
    /// # Errors
    /// When the base cannot be opened, or is not the model the record says.
    pub fn base(&self) -> Result<Self> {
        self.base_with(&ModelChoice::default())
    }

    /// The same with flags for what lies beside the transformer; `choice.model` counts for nothing.
    ///
    /// # Errors
    /// As [`Self::base`].
    pub fn base_with(&self, choice: &ModelChoice) -> Result<Self> {
        let Some(record) = &self.record else {
            return Ok(self.clone());
        };
        let choice = ModelChoice {
            model: Some(record.base.clone()),
            ..choice.clone()
        };
        let base = Self::open_original(&choice, Some(record))
            .with_context(|| format!("`{}` was pruned from `{}`", self.name, record.base))?;
        let found = record::fingerprint(&base.transformer)?;
        ensure!(
            found == record.base_fingerprint,
            "`{}` is not the model that `{}` was pruned from (fingerprint {found}, expected {})",
            record.base,
            self.name,
            record.base_fingerprint
        );
        Ok(base)
    }

    /// The family, for people: from the model's own defaults, or by its sizes.
    pub fn family(&self) -> String {
        if let Some(family) = &self.defaults.family {
            return family.clone();
        }
        let c = &self.config;
        let blocks = (
            c.original_blocks(BlockKind::Double),
            c.original_blocks(BlockKind::Single),
        );
        let name = match blocks {
            (19, 38) if c.hidden_size == 3072 && c.guidance_embed => "FLUX.1-dev",
            (19, 38) if c.hidden_size == 3072 => "FLUX.1-schnell",
            (8, 38) if c.hidden_size == 3072 => "FLUX.1-lite",
            (5, 10) if c.hidden_size == 3072 => "flux-mini",
            _ if c.guidance_embed => "FLUX.1 with guidance embedding",
            _ => "FLUX.1 without guidance embedding",
        };
        name.to_owned()
    }

    /// Bytes that a weight of the transformer takes in memory when it computes in `dtype`, on average: packed ones stay
    /// packed.
    pub fn bytes_of_a_weight(&self, dtype: DType) -> f64 {
        let bytes = self.transformer.bytes_loaded(dtype) as f64;
        bytes / self.transformer.parameters().max(1) as f64
    }

    /// Steps to sample with when the user names none.
    pub fn default_steps(&self) -> usize {
        self.defaults
            .steps
            .unwrap_or(if self.config.guidance_embed { 28 } else { 4 })
    }

    /// Guidance when the user names none.
    pub fn default_guidance(&self) -> f64 {
        self.defaults
            .guidance
            .unwrap_or(if self.config.guidance_embed { 3.5 } else { 0.0 })
    }

    /// Width and height in pixels when the user names none: the model's own, its VAE's sample size, or FLUX.1's 1024.
    ///
    /// # Errors
    /// When the VAE's configuration is damaged, or no picture can have that size.
    pub fn default_size(&self) -> Result<usize> {
        if let Some(size) = self.defaults.size {
            return Ok(size);
        }
        let Some(own) = &self.parts.own else {
            return Ok(1024);
        };
        let vae = own.sub("vae");
        let json = vae.json("config.json")?;
        let size = json.and_then(|json| json.get("sample_size")?.as_u64());
        let size = size.map_or(1024, |size| size as usize);
        ensure!(
            (MIN_SIDE..=MAX_SIDE).contains(&size),
            "`{}`: `sample_size` is {size}: pictures are between {MIN_SIDE} and {MAX_SIDE} pixels wide and high\nhint: correct it, or name a size with --width and --height",
            vae.describe("config.json")
        );
        Ok(size)
    }

    /// The longest text the T5 encoder is given by default, in tokens: 512 with guidance embedding (dev), 256 without
    /// (schnell), or the limit of the model's own tokenizer where that is smaller.
    ///
    /// # Errors
    /// When the tokenizer's configuration is damaged.
    pub fn default_text_length(&self) -> Result<usize> {
        if let Some(length) = self.defaults.text_length {
            return Ok(length);
        }
        let family = if self.config.guidance_embed { 512 } else { 256 };
        let Some(own) = &self.parts.own else {
            return Ok(family);
        };
        let tokenizer = own.sub("tokenizer_2").json("tokenizer_config.json")?;
        // tokenizers without a limit give a huge float
        let limit = tokenizer.and_then(|json| json.get("model_max_length")?.as_u64());
        Ok(limit.map_or(family, |limit| family.min(limit as usize)))
    }

    /// The defaults as a file that leaves this folder must record them: with what VAE and tokenizer say.
    ///
    /// # Errors
    /// When their configurations are damaged.
    pub fn recorded_defaults(&self) -> Result<Defaults> {
        Ok(Defaults {
            size: Some(self.default_size()?),
            text_length: Some(self.default_text_length()?),
            ..self.defaults.clone()
        })
    }

    /// The text encoders and the VAE that flags or a record named, absolute, for the record of what is made of this model.
    pub fn recorded_parts(&self) -> RecordedParts {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        RecordedParts {
            text_encoders: self.parts.choice.text_encoders.as_ref().map(absolute),
            vae: self.parts.choice.vae.as_ref().map(absolute),
        }
    }

    /// The folder with text encoders and tokenizers.
    ///
    /// # Errors
    /// When there is none; the message names the flag.
    pub fn text_files(&self) -> Result<Files> {
        if let Some(dir) = &self.parts.choice.text_encoders {
            ensure!(
                dir.is_dir(),
                "--text-encoders: `{}` is not a folder",
                dir.display()
            );
            return Ok(Files::folder(dir));
        }
        self.part_of("text_encoder", "the text encoders", "--text-encoders DIR")
    }

    /// Where the VAE is.
    ///
    /// # Errors
    /// When there is none; the message names the flag.
    pub fn vae_files(&self) -> Result<VaeFiles> {
        if let Some(path) = &self.parts.choice.vae {
            if path.is_dir() {
                let folder = Files::folder(path);
                let nested = folder.sub("vae");
                return Ok(VaeFiles::Folder(if nested.list()?.is_empty() {
                    folder
                } else {
                    nested
                }));
            }
            return Ok(VaeFiles::File(
                path.display().to_string(),
                Blob::map(path).context("--vae")?,
            ));
        }
        let files = self.part_of("vae", "the VAE", "--vae FILE")?;
        Ok(VaeFiles::Folder(files.sub("vae")))
    }

    /// The pipeline folder that has the sub-folder `part`.
    fn part_of(&self, part: &str, what: &str, flag: &str) -> Result<Files> {
        let has = |files: &Files| anyhow::Ok(!files.sub(part).list()?.is_empty());
        if let Some(own) = &self.parts.own
            && has(own)?
        {
            return Ok(own.clone());
        }
        if let Some(base) = &self.parts.base {
            let found = locate(Some(base)).with_context(|| {
                format!(
                    "`{}` takes {what} from its base model `{base}`\nhint: name them with {flag}",
                    self.name
                )
            })?;
            if let Some(files) = found.pipeline
                && has(&files)?
            {
                return Ok(files);
            }
        }
        if self.parts.flux1 {
            crate::ui::note(format!(
                "taking {what} from {FLUX1_PARTS} on the hub ({flag} names others)"
            ));
            return Files::hub(FLUX1_PARTS, None)
                .with_context(|| format!("cannot fetch {what}; name them with {flag}"));
        }
        bail!(
            "`{}` comes without {what}\nhint: name them with {flag}",
            self.name
        )
    }
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

/// The scheduler: `--config`'s `scheduler`, the pipeline's own, the record's, or FLUX.1's where the sizes are FLUX.1's.
fn scheduler(
    configs: &[ConfigFile],
    pipeline: Option<&Files>,
    record: Option<&Record>,
    config: &FluxConfig,
    name: &str,
) -> Result<(Value, String)> {
    let said = |c: &ConfigFile| {
        let scheduler = c.json.get("scheduler")?.clone();
        Some((scheduler, format!("`{}`: its `scheduler`", c.name)))
    };
    if let Some(said) = configs.iter().find_map(said) {
        return Ok(said);
    }
    if let Some(files) = pipeline.map(|files| files.sub("scheduler"))
        && let Some(json) = files.json("scheduler_config.json")?
    {
        return Ok((
            json,
            format!("`{}`", files.describe("scheduler_config.json")),
        ));
    }
    if let Some(record) = record {
        let name = format!("`{name}`: the scheduler in its fastflux metadata");
        return Ok((record.scheduler.clone(), name));
    }
    if config.head_dim() != 128 {
        crate::ui::note(format!(
            "`{name}` names no scheduler: taking FLUX.1's (--config with a `scheduler` object names another)"
        ));
    }
    let scheduler = flux1_scheduler(config.guidance_embed);
    Ok((scheduler, "FLUX.1's scheduler".to_owned()))
}

/// FLUX.1-dev's (dynamic shift) and FLUX.1-schnell's scheduler, from their `scheduler_config.json`.
fn flux1_scheduler(dev: bool) -> Value {
    serde_json::json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": if dev { 3.0 } else { 1.0 },
        "use_dynamic_shifting": dev,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    })
}

/// The LoRA that `train-sandwich --keep-lora` writes beside the checkpoint.
pub const LORA_FILE: &str = "lora.safetensors";

/// Says that a model was trained with a LoRA that is not in its weights.
fn warn_of_kept_lora(record: &Record, folder: Option<&Files>, name: &str) -> Result<()> {
    let Some(training) = record.recipe.get("train-sandwich") else {
        return Ok(());
    };
    let recorded = training["kept-lora"].as_bool();
    // earlier versions did not record it
    let beside = || folder.map_or(Ok(false), |files| files.has(LORA_FILE));
    if recorded.map_or_else(beside, Ok)? {
        crate::ui::warn(format!(
            "`{name}` was trained together with a LoRA, `{LORA_FILE}`, that is not in its weights and is not applied here: pictures and numbers are those without it\nhint: `fastflux train-sandwich` without --keep-lora merges it; diffusers applies it with `load_lora_weights`"
        ));
    }
    Ok(())
}

fn defaults(pipeline: Option<&Files>, record: Option<&Record>, name: &str) -> Result<Defaults> {
    let read = |json: Value| {
        let defaults: Defaults = serde_json::from_value(json)?;
        defaults.check()?;
        anyhow::Ok(defaults)
    };
    if let Some(record) = record {
        return advise(read(record.defaults.clone()), DAMAGED)
            .with_context(|| format!("`{name}`: the defaults in its fastflux metadata"));
    }
    let Some(files) = pipeline else {
        return Ok(Defaults::default());
    };
    let Some(json) = files.json(DEFAULTS_FILE)? else {
        return Ok(Defaults::default());
    };
    advise(read(json), "correct it, or take it out")
        .with_context(|| format!("`{}`", files.describe(DEFAULTS_FILE)))
}
