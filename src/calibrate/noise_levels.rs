//! Which noise levels a model is looked at: spread evenly, or those of its own few steps.

use anyhow::Result;

use crate::{
    pipeline::{Pipeline, load},
    sample::size::ImageSize,
};

/// Times keep this far from 0 and 1, where the velocity is trivial.
const MARGIN: f64 = 0.01;

/// From numbers that are spread evenly over (0, 1) to noise levels.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum NoiseLevels {
    /// Spread evenly too. The error of an image is about the sum of the velocity's errors by the lengths of the steps, so
    /// that is their right weight in many steps.
    #[default]
    Even,
    /// The noise levels before each step and after the last, falling from 1 to 0. A model that was distilled to few steps
    /// is evaluated nowhere else: each number is taken up to the start of the step that it lies in, so that a step counts
    /// by its length.
    Steps(Vec<f32>),
}

impl NoiseLevels {
    /// Those that `pipeline` is looked at if it draws images of `size` in `steps` steps.
    ///
    /// # Errors
    /// When its scheduler is not supported.
    pub fn of_model(pipeline: &Pipeline, size: ImageSize, steps: usize) -> Result<Self> {
        if !pipeline.has_few_steps() {
            return Ok(Self::Even);
        }
        let sigmas = load::schedule(pipeline)?.sigmas(steps, size.tokens())?;
        Ok(Self::Steps(sigmas))
    }

    /// The noise level for a number in (0, 1).
    pub fn at(&self, even: f64) -> f32 {
        match self {
            Self::Even => (MARGIN + (1.0 - 2.0 * MARGIN) * even) as f32,
            Self::Steps(sigmas) => {
                let starts = sigmas.iter().rev().skip(1);
                let mut above = starts.filter(|sigma| f64::from(**sigma) >= even);
                above.next().copied().unwrap_or(1.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_counts_by_its_length() {
        let levels = NoiseLevels::Steps(vec![1.0, 0.967, 0.908, 0.767, 0.0]);
        let numbers: Vec<f32> = (0..1000)
            .map(|i| levels.at((f64::from(i) + 0.5) / 1000.0))
            .collect();
        for (level, expected) in [(1.0f32, 33), (0.967, 59), (0.908, 141), (0.767, 767)] {
            let count = numbers
                .iter()
                .filter(|t| (**t - level).abs() < 1e-6)
                .count();
            assert_eq!(count, expected, "{level}");
        }
    }

    #[test]
    fn even_numbers_keep_from_the_ends() {
        let ends = [0.0, 1.0].map(|even| NoiseLevels::Even.at(even));
        assert!((ends[0] - 0.01).abs() < 1e-7 && (ends[1] - 0.99).abs() < 1e-7);
    }
}
