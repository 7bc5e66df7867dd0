//! One file per subcommand: read, call the stage, write. All I/O and talk happens here.

use std::{io::Read, path::Path, process::ExitCode};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cli::{Command, ModelArgs, PipelineArgs, RunArgs},
    device::Runtime,
    pipeline::{
        ModelChoice, Pipeline,
        defaults::{MAX_SIDE, MAX_TEXT_TOKENS, MIN_SIDE},
    },
    sample::{denoise::LatentSize, text},
    ui,
};

mod bench;
mod bench_growth;
mod bench_inputs;
mod calibrate;
mod choose;
mod convert;
mod demand;
mod eval;
mod eval_clip;
mod eval_output;
mod gather;
mod generate;
mod init;
mod inspect;
mod load;
mod measure;
mod place;
mod plan;
mod planned;
mod prune;
mod recorded;
mod score;
mod select;
mod session;
mod train;
mod train_memory;
mod train_output;
mod train_sandwich;
mod verify;

/// Runs a subcommand.
///
/// # Errors
/// Whatever the subcommand could not do; `main` prints it.
pub fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Inspect(args) => inspect::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Calibrate(args) => calibrate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::MergeStats(args) => calibrate::merge(&args).map(|()| ExitCode::SUCCESS),
        Command::Score(args) => score::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Plan(args) => plan::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Prune(args) => prune::run(&args).map(|()| ExitCode::SUCCESS),
        Command::TrainSandwich(args) => train_sandwich::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Generate(args) => generate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Verify(args) => verify::run(&args),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Init(args) => init::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(&args).map(|()| ExitCode::SUCCESS),
    }
}

/// The model that flags name, without text encoders and VAE.
fn bare_choice(args: &ModelArgs) -> ModelChoice {
    ModelChoice {
        model: args.model.clone(),
        config: args.config.config.clone(),
        ..ModelChoice::default()
    }
}

/// The model that flags name, with the other parts of its pipeline.
fn model_choice(args: &PipelineArgs) -> ModelChoice {
    ModelChoice {
        text_encoders: args.parts.text_encoders.clone(),
        vae: args.parts.vae.clone(),
        ..bare_choice(&args.model)
    }
}

/// The device and number format that flags name.
fn runtime(args: RunArgs) -> Result<Runtime> {
    Runtime::resolve(args.device.device, args.dtype)
}

/// Opens a model and says so when it is the bundled one.
fn open(choice: &ModelChoice) -> Result<Pipeline> {
    if choice.model.is_none() {
        ui::note(
            "using the bundled tiny model (64×64 pictures of coloured shapes); name a real one with --model, \
             for example --model black-forest-labs/FLUX.1-schnell",
        );
    }
    Pipeline::open(choice)
}

/// Size of a picture in pixels, both multiples of [`PixelSize::STEP`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PixelSize {
    width: usize,
    height: usize,
}

impl PixelSize {
    const STEP: usize = MIN_SIDE;
    const LARGEST: usize = MAX_SIDE;

    fn latent(self) -> LatentSize {
        LatentSize {
            height: self.height / 8,
            width: self.width / 8,
        }
    }

    fn tokens(self) -> usize {
        self.latent().tokens()
    }
}

/// The size the user asked for, rounded down to what the model can draw (with a note), or the model's own.
fn picture_size(
    pipeline: &Pipeline,
    width: Option<usize>,
    height: Option<usize>,
) -> Result<PixelSize> {
    let own = |said: Option<usize>| said.map_or_else(|| pipeline.default_size(), Ok);
    let (width, height) = (own(width)?, own(height)?);
    let round = |flag: &str, value: usize| -> Result<usize> {
        ensure!(
            (PixelSize::STEP..=PixelSize::LARGEST).contains(&value),
            "{flag} {value}: pictures are between {} and {} pixels wide and high",
            PixelSize::STEP,
            PixelSize::LARGEST
        );
        Ok(value / PixelSize::STEP * PixelSize::STEP)
    };
    let size = PixelSize {
        width: round("--width", width)?,
        height: round("--height", height)?,
    };
    if (size.width, size.height) != (width, height) {
        ui::note(format!(
            "drawing {}×{} instead of {width}×{height}: sizes are multiples of {}",
            size.width,
            size.height,
            PixelSize::STEP
        ));
    }
    Ok(size)
}

/// The prompts of a file, one a line; blank lines are passed over.
fn read_prompts(flag: &str, path: &Path) -> Result<Vec<String>> {
    let name = path.display();
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    let bytes = bytes.with_context(|| format!("{flag}: cannot read `{name}`"))?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("{flag}: `{name}` is not UTF-8 text")
    };
    let text = text.trim_start_matches('\u{feff}');
    let prompts: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    ensure!(!prompts.is_empty(), "{flag}: `{name}` holds no prompt");
    Ok(prompts)
}

/// The prompts to calibrate with when the user names none: scenes the bundled model was trained on, or varied prompts
/// for real models.
fn bundled_prompts(pipeline: &Pipeline) -> Vec<String> {
    let text = if knows_only_scenes(pipeline) {
        SCENES
    } else {
        include_str!("../../configs/prompts/calibration.txt")
    };
    text.lines().map(str::to_owned).collect()
}

/// Captions of the bundled model's scenes, calibrated with and trained on.
const SCENES: &str = include_str!("../../configs/tiny/prompts.txt");

/// Whether the model has words for the bundled model's scenes and spells all others, as that model and its kin do.
fn knows_only_scenes(pipeline: &Pipeline) -> bool {
    let spells = |prompt: &str| {
        let tokens = text::token_count(&pipeline.text_files()?, prompt)?;
        anyhow::Ok(tokens > 2 * prompt.split(' ').count())
    };
    let caption = SCENES.lines().next().unwrap_or_default();
    match (spells(caption), spells("a photograph of a village")) {
        (Ok(caption), Ok(other)) => other && !caption,
        // where text encoders cannot be opened, that is said when they are needed
        _ => false,
    }
}

/// Steps in which pictures for calibration and training are drawn, unless asked otherwise: they are noised anew, so
/// their number counts for more than their finish.
const STEPS_OF_DATA: usize = 8;

fn steps_of_data(pipeline: &Pipeline) -> usize {
    pipeline.default_steps().min(STEPS_OF_DATA)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_given_prompts_that_it_has_words_for() {
        let bundled = Pipeline::open(&ModelChoice::default()).unwrap();
        assert!(bundled_prompts(&bundled)[0].contains("background"));
        // FLUX.1's own tokenizers, which know both
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/flux1");
        let flux1 = Pipeline::open(&ModelChoice {
            text_encoders: Some(folder.into()),
            ..ModelChoice::default()
        });
        assert!(!bundled_prompts(&flux1.unwrap())[0].contains("background"));
    }
}
