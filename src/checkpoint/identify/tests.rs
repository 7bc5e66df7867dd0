//! One file of every kind, and what is none of them.

use candle::{DType, Device, Tensor};

use super::*;
use crate::checkpoint::Source;

fn file(names: &[&str]) -> Checkpoint {
    let mut file = Checkpoint::default();
    for name in names {
        let one = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
        file.insert(*name, Source::dense(&one).unwrap());
    }
    file
}

/// One file of every kind, by the names that show it, and a word of what is said.
const FILES: [(&[&str], &str); 49] = [
    (
        &[
            "img_in.weight._data",
            "double_blocks.0.img_mod.lin.weight._data",
        ],
        "optimum-quanto",
    ),
    (
        &[
            "x_embedder.weight_qtype",
            "transformer_blocks.0.attn.to_q.weight._scale",
        ],
        "optimum-quanto",
    ),
    (
        &["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"],
        "NF4",
    ),
    (
        &[
            "img_in.weight",
            "double_blocks.0.img_attn.qkv.weight.absmax",
        ],
        "NF4",
    ),
    (
        &["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__fp4"],
        "FP4",
    ),
    (
        &["x_embedder.weight", "transformer_blocks.0.attn.to_q.SCB"],
        "int8",
    ),
    (
        &[
            "single_transformer_blocks.0.qkv_proj.qweight",
            "single_transformer_blocks.0.qkv_proj.wscales",
        ],
        "SVDQuant",
    ),
    (
        &[
            "double_blocks.0.img_attn.qkv.qweight",
            "double_blocks.0.img_attn.qkv.qzeros",
        ],
        "GPTQ",
    ),
    (
        &[
            "img_in.weight",
            "double_blocks.0.img_attn.qkv.weight_scale_2",
        ],
        "nvfp4",
    ),
    (
        &[
            "img_in.weight",
            "double_blocks.0.img_attn.qkv.W_q",
            "double_blocks.0.img_attn.qkv.meta",
        ],
        "HQQ",
    ),
    (&["transformer_blocks.0.attn.to_q.W_q"], "HQQ"),
    (
        &[
            "x_embedder.weight",
            "transformer_blocks.0.attn.to_q._weight_qdata",
        ],
        "torchao",
    ),
    (
        &[
            "x_embedder.weight",
            "transformer_blocks.0.attn.to_q.weight:qdata",
        ],
        "torchao",
    ),
    (
        &[
            "model.diffusion_model.distilled_guidance_layer.in_proj.weight",
            "model.diffusion_model.img_in.weight",
        ],
        "Chroma",
    ),
    (&["content_mode_blocks.image.0.q_proj.weight"], "FLUX.3"),
    (
        &["model.diffusion_model.early_stream_modulations.0.weight"],
        "FLUX.3",
    ),
    (&["txt_mode_blocks.0.q_proj.weight"], "FLUX.3"),
    (&["redux_up.weight"], "Redux"),
    (
        &[
            "controlnet_x_embedder.weight",
            "transformer_blocks.0.attn.to_q.weight",
        ],
        "ControlNet",
    ),
    (
        &[
            "img_in.weight",
            "controlnet_blocks.0.weight",
            "double_blocks.0.img_attn.qkv.weight",
        ],
        "ControlNet",
    ),
    (
        &[
            "ip_adapter_proj_model.proj.weight",
            "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
        ],
        "IP-Adapter",
    ),
    (&["pulid_encoder.latents"], "PuLID"),
    (
        &["double_blocks.0.processor.qkv_lora1.down.weight"],
        "XLabs",
    ),
    (
        &["lora_unet_double_blocks_0_img_attn_proj.hada_w1_a"],
        "LoHa",
    ),
    (&["lora_unet_double_blocks_0_img_attn_proj.lokr_w1"], "LoKr"),
    (
        &["oft_unet_double_blocks_0_img_attn_proj.oft_blocks"],
        "OFT",
    ),
    (
        &["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"],
        "LoRA",
    ),
    (&["transformer.x_embedder.lora_A.weight"], "LoRA"),
    (&["diffusion_model.double_blocks.0.img_mlp.0.diff"], "LoRA"),
    (
        &["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
        "Stable Diffusion 3",
    ),
    (
        &[
            "pos_embed.proj.weight",
            "transformer_blocks.0.attn.add_k_proj.weight",
        ],
        "Stable Diffusion 3",
    ),
    (
        &[
            "transformer_blocks.0.img_mlp.net.0.proj.weight",
            "txt_norm.weight",
        ],
        "Qwen-Image",
    ),
    (
        &[
            "txt_in.individual_token_refiner.blocks.0.norm1.weight",
            "img_in.proj.weight",
            "double_blocks.0.img_attn_q.weight",
        ],
        "HunyuanVideo",
    ),
    (
        &[
            "cap_embedder.0.weight",
            "noise_refiner.0.attention.qkv.weight",
        ],
        "Z-Image",
    ),
    (
        &["double_stream_blocks.0.block.attn1.to_q.weight"],
        "HiDream",
    ),
    (&["double_layers.0.attn.w1q.weight"], "AuraFlow"),
    (
        &[
            "model.diffusion_model.patch_embedding.weight",
            "model.diffusion_model.blocks.0.self_attn.q.weight",
        ],
        "Wan",
    ),
    (
        &["patch_embedding.weight", "blocks.0.attn1.to_q.weight"],
        "Wan",
    ),
    (
        &[
            "patchify_proj.weight",
            "transformer_blocks.0.attn1.to_q.weight",
        ],
        "LTX-Video",
    ),
    (
        &[
            "net.blocks.0.self_attn.q_proj.weight",
            "net.x_embedder.proj.1.weight",
        ],
        "Cosmos",
    ),
    (
        &[
            "patch_embed.text_proj.weight",
            "transformer_blocks.0.attn1.to_q.weight",
        ],
        "CogVideoX",
    ),
    (
        &[
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.middle_block.0.weight",
            "model.diffusion_model.time_embed.0.weight",
        ],
        "Stable Diffusion 1",
    ),
    (&["enc.blk.0.attn_q.weight"], "T5"),
    (
        &["model.layers.0.self_attn.q_proj.weight"],
        "language model",
    ),
    (&["text_model.embeddings.token_embedding.weight"], "CLIP"),
    (
        &["vision_model.embeddings.patch_embedding.weight"],
        "image encoder",
    ),
    (&["decoder.conv_in.weight"], "VAE"),
    (&["taesd_decoder.1.weight"], "TAESD"),
    (
        &["conv_first.weight", "body.0.rdb1.conv1.weight"],
        "enlarges",
    ),
];

#[test]
fn names_tell_what_a_file_is() {
    for (names, word) in FILES {
        let found = transformer(&file(names)).map(|found| found.to_string());
        let found = found.unwrap_or_default();
        assert!(found.contains(word), "{names:?}: {found}");
    }
}

#[test]
fn no_kind_is_without_a_file_that_shows_it() {
    let found = FILES.map(|(names, _)| transformer(&file(names)).map(|found| found.what));
    for kind in OF_FLUX.iter().chain(&OTHER) {
        assert!(found.contains(&Some(kind.what)), "{}", kind.what);
    }
}

#[test]
fn a_file_of_an_unknown_kind_is_nothing_that_is_known() {
    for names in [&["weight"][..], &["layers.0.weight", "head.bias"], &[]] {
        assert_eq!(transformer(&file(names)), None, "{names:?}");
    }
}

#[test]
fn a_flux_transformer_is_nothing_else() {
    for names in [
        &["img_in.weight", "double_blocks.0.img_attn.qkv.weight"][..],
        &[
            "x_embedder.weight",
            "transformer_blocks.0.attn.add_k_proj.weight",
        ],
        &[
            "model.img_in.weight",
            "model.double_blocks.0.a.weight",
            "vae.decoder.conv_in.weight",
            "t5.encoder.block.0.layer.0.a",
        ],
        &["double_blocks.0.img_attn.qkv.weight"],
        &[
            "img_in.weight",
            "double_blocks.0.x.weight",
            "double_blocks.0.x.lora_A.weight",
        ],
    ] {
        assert_eq!(transformer(&file(names)), None, "{names:?}");
    }
}

#[test]
fn first_bytes_tell_what_a_file_is() {
    for (bytes, word) in [
        (
            &b"version https://git-lfs.github.com/spec/v1\noid sha256:0"[..],
            "LFS",
        ),
        (b"\n<!DOCTYPE html><html>", "HTML"),
        (b"PK\x03\x04archive/data.pkl", "PyTorch"),
        (b"{\"a\": 1}", "JSON"),
    ] {
        assert!(by_bytes(bytes).unwrap().what.contains(word));
    }
    assert_eq!(by_bytes(b"\x10\0\0\0\0\0\0\0{}"), None);
    assert_eq!(by_bytes(b""), None);
}
