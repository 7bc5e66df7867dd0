//! Which tokens of a forward enter the sums of least squares: all, or a number of them, evenly spread and others in every
//! forward.

use anyhow::Result;
use candle::{Device, Tensor};

/// Tokens that enter the products of a calibration.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TokenSubset {
    /// At most this many of each stream of one forward; `None`: all.
    pub(super) limit: Option<usize>,
    /// Number of the forward.
    pub(super) forward: u64,
}

impl TokenSubset {
    /// `None` if all `n` tokens are taken.
    pub(super) fn indices(self, n: usize) -> Option<Vec<u32>> {
        const GOLDEN: f64 = 0.618_033_988_749_894_9;
        let limit = self.limit.filter(|limit| *limit < n)?;
        let stride = n as f64 / limit as f64;
        let shift = (self.forward as f64 * GOLDEN) % 1.0;
        let row = |i| (((i as f64 + shift) * stride) as u32).min(n as u32 - 1);
        Some((0..limit).map(row).collect())
    }
}

/// The tokens of each sample of a forward that sums are made of, the same of all `samples`, (chosen,): about `limit` in
/// all, as `TokenSubset` spreads them; `None` if all are taken.
///
/// # Errors
/// When memory is short.
pub fn from_samples(
    samples: usize,
    tokens: usize,
    limit: Option<usize>,
    forward: usize,
    device: &Device,
) -> Result<Option<Tensor>> {
    let subset = TokenSubset {
        limit: limit.map(|limit| limit.div_ceil(samples.max(1)).max(1)),
        forward: forward as u64,
    };
    let chosen = subset.indices(tokens);
    Ok(chosen
        .map(|chosen| Tensor::new(chosen, device))
        .transpose()?)
}

/// `x` (b, n, …) at the chosen tokens and samples; all if `None`.
///
/// # Errors
/// When an index is out of range.
pub fn pick(x: &Tensor, samples: Option<&Tensor>, tokens: Option<&Tensor>) -> Result<Tensor> {
    let mut x = x.clone();
    if let Some(samples) = samples {
        x = x.contiguous()?.index_select(samples, 0)?;
    }
    if let Some(tokens) = tokens {
        x = x.contiguous()?.index_select(tokens, 1)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn chosen_tokens_are_spread_evenly_and_differ_between_forwards() {
        let rows = |forward| {
            TokenSubset {
                limit: Some(4),
                forward,
            }
            .indices(12)
            .unwrap()
        };
        assert_eq!(rows(0), [0, 3, 6, 9]);
        assert_eq!(rows(1), [1, 4, 7, 10]);
        assert!((0..100).flat_map(rows).all(|row| row < 12));
        let seen: BTreeSet<u32> = (0..10).flat_map(rows).collect();
        assert_eq!(seen.len(), 12, "every token gets its turn");
        let all = TokenSubset {
            limit: Some(12),
            forward: 3,
        };
        assert_eq!(all.indices(12), None);
    }

    #[test]
    fn tokens_are_spread_evenly_and_move_on() {
        let chosen = |limit, batch| {
            let chosen = from_samples(2, 100, limit, batch, &Device::Cpu).unwrap();
            chosen.map(|t| t.to_vec1::<u32>().unwrap())
        };
        assert_eq!(chosen(None, 0), None);
        assert_eq!(chosen(Some(200), 0), None);
        assert_eq!(chosen(Some(8), 0), Some(vec![0, 25, 50, 75]));
        let mut later = chosen(Some(8), 1).unwrap();
        assert_ne!(later, [0, 25, 50, 75]);
        assert_eq!(chosen(Some(8), 1), Some(later.clone()));
        later.sort_unstable();
        assert!(later.windows(2).all(|w| w[1] - w[0] == 25), "{later:?}");
    }
}
