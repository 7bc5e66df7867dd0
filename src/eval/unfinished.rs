//! Images that models have sampled so far, saved as latents: a killed evaluation goes on from them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use candle::{Device, Tensor};

use crate::{
    checkpoint::{Checkpoint, Source, save, target, with_hint},
    files::Blob,
    ui::{self, Reporter},
};

const RESTART: &str = "delete the file to sample the images again";
/// The metadata key of the settings.
const KEY: &str = "fastflux-eval";
/// Between two saves at least this many times as long as one save takes.
const SAVING_SHARE: u32 = 20;

/// Latents by model (its place in the evaluation), and the file that they are kept in.
pub(super) struct Unfinished {
    path: PathBuf,
    settings: String,
    every: Duration,
    latents: BTreeMap<String, Tensor>,
    last: Instant,
    cost: Duration,
    reporter: Reporter,
}

/// Where unfinished work on `output` is kept: `report.images.partial`.
fn file_of(output: &Path) -> PathBuf {
    let mut name = output.components().as_path().as_os_str().to_owned();
    name.push(".images.partial");
    name.into()
}

impl Unfinished {
    /// Goes on from what a run of the same `settings` left next to `output`, or begins. It is saved after each `every` of
    /// work.
    ///
    /// # Errors
    /// When a file of a run with other settings is in the way, or it is damaged.
    pub(super) fn open(
        output: &Path,
        settings: String,
        every: Duration,
        reporter: &Reporter,
    ) -> Result<Self> {
        let mut out = Self {
            path: file_of(output),
            settings,
            every,
            latents: BTreeMap::new(),
            last: Instant::now(),
            cost: Duration::ZERO,
            reporter: reporter.clone(),
        };
        target::resumes_from(&out.path);
        if out.path.exists() {
            let name = out.path.display().to_string();
            let blob = Blob::map(&out.path)?;
            let file = with_hint(Checkpoint::from_blob(&name, &blob), RESTART)?;
            ensure!(
                file.metadata.get(KEY) == Some(&out.settings),
                "`{name}` is unfinished work with other options\nhint: give the same options to go on, or {RESTART}"
            );
            let mut images = 0;
            for (name, source) in file.iter() {
                let tensor = source.tensor(&Device::Cpu)?.copy()?;
                images += tensor.dims().first().copied().unwrap_or(0);
                out.latents.insert(name.to_owned(), tensor);
            }
            reporter.note(format!(
                "going on from `{name}` with {}",
                ui::counted(images, "image")
            ));
        }
        Ok(out)
    }

    /// Latents (images, tokens, channels) that the model of this place has sampled, whole batches of them, or all.
    pub(super) fn of_model(&self, place: usize) -> Option<&Tensor> {
        self.latents.get(&place.to_string())
    }

    /// Keeps what a model has sampled so far, and writes the file, if it is time.
    pub(super) fn keep(&mut self, place: usize, latents: &[Tensor]) {
        if self.last.elapsed() < self.every.max(self.cost * SAVING_SHARE) {
            return;
        }
        if let Ok(latents) = Tensor::cat(latents, 0) {
            self.put(place, latents);
            self.write();
        }
    }

    /// Keeps all that a model has sampled, for the next time that the file is written.
    pub(super) fn put(&mut self, place: usize, latents: Tensor) {
        self.latents.insert(place.to_string(), latents);
    }

    fn write(&mut self) {
        let start = Instant::now();
        let written = || -> Result<()> {
            let mut file = Checkpoint::default();
            let settings = self.settings.clone();
            file.metadata.insert(KEY.to_owned(), settings);
            for (name, tensor) in &self.latents {
                file.insert(name.clone(), Source::dense(tensor)?);
            }
            save::write(&file, &self.path)
        };
        if let Err(error) = written() {
            // the report may fit all the same
            self.reporter
                .warn(format!("unfinished work is not saved: {error:#}"));
        }
        (self.last, self.cost) = (Instant::now(), start.elapsed());
    }
}

/// Removes what was kept of an evaluation whose report is in `output` now.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(output: &Path) -> Result<()> {
    let path = file_of(output);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove `{}`", path.display()))
        }
        _ => Ok(()),
    }
}
