//! Stands in for `upload` in builds without CUDA: nothing is page-locked.

use candle::Device;

/// Memory that GPUs read directly; there is none.
#[derive(Debug)]
pub struct PageLocked;

impl PageLocked {
    /// Locks nothing.
    pub fn new(_: &[u8], _: Box<dyn Send + Sync>, _: &Device) -> Option<Self> {
        None
    }
}
