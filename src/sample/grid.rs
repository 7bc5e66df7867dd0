//! Several images in one: rows and columns with a thin margin that is seen between images of any colour.

use anyhow::{Context, Result, ensure};

use super::png::Image;

/// Pixels between images and around them.
const MARGIN: u32 = 4;
/// A black line with white edges.
const LINE: [u8; MARGIN as usize] = [255, 0, 0, 255];

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
    // across a margin; of a crossing the darker line
    let across = |at: u32, side: u32| LINE.get((at % (side + MARGIN)) as usize).copied();
    let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let pixels = pixels.map(|(x, y)| match (across(x, w), across(y, h)) {
        (Some(one), Some(other)) => one.min(other),
        (line, other) => line.or(other).unwrap_or_default(),
    });
    let mut rgb: Vec<u8> = pixels.flat_map(|value| [value; 3]).collect();
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
        assert_eq!((grid.width, grid.height), (14, 14));
        let at = |x: u32, y: u32| grid.rgb[3 * (y * grid.width + x) as usize];
        assert_eq!([at(4, 4), at(9, 4), at(4, 9)], [1, 2, 3]);
        // white, black, black, white between two images, whatever they show
        assert_eq!([5, 6, 7, 8].map(|x| at(x, 4)), LINE);
        assert_eq!([5, 6, 7, 8].map(|y| at(4, y)), LINE);
        assert_eq!([at(0, 0), at(1, 0), at(6, 6)], [255, 0, 0]);
    }
}
