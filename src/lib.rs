//! fastflux: prune FLUX.1 by replacing its least important transformer blocks by linear layers.

// what everything speaks of
pub mod layout;

// a model's files, and the tensors in them
pub mod checkpoint;
pub mod files;
pub mod pipeline;

// the transformer
pub mod model;

// prompt → picture
pub mod sample;

// where to compute, and how to talk
pub mod device;
pub mod ui;
