//! Rotary axes and base: those of the released models of a family, and which values make sense.

use crate::layout::Family;

/// What a released model of a family has where nothing says otherwise.
pub(super) struct Released {
    /// Rotary axes; they fit a head size of 128 only.
    pub(super) axes: &'static [usize],
    /// Rotary base.
    pub(super) theta: f64,
    /// What diffusers' configuration calls the base.
    pub(super) theta_key: &'static str,
}

/// The rotary numbers of the released models: FLUX.1's `FluxParams` and diffusers' `FluxPosEmbed`; the defaults of
/// diffusers' `Flux2Transformer2DModel`.
pub(super) fn released(family: &Family) -> Released {
    if family.position_axes == Family::FLUX2.position_axes {
        Released {
            axes: &[32, 32, 32, 32],
            theta: 2000.0,
            theta_key: "rope_theta",
        }
    } else {
        Released {
            axes: &[16, 56, 56],
            theta: 10_000.0,
            theta_key: "theta",
        }
    }
}

/// Whether these can be rotary axes: three or four even sizes whose sum is a number.
pub(super) fn are_axes(dims: &[usize]) -> bool {
    const MOST: usize = 1 << 20;
    let count = [Family::FLUX1, Family::FLUX2].map(|family| family.position_axes);
    count.contains(&dims.len()) && dims.iter().all(|d| d % 2 == 0 && (2..=MOST).contains(d))
}

/// Whether this can be a rotary base: the frequencies fall from 1, and are numbers.
pub(super) fn is_theta(theta: f64) -> bool {
    theta > 1.0 && theta <= 1e12
}
