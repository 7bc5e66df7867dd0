//! Memory for a result that is written once, without zeros before. What is left unwritten is noticed, not read.
#![expect(
    unsafe_code,
    reason = "the length of a vector is set once as many numbers as it has are known to be written"
)]

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering};

use faer::MatMut;
use rayon::prelude::*;

/// A part of a matrix that nothing has been written to. Writing uses it up, so that no number counts twice.
pub(super) struct Uninit<'a, T> {
    matrix: MatMut<'a, MaybeUninit<T>>,
    written: &'a AtomicUsize,
}

/// The numbers of a matrix, row after row, written by `fill`, which must write all of them.
pub(super) fn filled<T: Copy>(rows: usize, columns: usize, fill: impl FnOnce(Uninit<T>)) -> Vec<T> {
    let len = rows * columns;
    let mut out = Vec::with_capacity(len);
    let written = AtomicUsize::new(0);
    let spare = &mut out.spare_capacity_mut()[..len];
    fill(Uninit {
        matrix: MatMut::from_row_major_slice_mut(spare, rows, columns),
        written: &written,
    });
    assert_eq!(
        written.into_inner(),
        len,
        "a result was not written as a whole"
    );
    // SAFETY: the parts that were written do not overlap and have as many numbers as there are
    unsafe { out.set_len(len) };
    out
}

impl<T: Copy + Send> Uninit<'_, T> {
    pub(super) fn nrows(&self) -> usize {
        self.matrix.nrows()
    }

    pub(super) fn ncols(&self) -> usize {
        self.matrix.ncols()
    }

    /// The columns before `at` and the others.
    pub(super) fn split_columns(self, at: usize) -> [Self; 2] {
        let written = self.written;
        let (left, right) = self.matrix.split_at_col_mut(at);
        [left, right].map(|matrix| Self { matrix, written })
    }

    /// Bands of `tall` rows, the last of what is left.
    pub(super) fn bands(self, tall: usize) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let Self { matrix, written } = rest.take().filter(|rest| rest.nrows() > 0)?;
            let at = tall.min(matrix.nrows());
            let (band, below) = matrix.split_at_row_mut(at);
            rest = Some(Self {
                matrix: below,
                written,
            });
            Some(Self {
                matrix: band,
                written,
            })
        })
    }

    /// Strips of `wide` columns, the last of what is left.
    pub(super) fn strips(self, wide: usize) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let strips = rest.take().filter(|rest| rest.ncols() > 0)?;
            let at = wide.min(strips.ncols());
            let [strip, right] = strips.split_columns(at);
            rest = Some(right);
            Some(strip)
        })
    }

    /// [`Uninit::bands`] in parallel.
    pub(super) fn par_bands(self, tall: usize) -> impl IndexedParallelIterator<Item = Self> {
        let written = self.written;
        let bands = self.matrix.par_row_chunks_mut(tall);
        bands.map(move |matrix| Self { matrix, written })
    }

    /// [`Uninit::strips`] in parallel.
    pub(super) fn par_strips(self, wide: usize) -> impl IndexedParallelIterator<Item = Self> {
        let written = self.written;
        let strips = self.matrix.par_col_chunks_mut(wide);
        strips.map(move |matrix| Self { matrix, written })
    }

    /// Where it begins and how far its rows are apart; the numbers of a row lie side by side.
    pub(super) fn raw(&mut self) -> (*mut T, isize) {
        assert!(self.ncols() <= 1 || self.matrix.col_stride() == 1);
        let stride = self.matrix.row_stride();
        (self.matrix.as_mut().as_ptr_mut().cast(), stride)
    }

    /// Says that all of it has been written.
    ///
    /// # Safety
    /// It has.
    pub(super) unsafe fn all_written(self) {
        let len = self.nrows() * self.ncols();
        self.written.fetch_add(len, Ordering::Relaxed);
    }

    /// Writes all of it by `row(index, row)`, which finds `value` everywhere.
    #[inline(always)]
    pub(super) fn rows(mut self, value: T, mut row: impl FnMut(usize, &mut [T])) {
        let (rows, columns) = (self.nrows(), self.ncols());
        let (start, stride) = self.raw();
        for i in 0..rows {
            // SAFETY: a row of the matrix, borrowed nowhere else; read only once it is written
            let slice = unsafe {
                let start = start.offset(i as isize * stride);
                std::slice::from_raw_parts_mut(start.cast::<MaybeUninit<T>>(), columns)
                    .fill(MaybeUninit::new(value));
                std::slice::from_raw_parts_mut(start, columns)
            };
            row(i, slice);
        }
        // SAFETY: all rows, each as a whole
        unsafe { self.all_written() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_up_the_whole() {
        for (rows, columns) in [(0, 3), (3, 0), (1, 1), (7, 10), (40, 33)] {
            let out = filled(rows, columns, |out| {
                out.par_bands(3).enumerate().for_each(|(i, band)| {
                    for (j, strip) in band.strips(4).enumerate() {
                        for (k, part) in strip.bands(2).enumerate() {
                            part.rows(0, |row, out| {
                                for (column, out) in out.iter_mut().enumerate() {
                                    *out = (3 * i + 2 * k + row) * columns + 4 * j + column;
                                }
                            });
                        }
                    }
                });
            });
            assert!(out.into_iter().eq(0..rows * columns));
        }
    }

    #[test]
    #[should_panic(expected = "not written as a whole")]
    fn a_part_left_out_is_noticed() {
        filled(4, 4, |out| {
            let [left, _] = out.split_columns(3);
            left.rows(0u8, |_, _| {});
        });
    }
}
