//! The model card of an output folder: a `README.md` with the hub's YAML, and the notice that the base's licence asks for.
//!
//! Sources: the hub's model card specification (`huggingface_hub` `ModelCardData`), section 3 of the FLUX.1 \[dev\]
//! Non-Commercial License, section 4 of Apache-2.0.

use std::{fmt::Write as _, path::Path};

use anyhow::Result;

use crate::{
    checkpoint::{output::Naming, record::Record, save},
    files::parse_id,
    layout::{BlockSpec, Form, original_ids},
    ui,
};

mod results;
mod usage;

pub use results::CardResults;

/// The card's name in a folder, and the notice's.
pub const CARD: &str = "README.md";
const NOTICE: &str = "NOTICE";

/// A licence as the hub names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Licence {
    Apache,
    FluxDev,
    /// FLUX.2 but klein-4B.
    Flux2,
    Unknown,
}

impl Licence {
    /// By the name of the base, which all copies of it keep.
    fn of(base: &str) -> Self {
        let base = base.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| base.contains(word));
        if has(&["schnell", "bundled"]) || (has(&["klein"]) && has(&["4b"])) {
            Self::Apache
        } else if has(&["flux.2", "flux2"]) {
            Self::Flux2
        } else if has(&["flux.1", "flux1"]) {
            Self::FluxDev
        } else {
            Self::Unknown
        }
    }

    fn yaml(self) -> &'static str {
        match self {
            Self::Apache => "license: apache-2.0\n",
            Self::FluxDev => {
                "license: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md\n"
            }
            Self::Flux2 => "license: other\nlicense_name: flux-non-commercial-license\n",
            Self::Unknown => "license: other\nlicense_name: that-of-the-base-model\n",
        }
    }

    fn notice(self, base: &str) -> String {
        let changed = format!(
            "This model was made from {base} by {}: blocks of its transformer were changed.\n",
            crate::checkpoint::record::software()
        );
        match self {
            Self::Apache => format!(
                "{changed}\nThe base is licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0), and so is this model.\n"
            ),
            Self::FluxDev => format!(
                "{changed}\nThis FLUX Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev] Non-Commercial License. Copyright Black Forest Labs Inc.\nIN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS MODEL.\n"
            ),
            Self::Flux2 => format!(
                "{changed}\nThis FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License, which comes with the base: put it next to this file before you publish it.\n"
            ),
            Self::Unknown => format!(
                "{changed}\nIt stays under the licence of its base: put that licence next to this file before you publish it.\n"
            ),
        }
    }
}

/// What a card says in addition to the record.
#[derive(Clone, Debug, Default)]
pub struct CardFacts {
    /// Whose names the tensors have.
    pub layout: Naming,
    /// Whether the other parts of the pipeline are in the folder.
    pub whole: bool,
    /// Parameters of the transformer: before, if it was another number, and now.
    pub parameters: [usize; 2],
    /// Bytes of the transformer now.
    pub bytes: usize,
    /// Whether weights are in fewer bits than 16.
    pub quantized: bool,
    /// Whether the folder holds a patch, not a whole checkpoint.
    pub patch: bool,
    /// The family, for people.
    pub family: String,
    /// What was measured, a line each.
    pub results: Vec<String>,
}

/// The hub's name of a model, if that is how it was named; by its family otherwise.
fn hub_id(base: &str, family: &str) -> Option<String> {
    if !Path::new(base).exists()
        && let Some((id, _)) = parse_id(base)
    {
        return Some(id);
    }
    let known = ["FLUX.1-dev", "FLUX.1-schnell"];
    known
        .contains(&family)
        .then(|| format!("black-forest-labs/{family}"))
}

/// Writes card and notice into `folder`.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write(folder: &Path, record: &Record, facts: &CardFacts) -> Result<()> {
    let base = hub_id(&record.base, &facts.family);
    let named = base.clone().unwrap_or_else(|| record.base.clone());
    let licence = Licence::of(&format!("{named} {}", facts.family));
    save::write_bytes(&folder.join(NOTICE), licence.notice(&named).as_bytes())?;
    save::write_bytes(
        &folder.join(CARD),
        card(record, facts, base.as_deref(), licence).as_bytes(),
    )
}

fn card(record: &Record, facts: &CardFacts, base: Option<&str>, licence: Licence) -> String {
    let mut out = String::from("---\n");
    if let Some(base) = base {
        let relation = if facts.quantized {
            "quantized"
        } else {
            "finetune"
        };
        let _ = write!(out, "base_model: {base}\nbase_model_relation: {relation}\n");
    }
    out += licence.yaml();
    let library = match facts.layout {
        Naming::Diffusers if !facts.patch => "diffusers",
        _ => "fastflux",
    };
    let _ = write!(
        out,
        "library_name: {library}\npipeline_tag: text-to-image\ntags:\n- flux\n- fastflux\n- text-to-image\n"
    );
    let replaced = replaced(&record.layout);
    if !replaced.is_empty() {
        out += "- pruned\n";
    }
    out += "---\n\n";
    let named = base.unwrap_or(&record.base);
    let what = if replaced.is_empty() && !facts.quantized {
        "written"
    } else {
        "made smaller"
    };
    let _ = write!(out, "# {named}, {what} by fastflux\n\n");
    let all = original_ids(&record.layout).count();
    if replaced.is_empty() {
        let _ = write!(out, "All {all} blocks of the transformer are kept");
    } else {
        let _ = write!(
            out,
            "{} of {all} blocks of the transformer {} replaced",
            replaced.len(),
            if replaced.len() == 1 { "is" } else { "are" }
        );
    }
    let [before, now] = facts.parameters.map(|n| ui::count(n as f64));
    if before == now {
        let _ = writeln!(
            out,
            "; {now} parameters, {}.",
            ui::bytes(facts.bytes as f64)
        );
    } else {
        let _ = writeln!(
            out,
            "; {now} parameters instead of {before}, {}.",
            ui::bytes(facts.bytes as f64)
        );
    }
    if !replaced.is_empty() {
        out += "\n| blocks | what stands for them |\n| --- | --- |\n";
        for (blocks, form) in replaced_entries(&record.layout) {
            let _ = writeln!(out, "| {blocks} | {form} |");
        }
    }
    for lora in &record.lora {
        let file = lora.file.file_name().unwrap_or_default().to_string_lossy();
        let _ = write!(
            out,
            "\nThe LoRA `{file}` is in the weights, multiplied by {}.\n",
            lora.weight
        );
    }
    out += "\n## Results\n";
    if let Some((first, rest)) = facts.results.split_first() {
        let _ = writeln!(out, "\n- {first}");
        for line in rest {
            let _ = writeln!(out, "- {line}");
        }
    }
    out += &results::empty();
    let _ = write!(
        out,
        "\n## How it was made\n\nOf {named}:\n\n{}\nThe last command, with {}:\n\n```\n{}\n```\n\nThe recipes, nothing left open, are in the metadata of the weights.\n",
        steps(record),
        record.tool,
        command()
    );
    out + &usage::usage(record, facts, base.unwrap_or("BASE"))
        + "\n## Licence\n\nThat of the base; see `NOTICE`.\n"
}

/// The way from the base, a numbered list.
fn steps(record: &Record) -> String {
    let steps = (1..).zip(record.steps());
    steps.map(|(i, step)| format!("{i}. {step}\n")).collect()
}

/// The command line that this process was started with.
fn command() -> String {
    let words = std::env::args_os().skip(1);
    command_of(words.map(|word| word.to_string_lossy().into_owned()))
}

/// The command line as a card shows it: without the folders of this machine, as cards are for others.
fn command_of(words: impl Iterator<Item = String>) -> String {
    let quoted = |word: String| {
        let plain = |c: char| c.is_alphanumeric() || "-_./:=,@+%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    let words = words.map(|word| {
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value),
            _ => (String::new(), word.as_str()),
        };
        let values: Vec<&str> = value.split(',').map(bare).collect();
        quoted(flag + &values.join(","))
    });
    std::iter::once("fastflux".to_owned())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The last component of an absolute path; anything else as it is.
fn bare(word: &str) -> &str {
    let path = Path::new(word);
    let name = path.file_name().and_then(|name| name.to_str());
    name.filter(|_| path.is_absolute()).unwrap_or(word)
}

fn replaced(layout: &[BlockSpec]) -> Vec<String> {
    let blocks = layout.iter().flat_map(|spec| match spec {
        BlockSpec::Original(_) => vec![],
        BlockSpec::Replaced(r) => r.replaces.iter().map(ToString::to_string).collect(),
    });
    blocks.collect()
}

fn replaced_entries(layout: &[BlockSpec]) -> Vec<(String, String)> {
    let entries = layout.iter().filter_map(|spec| match spec {
        BlockSpec::Original(_) => None,
        BlockSpec::Replaced(r) => {
            let blocks: Vec<String> = r.replaces.iter().map(ToString::to_string).collect();
            let form = match r.form {
                Form::Remove => "nothing".to_owned(),
                form if r.joint => format!("{form}, one layer for text and image tokens"),
                form => format!("{form}"),
            };
            Some((blocks.join(", "), form))
        }
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_shown_without_the_folders_of_this_machine() {
        let words = "prune --model /home/me/flux1-dev.safetensors --text-encoders /a/clip.safetensors,/b/t5.safetensors \
            --lora=/c/style.safetensors:0.5 --plan plans/20.json --output /out/";
        let shown = command_of(words.split_whitespace().map(str::to_owned));
        assert_eq!(
            shown,
            "fastflux prune --model flux1-dev.safetensors --text-encoders clip.safetensors,t5.safetensors \
            --lora=style.safetensors:0.5 --plan plans/20.json --output out"
        );
        let said = ["--prompt", "it's a fox, red"].map(str::to_owned);
        let shown = command_of(said.into_iter());
        assert_eq!(shown, r"fastflux --prompt 'it'\''s a fox, red'");
    }

    #[test]
    fn the_licence_is_that_of_the_base() {
        for (base, licence) in [
            ("black-forest-labs/FLUX.1-schnell", Licence::Apache),
            ("black-forest-labs/FLUX.1-dev", Licence::FluxDev),
            ("/models/flux1-dev.safetensors", Licence::FluxDev),
            ("black-forest-labs/FLUX.2-klein-base-4B", Licence::Apache),
            ("mine FLUX.2 [klein] 4B", Licence::Apache),
            ("black-forest-labs/FLUX.2-klein-9B", Licence::Flux2),
            ("/models/mine.safetensors", Licence::Unknown),
        ] {
            assert_eq!(Licence::of(base), licence, "{base}");
        }
        assert_eq!(hub_id("owner/name@main", "").as_deref(), Some("owner/name"));
        assert_eq!(
            hub_id("/x/y.safetensors", "FLUX.1-dev").as_deref(),
            Some("black-forest-labs/FLUX.1-dev")
        );
        assert_eq!(hub_id("/x/y.safetensors", "mine"), None);
    }
}
