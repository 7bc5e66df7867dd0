//! fastflux: prune FLUX.1 by replacing its least important transformer blocks by linear layers.
//!
//! Modules stand in the order of the pipeline; each imports only what lies below it in this diagram.
//!
//! ```text
//!  --model ──▶ files ──▶ checkpoint ──▶ pipeline         which tensors, configs, scheduler, text encoders, VAE
//!                                          │
//!                      prompts ──▶ sample ─┤             prompts → text encoders → noise → Euler steps → latents → VAE → images
//!                                   model ─┘             the transformer, its kernels, and what it takes of memory
//!                                          │
//!                                          ▼
//!                                      calibrate         images, noised again, through the model: sums of every block
//!                                          │             (stats.safetensors)
//!                            ┌─────────────┼──────────┐
//!                            ▼             ▼          ▼
//!                           fit ──────▶ score ─────▶ prune    least squares → importance (scores.json) → a plan (plan.json),
//!                                                     │       fitted layers, the pruned checkpoint
//!                                                     ▼
//!                                                   train     layers and LoRA next to them towards the unpruned model
//!                                                     │
//!                                   eval, bench, verify       what it costs and what it brings; plot draws the charts
//! ```
//!
//! `cli` defines flags, `commands` turns them into the options of a stage, calls it, and writes its report.

// what everything speaks of
pub mod layout;
pub mod quant;

// a model's files, and the tensors in them
pub mod checkpoint;
pub mod files;
pub mod pipeline;

// the transformer, and prompt → image around it
pub mod model;
pub mod sample;

// which blocks matter, and what takes the place of the others
pub mod calibrate;
pub mod fit;
pub mod prune;
pub mod score;

// heal what was cut
pub mod train;

// what it cost and what it brought
pub mod bench;
pub mod eval;
pub mod plot;
pub mod verify;

// where to compute, and how to talk
pub mod cli;
pub mod commands;
pub mod device;
pub mod ui;
