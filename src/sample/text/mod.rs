//! Prompts → what the transformer is told: T5's hidden states and CLIP's pooled output, or Qwen3's hidden states.

use anyhow::{Context as _, Result, ensure};
use candle::{DType, Device, Tensor};

use super::{encoded::Encoded, is_finite, tokenize::PromptTokenizer};
use crate::{checkpoint::lora::Lora, layout::TextModel};
use clip::Clip;
pub use files::TextFiles;
use flux1::ClipAndT5;
use flux2::Qwen3Text;

pub(crate) mod clip;
mod files;
mod flux1;
mod flux2;
mod open;
mod open_qwen3;
mod ops;
mod qwen3;
mod qwen3_config;
mod t5;
mod t5_config;

/// The text model of a whole CLIP with its tokenizer.
#[derive(Debug)]
pub struct ClipText {
    clip: Clip,
    tokenizer: PromptTokenizer,
}

impl ClipText {
    /// The hidden state at the end-of-text token of each prompt, (b, hidden).
    ///
    /// # Errors
    /// When a token has no embedding, or the device runs out of memory.
    pub fn pooled(&self, prompts: &[String]) -> Result<Tensor> {
        let ids = prompts
            .iter()
            .map(|prompt| clip_ids(&self.clip, &self.tokenizer, prompt));
        let ids: Vec<Vec<u32>> = ids.collect::<Result<_>>()?;
        self.clip.pooled(&ids).context("CLIP text model")
    }

    /// Width of what [`Self::pooled`] gives.
    pub fn width(&self) -> usize {
        self.clip.width()
    }
}

/// Token ids of a prompt, cut and padded to what the model takes.
fn clip_ids(clip: &Clip, tokenizer: &PromptTokenizer, prompt: &str) -> Result<Vec<u32>> {
    tokenizer
        .encode(prompt, clip_length(clip, tokenizer))
        .context("CLIP tokenizer")
}

/// Tokens that CLIP is given of a prompt.
fn clip_length(clip: &Clip, tokenizer: &PromptTokenizer) -> usize {
    let positions = clip.max_length();
    let limit = tokenizer.model_max_length();
    limit.map_or(positions, |n| n.min(positions))
}

/// How many prompts have an end that an encoder does not read, and how many tokens it reads.
///
/// One token over does not count: that is the full stop, or the last word of the bundled model's longest captions, which
/// says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Prompts that are cut.
    pub prompts: usize,
    /// Tokens that are left of them, start and end tokens included.
    pub length: usize,
}

/// The text encoders of a model, with their tokenizers.
pub enum TextEncoders {
    /// FLUX.1's.
    ClipAndT5(Box<ClipAndT5>),
    /// FLUX.2's.
    Qwen3(Box<Qwen3Text>),
}

impl TextEncoders {
    /// Opens the text encoders in a pipeline's folder (`text_encoder`, `tokenizer`; for FLUX.1 `text_encoder_2` and
    /// `tokenizer_2` too), or in files of any name (Qwen3: of its name), and checks every tensor's shape. `widths` are those of
    /// text and pooled text that the transformer takes; of several encoders those that have them are opened.
    ///
    /// LoRA files are added to the weights of those encoders that they name: CLIP and T5.
    /// Prompts are given `length` tokens, by default `default_length` or the tokenizer's own limit where that is smaller.
    ///
    /// # Errors
    /// When files are missing or damaged, or a tensor has another shape than its config says; the message names it.
    #[expect(clippy::too_many_arguments, reason = "each is of another type")]
    pub fn load(
        model: TextModel,
        files: &TextFiles,
        widths: Option<[usize; 2]>,
        lora: &[Lora],
        length: Option<usize>,
        default_length: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Ok(match model {
            TextModel::ClipAndT5 => Self::ClipAndT5(Box::new(ClipAndT5::load(
                files,
                widths,
                lora,
                length,
                default_length,
                dtype,
                device,
            )?)),
            TextModel::Qwen3 => Self::Qwen3(Box::new(Qwen3Text::load(
                files,
                widths.map(|[text, _]| text),
                length,
                default_length,
                dtype,
                device,
            )?)),
        })
    }

    /// The checks of [`Self::load`], from headers and small files alone.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn check(model: TextModel, files: &TextFiles, widths: [usize; 2]) -> Result<()> {
        match model {
            TextModel::ClipAndT5 => open::check_both(files, widths),
            TextModel::Qwen3 => open_qwen3::check_qwen3(files, widths[0]),
        }
    }

    /// Encodes prompts together: hidden states (b, L, d) and pooled text (b, c).
    ///
    /// Layers are read again in every call, so give it many prompts at once.
    ///
    /// # Errors
    /// When there is no prompt, a token has no embedding, an encoder gives NaN, or the device runs out of memory.
    pub fn encode(&self, prompts: &[String]) -> Result<Encoded> {
        ensure!(!prompts.is_empty(), "there is no prompt to encode");
        match self {
            Self::ClipAndT5(encoders) => encoders.encode(prompts),
            Self::Qwen3(encoder) => encoder.encode(prompts),
        }
    }

    /// Token ids of a prompt for each encoder, cut and padded to its length, under the names that recordings have
    /// (`clip.input_ids` and `t5.input_ids`, or `qwen.input_ids` and `qwen.attention_mask`, 0 for padding).
    ///
    /// # Errors
    /// When the text length leaves no room for the tokenizer's special tokens.
    pub fn tokenize(&self, prompt: &str) -> Result<Vec<(&'static str, Vec<u32>)>> {
        Ok(match self {
            Self::ClipAndT5(encoders) => {
                let [clip, t5] = encoders.tokenize(prompt)?;
                vec![("clip.input_ids", clip), ("t5.input_ids", t5)]
            }
            Self::Qwen3(encoder) => {
                let prompt = encoder.tokenize(prompt)?;
                let real = (0..prompt.ids.len()).map(|i| prompt.real.contains(&i).into());
                let mask = real.collect();
                vec![
                    ("qwen.input_ids", prompt.ids),
                    ("qwen.attention_mask", mask),
                ]
            }
        })
    }

    /// How many of the prompts each encoder does not read to their end, with its name for messages.
    ///
    /// # Errors
    /// When a tokenizer fails.
    pub fn cut(&self, prompts: &[String]) -> Result<Vec<(&'static str, Cut)>> {
        Ok(match self {
            Self::ClipAndT5(encoders) => {
                let [clip, t5] = encoders.cut(prompts)?;
                vec![("CLIP", clip), ("T5", t5)]
            }
            Self::Qwen3(encoder) => vec![("Qwen3", encoder.cut(prompts)?)],
        })
    }

    /// Number of text tokens that the transformer is given of every prompt.
    pub fn text_length(&self) -> usize {
        match self {
            Self::ClipAndT5(encoders) => encoders.text_length,
            Self::Qwen3(encoder) => encoder.text_length(),
        }
    }

    /// Checks that a transformer of these widths of text and pooled text can take what the encoders give.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check_widths(&self, text: usize, pooled: usize) -> Result<()> {
        let widths = match self {
            Self::ClipAndT5(encoders) => encoders.widths().to_vec(),
            Self::Qwen3(encoder) => vec![encoder.width()],
        };
        for ((name, found), expected) in widths.into_iter().zip([text, pooled]) {
            ensure!(
                found == expected,
                "the {name} text encoder gives {found} numbers a token, but the transformer takes {expected}\nhint: name the model's own text encoders with --text-encoders DIR"
            );
        }
        Ok(())
    }
}

/// Number of tokens that a model's tokenizer makes of `prompt`. `files`: as for [`TextEncoders::load`].
///
/// # Errors
/// When the tokenizer is missing or damaged.
pub fn token_count(model: TextModel, files: &TextFiles, prompt: &str) -> Result<usize> {
    match model {
        TextModel::ClipAndT5 => open::t5_token_count(files, prompt),
        TextModel::Qwen3 => open_qwen3::qwen2_tokenizer(files.folder()?)?.token_count(prompt),
    }
}

/// Fails at an output that is not finite.
fn check_finite(dtype: DType, encoder: &str, name: &str, output: &Tensor) -> Result<()> {
    let narrow = match dtype {
        DType::F32 => "",
        _ => "try --dtype f32, or ",
    };
    ensure!(
        is_finite(output)?,
        "the {encoder} text encoder `{name}` gives NaN or infinite values, its weights are damaged\nhint: {narrow}name others with --text-encoders"
    );
    Ok(())
}
