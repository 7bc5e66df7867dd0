//! Calibration statistics → importance of blocks; higher = more important, always. One file per criterion.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::Path,
    str::FromStr,
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{output, save},
    layout::BlockId,
    ui,
};

pub mod ablation;
pub mod chart;
pub mod measure;
pub mod moments;

/// A criterion of importance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Relative MSE of the final velocity on held-out noised latents with the block replaced by its linear fit: the default,
    /// as it chose best by far (README, "Which blocks").
    #[default]
    Ablation,
    /// The same with the block removed.
    Removal,
    /// ‖y − x‖/‖x‖: how much the block changes its tokens.
    RelativeChange,
    /// 1 − mean cosine of x and y: block influence (ShortGPT, arXiv 2403.03853).
    Cosine,
    /// 1 − R² of the linear fit: the share of the change that no linear layer explains.
    FitError,
    /// The change that no linear layer explains, squared, per token: the cheap fallback, no forward more than calibration.
    FitResidual,
}

impl Metric {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 6] = [
        Self::Ablation,
        Self::Removal,
        Self::RelativeChange,
        Self::Cosine,
        Self::FitError,
        Self::FitResidual,
    ];

    /// Whether it follows from calibration statistics alone.
    pub fn is_cheap(self) -> bool {
        !matches!(self, Self::Ablation | Self::Removal)
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ablation => "ablation",
            Self::Removal => "removal",
            Self::RelativeChange => "relative-change",
            Self::Cosine => "cosine",
            Self::FitError => "fit-error",
            Self::FitResidual => "fit-residual",
        })
    }
}

impl FromStr for Metric {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let metric = Self::ALL.into_iter().find(|m| m.to_string() == text);
        let names = Self::ALL.map(|m| m.to_string()).join(", ");
        metric.ok_or_else(|| format!("expected one of {names}"))
    }
}

/// What is known of one stream of a block, or of it at one noise level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// ‖y − x‖/‖x‖.
    pub relative_change: f64,
    /// 1 − mean cosine of x and y.
    pub cosine: f64,
    /// 1 − R² of the linear fit, if one was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fit_error: Option<f64>,
}

/// All scores of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockScore {
    /// The block.
    pub block: BlockId,
    /// Value by criterion; those that were measured.
    #[serde(flatten)]
    pub scores: BTreeMap<Metric, f64>,
    /// Text tokens alone.
    pub txt: Part,
    /// Image tokens alone.
    pub img: Part,
    /// By noise level: the middle of each bucket that was seen, and what was seen there.
    pub timesteps: Vec<AtTime>,
}

/// Scores at a noise level.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AtTime {
    /// Noise level in [0, 1].
    pub t: f64,
    /// Both streams together.
    #[serde(flatten)]
    pub part: Part,
}

/// What `score` writes: `scores.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// How the model is called.
    pub model: String,
    /// Its fingerprint.
    pub source: String,
    /// The criterion that plans go by unless told otherwise.
    pub metric: Metric,
    /// Every block, in network order.
    pub blocks: Vec<BlockScore>,
}

impl Scores {
    /// Reads a scores file.
    ///
    /// # Errors
    /// When it cannot be read or is no scores file.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text =
            std::fs::read(path).with_context(|| format!("--scores: cannot read `{name}`"))?;
        let scores: Self = serde_json::from_slice(&text).with_context(|| {
            format!("--scores: `{name}` is not a scores file\nhint: `fastflux score` makes one")
        })?;
        scores
            .validate()
            .with_context(|| format!("--scores: `{name}`"))?;
        Ok(scores)
    }

    /// Writes the scores to `path` and their chart to `chart`.
    ///
    /// # Errors
    /// When the folder is not writable or the disk is full.
    pub fn write(&self, path: &Path, chart: &Path) -> Result<()> {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot create `{}`", folder.display()))?;
        }
        output::write_json(path, &serde_json::to_value(self)?)?;
        save::write_bytes(chart, chart::svg(self)?.as_bytes())
    }

    /// Checks that every block is named once and that its values are numbers.
    ///
    /// # Errors
    /// When one is not; the message names it.
    pub fn validate(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for block in &self.blocks {
            ensure!(seen.insert(block.block), "{} is there twice", block.block);
            for (metric, value) in &block.scores {
                ensure!(
                    value.is_finite(),
                    "the {metric} of {} is NaN or infinite",
                    block.block
                );
            }
        }
        Ok(())
    }

    /// Checks that the blocks are just those of a model.
    ///
    /// # Errors
    /// When one is missing or another is there; the message names it.
    pub fn check_blocks(&self, known: &[BlockId]) -> Result<()> {
        let found: BTreeSet<BlockId> = self.blocks.iter().map(|block| block.block).collect();
        let hint = "hint: run `fastflux score` on this model";
        if let Some(id) = found.iter().find(|id| !known.contains(id)) {
            bail!("the scores name {id}, which the model does not have\n{hint}");
        }
        if let Some(id) = known.iter().find(|id| !found.contains(id)) {
            bail!("the scores lack {id}\n{hint}");
        }
        Ok(())
    }

    /// The importance of every block by `metric`.
    ///
    /// # Errors
    /// When it was not measured, or is NaN.
    pub fn importance(&self, metric: Metric) -> Result<BTreeMap<BlockId, f64>> {
        let value = |block: &BlockScore| -> Result<(BlockId, f64)> {
            let value = block.scores.get(&metric).copied().with_context(|| {
                format!(
                    "the scores hold no {metric} of {}\nhint: run `fastflux score --metric {metric}`",
                    block.block
                )
            })?;
            ensure!(
                value.is_finite(),
                "the {metric} of {} is not a number",
                block.block
            );
            Ok((block.block, value))
        };
        self.blocks.iter().map(value).collect()
    }
}

impl Scores {
    /// As a table, with the rank of each block.
    pub fn text(&self) -> String {
        let columns: Vec<Metric> = Metric::ALL
            .into_iter()
            .filter(|metric| self.blocks.iter().any(|b| b.scores.contains_key(metric)))
            .collect();
        let mut header: Vec<String> = vec!["block".to_owned()];
        let short = |metric: &Metric| match metric {
            Metric::RelativeChange => "change".to_owned(), // 80 columns
            metric => metric.to_string(),
        };
        header.extend(columns.iter().map(short));
        header.push("rank".to_owned());
        let value = |block: &BlockScore| block.scores.get(&self.metric).copied();
        let rows: Vec<Vec<String>> = self
            .blocks
            .iter()
            .map(|block| {
                let cell = |metric: &Metric| {
                    let value = block.scores.get(metric);
                    value.map_or_else(|| "-".to_owned(), |v| format!("{v:.5}"))
                };
                // 1 is the least important of those that have a value
                let rank = value(block).map_or_else(
                    || "-".to_owned(),
                    |own| {
                        let others = self.blocks.iter().filter_map(value);
                        (1 + others.filter(|v| v.total_cmp(&own).is_lt()).count()).to_string()
                    },
                );
                let mut row = vec![block.block.to_string()];
                row.extend(columns.iter().map(cell));
                row.push(rank);
                row
            })
            .collect();
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        let right: Vec<usize> = (1..header.len()).collect();
        let table = ui::table(&header, &rows, &right);
        format!(
            "{table}\n\nrank 1 is the least important block by {}",
            self.metric
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_one_name_in_files_and_on_the_command_line() {
        for metric in Metric::ALL {
            let text = metric.to_string();
            assert_eq!(text.parse(), Ok(metric));
            let json = serde_json::to_value(metric).unwrap();
            assert_eq!(json, text.replace('-', "_"));
        }
    }

    #[test]
    fn scores_come_back_as_they_were_written() {
        let block = BlockScore {
            block: BlockId::single(3),
            scores: BTreeMap::from([(Metric::Ablation, 0.5), (Metric::FitError, 0.25)]),
            txt: Part {
                relative_change: 1.0,
                cosine: 0.1,
                fit_error: Some(0.3),
            },
            img: Part::default(),
            timesteps: vec![AtTime {
                t: 0.05,
                part: Part::default(),
            }],
        };
        let scores = Scores {
            model: "m".into(),
            source: "f".into(),
            metric: Metric::Ablation,
            blocks: vec![block],
        };
        let text = serde_json::to_string(&scores).unwrap();
        assert_eq!(serde_json::from_str::<Scores>(&text).unwrap(), scores);
        let importance = scores.importance(Metric::FitError).unwrap();
        assert!((importance[&BlockId::single(3)] - 0.25).abs() < 1e-12);
        let error = scores.importance(Metric::Removal).unwrap_err().to_string();
        assert!(error.contains("removal"), "{error}");
        scores.validate().unwrap();
        scores.check_blocks(&[BlockId::single(3)]).unwrap();
        for known in [vec![], vec![BlockId::single(3), BlockId::double(0)]] {
            let error = scores.check_blocks(&known).unwrap_err().to_string();
            let word = if known.is_empty() {
                "single.03"
            } else {
                "double.00"
            };
            assert!(error.contains(word), "{error}");
        }
        let mut twice = scores.clone();
        twice.blocks.push(twice.blocks[0].clone());
        let error = twice.validate().unwrap_err().to_string();
        assert!(error.contains("single.03 is there twice"), "{error}");
        let mut nan = scores;
        nan.blocks[0].scores.insert(Metric::Cosine, f64::NAN);
        let error = nan.validate().unwrap_err().to_string();
        assert!(error.contains("cosine of single.03"), "{error}");
    }
}
