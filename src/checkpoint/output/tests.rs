//! Tests of `output`.

use candle::{DType, Device, Tensor};

use super::*;
use crate::{
    files::Files,
    fit::layers::{Fitted, LayerMap, Layers},
    layout::{BlockId, Form, Replacement},
    pipeline::{ModelChoice, Pipeline},
    prune::{apply::apply, plan::PruningPlan},
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
        lora: Vec::new(),
        version: record::VERSION,
        tool: "test".to_owned(),
        base: base.model_ref.clone(),
        base_fingerprint: record::fingerprint(&base.transformer).unwrap(),
        layout: config.layout.clone(),
        axes_dims: config.axes_dims.clone(),
        theta: config.theta,
        scheduler: base.scheduler.clone(),
        parts: record::RecordedParts::default(),
        defaults: serde_json::json!({}),
        earlier: Vec::new(),
        recipe: Value::Null,
    };
    for format in [Naming::Original, Naming::Diffusers] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &pruned, &config, Some(&record), format).unwrap();
        let opened = open(folder.path());
        assert_eq!(opened.diffusers, format == Naming::Diffusers);
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
        (Form::Linear, Naming::Diffusers, true),
        (Form::Linear, Naming::Original, false),
        (Form::Remove, Naming::Diffusers, false),
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
            Naming::Original => folder.path().to_path_buf(),
            Naming::Diffusers => folder.path().join("transformer"),
        };
        let text = std::fs::read(folder.join("config.json")).unwrap();
        let json: Value = serde_json::from_slice(&text).unwrap();
        let kept = if form == Form::Remove { 8 } else { 9 };
        assert_eq!(json["num_single_layers"], kept);
        let python = std::fs::read(folder.join("fastflux_flux.py")).ok();
        if custom {
            let script =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/interop/fastflux_flux.py");
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
        Naming::Diffusers
    } else {
        Naming::Original
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
        serde_json::from_str(include_str!("../../../configs/flux1/dev.json")).unwrap();
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
        (Naming::Original, Naming::Diffusers),
        (Naming::Diffusers, Naming::Original),
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
