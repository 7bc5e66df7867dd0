//! The report as one HTML file that opens from disk: style, images and charts are inside, no script, no network.

use std::fmt::Write;

use anyhow::Result;

use super::report::{ModelReport, Pair, Report};
use crate::{
    plot::curves::{self, Curve},
    ui,
};

mod encode;
mod numbers;
mod reading;

use encode::{base64, escape};

/// The frame of the page and its style.
const PAGE: &str = include_str!("report.html");

/// What a page shows in addition to the numbers.
#[derive(Clone, Debug, Default)]
pub(super) struct Assets {
    /// Pairs to show, worst first.
    pub(super) pairs: Vec<ShownPair>,
    /// Chart of block scores by model, as SVG.
    pub(super) scores: Vec<(String, String)>,
    /// Chart of training losses by model, as an SVG file.
    pub(super) losses: Vec<(String, Vec<u8>)>,
}

/// Images of one prompt, as PNG files.
#[derive(Clone, Debug)]
pub(super) struct ShownPair {
    /// Index in [`Report::pairs`].
    pub(super) index: usize,
    /// The baseline's, then one for each model.
    pub(super) images: Vec<Vec<u8>>,
}

/// The page.
///
/// # Errors
/// When a chart cannot be drawn.
pub(super) fn page(report: &Report, assets: &Assets) -> Result<String> {
    let names: Vec<&str> = report.models.iter().map(|m| m.name.as_str()).collect();
    let title = format!("{} next to {}", names.join(", "), report.baseline.name);
    let sections = sections(report, assets)?;
    // the sections last: what a prompt spells is no placeholder
    Ok(PAGE
        .replace("{title}", &escape(&title))
        .replace("{subtitle}", &escape(&subtitle(report)))
        .replace("{sections}", &sections))
}

fn sections(report: &Report, assets: &Assets) -> Result<String> {
    let mut out = String::new();
    for model in &report.models {
        out.push_str(&numbers::headline(model, report));
    }
    section(&mut out, "Numbers", &numbers::numbers(report));
    section(
        &mut out,
        "Which number says what",
        &reading::reading(report),
    );
    if let Some(chart) = frontier(report)? {
        let text =
            "Lower and further to the right is better. The baseline is at 1 and has no error.";
        let body = format!("<p>{text}</p>\n<div class=\"chart\">{chart}</div>");
        section(&mut out, "Error against speed-up", &body);
    }
    section(
        &mut out,
        "Before and after, worst first",
        &pairs(report, assets),
    );
    if let Some(chart) = by_time(report)? {
        let text = "Relative mean squared error of the velocity on the baseline's own images, noised to level t (0 is the image, 1 is noise).";
        let body = format!("<p>{text}</p>\n<div class=\"chart\">{chart}</div>");
        section(&mut out, "Error by noise level", &body);
    }
    for (name, svg) in &assets.scores {
        let body = format!("<div class=\"chart plate tall\">{svg}</div>");
        section(&mut out, &format!("Scores of blocks: {name}"), &body);
    }
    for (name, svg) in &assets.losses {
        let body = format!(
            "<div class=\"chart plate\"><img src=\"data:image/svg+xml;base64,{}\" alt=\"losses by step\"></div>",
            base64(svg)
        );
        section(&mut out, &format!("Training losses: {name}"), &body);
    }
    section(
        &mut out,
        "What the numbers are computed as",
        &reading::references(report),
    );
    section(&mut out, "How it was made", &made(report));
    Ok(out)
}

fn section(out: &mut String, title: &str, body: &str) {
    let _ = writeln!(
        out,
        "<section>\n<h2>{}</h2>\n{body}\n</section>",
        escape(title)
    );
}

fn subtitle(report: &Report) -> String {
    let s = &report.settings;
    format!(
        "{} ({}), {}×{} pixels, {}, guidance {}, the same noise for every model; {}",
        ui::counted(s.images, "prompt"),
        s.prompts,
        s.width,
        s.height,
        ui::counted(s.steps, "step"),
        s.guidance,
        s.runtime
    )
}

/// The images themselves.
fn pairs(report: &Report, assets: &Assets) -> String {
    let small = report.settings.width.max(report.settings.height) <= 128;
    let names: Vec<&str> = std::iter::once(&report.baseline)
        .chain(&report.models)
        .map(|m| m.name.as_str())
        .collect();
    let figures: String = assets
        .pairs
        .iter()
        .filter_map(|shown| Some(figure(report.pairs.get(shown.index)?, shown, &names)))
        .collect();
    let class = if small { "pairs small" } else { "pairs" };
    format!(
        "<p>{} of {}; from left to right {}. All numbers are in <code>report.json</code>.</p>\n<div class=\"{class}\">\n{figures}</div>",
        assets.pairs.len(),
        ui::counted(report.pairs.len(), "prompt"),
        escape(&names.join(", "))
    )
}

fn figure(pair: &Pair, shown: &ShownPair, names: &[&str]) -> String {
    let verdicts = std::iter::once(pair.baseline).chain(pair.models.iter().map(|m| m.verdict));
    let cells: String = shown
        .images
        .iter()
        .zip(names)
        .zip(verdicts)
        .enumerate()
        .map(|(i, ((png, name), verdict))| {
            let mark = match verdict {
                Some(v) if v.ok => "<span class=\"good\">✓</span> ",
                Some(_) => "<span class=\"bad\">✗</span> ",
                None => "",
            };
            let number = i.checked_sub(1).and_then(|i| pair.models.get(i));
            let text = number.map_or_else(
                || "before".to_owned(),
                |m| format!("{:.1} dB, SSIM {:.3}", m.psnr, m.ssim),
            );
            format!(
                "<div><img src=\"data:image/png;base64,{}\" alt=\"{}: {}\"><span>{mark}{text}</span></div>\n",
                base64(png),
                escape(name),
                escape(&pair.prompt)
            )
        })
        .collect();
    format!(
        "<figure><div class=\"row\">\n{cells}</div><figcaption>{} <span class=\"note\">seed {}</span></figcaption></figure>\n",
        escape(&pair.prompt),
        pair.seed
    )
}

/// Every model as a point: what it costs in velocity error, and what it brings. `None` with one model.
fn frontier(report: &Report) -> Result<Option<String>> {
    let point = |model: &ModelReport| {
        Some(Curve {
            name: model.name.clone(),
            points: vec![(
                model.speed_up?,
                model.against_baseline.as_ref()?.velocity.error,
            )],
        })
    };
    let points: Vec<Curve> = report.models.iter().filter_map(point).collect();
    if points.len() < 2 {
        return Ok(None);
    }
    curves::svg_of("speed-up", "velocity error", &points)
}

fn by_time(report: &Report) -> Result<Option<String>> {
    let curve = |model: &ModelReport| {
        let times = &model.against_baseline.as_ref()?.velocity.by_time;
        let seen = times.iter().filter(|t| t.noised_latents > 0);
        Some(Curve {
            name: model.name.clone(),
            points: seen
                .map(|t| (f64::midpoint(t.from, t.to), t.error))
                .collect(),
        })
    };
    let curves: Vec<Curve> = report.models.iter().filter_map(curve).collect();
    curves::svg_of("noise level t", "relative MSE", &curves)
}

/// Settings, machine and recipes.
fn made(report: &Report) -> String {
    let (s, m) = (&report.settings, &report.machine);
    let processor = m.processor.as_deref().unwrap_or("unknown processor");
    let mut facts = vec![
        ("program", report.tool.clone()),
        (
            "machine",
            format!(
                "{processor}, {}, {}",
                m.system,
                ui::counted(m.threads, "thread")
            ),
        ),
        ("computed on", s.runtime.clone()),
        ("prompts", format!("{}, {}", s.images, s.prompts)),
        (
            "noise",
            format!(
                "seeds {} to {}",
                s.seed,
                s.seed.wrapping_add(s.images.saturating_sub(1) as u64)
            ),
        ),
        (
            "tokens",
            format!("{} image, {} text", s.image_tokens, s.text_tokens),
        ),
    ];
    let models = std::iter::once(&report.baseline).chain(&report.models);
    facts.extend(models.map(|m| ("weights", format!("{}: {}", m.name, m.fingerprint))));
    let facts: String = facts
        .iter()
        .map(|(name, value)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(value)))
        .collect();
    let recipes: String = report
        .models
        .iter()
        .filter_map(|model| {
            let text = serde_json::to_string_pretty(model.recipe.as_ref()?).ok()?;
            Some(format!(
                "<details><summary>recipe of {}</summary><pre>{}</pre></details>\n",
                escape(&model.name),
                escape(&text)
            ))
        })
        .collect();
    format!("<dl>\n{facts}</dl>\n{recipes}")
}
