//! What PEFT says about an adapter in addition to its tensors: alpha, rank, and patterns of names with others.
//!
//! Sources: PEFT `LoraConfig`, `utils/other.py` (`get_pattern_key`); diffusers `loaders/lora_base.py` (`lora_adapter_metadata`).

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// An adapter's configuration; empty where a file says nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct AdapterConfig {
    json: Map<String, Value>,
}

impl AdapterConfig {
    /// `adapter_config.json`.
    pub(super) fn new(json: Value) -> Self {
        match json {
            Value::Object(json) => Self { json },
            _ => Self::default(),
        }
    }

    /// diffusers' metadata of several parts of a pipeline, `transformer.r` and so on; those of `part`.
    pub(super) fn of_part(metadata: &Value, part: &str) -> Self {
        let all = metadata.as_object().into_iter().flatten();
        let json = all
            .filter_map(|(key, value)| {
                let key = key.strip_prefix(part)?.strip_prefix('.')?;
                Some((key.to_owned(), value.clone()))
            })
            .collect();
        Self { json }
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.json.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|n| n.is_finite());
        let number =
            number.with_context(|| format!("its `{key}` is {value}, expected a number"))?;
        Ok(Some(number as f32))
    }

    /// What the pattern `key` says of `module`: the first whose name ends it.
    fn pattern(&self, key: &str, module: &str) -> Result<Option<f32>> {
        let Some(Value::Object(patterns)) = self.json.get(key) else {
            return Ok(None);
        };
        for (pattern, value) in patterns {
            if fits(pattern, module)? {
                let number = value.as_f64().filter(|n| n.is_finite());
                let number =
                    number.with_context(|| format!("its `{key}` of `{pattern}` is {value}"))?;
                return Ok(Some(number as f32));
            }
        }
        Ok(None)
    }

    /// What the factors of `module` are multiplied by: alpha / rank, or alpha / √rank; 1 if nothing is said. `rank` is that of
    /// the factors.
    pub(super) fn scale(&self, module: &str, rank: Option<usize>) -> Result<f32> {
        let alpha = match self.pattern("alpha_pattern", module)? {
            Some(alpha) => Some(alpha),
            None => self.number("lora_alpha")?.or(self.number("alpha")?),
        };
        let rank = match rank {
            Some(rank) => Some(rank as f32),
            None => self.pattern("rank_pattern", module)?.or(self.number("r")?),
        };
        let (Some(alpha), Some(rank)) = (alpha, rank) else {
            return Ok(1.0);
        };
        ensure!(rank > 0.0, "its rank is {rank}");
        let stabilized = self.json.get("use_rslora").and_then(Value::as_bool);
        Ok(match stabilized {
            Some(true) => alpha / rank.sqrt(),
            _ => alpha / rank,
        })
    }
}

/// Whether PEFT's pattern means `module`: it is a regular expression for the end of the name, from a dot on.
fn fits(pattern: &str, module: &str) -> Result<bool> {
    let (start, name) = match pattern.strip_prefix('^') {
        Some(name) => (true, name),
        None => (false, pattern),
    };
    let name = name.trim_end_matches('$').replace("\\.", ".");
    if name.contains([
        '*', '+', '?', '[', ']', '(', ')', '|', '\\', '{', '}', '^', '$',
    ]) {
        bail!("its pattern `{pattern}` is a regular expression, which is not read");
    }
    let Some(before) = module.strip_suffix(name.as_str()) else {
        return Ok(false);
    };
    Ok(before.is_empty() || (!start && before.ends_with('.')))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patterns_are_of_the_ends_of_names() {
        let config = AdapterConfig::new(json!({
            "r": 8, "lora_alpha": 16, "rank_pattern": {}, "alpha_pattern": { "to_q": 2, "blocks.1.proj_out": 4 },
        }));
        let is = |config: &AdapterConfig, module: &str, rank: Option<usize>, wanted: f32| {
            let scale = config.scale(module, rank).unwrap();
            assert!((scale - wanted).abs() < 1e-6, "{module}: {scale}");
        };
        is(&config, "blocks.0.attn.to_q", Some(4), 0.5);
        is(&config, "blocks.1.proj_out", Some(4), 1.0);
        is(&config, "blocks.11.proj_out", Some(4), 4.0);
        is(&config, "x", None, 2.0);
        let stabilized =
            json!({ "t.r": 4, "t.lora_alpha": 4, "t.use_rslora": true, "u.lora_alpha": 9 });
        let config = AdapterConfig::of_part(&stabilized, "t");
        is(&config, "x", Some(4), 2.0);
        let config = AdapterConfig::new(json!({ "alpha_pattern": { ".*to_q": 2 } }));
        let error = config.scale("to_q", Some(4)).unwrap_err().to_string();
        assert!(error.contains(".*to_q"), "{error}");
    }
}
