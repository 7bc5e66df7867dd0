//! Draws scenes exactly, as `scripts/scenes.py` does.

use super::grammar::{Background, Colour, Layout, Object, Place, Relation, Scene, Shape};
use crate::sample::png::Image;

/// Radius of every shape, as a share of the image's side.
const RADIUS: f64 = 0.2;

impl Colour {
    /// Red, green and blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [220, 40, 40],
            Self::Green => [40, 170, 60],
            Self::Blue => [40, 80, 220],
            Self::Yellow => [240, 210, 40],
            Self::Purple => [150, 60, 190],
            Self::Orange => [245, 130, 30],
        }
    }
}

impl Background {
    /// Red, green and blue, 0 to 255.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [250; 3],
            Self::Black => [15; 3],
            Self::Gray => [128; 3],
        }
    }
}

impl Place {
    /// x and y, as shares of the side.
    pub fn at(self) -> [f64; 2] {
        match self {
            Self::Left => [0.25, 0.5],
            Self::Right => [0.75, 0.5],
            Self::Top => [0.5, 0.25],
            Self::Bottom => [0.5, 0.75],
            Self::Centre => [0.5, 0.5],
        }
    }
}

impl Relation {
    /// Where the first and the second object go.
    fn places(self) -> [Place; 2] {
        match self {
            Self::LeftOf => [Place::Left, Place::Right],
            Self::RightOf => [Place::Right, Place::Left],
            Self::Above => [Place::Top, Place::Bottom],
            Self::Below => [Place::Bottom, Place::Top],
        }
    }
}

impl Shape {
    /// Signed distance, negative inside, of (x, y) from the outline of a shape of radius `r` around the origin; y
    /// points down.
    pub fn distance(self, x: f64, y: f64, r: f64) -> f64 {
        match self {
            Self::Circle => x.hypot(y) - r,
            Self::Square => x.abs().max(y.abs()) - 0.86 * r,
            Self::Triangle => {
                let slope = 0.4472 * (y + r);
                (y - 0.75 * r)
                    .max(0.8944 * x - slope)
                    .max(-0.8944 * x - slope)
            }
            Self::Cross => {
                let (x, y, bar) = (x.abs(), y.abs(), 0.36 * r);
                (x - bar).max(y - r).min((x - r).max(y - bar))
            }
        }
    }
}

/// An object with its centre and radius, as shares of the image's side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placed {
    /// What it is.
    pub object: Object,
    /// Centre from the left.
    pub x: f64,
    /// Centre from the top.
    pub y: f64,
    /// Radius.
    pub r: f64,
}

impl Scene {
    /// The objects where the scene has them, exactly in the middle of what counts as right.
    pub fn placed(&self) -> Vec<Placed> {
        let put = |object, place: Place| {
            let [x, y] = place.at();
            let r = RADIUS;
            Placed { object, x, y, r }
        };
        match self.layout {
            Layout::One(object, place) => vec![put(object, place)],
            Layout::Two(first, relation, second) => {
                let [a, b] = relation.places();
                vec![put(first, a), put(second, b)]
            }
        }
    }
}

/// Draws objects on a background, the later ones above; edges are smoothed over one pixel.
pub fn render(background: Background, objects: &[Placed], side: usize) -> Image {
    let mut values: Vec<f32> = background.rgb().map(f32::from).repeat(side * side);
    let scale = side as f64;
    for placed in objects {
        let colour = placed.object.colour.rgb();
        for (i, pixel) in values.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let (x, y) = ((i % side) as f64 + 0.5, (i / side) as f64 + 0.5);
            let (x, y) = (x - placed.x * scale, y - placed.y * scale);
            let distance = placed.object.shape.distance(x, y, placed.r * scale);
            let cover = (0.5 - distance).clamp(0.0, 1.0) as f32;
            for (value, colour) in pixel.iter_mut().zip(colour) {
                *value = *value * (1.0 - cover) + cover * f32::from(colour);
            }
        }
    }
    let rgb = values.iter().map(|v| v.round_ties_even() as u8).collect();
    let side = side as u32;
    Image {
        width: side,
        height: side,
        rgb,
    }
}
