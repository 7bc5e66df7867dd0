//! Least squares: from sums over tokens to layers. Knows tensors and layers of the model, no prompts and no files.

pub mod gated;
pub mod gram;
pub mod layers;
pub mod on_gpu;
pub mod ridge;
pub mod running;
