//! One way in: takes a part of a pipeline (transformer, text encoder, VAE) out of a file that may hold several, and
//! accounts for every tensor that is left. Names only; what the part's tensors are is checked by who computes with it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

use super::{Checkpoint, keys, scales};

/// A part of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The FLUX transformer, under original or diffusers' names.
    Transformer,
    /// CLIP's text model, under transformers' names.
    Clip,
    /// T5's encoder, under transformers' names or those of GGUF.
    T5,
    /// Qwen3 without its answers, under transformers' names or those of GGUF.
    Qwen3,
    /// The autoencoder, under original or diffusers' names.
    Vae,
}

/// Components of names under which tools put whole models, as [`Part::Transformer`] may be found below any of them.
const WRAPPERS: [&str; 11] = [
    "model",
    "diffusion_model",
    "transformer",
    "module",
    "net",
    "unet",
    "dit",
    "flux",
    "denoiser",
    "base_model",
    "_orig_mod",
];

/// First components below which files keep other parts than the transformer.
const OTHER_PARTS: [&str; 15] = [
    "text_encoder",
    "text_encoder_2",
    "text_encoders",
    "cond_stage_model",
    "conditioner",
    "clip_l",
    "clip_g",
    "t5xxl",
    "text_model",
    "vision_model",
    "first_stage_model",
    "vae",
    "autoencoder",
    "clip_vision_model",
    "lm_head",
];

/// Names that files hold next to their parts and that nothing is computed with; the last component or a whole name.
const EXTRAS: [&str; 20] = [
    "scaled_fp8",
    "spiece_model",
    "tekken_model",
    "position_ids",
    "logit_scale",
    "text_projection",
    "text_projection.weight",
    "visual_projection.weight",
    "lm_head.weight",
    "__index_timestep_zero__",
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "num_batches_tracked",
    "logvar",
    "global_step",
    "ztsnr",
    "v_pred",
    "edm_mean",
    "edm_std",
];

impl Part {
    /// All parts.
    pub const ALL: [Self; 5] = [
        Self::Transformer,
        Self::Clip,
        Self::T5,
        Self::Qwen3,
        Self::Vae,
    ];

    /// What it is called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transformer => "FLUX transformer",
            Self::Clip => "CLIP text encoder",
            Self::T5 => "T5 text encoder",
            Self::Qwen3 => "Qwen3 text encoder",
            Self::Vae => "VAE",
        }
    }

    /// Tensors of which every one of its kind has one: what stands before it is the part's prefix.
    fn anchors(self) -> &'static [&'static str] {
        match self {
            Self::Transformer => &[],
            Self::Clip => &["embeddings.token_embedding.weight"],
            Self::T5 => &[
                "encoder.block.0.layer.0.SelfAttention.q.weight",
                "enc.blk.0.attn_q.weight",
            ],
            Self::Qwen3 => &[
                "layers.0.self_attn.q_norm.weight",
                "blk.0.attn_q_norm.weight",
            ],
            Self::Vae => &["decoder.conv_in.weight"],
        }
    }

    /// Beginnings of its own names, and of what belongs to it and is not needed.
    fn beginnings(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Transformer => (&[], &[]),
            Self::Clip => (
                &["embeddings.", "encoder.layers.", "final_layer_norm."],
                &[],
            ),
            Self::T5 => (
                &[
                    "encoder.block.",
                    "encoder.final_layer_norm.",
                    "encoder.embed_tokens.",
                    "shared.",
                    "enc.",
                    "token_embd.",
                ],
                &["decoder.", "dec."],
            ),
            Self::Qwen3 => (
                &[
                    "embed_tokens.",
                    "layers.",
                    "norm.",
                    "token_embd.",
                    "blk.",
                    "output_norm.",
                ],
                &["lm_head.", "output.", "rope_freqs."],
            ),
            Self::Vae => (
                &[
                    "encoder.",
                    "decoder.",
                    "quant_conv.",
                    "post_quant_conv.",
                    "bn.",
                ],
                &["loss."],
            ),
        }
    }

    /// The prefixes under which a file holds such a part, in name order.
    pub fn prefixes(self, checkpoint: &Checkpoint) -> Vec<String> {
        if self == Self::Transformer {
            let is_block = |name: &str| transformer_name(name).is_some_and(keys::is_of_block);
            let found = checkpoint.names().any(is_block);
            return if found { vec![String::new()] } else { vec![] };
        }
        let prefixes: BTreeSet<String> = checkpoint
            .names()
            .flat_map(|name| {
                self.anchors()
                    .iter()
                    .filter_map(|end| name.strip_suffix(end))
            })
            .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
            .map(str::to_owned)
            .collect();
        prefixes.into_iter().collect()
    }

    /// Whether a file holds such a part.
    pub fn is_in(self, checkpoint: &Checkpoint) -> bool {
        !self.prefixes(checkpoint).is_empty()
    }

    /// The part below `prefix` (one of [`Self::prefixes`]) under its own names, with the scales that stand next to its
    /// weights attached to them.
    ///
    /// # Errors
    /// When two tensors have the same name below different prefixes, a scale or a layer's format cannot be used, or the
    /// file holds a tensor that is of no part and no known extra; the message names it.
    pub fn take(self, checkpoint: &Checkpoint, prefix: &str) -> Result<Checkpoint> {
        let mut out = Checkpoint {
            name: checkpoint.name.clone(),
            metadata: checkpoint.metadata.clone(),
            architecture: checkpoint.architecture.clone(),
            notes: checkpoint.notes.clone(),
            tensors: BTreeMap::new(),
        };
        let others = Others::of(checkpoint);
        let mut full: BTreeMap<String, &str> = BTreeMap::new();
        for (name, source) in checkpoint.iter() {
            if let Some(own) = self.own(name, prefix) {
                if let Some(twice) = full.insert(own.to_owned(), name) {
                    bail!(
                        "`{}` holds `{twice}` and `{name}`: two tensors for `{own}`\nhint: take one of them out of the file",
                        checkpoint.name
                    );
                }
                out.insert(own, source.clone());
            } else if !others.account_for(name) && !self.knows(name, prefix) {
                bail!(
                    "`{}` holds the tensor `{name}`, which is not part of a {} and of no other part of a FLUX pipeline\nhint: take that tensor out of the file, if it is of no use",
                    checkpoint.name,
                    self.name()
                );
            }
        }
        let formats = scales::layer_formats(&checkpoint.metadata, &full);
        scales::attached(out, &formats)
    }

    /// The part's own name of a tensor; `None` if it is none of the part's.
    fn own<'a>(self, name: &'a str, prefix: &str) -> Option<&'a str> {
        if self == Self::Transformer {
            return transformer_name(name);
        }
        let own = name.strip_prefix(prefix)?;
        let starts = self
            .beginnings()
            .0
            .iter()
            .any(|start| own.starts_with(start));
        (starts && !is_extra(own) && !self.knows(name, prefix)).then_some(own)
    }

    /// Whether the part's files hold such a tensor for other uses than ours.
    fn knows(self, name: &str, prefix: &str) -> bool {
        let (_, unused) = self.beginnings();
        let own = name.strip_prefix(prefix);
        own.is_some_and(|own| unused.iter().any(|start| own.starts_with(start)))
    }
}

/// A transformer's own name: what follows the wrappers around it.
pub(super) fn transformer_name(name: &str) -> Option<&str> {
    let mut rest = name;
    loop {
        let (first, more) = rest.split_once('.')?;
        if keys::is_top(first) {
            return Some(rest);
        }
        if !WRAPPERS.contains(&first) {
            return None;
        }
        rest = more;
    }
}

/// Names that nothing is computed with, whatever part they belong to.
fn is_extra(name: &str) -> bool {
    EXTRAS.iter().any(|extra| {
        let before = name.strip_suffix(extra);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}

/// What of a file is not the part that is taken.
struct Others {
    /// Parts with their prefixes.
    parts: Vec<(Part, String)>,
}

impl Others {
    fn of(checkpoint: &Checkpoint) -> Self {
        let of = |part: Part| {
            let prefixes = part.prefixes(checkpoint).into_iter();
            prefixes.map(move |prefix| (part, prefix))
        };
        Self {
            parts: Part::ALL.into_iter().flat_map(of).collect(),
        }
    }

    /// Whether a tensor belongs to another part, or is a known extra.
    fn account_for(&self, name: &str) -> bool {
        let first = name.split('.').next().unwrap_or(name);
        let below_model = name.strip_prefix("model.").unwrap_or(name);
        is_extra(name)
            || OTHER_PARTS.contains(&first)
            || below_model.starts_with("model_ema.")
            || name.starts_with("model_ema.")
            || self
                .parts
                .iter()
                .any(|(part, prefix)| part.own(name, prefix).is_some() || part.knows(name, prefix))
    }
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device, Tensor};

    use super::*;
    use crate::checkpoint::Source;

    fn file(names: &[&str]) -> Checkpoint {
        let mut file = Checkpoint {
            name: "file".to_owned(),
            ..Checkpoint::default()
        };
        for name in names {
            let one = Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap();
            file.insert(*name, Source::dense(&one).unwrap());
        }
        file
    }

    const ALL_IN_ONE: [&str; 9] = [
        "model.diffusion_model.img_in.weight",
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
        "text_encoders.clip_l.logit_scale",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight",
        "vae.decoder.conv_in.weight",
        "vae.decoder.conv_out.weight",
    ];

    #[test]
    fn every_part_of_a_file_is_taken_under_its_own_names() {
        let file = file(&ALL_IN_ONE);
        let take = |part: Part| {
            let prefixes = part.prefixes(&file);
            assert_eq!(prefixes.len(), 1, "{part:?}: {prefixes:?}");
            let taken = part.take(&file, &prefixes[0]).unwrap();
            taken.names().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            take(Part::Transformer),
            ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]
        );
        assert_eq!(take(Part::Clip), ["embeddings.token_embedding.weight"]);
        assert_eq!(take(Part::T5).len(), 3);
        assert_eq!(
            take(Part::Vae),
            ["decoder.conv_in.weight", "decoder.conv_out.weight"]
        );
    }

    #[test]
    fn blocks_below_any_wrapper_are_the_transformers() {
        for prefix in [
            "",
            "module.",
            "transformer.",
            "model.diffusion_model.",
            "_orig_mod.",
        ] {
            let name = format!("{prefix}single_blocks.3.linear1.weight");
            assert_eq!(
                transformer_name(&name),
                Some("single_blocks.3.linear1.weight")
            );
        }
        for other in [
            "vae.decoder.conv_in.weight",
            "blocks.0.weight",
            "img_in",
            "ema.img_in.weight",
        ] {
            assert_eq!(transformer_name(other), None, "{other}");
        }
        let mixed = file(&[
            "double_blocks.0.a",
            "model.diffusion_model.double_blocks.1.a",
        ]);
        assert_eq!(Part::Transformer.take(&mixed, "").unwrap().len(), 2);
    }

    #[test]
    fn what_is_of_no_part_is_named() {
        for (more, words) in [
            ("double_stuff.7.weight", vec!["`double_stuff.7.weight`"]),
            (
                "img_in.weight",
                vec!["`img_in.weight`", "`model.diffusion_model.img_in.weight`"],
            ),
        ] {
            let file = file(&[&ALL_IN_ONE[..], &[more]].concat());
            let error = Part::Transformer.take(&file, "").unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
