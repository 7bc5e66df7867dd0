//! Reads background, objects, colours, shapes and positions off an image.

use anyhow::{Result, ensure};

use super::grammar::{Background, Colour, Shape};
use crate::sample::png::Image;

/// Distance from the background, over red, green and blue, beyond which a pixel belongs to an object.
const FOREGROUND: i32 = 80;
/// Connected pixels that are fewer than this share of the image are specks.
const SPECK: f64 = 0.008;
/// Overlap (intersection over union) with the best shape above which an object is that shape.
const OVERLAP: f64 = 0.7;
/// Images smaller than this have no edge to read the background from.
const SMALLEST: usize = 16;

/// An object that was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// The nearest of the colours.
    pub colour: Colour,
    /// `None` if no shape fits.
    pub shape: Option<Shape>,
    /// Overlap with the best shape.
    pub overlap: f64,
    /// Centre from the left, as a share of the side.
    pub x: f64,
    /// Centre from the top.
    pub y: f64,
    /// Radius, as a share of the side.
    pub r: f64,
}

/// Background and objects of a square image.
///
/// # Errors
/// When it is not square, or too small.
pub fn detect(image: &Image) -> Result<(Background, Vec<Seen>)> {
    let side = image.width as usize;
    ensure!(
        image.width == image.height && side >= SMALLEST,
        "scenes are read off square images of at least {SMALLEST} pixels, not {}×{}",
        image.width,
        image.height
    );
    let pixels = image.rgb.as_chunks::<3>().0;
    let background = background(pixels, side);
    let behind = background.rgb();
    let foreground: Vec<bool> = pixels
        .iter()
        .map(|p| squared(*p, behind) > FOREGROUND * FOREGROUND)
        .collect();
    let parts = components(&foreground, side);
    let objects = parts
        .iter()
        .filter(|part| part.len() as f64 >= (side * side) as f64 * SPECK)
        .map(|part| object(part, pixels, side));
    Ok((background, objects.collect()))
}

fn squared(a: [u8; 3], b: [u8; 3]) -> i32 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (i32::from(*a) - i32::from(b)).pow(2))
        .sum()
}

/// The background colour that most pixels of the edge are nearest to. Corners count once for each edge they belong to.
fn background(pixels: &[[u8; 3]], side: usize) -> Background {
    let palette: Vec<[u8; 3]> = Colour::ALL
        .iter()
        .map(|c| c.rgb())
        .chain(Background::ALL.iter().map(|b| b.rgb()))
        .collect();
    let nearest = |pixel: [u8; 3]| {
        let distances = palette.iter().map(|c| squared(pixel, *c));
        first_least(distances)
    };
    let edge = side / 16;
    let is_edge = |i: usize| i < edge || i >= side - edge;
    let mut votes = vec![0usize; palette.len()];
    for (i, pixel) in pixels.iter().enumerate() {
        let times = usize::from(is_edge(i / side)) + usize::from(is_edge(i % side));
        if times > 0 {
            votes[nearest(*pixel)] += times;
        }
    }
    let votes = votes[Colour::ALL.len()..].iter().map(|v| -(*v as i32));
    Background::ALL[first_least(votes)]
}

fn first_least(values: impl Iterator<Item = i32>) -> usize {
    let least = values.enumerate().min_by_key(|(_, value)| *value);
    least.map_or(0, |(index, _)| index)
}

/// Pixels that hang together by their sides, part by part in the order of their first pixel.
fn components(mask: &[bool], side: usize) -> Vec<Vec<usize>> {
    let mut seen = vec![false; mask.len()];
    let mut parts = Vec::new();
    for start in 0..mask.len() {
        if !mask[start] || seen[start] {
            continue;
        }
        seen[start] = true;
        let (mut part, mut next) = (Vec::new(), vec![start]);
        while let Some(i) = next.pop() {
            part.push(i);
            let (row, column) = (i / side, i % side);
            let around = [
                (row + 1 < side).then(|| i + side),
                (row > 0).then(|| i.wrapping_sub(side)),
                (column + 1 < side).then(|| i + 1),
                (column > 0).then(|| i.wrapping_sub(1)),
            ];
            for j in around.into_iter().flatten() {
                if mask[j] && !seen[j] {
                    seen[j] = true;
                    next.push(j);
                }
            }
        }
        parts.push(part);
    }
    parts
}

fn object(part: &[usize], pixels: &[[u8; 3]], side: usize) -> Seen {
    let mut mask = vec![false; pixels.len()];
    for i in part {
        mask[*i] = true;
    }
    let colour = colour(part, &mask, pixels, side);
    let range = |of: fn(usize, usize) -> usize| {
        let values = part.iter().map(|i| of(*i, side));
        let (least, most) = values.fold((usize::MAX, 0), |(a, b), v| (a.min(v), b.max(v)));
        (least as f64, most as f64 + 1.0)
    };
    let (top, bottom) = range(|i, side| i / side);
    let (left, right) = range(|i, side| i % side);
    let (wide, high) = (right - left, bottom - top);
    let middle = (f64::midpoint(left, right), f64::midpoint(top, bottom));
    let mut best: Option<Seen> = None;
    for shape in Shape::ALL {
        // radius and centre from the box around the pixels
        let (r, x, y) = match shape {
            Shape::Square => ((high + wide) / 4.0 / 0.86, middle.0, middle.1),
            Shape::Triangle => {
                let r = f64::midpoint(high / 1.75, wide / 1.75);
                (r, middle.0, middle.1 + 0.125 * r)
            }
            Shape::Circle | Shape::Cross => ((high + wide) / 4.0, middle.0, middle.1),
        };
        let (mut both, mut either) = (0usize, 0usize);
        for (i, drawn) in mask.iter().enumerate() {
            let (px, py) = ((i % side) as f64 + 0.5, (i / side) as f64 + 0.5);
            let inside = shape.distance(px - x, py - y, r) < 0.0;
            both += usize::from(inside && *drawn);
            either += usize::from(inside || *drawn);
        }
        let overlap = both as f64 / either.max(1) as f64;
        if best.is_none_or(|best| overlap > best.overlap) {
            let scale = side as f64;
            best = Some(Seen {
                colour,
                shape: (overlap > OVERLAP).then_some(*shape),
                overlap,
                x: x / scale,
                y: y / scale,
                r: r / scale,
            });
        }
    }
    best.unwrap_or(Seen {
        colour,
        shape: None,
        overlap: 0.0,
        x: 0.0,
        y: 0.0,
        r: 0.0,
    })
}

/// The colour nearest to the median of the pixels whose neighbours belong to the object too: edges are smoothed.
fn colour(part: &[usize], mask: &[bool], pixels: &[[u8; 3]], side: usize) -> Colour {
    let is_core = |i: &&usize| {
        let (row, column) = (**i / side, **i % side);
        let inner = row > 0 && row + 1 < side && column > 0 && column + 1 < side;
        let around = || [**i - 1, **i + 1, **i - side, **i + side];
        !inner || around().iter().all(|j| mask[*j])
    };
    let mut core: Vec<usize> = part.iter().filter(is_core).copied().collect();
    if core.is_empty() {
        core = part.to_vec();
    }
    // twice the median, so that it stays whole
    let median = [0, 1, 2].map(|channel| {
        let mut values: Vec<i32> = core.iter().map(|i| pixels[*i][channel].into()).collect();
        values.sort_unstable();
        let n = values.len();
        values[(n - 1) / 2] + values[n / 2]
    });
    let distances = Colour::ALL.iter().map(|c| {
        let parts = c.rgb().into_iter().zip(median);
        parts.map(|(c, m)| (m - 2 * i32::from(c)).pow(2)).sum()
    });
    Colour::ALL[first_least(distances)]
}
