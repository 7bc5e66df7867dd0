//! What the fits behind a calibration take, besides forwards and token streams.

use super::bytes_of_sums;
use crate::layout::FluxConfig;

/// The projections of kept blocks that are refitted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Refits {
    /// Inputs of the widest; 0: none is refitted.
    pub widest: usize,
    /// Operations for each token.
    pub flops_per_token: f64,
    /// Operations of all solutions.
    pub flops: f64,
}

impl Refits {
    /// Bytes of sums and solver on the host, and of sums on a device of its own memory: those of the layers of both streams,
    /// each of a part to fit on and one left out, or of the widest projection, whichever is more.
    pub(super) fn bytes(&self, config: &FluxConfig, on_cpu: bool) -> (u64, u64) {
        let (d, k) = (config.hidden_size as u64, self.widest as u64);
        let matrix = |k: u64| 8 * (k + 1) * (k + 1);
        // one stream's sums become matrices, and a factor is made, while the other's wait
        let layers = 2 * bytes_of_sums(config) + 2 * matrix(d);
        // the sums become a matrix, which is factored; also right-hand sides and a solution
        let refit = 2 * matrix(k) + 3 * 8 * (k + 1) * d;
        let host = if k > 0 { layers.max(refit) } else { layers };
        let device = if on_cpu {
            0
        } else {
            (3 * bytes_of_sums(config)).max(4 * k * (k + d))
        };
        (host, device)
    }
}
