//! Qwen3 with its tokenizer and chat template, which encodes prompts for FLUX.2. `open.rs` finds the files.

use anyhow::{Context as _, Result};
use candle::{DType, Device, Tensor};

use super::{
    Cut, check_finite,
    qwen3::{Prompt, Qwen3},
};
use crate::sample::{encoded::Encoded, tokenize::PromptTokenizer};

/// The text encoder with its tokenizer.
pub struct Qwen3Text {
    pub(super) qwen: Qwen3,
    pub(super) tokenizer: PromptTokenizer,
    /// Number of tokens to which every prompt is cut or padded.
    pub(super) text_length: usize,
    /// Format of what [`Self::encode`] returns.
    pub(super) dtype: DType,
    /// The file, for messages.
    pub(super) name: String,
}

/// A prompt as Qwen3's chat template puts it, as what a user says, with an answer that has begun and does not think
/// (`enable_thinking=False`).
fn templated(prompt: &str) -> String {
    format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
}

impl Qwen3Text {
    /// Hidden states (b, L, 3 · hidden), and no pooled text.
    pub(super) fn encode(&self, prompts: &[String]) -> Result<Encoded> {
        let tokens: Vec<Prompt> = prompts
            .iter()
            .map(|prompt| self.tokenize(prompt))
            .collect::<Result<_>>()?;
        let txt = self.qwen.hidden(&tokens).context("Qwen3 text encoder")?;
        check_finite(self.dtype, "Qwen3", &self.name, &txt)?;
        let none = Tensor::zeros((prompts.len(), 0), self.dtype, &Device::Cpu)?;
        Ok(Encoded::new(txt.to_dtype(self.dtype)?, none))
    }

    pub(super) fn tokenize(&self, prompt: &str) -> Result<Prompt> {
        let (ids, real) = self
            .tokenizer
            .encode_padded(&templated(prompt), self.text_length)
            .context("Qwen3 tokenizer")?;
        Ok(Prompt { ids, real })
    }

    pub(super) fn cut(&self, prompts: &[String]) -> Result<Cut> {
        let length = self.text_length;
        let counts = prompts
            .iter()
            .map(|p| self.tokenizer.token_count(&templated(p)));
        let counts: Vec<usize> = counts.collect::<Result<_>>()?;
        Ok(Cut {
            prompts: counts.into_iter().filter(|count| *count > length).count(),
            length,
        })
    }

    pub(super) fn text_length(&self) -> usize {
        self.text_length
    }

    pub(super) fn width(&self) -> (&'static str, usize) {
        ("Qwen3", self.qwen.width())
    }
}
