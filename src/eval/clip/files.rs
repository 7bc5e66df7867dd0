//! CLIP scores of an evaluation's images: finds the CLIP model, and loads it when nothing else is on the device.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use candle::Device;

use super::model::ClipModel;
use crate::{
    checkpoint::Checkpoint,
    device::Runtime,
    files::{Files, parse_id},
    sample::png::Image,
    ui::Reporter,
};

/// The files of a scorer's model: a folder or a hub id. `what` may be named, for messages.
pub(in crate::eval) fn named_files(name: &str, what: &str, reporter: &Reporter) -> Result<Files> {
    let path = Path::new(name);
    match parse_id(name) {
        _ if path.is_dir() => Ok(Files::folder(path)),
        Some((repo, revision)) if !name.starts_with(['.', '/', '~']) => {
            Files::hub(&repo, revision.as_deref(), reporter)
        }
        _ => bail!("`{name}` does not exist\nhint: name {what}"),
    }
}

/// The files of a CLIP model that is not loaded yet.
#[derive(Clone, Debug)]
pub struct ClipFiles {
    /// As it was named.
    pub name: String,
    files: Files,
    reporter: Reporter,
}

impl ClipFiles {
    /// A folder or a hub id.
    ///
    /// # Errors
    /// When it holds no CLIP model, before anything is sampled.
    pub fn find(name: &str, reporter: &Reporter) -> Result<Self> {
        let what = "a folder or a hub id such as openai/clip-vit-large-patch14";
        let files = named_files(name, what, reporter).context("--clip")?;
        let whole = Checkpoint::open(&files, "model").context("--clip")?;
        let config = files.json("config.json").context("--clip")?;
        ensure!(
            config.is_some() && whole.contains("visual_projection.weight"),
            "--clip: `{name}` holds no whole CLIP in transformers layout (config.json and model.safetensors with both models)\nhint: openai/clip-vit-large-patch14 is one"
        );
        // seconds now, or a damaged file is found after hours
        ClipModel::open(&files, &Device::Cpu).context("--clip")?;
        Ok(Self {
            name: name.to_owned(),
            files,
            reporter: reporter.clone(),
        })
    }

    /// 100 · cosine of prompt and image, for each row of `images` (one model's images, in the order of the prompts).
    ///
    /// # Errors
    /// When the model cannot be loaded or an image cannot be prepared.
    pub fn scores(
        &self,
        prompts: &[String],
        images: &[Vec<Image>],
        runtime: &Runtime,
    ) -> Result<Vec<Vec<f64>>> {
        let progress = self.reporter.progress(images.len(), "scoring with CLIP");
        let model = ClipModel::open(&self.files, &runtime.device).context("--clip")?;
        let texts = model.texts(prompts)?;
        let mut out = Vec::new();
        for of_model in images {
            out.push(model.scores(&texts, of_model)?);
            progress.inc(1);
        }
        self.reporter
            .done(&progress, format!("scored images with `{}`", self.name));
        Ok(out)
    }
}
