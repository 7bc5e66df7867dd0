//! Importance and statistics → a plan, fitted layers, and the pruned checkpoint.
//!
//! Choosing blocks is `score`'s business, running the model `calibrate`'s; files are written by `commands`.

pub mod apply;
pub mod budget;
pub mod fit;
pub mod forecast;
pub mod gated;
pub mod layers;
pub mod outputs;
mod passing;
pub mod plan;
pub mod recipe;
pub mod refit;
mod replaced;
mod sums;
