//! Rotary axes and base: FLUX.1's, and which values make sense.

/// FLUX.1's rotary axes (`FluxParams` of every released model); they fit a head size of 128 only.
pub(super) const FLUX1_AXES: [usize; 3] = [16, 56, 56];
/// FLUX.1's rotary base, fixed in diffusers' `FluxPosEmbed`.
pub(super) const FLUX1_THETA: f64 = 10_000.0;

/// Whether these can be rotary axes: three even sizes whose sum is a number.
pub(super) fn are_axes(dims: &[usize]) -> bool {
    const MOST: usize = 1 << 20;
    dims.len() == 3 && dims.iter().all(|d| d % 2 == 0 && (2..=MOST).contains(d))
}

/// Whether this can be a rotary base: the frequencies fall from 1, and are numbers.
pub(super) fn is_theta(theta: f64) -> bool {
    theta > 1.0 && theta <= 1e12
}
