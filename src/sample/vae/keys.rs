//! The original autoencoder's tensor names ⇄ diffusers' ones, and its sizes if no config says them. Values stay as they are: the
//! attention's 1×1 convolutions are read as matrices by `layers.rs`.
//!
//! Source: BFL `src/flux/modules/autoencoder.py`, diffusers `loaders/single_file_utils.py` (`convert_ldm_vae_checkpoint`).

use anyhow::{Context as _, Result, ensure};

use super::VaeConfig;

/// Prefixes under which whole-model files keep an autoencoder.
const PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", "autoencoder."];

/// Names of one residual block's or attention's parts, original and diffusers'.
const PARTS: [(&str, &str); 6] = [
    ("nin_shortcut", "conv_shortcut"),
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
];

/// Whether names are the original ones.
pub fn is_original<'a>(names: impl IntoIterator<Item = &'a str>) -> bool {
    names
        .into_iter()
        .any(|name| name.contains("decoder.mid.block_1."))
}

/// Number of levels of an autoencoder with original names.
pub fn levels<'a>(names: impl IntoIterator<Item = &'a str>) -> usize {
    let level = |name: &str| {
        let (_, rest) = name.split_once("decoder.up.")?;
        rest.split('.').next()?.parse::<usize>().ok()
    };
    names
        .into_iter()
        .filter_map(level)
        .max()
        .map_or(0, |last| last + 1)
}

/// Original name → diffusers' name, for an autoencoder of `levels` levels; `None` for what is no tensor of it.
pub fn to_diffusers(name: &str, levels: usize) -> Option<String> {
    let name = PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))
        .unwrap_or(name);
    let (half, rest) = name.split_once('.')?;
    match half {
        // the last are the statistics of FLUX.2's latents
        "quant_conv" | "post_quant_conv" | "bn" => return Some(name.to_owned()),
        "encoder" | "decoder" => {}
        _ => return None,
    }
    let parts: Vec<&str> = rest.split('.').collect();
    let rest = match parts.as_slice() {
        // where FLUX.2's original has them
        ["quant_conv" | "post_quant_conv", _] => return Some(rest.to_owned()),
        ["conv_in" | "conv_out", _] => rest.to_owned(),
        ["norm_out", tail] => format!("conv_norm_out.{tail}"),
        ["mid", "attn_1", part, tail] => format!("mid_block.attentions.0.{}.{tail}", renamed(part)),
        ["mid", block, part, tail] => {
            let index = block
                .strip_prefix("block_")?
                .parse::<usize>()
                .ok()?
                .checked_sub(1)?;
            format!("mid_block.resnets.{index}.{}.{tail}", part_of_resnet(part))
        }
        [way @ ("down" | "up"), level, "block", block, part, tail] => {
            format!(
                "{way}_blocks.{}.resnets.{block}.{}.{tail}",
                turned(way, level, levels)?,
                part_of_resnet(part)
            )
        }
        ["down", level, "downsample", "conv", tail] => {
            format!("down_blocks.{level}.downsamplers.0.conv.{tail}")
        }
        ["up", level, "upsample", "conv", tail] => format!(
            "up_blocks.{}.upsamplers.0.conv.{tail}",
            turned("up", level, levels)?
        ),
        _ => return None,
    };
    Some(format!("{half}.{rest}"))
}

/// diffusers' name → original name (without prefix), for an autoencoder of `levels` levels; the inverse of [`to_diffusers`].
pub fn to_original(name: &str, levels: usize) -> Option<String> {
    let (half, rest) = name.split_once('.')?;
    match half {
        "quant_conv" | "post_quant_conv" => return Some(name.to_owned()),
        "encoder" | "decoder" => {}
        _ => return None,
    }
    let parts: Vec<&str> = rest.split('.').collect();
    let resnet = |part: &str| {
        if part == "conv_shortcut" {
            "nin_shortcut"
        } else {
            part
        }
        .to_owned()
    };
    let rest = match parts.as_slice() {
        ["conv_in" | "conv_out", _] => rest.to_owned(),
        ["conv_norm_out", tail] => format!("norm_out.{tail}"),
        ["mid_block", "attentions", "0", part @ .., tail] => {
            let part = part.join(".");
            format!(
                "mid.attn_1.{}.{tail}",
                PARTS.iter().find(|(_, new)| *new == part)?.0
            )
        }
        ["mid_block", "resnets", index, part, tail] => format!(
            "mid.block_{}.{}.{tail}",
            index.parse::<usize>().ok()? + 1,
            resnet(part)
        ),
        [
            way @ ("down_blocks" | "up_blocks"),
            level,
            "resnets",
            block,
            part,
            tail,
        ] => {
            let way = way.strip_suffix("_blocks")?;
            format!(
                "{way}.{}.block.{block}.{}.{tail}",
                turned(way, level, levels)?,
                resnet(part)
            )
        }
        ["down_blocks", level, "downsamplers", "0", "conv", tail] => {
            format!("down.{level}.downsample.conv.{tail}")
        }
        ["up_blocks", level, "upsamplers", "0", "conv", tail] => {
            format!("up.{}.upsample.conv.{tail}", turned("up", level, levels)?)
        }
        _ => return None,
    };
    Some(format!("{half}.{rest}"))
}

fn renamed(part: &str) -> &str {
    PARTS
        .iter()
        .find(|(old, _)| *old == part)
        .map_or(part, |(_, new)| new)
}

fn part_of_resnet(part: &str) -> &str {
    if part == "nin_shortcut" {
        "conv_shortcut"
    } else {
        part
    }
}

/// The decoder's levels are counted from full size in the original and from the latents in diffusers.
fn turned(way: &str, level: &str, levels: usize) -> Option<usize> {
    let level = level.parse::<usize>().ok()?;
    if way == "up" {
        levels.checked_sub(level + 1)
    } else {
        Some(level)
    }
}

/// Sizes of an autoencoder by the shapes of its tensors under diffusers' names; groups, scale and shift are those of the
/// released ones.
pub fn infer_config(shape: impl Fn(&str) -> Option<Vec<usize>>) -> Result<VaeConfig> {
    let rows = |name: &str, axis: usize| -> Result<usize> {
        let shape = shape(name)
            .with_context(|| format!("there is no tensor `{name}`, so this is no VAE"))?;
        shape
            .get(axis)
            .copied()
            .with_context(|| format!("tensor `{name}` has shape {shape:?}"))
    };
    let level = |way: &str, i: usize| format!("{way}_blocks.{i}.resnets.0.conv1.weight");
    let channels = |way: &str| {
        (0..)
            .take_while(|i| shape(&level(way, *i)).is_some())
            .map(|i| rows(&level(way, i), 0))
            .collect::<Result<Vec<_>>>()
    };
    let mut decoder = channels("decoder.up")?;
    decoder.reverse();
    ensure!(
        !decoder.is_empty(),
        "there is no tensor `{}`, so this is no VAE",
        level("decoder.up", 0)
    );
    let encoder = Some(channels("encoder.down")?).filter(|channels| !channels.is_empty());
    let block_out_channels = encoder.unwrap_or_else(|| decoder.clone());
    let statistics = shape("bn.running_mean").map(|shape| shape.iter().product::<usize>());
    let mut layers = 0usize;
    while shape(&format!(
        "decoder.up_blocks.0.resnets.{layers}.conv1.weight"
    ))
    .is_some()
    {
        layers += 1;
    }
    let config = VaeConfig {
        in_channels: shape("encoder.conv_in.weight")
            .map_or(Ok(3), |_| rows("encoder.conv_in.weight", 1))?,
        out_channels: rows("decoder.conv_out.weight", 0)?,
        layers_per_block: layers.saturating_sub(1),
        latent_channels: rows("decoder.conv_in.weight", 1)?,
        norm_num_groups: 32,
        scaling_factor: 0.3611,
        shift_factor: Some(0.1159),
        mid_block_add_attention: shape("decoder.mid_block.attentions.0.to_q.weight").is_some(),
        use_quant_conv: shape("quant_conv.weight").is_some(),
        use_post_quant_conv: shape("post_quant_conv.weight").is_some(),
        decoder_block_out_channels: (decoder != block_out_channels).then_some(decoder),
        block_out_channels,
        ..VaeConfig::default()
    };
    let latent = config.latent_channels;
    let released = statistics.map_or(latent == 16, |count| count == 4 * latent);
    let levels = config.block_out_channels.iter();
    ensure!(
        released && levels.chain(config.decoder_channels()).all(|c| c % 32 == 0),
        "a VAE of {} latent channels and block channels {:?} is neither FLUX.1's nor FLUX.2's, so it needs its config.json",
        config.latent_channels,
        config.block_out_channels
    );
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn original_names_become_diffusers_names_and_back() {
        let pairs = [
            ("encoder.conv_in.weight", "encoder.conv_in.weight"),
            ("encoder.norm_out.bias", "encoder.conv_norm_out.bias"),
            (
                "encoder.down.0.block.1.norm1.weight",
                "encoder.down_blocks.0.resnets.1.norm1.weight",
            ),
            (
                "encoder.down.1.block.0.nin_shortcut.bias",
                "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            ),
            (
                "encoder.down.2.downsample.conv.weight",
                "encoder.down_blocks.2.downsamplers.0.conv.weight",
            ),
            (
                "encoder.mid.block_1.conv1.weight",
                "encoder.mid_block.resnets.0.conv1.weight",
            ),
            (
                "decoder.mid.block_2.norm2.bias",
                "decoder.mid_block.resnets.1.norm2.bias",
            ),
            (
                "decoder.mid.attn_1.norm.weight",
                "decoder.mid_block.attentions.0.group_norm.weight",
            ),
            (
                "decoder.mid.attn_1.q.weight",
                "decoder.mid_block.attentions.0.to_q.weight",
            ),
            (
                "decoder.mid.attn_1.proj_out.bias",
                "decoder.mid_block.attentions.0.to_out.0.bias",
            ),
            // the original counts the decoder's levels from full size
            (
                "decoder.up.3.block.2.conv2.weight",
                "decoder.up_blocks.0.resnets.2.conv2.weight",
            ),
            (
                "decoder.up.0.block.0.nin_shortcut.weight",
                "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
            ),
            (
                "decoder.up.1.upsample.conv.bias",
                "decoder.up_blocks.2.upsamplers.0.conv.bias",
            ),
            ("post_quant_conv.weight", "post_quant_conv.weight"),
        ];
        for (original, diffusers) in pairs {
            assert_eq!(to_diffusers(original, 4).as_deref(), Some(diffusers));
            assert_eq!(to_original(diffusers, 4).as_deref(), Some(original));
            for prefix in PREFIXES {
                assert_eq!(
                    to_diffusers(&format!("{prefix}{original}"), 4).as_deref(),
                    Some(diffusers)
                );
            }
        }
        for other in [
            "loss.discriminator.weight",
            "decoder.up.4.block.0.norm1.weight",
            "decoder.mid.block_0.norm1.weight",
            "x",
        ] {
            assert_eq!(to_diffusers(other, 4), None);
        }
    }

    #[test]
    fn levels_and_kind_are_read_off_the_names() {
        let original = [
            "decoder.mid.block_1.conv1.weight",
            "vae.decoder.up.2.block.0.conv1.weight",
            "decoder.up.0.block.0.conv1.weight",
        ];
        assert!(is_original(original));
        assert_eq!(levels(original), 3);
        assert!(!is_original(["decoder.mid_block.resnets.0.conv1.weight"]));
    }

    /// The shapes of FLUX.1's autoencoder that matter to the config.
    fn flux1(name: &str) -> Option<Vec<usize>> {
        let channels = [512, 512, 256, 128];
        let shape = match name {
            "encoder.conv_in.weight" => vec![128, 3, 3, 3],
            "decoder.conv_in.weight" => vec![512, 16, 3, 3],
            "decoder.conv_out.weight" => vec![3, 128, 3, 3],
            "decoder.mid_block.attentions.0.to_q.weight" => vec![512, 512, 1, 1],
            _ => {
                let rest = name.strip_prefix("decoder.up_blocks.")?;
                let (level, rest) = rest.split_once(".resnets.")?;
                let layer: usize = rest.strip_suffix(".conv1.weight")?.parse().ok()?;
                let output = *channels.get(level.parse::<usize>().ok()?)?;
                (layer < 3).then(|| vec![output, output, 3, 3])?
            }
        };
        Some(shape)
    }

    #[test]
    fn flux1s_sizes_follow_from_its_tensors() -> Result<()> {
        let config = infer_config(flux1)?;
        assert_eq!(config.block_out_channels, [128, 256, 512, 512]);
        assert_eq!(
            (
                config.layers_per_block,
                config.latent_channels,
                config.in_channels,
                config.out_channels
            ),
            (2, 16, 3, 3)
        );
        assert_eq!(
            (
                config.norm_num_groups,
                config.scaling_factor,
                config.shift_factor
            ),
            (32, 0.3611, Some(0.1159))
        );
        assert!(
            config.mid_block_add_attention && !config.use_quant_conv && !config.use_post_quant_conv
        );
        Ok(())
    }

    #[test]
    fn another_autoencoder_needs_its_config() {
        let other = |name: &str| {
            if name == "decoder.conv_in.weight" {
                Some(vec![512, 4, 3, 3])
            } else {
                flux1(name)
            }
        };
        assert!(
            infer_config(other)
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
        assert!(
            infer_config(|_| None)
                .unwrap_err()
                .to_string()
                .contains("no VAE")
        );
    }
}
