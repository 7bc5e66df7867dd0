//! The decoder's upper levels a band of rows at a time: the same image in a fraction of the memory.
//!
//! Tiles that are decoded apart and blended, as diffusers has them, differ from the whole image: each has group norms of
//! its own. Here all bands go through a layer before any goes through the next, and a norm sees the statistics of all of
//! them; a convolution sees the rows next to its band. So nothing is approximate and there are no seams.

use candle::{Device, Result, Tensor};

use super::layers::{Conv2d, Level, Norm, Resnet};
use super::norm::Statistics;

/// A feature map (b, c, h, w) in bands of rows, kept if there is room for all of them.
#[derive(Debug)]
pub(super) struct Bands {
    /// (b, c, rows, w) each, from top to bottom.
    parts: Vec<Tensor>,
    /// Where they are computed with.
    device: Device,
    /// Where they are kept.
    offload_device: Device,
}

impl Bands {
    /// Cuts `x` (b, c, h, w) into bands of `rows` rows, the last one perhaps smaller.
    pub(super) fn cut(x: &Tensor, rows: usize, offload_device: &Device) -> Result<Self> {
        let (height, rows) = (x.dim(2)?, rows.max(1));
        let parts = (0..height).step_by(rows).map(|first| {
            let band = x.narrow(2, first, rows.min(height - first))?;
            band.contiguous()?.to_device(offload_device)
        });
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            device: x.device().clone(),
            offload_device: offload_device.clone(),
        })
    }

    /// Band `index` on the device with `halo` rows of its neighbours, and how many there are above and below it.
    fn with_halo(&self, index: usize, halo: usize) -> Result<(Tensor, usize, usize)> {
        let (mut above, mut below) = (Vec::new(), Vec::new());
        let (mut left, mut i) = (halo, index);
        while left > 0 && i > 0 {
            i -= 1;
            let rows = self.parts[i].dim(2)?;
            let taken = left.min(rows);
            above.insert(0, self.parts[i].narrow(2, rows - taken, taken)?);
            left -= taken;
        }
        let above_rows = halo - left;
        (left, i) = (halo, index + 1);
        while left > 0 && i < self.parts.len() {
            let taken = left.min(self.parts[i].dim(2)?);
            below.push(self.parts[i].narrow(2, 0, taken)?);
            left -= taken;
            i += 1;
        }
        let mut all = above;
        all.push(self.parts[index].clone());
        all.extend(below);
        let band = if all.len() == 1 {
            self.parts[index].clone()
        } else {
            Tensor::cat(&all, 2)?
        };
        Ok((band.to_device(&self.device)?, above_rows, halo - left))
    }

    fn statistics(&self, norm: &Norm) -> Result<Statistics> {
        let mut all = Statistics::default();
        for part in &self.parts {
            all = all.join(norm.statistics(&part.to_device(&self.device)?)?);
        }
        Ok(all)
    }

    /// `conv(norm(x))` of one band, or `conv(x)`, without the rows that come out of its neighbours'.
    fn convolved(&self, index: usize, norm: Option<&Norm>, conv: &Conv2d) -> Result<Tensor> {
        let (band, above, below) = self.with_halo(index, conv.halo())?;
        let band = match norm {
            Some(norm) => norm.forward(&band)?,
            None => band,
        };
        let grown = conv.growth();
        let out = conv.forward(&band)?;
        let rows = out.dim(2)? - grown * (above + below);
        out.narrow(2, grown * above, rows)?.contiguous()
    }

    /// All bands through `conv(norm(x))`; `self` is gone afterwards.
    fn through(self, norm: Option<&Norm>, conv: &Conv2d) -> Result<Self> {
        let norm = match norm {
            Some(norm) => Some(norm.knowing(self.statistics(norm)?)),
            None => None,
        };
        let parts = (0..self.parts.len()).map(|i| {
            self.convolved(i, norm.as_ref(), conv)?
                .to_device(&self.offload_device)
        });
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            ..self
        })
    }

    fn resnet(mut self, resnet: &Resnet) -> Result<Self> {
        let norm1 = resnet.norm1.knowing(self.statistics(&resnet.norm1)?);
        let mut inner = Self {
            parts: Vec::new(),
            device: self.device.clone(),
            offload_device: self.offload_device.clone(),
        };
        let mut statistics = Statistics::default();
        for i in 0..self.parts.len() {
            let y = self.convolved(i, Some(&norm1), &resnet.conv1)?;
            statistics = statistics.join(resnet.norm2.statistics(&y)?);
            inner.parts.push(y.to_device(&self.offload_device)?);
        }
        let norm2 = resnet.norm2.knowing(statistics);
        for i in 0..self.parts.len() {
            let y = inner.convolved(i, Some(&norm2), &resnet.conv2)?;
            let x = self.parts[i].to_device(&self.device)?;
            let x = match &resnet.shortcut {
                Some(shortcut) => shortcut.forward(&x)?,
                None => x,
            };
            // the band before the one above is not needed any more, nor this one of the input
            self.parts[i] = (x + y)?.to_device(&self.offload_device)?;
            if i > 0 {
                inner.parts[i - 1] = inner.last_rows(i - 1, resnet.conv2.halo())?;
            }
        }
        Ok(self)
    }

    /// Of band `index` what its neighbour below still sees.
    fn last_rows(&self, index: usize, rows: usize) -> Result<Tensor> {
        let part = &self.parts[index];
        let height = part.dim(2)?;
        let rows = rows.min(height);
        // a copy, so that the rest is freed
        part.narrow(2, height - rows, rows)?.force_contiguous()
    }

    /// One level of the pyramid.
    pub(super) fn level(self, level: &Level) -> Result<Self> {
        let mut x = self;
        for resnet in &level.resnets {
            x = x.resnet(resnet)?;
        }
        match &level.turn {
            Some(turn) => x.through(None, turn),
            None => Ok(x),
        }
    }

    /// The last norm and convolution; the image (b, c, h, w), where bands are kept.
    pub(super) fn finish(self, norm: &Norm, conv: &Conv2d) -> Result<Tensor> {
        let bands = self.through(Some(norm), conv)?;
        Tensor::cat(&bands.parts, 2)
    }
}

#[cfg(test)]
mod tests {
    use candle::DType;

    use super::super::Vae;
    use super::*;
    use crate::files::Files;
    use crate::sample::noise::Generator;

    #[test]
    fn an_image_in_bands_is_the_image() -> anyhow::Result<()> {
        let vae = Vae::load_folder(&Files::bundled().sub("vae"), DType::F32, &Device::Cpu)?;
        let channels = vae.config().latent_channels;
        let latents = Generator::new(3).randn((2, channels, 11, 6), &Device::Cpu)?;
        let whole = vae.decode(&latents)?;
        for rows in [1, 4, 5, 30] {
            let bands = vae.decode_in_bands(&latents, rows, &Device::Cpu)?;
            assert_eq!(bands.dims(), whole.dims());
            let far = (&bands - &whole)?.abs()?.flatten_all()?.max(0)?;
            let far = far.to_scalar::<f32>()?;
            assert!(far <= 5e-5, "{rows} rows: {far}"); // colours go from -1 to 1
        }
        Ok(())
    }
}
