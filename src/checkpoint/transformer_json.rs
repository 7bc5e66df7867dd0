//! A [`FluxConfig`] as diffusers' `transformer/config.json`, both ways, if there are no tensors to ask.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    config::ConfigFile,
    record::Record,
    rotary::{Released, default_axes, is_theta, released},
};
use crate::layout::{Activation, BlockKind, BlockSpec, Family, FluxConfig, unpruned};

/// Larger sizes are mistakes, and their products would not fit a machine word.
const MAX_SIZE: usize = 1 << 20;
/// Blocks of one kind: FLUX.1 has 19 and 38.
const MAX_BLOCKS: usize = 1000;

/// The class of diffusers that computes a family.
pub fn class(family: &Family) -> &'static str {
    if *family == Family::FLUX2 {
        "Flux2Transformer2DModel"
    } else {
        "FluxTransformer2DModel"
    }
}

/// MLP width over stream width where a configuration does not say: fixed in diffusers' FLUX.1 blocks, a default in
/// those of FLUX.2.
fn mlp_ratio(family: &Family) -> f64 {
    match family.activation {
        Activation::Gelu => 4.0,
        Activation::SwiGlu => 3.0,
    }
}

/// The configuration that a file describes on its own, and the record of a pruned one.
///
/// Takes diffusers' keys, and for FLUX.1 `mlp_ratio` (default 4) and `theta` (default 10000) too. The family follows from
/// `_class_name`, or from what only FLUX.2 has: four rotary axes, `rope_theta`. The `fastflux` object that `prune` writes
/// gives the layout of a pruned model.
///
/// # Errors
/// When a size is missing, no positive integer, or contradicts another; the message names file and key.
pub fn read(file: &ConfigFile) -> Result<(FluxConfig, Option<Record>)> {
    let get = |key: &str| file.json.get(key).filter(|v| !v.is_null());
    let within = |key: &str, smallest: usize, largest: usize| -> Result<usize> {
        let value = get(key).with_context(|| format!("`{}` does not say `{key}`", file.name))?;
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
        size.filter(|v| (smallest..=largest).contains(v))
            .with_context(|| {
                format!(
                    "`{}` says `{key}` = {value}, expected an integer from {smallest} to {largest}",
                    file.name
                )
            })
    };
    let size = |key: &str, smallest: usize| within(key, smallest, MAX_SIZE);
    let number = |key: &str, default: f64| -> Result<f64> {
        let value = get(key).map_or(Some(default), Value::as_f64);
        value
            .filter(|v| v.is_finite() && *v > 0.0 && *v <= MAX_SIZE as f64)
            .with_context(|| format!("`{}`: `{key}` must be a positive number", file.name))
    };
    let family = family(file);
    let (num_heads, head) = (
        size("num_attention_heads", 1)?,
        size("attention_head_dim", 1)?,
    );
    let hidden_size = num_heads * head;
    ensure!(
        hidden_size <= MAX_SIZE,
        "`{}`: {num_heads} heads of {head} make a stream {hidden_size} wide, the most is {MAX_SIZE}",
        file.name
    );
    ensure!(
        get("patch_size").is_none_or(|p| p.as_u64() == Some(1)),
        "`{}`: `patch_size` must be 1, the only one FLUX has",
        file.name
    );
    let in_channels = size("in_channels", 1)?;
    let (double, single) = (
        within("num_layers", 0, MAX_BLOCKS)?,
        within("num_single_layers", 0, MAX_BLOCKS)?,
    );
    let record = get("fastflux")
        .map(|v| Record::from_value(&file.name, v.clone()))
        .transpose()?;
    let guidance_embed = match get("guidance_embeds") {
        // as the classes of diffusers have it
        None => family == Family::FLUX2,
        Some(value) => value
            .as_bool()
            .with_context(|| format!("`{}`: `guidance_embeds` must be true or false", file.name))?,
    };
    let config = FluxConfig {
        in_channels,
        out_channels: get("out_channels").map_or(Ok(in_channels), |_| size("out_channels", 1))?,
        hidden_size,
        num_heads,
        mlp_size: (number("mlp_ratio", mlp_ratio(&family))? * hidden_size as f64).round() as usize,
        context_in_dim: size("joint_attention_dim", 1)?,
        vec_in_dim: if family == Family::FLUX1 {
            size("pooled_projection_dim", 1)?
        } else {
            0
        },
        guidance_embed,
        axes_dims: axes(file, &family, head)?,
        theta: {
            let Released {
                theta, theta_key, ..
            } = released(&family);
            match number(theta_key, theta)? {
                theta if is_theta(theta) => theta,
                _ => bail!("`{}`: `{theta_key}` must be a number above 1", file.name),
            }
        },
        family,
        layout: record
            .as_ref()
            .map_or_else(|| unpruned(double, single), |r| r.layout.clone()),
    };
    for (key, said) in [("num_layers", double), ("num_single_layers", single)] {
        let slots = slots(&config, key);
        ensure!(
            slots == said,
            "`{}` says `{key}` = {said}, but its `fastflux` layout has {slots}",
            file.name
        );
    }
    let kept = |spec: &BlockSpec| matches!(spec, BlockSpec::Original(_));
    ensure!(
        config.mlp_size > 0 && config.layout.iter().any(kept),
        "`{}` describes a transformer without blocks",
        file.name
    );
    Ok((config, record))
}

/// The family that a configuration describes.
fn family(file: &ConfigFile) -> Family {
    let class = file.json.get("_class_name").and_then(Value::as_str);
    let axes = file.json.get("axes_dims_rope").and_then(Value::as_array);
    let is_flux2 = match class {
        Some(class) => class.contains("Flux2"),
        None => {
            axes.is_some_and(|axes| axes.len() == Family::FLUX2.position_axes)
                || file.json.get("rope_theta").is_some()
        }
    };
    if is_flux2 {
        Family::FLUX2
    } else {
        Family::FLUX1
    }
}

fn axes(file: &ConfigFile, family: &Family, head: usize) -> Result<Vec<usize>> {
    let count = family.position_axes;
    let Some(value) = file.json.get("axes_dims_rope").filter(|v| !v.is_null()) else {
        return default_axes(family, head).with_context(|| {
            format!(
                "`{}` does not say `axes_dims_rope`: how the rotary axes divide the head size {head}",
                file.name
            )
        });
    };
    let dims: Vec<usize> = serde_json::from_value(value.clone()).unwrap_or_default();
    ensure!(
        dims.len() == count
            && dims.iter().all(|d| d % 2 == 0 && (1..=head).contains(d))
            && dims.iter().sum::<usize>() == head,
        "`{}` says `axes_dims_rope` = {value}; expected {count} even sizes that sum to the head size {head}",
        file.name
    );
    Ok(dims)
}

/// The file that describes a checkpoint of this configuration to diffusers and to us.
pub fn write(config: &FluxConfig, record: Option<&Record>) -> Value {
    let mut json = json!({
        "_class_name": class(&config.family),
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": slots(config, "num_layers"),
        "num_single_layers": slots(config, "num_single_layers"),
        "attention_head_dim": config.head_dim(),
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dims,
    });
    if config.vec_in_dim > 0 {
        json["pooled_projection_dim"] = json!(config.vec_in_dim);
    }
    // diffusers has no such keys for FLUX.1: its models have these values
    let (ratio, released) = (
        config.mlp_size as f64 / config.hidden_size as f64,
        released(&config.family),
    );
    let always = config.family == Family::FLUX2;
    if always || ratio.to_bits() != mlp_ratio(&config.family).to_bits() {
        json["mlp_ratio"] = json!(ratio);
    }
    if always || config.theta.to_bits() != released.theta.to_bits() {
        json[released.theta_key] = json!(config.theta);
    }
    if let Some(record) = record {
        json["fastflux"] = json!(record);
    }
    json
}

/// The entry of a `model_index.json` for the transformer that `config` describes: whose class, and its name.
pub fn module_and_class(config: &Value) -> Value {
    let custom = config["auto_map"]["AutoModel"].as_str();
    match custom.and_then(|custom| custom.split_once('.')) {
        Some((module, class)) => json!([module, class]),
        None => json!(["diffusers", config["_class_name"]]),
    }
}

/// Whether diffusers' own class computes this model: its blocks are all FLUX's, and FLUX.1's class cannot be told another
/// rotary base.
pub fn is_stock(config: &FluxConfig) -> bool {
    let replaced = config
        .layout
        .iter()
        .any(|spec| spec.has_tensors() && matches!(spec, BlockSpec::Replaced(_)));
    let told = config.family == Family::FLUX2;
    !replaced && (told || config.theta.to_bits() == released(&config.family).theta.to_bits())
}

/// How many blocks of a kind own tensors.
fn slots(config: &FluxConfig, key: &str) -> usize {
    let kind = if key == "num_layers" {
        BlockKind::Double
    } else {
        BlockKind::Single
    };
    let owned = |spec: &&BlockSpec| spec.has_tensors() && spec.kind() == kind;
    config.layout.iter().filter(owned).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::cost;

    fn file(text: &str) -> ConfigFile {
        ConfigFile {
            name: "config.json".to_owned(),
            json: serde_json::from_str(text).unwrap(),
        }
    }

    #[test]
    fn the_shipped_configurations_have_the_published_sizes() {
        let dev = read(&file(include_str!("../../configs/flux1/dev.json"))).unwrap();
        assert_eq!(cost::model(&dev.0, 1, 1).parameters, 11_901_408_320);
        assert_eq!(dev.0.axes_dims, [16, 56, 56]);
        let schnell = read(&file(include_str!("../../configs/flux1/schnell.json"))).unwrap();
        assert_eq!(cost::model(&schnell.0, 1, 1).parameters, 11_891_178_560);
    }

    #[test]
    fn the_shipped_configurations_of_flux2_have_the_published_sizes() {
        let klein = |text| read(&file(text)).unwrap().0;
        let small = klein(include_str!("../../configs/flux2/klein-4b.json"));
        assert_eq!(cost::model(&small, 1, 1).parameters, 3_875_544_576);
        assert_eq!(small.family, Family::FLUX2);
        let large = klein(include_str!("../../configs/flux2/klein-9b.json"));
        // its file on the hub has 18,157,185,168 bytes, of which 22,672 are the header
        assert_eq!(2 * cost::model(&large, 1, 1).parameters, 18_157_162_496);
        for config in [small, large] {
            let name = "again".to_owned();
            let json = write(&config, None);
            assert_eq!(json["_class_name"], "Flux2Transformer2DModel");
            assert_eq!(read(&ConfigFile { name, json }).unwrap(), (config, None));
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let tiny = file(include_str!("../../configs/tiny/transformer/config.json"));
        let (mut config, _) = read(&tiny).unwrap();
        for (mlp, theta) in [(512, 1e4), (320, 2000.0)] {
            (config.mlp_size, config.theta) = (mlp, theta);
            let again = ConfigFile {
                name: "again".to_owned(),
                json: write(&config, None),
            };
            assert_eq!(read(&again).unwrap(), (config.clone(), None));
        }
    }

    #[test]
    fn a_bad_value_is_named_with_its_file() {
        let good: Value =
            serde_json::from_str(include_str!("../../configs/flux1/dev.json")).unwrap();
        for (key, bad) in [
            ("num_layers", json!(-1)),
            ("num_layers", json!(1e30)),
            ("num_layers", json!(1_000_003)),
            ("num_single_layers", json!(null)),
            ("attention_head_dim", json!(0)),
            ("num_attention_heads", json!(1_000_000)),
            ("in_channels", json!("64")),
            ("axes_dims_rope", json!([16, 56])),
            ("axes_dims_rope", json!([15, 57, 56])),
            ("guidance_embeds", json!("yes")),
            ("theta", json!(-1)),
            ("theta", json!(1)),
            ("mlp_ratio", json!(0)),
            ("patch_size", json!(2)),
            ("fastflux", json!({ "version": 1 })),
        ] {
            let mut json = good.clone();
            json[key] = bad;
            let name = "config.json".to_owned();
            let error = format!("{:#}", read(&ConfigFile { name, json }).unwrap_err());
            let named = match key {
                "num_attention_heads" => "heads",
                "fastflux" => "fastflux",
                key => key,
            };
            assert!(
                error.contains("config.json") && error.contains(named),
                "{error}"
            );
        }
    }
}
