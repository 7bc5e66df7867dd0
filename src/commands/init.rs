//! `init`: a randomly initialised checkpoint, for tests and benchmarks.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::{
    checkpoint::{Checkpoint, Source, config::ConfigFile, init, output, save, transformer_json},
    cli::InitArgs,
    ui,
};

/// Configurations that can be named without a file.
const BUNDLED: [(&str, &str); 2] = [
    ("flux1-dev", include_str!("../../configs/flux1/dev.json")),
    (
        "flux1-schnell",
        include_str!("../../configs/flux1/schnell.json"),
    ),
];

pub(super) fn run(args: &InitArgs) -> Result<()> {
    let (config, record) = transformer_json::read(&read_config(&args.config)?)?;
    // what a pruned layout needs to open; the layers are no one's
    let record = record.map(|mut record| {
        record.tool = super::load::software();
        "random".clone_into(&mut record.base_fingerprint);
        record.recipe = json!({ "init": { "seed": args.seed } });
        record
    });
    let mut checkpoint = args
        .format
        .named(&init::random(&config, args.seed, args.dtype)?)?;
    checkpoint.metadata = output::metadata(record.as_ref())?;
    if !args.dry_run {
        let path = args.output.as_deref().context("--output is missing")?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let description = folder.join("config.json");
        if path.extension().is_none_or(|e| e != "safetensors") {
            bail!("--output `{}`: name a .safetensors file", path.display());
        }
        save::check_free(path, args.force)?;
        save::check_free(&description, args.force)?;
        if !folder.as_os_str().is_empty() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        write(&checkpoint, path)?;
        let json = transformer_json::write(&config, record.as_ref());
        output::write_json(&description, &json)?;
    }
    let largest = checkpoint.iter().map(|(_, s)| Source::byte_len(s)).max();
    let (parameters, bytes) = (checkpoint.parameters(), checkpoint.bytes());
    if args.json {
        return ui::json(&json!({
            "output": args.output,
            "written": !args.dry_run,
            "seed": args.seed,
            "dtype": format!("{:?}", args.dtype),
            "format": args.format.to_string(),
            "tensors": checkpoint.len(),
            "largest_tensor_bytes": largest,
            "parameters": parameters,
            "bytes": bytes,
        }));
    }
    ui::data(format!(
        "{} parameters in {} tensors of {:?}, {}{}",
        ui::count(parameters as f64),
        checkpoint.len(),
        args.dtype,
        ui::bytes(bytes as f64),
        match &args.output {
            Some(path) if !args.dry_run => format!(", in {}", path.display()),
            _ => " (nothing written)".to_owned(),
        }
    ))
}

fn write(checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    // in megabytes: a bar counts in machine words, and tensors differ too much to count them
    let unit = 1 << 20;
    let bar = ui::progress(checkpoint.bytes().div_ceil(unit), "writing");
    let mut done = 0;
    save::write_with(checkpoint, path, &mut |bytes| {
        done += bytes;
        bar.set_position((done / unit) as u64);
    })?;
    ui::done(&bar, "wrote the checkpoint");
    Ok(())
}

/// A file, or one of the bundled configurations.
fn read_config(name: &str) -> Result<ConfigFile> {
    let bundled = BUNDLED.iter().find(|(known, _)| *known == name);
    match bundled {
        Some((known, text)) if !Path::new(name).exists() => Ok(ConfigFile {
            name: (*known).to_owned(),
            json: serde_json::from_str(text)?,
        }),
        _ => ConfigFile::read(Path::new(name)),
    }
    .context("--config")
}
