//! The command line: definitions only. What a command does is in `commands`.

use clap::{Parser, Subcommand};

use crate::ui::Level;

mod calibrate;
mod convert;
mod diff;
mod eval;
mod generate;
mod init;
mod inspect;
mod prune;
mod score;
mod shared;
mod shell;
mod train;
mod units;

pub use calibrate::{CALIBRATION, CalibrateArgs, CalibrationArgs, MergeStatsArgs, StatsArgs};
pub use convert::ConvertArgs;
pub use diff::DiffArgs;
pub use eval::{BenchArgs, EvalArgs, VerifyArgs};
pub use generate::GenerateArgs;
pub use init::InitArgs;
pub use inspect::InspectArgs;
pub use prune::PruneArgs;
pub use score::{GoalArgs, PlanArgs, ScoreArgs};
pub use shared::{
    ConfigArgs, DecodeArgs, DeviceArgs, DryRunArgs, FolderArgs, LayoutArgs, LoraArgs, MemoryArgs,
    ModelArgs, OutputArgs, PartsArgs, PatchArgs, PipelineArgs, PrintArgs, PromptsArgs, RecipeArgs,
    RunArgs, SamplingArgs, SeedArgs, SizeArgs, TrueCfgArgs,
};
pub use shell::{CompletionsArgs, DoctorArgs, ManArgs};
pub use train::TrainArgs;

/// Prune FLUX.1: replace its least important transformer blocks by linear layers and generate with what is left.
#[derive(Debug, Parser)]
#[command(
    name = "fastflux",
    version,
    long_version = crate::bench::doctor::long_version(),
    propagate_version = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Print no notes and no progress bars on stderr.
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Print details on stderr too: which files are opened, what fits where, how long each part took.
    #[arg(long, short, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
}

impl Cli {
    /// How much is said on stderr.
    pub fn level(&self) -> Level {
        match (self.quiet, self.verbose) {
            (true, _) => Level::Quiet,
            (false, false) => Level::Normal,
            (false, true) => Level::Verbose,
        }
    }
}

/// The subcommands, in the order of the pipeline.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what a checkpoint holds: family, sizes, blocks, parameters, FLOPs.
    #[command(
        after_help = "Examples:\n  fastflux inspect\n  fastflux inspect --model flux1-dev.safetensors --width 1024 --height 1024\n  fastflux inspect --model pruned --json"
    )]
    Inspect(InspectArgs),
    /// Run the model on prompts and accumulate the sums that scores and fits are computed from.
    #[command(
        after_help = "Examples:\n  fastflux calibrate --output stats.safetensors\n  fastflux calibrate --model flux1-dev.safetensors --text-encoders encoders \\\n      --dry-run\n  fastflux calibrate --shard 2/8 --output stats-2.safetensors\n  fastflux calibrate --images photos --output stats.safetensors"
    )]
    Calibrate(CalibrateArgs),
    /// Add up the statistics files of shards.
    #[command(
        after_help = "Example:\n  fastflux merge-stats stats-*.safetensors --output stats.safetensors"
    )]
    MergeStats(MergeStatsArgs),
    /// Score how much every block matters, by several criteria; write a file and a chart, print a table.
    #[command(
        after_help = "Examples:\n  fastflux score --output scores.json\n  fastflux score --stats stats.safetensors --metric fit-residual"
    )]
    Score(ScoreArgs),
    /// Choose the blocks to replace and estimate what that saves, without writing a model.
    #[command(
        after_help = "Examples:\n  fastflux plan --ratio 0.2 --output plan.json\n  fastflux plan --scores scores.json --ratio 0.1,0.2,0.3,0.4\n  fastflux plan --for 24GiB --model black-forest-labs/FLUX.1-dev\n  fastflux plan --model flux1-dev.safetensors --stats stats.safetensors \\\n      --target-speedup 1.2"
    )]
    Plan(PlanArgs),
    /// Replace the least important blocks by linear layers and write a pruned checkpoint.
    #[command(
        after_help = "Examples:\n  fastflux prune --ratio 0.2 --output pruned\n  fastflux prune --model black-forest-labs/FLUX.1-schnell --ratio 0.2 \\\n      --prompts prompts.txt --output schnell-20\n  fastflux prune --plan plan.json --output mine\n\nA plan.json by hand (a layer for double.01, one layer for two neighbours, single.07 left out; other forms: conditioned, modulated):\n  {\"replace\": [\n    {\"replaces\": [\"double.01\"], \"form\": \"linear\"},\n    {\"replaces\": [\"single.03\", \"single.04\"], \"form\": \"linear\"},\n    {\"replaces\": [\"single.07\"], \"form\": \"remove\"}\n  ]}"
    )]
    Prune(PruneArgs),
    /// Train what a pruned model has in place of its blocks, and a LoRA next to it, towards the unpruned model.
    ///
    /// Without --model the bundled model is pruned at 20 % first, which takes about a minute.
    #[command(
        after_help = "Examples:\n  fastflux train-sandwich --output trained\n  fastflux train-sandwich --model pruned --output trained --rank 16 \\\n      --log losses.jsonl"
    )]
    TrainSandwich(TrainArgs),
    /// Write what differs between pruned models and the model that they were made from: a patch, which makes them of it again.
    #[command(
        after_help = "Examples:\n  fastflux diff --model pruned --output patch.safetensors\n  fastflux diff --model pruned-10 --model pruned-20 --output levels.safetensors\n  fastflux generate --model flux1-dev.safetensors --patch levels.safetensors \\\n      --level 20 --prompt \"a fox in the snow\""
    )]
    Diff(DiffArgs),
    /// Generate images from prompts.
    #[command(
        after_help = "Examples:\n  fastflux generate \\\n      --prompt \"a red circle left of a blue square on a white background\"\n  fastflux generate --model pruned --prompt-file prompts.txt --output images\n  fastflux generate --model flux1-dev.safetensors --text-encoders encoders \\\n      --vae ae.safetensors --prompt \"a fox in the snow\""
    )]
    Generate(GenerateArgs),
    /// Generate the same prompts with a model and the one it was made from; write numbers, images and a page that shows them.
    #[command(
        after_help = "Examples:\n  fastflux eval --model pruned --output report\n  fastflux eval --model pruned-10 --model pruned-20 --prompts prompts.txt \\\n      --num-prompts 16\n  fastflux eval --model flux1-lite.safetensors --baseline flux1-dev.safetensors \\\n      --text-encoders encoders --vae ae.safetensors"
    )]
    Eval(EvalArgs),
    /// Compare a model with tensors recorded from diffusers.
    #[command(
        after_help = "Examples:\n  python scripts/make_reference.py PIPELINE reference.safetensors\n  fastflux verify --model PIPELINE --reference reference.safetensors\n  fastflux verify --target comfyui pruned/flux.safetensors"
    )]
    Verify(VerifyArgs),
    /// Write a model in another number format: bf16, f16, f32, float8 (e4m3), or GGUF for ComfyUI-GGUF and others.
    #[command(
        after_help = "Examples:\n  fastflux convert --dtype f8e4m3 --output tiny-fp8.safetensors\n  fastflux convert --model pruned --gguf q8_0 --output pruned-q8_0.gguf\n  fastflux convert --model flux1-dev.safetensors --gguf q4_k \\\n      --output flux1-dev-q4_k.gguf --dry-run\n  fastflux convert --model flux1-dev-Q4_K_S.gguf --dtype bf16 --output wide"
    )]
    Convert(ConvertArgs),
    /// Write a randomly initialised checkpoint of any size, for tests and benchmarks.
    #[command(
        after_help = "Examples:\n  fastflux init --config flux1-dev --dry-run\n  fastflux init --config configs/tiny/transformer/config.json --seed 1 \\\n      --output random/flux.safetensors"
    )]
    Init(InitArgs),
    /// Time one transformer step and each kind of block, next to the most that the machine reaches.
    ///
    /// The last columns are shares of a large matrix product's and of a large copy's speed, measured in the same run;
    /// weights that the caches hold are read faster than the copy.
    #[command(
        after_help = "Examples:\n  fastflux bench\n  fastflux bench --model pruned --against flux1-dev.safetensors \\\n      --size 512,1024 --batch 1,2\n  fastflux bench --config flux1-dev --dtype bf16 --json"
    )]
    Bench(BenchArgs),
    /// Show what this build can do and what the machine has: features, kernels, GPUs, free memory and disk, cache.
    #[command(after_help = "Example:\n  fastflux doctor")]
    Doctor(DoctorArgs),
    /// Print a script that makes a shell complete commands and flags.
    #[command(
        after_help = "Examples:\n  fastflux completions bash > ~/.local/share/bash-completion/completions/fastflux\n  fastflux completions zsh > \"${fpath[1]}/_fastflux\"\n  fastflux completions fish > ~/.config/fish/completions/fastflux.fish"
    )]
    Completions(CompletionsArgs),
    /// Print the manual page of fastflux or of one of its commands.
    #[command(
        after_help = "Examples:\n  fastflux man prune > prune.1 && man ./prune.1\n  fastflux man > ~/.local/share/man/man1/fastflux.1"
    )]
    Man(ManArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_earlier_versions_are_still_read() {
        for line in [
            "calibrate --samples 4",
            "eval --model x --num 2",
            "generate --prompt x --num-images 2",
            "init --config flux1-dev --dry-run --format diffusers",
            "prune --samples 4 --format diffusers",
            "train-sandwich --samples 4 --finish 2 --recompute --format original",
        ] {
            let words = ["fastflux"].into_iter().chain(line.split(' '));
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused_with_their_range() {
        for (line, words) in [
            ("generate --prompt x --steps 0", "--steps"),
            ("inspect --width 8193", "from 16 to 8192"),
            ("prune --ratio 1", "above 0 and below 1"),
            ("plan --target-speedup 1", "above 1"),
            ("generate --prompt x --guidance -1", "from 0 to 1000"),
        ] {
            let all = ["fastflux"].into_iter().chain(line.split(' '));
            let error = Cli::try_parse_from(all).unwrap_err().to_string();
            assert!(error.contains(words), "{line}: {error}");
        }
    }

    #[test]
    fn help_is_grouped() {
        let mut cli = Cli::command();
        let prune = cli.find_subcommand_mut("prune").unwrap();
        let help = prune.render_long_help().to_string();
        let places: Vec<usize> = ["Model", "Goal", "Calibration", "Memory", "Output"]
            .map(|group| {
                help.find(&format!("\n{group}:\n"))
                    .unwrap_or_else(|| panic!("{group}: {help}"))
            })
            .into();
        assert!(places.is_sorted(), "{help}");
    }
}
