//! Sandwich training: heals a pruned model by moving the replaced layers and LoRA factors next to them towards what the
//! unpruned model computes, one sandwich after another, then all end to end (FastFLUX, arXiv 2506.10035).

mod arithmetic;
pub mod backward;
pub mod card;
pub mod data;
mod images;
pub mod lock;
mod log;
pub mod loss;
pub mod memory;
mod merge;
pub mod muon;
pub mod optimiser;
pub mod options;
mod output;
pub mod pair;
pub mod peft;
mod phase;
pub mod progress;
pub mod recipe;
pub mod report;
mod run;
mod samples;
pub mod sandwich;
pub mod setup;
pub mod state;
pub mod strategy;
pub mod trainables;
mod trained;

pub use log::{Entry, PhaseReport};
pub use output::write;
pub use run::{TrainObserver, Training};
pub use trained::{Trained, train};
