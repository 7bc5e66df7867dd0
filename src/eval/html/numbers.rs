//! The numbers of a report: cards for what decides, and a table of everything.

use super::encode::escape;
use crate::{
    eval::{
        metrics::{Share, Summary},
        report::{Distances, ModelReport, PromptFollowing, Report},
    },
    ui,
};

fn percent(change: f64) -> String {
    let text = format!("{:+.1} %", 100.0 * change);
    text.replace('-', "−")
}

/// The numbers that decide, as cards.
pub(super) fn headline(model: &ModelReport, report: &Report) -> String {
    let base = &report.baseline;
    let change = |now: f64, before: f64| percent(now / before - 1.0);
    let mut cards = Vec::new();
    if let Some(speed_up) = model.speed_up {
        let text = format!(
            "{:.1} → {:.1} ms a step",
            1e3 * base.step.median,
            1e3 * model.step.median
        );
        cards.push((format!("{speed_up:.2}×"), "speed", text));
    }
    cards.push((
        change(model.parameters as f64, base.parameters as f64),
        "parameters",
        format!(
            "{} of {}",
            ui::count(model.parameters as f64),
            ui::count(base.parameters as f64)
        ),
    ));
    if let Some(d) = &model.against_baseline {
        cards.push((
            format!("{:.4}", d.velocity.error),
            "velocity error",
            format!("relative MSE, {} noised latents", d.velocity.noised_latents),
        ));
        cards.push((
            format!("{:.1} dB", d.psnr.mean),
            "PSNR",
            format!("± {:.1}, lowest {:.1}", d.psnr.deviation, d.psnr.least),
        ));
        cards.push((
            format!("{:.3}", d.ssim.mean),
            "SSIM",
            format!("± {:.3}, lowest {:.3}", d.ssim.deviation, d.ssim.least),
        ));
    }
    if let (Some(score), Some(before)) = (&model.prompt_following, &base.prompt_following) {
        cards.push((
            format!("{:.1} %", 100.0 * score.ok.share),
            "prompts followed",
            format!(
                "before {:.1} %; {}",
                100.0 * before.ok.share,
                interval(&score.ok)
            ),
        ));
    }
    if let (Some(score), Some(before)) = (&model.clip_score, &base.clip_score) {
        cards.push((
            format!("{:.2}", score.mean),
            "CLIP score",
            format!("before {:.2}; ± {:.2}", before.mean, score.deviation),
        ));
    }
    if let Some(lpips) = model
        .against_baseline
        .as_ref()
        .and_then(|d| d.lpips.as_ref())
    {
        cards.push((
            format!("{:.3}", lpips.mean),
            "LPIPS",
            format!("± {:.3}, largest {:.3}", lpips.deviation, lpips.most),
        ));
    }
    let replaced = match model.replaced.len() {
        0 => "no block replaced".to_owned(),
        n => format!(
            "{n} of {} blocks replaced: {}",
            model.blocks,
            model.replaced.join(", ")
        ),
    };
    let cards: String = cards
        .iter()
        .map(|(value, name, text)| {
            format!(
                "<div class=\"card\"><span class=\"name\">{name}</span><strong>{}</strong><span>{}</span></div>\n",
                escape(value),
                escape(text)
            )
        })
        .collect();
    format!(
        "<section>\n<h2>{}</h2>\n<p>{}</p>\n<div class=\"cards\">\n{cards}</div>\n</section>\n",
        escape(&model.name),
        escape(&replaced)
    )
}

fn interval(share: &Share) -> String {
    format!("{:.0} to {:.0} %", 100.0 * share.low, 100.0 * share.high)
}

/// Everything measured, one column for each model.
pub(super) fn numbers(report: &Report) -> String {
    let models: Vec<&ModelReport> = std::iter::once(&report.baseline)
        .chain(&report.models)
        .collect();
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut row = |name: &str, value: &dyn Fn(&ModelReport) -> Option<String>| {
        let values: Vec<Option<String>> = models.iter().map(|m| value(m)).collect();
        if values.iter().any(Option::is_some) {
            let values = values
                .into_iter()
                .map(|v| v.unwrap_or_else(|| "–".to_owned()));
            rows.push((name.to_owned(), values.collect()));
        }
    };
    row("blocks replaced", &|m| {
        Some(format!("{} of {}", m.replaced.len(), m.blocks))
    });
    row("parameters", &|m| Some(ui::count(m.parameters as f64)));
    row("file size", &|m| Some(ui::bytes(m.bytes as f64)));
    row("arithmetic per step", &|m| {
        Some(ui::flops(m.flops_per_step as f64))
    });
    row("time per step", &|m| {
        let t = &m.step;
        let text = format!(
            "{:.2} ms\n{:.2} to {:.2}",
            1e3 * t.median,
            1e3 * t.low,
            1e3 * t.high
        );
        Some(text)
    });
    row("time per image", &|m| {
        Some(format!("{:.3} s", m.image_seconds))
    });
    row("speed-up", &|m| m.speed_up.map(|s| format!("{s:.2}×")));
    row("peak memory while measuring", &|m| {
        m.peak_memory.host.map(|b| ui::bytes(b as f64))
    });
    row("peak device memory while measuring", &|m| {
        m.peak_memory.device.map(|b| ui::bytes(b as f64))
    });
    let distance =
        |m: &ModelReport, f: fn(&Distances) -> String| m.against_baseline.as_ref().map(f);
    row("velocity error", &|m| {
        distance(m, |d| format!("{:.5}", d.velocity.error))
    });
    row("latent MSE", &|m| distance(m, |d| spread(&d.latent_mse, 4)));
    row("PSNR, dB", &|m| distance(m, |d| spread(&d.psnr, 2)));
    row("SSIM", &|m| distance(m, |d| spread(&d.ssim, 4)));
    row("LPIPS", &|m| {
        let lpips = m.against_baseline.as_ref()?.lpips.as_ref()?;
        Some(spread(lpips, 4))
    });
    type Criterion = fn(&PromptFollowing) -> Share;
    let criteria: [(&str, Criterion); 7] = [
        ("prompts followed", |p| p.ok),
        ("… background", |p| p.background),
        ("… number of objects", |p| p.count),
        ("… shapes", |p| p.shapes),
        ("… colours", |p| p.colours),
        ("… colours bound to shapes", |p| p.bound),
        ("… positions", |p| p.position),
    ];
    for (name, criterion) in criteria {
        row(name, &|m| {
            let share = m.prompt_following.as_ref().map(criterion)?;
            Some(format!(
                "{:.1} %\n{}",
                100.0 * share.share,
                interval(&share)
            ))
        });
    }
    row("CLIP score", &|m| {
        m.clip_score.as_ref().map(|s| spread(s, 2))
    });
    let head: String = models
        .iter()
        .map(|m| format!("<th>{}</th>", escape(&m.name)))
        .collect();
    let body: String = rows
        .iter()
        .map(|(name, values)| {
            let cells: String = values.iter().map(|v| cell(v)).collect();
            format!("<tr><th>{}</th>{cells}</tr>\n", escape(name))
        })
        .collect();
    format!(
        "<div class=\"wide\"><table>\n<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n\
         <p class=\"note\">Distances are to the baseline's images and velocities: mean ± standard deviation, and the extremes; of shares, the 95 % confidence interval. \
         Times are medians with quartiles, {timed}; an image is all steps and decoding, without its text encoding. \
         Memory is the largest while the transformer was loaded and drew, parts of mapped files included.</p>",
        timed = escape(&report.settings.timed)
    )
}

/// A table cell; what follows a line break is small print.
fn cell(text: &str) -> String {
    match text.split_once('\n') {
        Some((value, detail)) => {
            format!(
                "<td>{}<small>{}</small></td>",
                escape(value),
                escape(detail)
            )
        }
        None => format!("<td>{}</td>", escape(text)),
    }
}

fn spread(s: &Summary, digits: usize) -> String {
    format!(
        "{:.digits$}\n± {:.digits$}, {:.digits$} to {:.digits$}",
        s.mean, s.deviation, s.least, s.most
    )
}
