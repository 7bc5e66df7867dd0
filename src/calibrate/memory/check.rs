//! Whether what a calibration takes is there: memory of device and host, and disk.

use std::path::Path;

use anyhow::{Result, bail};

use super::CalibrationEstimate;
use crate::{checkpoint::target, ui};

impl CalibrationEstimate {
    /// With what is written to `output`: `more` bytes next to statistics, images and temporary files.
    #[must_use]
    pub fn with_output(mut self, output: &Path, more: u64) -> Self {
        self.disk = self.bytes.file + self.bytes.temporary_file + more;
        self.free_disk = target::free_space(output);
        self
    }

    /// Fails if more memory or disk is needed than is free.
    ///
    /// # Errors
    /// The message says how much is missing and which flags take less.
    pub fn check(&self) -> Result<()> {
        let short = |needed: u64, free: Option<u64>| free.filter(|free| *free < needed);
        let size = |bytes: u64| ui::bytes(bytes as f64);
        let device = if self.details.on_cpu {
            self.bytes.host
        } else {
            self.bytes.device
        };
        if let Some(free) = short(device, self.free) {
            bail!(
                "it cannot work here: {} of memory are needed on {}, {} are free\nhint: --offload and --max-vram keep fewer blocks, --stats-memory fewer sums; smaller images (--width, --height) and fewer prompts (--num-prompts) take less",
                size(device),
                self.runtime,
                size(free)
            )
        }
        if let Some(free) = short(self.bytes.host, self.free_host) {
            bail!(
                "it cannot work here: {} of host memory are needed, {} are free\nhint: smaller images (--width, --height) and fewer prompts (--num-prompts) take less",
                size(self.bytes.host),
                size(free)
            )
        }
        if let Some(free) = short(self.disk, self.free_disk) {
            bail!(
                "it cannot work here: {} are written, {} are free on the disk of the output\nhint: free some space, or choose another --output",
                size(self.disk),
                size(free)
            )
        }
        Ok(())
    }
}
