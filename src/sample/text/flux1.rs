//! CLIP and T5, which encode prompts for FLUX.1. `open.rs` finds the files.

use anyhow::{Context as _, Result};
use candle::DType;

use super::{Cut, check_finite, clip::Clip, clip_ids, clip_length, t5::T5};
use crate::sample::{encoded::Encoded, tokenize::PromptTokenizer};

/// Both text encoders with their tokenizers.
pub struct ClipAndT5 {
    pub(super) clip: Clip,
    pub(super) t5: T5,
    pub(super) clip_tokenizer: PromptTokenizer,
    pub(super) t5_tokenizer: PromptTokenizer,
    /// Number of T5 tokens to which every prompt is cut or padded.
    pub(super) text_length: usize,
    /// Format of what [`Self::encode`] returns.
    pub(super) dtype: DType,
    /// The files of CLIP and T5, for messages.
    pub(super) names: [String; 2],
}

impl ClipAndT5 {
    /// T5's hidden states (b, L, d) and CLIP's pooled output (b, c).
    pub(super) fn encode(&self, prompts: &[String]) -> Result<Encoded> {
        let (mut clip, mut t5) = (Vec::new(), Vec::new());
        for prompt in prompts {
            let [ids_clip, ids_t5] = self.tokenize(prompt)?;
            clip.push(ids_clip);
            t5.push(ids_t5);
        }
        let vec = self.clip.pooled(&clip).context("CLIP text encoder")?;
        check_finite(self.dtype, "CLIP", &self.names[0], &vec)?;
        let txt = self.t5.hidden(&t5).context("T5 text encoder")?;
        check_finite(self.dtype, "T5", &self.names[1], &txt)?;
        Ok(Encoded::new(
            txt.to_dtype(self.dtype)?,
            vec.to_dtype(self.dtype)?,
        ))
    }

    /// Token ids of a prompt for CLIP and for T5, each cut and padded to its length.
    pub(super) fn tokenize(&self, prompt: &str) -> Result<[Vec<u32>; 2]> {
        let clip = clip_ids(&self.clip, &self.clip_tokenizer, prompt)?;
        let t5 = self
            .t5_tokenizer
            .encode(prompt, self.text_length)
            .context("T5 tokenizer")?;
        Ok([clip, t5])
    }

    /// How many of the prompts CLIP and T5 do not read to their end.
    pub(super) fn cut(&self, prompts: &[String]) -> Result<[Cut; 2]> {
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

    /// What each encoder gives: its name and its width.
    pub(super) fn widths(&self) -> [(&'static str, usize); 2] {
        [("T5", self.t5.width()), ("CLIP", self.clip.width())]
    }
}
