//! What `train-sandwich` writes: the healed checkpoint, the trained values alone, a report and a chart.

use anyhow::{Context, Result};
use candle::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::train::Pair;
use crate::{
    checkpoint::{Checkpoint, Source, convert, output, record::Record, save, target::OutputFolder},
    cli::TrainArgs,
    model::{Linear, Lora, Trunk},
    pipeline::LORA_FILE,
    train::{chart, peft, state::Saved},
    ui,
};

/// The trained values, in f32 under the names of the blocks they belong to.
const SANDWICH: &str = "sandwich.safetensors";

/// What became of every phase, and all settings.
pub(super) const REPORT: &str = "training.json";

/// Writes everything into a folder that appears whole.
pub(super) fn write(
    args: &TrainArgs,
    pair: &Pair,
    student: &Trunk,
    done: &Saved,
    report: &Value,
) -> Result<()> {
    let record = record(pair, report, args.keep_lora)?;
    let config = &pair.pruned.config;
    let checkpoint = healed(pair, student, !args.keep_lora)?;
    let folder = OutputFolder::create(&args.output.path, args.output.force)?;
    let path = folder.path();
    output::write(path, &checkpoint, config, Some(&record), args.layout.layout)?;
    drop(checkpoint);
    let mut values = Checkpoint::default();
    for (name, value) in &done.values {
        values.insert(name, Source::dense(value)?);
    }
    values.metadata = output::metadata(Some(&record))?;
    save::write(&values, &path.join(SANDWICH))?;
    if args.keep_lora {
        let lora = peft::lora(config, student)?;
        save::write(&lora, &path.join(LORA_FILE))?;
    }
    output::write_json(&path.join(REPORT), report)?;
    save::write_bytes(
        &path.join("loss.svg"),
        chart::losses(&done.progress.log).as_bytes(),
    )?;
    folder.finish()?;
    if args.keep_lora {
        ui::note(format!(
            "the LoRA lies beside the model in `{}`, in the names of PEFT and diffusers (`load_lora_weights`): fastflux itself does not apply it, so its own pictures and numbers are those without it\nhint: without --keep-lora it is merged",
            args.output.path.join(LORA_FILE).display()
        ));
    }
    Ok(())
}

/// The pruned checkpoint with the trained layers in it and, where `merge`, the LoRA added to the weights beside them.
///
/// Tensors keep their number format; sums are made in f32 and rounded once.
pub(super) fn healed(pair: &Pair, student: &Trunk, merge: bool) -> Result<Checkpoint> {
    let mut out = pair.pruned.transformer.clone();
    let slots = pair.pruned.config.slots();
    for ((_, prefix), (_, block)) in slots.into_iter().zip(student.entries()) {
        let Some(prefix) = prefix else {
            continue;
        };
        let mut block = block.resident()?;
        for (projection, linear) in block.linears_mut() {
            let name = format!("{prefix}.{projection}");
            let weight = linear.weight()?;
            for (part, value) in [("weight", Some(&weight)), ("bias", linear.bias())] {
                if let Some(value) = value.filter(|v| v.is_variable()) {
                    insert(&mut out, &format!("{name}.{part}"), value)?;
                }
            }
            if let Some(lora) = linear.lora().filter(|_| merge)
                && moved(&lora.b)?
            {
                let name = format!("{name}.weight");
                let base = out.expect(&name)?.tensor(&Device::Cpu)?;
                let mut sum = Linear::new(base.to_dtype(DType::F32)?, None)?;
                sum.set_lora(Some(Lora {
                    a: host(&lora.a)?,
                    b: host(&lora.b)?,
                    scale: lora.scale,
                }))?;
                insert(&mut out, &name, &sum.merge()?.weight()?)?;
            }
        }
    }
    Ok(convert::for_safetensors(&out).0)
}

fn host(t: &Tensor) -> Result<Tensor> {
    Ok(t.detach().to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// Whether a B is no longer zero; a weight whose LoRA was not trained keeps its bytes.
fn moved(b: &Tensor) -> Result<bool> {
    Ok(host(b)?.abs()?.max_all()?.to_scalar::<f32>()? > 0.0)
}

/// Puts a value in the place of a tensor, in its number format where that is a float of 16 bits or more.
fn insert(out: &mut Checkpoint, name: &str, value: &Tensor) -> Result<()> {
    let dtype = out.expect(name)?.format().of_changed();
    let value = host(value)?.to_dtype(dtype)?;
    out.insert(name, Source::dense(&value)?);
    Ok(())
}

fn record(pair: &Pair, report: &Value, kept_lora: bool) -> Result<Record> {
    let before = pair
        .pruned
        .record
        .as_ref()
        .context("the pruned model has a record")?;
    let mut recipe = match before.recipe.clone() {
        Value::Object(recipe) => recipe,
        other => [("before".to_owned(), other)].into_iter().collect(),
    };
    recipe.insert(
        "train-sandwich".to_owned(),
        json!({ "recipe": report["recipe"], "phases": report["phases"], "kept-lora": kept_lora }),
    );
    Ok(before.with_recipe(Value::Object(recipe)))
}
