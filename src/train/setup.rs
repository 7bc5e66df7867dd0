//! One run, ready to start: student and teacher, options, and which blocks are trained together.

use std::path::Path;

use anyhow::{Result, ensure};
use candle::DType;
use serde_json::{Value, json};

use super::{
    options::TrainOptions,
    pair::Pair,
    sandwich::{Sandwich, sandwiches},
};
use crate::{checkpoint::record, device::Runtime};

/// What a run starts from.
#[derive(Clone, Debug)]
pub struct TrainSetup {
    /// Student and teacher.
    pub pair: Pair,
    /// What to do.
    pub options: TrainOptions,
    /// Blocks that are trained together, in the order of training.
    pub sandwiches: Vec<Sandwich>,
    /// Where to compute.
    pub runtime: Runtime,
}

impl TrainSetup {
    /// Finds the sandwiches of the pruned model.
    ///
    /// # Errors
    /// When the pruned model has a block that the teacher lacks.
    pub fn new(pair: Pair, options: TrainOptions, runtime: Runtime) -> Result<Self> {
        let (student, teacher) = (&pair.pruned.config.layout, &pair.teacher.config.layout);
        let sandwiches = sandwiches(student, teacher, &options.recipe.sandwich)?;
        Ok(Self {
            pair,
            options,
            sandwiches,
            runtime,
        })
    }

    /// Everything that must stay the same for a saved run to go on.
    pub fn settings(&self) -> Value {
        json!({
            "version": record::software(),
            "model": self.pair.fingerprints[0],
            "teacher": self.pair.fingerprints[1],
            "prompts": self.options.prompts_hash(),
            "recipe": self.options.recipe,
            "runtime": self.runtime.to_string(),
        })
    }
}

/// Fails for a number format that cannot hold gradients.
///
/// # Errors
/// The message names the flag.
pub fn check_dtype(runtime: &Runtime) -> Result<()> {
    ensure!(
        runtime.dtype != DType::F16,
        "--dtype f16: gradients are too small for f16 and would be 0\nhint: use bf16 or f32"
    );
    Ok(())
}

/// Where a run that writes `output` is saved while it goes on.
pub fn state_folder(output: &Path) -> std::path::PathBuf {
    let mut name = output.file_name().unwrap_or_default().to_os_string();
    name.push(".state");
    output.with_file_name(name)
}
