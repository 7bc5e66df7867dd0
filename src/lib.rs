//! fastflux: prune FLUX.1 by replacing its least important transformer blocks by linear layers.

pub mod sample;
