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
    /// What each number is computed as, and by whose implementation it was checked.
    pub metrics: Vec<MetricReference>,
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

/// A number of a report.
#[derive(Clone, Debug, Serialize)]
pub struct MetricReference {
    /// What the report calls it.
    pub metric: &'static str,
    /// Its reference implementation.
    pub reference: String,
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
    /// The LPIPS model, if one was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lpips: Option<String>,
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
    /// LPIPS; `None` if no such model was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lpips: Option<Summary>,
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
    /// LPIPS; `None` if no such model was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lpips: Option<Summary>,
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
    /// LPIPS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lpips: Option<f64>,
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
        let of_model = pairs.iter().filter_map(|p| p.models.get(index));
        let lpips: Option<Vec<f64>> = of_model.map(|p| p.lpips).collect();
        let mut worst: Vec<usize> = (0..psnr.len()).collect();
        worst.sort_by(|a, b| psnr[*a].total_cmp(&psnr[*b]));
        worst.truncate(WORST);
        Self {
            velocity,
            latent_mse: Summary::from_values(&values(|p| p.latent_mse)),
            ssim: Summary::from_values(&values(|p| p.ssim)),
            psnr: Summary::from_values(&psnr),
            lpips: lpips.as_deref().map(Summary::from_values),
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
                lpips: None,
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
