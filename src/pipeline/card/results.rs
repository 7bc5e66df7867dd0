//! The results of `eval` in a model's card: a section between two marks, and the hub's `model-index`. Whatever else stands in
//! the card stays as it is.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::CARD;
use crate::{
    checkpoint::{output::ORIGINAL_STEM, patch::PATCH_FILE, read_small, save},
    pipeline::Pipeline,
};

/// The marks of the section. Cards without them are not ours, or their owner wants no results.
const BEGIN: &str = "<!-- results of `fastflux eval`; the next one replaces what stands here -->\n";
const END: &str = "<!-- end of results -->\n";
/// Those of the hub's `model-index`.
const INDEX_BEGIN: &str = "# results of `fastflux eval`; the next one replaces them\n";
const INDEX_END: &str = "# end of results\n";

/// A section without results, for a new card.
pub(super) fn empty() -> String {
    format!("\n{BEGIN}{END}")
}

/// What `eval` found, for a card.
#[derive(Clone, Debug, Default)]
pub struct CardResults {
    /// Markdown.
    pub text: String,
    /// The hub's `model-index`, as YAML with line ends.
    pub index: String,
}

impl Pipeline {
    /// The card of this very model, if it lies next to its weights: none for a file among others, with LoRA or `--patch`.
    fn own_card(&self) -> Option<PathBuf> {
        let own = self.components.own.as_ref();
        let folder = match &self.components.choice.patch {
            Some(patch) => {
                let alone = patch.level.is_none() && patch.path.ends_with(PATCH_FILE);
                patch.path.parent().filter(|_| alone)?.to_path_buf()
            }
            None => own?.on_disk()?.to_path_buf(),
        };
        let model = PathBuf::from(&self.model_ref);
        let named = model.file_stem().is_some_and(|stem| stem == ORIGINAL_STEM);
        let is_alone = self.components.choice.patch.is_some() || model.is_dir() || named;
        let card = folder.join(CARD);
        (is_alone && self.lora.is_empty() && card.is_file()).then_some(card)
    }

    /// Puts results into the card next to this model, if there is one of ours; its path.
    ///
    /// # Errors
    /// When the card cannot be read or written.
    pub fn publish(&self, results: &CardResults) -> Result<Option<PathBuf>> {
        let Some(path) = self.own_card() else {
            return Ok(None);
        };
        let card = String::from_utf8(read_small(&path)?)
            .with_context(|| format!("`{}` is not UTF-8", path.display()))?;
        let Some(card) = with_results(&card, results) else {
            return Ok(None);
        };
        save::write_bytes(&path, card.as_bytes())?;
        Ok(Some(path))
    }
}

/// The card with these results in the place of earlier ones; `None` if it has no place for them.
fn with_results(card: &str, results: &CardResults) -> Option<String> {
    let section = format!("{BEGIN}{}{END}", results.text);
    let card = between(card, BEGIN, END, &section)?;
    let index = format!("{INDEX_BEGIN}{}{INDEX_END}", results.index);
    if let Some(card) = between(&card, INDEX_BEGIN, INDEX_END, &index) {
        return Some(card);
    }
    let Some((yaml, text)) = card
        .strip_prefix("---\n")
        .and_then(|card| card.split_once("---\n"))
    else {
        return Some(card); // its YAML was taken out
    };
    // somebody else's results stay
    if yaml.lines().any(|line| line.starts_with("model-index")) {
        return Some(card);
    }
    Some(format!("---\n{yaml}{index}---\n{text}"))
}

/// `text` with `new` in the place of what stands from `begin` to `end`, both included.
fn between(text: &str, begin: &str, end: &str, new: &str) -> Option<String> {
    let (before, rest) = text.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{new}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_results_and_nothing_else() {
        let results = |n: usize| CardResults {
            text: format!("text {n}\n"),
            index: format!("model-index:\n- name: \"{n}\"\n"),
        };
        let card = format!("---\ntags:\n- flux\n---\n\n# Mine\n{}\nMore.\n", empty());
        let one = with_results(&card, &results(1)).unwrap();
        let two = with_results(&one, &results(2)).unwrap();
        for part in [
            "tags:\n- flux\n",
            "# Mine\n",
            "\nMore.\n",
            "text 2\n",
            "- name: \"2\"\n",
        ] {
            assert_eq!(two.matches(part).count(), 1, "{two}");
        }
        assert!(one.contains("text 1") && !two.contains("text 1") && !two.contains("\"1\""));
        // no marks: somebody else's, or taken out
        assert_eq!(with_results("---\ntags:\n---\n# Mine\n", &results(1)), None);
        let theirs = card.replace("tags:", "model-index: theirs\ntags:");
        let kept = with_results(&theirs, &results(1)).unwrap();
        assert!(kept.contains("model-index: theirs") && !kept.contains("- name"));
        assert!(kept.contains("text 1"));
    }
}
