//! How a product is cut: panels, bands and passes that stay in the caches, and tasks for all threads.

use crate::model::ops::avx512::{Avx512, LANES, VECTORS, Vector};

/// Multiply-adds worth a task of their own: some 20 µs.
const TASK: usize = 1 << 21;
/// Columns whose sums are kept while the passes over the inner dimension add to them.
pub(super) const WIDE: usize = 256;
/// A task has a multiple of so many columns.
const STEP: usize = 2 * LANES;

/// How operands are cut so that they stay in the caches.
pub(super) struct Caches {
    /// Rows of a full panel.
    pub(super) panel: usize,
    /// Rows of the panels that share a pass over the weights, in the second cache.
    pub(super) band: usize,
    /// Units of the inner dimension in one pass.
    pub(super) deep: usize,
}

/// Eight columns of a pass fill half of the first cache, and all panels go by them: 300 KB.
pub(super) const CACHES: Caches = Caches {
    panel: VECTORS * LANES,
    band: 3 * VECTORS * LANES,
    deep: 512,
};

impl Caches {
    /// Rows and columns of a task: whole panels, of one size as far as possible, and enough tasks for all threads.
    pub(super) fn cut(
        &self,
        rows: usize,
        inner: usize,
        columns: usize,
        threads: usize,
    ) -> (usize, usize) {
        let tasks = (rows * inner * columns / TASK).clamp(1, 16 * threads);
        if threads == 1 || tasks == 1 {
            return (rows, columns);
        }
        // wide strips, in which a step of the inner dimension that is in the cache goes a long way
        let (panels, least) = (rows.div_ceil(self.panel), columns.div_ceil(2 * WIDE));
        let bands = rows.div_ceil(self.band);
        let across = tasks.div_ceil(bands).min(columns.div_ceil(WIDE)).max(least);
        let bands = tasks.div_ceil(across).clamp(bands, panels);
        // narrow ones only if there are too few tasks otherwise
        let across = (4 * threads)
            .div_ceil(bands)
            .min(columns.div_ceil(2 * STEP))
            .max(across);
        (
            panels.div_ceil(bands) * self.panel,
            columns.div_ceil(STEP).div_ceil(across) * STEP,
        )
    }
}

/// Whether numbers are multiplied in pairs: of an odd number of bf16 one would be left.
pub(super) fn in_pairs<T: Vector>(simd: Avx512, inner: usize) -> bool {
    simd.pairs() && inner.is_multiple_of(2) && T::as_bf16(&[]).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_cut_into_enough_tasks_of_whole_panels() {
        for (rows, inner, columns) in [(1280, 1024, 7168), (256, 4096, 1024), (1344, 128, 896)] {
            for threads in [2, 16] {
                let (tall, wide) = CACHES.cut(rows, inner, columns, threads);
                let tasks = rows.div_ceil(tall) * columns.div_ceil(wide);
                assert!(tall % CACHES.panel == 0 && wide % STEP == 0);
                assert!(tasks >= 3 * threads, "{tasks} tasks for {threads} threads");
            }
        }
        assert_eq!(CACHES.cut(1, 128, 768, 8).1, 768);
    }
}
