//! Several images in one: rows and columns with a thin margin.

use anyhow::{Context, Result, ensure};

use super::png::Image;

/// Pixels between images and around them.
const MARGIN: u32 = 2;
/// The margin's grey.
const GREY: u8 = 128;

/// Puts rows of equally large images into one image.
///
/// # Errors
/// When there is no image or sizes differ.
pub fn grid(rows: &[Vec<Image>]) -> Result<Image> {
    let first = rows
        .iter()
        .flatten()
        .next()
        .context("no image to put into a grid")?;
    let (w, h) = (first.width, first.height);
    ensure!(
        rows.iter().flatten().all(|p| (p.width, p.height) == (w, h)),
        "images of a grid differ in size"
    );
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let width = columns * (w + MARGIN) + MARGIN;
    let height = rows.len() as u32 * (h + MARGIN) + MARGIN;
    let mut rgb = vec![GREY; (3 * width * height) as usize];
    for (row, images) in rows.iter().enumerate() {
        for (column, image) in images.iter().enumerate() {
            let left = column as u32 * (w + MARGIN) + MARGIN;
            let top = row as u32 * (h + MARGIN) + MARGIN;
            for (y, line) in image.rgb.chunks_exact(3 * w as usize).enumerate() {
                let start = 3 * ((top + y as u32) * width + left) as usize;
                rgb[start..start + line.len()].copy_from_slice(line);
            }
        }
    }
    Ok(Image { width, height, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_lie_side_by_side_with_a_margin() {
        let of = |v: u8| Image {
            width: 1,
            height: 1,
            rgb: vec![v; 3],
        };
        let grid = grid(&[vec![of(1), of(2)], vec![of(3)]]).unwrap();
        assert_eq!((grid.width, grid.height), (8, 8));
        let at = |x: u32, y: u32| grid.rgb[3 * (y * grid.width + x) as usize];
        assert_eq!(
            [at(2, 2), at(5, 2), at(2, 5), at(5, 5), at(0, 0)],
            [1, 2, 3, GREY, GREY]
        );
    }
}
