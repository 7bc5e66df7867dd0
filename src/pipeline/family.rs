//! Which model of FLUX's family a checkpoint is, by evidence: what its tensors say, and the configs next to it. Where that
//! leaves a choice, a note says what was taken and which flags say otherwise.

use serde_json::Value;

use super::Pipeline;
use crate::{
    files::Files,
    layout::{BlockKind, Family, FluxConfig},
};

/// What a model takes besides the prompt, by the columns of `img_in`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// Noise alone: 64 columns.
    Noise,
    /// Noise and a control image's latents: 128 columns (Canny, Depth).
    Control,
    /// Noise, a masked image's latents and the mask: 384 columns (Fill).
    Fill,
    /// Something else.
    Other,
}

impl Input {
    fn of(config: &FluxConfig) -> Self {
        let (columns, out) = (config.in_channels, config.out_channels);
        match () {
            () if columns == out => Self::Noise,
            () if columns == 2 * out => Self::Control,
            () if columns == 6 * out => Self::Fill,
            () => Self::Other,
        }
    }
}

/// One line of the table: evidence, and the name of what has it. `None` says nothing.
struct Entry {
    name: &'static str,
    input: Input,
    guidance: Option<bool>,
    blocks: Option<(usize, usize)>,
    /// Part of the pipeline's class in `model_index.json`.
    pipeline: Option<&'static str>,
}

const DEV_BLOCKS: Option<(usize, usize)> = Some((19, 38));

/// The first line that fits is taken.
const FAMILIES: [Entry; 10] = [
    entry("FLUX.1-Fill", Input::Fill, None, None, None),
    entry("FLUX.1-Canny or -Depth", Input::Control, None, None, None),
    entry(
        "FLUX.1-Kontext",
        Input::Noise,
        Some(true),
        DEV_BLOCKS,
        Some("Kontext"),
    ),
    entry(
        "FLUX.1-dev or a model of its shape (Krea, Kontext)",
        Input::Noise,
        Some(true),
        DEV_BLOCKS,
        None,
    ),
    entry(
        "FLUX.1-schnell, or a de-distilled FLUX.1-dev",
        Input::Noise,
        Some(false),
        DEV_BLOCKS,
        None,
    ),
    entry(
        "FLUX.1-lite or Flex.1",
        Input::Noise,
        Some(true),
        Some((8, 38)),
        None,
    ),
    entry(
        "FLUX.1-lite without guidance embedding",
        Input::Noise,
        Some(false),
        Some((8, 38)),
        None,
    ),
    entry("flux-mini", Input::Noise, None, Some((5, 10)), None),
    entry(
        "FLUX.1 with guidance embedding",
        Input::Noise,
        Some(true),
        None,
        None,
    ),
    entry(
        "FLUX.1 without guidance embedding",
        Input::Noise,
        Some(false),
        None,
        None,
    ),
];

const fn entry(
    name: &'static str,
    input: Input,
    guidance: Option<bool>,
    blocks: Option<(usize, usize)>,
    pipeline: Option<&'static str>,
) -> Entry {
    Entry {
        name,
        input,
        guidance,
        blocks,
        pipeline,
    }
}

impl Entry {
    fn fits(&self, config: &FluxConfig, pipeline: Option<&str>) -> bool {
        let blocks = (
            config.original_blocks(BlockKind::Double),
            config.original_blocks(BlockKind::Single),
        );
        self.input == Input::of(config)
            && self
                .guidance
                .is_none_or(|guidance| guidance == config.guidance_embed)
            && self
                .blocks
                .is_none_or(|wanted| wanted == blocks && config.hidden_size == 3072)
            && (self.pipeline).is_none_or(|part| pipeline.is_some_and(|class| class.contains(part)))
    }
}

/// What a model is called, by its sizes and the class of its pipeline.
fn name_of(config: &FluxConfig, pipeline: Option<&str>) -> &'static str {
    let entry = FAMILIES.iter().find(|entry| entry.fits(config, pipeline));
    entry.map_or("a FLUX with inputs of its own", |entry| entry.name)
}

/// The class of the pipeline that a folder's `model_index.json` names.
pub(super) fn class_of(folder: Option<&Files>) -> Option<String> {
    let json: Value = folder?.json("model_index.json").ok()??;
    Some(json.get("_class_name")?.as_str()?.to_owned())
}

impl Pipeline {
    /// The family, for people: from the model's own defaults, or by evidence.
    pub fn family(&self) -> String {
        if let Some(family) = &self.defaults.family {
            return family.clone();
        }
        if self.config.family == Family::FLUX2 {
            return self.flux2();
        }
        let class = class_of(self.components.own.as_ref());
        name_of(&self.config, class.as_deref()).to_owned()
    }

    fn flux2(&self) -> String {
        let c = &self.config;
        let blocks = (
            c.original_blocks(BlockKind::Double),
            c.original_blocks(BlockKind::Single),
        );
        // dev has a guidance embedding, and its text encoder is another
        let size = match (blocks, c.hidden_size) {
            ((5, 20), 3072) => "4B",
            ((8, 24), 4096) => "9B",
            ((8, 48), 6144) => return "FLUX.2-dev".to_owned(),
            _ => return format!("{} of another size", c.family.name()),
        };
        let base = match self.defaults.distilled {
            Some(false) => "base ",
            _ => "",
        };
        format!("FLUX.2 [klein] {base}{size}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{layout::unpruned, pipeline::ModelChoice};

    #[test]
    fn a_model_is_called_what_its_sizes_say() {
        let mut config = Pipeline::open(&ModelChoice::default()).unwrap().config;
        config.hidden_size = 3072;
        config.out_channels = 64;
        for (columns, guidance, blocks, class, word) in [
            (64, true, (19, 38), None, "FLUX.1-dev"),
            (
                64,
                true,
                (19, 38),
                Some("FluxKontextPipeline"),
                "FLUX.1-Kontext",
            ),
            (64, false, (19, 38), None, "schnell"),
            (64, false, (19, 38), None, "de-distilled"),
            (384, true, (19, 38), None, "Fill"),
            (128, true, (19, 38), None, "Canny"),
            (64, true, (8, 38), None, "lite"),
            (64, true, (5, 10), None, "mini"),
            (64, true, (3, 3), None, "with guidance"),
            (64, false, (3, 3), None, "without guidance"),
            (196, true, (8, 38), None, "inputs of its own"),
        ] {
            config.in_channels = columns;
            config.guidance_embed = guidance;
            config.layout = unpruned(blocks.0, blocks.1);
            let name = name_of(&config, class);
            assert!(name.contains(word), "{name} for {word}");
        }
    }
}
