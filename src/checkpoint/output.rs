//! A finished transformer as the files of a folder that `--model` opens, in either format. What goes in is decided elsewhere.

use std::{collections::BTreeMap, fmt, path::Path, str::FromStr};

use anyhow::{Context, Result};
use serde_json::Value;

use super::{
    Checkpoint, diffusers,
    record::{self, Record},
    save, transformer_json,
};
use crate::layout::FluxConfig;

/// The stem of a weight file with original names.
pub const ORIGINAL_STEM: &str = "flux";
/// The stem of a transformer's weight file in diffusers layout.
pub const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

/// The module that diffusers loads with a model that it has no class of its own for; `scripts/check_diffusers.py` tries it.
const DIFFUSERS_MODULE: &str = "fastflux_flux";
const DIFFUSERS_CLASS: &str = "FastFluxTransformer2DModel";
const DIFFUSERS_SOURCE: &str = include_str!("../../scripts/fastflux_flux.py");

/// A `--format` value: names and places of what is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Black Forest Labs' names in one file, `flux.safetensors`.
    #[default]
    Original,
    /// diffusers' names, in a sub-folder `transformer`.
    Diffusers,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "original" => Ok(Self::Original),
            "diffusers" => Ok(Self::Diffusers),
            _ => Err("expected original or diffusers".to_owned()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Original => "original",
            Self::Diffusers => "diffusers",
        })
    }
}

impl Format {
    /// A canonical checkpoint under this format's names; no byte is read.
    ///
    /// # Errors
    /// When a tensor has no counterpart in diffusers.
    pub fn named(self, checkpoint: &Checkpoint) -> Result<Checkpoint> {
        match self {
            Self::Original => Ok(checkpoint.clone()),
            Self::Diffusers => diffusers::from_original(checkpoint),
        }
    }
}

/// The metadata of a file that fastflux writes.
///
/// # Errors
/// When a number in the record is not finite.
pub fn metadata(record: Option<&Record>) -> Result<BTreeMap<String, String>> {
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    if let Some(record) = record {
        metadata.insert(record::KEY.to_owned(), record.to_text()?);
    }
    Ok(metadata)
}

/// Writes the weights and the `config.json` of a canonical checkpoint into `folder`: `flux.safetensors` and
/// `config.json`, or both in diffusers' `transformer` sub-folder, with the Python class for it where diffusers has none.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write(
    folder: &Path,
    checkpoint: &Checkpoint,
    config: &FluxConfig,
    record: Option<&Record>,
    format: Format,
) -> Result<()> {
    let (folder, stem) = match format {
        Format::Original => (folder.to_path_buf(), ORIGINAL_STEM),
        Format::Diffusers => (folder.join("transformer"), DIFFUSERS_STEM),
    };
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot create `{}`", folder.display()))?;
    let mut named = format.named(checkpoint)?;
    named.metadata = metadata(record)?;
    save::write(&named, &folder.join(format!("{stem}.safetensors")))?;
    let mut json = transformer_json::write(config, record);
    if format == Format::Diffusers && !transformer_json::is_stock(config) {
        json["_class_name"] = DIFFUSERS_CLASS.into();
        json["auto_map"] =
            serde_json::json!({ "AutoModel": format!("{DIFFUSERS_MODULE}.{DIFFUSERS_CLASS}") });
        save::write_bytes(
            &folder.join(format!("{DIFFUSERS_MODULE}.py")),
            DIFFUSERS_SOURCE.as_bytes(),
        )?;
    }
    write_json(&folder.join("config.json"), &json)
}

/// Writes a small JSON file for people to read, atomically.
///
/// # Errors
/// When the folder is not writable or the disk is full.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    save::write_bytes(
        path,
        (serde_json::to_string_pretty(value)? + "\n").as_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use candle::{DType, Device, Tensor};

    use super::*;
    use crate::{
        files::Files,
        fit::layers::{Fitted, LayerMap, Layers},
        layout::{BlockId, Form, Replacement},
        pipeline::{ModelChoice, Pipeline},
        prune::{
            apply::apply,
            plan::PruningPlan,
        },
    };

    fn open(path: &Path) -> Pipeline {
        let model = Some(path.display().to_string());
        Pipeline::open(&ModelChoice {
            model,
            ..ModelChoice::default()
        })
        .unwrap()
    }

    fn plan(config: &FluxConfig, blocks: Vec<BlockId>) -> PruningPlan {
        let (source, reason) = ("x".to_owned(), "by hand".to_owned());
        PruningPlan::new(config, source, blocks, Form::Linear, false, false, reason)
    }

    fn layers(width: usize, blocks: &[BlockId]) -> LayerMap {
        let normal = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &Device::Cpu).unwrap();
        let fitted = || {
            Box::new(Fitted {
                weight: normal(&[width, width]),
                bias: normal(&[width]),
                vec: None,
                modulation: None,
                error: 0.5,
                ridge: 0.0,
            })
        };
        let streams = |id: &BlockId| {
            let (txt, img) = (fitted(), fitted());
            (*id, Layers::Streams { txt, img })
        };
        blocks.iter().map(streams).collect()
    }

    fn same(a: &Checkpoint, b: &Checkpoint) {
        assert!(a.names().eq(b.names()));
        for (name, source) in a.iter() {
            let other = b.get(name).unwrap();
            assert_eq!(source.format(), other.format(), "{name}");
            assert_eq!(source.shape(), other.shape(), "{name}");
            assert!(source.bytes().unwrap() == other.bytes().unwrap(), "{name}");
        }
    }

    #[test]
    fn both_formats_of_a_pruned_model_open_as_the_same_model() {
        let base = Pipeline::open(&ModelChoice::default()).unwrap();
        let blocks = vec![BlockId::double(1), BlockId::single(4)];
        let layers = layers(base.config.hidden_size, &blocks);
        let plan = plan(&base.config, blocks);
        let (pruned, config) = apply(&base.transformer, &base.config, &plan, &layers).unwrap();
        let record = Record {
            version: record::VERSION,
            tool: "test".to_owned(),
            base: base.locator.clone(),
            base_fingerprint: record::fingerprint(&base.transformer).unwrap(),
            layout: config.layout.clone(),
            axes_dims: config.axes_dims.clone(),
            theta: config.theta,
            scheduler: base.scheduler.clone(),
            parts: record::RecordedParts::default(),
            defaults: serde_json::json!({}),
            recipe: Value::Null,
        };
        for format in [Format::Original, Format::Diffusers] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &pruned, &config, Some(&record), format).unwrap();
            let opened = open(folder.path());
            assert_eq!(opened.diffusers, format == Format::Diffusers);
            assert_eq!(opened.config, config);
            assert_eq!(opened.record.as_ref(), Some(&record));
            same(&opened.transformer, &pruned);
            opened.base().unwrap();
            opened.text_files().unwrap();
        }
    }

    #[test]
    fn diffusers_gets_the_class_of_replaced_blocks_and_only_then() {
        let base = Pipeline::open(&ModelChoice::default()).unwrap();
        let blocks = vec![BlockId::single(3), BlockId::single(4)];
        let fitted = layers(base.config.hidden_size, &blocks[..1]);
        for (form, format, custom) in [
            (Form::Linear, Format::Diffusers, true),
            (Form::Linear, Format::Original, false),
            (Form::Remove, Format::Diffusers, false),
        ] {
            let mut plan = plan(&base.config, Vec::new());
            plan.replace = vec![Replacement {
                replaces: blocks.clone(),
                form,
                joint: false,
            }];
            let (pruned, config) = apply(&base.transformer, &base.config, &plan, &fitted).unwrap();
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &pruned, &config, None, format).unwrap();
            let folder = match format {
                Format::Original => folder.path().to_path_buf(),
                Format::Diffusers => folder.path().join("transformer"),
            };
            let text = std::fs::read(folder.join("config.json")).unwrap();
            let json: Value = serde_json::from_slice(&text).unwrap();
            let kept = if form == Form::Remove { 8 } else { 9 };
            assert_eq!(json["num_single_layers"], kept);
            let python = std::fs::read(folder.join("fastflux_flux.py")).ok();
            if custom {
                let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/fastflux_flux.py");
                assert_eq!(python, std::fs::read(script).ok());
                assert_eq!(json["_class_name"], "FastFluxTransformer2DModel");
                let module = json["auto_map"]["AutoModel"].as_str();
                assert_eq!(module, Some("fastflux_flux.FastFluxTransformer2DModel"));
            } else {
                assert_eq!(python, None);
                assert_eq!(json["_class_name"], "FluxTransformer2DModel");
                assert_eq!(json.get("auto_map"), None);
            }
        }
    }

    /// The file again after replacing no block, in the format it had.
    fn rewritten(folder: &Path, diffusers: bool) -> Vec<u8> {
        let opened = open(folder);
        assert_eq!(opened.diffusers, diffusers);
        let (again, config) = apply(
            &opened.transformer,
            &opened.config,
            &plan(&opened.config, Vec::new()),
            &LayerMap::new(),
        )
        .unwrap();
        assert_eq!(config, opened.config);
        let format = if diffusers {
            Format::Diffusers
        } else {
            Format::Original
        };
        let path = folder.join("again.bin");
        save::write(&format.named(&again).unwrap(), &path).unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn an_empty_plan_reproduces_the_file_byte_for_byte() {
        let folder = tempfile::tempdir().unwrap();
        for (name, diffusers, config) in [
            ("configs/tiny/transformer", true, "config.json"),
            ("tests/golden/dev/pipe/transformer", true, "config.json"),
            ("tests/golden/dev", false, "pipe/transformer/config.json"),
        ] {
            let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            let stem = if diffusers { DIFFUSERS_STEM } else { "bfl" };
            let input = std::fs::read(from.join(format!("{stem}.safetensors"))).unwrap();
            let to = folder.path().join(name.replace('/', "-"));
            std::fs::create_dir(&to).unwrap();
            std::fs::write(to.join("model.safetensors"), &input).unwrap();
            std::fs::copy(from.join(config), to.join("config.json")).unwrap();
            assert!(rewritten(&to, diffusers) == input, "{name}");
        }
    }

    #[test]
    fn a_dense_tensor_is_cast_when_it_is_written() {
        let wide = Tensor::randn(0f32, 1.0, (70, 50), &Device::Cpu).unwrap();
        let narrow = wide.to_dtype(DType::BF16).unwrap();
        let lazy = super::super::Source::dense_as(&wide, DType::BF16).unwrap();
        let eager = super::super::Source::dense(&narrow).unwrap();
        assert_eq!(lazy.bytes().unwrap(), eager.bytes().unwrap());
        assert_eq!(lazy.tensor(&Device::Cpu).unwrap().dtype(), DType::BF16);
        let folder = tempfile::tempdir().unwrap();
        let mut checkpoint = Checkpoint::default();
        checkpoint.insert("a", lazy);
        save::write(&checkpoint, &folder.path().join("a.safetensors")).unwrap();
        let read = Checkpoint::open(&Files::folder(folder.path()), "a").unwrap();
        assert_eq!(
            read.get("a").unwrap().bytes().unwrap(),
            eager.bytes().unwrap()
        );
    }

    /// Anonymous (not file-backed) memory of this process, in bytes.
    #[cfg(target_os = "linux")]
    fn anonymous() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
        1024 * line
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
    }

    /// Runs `work` and returns by how much anonymous memory exceeded `before` at most.
    #[cfg(target_os = "linux")]
    fn growth(before: usize, work: impl FnOnce()) -> usize {
        use std::sync::atomic::{AtomicBool, Ordering};
        let done = AtomicBool::new(false);
        let peak = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut peak = before;
                while !done.load(Ordering::Relaxed) {
                    peak = peak.max(anonymous());
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                peak
            });
            work();
            done.store(true, Ordering::Relaxed);
            watch.join().unwrap()
        });
        peak.saturating_sub(before)
    }

    /// `cargo test --release -- --ignored --nocapture wide`; writes thrice 1.6 GB (1 + 2 blocks) into the temporary
    /// folder, or as much as `FASTFLUX_BLOCKS=double,single` says.
    #[test]
    #[ignore = "writes gigabytes"]
    #[cfg(target_os = "linux")]
    fn a_wide_model_streams_through_a_small_memory() {
        let blocks = std::env::var("FASTFLUX_BLOCKS").unwrap_or_else(|_| "1,2".to_owned());
        let (double, single) = blocks.split_once(',').unwrap();
        let (double, single): (usize, usize) = (double.parse().unwrap(), single.parse().unwrap());
        let mut json: Value =
            serde_json::from_str(include_str!("../../configs/flux1/dev.json")).unwrap();
        json["num_layers"] = double.into();
        json["num_single_layers"] = single.into();
        let name = "config".to_owned();
        let (config, _) =
            transformer_json::read(&super::super::config::ConfigFile { name, json }).unwrap();
        let random = super::super::init::random(&config, 0, safetensors::Dtype::BF16).unwrap();
        let largest = random.iter().map(|(_, s)| s.byte_len()).max().unwrap();
        let before = anonymous();
        // the hand-made layers in f32, for two streams
        let given = 2 * 4 * config.hidden_size * (config.hidden_size + 1);
        let folder = tempfile::tempdir().unwrap();
        let (full, pruned) = (folder.path().join("full"), folder.path().join("pruned"));
        let report = |what: &str, grown: usize| {
            crate::ui::data(format!(
                "{what}: {:.1} MB above the mapped input; the largest tensor has {:.1} MB",
                grown as f64 / 1e6,
                largest as f64 / 1e6
            ))
            .unwrap();
            // what is asked for is twice the largest tensor; joining a single one would exceed this
            assert!(grown < largest / 2, "{what}: {grown} bytes");
        };
        for (from, to) in [
            (Format::Original, Format::Diffusers),
            (Format::Diffusers, Format::Original),
        ] {
            report(
                &format!("init, {from}"),
                growth(before, || {
                    write(&full, &random, &config, None, from).unwrap();
                }),
            );
            let mut opened = None;
            report(
                &format!("open, {from}"),
                growth(before, || opened = Some(open(&full))),
            );
            let opened = opened.unwrap();
            let replaced = vec![BlockId::single(single - 1)];
            let layers = layers(config.hidden_size, &replaced);
            let plan = plan(&config, replaced);
            for format in [from, to] {
                let work = || {
                    let (checkpoint, config) =
                        apply(&opened.transformer, &opened.config, &plan, &layers).unwrap();
                    write(&pruned, &checkpoint, &config, None, format).unwrap();
                };
                report(
                    &format!("prune, {from} to {format}"),
                    growth(before + given, work),
                );
                std::fs::remove_dir_all(&pruned).unwrap();
            }
            std::fs::remove_dir_all(&full).unwrap();
        }
    }
}
