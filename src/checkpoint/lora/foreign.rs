//! Names that tell of which other model a LoRA is, for the message that refuses it.

use crate::checkpoint::Checkpoint;

/// Parts of names of what is no LoRA that could be added, and what it is.
const FORMS: [(&str, &str); 9] = [
    ("oft_", OFT),
    ("lora_mid", "a LoRA of convolutions"),
    ("lokr_t2", "a factorisation of convolutions"),
    ("hada_t1", "a factorisation of convolutions"),
    ("hada_t2", "a factorisation of convolutions"),
    (".on_input", "(IA)³, which multiplies activations"),
    (".a1.weight", "GLoRA"),
    (
        ".set_weight",
        "a set of weights to put in the place of the model's",
    ),
    (
        ".reshape_weight",
        "a control LoRA: it widens weights, which turns the model into another one",
    ),
];
const OFT: &str = "OFT, which multiplies weights instead of adding to them";

/// Parts of names, and the models that have them.
const MODELS: [(&str, &str); 27] = [
    ("content_mode_blocks", "FLUX.3"),
    ("txt_mode_blocks", "FLUX.3"),
    ("early_stream_modulation", "FLUX.3"),
    ("double_stream_modulation", "FLUX.2"),
    ("single_stream_modulation", "FLUX.2"),
    ("to_qkv_mlp_proj", "FLUX.2"),
    ("ff.linear_in", "FLUX.2"),
    ("ff_linear_in", "FLUX.2"),
    ("distilled_guidance_layer", "Chroma"),
    ("nerf_blocks", "Chroma"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("img_attn_qkv", "HunyuanVideo"),
    ("individual_token_refiner", "HunyuanVideo"),
    ("img_mod.1", "Qwen-Image"),
    ("txt_mod.1", "Qwen-Image"),
    ("img_mlp.net", "Qwen-Image"),
    ("cross_attn", "Wan"),
    ("attention.to_q", "Z-Image"),
    ("attention_to_q", "Z-Image"),
    ("caption_projection", "PixArt or LTX-Video"),
    ("adaln_single", "PixArt or LTX-Video"),
    ("attn1.to_", "LTX-Video, PixArt, Sana or CogVideoX"),
    ("attn1_to_", "LTX-Video, PixArt, Sana or CogVideoX"),
    ("attention.qkv", "Lumina-Image"),
    ("attention_qkv", "Lumina-Image"),
    ("double_stream_blocks", "HiDream"),
    ("joint_transformer_blocks", "AuraFlow"),
];

/// How names of FLUX.1's own modules end, which FLUX.2 has not got.
const FLUX1: [&str; 7] = [
    "img_mod.lin",
    "img_mod_lin",
    "txt_mod.lin",
    "txt_mod_lin",
    "modulation.lin",
    "modulation_lin",
    "proj_mlp",
];

/// Parts of the names of Stable Diffusion's U-Net.
const UNET: [&str; 8] = [
    "input_blocks",
    "output_blocks",
    "middle_block",
    "down_blocks",
    "up_blocks",
    "mid_block",
    "unet_conv_in",
    "unet.conv_in",
];

/// What a file is, if names tell, that has the tensors `unknown`, which no LoRA has.
pub(super) fn form(unknown: &[String]) -> Option<&'static str> {
    let has = |(word, _): &&(&str, &str)| unknown.iter().any(|name| name.contains(word));
    FORMS.iter().find(has).map(|(_, form)| *form)
}

/// For which other model, if names tell, a file is that has the tensors `unknown`, which this model has not.
pub(super) fn model(file: &Checkpoint, unknown: &[String]) -> Option<String> {
    let control = [
        "query_norm",
        "key_norm",
        "norm_q.",
        "norm_k.",
        "norm_added_",
    ];
    if unknown
        .iter()
        .any(|name| control.iter().any(|word| name.contains(word)))
    {
        return Some(
            "is a control LoRA: it replaces norms and widens the input, which turns the model into another one".to_owned(),
        );
    }
    if unknown
        .iter()
        .any(|name| UNET.iter().any(|word| name.contains(word)))
    {
        return Some(format!("is a LoRA for {}", unet(file)));
    }
    let known = |(word, model): &(&str, &str)| {
        let named = unknown.iter().any(|name| name.contains(word));
        named.then(|| format!("is a LoRA for {model}"))
    };
    let flux1 = || {
        let ends = |name: &String| FLUX1.iter().any(|word| name.ends_with(word));
        unknown.iter().any(ends)
    };
    let found = MODELS.iter().find_map(known);
    found.or_else(|| flux1().then(|| "is a LoRA for FLUX.1".to_owned()))
}

/// Which Stable Diffusion, by the width of the text that its attention takes.
fn unet(file: &Checkpoint) -> &'static str {
    let width = file.iter().find_map(|(name, source)| {
        let key = name.contains("attn2.to_k") || name.contains("attn2_to_k");
        let down = name.contains("lora_down") || name.contains("lora_A") || name.contains("down.");
        (key && down).then(|| source.shape().get(1).copied())?
    });
    let has = |word: &str| file.names().any(|name| name.contains(word));
    match width {
        Some(768) => "Stable Diffusion 1.5",
        Some(1024) => "Stable Diffusion 2",
        Some(2048) => "SDXL",
        _ if has("lora_te2_") || has("input_blocks") => "SDXL",
        _ if has("lora_te_") => "Stable Diffusion 1.5",
        _ => "Stable Diffusion (1.5, 2 or SDXL)",
    }
}
