//! What each number of a report is good for, and how far two seeds of one model differ in it.

use super::encode::escape;
use crate::{
    eval::report::{MetricReference, Report},
    ui,
};

/// A table: number, what it says, and its value between two images of the baseline that are equally good.
pub(super) fn reading(report: &Report) -> String {
    let seeds = &report.two_seeds;
    let mut rows = vec![
        (
            "velocity error",
            "How much one sampling step differs from the baseline's, over all noise levels. It repeats exactly, hardly depends on the prompts and tells the smallest \
             differences: compare methods by it. It does not say how good images are."
                .to_owned(),
            "0: the velocity has no seed".to_owned(),
        ),
        (
            "latent MSE, PSNR, SSIM",
            "How near an image is to the baseline's of the same prompt and noise: whether people get the images they know. An image that differs may be as good."
                .to_owned(),
            format!(
                "latent MSE {:.3}, PSNR {:.1} dB, SSIM {:.3} ({})",
                seeds.latent_mse.mean, seeds.psnr.mean, seeds.ssim.mean, ui::counted(seeds.prompts, "prompt")
            ),
        ),
    ];
    if let Some(score) = &report.baseline.prompt_following {
        let width = 50.0 * (score.ok.high - score.ok.low);
        rows.push((
            "prompts followed",
            format!(
                "Whether images show what was asked for. With {} a share is known to ± {width:.1} points, so smaller differences say nothing.",
                ui::counted(report.settings.images, "image")
            ),
            "the interval in the table above".to_owned(),
        ));
    }
    if report.settings.clip.is_some() {
        rows.push((
            "CLIP score",
            "How well images fit their prompts in the eyes of CLIP, which sees style and subject and hardly counts or places. Differences below the standard deviation by the root of \
             the number of images say nothing."
                .to_owned(),
            "the deviation in the table above".to_owned(),
        ));
    }
    if let Some(lpips) = &seeds.lpips {
        rows.push((
            "LPIPS",
            "How far an image is from the baseline's in the eyes of an image classifier, weighted as people judged differences: it forgives what pixels do not, and sees \
             changes of texture. 0: equal."
                .to_owned(),
            format!("{:.3} ({})", lpips.mean, ui::counted(seeds.prompts, "prompt")),
        ));
    }
    let body: String = rows
        .iter()
        .map(|(name, text, seeds)| {
            format!(
                "<tr><th>{}</th><td class=\"text\">{}</td><td class=\"text\">{}</td></tr>\n",
                escape(name),
                escape(text),
                escape(seeds)
            )
        })
        .collect();
    format!(
        "<div class=\"wide\"><table>\n<thead><tr><th></th><th>what it says</th><th>between two seeds of the baseline</th></tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
}

/// A table: number, and its reference implementation.
pub(super) fn references(report: &Report) -> String {
    let row = |one: &MetricReference| {
        format!(
            "<tr><th>{}</th><td class=\"text\">{}</td></tr>\n",
            escape(one.metric),
            escape(&one.reference)
        )
    };
    let body: String = report.metrics.iter().map(row).collect();
    format!(
        "<div class=\"wide\"><table>\n<thead><tr><th></th><th>reference implementation</th></tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
}
