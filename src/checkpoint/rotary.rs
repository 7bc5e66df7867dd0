//! Rotary axes and base: those of the released models of a family, and which values make sense.

use crate::layout::Family;

/// What a released model of a family has where nothing says otherwise.
pub(super) struct Released {
    /// Rotary base.
    pub(super) theta: f64,
    /// What diffusers' configuration calls the base.
    pub(super) theta_key: &'static str,
}

/// The rotary numbers of the released models: FLUX.1's `FluxParams` and diffusers' `FluxPosEmbed`; the defaults of
/// diffusers' `Flux2Transformer2DModel`.
pub(super) fn released(family: &Family) -> Released {
    if *family == Family::FLUX2 {
        Released {
            theta: 2000.0,
            theta_key: "rope_theta",
        }
    } else {
        Released {
            theta: 10_000.0,
            theta_key: "theta",
        }
    }
}

/// The rotary axes of a family where nothing says otherwise. FLUX.1's fit a head size of 128 only, FLUX.2's are four equal parts.
pub(super) fn default_axes(family: &Family, head: usize) -> Option<Vec<usize>> {
    let axes = if *family == Family::FLUX2 {
        vec![head / 4; 4]
    } else {
        vec![16, 56, 56]
    };
    (are_axes(&axes) && axes.iter().sum::<usize>() == head).then_some(axes)
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
