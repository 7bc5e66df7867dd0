//! Prompt → latent → picture: everything around the transformer, each part equal to diffusers. Calibration and pruning run on top of it.

mod clip;
pub mod denoise;
pub mod grid;
pub mod latents;
pub mod noise;
pub mod png;
pub mod schedule;
mod t5;
pub mod text;
mod text_files;
mod text_ops;
pub mod tokenize;
mod tokenize_build;
pub mod vae;
mod vae_files;
pub mod vae_keys;
mod vae_layers;
mod vae_ops;
