use std::path::Path;

use serde_json::Value;

use super::*;
use crate::sample::{image, png::Image};

/// Images of `scripts/scenes.py` and what it says of them.
fn golden() -> Vec<(Image, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let all = image::read(&folder.join("scenes.png")).unwrap();
    let text = std::fs::read(folder.join("scenes.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&text).unwrap();
    let side = all.width;
    let images = all.rgb.chunks_exact(3 * (side * side) as usize);
    assert_eq!(images.len(), rows.len());
    let image = |rgb: &[u8]| Image {
        width: side,
        height: side,
        rgb: rgb.to_vec(),
    };
    images.map(image).zip(rows).collect()
}

fn named<T: Copy>(all: &[T], word: fn(T) -> &'static str, json: &Value) -> Option<T> {
    let text = json.as_str().unwrap();
    all.iter().copied().find(|value| word(*value) == text)
}

#[test]
fn the_same_is_read_off_a_image_as_in_python() {
    for (image, row) in golden() {
        let (background, seen) = detect(&image).unwrap();
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
        let verdict = judge(&scene, &image).unwrap();
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
    for (image, row) in golden() {
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
        let ours = render(background.unwrap(), &objects, image.width as usize);
        assert!(ours == image, "{row}");
        drawn += 1;
    }
    assert_eq!(drawn, 10);
}

#[test]
fn every_scene_drawn_exactly_is_right_at_any_size_and_a_changed_caption_is_wrong() {
    for scene in Scene::draw(60, 5) {
        let image = |side| render(scene.background, &scene.placed(), side);
        for side in [48, 64, 160] {
            let verdict = judge(&scene, &image(side)).unwrap();
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
        let verdict = judge(&other, &image(64)).unwrap();
        assert!(!verdict.ok && !verdict.bound && verdict.background && verdict.count);
    }
}

#[test]
fn empty_and_oblong_images_are_no_panic() {
    let of = |width, height| Image {
        width,
        height,
        rgb: vec![250; 3 * (width * height) as usize],
    };
    let (background, seen) = detect(&of(64, 64)).unwrap();
    assert_eq!((background, seen.len()), (Background::White, 0));
    assert!(detect(&of(64, 32)).is_err());
    assert!(detect(&of(0, 0)).is_err());
}

#[test]
fn every_caption_of_the_list_is_parsed_and_said_again() {
    let list = include_str!("../../../configs/tiny/prompts.txt");
    for caption in list.lines() {
        let scene = Scene::parse(caption).unwrap();
        assert_eq!(scene.to_string(), caption);
    }
}

#[test]
fn other_texts_are_not_scenes() {
    for text in [
        "",
        "a photo of a cat",
        "a red circle",
        "a red circle on a white background",
        "a red circle at the left on a pink background",
        "a red hexagon at the left on a white background",
        "a red circle near a blue square on a white background",
        "a red circle left of a blue square at the top on a white background",
        "a red circle left of a blue square",
        "the red circle at the left on a white background",
    ] {
        assert_eq!(Scene::parse(text), None, "{text}");
    }
}

#[test]
fn drawn_scenes_are_of_the_grammar_and_depend_on_the_seed() {
    let draw = |seed| Scene::draw(200, seed).collect::<Vec<_>>();
    let scenes = draw(1);
    assert_eq!(scenes, draw(1));
    assert_ne!(scenes, draw(2));
    let singles = scenes.iter().filter(|s| s.objects().len() == 1).count();
    assert!((40..100).contains(&singles), "{singles}");
    for scene in scenes {
        assert_eq!(Scene::parse(&scene.to_string()), Some(scene));
        if let [a, b] = scene.objects()[..] {
            assert_ne!(a.colour, b.colour);
        }
    }
}
