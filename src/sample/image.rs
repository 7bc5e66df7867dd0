//! Image files → tensors as the VAE's encoder takes them. `png` writes images.

use std::{io::Cursor, path::Path};

use anyhow::{Context, Result, bail, ensure};
use candle::{Device, Tensor};
use resize::{Pixel, Type, px::RGB};
use zune_jpeg::{
    JpegDecoder, zune_core::colorspace::ColorSpace, zune_core::options::DecoderOptions,
};

use super::png::Image;
use crate::files::read_small;

/// Endings of the files that [`read`] understands.
pub const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Pixels of the largest image that is read: 16 times 4K.
const MAX_PIXELS: usize = 1 << 27;

/// Bytes of the largest file that is read.
const MAX_BYTES: u64 = 512 << 20;
/// How much longer than its target, side by side, an image may be before its ends are cut off without being scaled.
const MAX_ASPECT: usize = 8;

/// Reads a PNG or JPEG as 8-bit RGB; transparency is laid on white.
///
/// # Errors
/// When the file cannot be read, is damaged, or is of another format.
pub fn read(path: &Path) -> Result<Image> {
    let name = path.display();
    let bytes = read_small(path, MAX_BYTES)?;
    let image = if bytes.starts_with(b"\x89PNG") {
        read_png(&bytes)
    } else if bytes.starts_with(&[0xff, 0xd8]) {
        read_jpeg(&bytes)
    } else {
        bail!("`{name}` is neither a PNG nor a JPEG image")
    };
    image.with_context(|| format!("`{name}` is damaged"))
}

fn read_png(bytes: &[u8]) -> Result<Image> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let (width, height) = (reader.info().width, reader.info().height);
    check_size(width as usize, height as usize)?;
    let size = reader.output_buffer_size().context("it is too large")?;
    let mut pixels = vec![0; size];
    let info = reader.next_frame(&mut pixels)?;
    pixels.truncate(info.buffer_size());
    let on_white = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let rgb = match info.color_type {
        png::ColorType::Rgb => pixels,
        png::ColorType::Rgba => pixels
            .chunks_exact(4)
            .flat_map(|p| {
                [
                    on_white(p[0], p[3]),
                    on_white(p[1], p[3]),
                    on_white(p[2], p[3]),
                ]
            })
            .collect(),
        png::ColorType::Grayscale => pixels.iter().flat_map(|g| [*g; 3]).collect(),
        png::ColorType::GrayscaleAlpha => pixels
            .chunks_exact(2)
            .flat_map(|p| [on_white(p[0], p[1]); 3])
            .collect(),
        png::ColorType::Indexed => bail!("its palette was not resolved"),
    };
    Ok(Image { width, height, rgb })
}

/// Fails at a size that no image for a model has.
fn check_size(width: usize, height: usize) -> Result<()> {
    ensure!(
        width.saturating_mul(height) <= MAX_PIXELS,
        "it is {width}×{height} pixels, the most is {MAX_PIXELS}"
    );
    Ok(())
}

fn read_jpeg(bytes: &[u8]) -> Result<Image> {
    let options = DecoderOptions::default()
        .jpeg_set_out_colorspace(ColorSpace::RGB)
        .set_max_width(1 << 16)
        .set_max_height(1 << 16);
    let mut decoder = JpegDecoder::new_with_options(Cursor::new(bytes), options);
    // before anything is allocated for its pixels
    decoder.decode_headers()?;
    let info = decoder.info().context("it has no header")?;
    check_size(info.width.into(), info.height.into())?;
    let rgb = decoder.decode()?;
    let info = decoder.info().context("it has no header")?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    ensure!(rgb.len() == 3 * (width * height) as usize, "it is cut off");
    Ok(Image { width, height, rgb })
}

/// The image, made smaller (Lanczos) if a side is longer than `most` pixels.
///
/// # Errors
/// When the image is empty.
pub fn within(image: &Image, most: u32) -> Result<Image> {
    let (w, h) = (image.width, image.height);
    ensure!(w > 0 && h > 0 && most > 0, "the image is empty");
    let longest = w.max(h);
    if longest <= most {
        return Ok(image.clone());
    }
    let scaled = |side: u32| (u64::from(side) * u64::from(most) / u64::from(longest)).max(1) as u32;
    let (width, height) = (scaled(w), scaled(h));
    resized(image, width, height)
}

/// The image scaled to this size (Lanczos), whatever its own shape.
///
/// One side after the other with bytes between them, as Pillow 13 does, from which this differs by 1 in a thousandth of the
/// values; both at once would differ by 2 on smooth pictures and by 40 on noise.
///
/// # Errors
/// When it has no pixels, before or after.
pub fn resized(image: &Image, width: u32, height: u32) -> Result<Image> {
    let has_pixels = |image: &Image| image.width > 0 && image.height > 0;
    ensure!(
        has_pixels(image) && width > 0 && height > 0,
        "the image is empty"
    );
    let [from_w, from_h, to_w, to_h] =
        [image.width, image.height, width, height].map(|side| side as usize);
    let scaled = |source: &[RGB<u8>], (w, h): (usize, usize), (to_w, to_h): (usize, usize)| {
        let mut out = vec![RGB::new(0, 0, 0); to_w * to_h];
        resize::new(w, h, to_w, to_h, Pixel::RGB8, Type::Lanczos3)?.resize(source, &mut out)?;
        anyhow::Ok(out)
    };
    let pixels = image.rgb.as_chunks::<3>().0.iter();
    let pixels: Vec<_> = pixels.map(|p| RGB::new(p[0], p[1], p[2])).collect();
    // height first where that alone leaves less for the second pass
    let between = if to_w > from_w && to_h < from_h {
        (from_w, to_h)
    } else {
        (to_w, from_h)
    };
    let half = scaled(&pixels, (from_w, from_h), between)?;
    let out = scaled(&half, between, (to_w, to_h))?;
    Ok(Image {
        width,
        height,
        rgb: out.iter().flat_map(|p| [p.r, p.g, p.b]).collect(),
    })
}

/// The middle of the image.
///
/// # Errors
/// When it is smaller than that.
pub fn cropped(image: &Image, width: u32, height: u32) -> Result<Image> {
    ensure!(
        width <= image.width && height <= image.height,
        "the image is smaller than {width}×{height}"
    );
    let (left, top) = ((image.width - width) / 2, (image.height - height) / 2);
    let line = |row: u32| {
        let start = 3 * ((top + row) * image.width + left) as usize;
        image.rgb[start..start + 3 * width as usize].iter().copied()
    };
    Ok(Image {
        width,
        height,
        rgb: (0..height).flat_map(line).collect(),
    })
}

/// Scales an image to cover `width` × `height` (Lanczos), crops what overlaps evenly, and gives (3, height, width) in
/// \[-1, 1\], f32 on the CPU.
///
/// # Errors
/// When the image is empty.
pub fn covering(image: &Image, width: usize, height: usize) -> Result<Tensor> {
    ensure!(image.width > 0 && image.height > 0, "the image is empty");
    let image = &without_ends(image, width, height);
    let (w, h) = (image.width as usize, image.height as usize);
    let scale = (width as f64 / w as f64).max(height as f64 / h as f64);
    let inner = |size: usize, least: usize| ((size as f64 * scale).round() as usize).max(least);
    let (wide, high) = (inner(w, width), inner(h, height));
    let scaled = resized(image, wide as u32, high as u32)?;
    let scaled = scaled.rgb.as_chunks::<3>().0;
    let (left, top) = ((wide - width) / 2, (high - height) / 2);
    let mut values = Vec::with_capacity(3 * width * height);
    for channel in 0..3 {
        for row in top..top + height {
            let row = &scaled[row * wide + left..row * wide + left + width];
            values.extend(row.iter().map(|p| f32::from(p[channel]) / 127.5 - 1.0));
        }
    }
    Ok(Tensor::from_vec(values, (3, height, width), &Device::Cpu)?)
}

/// The middle of an image that is far longer than `width` × `height`: what is cut off would be scaled for nothing, to
/// gigabytes if a line of a million pixels is given.
fn without_ends(image: &Image, width: usize, height: usize) -> Image {
    let (w, h) = (image.width as usize, image.height as usize);
    let most =
        |across: usize, along: usize, of: usize| (MAX_ASPECT * across * along).div_ceil(of).max(1);
    let new_w = w.min(most(h, width, height));
    let new_h = h.min(most(w, height, width));
    if (new_w, new_h) == (w, h) {
        return image.clone();
    }
    let (left, top) = ((w - new_w) / 2, (h - new_h) / 2);
    let row = |row: usize| {
        let start = 3 * (row * w + left);
        image.rgb[start..start + 3 * new_w].iter().copied()
    };
    Image {
        width: new_w as u32,
        height: new_h as u32,
        rgb: (top..top + new_h).flat_map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_written_is_read_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let rgb: Vec<u8> = (0..3 * 6 * 4).map(|i| (i * 3) as u8).collect();
        let image = Image {
            width: 6,
            height: 4,
            rgb,
        };
        image.save(&path, &[]).unwrap();
        assert_eq!(read(&path).unwrap(), image);
        let same = covering(&image, 6, 4).unwrap();
        assert_eq!(Image::from_decoded(&same).unwrap(), image);
    }

    #[test]
    fn a_wide_image_is_scaled_and_cropped_in_the_middle() {
        // black, white, black in thirds
        let row = [[0u8; 3]; 4]
            .into_iter()
            .chain([[255; 3]; 4])
            .chain([[0; 3]; 4]);
        let row: Vec<u8> = row.flatten().collect();
        let image = Image {
            width: 12,
            height: 4,
            rgb: row.repeat(4),
        };
        let middle = covering(&image, 2, 2).unwrap();
        assert_eq!(middle.dims(), [3, 2, 2]);
        let least = middle.min_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(least > 0.5, "{least}");
    }

    #[test]
    fn a_line_of_a_million_pixels_is_cut_before_it_is_scaled() {
        for (width, height) in [(1, 1_000_000), (1_000_000, 1)] {
            let image = Image {
                width,
                height,
                rgb: vec![90; 3_000_000],
            };
            let middle = covering(&image, 64, 32).unwrap();
            assert_eq!(middle.dims(), [3, 32, 64]);
            let cut = without_ends(&image, 64, 32);
            assert!(cut.width * cut.height <= 16, "{}×{}", cut.width, cut.height);
        }
        let ordinary = Image {
            width: 40,
            height: 30,
            rgb: vec![90; 3600],
        };
        assert_eq!(without_ends(&ordinary, 64, 32), ordinary);
    }

    /// Source: Pillow 13.0 `Image.resize(size, LANCZOS)`, green values of the second row.
    #[test]
    fn an_image_is_scaled_as_pillow_scales_it() {
        let value =
            |x: usize, y: usize, c: usize| (x * x * 37 + y * 91 * (c + 1) + x * y * 101) as u8;
        let rgb = (0..5 * 6 * 3).map(|i| value(i / 3 % 6, i / 18, i % 3));
        let image = Image {
            width: 6,
            height: 5,
            rgb: rgb.collect(),
        };
        for (width, height, right) in [
            (9, 7, vec![109, 78, 46, 59, 66, 77, 104, 104, 91]),
            (9, 3, vec![109, 102, 88, 81, 65, 88, 159, 198, 197]),
            (3, 7, vec![73, 66, 100]),
            (4, 2, vec![125, 110, 156, 141]),
        ] {
            let scaled = resized(&image, width, height).unwrap();
            let row: Vec<u8> = scaled
                .rgb
                .chunks(3)
                .skip(right.len())
                .take(right.len())
                .map(|p| p[1])
                .collect();
            assert_eq!(row, right, "{width}×{height}");
        }
    }

    #[test]
    fn a_header_of_too_many_pixels_is_refused_before_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        // start, quantisation table of ones, frame of 65,535 × 65,535, scan
        let mut bytes = vec![0xff, 0xd8, 0xff, 0xdb, 0, 67, 0];
        bytes.extend([1; 64]);
        bytes.extend([0xff, 0xc0, 0, 17, 8, 0xff, 0xff, 0xff, 0xff, 3]);
        bytes.extend([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]);
        bytes.extend([0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 63, 0, 0]);
        std::fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("65535×65535"), "{error}");
    }

    #[test]
    fn an_image_is_made_smaller_but_never_larger() {
        let image = Image {
            width: 40,
            height: 20,
            rgb: vec![90; 3 * 800],
        };
        assert_eq!(within(&image, 40).unwrap(), image);
        let small = within(&image, 10).unwrap();
        assert_eq!((small.width, small.height), (10, 5));
        assert!(small.rgb.iter().all(|v| v.abs_diff(90) <= 1));
    }

    #[test]
    fn damaged_images_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut rgb = Vec::new();
        rgb.resize(3 * 32 * 32, 77);
        let whole = folder.path().join("a.png");
        Image {
            width: 32,
            height: 32,
            rgb,
        }
        .save(&whole, &[])
        .unwrap();
        let bytes = std::fs::read(&whole).unwrap();
        for (name, bytes) in [
            ("cut.png", &bytes[..bytes.len() / 2]),
            ("text.png", b"hello".as_slice()),
            ("cut.jpg", &[0xff, 0xd8, 0xff, 0xe0]),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
