//! Prompts → the transformer's conditioning: T5's hidden states and CLIP's pooled output. `open.rs` finds the files.

use anyhow::{Context as _, Result, ensure};
use candle::{DType, Tensor};

use super::{is_finite, tokenize::PromptTokenizer};
use clip::Clip;
pub use open::token_count;
use t5::T5;

pub(crate) mod clip;
mod open;
mod ops;
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

/// Both text encoders with their tokenizers.
pub struct TextEncoders {
    clip: Clip,
    t5: T5,
    clip_tokenizer: PromptTokenizer,
    t5_tokenizer: PromptTokenizer,
    /// Number of T5 tokens to which every prompt is cut or padded.
    text_length: usize,
    /// Format of what [`Self::encode`] returns.
    dtype: DType,
    /// The files of CLIP and T5, for messages.
    names: [String; 2],
}

impl TextEncoders {
    /// Encodes prompts together: T5's hidden states (b, L, d) and CLIP's pooled output (b, c).
    ///
    /// T5's layers are read again in every call, so give it many prompts at once.
    ///
    /// # Errors
    /// When there is no prompt, a token has no embedding, an encoder gives NaN, or the device runs out of memory.
    pub fn encode(&self, prompts: &[String]) -> Result<(Tensor, Tensor)> {
        ensure!(!prompts.is_empty(), "there is no prompt to encode");
        let (mut clip, mut t5) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let ids = self.tokenize(prompt)?;
            clip.push(ids.0);
            t5.push(ids.1);
        }
        let vec = self.clip.pooled(&clip).context("CLIP text encoder")?;
        self.check_finite("CLIP", &self.names[0], &vec)?;
        let txt = self.t5.hidden(&t5).context("T5 text encoder")?;
        self.check_finite("T5", &self.names[1], &txt)?;
        Ok((txt.to_dtype(self.dtype)?, vec.to_dtype(self.dtype)?))
    }

    fn check_finite(&self, encoder: &str, name: &str, output: &Tensor) -> Result<()> {
        let narrow = match self.dtype {
            DType::F32 => "",
            _ => "try --dtype f32, or ",
        };
        ensure!(
            is_finite(output)?,
            "the {encoder} text encoder `{name}` gives NaN or infinite values, its weights are damaged\nhint: {narrow}fetch the file again, or name others with --text-encoders"
        );
        Ok(())
    }

    /// Token ids of a prompt for CLIP and for T5, each cut and padded to its length.
    ///
    /// # Errors
    /// When the text length leaves no room for the tokenizer's special tokens.
    pub fn tokenize(&self, prompt: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let clip = clip_ids(&self.clip, &self.clip_tokenizer, prompt)?;
        let t5 = self
            .t5_tokenizer
            .encode(prompt, self.text_length)
            .context("T5 tokenizer")?;
        Ok((clip, t5))
    }

    /// How many of the prompts CLIP and T5 do not read to their end.
    ///
    /// # Errors
    /// When a tokenizer fails.
    pub fn cut(&self, prompts: &[String]) -> Result<[Cut; 2]> {
        let cut = |tokenizer: &PromptTokenizer, length: usize| -> Result<Cut> {
            let counts: Result<Vec<usize>> =
                prompts.iter().map(|p| tokenizer.token_count(p)).collect();
            let prompts = counts?
                .into_iter()
                .filter(|count| *count > length + 1)
                .count();
            Ok(Cut { prompts, length })
        };
        let clip = clip_length(&self.clip, &self.clip_tokenizer);
        Ok([
            cut(&self.clip_tokenizer, clip)?,
            cut(&self.t5_tokenizer, self.text_length)?,
        ])
    }

    /// Number of T5 tokens that every prompt is given.
    pub fn text_length(&self) -> usize {
        self.text_length
    }

    /// Checks that a transformer of these text widths can take what the encoders give.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check_widths(&self, t5: usize, clip: usize) -> Result<()> {
        for (name, found, expected) in [
            ("T5", self.t5.width(), t5),
            ("CLIP", self.clip.width(), clip),
        ] {
            ensure!(
                found == expected,
                "the {name} text encoder is {found} wide, but the transformer takes {expected}\nhint: name the model's own text encoders with --text-encoders DIR"
            );
        }
        Ok(())
    }
}
