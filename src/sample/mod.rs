//! Prompt → latent → picture: everything around the transformer, each part equal to diffusers. Calibration and pruning run on top of it.

pub mod denoise;
pub mod grid;
pub mod image;
pub mod latents;
pub mod noise;
pub mod png;
pub mod schedule;
pub mod text;
pub mod tokenize;
pub mod vae;
