//! fastflux: prune FLUX.1 by replacing its least important transformer blocks by linear layers.

// what everything speaks of
pub mod layout;
pub mod quant;

// a model's files, and the tensors in them
pub mod checkpoint;
pub mod files;
pub mod pipeline;

// the transformer, and prompt → picture around it
pub mod model;
pub mod sample;

// which blocks matter, and what takes the place of the others
pub mod calibrate;
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
