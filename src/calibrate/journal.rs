//! What the comparison of candidates has measured so far, saved as it goes: a killed run finds its numbers again, to the bit.
//!
//! A number is known by what was compared (`ablation`, …), the trunk that it was compared in, the candidate and the batch of
//! noised latents. Sums over batches are made again in their order.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{output, read_small, with_hint},
    model::{Block, Trunk},
    ui::Reporter,
};

const RESTART: &str = "delete the file to measure again";

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// What the numbers depend on.
    settings: String,
    /// The bits of each number, as decimal digits of JSON would not bring back every one.
    measured: BTreeMap<String, u64>,
}

/// Numbers that were measured, and the file that they are kept in.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    every: Duration,
    reporter: Reporter,
    inner: RefCell<Inner>,
}

#[derive(Debug)]
struct Inner {
    saved: Saved,
    /// When it was written last.
    last: Instant,
    /// Whether there are numbers that were not written.
    dirty: bool,
}

/// Numbers of one kind, in one trunk.
pub(super) struct Section<'a> {
    journal: &'a Journal,
    name: String,
}

impl Journal {
    /// Goes on with the file of a run with the same `settings`, or begins. It is written after each `every` of work.
    ///
    /// # Errors
    /// When the file is of a run with other settings, or damaged.
    pub fn open(
        path: &Path,
        settings: String,
        every: Duration,
        reporter: &Reporter,
    ) -> Result<Self> {
        let mut saved = Saved {
            settings,
            ..Saved::default()
        };
        if path.exists() {
            let name = || format!("`{}`", path.display());
            let before = read_small(path).and_then(|text| Ok(serde_json::from_slice(&text)?));
            let before: Saved = with_hint(before, RESTART).with_context(name)?;
            ensure!(
                before.settings == saved.settings,
                "`{}` is unfinished work with other options\nhint: give the same options to go on, or {RESTART}",
                path.display()
            );
            reporter.note(format!(
                "going on from `{}`: {} forwards are done",
                path.display(),
                before.measured.len()
            ));
            saved = before;
        }
        Ok(Self {
            path: path.to_owned(),
            every,
            reporter: reporter.clone(),
            inner: RefCell::new(Inner {
                saved,
                last: Instant::now(),
                dirty: false,
            }),
        })
    }

    /// Numbers of the kind `what` with `trunk` as it stands.
    pub(super) fn section(&self, what: &str, trunk: &Trunk) -> Section<'_> {
        let mut name = what.to_owned();
        for (spec, block) in trunk.entries() {
            // a choice changes the block and not the layout
            if matches!(block, Block::Replacement(_)) {
                name = format!("{name} {}", spec.id());
            }
        }
        Section {
            journal: self,
            name,
        }
    }

    fn write(&self, inner: &mut Inner) {
        let saved = serde_json::to_value(&inner.saved).map_err(anyhow::Error::from);
        if let Err(error) = saved.and_then(|value| output::write_json(&self.path, &value)) {
            // all that was measured is in memory too
            self.reporter
                .warn(format!("unfinished work is not saved: {error:#}"));
        }
        (inner.last, inner.dirty) = (Instant::now(), false);
    }
}

impl Section<'_> {
    fn key(&self, candidate: usize, batch: usize) -> String {
        format!("{} {candidate} {batch}", self.name)
    }

    /// What was measured before.
    pub(super) fn get(&self, candidate: usize, batch: usize) -> Option<f64> {
        let inner = self.journal.inner.borrow();
        let bits = inner.saved.measured.get(&self.key(candidate, batch))?;
        Some(f64::from_bits(*bits))
    }

    /// Keeps what was measured, and writes the file if it is time.
    pub(super) fn put(&self, candidate: usize, batch: usize, value: f64) {
        let mut inner = self.journal.inner.borrow_mut();
        let key = self.key(candidate, batch);
        inner.saved.measured.insert(key, value.to_bits());
        inner.dirty = true;
        if inner.last.elapsed() >= self.journal.every {
            self.journal.write(&mut inner);
        }
    }
}
