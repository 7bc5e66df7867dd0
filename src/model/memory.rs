//! Memory that a forward takes, counted from the configuration alone, and which blocks may stay on the device within it.
//! Upper estimates of what is alive at once; what an allocator keeps beyond that is not in them.

use super::{cost, ops::MAX_SCORES};
use crate::layout::{BlockSpec, FluxConfig};

/// Streams that go together through a block that is read whenever it is run, unless more are asked for: each waits in a
/// twentieth of the memory that a block takes at work.
pub const BATCHES_PER_LOAD: usize = 8;

/// What a forward is computed with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ElementSizes {
    /// Bytes of an activation.
    pub element: u64,
    /// Bytes of a weight, on average: fewer if weights stay packed.
    pub weight: f64,
    /// Whether attention holds matrices of scores: see `ops::holds_scores`.
    pub scores: bool,
}

impl ElementSizes {
    fn of_weights(self, parameters: u64) -> u64 {
        (parameters as f64 * self.weight).ceil() as u64
    }
}

/// Bytes of all that is not a block: embedder and head.
pub fn outside(config: &FluxConfig, format: ElementSizes) -> u64 {
    format.of_weights(cost::embedder_and_head(config, 1, 1).parameters)
}

/// Bytes of each entry of the layout.
pub fn blocks(config: &FluxConfig, format: ElementSizes) -> Vec<u64> {
    let entries = config.layout.iter();
    entries
        .map(|spec| format.of_weights(cost::block(config, spec, 1, 1).parameters))
        .collect()
}

/// Bytes of all weights.
pub fn weights(config: &FluxConfig, format: ElementSizes) -> u64 {
    outside(config, format) + blocks(config, format).iter().sum::<u64>()
}

/// Bytes of the widest moment of a block without its weights, for `samples` of `tokens` text and image tokens together.
pub fn activations(
    config: &FluxConfig,
    samples: usize,
    tokens: usize,
    format: ElementSizes,
) -> u64 {
    let hidden = config.hidden_size as u64;
    let mlp = (config.mlp_in_size() + config.mlp_size) as u64;
    // a block's input and output and what is normed, q, k, v before and after their norms and what attention makes of them,
    // and the MLP before and after its activation; measured on the CPU (`bench --growth`): 20 to 22 times the width
    let widest = mlp + 14 * hidden;
    let rows = (samples * tokens) as u64;
    // two tensors of scores in f32
    let scores = MAX_SCORES.min(samples * config.num_heads * tokens * tokens) as u64;
    let scores = if format.scores { 2 * 4 * scores } else { 0 };
    rows * widest * format.element + scores
}

/// Bytes of the streams of `samples` of `tokens` tokens that wait for their turn at a block, [`BATCHES_PER_LOAD`] at most.
pub fn waiting(config: &FluxConfig, samples: usize, tokens: usize, format: ElementSizes) -> u64 {
    let stream = (samples * tokens * config.hidden_size) as u64 * format.element;
    (BATCHES_PER_LOAD as u64 - 1) * stream
}

/// Which entries of the layout stay on the device; the others are read whenever they are run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OffloadPlan {
    resident: Vec<bool>,
    /// Most bytes of weights that are on the device at once.
    pub bytes: u64,
}

impl OffloadPlan {
    /// Everything stays.
    pub fn all(config: &FluxConfig, format: ElementSizes) -> Self {
        Self {
            resident: vec![true; config.layout.len()],
            bytes: weights(config, format),
        }
    }

    /// No block stays, only layers that replace some.
    pub fn none(config: &FluxConfig, format: ElementSizes) -> Self {
        Self::filled(config, format, 0)
    }

    /// As many blocks as fit into `limit` bytes, spread evenly, so that each of them gives time to read the next one;
    /// `None` if not even two at a time fit.
    pub fn within(config: &FluxConfig, format: ElementSizes, limit: u64) -> Option<Self> {
        let all = Self::all(config, format);
        if all.bytes <= limit {
            return Some(all);
        }
        let least = Self::none(config, format);
        let room = limit.checked_sub(least.bytes)?;
        Some(Self::filled(config, format, room))
    }

    /// The blocks that fit into `room` bytes stay, spread as in [`Self::within`].
    pub fn filled(config: &FluxConfig, format: ElementSizes, room: u64) -> Self {
        let bytes = blocks(config, format);
        let original = |i: usize| matches!(config.layout[i], BlockSpec::Original(_));
        let of_originals = |f: &dyn Fn(usize) -> bool| -> u64 {
            let each = bytes.iter().enumerate();
            each.filter(|(i, _)| original(*i) && f(*i))
                .map(|(_, bytes)| bytes)
                .sum()
        };
        let all = of_originals(&|_| true).max(1);
        // what the blocks so far were given of the room; a block stays when that pays for it
        let (mut given, mut spent) = (0u128, 0u64);
        let fits = bytes.iter().enumerate().map(|(i, bytes)| {
            if !original(i) {
                return true;
            }
            given += u128::from(room.min(all)) * u128::from(*bytes) / u128::from(all);
            let fits = u128::from(spent + bytes) <= given;
            spent += if fits { *bytes } else { 0 };
            fits
        });
        let resident: Vec<bool> = fits.collect();
        let largest = |i: usize| if resident[i] { 0 } else { bytes[i] };
        let largest = (0..bytes.len()).map(largest).max().unwrap_or(0);
        // the one that computes, the next one, and a tensor of it in the file's format
        let widest = (3 * config.hidden_size + config.mlp_in_size()) * config.hidden_size;
        let on_their_way = match largest {
            0 => 0,
            largest => 2 * largest + widest as u64 * format.element,
        };
        let kept: u64 = (0..bytes.len())
            .filter(|i| resident[*i])
            .map(|i| bytes[i])
            .sum();
        Self {
            bytes: outside(config, format) + kept + on_their_way,
            resident,
        }
    }

    /// Whether entry `index` stays.
    pub fn is_resident(&self, index: usize) -> bool {
        self.resident.get(index).copied().unwrap_or(true)
    }

    /// Bytes of the original blocks that stay.
    pub fn bytes_of_blocks(&self, config: &FluxConfig, format: ElementSizes) -> u64 {
        let each = blocks(config, format).into_iter().zip(&config.layout);
        each.enumerate()
            .filter(|(i, (_, spec))| self.is_resident(*i) && matches!(spec, BlockSpec::Original(_)))
            .map(|(_, (bytes, _))| bytes)
            .sum()
    }

    /// How many entries stay on the device.
    pub fn count(&self) -> usize {
        self.resident.iter().filter(|resident| **resident).count()
    }

    /// How many entries there are.
    pub fn total(&self) -> usize {
        self.resident.len()
    }

    /// Whether everything stays.
    pub fn is_all(&self) -> bool {
        self.count() == self.total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::flux_dev;

    const BF16: ElementSizes = ElementSizes {
        element: 2,
        weight: 2.0,
        scores: true,
    };

    #[test]
    fn flux_dev_streams_its_blocks_within_4_gigabytes_and_stays_whole_within_25() {
        let config = flux_dev();
        let at_work = activations(&config, 1, 4608, BF16);
        // most of it scores
        assert!(at_work < 1_700_000_000, "{at_work}");
        let least = OffloadPlan::none(&config, BF16);
        assert_eq!(least.count(), 0);
        assert!(least.bytes < 2_000_000_000, "{}", least.bytes);
        assert!(least.bytes + at_work < 4_000_000_000);
        let whole = OffloadPlan::within(&config, BF16, 25_000_000_000).unwrap();
        assert!(whole.is_all());
        assert_eq!(whole.bytes, 2 * 11_901_408_320);
    }

    #[test]
    fn blocks_that_stay_fit_and_are_spread_over_the_trunk() {
        let config = flux_dev();
        let mut last = 0;
        for gigabytes in [2, 4, 8, 12, 16, 20, 23] {
            let limit = gigabytes * 1_000_000_000;
            let offload_plan = OffloadPlan::within(&config, BF16, limit).unwrap();
            assert!(offload_plan.bytes <= limit, "{gigabytes}");
            assert!(offload_plan.count() >= last, "{gigabytes}");
            last = offload_plan.count();
            // at most a block's worth of room is left
            let left = limit - offload_plan.bytes;
            assert!(left < 1_400_000_000, "{gigabytes}: {left} left");
        }
        let half = OffloadPlan::within(&config, BF16, 12_500_000_000).unwrap();
        let in_front: usize = (0..28).filter(|i| half.is_resident(*i)).count();
        let behind: usize = (28..57).filter(|i| half.is_resident(*i)).count();
        assert!(in_front.abs_diff(behind) < 8, "{in_front} and {behind}");
        assert_eq!(OffloadPlan::within(&config, BF16, 1_000_000_000), None);
    }
}
