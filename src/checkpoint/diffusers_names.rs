//! The tensor names of diffusers' transformers and the original ones, a table for each family.
//!
//! Sources: diffusers `scripts/convert_flux_to_diffusers.py`; for FLUX.2 `loaders/single_file_utils.py`
//! (`convert_flux2_transformer_checkpoint_to_diffusers`).

use crate::layout::{BlockKind, Family, ModulationSource};

/// Original modules with the diffusers modules whose rows make them up.
pub(super) type Modules = &'static [(&'static str, &'static [&'static str])];
/// Pairs of names: (original, diffusers).
pub(super) type Names = &'static [(&'static str, &'static str)];

/// The names of one family.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    /// Modules outside the blocks.
    pub(super) global: Names,
    /// Modules of a double block.
    double: Modules,
    /// Modules of a single block.
    single: Modules,
}

/// The names of a family.
pub(super) fn of(family: &Family) -> Tables {
    match family.modulation {
        ModulationSource::PerBlock => FLUX1,
        ModulationSource::Shared => FLUX2,
    }
}

impl Tables {
    /// Modules and norm scales of a block.
    pub(super) fn block(self, kind: BlockKind) -> (Modules, Names) {
        match kind {
            BlockKind::Double => (self.double, &DOUBLE_NORMS),
            BlockKind::Single => (self.single, &SINGLE_NORMS),
        }
    }
}

const FLUX1: Tables = Tables {
    global: &[
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        (
            "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_1",
        ),
        (
            "time_in.out_layer",
            "time_text_embed.timestep_embedder.linear_2",
        ),
        (
            "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_1",
        ),
        (
            "vector_in.out_layer",
            "time_text_embed.text_embedder.linear_2",
        ),
        (
            "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_1",
        ),
        (
            "guidance_in.out_layer",
            "time_text_embed.guidance_embedder.linear_2",
        ),
        ("final_layer.linear", "proj_out"),
    ],
    double: &[
        ("img_mod.lin", &["norm1.linear"]),
        ("txt_mod.lin", &["norm1_context.linear"]),
        ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
        (
            "txt_attn.qkv",
            &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ),
        ("img_attn.proj", &["attn.to_out.0"]),
        ("txt_attn.proj", &["attn.to_add_out"]),
        ("img_mlp.0", &["ff.net.0.proj"]),
        ("img_mlp.2", &["ff.net.2"]),
        ("txt_mlp.0", &["ff_context.net.0.proj"]),
        ("txt_mlp.2", &["ff_context.net.2"]),
    ],
    single: &[
        ("modulation.lin", &["norm.linear"]),
        (
            "linear1",
            &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        ),
        ("linear2", &["proj_out"]),
    ],
};

const FLUX2: Tables = Tables {
    global: &[
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        (
            "time_in.in_layer",
            "time_guidance_embed.timestep_embedder.linear_1",
        ),
        (
            "time_in.out_layer",
            "time_guidance_embed.timestep_embedder.linear_2",
        ),
        (
            "guidance_in.in_layer",
            "time_guidance_embed.guidance_embedder.linear_1",
        ),
        (
            "guidance_in.out_layer",
            "time_guidance_embed.guidance_embedder.linear_2",
        ),
        (
            "double_stream_modulation_img.lin",
            "double_stream_modulation_img.linear",
        ),
        (
            "double_stream_modulation_txt.lin",
            "double_stream_modulation_txt.linear",
        ),
        (
            "single_stream_modulation.lin",
            "single_stream_modulation.linear",
        ),
        ("final_layer.linear", "proj_out"),
    ],
    double: &[
        ("img_attn.qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
        (
            "txt_attn.qkv",
            &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        ),
        ("img_attn.proj", &["attn.to_out.0"]),
        ("txt_attn.proj", &["attn.to_add_out"]),
        ("img_mlp.0", &["ff.linear_in"]),
        ("img_mlp.2", &["ff.linear_out"]),
        ("txt_mlp.0", &["ff_context.linear_in"]),
        ("txt_mlp.2", &["ff_context.linear_out"]),
    ],
    single: &[
        ("linear1", &["attn.to_qkv_mlp_proj"]),
        ("linear2", &["attn.to_out"]),
    ],
};

/// The final modulation: the original's rows are (shift, scale), diffusers' (scale, shift).
pub(super) const FINAL_MODULATION: (&str, &str) =
    ("final_layer.adaLN_modulation.1", "norm_out.linear");

/// Norm scales of a double block, whole tensor names.
const DOUBLE_NORMS: [(&str, &str); 4] = [
    ("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    ("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    ("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    ("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
];

/// Norm scales of a single block.
const SINGLE_NORMS: [(&str, &str); 2] = [
    ("norm.query_norm.scale", "attn.norm_q.weight"),
    ("norm.key_norm.scale", "attn.norm_k.weight"),
];
