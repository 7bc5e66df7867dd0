//! What fastflux writes about a checkpoint into its metadata, so that the file opens by itself and can be traced.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Checkpoint, lora::recorded::RecordedLora, rotary};
use crate::layout::{self, BlockId, BlockKind, BlockSpec};

/// The metadata key that holds the record.
pub const KEY: &str = "fastflux";
/// The version of the record that this build writes and the newest it reads.
pub const VERSION: u32 = 1;

/// This program, as PNG and metadata name it.
pub fn software() -> String {
    concat!("fastflux ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// Where the other parts of a model's pipeline were, if flags named them; absolute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RecordedParts {
    /// `--text-encoders`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoders: Option<PathBuf>,
    /// `--vae`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<PathBuf>,
}

impl RecordedParts {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The record of a checkpoint that fastflux wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// Version of this record's form.
    pub version: u32,
    /// The program that wrote it, `fastflux 0.1.0`.
    pub tool: String,
    /// What opens the unpruned model: a `--model` value.
    pub base: String,
    /// [`fingerprint`] of the unpruned transformer.
    pub base_fingerprint: String,
    /// LoRA files in the weights; the model it is compared with is the base with these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora: Vec<RecordedLora>,
    /// The layout, by original block identity.
    pub layout: Vec<BlockSpec>,
    /// Rotary sizes of the axes.
    pub axes_dims: Vec<usize>,
    /// Rotary base.
    pub theta: f64,
    /// The scheduler configuration, in diffusers' form.
    pub scheduler: Value,
    /// Text encoders and VAE that the base does not bring along.
    #[serde(default, skip_serializing_if = "RecordedParts::is_empty")]
    pub parts: RecordedParts,
    /// Defaults for `generate`, as in a model folder's `fastflux.json`.
    pub defaults: Value,
    /// The recipes of the checkpoints that this one was made of, one of the other; the first was made of the base.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Value>,
    /// The recipe that made the checkpoint.
    pub recipe: Value,
}

/// Fails at control characters in texts, which people are shown.
fn check_text(value: &Value) -> Result<()> {
    match value {
        Value::String(text) => ensure!(
            !text
                .chars()
                .any(|c| c.is_control() && c != '\n' && c != '\t'),
            "it holds control characters"
        ),
        Value::Array(values) => values.iter().try_for_each(check_text)?,
        Value::Object(map) => map.values().try_for_each(check_text)?,
        _ => {}
    }
    Ok(())
}

impl Record {
    /// The record in a file's metadata, `None` when fastflux did not write the file.
    ///
    /// # Errors
    /// When it is damaged or of a newer version.
    pub fn read(name: &str, metadata: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let Some(text) = metadata.get(KEY) else {
            return Ok(None);
        };
        let value: Value = serde_json::from_str(text)
            .with_context(|| format!("`{name}`: its fastflux metadata is damaged"))?;
        Self::from_value(name, value).map(Some)
    }

    /// The record in a JSON value; `name` is the file that holds it.
    ///
    /// # Errors
    /// When it is damaged or of a newer version.
    pub fn from_value(name: &str, value: Value) -> Result<Self> {
        let version = value.get("version").and_then(Value::as_u64).unwrap_or(0);
        ensure!(
            version <= VERSION as u64,
            "`{name}` was written by a newer fastflux (record version {version}, this build reads {VERSION})\nhint: update fastflux"
        );
        check_text(&value)
            .with_context(|| format!("`{name}`: its fastflux metadata is damaged"))?;
        let record: Self = serde_json::from_value(value)
            .with_context(|| format!("`{name}`: its fastflux metadata is damaged"))?;
        let empty =
            |spec: &BlockSpec| matches!(spec, BlockSpec::Replaced(r) if r.replaces.is_empty());
        ensure!(
            !record.layout.iter().any(empty),
            "`{name}`: its fastflux metadata has a replacement of no block"
        );
        record
            .check()
            .with_context(|| format!("`{name}`: its fastflux metadata is damaged"))?;
        Ok(record)
    }

    /// What was done to the base, a sentence each, for people.
    pub fn steps(&self) -> Vec<String> {
        let recipes = self.earlier.iter().chain([&self.recipe]);
        recipes.flat_map(steps_of).collect()
    }

    /// The same record of what another recipe made.
    #[must_use]
    pub fn with_recipe(&self, recipe: Value) -> Self {
        Self {
            tool: software(),
            recipe,
            ..self.clone()
        }
    }

    /// What the form of the record does not say: that its values make sense.
    fn check(&self) -> Result<()> {
        let ids: Vec<BlockId> = layout::original_ids(&self.layout).collect();
        let count = |kind| ids.iter().filter(|id| id.kind == kind).count();
        let expected = layout::unpruned(count(BlockKind::Double), count(BlockKind::Single));
        for (id, expected) in ids.iter().zip(expected) {
            ensure!(
                BlockSpec::Original(*id) == expected,
                "its `layout` has `{id}` where `{}` belongs",
                expected.id()
            );
        }
        ensure!(
            rotary::are_axes(&self.axes_dims),
            "its `axes-dims` are {:?}, expected three or four even sizes",
            self.axes_dims
        );
        ensure!(
            rotary::is_theta(self.theta),
            "its `theta` is {}, expected a number above 1 and at most 1e12",
            self.theta
        );
        Ok(())
    }

    /// The record as metadata text.
    ///
    /// # Errors
    /// When a number in it is not finite.
    pub fn to_text(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

/// What a recipe says that was done, in the order that the commands of this program come in.
fn steps_of(recipe: &Value) -> Vec<String> {
    let mut out = Vec::new();
    let blocks = recipe["plan"]["replace"].as_array().into_iter().flatten();
    let blocks =
        blocks.flat_map(|replacement| replacement["replaces"].as_array().into_iter().flatten());
    let blocks: Vec<&str> = blocks.filter_map(Value::as_str).collect();
    if !blocks.is_empty() {
        out.push(format!("`prune` replaced {}", blocks.join(", ")));
    }
    if let Some(phases) = recipe["train-sandwich"]["phases"].as_array() {
        let steps = phases
            .iter()
            .filter_map(|phase| phase["steps"].as_u64())
            .sum::<u64>();
        out.push(format!("`train-sandwich` trained {steps} steps"));
    }
    if let Some(to) = recipe["convert"]["to"].as_str() {
        out.push(format!("`convert` wrote it in {to}"));
    }
    out
}

/// How many bytes at each end of a tensor the fingerprint reads.
const SAMPLE: usize = 4096;

/// A short identity of a checkpoint: SHA-256 over every tensor's name, dtype, shape, first and last bytes, and the identity
/// of what LoRA files add to it.
///
/// Reads a few megabytes whatever the size, and is the same for the original and diffusers naming of one model
/// (give it the canonical checkpoint).
///
/// # Errors
/// When a tensor cannot be read.
pub fn fingerprint(checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, adapted) in checkpoint.iter() {
        let source = adapted.unadapted();
        hash.update(format!("{name} {} {:?}\n", source.format(), source.shape()));
        adapted.adaptations().for_each(|id| hash.update(id));
        for scale in source.scale().unwrap_or_default() {
            hash.update(scale.to_le_bytes());
        }
        for end in source.ends(SAMPLE)? {
            hash.update(end);
        }
    }
    let digest = hash.finalize();
    Ok(digest
        .iter()
        .take(16)
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn steps_are_those_of_all_recipes_in_their_order() {
        let pruned = |blocks: &[&str]| json!({ "plan": { "replace": [{ "replaces": blocks }] } });
        let mut trained = pruned(&["double.01", "double.02"]);
        trained["train-sandwich"] = json!({ "phases": [{ "steps": 150 }, { "steps": 50 }] });
        let mut record = json!({
            "version": 1, "tool": "", "base": "bundled", "base-fingerprint": "",
            "layout": ["double.00", "single.00"], "axes-dims": [2, 6, 8], "theta": 10000.0,
            "scheduler": {}, "defaults": {}, "recipe": pruned(&["single.07"]),
        });
        let steps = |record: &Value| Record::from_value("x", record.clone()).unwrap().steps();
        assert_eq!(steps(&record), ["`prune` replaced single.07"]);
        record["earlier"] = json!([trained]);
        record["recipe"]["convert"] = json!({ "to": "f8e4m3" });
        let all = [
            "`prune` replaced double.01, double.02",
            "`train-sandwich` trained 200 steps",
            "`prune` replaced single.07",
            "`convert` wrote it in f8e4m3",
        ];
        assert_eq!(steps(&record), all);
        record["recipe"] = json!("of a stranger");
        assert_eq!(steps(&record), all[..2]);
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_name() {
        let good = json!({
            "version": 1, "tool": "", "base": "bundled", "base-fingerprint": "",
            "layout": ["double.00", { "replaces": ["double.01", "single.00"], "form": "remove" }, "single.01"],
            "axes-dims": [2, 6, 8], "theta": 10000.0, "scheduler": {}, "defaults": {}, "recipe": {},
        });
        Record::from_value("x.safetensors", good.clone()).unwrap();
        let half = 1u64 << 63;
        for (key, bad, named) in [
            ("axes-dims", json!([half, half, 16]), "axes-dims"),
            ("axes-dims", json!([0, 0, 16]), "axes-dims"),
            ("axes-dims", json!([1, 7, 8]), "axes-dims"),
            ("axes-dims", json!([16]), "axes-dims"),
            ("earlier", json!(3), "a sequence"),
            ("theta", json!(0), "theta"),
            ("theta", json!(-1), "theta"),
            ("theta", json!(1), "theta"),
            ("layout", json!(["double.00", "double.00"]), "double.01"),
            ("layout", json!(["double.01", "double.00"]), "double.00"),
            ("layout", json!(["single.00", "double.00"]), "double.00"),
            ("layout", json!(["double.00", "single.99"]), "single.99"),
        ] {
            let mut value = good.clone();
            value[key] = bad;
            let error = Record::from_value("x.safetensors", value).unwrap_err();
            let error = format!("{error:#}");
            assert!(
                error.contains("x.safetensors") && error.contains(named),
                "{error}"
            );
        }
    }
}
