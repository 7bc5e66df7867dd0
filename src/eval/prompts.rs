//! The prompts of an evaluation: those of a file, or ones that no bundled list is calibrated with.

use std::{collections::HashSet, path::Path};

use anyhow::Result;

use super::scenes::Scene;
use crate::{
    pipeline::{Pipeline, prompts},
    sample::size::ImageSize,
};

/// Images of each model by default.
const DEFAULT_IMAGES: usize = 128;
/// The same if images are large.
const DEFAULT_LARGE_IMAGES: usize = 8;
/// Most images of each model.
const MAX_IMAGES: usize = 10_000;
/// Seed of the captions that are drawn for the bundled model.
const CAPTIONS: u64 = 1;

/// Where prompts are from, and one for each image: `count` of them, by default all of `file`. A short list is used again.
///
/// # Errors
/// When the file cannot be read or holds no prompt.
pub fn choose(
    file: Option<&Path>,
    count: Option<usize>,
    baseline: &Pipeline,
    size: ImageSize,
) -> Result<(String, Vec<String>)> {
    let default = if size.is_large() {
        DEFAULT_LARGE_IMAGES
    } else {
        DEFAULT_IMAGES
    };
    let (source, list, count) = if let Some(path) = file {
        let list = prompts::read("--prompts", path)?;
        let count = count.unwrap_or(list.len()).min(MAX_IMAGES);
        (format!("`{}`", path.display()), list, count)
    } else if prompts::knows_only_scenes(baseline) {
        let count = count.unwrap_or(default);
        let known: HashSet<&str> = prompts::SCENES.lines().collect();
        // half of all captions with one object are known, and a quarter of the others
        let captions = Scene::draw(4 * count + 16, CAPTIONS).map(|scene| scene.to_string());
        let fresh = captions.filter(|caption| !known.contains(caption.as_str()));
        let source = "captions of random scenes, none of the calibration list";
        (source.to_owned(), fresh.collect(), count)
    } else {
        let list = include_str!("../../configs/prompts/eval.txt").lines();
        let source = "configs/prompts/eval.txt, none of the calibration list";
        let list: Vec<String> = list.map(str::to_owned).collect();
        (source.to_owned(), list, count.unwrap_or(default))
    };
    Ok((source, list.iter().cycle().take(count).cloned().collect()))
}
