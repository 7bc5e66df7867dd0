//! The table: which names show which kind of file.

/// Evidence: every group has a pattern that some tensor's name matches. A pattern is a part of a name; `$` ends it at the
/// name's end, `^` begins it at the name's beginning or after a dot.
pub(super) struct Kind {
    pub(super) evidence: &'static [&'static [&'static str]],
    pub(super) what: &'static str,
    pub(super) hint: &'static str,
}

pub(super) const UNQUANTIZED: &str = "use a file in bf16, float8 or GGUF";
const OF_FLUX1: &str =
    "fastflux opens FLUX.1, FLUX.2 [klein] and models cut from them; name one with --model";
pub(super) const MERGE: &str =
    "name the model that it changes with --model, and this file with --lora";

/// Files whose weights are those of a FLUX transformer in a format that is not read, or that change one.
pub(super) const OF_FLUX: [Kind; 20] = [
    Kind {
        evidence: &[
            &[".qweight$"],
            &[".wscales$", ".smooth_factor$", ".smooth$"],
        ],
        what: "is quantized by SVDQuant (Nunchaku)",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&[".qweight$"], &[".qzeros$", ".g_idx$"]],
        what: "is quantized by GPTQ or AWQ",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&[".weight._data$", ".weight_qtype$", ".weight._scale$"]],
        what: "is quantized by optimum-quanto",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&["bitsandbytes__fp4"]],
        what: "is quantized to FP4 by bitsandbytes",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&["bitsandbytes__nf4", ".weight.quant_map$", ".weight.absmax$"]],
        what: "is quantized to NF4 by bitsandbytes",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&[".SCB$", ".weight_format$"]],
        what: "is quantized to int8 by bitsandbytes",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&[".weight_scale_2$", ".weight_scale_inv$"]],
        what: "is quantized in blocks (nvfp4, mxfp8 or block-scaled float8)",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&[".W_q$"]],
        what: "is quantized by HQQ",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&["_weight_qdata$", ".weight:qdata$", ".weight._packed_weight"]],
        what: "is quantized by torchao",
        hint: UNQUANTIZED,
    },
    Kind {
        evidence: &[&["distilled_guidance_layer."]],
        what: "is a Chroma model, which has one small network in the place of FLUX's modulations",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&[
            "^content_mode_blocks.",
            "^early_stream_modulations.",
            "^txt_mode_blocks.",
        ]],
        what: "is a FLUX.3 model",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^redux_up.", "^redux_down."]],
        what: "is FLUX.1 Redux, an adapter that makes text embeddings of an image",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&[
            "^controlnet_blocks.",
            "^controlnet_single_blocks.",
            "^controlnet_x_embedder.",
            "^controlnet_double_blocks.",
            "^input_hint_block.",
            "^controlnet_mode_embedder.",
            "^control_model.",
        ]],
        what: "is a ControlNet",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&[
            "ip_adapter",
            "^image_proj.",
            "^pulid_encoder.",
            "^pulid_ca.",
        ]],
        what: "is an IP-Adapter or PuLID, which adds an image to the prompt",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[
            &[".processor.", ".qkv_lora", ".proj_lora"],
            &["_lora1.", "_lora2.", "_lora."],
        ],
        what: "is a LoRA (XLabs)",
        hint: MERGE,
    },
    Kind {
        evidence: &[&[".hada_w1", ".hada_w2", ".hada_t1"]],
        what: "is a LoRA (LoHa of LyCORIS)",
        hint: MERGE,
    },
    Kind {
        evidence: &[&[".lokr_w1", ".lokr_w2"]],
        what: "is a LoRA (LoKr of LyCORIS)",
        hint: MERGE,
    },
    Kind {
        evidence: &[&["oft_blocks", ".oft_diag", ".oft_R.", "^oft_unet_", ".boft_"]],
        what: "is a LoRA (OFT)",
        hint: MERGE,
    },
    Kind {
        evidence: &[&[
            "lora_A.",
            "lora_B.",
            ".lora_up.",
            ".lora_down.",
            ".lora.up.",
            ".lora.down.",
            "lora_unet_",
            "lora_transformer_",
            ".lora_linear_layer.",
            ".dora_scale",
        ]],
        what: "is a LoRA",
        hint: MERGE,
    },
    Kind {
        evidence: &[&[".diff$", ".diff_b$", ".set_weight$"]],
        what: "is a LoRA of whole differences (`.diff`)",
        hint: MERGE,
    },
];

/// Models of another kind.
pub(super) const OTHER: [Kind; 19] = [
    Kind {
        evidence: &[&["^joint_blocks."]],
        what: "is Stable Diffusion 3",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[
            &["^pos_embed.proj."],
            &["^transformer_blocks.0.attn.add_k_proj."],
        ],
        what: "is Stable Diffusion 3",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[
            &["^transformer_blocks.0.img_mlp."],
            &["^txt_norm.", "^img_in."],
        ],
        what: "is Qwen-Image",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^txt_in.individual_token_refiner."]],
        what: "is HunyuanVideo",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^cap_embedder.", "^noise_refiner.", "^context_refiner."]],
        what: "is Z-Image or Lumina",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^double_stream_blocks.", "^caption_projection."]],
        what: "is HiDream or PixArt",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^double_layers.", "^single_layers."]],
        what: "is AuraFlow",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^patch_embedding."], &["^blocks.0."]],
        what: "is Wan",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^patchify_proj.", "^scale_shift_table"]],
        what: "is LTX-Video or PixArt",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^x_embedder.proj."], &["^blocks.0."]],
        what: "is Cosmos",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^patch_embed.text_proj."]],
        what: "is CogVideoX",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[
            &["^input_blocks.", "^down_blocks."],
            &["^middle_block.", "^mid_block."],
            &[".attn2.", "time_embed", "^output_blocks."],
        ],
        what: "is Stable Diffusion 1, 2 or XL",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^enc.blk.0.", "^encoder.block.0.layer."]],
        what: "is a T5 text encoder",
        hint: "name the transformer with --model, and this file with --text-encoders",
    },
    Kind {
        evidence: &[&[
            "^blk.0.attn_q.",
            "^blk.0.attn_qkv.",
            "^model.layers.0.self_attn.",
        ]],
        what: "is a language model",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&[
            "^text_model.embeddings.",
            "^transformer.resblocks.",
            "^embeddings.token_embedding.",
        ]],
        what: "is a CLIP text encoder",
        hint: "name the transformer with --model, and this file with --text-encoders",
    },
    Kind {
        evidence: &[&["^vision_model.embeddings.", "^visual.conv1."]],
        what: "is an image encoder (CLIP vision or SigLIP)",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^taesd_decoder.", "^taesd_encoder."]],
        what: "is TAESD, a small stand-in for a VAE that shows previews",
        hint: "name the transformer with --model, and the whole VAE with --vae",
    },
    Kind {
        evidence: &[&["^conv_first.", "^model.1.sub.0."]],
        what: "enlarges images (ESRGAN)",
        hint: OF_FLUX1,
    },
    Kind {
        evidence: &[&["^decoder.conv_in."]],
        what: "is a VAE",
        hint: "name the transformer with --model, and this file with --vae",
    },
];
