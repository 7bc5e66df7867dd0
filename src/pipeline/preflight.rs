//! What headers and small files tell about a pipeline before any tensor is computed: every command asks here first, and so
//! does its dry run.

use anyhow::{Context, Result, ensure};

use super::{Pipeline, family, load};
use crate::sample::text::TextEncoders;

impl Pipeline {
    /// Fails at a model that cannot generate from a prompt alone.
    ///
    /// # Errors
    /// When it takes other channels than it predicts.
    pub fn check_inputs(&self) -> Result<()> {
        ensure!(
            self.config.in_channels == self.config.out_channels,
            "`{}` takes {} input channels but predicts {}: models that take an image as input (Fill, Canny, Depth) cannot generate from a prompt alone",
            self.name,
            self.config.in_channels,
            self.config.out_channels
        );
        Ok(())
    }

    /// Fails at a model that does not take reference images as klein and Kontext do.
    ///
    /// # Errors
    /// When it caches its reference images' keys and values, which is not built.
    pub fn check_references(&self, count: usize) -> Result<()> {
        let class = family::class_of(self.components.own.as_ref());
        let cached = class.is_some_and(|class| class.contains("KleinKV"));
        ensure!(
            count == 0 || !cached,
            "--image: `{}` is FLUX.2 [klein]'s KV variant, which computes its reference images once, at a time of their own: that is not built\nhint: use FLUX.2 [klein] itself for reference images, or leave out --image",
            self.name
        );
        Ok(())
    }

    /// Checks all that images are made with: input channels, scheduler, text encoders and VAE. What would have to be
    /// downloaded first is left for later.
    ///
    /// # Errors
    /// When a part is missing or damaged, or does not fit the transformer; the message names the file and the flag.
    pub fn check_parts(&self, with_vae: bool) -> Result<()> {
        self.check_inputs()?;
        load::schedule(self)?;
        if self.components.choice.text_encoders.is_some() || !self.takes_from_hub("text_encoder") {
            let files = self.text_files()?;
            let remote = files
                .folder
                .as_ref()
                .is_some_and(|f| f.resolved().is_some());
            if !remote {
                let widths = [self.config.context_in_dim, self.config.vec_in_dim];
                TextEncoders::check(self.config.family.text, &files, widths)?;
            }
        }
        if with_vae && (self.components.choice.vae.is_some() || !self.takes_from_hub("vae")) {
            let files = self.vae_files()?;
            if !files.is_remote() {
                let channels = files.sizes().context("the VAE")?.latent_channels;
                ensure!(
                    4 * channels == self.config.out_channels,
                    "the VAE has {channels} latent channels, but `{}` predicts {} (four times as many as its VAE has)\nhint: name the model's own with --vae",
                    self.name,
                    self.config.out_channels
                );
            }
        }
        Ok(())
    }
}
