//! Prompts → what the transformer is told: T5's hidden states and CLIP's pooled output. Finding the files is `text_files.rs`'s business.

use anyhow::{Context as _, Result, ensure};
use candle::{DType, Tensor};

use super::clip::Clip;
use super::t5::T5;
use super::tokenize::PromptTokenizer;

/// Prompts at a time: bounds the memory that T5's hidden states take.
const BATCH: usize = 256;

/// Both text encoders with their tokenizers.
pub struct TextEncoders {
    pub(super) clip: Clip,
    pub(super) t5: T5,
    pub(super) clip_tokenizer: PromptTokenizer,
    pub(super) t5_tokenizer: PromptTokenizer,
    /// Format of what [`Self::encode`] returns.
    pub(super) dtype: DType,
}

/// Encoded prompts, in the runtime's number format.
#[derive(Clone, Debug)]
pub struct TextEmbedding {
    /// T5's last hidden states (b, L, d).
    pub txt: Tensor,
    /// CLIP's pooled output (b, c).
    pub vec: Tensor,
}

impl TextEncoders {
    /// Encodes prompts together; `text_length` is the number of T5 tokens L to which every prompt is cut or padded.
    ///
    /// T5's layers are read anew in every call, so give it all prompts at once.
    pub fn encode(&self, prompts: &[impl AsRef<str>], text_length: usize) -> Result<TextEmbedding> {
        ensure!(!prompts.is_empty(), "there is no prompt to encode");
        let (mut txt, mut vec) = (Vec::new(), Vec::new());
        for prompts in prompts.chunks(BATCH) {
            let clip = prompts
                .iter()
                .map(|p| self.clip_ids(p.as_ref()))
                .collect::<Result<Vec<_>>>()?;
            let t5 = prompts
                .iter()
                .map(|p| self.t5_ids(p.as_ref(), text_length))
                .collect::<Result<Vec<_>>>()?;
            vec.push(self.pooled(&clip)?.to_dtype(self.dtype)?);
            txt.push(self.hidden(&t5)?.to_dtype(self.dtype)?);
        }
        Ok(TextEmbedding {
            txt: Tensor::cat(&txt, 0)?,
            vec: Tensor::cat(&vec, 0)?,
        })
    }

    /// CLIP's token ids of a prompt, cut and padded to the model's length.
    pub fn clip_ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let length = self
            .clip_tokenizer
            .model_max_length()
            .map_or(self.clip.max_length(), |n| n.min(self.clip.max_length()));
        self.clip_tokenizer.encode(prompt, length).context("CLIP")
    }

    /// T5's token ids of a prompt, cut and padded to `text_length`.
    pub fn t5_ids(&self, prompt: &str, text_length: usize) -> Result<Vec<u32>> {
        self.t5_tokenizer.encode(prompt, text_length).context("T5")
    }

    /// Tokens a prompt has for T5 when it is not cut.
    pub fn t5_token_count(&self, prompt: &str) -> Result<usize> {
        self.t5_tokenizer.token_count(prompt)
    }

    /// The T5 tokenizer's own limit (`model_max_length`); a smaller default text length must give way to it.
    pub fn t5_limit(&self) -> Option<usize> {
        self.t5_tokenizer.model_max_length()
    }

    /// CLIP's pooled output (b, c) of token ids.
    pub fn pooled(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.clip.pooled(ids)?)
    }

    /// T5's last hidden states (b, L, d) of token ids, float32.
    pub fn hidden(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        Ok(self.t5.hidden(ids)?)
    }
}
