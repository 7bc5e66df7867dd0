//! Decoded images → PNG files with text about how they were made. `vae` decodes.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, ensure};
use candle::{DType, Device, Tensor};

use crate::files::output;

/// 8-bit RGB, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// `3 · width · height` bytes.
    pub rgb: Vec<u8>,
}

impl Image {
    /// Rounds a decoded image (3, h, w) in [-1, 1] as diffusers' `VaeImageProcessor` does; NaN becomes 0.
    pub fn from_decoded(image: &Tensor) -> Result<Self> {
        let (c, h, w) = image.dims3()?;
        ensure!(c == 3, "an image of {c} channels cannot be written as RGB");
        let values = image
            .to_dtype(DType::F32)?
            .permute((1, 2, 0))?
            .flatten_all()?
            .to_vec1::<f32>()?;
        let rgb = values
            .iter()
            .map(|v| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8)
            .collect();
        Ok(Self {
            width: w as u32,
            height: h as u32,
            rgb,
        })
    }

    /// (3, height, width) in [-1, 1], f32 on the CPU, as diffusers' `VaeImageProcessor` makes it.
    ///
    /// # Errors
    /// When the image's size and bytes do not fit.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let (w, h) = (self.width as usize, self.height as usize);
        let values: Vec<f32> = self.rgb.iter().map(|v| f32::from(*v) / 255.0).collect();
        let image = Tensor::from_vec(values, (h, w, 3), &Device::Cpu)?;
        Ok(image.permute((2, 0, 1))?.contiguous()?.affine(2.0, -1.0)?)
    }

    /// Writes a PNG with one text chunk per `(keyword, text)`. The file appears whole or not at all.
    ///
    /// Keywords are 1 to 79 Latin-1 characters; a text that is not Latin-1 goes into an `iTXt` chunk, else `tEXt`.
    pub fn save(&self, path: &Path, text: &[(&str, &str)]) -> Result<()> {
        output::write(path, |file| self.write(BufWriter::new(file), text))
    }

    /// The same as the bytes of a file, without text.
    ///
    /// # Errors
    /// When the image's size and bytes do not fit.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write(&mut out, &[])?;
        Ok(out)
    }

    fn write(&self, mut sink: impl Write, text: &[(&str, &str)]) -> Result<()> {
        let mut encoder = png::Encoder::new(&mut sink, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, value) in text {
            // a NUL ends a chunk's text
            let value = value.replace('\0', "\u{fffd}");
            if value.chars().all(|c| (c as u32) < 256) {
                encoder.add_text_chunk((*keyword).to_owned(), value)?;
            } else {
                encoder.add_itxt_chunk((*keyword).to_owned(), value)?;
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        sink.flush()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn image() -> Image {
        Image {
            width: 2,
            height: 1,
            rgb: vec![1, 2, 3, 250, 251, 252],
        }
    }

    #[test]
    fn pixels_and_text_come_back() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.png");
        let long = "é".repeat(3000);
        image().save(
            &path,
            &[
                ("prompt", "ein Haus, 夜 🌙\nzweite Zeile"),
                ("seed", "7"),
                ("latin", &long),
            ],
        )?;
        let mut reader =
            png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path)?)).read_info()?;
        let mut bytes = vec![0; reader.output_buffer_size().context("size")?];
        reader.next_frame(&mut bytes)?;
        assert_eq!(bytes, image().rgb);
        let info = reader.info();
        assert_eq!((info.width, info.height), (2, 1));
        assert_eq!(info.utf8_text[0].keyword, "prompt");
        assert_eq!(
            info.utf8_text[0].get_text()?,
            "ein Haus, 夜 🌙\nzweite Zeile"
        );
        let latin: Vec<_> = info
            .uncompressed_latin1_text
            .iter()
            .map(|t| (t.keyword.as_str(), t.text.as_str()))
            .collect();
        assert_eq!(latin, [("seed", "7"), ("latin", long.as_str())]);
        assert_eq!(
            std::fs::read_dir(folder.path())?.count(),
            1,
            "no temporary file stays"
        );
        Ok(())
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.png");
        assert!(
            image()
                .save(&path, &[("", "an empty keyword is not allowed")])
                .is_err()
        );
        assert_eq!(std::fs::read_dir(folder.path())?.count(), 0);
        let missing = folder.path().join("none").join("a.png");
        let error = format!("{:#}", image().save(&missing, &[]).unwrap_err());
        assert!(error.contains("none"), "{error}");
        Ok(())
    }

    #[test]
    fn rounding_is_half_to_even_after_clamping() -> Result<()> {
        // 0 → 127.5 → 128, 1/255 → 128, beyond the range → 0 and 255
        let x = Tensor::new(
            &[0f32, 1.0 / 255.0, -3.0, 3.0, f32::NAN, -1.0],
            &Device::Cpu,
        )?
        .reshape((3, 1, 2))?;
        let image = Image::from_decoded(&x)?;
        assert_eq!(image.rgb, [128, 0, 0, 128, 255, 0]);
        Ok(())
    }
}
