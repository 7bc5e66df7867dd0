//! Prompts: read from a file, or a bundled list that the model has words for.

use std::{io::Read, path::Path};

use anyhow::{Context, Result, bail, ensure};

use super::Pipeline;
use crate::sample::text;

/// The prompts of a file, one a line, or of standard input (`-`); blank lines are skipped.
///
/// # Errors
/// When it cannot be read, is not UTF-8, or holds no prompt; the message names `flag`.
pub fn read(flag: &str, path: &Path) -> Result<Vec<String>> {
    let name = path.display();
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    let bytes = bytes.with_context(|| format!("{flag}: cannot read `{name}`"))?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("{flag}: `{name}` is not UTF-8 text")
    };
    let text = text.trim_start_matches('\u{feff}');
    let prompts: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    ensure!(!prompts.is_empty(), "{flag}: `{name}` holds no prompt");
    Ok(prompts)
}

/// The prompts to calibrate with when the user names none: scenes the bundled model was trained on, or varied prompts
/// for real models.
pub fn bundled(pipeline: &Pipeline) -> Vec<String> {
    let text = if knows_only_scenes(pipeline) {
        SCENES
    } else {
        include_str!("../../configs/prompts/calibration.txt")
    };
    text.lines().map(str::to_owned).collect()
}

/// Captions of the bundled model's scenes, calibrated with and trained on.
pub const SCENES: &str = include_str!("../../configs/tiny/prompts.txt");

/// Whether the model has words for the bundled model's scenes and spells all others, as that model and its kin do.
pub fn knows_only_scenes(pipeline: &Pipeline) -> bool {
    let spells = |prompt: &str| {
        let tokens =
            text::token_count(pipeline.config.family.text, &pipeline.text_files()?, prompt)?;
        anyhow::Ok(tokens > 2 * prompt.split(' ').count())
    };
    let caption = SCENES.lines().next().unwrap_or_default();
    match (spells(caption), spells("a photograph of a village")) {
        (Ok(caption), Ok(other)) => other && !caption,
        // if text encoders cannot be opened, that is said when they are needed
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::ModelChoice, *};

    #[test]
    fn a_model_is_given_prompts_that_it_has_words_for() {
        let bundled = Pipeline::open(&ModelChoice::default()).unwrap();
        assert!(super::bundled(&bundled)[0].contains("background"));
        // FLUX.1's own tokenizers, which know both
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/flux1");
        let flux1 = Pipeline::open(&ModelChoice {
            text_encoders: Some(folder.into()),
            ..ModelChoice::default()
        });
        assert!(!super::bundled(&flux1.unwrap())[0].contains("background"));
    }
}
