//! Trains a pruned model as a [`TrainSetup`] says, from the teacher's images to the trained student.

use std::{path::Path, time::Instant};

use anyhow::Result;

use super::{
    images,
    report::BeforeAfter,
    run::{TrainObserver, Training},
    setup::TrainSetup,
    state::Saved,
    strategy::MemoryStrategy,
};
use crate::model::Flux;

/// A trained model.
pub struct Trained {
    /// The pruned model with what was trained.
    pub student: Flux,
    /// The trained values, and what became of every phase.
    pub saved: Saved,
    /// Relative mean squared error of the velocity on held-out noised latents.
    pub velocity_error: BeforeAfter,
    /// How long training took.
    pub seconds: f64,
}

/// Trains from the start or from where `saved` was; `state` is the folder in which the run is kept.
///
/// # Errors
/// When the two models differ in what must be equal, or training fails (see [`Training::run`]).
pub fn train(
    setup: &TrainSetup,
    strategy: MemoryStrategy,
    state: &Path,
    saved: Option<Saved>,
    observer: &mut dyn TrainObserver,
) -> Result<Trained> {
    let options = &setup.options;
    let (teacher, images) = images::sample_or_load(state, setup, strategy)?;
    let (images, held_out) = images.split(options.held_out_images())?;
    let (student, shared) = setup
        .pair
        .student(&teacher, strategy.offload, &setup.runtime)?;
    let mut training = Training {
        teacher: &teacher,
        student,
        shared,
        sandwiches: setup.sandwiches.clone(),
        images,
        held_out,
        batch: options.batch,
        num_held_out: options.held_out,
        recipe: &options.recipe,
        save_every: options.save_every,
        gradient_checkpointing: strategy.gradient_checkpointing,
        batches_per_load: strategy.batches_per_load,
    };
    let before = training.velocity_error()?;
    let start = Instant::now();
    let saved = training.run(saved, observer)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = training.velocity_error()?;
    Ok(Trained {
        student: training.student,
        saved,
        velocity_error: BeforeAfter { before, after },
        seconds,
    })
}
