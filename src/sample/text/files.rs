//! Finds the text encoders in a folder in diffusers layout, among single files as ComfyUI keeps them, or inside a file of a
//! whole pipeline. An encoder is known by its tensors, never by its file's name. `open.rs` reads sizes and tokenizers.

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    checkpoint::{Checkpoint, is_weights, part::Part, with_hint},
    files::{Blob, Files},
    sample::tokenize::Family,
};

/// What to do about a file that is of no use.
pub(super) const OTHERS: &str = "name others with --text-encoders";

/// Rows of the embedding from which on a T5 is no T5 of FLUX.1: umT5 has 256,384.
const UMT5_ROWS: usize = 200_000;

/// Where text encoders and tokenizers are.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// A folder in diffusers layout, or with one file for each encoder.
    pub folder: Option<Files>,
    /// Files of weights that hold one encoder or several; they win over those of the folder.
    pub weights: Vec<Checkpoint>,
}

impl From<Files> for TextFiles {
    fn from(folder: Files) -> Self {
        Self {
            folder: Some(folder),
            weights: Vec::new(),
        }
    }
}

/// An encoder's weights under its own names, and its config where there is one.
pub(super) struct Encoder {
    pub(super) weights: Checkpoint,
    pub(super) config: Option<(String, Blob)>,
}

fn part(family: Family) -> Part {
    match family {
        Family::Clip => Part::Clip,
        Family::T5 => Part::T5,
        Family::Qwen2 => Part::Qwen3,
    }
}

/// The folder of an encoder in a pipeline.
fn folder(family: Family) -> &'static str {
    match family {
        Family::Clip | Family::Qwen2 => "text_encoder",
        Family::T5 => "text_encoder_2",
    }
}

impl TextFiles {
    /// The encoder of a family; of several the one whose hidden states are `width` wide.
    pub(super) fn encoder(&self, family: Family, width: Option<usize>) -> Result<Encoder> {
        let named: Vec<&Checkpoint> = self.weights.iter().collect();
        if named.iter().any(|file| part(family).is_in(file)) {
            let weights = choose(family, &named, width)?;
            return Ok(Encoder {
                weights,
                config: None,
            });
        }
        let Some(root) = &self.folder else {
            bail!(
                "there is no {} in {}\nhint: {OTHERS}",
                part(family).name(),
                self.describe()
            );
        };
        let sub = root.sub(folder(family));
        if let Some(raw) = with_hint(Checkpoint::open_if_present(&sub, "model"), OTHERS)? {
            let config = sub.get("config.json")?;
            return Ok(Encoder {
                weights: choose(family, &[&raw], width)?,
                config: config.map(|blob| (sub.describe("config.json"), blob)),
            });
        }
        let (files, config) = match weights_in(&sub)? {
            files if files.is_empty() => (weights_in(root)?, None),
            files => (files, sub.get("config.json")?),
        };
        let config = config.map(|blob| (sub.describe("config.json"), blob));
        let files: Vec<&Checkpoint> = files.iter().collect();
        let also = if named.is_empty() {
            String::new()
        } else {
            format!(", nor does {}", self.describe())
        };
        ensure!(
            files.iter().any(|file| part(family).is_in(file)),
            "`{}` holds no {}{}: there is no folder `{}` with weights in it, and no file with a tensor such as `{}`\nhint: fetch it, or name a folder with the text encoders, or their files, with --text-encoders",
            root.model_ref(),
            part(family).name(),
            also,
            folder(family),
            match family {
                Family::Clip => "text_model.embeddings.token_embedding.weight",
                Family::T5 => "encoder.block.0.layer.0.SelfAttention.q.weight",
                Family::Qwen2 => "layers.0.self_attn.q_norm.weight",
            }
        );
        Ok(Encoder {
            weights: choose(family, &files, width)?,
            config,
        })
    }

    /// The folder with a tokenizer of which there is none in fastflux itself.
    ///
    /// # Errors
    /// When only files are named.
    pub(super) fn folder(&self) -> Result<&Files> {
        self.folder.as_ref().with_context(|| {
            format!(
                "{} comes without a tokenizer\nhint: name a folder with it next to the file, as in --text-encoders FILE,DIR",
                self.describe()
            )
        })
    }

    /// The folder with a tokenizer.
    pub(super) fn tokenizers(&self) -> Option<&Files> {
        self.folder.as_ref()
    }

    fn describe(&self) -> String {
        let names: Vec<String> = self
            .weights
            .iter()
            .map(|w| format!("`{}`", w.name))
            .collect();
        if names.is_empty() {
            "what --text-encoders names".to_owned()
        } else {
            names.join(", ")
        }
    }
}

/// The files of weights directly in a folder. In a repository of the hub only those whose names speak of an encoder, as
/// looking into the others would download them.
fn weights_in(files: &Files) -> Result<Vec<Checkpoint>> {
    let remote = files.resolved().is_some();
    let speaks = |name: &str| {
        let name = name.to_lowercase();
        !remote
            || ["clip", "t5", "qwen", "text_encoder", "model."]
                .iter()
                .any(|word| name.contains(word))
    };
    let names = files.list()?;
    let names = names.iter().filter(|name| is_weights(name) && speaks(name));
    let mut found = Vec::new();
    let mut first = None;
    for name in names {
        let opened = files
            .read(name)
            .and_then(|blob| Checkpoint::from_blob(&files.describe(name), &blob));
        match opened {
            Ok(file) => found.push(file),
            // another file may hold what is looked for
            Err(error) => first = first.or(Some(error)),
        }
    }
    match first {
        Some(error) if found.is_empty() => with_hint(Err(error), OTHERS),
        _ => Ok(found),
    }
}

/// The one encoder among files; of several the one of the wanted width.
fn choose(family: Family, files: &[&Checkpoint], width: Option<usize>) -> Result<Checkpoint> {
    let mut candidates = Vec::new();
    let mut refused = None;
    for file in files {
        for prefix in part(family).prefixes(file) {
            let taken = part(family).take(file, &prefix)?;
            let taken = match family {
                Family::Qwen2 => qwen3_named(&taken)?,
                Family::Clip | Family::T5 => named(taken)?,
            };
            match refusal(family, &taken) {
                None => candidates.push(taken),
                Some(why) => refused = Some(format!("`{}` {why}", file.name)),
            }
        }
    }
    if candidates.len() > 1
        && let Some(width) = width
    {
        let fits = |taken: &Checkpoint| width_of(family, taken) == Some(width);
        if candidates.iter().any(fits) {
            candidates.retain(fits);
        }
    }
    let name = part(family).name();
    match (candidates.len(), refused, files) {
        (1, ..) => Ok(candidates.remove(0)),
        (0, Some(refused), _) => bail!("{refused}\nhint: {OTHERS}"),
        (0, None, [file, ..]) => {
            let holds = Part::ALL.into_iter().find(|part| part.is_in(file));
            let holds =
                holds.map_or_else(String::new, |part| format!(", it holds a {}", part.name()));
            bail!("`{}` is no {name}{holds}\nhint: {OTHERS}", file.name)
        }
        _ => {
            let mut names: Vec<&str> = candidates.iter().map(|c| c.name.as_str()).collect();
            names.dedup();
            bail!(
                "there are several {name}s of the same size ({})\nhint: name one file of each encoder with --text-encoders CLIP,T5",
                names.join(", ")
            )
        }
    }
}

/// Why an encoder cannot be FLUX.1's, whatever the transformer takes.
fn refusal(family: Family, taken: &Checkpoint) -> Option<String> {
    if family != Family::T5 {
        return None;
    }
    let rows = taken.get("shared.weight")?.shape().first().copied()?;
    let each = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight";
    (rows >= UMT5_ROWS || taken.contains(each)).then(|| {
        format!("is umT5 ({rows} tokens, a position bias in every layer), which FLUX.1 does not take: its text encoder is T5 v1.1 XXL")
    })
}

/// Width of the hidden states.
fn width_of(family: Family, taken: &Checkpoint) -> Option<usize> {
    let embedding = match family {
        Family::Clip => "embeddings.token_embedding.weight",
        Family::T5 => "shared.weight",
        Family::Qwen2 => "embed_tokens.weight",
    };
    taken.get(embedding)?.shape().last().copied()
}

/// An encoder under transformers' names: GGUF has names of its own, and files may name T5's embedding twice.
fn named(taken: Checkpoint) -> Result<Checkpoint> {
    let shared = taken.contains("shared.weight");
    taken.rename(|name| match name {
        // the same table under two names
        "encoder.embed_tokens.weight" => (!shared).then(|| "shared.weight".to_owned()),
        name => Some(of_gguf(name).unwrap_or_else(|| name.to_owned())),
    })
}

/// transformers' name of a T5 tensor in GGUF. Source: llama.cpp `gguf-py/gguf/tensor_mapping.py`.
fn of_gguf(name: &str) -> Option<String> {
    const PARTS: [(&str, &str); 10] = [
        ("attn_norm", "layer.0.layer_norm"),
        ("attn_q", "layer.0.SelfAttention.q"),
        ("attn_k", "layer.0.SelfAttention.k"),
        ("attn_v", "layer.0.SelfAttention.v"),
        ("attn_o", "layer.0.SelfAttention.o"),
        (
            "attn_rel_b",
            "layer.0.SelfAttention.relative_attention_bias",
        ),
        ("ffn_norm", "layer.1.layer_norm"),
        ("ffn_gate", "layer.1.DenseReluDense.wi_0"),
        ("ffn_up", "layer.1.DenseReluDense.wi_1"),
        ("ffn_down", "layer.1.DenseReluDense.wo"),
    ];
    match name {
        "token_embd.weight" => return Some("shared.weight".to_owned()),
        "enc.output_norm.weight" => return Some("encoder.final_layer_norm.weight".to_owned()),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("enc.blk.")?.split_once('.')?;
    let (module, leaf) = rest.rsplit_once('.')?;
    let (_, theirs) = PARTS.iter().find(|(part, _)| *part == module)?;
    Some(format!("encoder.block.{block}.{theirs}.{leaf}"))
}

/// Qwen3 under transformers' names.
fn qwen3_named(taken: &Checkpoint) -> Result<Checkpoint> {
    taken.rename(|name| Some(qwen3_of_gguf(name).unwrap_or_else(|| name.to_owned())))
}

/// transformers' name of a Qwen3 tensor in GGUF. Source: llama.cpp `gguf-py/gguf/tensor_mapping.py`.
fn qwen3_of_gguf(name: &str) -> Option<String> {
    const PARTS: [(&str, &str); 11] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    match name {
        "token_embd.weight" => return Some("embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("norm.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, leaf) = rest.rsplit_once('.')?;
    let (_, theirs) = PARTS.iter().find(|(part, _)| *part == module)?;
    Some(format!("layers.{layer}.{theirs}.{leaf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_qwen3_in_gguf_are_those_of_transformers() {
        for (gguf, expected) in [
            ("token_embd.weight", "embed_tokens.weight"),
            ("output_norm.weight", "norm.weight"),
            (
                "blk.3.attn_k_norm.weight",
                "layers.3.self_attn.k_norm.weight",
            ),
            ("blk.12.ffn_gate.weight", "layers.12.mlp.gate_proj.weight"),
        ] {
            assert_eq!(qwen3_of_gguf(gguf).as_deref(), Some(expected));
        }
        assert_eq!(qwen3_of_gguf("blk.0.ffn_odd.weight"), None);
    }

    #[test]
    fn names_of_gguf_are_those_of_transformers() {
        for (gguf, expected) in [
            ("token_embd.weight", "shared.weight"),
            (
                "enc.blk.7.attn_rel_b.weight",
                "encoder.block.7.layer.0.SelfAttention.relative_attention_bias.weight",
            ),
            (
                "enc.blk.0.ffn_down.weight",
                "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            ),
            ("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
        ] {
            assert_eq!(of_gguf(gguf).as_deref(), Some(expected));
        }
        assert_eq!(of_gguf("enc.blk.0.ffn_odd.weight"), None);
        assert_eq!(of_gguf("encoder.block.0.a"), None);
    }
}
