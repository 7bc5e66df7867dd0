//! The numbers of an estimate: forwards, operations, bytes.

use serde::Serialize;

/// Counts for the two parts of a calibration.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Forwards {
    /// Forwards of sampling images.
    pub sampling: usize,
    /// Forwards of running the noised latents.
    pub statistics: usize,
}

/// Floating-point operations.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Flops {
    /// Of sampling images.
    pub sampling: f64,
    /// Of running the noised latents.
    pub statistics: f64,
    /// Of the products of the sums.
    pub products: f64,
    /// Of scoring blocks by running the model; 0 if the plan is given.
    pub scoring: f64,
    /// Of the fits that follow, if they do: both models' forwards, and the refits of what is kept.
    pub fits: f64,
}

/// Bytes of memory, and of the file.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bytes {
    /// Weights that are on the device at one time.
    pub weights: u64,
    /// All sums.
    pub statistics: u64,
    /// The widest moment of a forward, and the products next to the sums.
    pub activations: u64,
    /// Latents of all images.
    pub images: u64,
    /// The statistics file.
    pub file: u64,
    /// Fitted layers and the solver.
    pub solving: u64,
    /// Token streams of the sequential fits, in memory.
    pub streams: u64,
    /// Token streams of the sequential fits for which there is no room there, in a temporary file next to the output.
    pub temporary_file: u64,
    /// All that is on the device at one time, with what the driver takes of a GPU.
    pub device: u64,
    /// All that is on the host at one time.
    pub host: u64,
}
