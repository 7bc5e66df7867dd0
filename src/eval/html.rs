//! The report as one HTML file that opens from disk: style, pictures and charts are inside, no script, no network.

use std::fmt::Write;

use anyhow::Result;

use super::{
    metrics::{Share, Summary},
    plot::{self, Curve},
    report::{ModelReport, Pair, Report},
};
use crate::ui;

const STYLE: &str = include_str!("report.css");

/// What a page shows beside the numbers.
#[derive(Clone, Debug, Default)]
pub struct Assets {
    /// Pairs to show, worst first.
    pub pairs: Vec<ShownPair>,
    /// Chart of block scores by model, as SVG.
    pub scores: Vec<(String, String)>,
    /// Training losses by model.
    pub losses: Vec<(String, Losses)>,
}

/// Pictures of one prompt, as PNG files.
#[derive(Clone, Debug)]
pub struct ShownPair {
    /// Index in [`Report::pairs`].
    pub index: usize,
    /// The baseline's, then one for each model.
    pub pictures: Vec<Vec<u8>>,
}

/// Losses of a training run.
#[derive(Clone, Debug)]
pub enum Losses {
    /// A finished chart.
    Svg(Vec<u8>),
    /// (step, loss), and (step, held-out loss).
    Log(Vec<(f64, f64)>, Vec<(f64, f64)>),
}

/// The page.
///
/// # Errors
/// When a chart cannot be drawn.
pub fn page(report: &Report, assets: &Assets) -> Result<String> {
    let names: Vec<&str> = report.models.iter().map(|m| m.name.as_str()).collect();
    let title = format!("{} beside {}", names.join(", "), report.baseline.name);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header><p class=\"kicker\">fastflux evaluation</p><h1>{title}</h1>\n<p>{sub}</p></header>\n",
        title = escape(&title),
        sub = escape(&subtitle(report)),
    );
    for model in &report.models {
        out.push_str(&headline(model, report));
    }
    section(&mut out, "Numbers", &numbers(report));
    section(
        &mut out,
        "Before and after, worst first",
        &pairs(report, assets),
    );
    if let Some(chart) = by_time(report)? {
        let text = "Relative mean squared error of the velocity on the baseline's own pictures, noised to level t (0 is the picture, 1 is noise).";
        let body = format!("<p>{text}</p>\n<div class=\"chart\">{chart}</div>");
        section(&mut out, "Error by noise level", &body);
    }
    for (name, svg) in &assets.scores {
        let body = format!("<div class=\"chart plate tall\">{svg}</div>");
        section(&mut out, &format!("Scores of blocks: {name}"), &body);
    }
    for (name, losses) in &assets.losses {
        if let Some(body) = losses_chart(losses)? {
            section(&mut out, &format!("Training losses: {name}"), &body);
        }
    }
    section(&mut out, "How it was made", &made(report));
    out.push_str("</main>\n</body>\n</html>\n");
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
        "{} prompts ({}), {}×{} pixels, {} steps, guidance {}, the same noise for every model; {}",
        s.pictures, s.prompts, s.width, s.height, s.steps, s.guidance, s.runtime
    )
}

fn percent(change: f64) -> String {
    let text = format!("{:+.1} %", 100.0 * change);
    text.replace('-', "−")
}

/// The numbers that decide, as cards.
fn headline(model: &ModelReport, report: &Report) -> String {
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
            format!("relative MSE, {} states", d.velocity.states),
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
    format!(
        "{:.0} to {:.0} % (95 %)",
        100.0 * share.low,
        100.0 * share.high
    )
}

/// Everything measured, one column for each model.
fn numbers(report: &Report) -> String {
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
    row("time per picture", &|m| {
        Some(format!("{:.3} s", m.picture_seconds))
    });
    row("speed-up", &|m| m.speed_up.map(|s| format!("{s:.2}×")));
    row("peak memory", &|m| {
        m.peak_memory.host.map(|b| ui::bytes(b as f64))
    });
    row("peak device memory", &|m| {
        m.peak_memory.device.map(|b| ui::bytes(b as f64))
    });
    let distance = |m: &ModelReport, f: fn(&super::report::Distances) -> String| {
        m.against_baseline.as_ref().map(f)
    };
    row("velocity error", &|m| {
        distance(m, |d| format!("{:.5}", d.velocity.error))
    });
    row("latent MSE", &|m| distance(m, |d| spread(&d.latent_mse, 4)));
    row("PSNR, dB", &|m| distance(m, |d| spread(&d.psnr, 2)));
    row("SSIM", &|m| distance(m, |d| spread(&d.ssim, 4)));
    type Criterion = fn(&super::report::PromptFollowing) -> Share;
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
         <p class=\"note\">Distances are to the baseline's pictures and velocities: mean ± standard deviation, and the extremes. \
         Times are medians with quartiles, {timed}; a picture is all steps and decoding, without its text encoding. \
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

/// The pictures themselves.
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
        "<p>{} of {} prompts; from left to right {}. All numbers are in <code>report.json</code>.</p>\n<div class=\"{class}\">\n{figures}</div>",
        assets.pairs.len(),
        report.pairs.len(),
        escape(&names.join(", "))
    )
}

fn figure(pair: &Pair, shown: &ShownPair, names: &[&str]) -> String {
    let verdicts = std::iter::once(pair.baseline).chain(pair.models.iter().map(|m| m.verdict));
    let cells: String = shown
        .pictures
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

fn by_time(report: &Report) -> Result<Option<String>> {
    let curve = |model: &ModelReport| {
        let times = &model.against_baseline.as_ref()?.velocity.by_time;
        let seen = times.iter().filter(|t| t.states > 0);
        Some(Curve {
            name: model.name.clone(),
            points: seen
                .map(|t| (f64::midpoint(t.from, t.to), t.error))
                .collect(),
        })
    };
    let curves: Vec<Curve> = report.models.iter().filter_map(curve).collect();
    plot::curves("noise level t", "relative MSE", &curves, true)
}

fn losses_chart(losses: &Losses) -> Result<Option<String>> {
    match losses {
        Losses::Svg(svg) => Ok(Some(format!(
            "<div class=\"chart plate\"><img src=\"data:image/svg+xml;base64,{}\" alt=\"losses by step\"></div>",
            base64(svg)
        ))),
        Losses::Log(train, held_out) => {
            let curve = |name: &str, points: &[(f64, f64)]| Curve {
                name: name.to_owned(),
                points: points.to_vec(),
            };
            let curves = [curve("training", train), curve("held out", held_out)];
            let chart = plot::curves("step", "loss", &curves, false)?;
            Ok(chart.map(|svg| format!("<div class=\"chart\">{svg}</div>")))
        }
    }
}

/// Settings, machine and recipes.
fn made(report: &Report) -> String {
    let (s, m) = (&report.settings, &report.machine);
    let processor = m.processor.as_deref().unwrap_or("unknown processor");
    let mut facts = vec![
        ("program", report.tool.clone()),
        (
            "machine",
            format!("{processor}, {}, {} threads", m.system, m.threads),
        ),
        ("computed on", s.runtime.clone()),
        ("prompts", format!("{}, {}", s.pictures, s.prompts)),
        (
            "noise",
            format!(
                "seeds {} to {}",
                s.seed,
                s.seed.wrapping_add(s.pictures.saturating_sub(1) as u64)
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

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three[..chunk.len()].copy_from_slice(chunk);
        let bits = u32::from_be_bytes([0, three[0], three[1], three[2]]);
        for i in 0..4 {
            if i <= chunk.len() {
                out.push(ALPHABET[(bits >> (18 - 6 * i)) as usize & 63] as char);
            } else {
                out.push('=');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xfe, 0xfd]), "//79");
    }

    #[test]
    fn names_cannot_break_out_of_the_page() {
        assert_eq!(
            escape("<a href=\"x\">&"),
            "&lt;a href=&quot;x&quot;&gt;&amp;"
        );
    }
}
