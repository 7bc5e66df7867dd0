//! `init`: a randomly initialised checkpoint, for tests and benchmarks.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{
    checkpoint::{
        Checkpoint, config::ConfigFile, init, init::InitReport, output, record, save, target,
        transformer_json,
    },
    cli::InitArgs,
    ui::Reporter,
};

/// Configurations that can be named without a file.
const BUNDLED: [(&str, &str); 4] = [
    ("flux1-dev", include_str!("../../configs/flux1/dev.json")),
    (
        "flux1-schnell",
        include_str!("../../configs/flux1/schnell.json"),
    ),
    (
        "flux2-klein-4b",
        include_str!("../../configs/flux2/klein-4b.json"),
    ),
    (
        "flux2-klein-9b",
        include_str!("../../configs/flux2/klein-9b.json"),
    ),
];

pub(super) fn run(args: &InitArgs, reporter: &Reporter) -> Result<()> {
    let (config, record) = transformer_json::read(&read_config(&args.config)?)?;
    // what a pruned layout needs to open; the layers are no one's
    let record = record.map(|mut record| {
        record.tool = record::software();
        "random".clone_into(&mut record.base_fingerprint);
        record.recipe = json!({ "init": { "seed": args.seed.seed.unwrap_or_default() } });
        record
    });
    let mut checkpoint = args.layout.layout.named(&init::random(
        &config,
        args.seed.seed.unwrap_or_default(),
        args.dtype,
    )?)?;
    checkpoint.metadata = output::metadata(record.as_ref())?;
    if !args.dry_run.dry_run {
        let path = args.output.as_deref().context("--output is missing")?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let description = folder.join("config.json");
        if path.extension().is_none_or(|e| e != "safetensors") {
            bail!("--output `{}`: name a .safetensors file", path.display());
        }
        target::check_file(path, args.force)?;
        target::check_file(&description, args.force)?;
        if !folder.as_os_str().is_empty() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        write(&checkpoint, path, reporter)?;
        let json = transformer_json::write(&config, record.as_ref());
        output::write_json(&description, &json)?;
    }
    let written = !args.dry_run.dry_run;
    let (seed, layout) = (args.seed.seed.unwrap_or_default(), args.layout.layout);
    let report = InitReport::new(&checkpoint, args.output.as_deref(), written, seed, layout);
    super::show(args.print, &report, || report.text())
}

fn write(checkpoint: &Checkpoint, path: &Path, reporter: &Reporter) -> Result<()> {
    // in megabytes: a bar counts in machine words, and tensors differ too much to count them
    let unit = 1 << 20;
    let bar = reporter.progress(checkpoint.bytes().div_ceil(unit), "writing");
    let mut done = 0;
    save::write_with(checkpoint, path, &mut |bytes| {
        done += bytes;
        bar.set_position((done / unit) as u64);
    })?;
    reporter.done(&bar, "wrote the checkpoint");
    Ok(())
}

/// A file, or one of the bundled configurations.
pub(super) fn read_config(name: &str) -> Result<ConfigFile> {
    let bundled = BUNDLED.iter().find(|(known, _)| *known == name);
    match bundled {
        Some((known, text)) if !Path::new(name).exists() => Ok(ConfigFile {
            name: (*known).to_owned(),
            json: serde_json::from_str(text)?,
        }),
        _ if !Path::new(name).exists() => {
            let names: Vec<&str> = BUNDLED.iter().map(|(known, _)| *known).collect();
            bail!(
                "--config: `{name}` does not exist\nhint: name a file, or one of {}",
                names.join(", ")
            )
        }
        _ => ConfigFile::read(Path::new(name)),
    }
    .context("--config")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        cli::{Cli, Command},
        pipeline::{ModelChoice, Pipeline},
    };

    fn init(arguments: &[&str]) -> Result<()> {
        let config = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/configs/tiny/transformer/config.json"
        );
        let fixed = ["fastflux", "init", "--json", "--config", config];
        let cli = Cli::try_parse_from(fixed.iter().chain(arguments))?;
        let Command::Init(args) = cli.command else {
            unreachable!()
        };
        run(&args, &Reporter::silent())
    }

    #[test]
    fn both_formats_open_as_the_same_model_and_a_seed_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let open = |name: &str| {
            Pipeline::open(&ModelChoice {
                model: Some(path(name)),
                ..ModelChoice::default()
            })
            .unwrap()
        };
        for (name, format) in [
            ("a/x.safetensors", "original"),
            ("b/y.safetensors", "diffusers"),
        ] {
            init(&["--seed", "3", "--output", &path(name), "--format", format]).unwrap();
        }
        let (a, b) = (open("a/x.safetensors"), open("b/y.safetensors"));
        assert_eq!((a.diffusers, b.diffusers), (false, true));
        let bundled = Pipeline::open(&ModelChoice::default()).unwrap();
        assert_eq!(a.config, bundled.config);
        assert_eq!(b.config, bundled.config);
        for (name, source) in a.transformer.iter() {
            let other = b.transformer.get(name).unwrap();
            assert!(source.bytes().unwrap() == other.bytes().unwrap(), "{name}");
        }
        let read = |name: &str| std::fs::read(path(name)).unwrap();
        let first = read("a/x.safetensors");
        let output = path("a/x.safetensors");
        let error = format!("{:#}", init(&["--output", &output]).unwrap_err());
        assert!(error.contains("--force"), "{error}");
        init(&["--seed", "3", "--output", &output, "--force"]).unwrap();
        assert!(read("a/x.safetensors") == first);
        init(&["--seed", "4", "--output", &output, "--force"]).unwrap();
        assert!(read("a/x.safetensors") != first);
    }

    #[test]
    fn a_dry_run_and_a_refusal_write_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("x/y.safetensors").display().to_string();
        init(&["--dry-run", "--output", &output]).unwrap();
        init(&["--dry-run"]).unwrap();
        let wrong = folder.path().join("x/y.bin").display().to_string();
        let error = format!("{:#}", init(&["--output", &wrong]).unwrap_err());
        assert!(error.contains(".safetensors"), "{error}");
        assert!(init(&[]).is_err());
        assert!(init(&["--output", &output, "--dtype", "i8"]).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_pruned_layout_opens_too() {
        let folder = tempfile::tempdir().unwrap();
        let bundled = Pipeline::open(&ModelChoice::default()).unwrap();
        let mut config = bundled.config.clone();
        let crate::layout::BlockSpec::Original(id) = config.layout[2] else {
            unreachable!()
        };
        config.layout[2] = crate::layout::BlockSpec::Replaced(crate::layout::Replacement {
            replaces: vec![id],
            form: crate::layout::Form::Linear,
            joint: true,
        });
        let record = crate::checkpoint::record::Record {
            version: 1,
            tool: String::new(),
            base: bundled.model_ref.clone(),
            base_fingerprint: String::new(),
            lora: Vec::new(),
            layout: config.layout.clone(),
            axes_dims: config.axes_dims.clone(),
            theta: config.theta,
            scheduler: bundled.scheduler.clone(),
            parts: crate::checkpoint::record::RecordedParts::default(),
            defaults: json!({}),
            earlier: Vec::new(),
            recipe: json!({}),
        };
        let description = folder.path().join("pruned.json");
        output::write_json(
            &description,
            &transformer_json::write(&config, Some(&record)),
        )
        .unwrap();
        let path = folder.path().join("z.safetensors");
        let arguments = [
            "fastflux",
            "init",
            "--config",
            &description.display().to_string(),
            "--output",
            &path.display().to_string(),
        ];
        let Command::Init(args) = Cli::parse_from(arguments).command else {
            unreachable!()
        };
        run(&args, &Reporter::silent()).unwrap();
        let choice = ModelChoice {
            model: Some(path.display().to_string()),
            ..ModelChoice::default()
        };
        let opened = Pipeline::open(&choice).unwrap();
        assert_eq!(opened.config, config);
        assert!(opened.transformer.contains("double_blocks.2.linear.weight"));
        // the weights are random, whatever the record was copied from
        assert!(opened.base().is_err());
    }
}
