//! What `eval` found, as `report.json` holds it.

use serde::Serialize;
use serde_json::Value;

use super::{
    metrics::{Share, Summary},
    scenes::Verdict,
    velocity::VelocityError,
};
use crate::{
    bench::timing::{Machine, Timing},
    layout::BlockSpec,
    ui,
};

/// Pairs that are listed as the worst of a model.
const WORST: usize = 8;

/// The whole evaluation.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The program, `fastflux 0.1.0`.
    pub tool: String,
    /// What all models were given.
    pub settings: Settings,
    /// The machine; timings are of it.
    pub machine: Machine,
    /// How far images of the baseline are apart that were drawn of the same prompts from other noise: two images that are
    /// equally good.
    pub two_seeds: TwoSeeds,
    /// The model that the others are compared with.
    pub baseline: ModelReport,
    /// The models, in the order they were named.
    pub models: Vec<ModelReport>,
    /// Every prompt, in the order of the list.
    pub pairs: Vec<Pair>,
}

/// What all models were given.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Where the prompts are from.
    pub prompts: String,
    /// Number of images each model drew.
    pub images: usize,
    /// Image i starts from the noise of `seed` + i.
    pub seed: u64,
    /// Sampling steps.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    /// Scale of the negative prompt (nothing), where a FLUX.1 is guided by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub true_cfg: Option<f64>,
    /// Image width in pixels.
    pub width: usize,
    /// Image height in pixels.
    pub height: usize,
    /// Image tokens.
    pub image_tokens: usize,
    /// Text tokens.
    pub text_tokens: usize,
    /// Device and number format, `cpu, f32`.
    pub runtime: String,
    /// The CLIP model, if one was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<String>,
    /// How steps were timed: `models in turn`, which a busy machine slows alike, or `models one after another`.
    pub timed: String,
}

/// One model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelReport {
    /// As it was named.
    pub name: String,
    /// Identity of its weights.
    pub fingerprint: String,
    /// Blocks of the original model.
    pub blocks: usize,
    /// Those of them that are replaced or removed.
    pub replaced: Vec<String>,
    /// Parameters of the transformer.
    pub parameters: usize,
    /// Size of its tensors in the file, in bytes.
    pub bytes: usize,
    /// Floating-point operations of one step of one image.
    pub flops_per_step: u64,
    /// One transformer step of one image, in seconds.
    pub step: Timing,
    /// An image without its text encoding, in seconds: all steps, and decoding.
    pub image_seconds: f64,
    /// Step time of the baseline by that of this model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed_up: Option<f64>,
    /// Most memory while the transformer was loaded and drew, in bytes.
    pub peak_memory: Memory,
    /// Against the baseline; `None` for the baseline itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub against_baseline: Option<Distances>,
    /// How well images match captions of the bundled model's grammar; `None` if there are no such captions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_following: Option<PromptFollowing>,
    /// CLIP score: 100 · cosine of image and prompt; `None` if no CLIP model was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_score: Option<Summary>,
    /// The recipe in the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Value>,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Of the process; `None` if the system does not say.
    pub host: Option<u64>,
    /// Of the device, if it has memory of its own.
    pub device: Option<u64>,
}

/// How far a model is from the baseline.
#[derive(Clone, Debug, Serialize)]
pub struct Distances {
    /// Of the velocity, on the baseline's images noised again.
    pub velocity: VelocityError,
    /// Mean squared difference of the final latents.
    pub latent_mse: Summary,
    /// In dB.
    pub psnr: Summary,
    /// Structural similarity.
    pub ssim: Summary,
    /// Indices of the pairs with the lowest PSNR, the lowest first.
    pub worst: Vec<usize>,
}

/// Distances between images of the same prompts and the same model, from different noise.
#[derive(Clone, Debug, Serialize)]
pub struct TwoSeeds {
    /// Prompts that were drawn twice.
    pub prompts: usize,
    /// Mean squared difference of the final latents.
    pub latent_mse: Summary,
    /// In dB.
    pub psnr: Summary,
    /// Structural similarity.
    pub ssim: Summary,
}

/// Shares of images that meet a criterion of their caption.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PromptFollowing {
    /// Background.
    pub background: Share,
    /// Number of objects.
    pub count: Share,
    /// Shapes.
    pub shapes: Share,
    /// Colours.
    pub colours: Share,
    /// Colours bound to shapes.
    pub bound: Share,
    /// Positions.
    pub position: Share,
    /// Background, count, binding and position together.
    pub ok: Share,
}

impl PromptFollowing {
    /// Shares of these verdicts; `None` if there are none.
    pub fn from_verdicts(verdicts: &[Verdict]) -> Option<Self> {
        let share = |f: fn(&Verdict) -> bool| {
            Share::wilson(verdicts.iter().filter(|v| f(v)).count(), verdicts.len())
        };
        (!verdicts.is_empty()).then(|| Self {
            background: share(|v| v.background),
            count: share(|v| v.count),
            shapes: share(|v| v.shapes),
            colours: share(|v| v.colours),
            bound: share(|v| v.bound),
            position: share(|v| v.position),
            ok: share(|v| v.ok),
        })
    }
}

/// One prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Pair {
    /// The prompt.
    pub prompt: String,
    /// Seed of its noise.
    pub seed: u64,
    /// What the baseline's image shows, if the prompt is a caption of the grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Verdict>,
    /// CLIP score of the baseline's image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baseline_clip: Option<f64>,
    /// One for each model.
    pub models: Vec<PairOfModel>,
}

/// One model's image next to the baseline's.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PairOfModel {
    /// Mean squared difference of the final latents.
    pub latent_mse: f64,
    /// In dB.
    pub psnr: f64,
    /// Structural similarity.
    pub ssim: f64,
    /// What the image shows, if the prompt is a caption of the grammar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// CLIP score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
}

impl Pair {
    /// The verdict on the baseline's image (0) or on that of a model (from 1).
    pub fn verdict(&self, index: usize) -> Option<Verdict> {
        match index.checked_sub(1) {
            None => self.baseline,
            Some(model) => self.models.get(model)?.verdict,
        }
    }
}

impl Distances {
    /// Of model `index`.
    pub fn new(pairs: &[Pair], index: usize, velocity: VelocityError) -> Self {
        let values = |f: fn(&PairOfModel) -> f64| -> Vec<f64> {
            let of_model = pairs.iter().filter_map(|p| p.models.get(index));
            of_model.map(f).collect()
        };
        let psnr = values(|p| p.psnr);
        let mut worst: Vec<usize> = (0..psnr.len()).collect();
        worst.sort_by(|a, b| psnr[*a].total_cmp(&psnr[*b]));
        worst.truncate(WORST);
        Self {
            velocity,
            latent_mse: Summary::from_values(&values(|p| p.latent_mse)),
            ssim: Summary::from_values(&values(|p| p.ssim)),
            psnr: Summary::from_values(&psnr),
            worst,
        }
    }
}

impl Report {
    /// Indices of all pairs, those with the lowest mean PSNR first.
    pub fn worst_first(&self) -> Vec<usize> {
        let mean = |pair: &Pair| pair.models.iter().map(|m| m.psnr).sum::<f64>();
        let mut order: Vec<usize> = (0..self.pairs.len()).collect();
        order.sort_by(|a, b| mean(&self.pairs[*a]).total_cmp(&mean(&self.pairs[*b])));
        order
    }

    /// What a terminal shows: at most 80 columns if names are short.
    pub fn table(&self) -> String {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
        };
        // the last column only if there is something in it
        let columns = if self.settings.clip.is_some() { 9 } else { 8 };
        let models = std::iter::once(&self.baseline).chain(&self.models);
        let rows: Vec<Vec<String>> = models
            .map(|m| {
                let against = m.against_baseline.as_ref();
                let speed_up = m.speed_up.map(|s| format!("{s:.2}x"));
                let mut row = vec![
                    m.name.clone(),
                    ui::count(m.parameters as f64),
                    format!("{:.2}", 1e3 * m.step.median),
                    speed_up.unwrap_or_else(|| "-".to_owned()),
                    number(against.map(|a| a.velocity.error), 5),
                    number(against.map(|a| a.psnr.mean), 2),
                    number(against.map(|a| a.ssim.mean), 4),
                    number(m.prompt_following.map(|p| 100.0 * p.ok.share), 1),
                    number(m.clip_score.as_ref().map(|s| s.mean), 2),
                ];
                row.truncate(columns);
                row
            })
            .collect();
        let header = [
            "model",
            "parameters",
            "step, ms",
            "speed",
            "velocity error",
            "PSNR",
            "SSIM",
            "followed",
            "CLIP",
        ];
        let mut out = ui::table(&header[..columns], &rows, &[1, 2, 3, 4, 5, 6, 7, 8]);
        if let Some(score) = self.models.iter().find_map(|m| m.prompt_following) {
            out.push_str(&format!(
                "\nfollowed: share of {} prompts in %, 95 % interval in report.html",
                score.ok.attempts
            ));
        }
        for (index, model) in self.models.iter().enumerate() {
            let worst = model.against_baseline.iter().flat_map(|a| &a.worst).take(3);
            for pair in worst.filter_map(|i| self.pairs.get(*i)) {
                let psnr = pair.models.get(index).map_or(0.0, |m| m.psnr);
                out.push_str(&format!(
                    "\nworst of {}: {psnr:.1} dB, seed {}\n  {}",
                    model.name, pair.seed, pair.prompt
                ));
            }
        }
        out
    }
}

/// Names of the blocks that are replaced or removed.
pub(super) fn replaced(layout: &[BlockSpec]) -> Vec<String> {
    let entries = layout.iter().filter_map(|spec| match spec {
        BlockSpec::Original(_) => None,
        BlockSpec::Replaced(r) => Some(r.replaces.iter().map(ToString::to_string)),
    });
    entries.flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_pairs_come_first() {
        let pair = |psnr: f64| Pair {
            prompt: String::new(),
            seed: 0,
            baseline: None,
            baseline_clip: None,
            models: vec![PairOfModel {
                latent_mse: 1.0 / psnr,
                psnr,
                ssim: psnr / 100.0,
                verdict: None,
                clip: None,
            }],
        };
        let pairs: Vec<Pair> = [30.0, 10.0, 20.0].map(pair).into();
        let velocity = VelocityError {
            noised_latents: 0,
            error: 0.0,
            by_time: vec![],
        };
        let distances = Distances::new(&pairs, 0, velocity);
        assert_eq!(distances.worst, [1, 2, 0]);
        assert!((distances.psnr.mean - 20.0).abs() < 1e-12);
        assert!((distances.latent_mse.most - 0.1).abs() < 1e-12);
    }

    #[test]
    fn no_caption_no_score() {
        assert_eq!(PromptFollowing::from_verdicts(&[]), None);
        let right = Verdict {
            ok: true,
            ..Verdict::default()
        };
        let score = PromptFollowing::from_verdicts(&[right, Verdict::default()]).unwrap();
        assert_eq!(
            (score.ok.successes, score.ok.attempts, score.count.successes),
            (1, 2, 0)
        );
    }
}
