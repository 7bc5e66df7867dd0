//! The report as one HTML file that opens from disk: style, pictures and charts are inside, no script, no network.

use std::fmt::Write;

use anyhow::Result;

use super::{
    plot::{self, Curve},
    report::{ModelReport, Pair, Report},
};

mod numbers;

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
        out.push_str(&numbers::headline(model, report));
    }
    section(&mut out, "Numbers", &numbers::numbers(report));
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
