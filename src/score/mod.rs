//! Calibration statistics → importance of blocks; higher = more important, always. One file per criterion.

pub mod ablation;
