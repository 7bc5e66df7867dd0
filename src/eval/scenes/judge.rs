//! Compares an image with a caption's scene: a small GenEval (arXiv 2310.11513) whose verdicts are exact, as the scenes
//! are.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{
    detect::{Seen, detect},
    grammar::{Layout, Relation, Scene},
};
use crate::sample::png::Image;

/// How far from its place a single object may be.
const NEAR: f64 = 0.15;
/// How far two objects must be apart in the direction of their relation.
const APART: f64 = 0.1;
/// What an image shows, criterion by criterion.
#[expect(clippy::struct_excessive_bools, reason = "a list of verdicts")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The background is right.
    pub background: bool,
    /// There are as many objects as there should be.
    pub count: bool,
    /// Every shape of the caption is there.
    pub shapes: bool,
    /// Every colour of the caption is there.
    pub colours: bool,
    /// Every shape is there in its own colour.
    pub bound: bool,
    /// … and at its place.
    pub position: bool,
    /// Background, count, binding and position are right.
    pub ok: bool,
}

/// Compares an image with a scene.
///
/// # Errors
/// When the image is not square, or too small.
pub fn judge(scene: &Scene, image: &Image) -> Result<Verdict> {
    let (background, seen) = detect(image)?;
    let wanted = scene.objects();
    let mut matched: Vec<usize> = Vec::new();
    for object in &wanted {
        let fits = |(k, s): (usize, &Seen)| {
            let same = s.colour == object.colour && s.shape == Some(object.shape);
            (same && !matched.contains(&k)).then_some(k)
        };
        matched.extend(seen.iter().enumerate().find_map(fits));
    }
    let bound = matched.len() == wanted.len();
    let matched: Vec<&Seen> = matched.iter().map(|k| &seen[*k]).collect();
    let position = match (&scene.layout, matched.as_slice()) {
        (Layout::One(_, place), [one]) => {
            let [x, y] = place.at();
            (one.x - x).hypot(one.y - y) < NEAR
        }
        (Layout::Two(_, relation, _), [a, b]) => match relation {
            Relation::LeftOf => a.x < b.x - APART,
            Relation::RightOf => a.x > b.x + APART,
            Relation::Above => a.y < b.y - APART,
            Relation::Below => a.y > b.y + APART,
        },
        _ => false,
    };
    let (background, count) = (background == scene.background, seen.len() == wanted.len());
    let some = |f: &dyn Fn(&Seen) -> bool| seen.iter().any(f);
    Ok(Verdict {
        background,
        count,
        shapes: wanted.iter().all(|o| some(&|s| s.shape == Some(o.shape))),
        colours: wanted.iter().all(|o| some(&|s| s.colour == o.colour)),
        bound,
        position,
        ok: background && count && bound && position,
    })
}
