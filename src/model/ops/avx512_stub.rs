//! Stands in for `avx512` on other CPUs: never made, so never called.
#![allow(dead_code, reason = "columns are never read here")]

use faer::MatRef;
use half::bf16;

use super::cpu::Element;
use super::uninit::Uninit;

pub(super) const LANES: usize = 16;
pub(super) const VECTORS: usize = 3;
pub(super) const GROUP: usize = 8;

#[derive(Clone, Copy, Debug)]
pub(super) enum Avx512 {}

#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    Apart(&'a [f32], [usize; GROUP]),
    PairsApart(&'a [bf16], [usize; GROUP]),
    Adjacent(&'a [f32], usize),
    AdjacentPairs(&'a [f32], usize),
}

pub(super) trait Vector: Element {}

impl<T: Element> Vector for T {}

impl Avx512 {
    pub(super) fn detect() -> Option<Self> {
        None
    }

    pub(super) fn pairs(self) -> bool {
        match self {}
    }

    #[cfg(test)]
    pub(super) fn ways() -> Vec<Self> {
        crate::ui::skip("avx512");
        Vec::new()
    }

    pub(super) fn pack<T: Vector>(
        self,
        _: &[T],
        _: (usize, usize, usize),
        _: usize,
        _: &mut [f32],
    ) {
        match self {}
    }

    pub(super) fn pack_pairs(self, _: &[bf16], _: (usize, usize, usize), _: usize, _: &mut [f32]) {
        match self {}
    }

    pub(super) fn multiply(
        self,
        _: &[f32],
        _: usize,
        _: usize,
        _: Columns,
        _: &mut [f32],
        _: bool,
    ) {
        match self {}
    }

    pub(super) fn write<T: Vector>(self, _: &[f32], _: usize, _: Uninit<T>, _: Option<MatRef<T>>) {
        match self {}
    }
}
