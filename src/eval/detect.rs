//! Reads background, objects, colours, shapes and positions off a picture and compares them with a caption's scene:
//! a small GenEval (arXiv 2310.11513) whose verdicts are exact, as the scenes are.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::scene::{Background, Colour, Layout, Relation, Scene, Shape};
use crate::sample::png::Picture;

/// Distance from the background, over red, green and blue, beyond which a pixel belongs to an object.
const FOREGROUND: i32 = 80;
/// Connected pixels that are fewer than this share of the picture are specks.
const SPECK: f64 = 0.008;
/// Overlap (intersection over union) with the best shape above which an object is that shape.
const OVERLAP: f64 = 0.7;
/// How far from its place a single object may be.
const NEAR: f64 = 0.15;
/// How far two objects must be apart in the direction of their relation.
const APART: f64 = 0.1;
/// Pictures smaller than this have no edge to read the background from.
const SMALLEST: usize = 16;

/// An object that was seen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// The nearest of the colours.
    pub colour: Colour,
    /// `None` where no shape fits.
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

/// What a picture shows, criterion by criterion.
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

/// Background and objects of a square picture.
///
/// # Errors
/// When it is not square, or too small.
pub fn detect(picture: &Picture) -> Result<(Background, Vec<Seen>)> {
    let side = picture.width as usize;
    ensure!(
        picture.width == picture.height && side >= SMALLEST,
        "scenes are read off square pictures of at least {SMALLEST} pixels, not {}×{}",
        picture.width,
        picture.height
    );
    let pixels = picture.rgb.as_chunks::<3>().0;
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

/// Compares a picture with a scene.
///
/// # Errors
/// When the picture is not square, or too small.
pub fn judge(scene: &Scene, picture: &Picture) -> Result<Verdict> {
    let (background, seen) = detect(picture)?;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::{
        eval::scene::{Object, Placed, render},
        sample::image,
    };

    /// Pictures of `scripts/scenes.py` and what it says of them.
    fn golden() -> Vec<(Picture, Value)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let all = image::read(&folder.join("scenes.png")).unwrap();
        let text = std::fs::read(folder.join("scenes.json")).unwrap();
        let rows: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let side = all.width;
        let pictures = all.rgb.chunks_exact(3 * (side * side) as usize);
        assert_eq!(pictures.len(), rows.len());
        let picture = |rgb: &[u8]| Picture {
            width: side,
            height: side,
            rgb: rgb.to_vec(),
        };
        pictures.map(picture).zip(rows).collect()
    }

    fn named<T: Copy>(all: &[T], word: fn(T) -> &'static str, json: &Value) -> Option<T> {
        let text = json.as_str().unwrap();
        all.iter().copied().find(|value| word(*value) == text)
    }

    #[test]
    fn the_same_is_read_off_a_picture_as_in_python() {
        for (picture, row) in golden() {
            let (background, seen) = detect(&picture).unwrap();
            assert_eq!(background.word(), row["background"], "{row}");
            let theirs = row["seen"].as_array().unwrap();
            assert_eq!(seen.len(), theirs.len(), "{row}");
            for (ours, theirs) in seen.iter().zip(theirs) {
                assert_eq!(ours.colour.word(), theirs["colour"], "{row}");
                assert_eq!(
                    ours.shape.map_or("?", Shape::word),
                    theirs["shape"],
                    "{row}"
                );
                for (name, value) in [
                    ("overlap", ours.overlap),
                    ("x", ours.x),
                    ("y", ours.y),
                    ("r", ours.r),
                ] {
                    let off = (value - theirs[name].as_f64().unwrap()).abs();
                    assert!(off < 1e-12, "{name}: {off} {row}");
                }
            }
            let scene = Scene::parse(row["caption"].as_str().unwrap()).unwrap();
            let verdict = judge(&scene, &picture).unwrap();
            assert_eq!(
                serde_json::to_value(verdict).unwrap(),
                row["verdict"],
                "{row}"
            );
        }
    }

    #[test]
    fn the_recorded_verdicts_tell_right_from_wrong() {
        let rows = golden();
        for name in ["background", "count", "shapes", "colours", "bound", "ok"] {
            let right = rows.iter().filter(|(_, row)| row["verdict"][name] == true);
            let right = right.count();
            assert!((5..rows.len()).contains(&right), "{name}: {right}");
        }
        let misplaced =
            |row: &Value| row["verdict"]["bound"] == true && row["verdict"]["position"] == false;
        assert!(rows.iter().any(|(_, row)| misplaced(row)));
    }

    #[test]
    fn scenes_are_drawn_as_in_python() {
        let mut drawn = 0;
        for (picture, row) in golden() {
            let Some(objects) = row["objects"].as_array() else {
                continue;
            };
            let number = |o: &Value, name: &str| o[name].as_f64().unwrap();
            let objects: Vec<Placed> = objects
                .iter()
                .map(|o| Placed {
                    object: Object {
                        colour: named(Colour::ALL, Colour::word, &o["colour"]).unwrap(),
                        shape: named(Shape::ALL, Shape::word, &o["shape"]).unwrap(),
                    },
                    x: number(o, "x"),
                    y: number(o, "y"),
                    r: number(o, "r"),
                })
                .collect();
            let background = named(Background::ALL, Background::word, &row["background"]);
            let ours = render(background.unwrap(), &objects, picture.width as usize);
            assert!(ours == picture, "{row}");
            drawn += 1;
        }
        assert_eq!(drawn, 10);
    }

    #[test]
    fn every_scene_drawn_exactly_is_right_at_any_size_and_a_changed_caption_is_wrong() {
        for scene in Scene::draw(60, 5) {
            let picture = |side| render(scene.background, &scene.placed(), side);
            for side in [48, 64, 160] {
                let verdict = judge(&scene, &picture(side)).unwrap();
                assert!(verdict.ok, "{scene} at {side}: {verdict:?}");
            }
            let mut other = scene;
            match &mut other.layout {
                Layout::One(object, _) | Layout::Two(object, _, _) => {
                    object.shape = match object.shape {
                        Shape::Circle => Shape::Cross,
                        _ => Shape::Circle,
                    };
                }
            }
            let verdict = judge(&other, &picture(64)).unwrap();
            assert!(!verdict.ok && !verdict.bound && verdict.background && verdict.count);
        }
    }

    #[test]
    fn empty_and_oblong_pictures_are_no_panic() {
        let of = |width, height| Picture {
            width,
            height,
            rgb: vec![250; 3 * (width * height) as usize],
        };
        let (background, seen) = detect(&of(64, 64)).unwrap();
        assert_eq!((background, seen.len()), (Background::White, 0));
        assert!(detect(&of(64, 32)).is_err());
        assert!(detect(&of(0, 0)).is_err());
    }
}
