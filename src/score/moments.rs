//! The criteria that are plain sums over tokens: relative change and cosine, whole, by stream and by noise level.

use super::{AtTime, Part};
use crate::calibrate::stats::{BUCKETS, BlockStats, Moments};

/// ‖y − x‖/‖x‖ and 1 − mean cosine.
pub fn part(moments: &Moments) -> Part {
    Part {
        relative_change: (moments.change_sq / moments.input_sq.max(f64::MIN_POSITIVE)).sqrt(),
        cosine: 1.0 - moments.cosine / moments.tokens.max(1.0),
        fit_error: None,
    }
}

/// The same in every bucket of noise levels in which tokens were seen.
pub fn timesteps(block: &BlockStats) -> Vec<AtTime> {
    let buckets = block.txt.buckets.iter().zip(&block.img.buckets).enumerate();
    let seen = buckets.filter_map(|(index, (txt, img))| {
        let mut both = *txt;
        both.add(img);
        let t = (index as f64 + 0.5) / BUCKETS as f64;
        (both.tokens > 0.0).then(|| AtTime {
            t,
            part: part(&both),
        })
    });
    seen.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{calibrate::stats::StreamStats, layout::BlockId};

    #[test]
    fn higher_means_more_important() {
        let moments = |change_sq, cosine| Moments {
            tokens: 10.0,
            input_sq: 4.0,
            change_sq,
            cosine,
        };
        let (idle, busy) = (part(&moments(0.01, 9.99)), part(&moments(4.0, 5.0)));
        assert!(busy.relative_change > idle.relative_change && busy.cosine > idle.cosine);
        assert!((busy.relative_change - 1.0).abs() < 1e-12);
        assert!((busy.cosine - 0.5).abs() < 1e-12);
    }

    #[test]
    fn noise_levels_that_were_not_seen_are_left_out() {
        let mut block = BlockStats {
            id: BlockId::double(0),
            txt: StreamStats::default(),
            img: StreamStats::default(),
        };
        block.txt.buckets[3] = Moments {
            tokens: 2.0,
            input_sq: 1.0,
            change_sq: 1.0,
            cosine: 2.0,
        };
        let times = timesteps(&block);
        assert_eq!(times.len(), 1);
        assert!((times[0].t - 0.35).abs() < 1e-12);
    }
}
