//! Latent images ⇄ image tokens, and the position ids of tokens. No values are drawn or decoded here.
//!
//! Source: [diffusers `FluxPipeline`][flux]: `_prepare_latent_image_ids`, `_pack_latents`, `_unpack_latents`.
//!
//! and [diffusers `Flux2Pipeline`][flux2]: `_prepare_text_ids`, `_prepare_latent_ids`, `_prepare_image_ids`.
//!
//! [flux]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux/pipeline_flux.py#L506-L541
//! [flux2]: https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/flux2/pipeline_flux2.py

use candle::{Device, Result, Tensor, bail};

/// Groups 2×2 pixels of a latent image into one token: (b, c, h, w) → (b, h/2·w/2, 4c). `h` and `w` must be even.
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    if !h.is_multiple_of(2) || !w.is_multiple_of(2) {
        bail!("a latent image of {h}×{w} cannot be cut into 2×2 patches")
    }
    latents
        .reshape(vec![b, c, h / 2, 2, w / 2, 2])?
        .permute(vec![0, 2, 4, 1, 3, 5])? // (b, h/2, w/2, c, 2, 2)
        .reshape((b, h / 2 * (w / 2), c * 4))
}

/// Inverse of [`pack`] for a latent image of `h`×`w`: (b, h/2·w/2, 4c) → (b, c, h, w).
pub fn unpack(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, n, d) = tokens.dims3()?;
    if n != h / 2 * (w / 2) || !h.is_multiple_of(2) || !w.is_multiple_of(2) || !d.is_multiple_of(4)
    {
        bail!("{n} tokens of width {d} do not make a latent image of {h}×{w}")
    }
    tokens
        .reshape(vec![b, h / 2, w / 2, d / 4, 2, 2])?
        .permute(vec![0, 3, 1, 4, 2, 5])? // (b, c, h/2, 2, w/2, 2)
        .reshape((b, d / 4, h, w))
}

/// Position ids of the tokens of a latent image of `h`×`w` in a family with `axes` numbers in a position: (h/2·w/2, axes)
/// float32, rows (`image`, row, column, 0 …). `image` is 0 for what is generated, and not for reference images.
pub fn img_ids(image: usize, h: usize, w: usize, axes: usize, device: &Device) -> Result<Tensor> {
    let id = |y: usize, x: usize| {
        let position = [image, y, x].into_iter().chain(std::iter::repeat(0));
        position.take(axes).map(|n| n as f32)
    };
    let rows = (0..h / 2).flat_map(|y| (0..w / 2).flat_map(move |x| id(y, x)));
    Tensor::from_iter(rows, device)?.reshape((h / 2 * (w / 2), axes))
}

/// Position ids of `len` text tokens: (len, axes) float32. All zero with three axes (FLUX.1 gives text no positions); a
/// fourth numbers the tokens.
pub fn txt_ids(len: usize, axes: usize, device: &Device) -> Result<Tensor> {
    let id = move |i: usize| (0..axes).map(move |axis| if axis == 3 { i as f32 } else { 0.0 });
    Tensor::from_iter((0..len).flat_map(id), device)?.reshape((len, axes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_holds_the_four_pixels_of_a_patch_channel_by_channel() -> Result<()> {
        // two channels of 2×4
        let x = Tensor::arange(0u32, 16, &Device::Cpu)?.reshape((1, 2, 2, 4))?;
        let tokens = pack(&x)?;
        assert_eq!(
            tokens.to_vec3::<u32>()?,
            [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
        );
        Ok(())
    }

    #[test]
    fn unpack_inverts_pack() -> Result<()> {
        let x = Tensor::arange(0u32, 2 * 3 * 4 * 6, &Device::Cpu)?.reshape((2, 3, 4, 6))?;
        let back = unpack(&pack(&x)?, 4, 6)?;
        assert_eq!(
            back.flatten_all()?.to_vec1::<u32>()?,
            x.flatten_all()?.to_vec1::<u32>()?
        );
        Ok(())
    }

    #[test]
    fn odd_sizes_and_wrong_counts_are_refused() -> Result<()> {
        let x = Tensor::zeros((1, 4, 3, 4), candle::DType::F32, &Device::Cpu)?;
        assert!(pack(&x).is_err());
        let tokens = Tensor::zeros((1, 5, 16), candle::DType::F32, &Device::Cpu)?;
        assert!(unpack(&tokens, 4, 4).is_err());
        Ok(())
    }

    #[test]
    fn ids_count_rows_then_columns() -> Result<()> {
        let ids = img_ids(0, 4, 6, 3, &Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!(
            ids,
            [
                [0., 0., 0.],
                [0., 0., 1.],
                [0., 0., 2.],
                [0., 1., 0.],
                [0., 1., 1.],
                [0., 1., 2.]
            ]
        );
        assert_eq!(txt_ids(2, 3, &Device::Cpu)?.to_vec2::<f32>()?, [[0.; 3]; 2]);
        let four = img_ids(10, 2, 4, 4, &Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!(four, [[10., 0., 0., 0.], [10., 0., 1., 0.]]);
        let text = txt_ids(2, 4, &Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!(text, [[0.; 4], [0., 0., 0., 1.]]);
        Ok(())
    }
}
