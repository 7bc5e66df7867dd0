//! FLUX.2's shift of noise levels, which follows from the numbers of tokens and steps. `schedule.rs` applies it.

/// Strength of FLUX.2's shift, by lines measured for 10 and 200 steps ([diffusers `compute_empirical_mu`][mu]).
///
/// [mu]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux2/pipeline_flux2.py
pub(super) fn measured_mu(image_tokens: usize, steps: usize) -> f64 {
    let tokens = image_tokens as f64;
    let at_200 = 0.000_169_27 * tokens + 0.456_666_66;
    if image_tokens > 4300 {
        return at_200;
    }
    let at_10 = 8.738_095_24e-5 * tokens + 1.898_333_33;
    let slope = (at_200 - at_10) / 190.0;
    slope * steps as f64 + (at_200 - 200.0 * slope)
}

#[cfg(test)]
mod tests {
    use anyhow::Result;

    use crate::{layout::ShiftRule, sample::schedule::Schedule};

    #[test]
    fn the_shift_of_flux2_follows_from_tokens_and_steps() -> Result<()> {
        let klein = Schedule::flux_dev().with_rule(ShiftRule::TokensAndSteps);
        // 1024×1024 in 4 steps
        let sigmas = klein.sigmas(4, 4096)?;
        for (a, b) in sigmas.iter().zip([1.0, 0.967, 0.908, 0.767, 0.0]) {
            assert!((a - b).abs() < 5e-4, "{sigmas:?}");
        }
        // from 4301 tokens on the number of steps does not matter
        let late = |steps: usize| anyhow::Ok(klein.sigmas(steps, 4301)?[steps / 2]);
        assert!((late(4)? - late(50)?).abs() < 1e-6);
        assert!(klein.sigmas(50, 4300)?[25] < klein.sigmas(4, 4300)?[2]);
        Ok(())
    }
}
