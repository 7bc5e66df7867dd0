//! Stands in for `cuda` if it is not built in: no kernel ever runs.
#![expect(clippy::unnecessary_wraps, reason = "the others may fail")]

use candle::{DType, Device, Result, Tensor};

use super::types::{Branch, Heads, Projected};
use crate::model::rope::Rope;

/// Why kernels of this device are not used: nothing to say, there are none.
pub fn trouble(_: &Device) -> Option<String> {
    None
}

/// Nothing is kept.
pub fn limit_kept_memory(_: u64) {}

/// See `cuda::change`.
///
/// # Errors
/// Never.
pub fn token_sums(_: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

/// See `cuda::change`.
///
/// # Errors
/// Never.
pub fn add_products(
    _: &Tensor,
    _: &Tensor,
    _: Option<(&Tensor, &Tensor)>,
) -> Result<Option<(Tensor, Tensor)>> {
    Ok(None)
}

/// See `cuda::blas`.
///
/// # Errors
/// Never.
pub fn add_transposed_product(_: &Tensor, _: [&Tensor; 2], _: f64) -> Result<bool> {
    Ok(false)
}

pub(super) fn norm_modulate(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn gated_residual(_: &[Branch]) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn heads(_: &[Projected], _: usize, _: &Rope) -> Result<Option<Heads>> {
    Ok(None)
}

pub(super) fn scores(_: &Tensor, _: &Tensor, _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn flash(_: &Tensor, _: &Tensor, _: &Tensor, _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn has_flash(_: &Device, _: DType, _: usize) -> bool {
    false
}

pub(super) fn softmax(_: &Tensor, _: DType) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn gelu(_: &Tensor, _: Option<&Tensor>, _: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn attention_backward(_: &Heads, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn has_attention_backward(_: &Device, _: DType, _: usize) -> bool {
    false
}

pub(super) fn swiglu(_: &Tensor, _: Option<&Tensor>) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn gelu_backward(_: &Tensor, _: Option<&Tensor>, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn swiglu_backward(_: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn norm_backward(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<[Tensor; 2]>> {
    Ok(None)
}

pub(super) fn projection_backward(
    _: &Projected,
    _: &Tensor,
    _: usize,
    _: &Rope,
    _: Option<(Option<&Tensor>, &Tensor)>,
) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn residual_backward(
    _: &Tensor,
    _: Option<&Tensor>,
    _: &Tensor,
    _: &Tensor,
) -> Result<Option<[Tensor; 2]>> {
    Ok(None)
}

pub(super) fn weighted_sum(_: &Tensor, _: f64, _: &Tensor, _: f64) -> Result<Option<Tensor>> {
    Ok(None)
}

pub(super) fn multiply_onto(_: &Tensor, _: f64, _: [&Tensor; 2], _: bool, _: f64) -> Result<bool> {
    Ok(false)
}

pub(super) fn transposed_product(_: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
    Ok(None)
}
