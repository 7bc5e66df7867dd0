//! Rotary position embedding: the table of angles, in f32 whatever the model's dtype, and the plain rotation.
//! The fused rotation is in `ops::heads`.

use candle::{DType, Device, Result, Tensor};

/// Cosines and sines for the tokens of one image size, text first.
///
/// The angles are computed in f64 and rounded to f32 ([diffusers `get_1d_rotary_pos_embed`][diffusers],
/// [BFL `rope`][bfl]). In bf16 they would be off by up to 0.18 rad on a 64 × 64 grid of patches.
///
/// [diffusers]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/embeddings.py#L1120
/// [bfl]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/math.py#L15-L22
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
    references: usize,
}

impl Rope {
    /// The table for `ids` (tokens, axes) of any numeric dtype: positions of each token along each axis.
    ///
    /// Axis `a` takes `axes_dims[a]` entries of the head, i.e. half as many pairs, with frequencies
    /// `theta^(-2i / axes_dims[a])`.
    ///
    /// Tokens whose first position is not 0 are those of reference images; they stand behind all others.
    pub fn new(ids: &Tensor, axes_dims: &[usize], theta: f64, device: &Device) -> Result<Self> {
        let (tokens, axes) = ids.dims2()?;
        if axes != axes_dims.len() {
            candle::bail!(
                "position ids have {axes} axes, the model has {} (axes_dims {axes_dims:?})",
                axes_dims.len()
            );
        }
        if axes_dims.iter().any(|d| d % 2 != 0) {
            candle::bail!("rotary axes must have even sizes, found {axes_dims:?}");
        }
        let size = axes_dims.iter().sum::<usize>();
        let frequencies: Vec<(usize, f64)> = axes_dims
            .iter()
            .enumerate()
            .flat_map(|(axis, &dim)| {
                (0..dim / 2).map(move |i| (axis, theta.powf(-((2 * i) as f64) / dim as f64)))
            })
            .collect();
        let mut cos = Vec::with_capacity(tokens * size);
        let mut sin = Vec::with_capacity(tokens * size);
        let mut references = 0;
        for position in ids.to_dtype(DType::F64)?.to_vec2::<f64>()? {
            if position.first().is_some_and(|image| *image != 0.0) {
                references += 1;
            } else if references > 0 {
                candle::bail!("tokens of a reference image stand before others");
            }
            for &(axis, frequency) in &frequencies {
                let (s, c) = (position[axis] * frequency).sin_cos();
                cos.extend([c as f32; 2]);
                sin.extend([-s as f32, s as f32]);
            }
        }
        let shape = (tokens, size);
        Ok(Self {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
            references,
        })
    }

    /// Cosines, each twice (both of a pair have the same), (tokens, head size), f32.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// Sines, each negated for the first of a pair, (tokens, head size), f32.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }

    /// Number of tokens the table is for.
    pub fn tokens(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Number of tokens, the last ones, that belong to reference images: what they become is no part of the velocity.
    pub fn references(&self) -> usize {
        self.references
    }

    /// Head size.
    pub fn head_dim(&self) -> usize {
        self.cos.dims()[1]
    }

    /// Rotates neighbouring pairs (2i, 2i+1) of `x` (batch, heads, tokens, head size), f32 or f64; differentiable
    /// ([BFL `apply_rope`][bfl]).
    ///
    /// [bfl]: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/math.py#L25-L30
    pub fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, heads, tokens, size) = x.dims4()?;
        let x = x.contiguous()?;
        let pairs = x.reshape((batch, heads, tokens, size / 2, 2))?;
        let (first, second) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
        let exchanged = Tensor::cat(&[second, first], 4)?.reshape((batch, heads, tokens, size))?;
        let (cos, sin) = (self.cos.to_dtype(x.dtype())?, self.sin.to_dtype(x.dtype())?);
        x.broadcast_mul(&cos)? + exchanged.broadcast_mul(&sin)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::random;

    #[test]
    fn rotation_follows_the_formula() -> Result<()> {
        let axes = [4, 2, 6];
        let ids = Tensor::new(
            &[[0f32, 0., 0.], [0., 3., 61.], [1., 63., 2.]],
            &Device::Cpu,
        )?;
        let rope = Rope::new(&ids, &axes, 10_000.0, &Device::Cpu)?;
        assert_eq!((rope.tokens(), rope.head_dim()), (3, 12));
        let x = random("x", (1, 2, 3, 12))?;
        let y = rope.rotate(&x)?.squeeze(0)?.to_vec3::<f32>()?;
        let (x, ids) = (x.squeeze(0)?.to_vec3::<f32>()?, ids.to_vec2::<f32>()?);
        for (head, token) in [(0, 0), (0, 1), (1, 2), (1, 1)] {
            let mut pair = 0;
            for (axis, &dim) in axes.iter().enumerate() {
                for i in 0..dim / 2 {
                    let angle =
                        f64::from(ids[token][axis]) / 10_000f64.powf(2.0 * i as f64 / dim as f64);
                    let (even, odd) = (
                        f64::from(x[head][token][2 * pair]),
                        f64::from(x[head][token][2 * pair + 1]),
                    );
                    let want = [
                        even * angle.cos() - odd * angle.sin(),
                        even * angle.sin() + odd * angle.cos(),
                    ];
                    for (k, want) in want.into_iter().enumerate() {
                        assert!((f64::from(y[head][token][2 * pair + k]) - want).abs() < 1e-6);
                    }
                    pair += 1;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn ids_of_another_number_of_axes_are_refused() -> Result<()> {
        let ids = Tensor::zeros((4, 3), DType::F32, &Device::Cpu)?;
        let error =
            Rope::new(&ids, &[16, 56], 10_000.0, &Device::Cpu).expect_err("three axes for two");
        assert!(error.to_string().contains("3 axes"), "{error}");
        Ok(())
    }
}
