//! Runs the model on its own pictures and observes its blocks.

pub mod states;
pub mod stats;
