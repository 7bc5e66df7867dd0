//! Losses over steps as an SVG picture: what happened in every phase, on one logarithmic axis.

use std::fmt::Write;

use super::Entry;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
/// Around the plot: left, top, right, bottom.
const MARGIN: [f64; 4] = [70.0, 40.0, 20.0, 50.0];
/// Points drawn of one curve at most; more would be as wide as a pixel.
const POINTS: usize = 1200;

/// Training loss (grey) and held-out loss (blue) of all phases side by side.
pub fn losses(log: &[Entry]) -> String {
    let mut phases: Vec<(&str, Vec<&Entry>)> = Vec::new();
    for entry in log {
        match phases.last_mut() {
            Some((name, entries)) if *name == entry.phase => entries.push(entry),
            _ => phases.push((&entry.phase, vec![entry])),
        }
    }
    let values = log.iter().flat_map(|e| [e.loss, e.held_out]).flatten();
    let logs = values.filter(|v| v.is_finite() && *v > 0.0).map(f64::log10);
    let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let (low, high) = if low.is_finite() {
        (low - 0.05, high + 0.05)
    } else {
        (-1.0, 0.0)
    };
    let lengths: Vec<usize> = phases
        .iter()
        .map(|(_, entries)| entries.iter().map(|e| e.step).max().unwrap_or(0).max(1))
        .collect();
    let total = lengths.iter().sum::<usize>().max(1) as f64;
    let [left, top, right, bottom] = MARGIN;
    let x = |step: f64| left + step / total * (WIDTH - left - right);
    let y = |value: f64| {
        let share = (value.max(f64::MIN_POSITIVE).log10() - low) / (high - low);
        HEIGHT - bottom - share * (HEIGHT - top - bottom)
    };

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (value, label) in ticks(low, high) {
        let at = y(value);
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            WIDTH - right,
            left - 6.0,
            at + 4.0
        );
    }
    let mut start = 0.0;
    for ((name, entries), length) in phases.iter().zip(&lengths) {
        let end = start + *length as f64;
        let _ = writeln!(
            svg,
            "<line x1=\"{:.1}\" y1=\"{top}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#bbb\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(end),
            x(end),
            HEIGHT - bottom,
            x(f64::midpoint(start, end)),
            top - 10.0,
            escape(name)
        );
        let curve = |value: fn(&Entry) -> Option<f64>| -> Vec<(f64, f64)> {
            let points = entries.iter().filter_map(|e| {
                let value = value(e).filter(|v| v.is_finite() && *v > 0.0)?;
                Some((x(start + e.step as f64), y(value)))
            });
            points.collect()
        };
        line(&mut svg, &curve(|e| e.loss), "#aaa", 1.0);
        line(&mut svg, &curve(|e| e.held_out), "#1f6fb4", 2.0);
        start = end;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">steps (all {total:.0}); grey: training loss, blue: held-out loss</text>\n</svg>",
        f64::midpoint(left, WIDTH - right),
        HEIGHT - 16.0
    );
    svg
}

fn line(svg: &mut String, points: &[(f64, f64)], colour: &str, width: f64) {
    let every = points.len().div_ceil(POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let points: Vec<String> = points
        .iter()
        .enumerate()
        .filter(|(i, _)| i % every == 0 || *i == last)
        .map(|(_, (x, y))| format!("{x:.1},{y:.1}"))
        .collect();
    if points.len() > 1 {
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\"/>",
            points.join(" ")
        );
    }
}

/// 1, 2 and 5 times powers of ten between two exponents.
fn ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let mut out = Vec::new();
    for exponent in low.floor() as i32..=high.ceil() as i32 {
        for digit in [1.0, 2.0, 5.0] {
            let value = digit * 10f64.powi(exponent);
            if (low..=high).contains(&value.log10()) {
                let label = if exponent < -3 {
                    format!("{value:.0e}")
                } else {
                    format!("{value}")
                };
                out.push((value, label));
            }
        }
    }
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_curves_and_nothing_breaks_on_no_log() {
        let entry = |phase: &str, step, loss| Entry {
            phase: phase.to_owned(),
            step,
            loss: Some(loss),
            held_out: (step % 2 == 0).then_some(loss * 1.1),
            lr: None,
            gradient: None,
        };
        let mut log = Vec::new();
        for step in 1..7 {
            log.push(entry("double.01", step, 0.1 / step as f64));
        }
        for step in 1..5 {
            log.push(entry("a < b", step, 0.01 / step as f64));
        }
        let svg = losses(&log);
        assert_eq!(svg.matches("<polyline").count(), 4, "{svg}");
        assert!(svg.contains("double.01") && svg.contains("a &lt; b"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(losses(&[]).ends_with("</svg>\n"));
    }
}
