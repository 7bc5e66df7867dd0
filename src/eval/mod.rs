//! Pairs of pictures and velocities → numbers, and the report that shows them. Nothing here draws or loads a model:
//! `commands::eval` does.

pub mod clip;
pub mod detect;
pub mod growth;
pub mod html;
pub mod latency;
pub mod metrics;
mod plot;
pub mod report;
pub mod scene;
pub mod velocity;
