//! Losses of a training over its steps, phase after phase, on one logarithmic axis.

use anyhow::Result;
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Axis, COLOURS, Chart, Drawn, LABEL, MUTED, font, heading, legend::width_of, svg};

/// Width and height in pixels.
const SIZE: (u32, u32) = (960, 440);
/// Points drawn of one curve at most; more would be as wide as a pixel.
const MAX_POINTS: usize = 1200;
/// Width of the plot in pixels, for the names of phases.
const PLOT_WIDTH: f64 = 860.0;
/// How far names may reach over its ends.
const MARGINS: f64 = 14.0;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossPoint<'a> {
    /// Name of the phase.
    pub phase: &'a str,
    /// Step of the phase.
    pub step: usize,
    /// Training loss.
    pub loss: Option<f64>,
    /// Held-out loss, if it was taken.
    pub held_out: Option<f64>,
}

/// One phase: where it starts and how long it is, in steps.
struct Phase<'a> {
    name: &'a str,
    start: f64,
    length: f64,
    points: Vec<&'a LossPoint<'a>>,
}

fn phases<'a>(log: &'a [LossPoint<'a>]) -> Vec<Phase<'a>> {
    let mut out: Vec<Phase> = Vec::new();
    for point in log {
        let step = point.step as f64;
        match out.last_mut() {
            Some(phase) if phase.name == point.phase => {
                phase.length = phase.length.max(step);
                phase.points.push(point);
            }
            last => {
                let start = last.map_or(0.0, |phase| phase.start + phase.length);
                out.push(Phase {
                    name: point.phase,
                    start,
                    length: step.max(1.0),
                    points: vec![point],
                });
            }
        }
    }
    out
}

/// Training and held-out losses of all phases, one after another.
///
/// # Errors
/// When drawing fails.
pub fn svg_of(log: &[LossPoint]) -> Result<String> {
    let phases = phases(log);
    let total = phases.last().map_or(1.0, |p| p.start + p.length);
    let values = || log.iter().flat_map(|p| [p.loss, p.held_out]).flatten();
    let legend = [("training loss", MUTED), ("held-out loss", COLOURS[0])];
    svg(SIZE, true, |root| {
        let below = heading(root, "Losses by step, phase after phase", &legend)?;
        // room for the names of phases
        let below = below.margin(14, 0, 0, 0);
        let x = Axis::linear("steps of all phases", 0.0, total);
        let mut chart = Chart::new(&below, x, Axis::log("loss", values(), 1.12))?;
        let mut named = -MARGINS;
        for phase in &phases {
            let curve = |value: fn(&LossPoint) -> Option<f64>| {
                let points = phase.points.iter();
                let points = points.filter_map(|p| Some((phase.start + p.step as f64, value(p)?)));
                thinned(points.collect())
            };
            chart.line(&curve(|p| p.loss), MUTED, 1)?;
            chart.line(&curve(|p| p.held_out), COLOURS[0], 2)?;
            // names that would run into each other or over the end are short, or left out
            let middle = (phase.start + phase.length / 2.0) / total * PLOT_WIDTH;
            let half = |name: &String| f64::from(width_of(name)) / 2.0 + 4.0;
            let fits = |name: &String| {
                let half = half(name);
                middle - half > named && middle + half < PLOT_WIDTH + MARGINS
            };
            let name = [phase.name.to_owned(), short(phase.name)]
                .into_iter()
                .find(fits);
            if let Some(name) = &name {
                named = middle + half(name);
            }
            boundary(&mut chart, phase, name)?;
        }
        Ok(())
    })
}

/// `double.01 +2` of a phase with a layer that stands for three blocks.
fn short(phase: &str) -> String {
    match phase.split_once('+') {
        Some((first, rest)) => format!("{first} +{}", rest.split('+').count()),
        None => phase.to_owned(),
    }
}

/// A line at the end of a phase, and its name above, if there is room for it.
fn boundary(chart: &mut Chart, phase: &Phase, name: Option<String>) -> Drawn {
    let (low, high) = (chart.y.low, chart.y.high);
    let end = phase.start + phase.length;
    let line = PathElement::new([(end, low), (end, high)], BLACK.mix(0.25));
    chart.context.draw_series(std::iter::once(line))?;
    if let Some(name) = name {
        let style = font(LABEL).pos(Pos::new(HPos::Center, VPos::Bottom));
        let (x, y) = chart
            .context
            .backend_coord(&(phase.start + phase.length / 2.0, high));
        let area = chart.context.plotting_area().strip_coord_spec();
        let (left, top) = area.get_base_pixel();
        area.draw(&Text::new(name, (x - left, y - top - 4), style))?;
    }
    Ok(())
}

fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let every = points.len().div_ceil(MAX_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points.into_iter().enumerate();
    kept.filter(|(i, _)| i % every == 0 || *i == last)
        .map(|(_, point)| point)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_curves_and_nothing_breaks_on_an_empty_log() {
        let point = |phase, step: usize, loss| LossPoint {
            phase,
            step,
            loss: Some(loss),
            held_out: step.is_multiple_of(2).then_some(loss * 1.1),
        };
        let mut log = Vec::new();
        for step in 1..7 {
            log.push(point("double.01", step, 0.1 / step as f64));
        }
        for step in 1..5 {
            log.push(point("a < b", step, 0.01 / step as f64));
        }
        log.push(point("a < b", 5, f64::NAN));
        let svg = svg_of(&log).unwrap();
        // of each phase the training loss and the held-out loss; axes and marks are black
        let lines = svg.lines().filter(|line| line.starts_with("<polyline"));
        let curves = lines.filter(|line| !line.contains("#000000"));
        assert_eq!(curves.count(), 4, "{svg}");
        assert!(!svg_of(&[]).unwrap().contains("NaN"));
        assert!(svg.contains("double.01") && svg.contains("a &lt; b") && !svg.contains("NaN"));
        assert_eq!(
            phases(&log)
                .iter()
                .map(|p| (p.start, p.length))
                .collect::<Vec<_>>(),
            [(0.0, 6.0), (6.0, 5.0)]
        );
    }

    #[test]
    fn names_of_phases_that_have_no_room_are_short() {
        let names = [
            "double.01+double.02+double.03+double.04+double.05",
            "single.00",
            "finetune",
        ];
        let point = |phase, step: usize| LossPoint {
            phase,
            step,
            loss: Some(0.1),
            held_out: None,
        };
        let log: Vec<_> = names
            .into_iter()
            .flat_map(|name| [point(name, 1), point(name, 2)])
            .collect();
        let svg = svg_of(&log).unwrap();
        assert!(
            svg.contains("double.01 +4") && svg.contains("single.00"),
            "{svg}"
        );
        assert!(
            svg_of(&log[..2]).unwrap().contains(names[0]),
            "it has all the room"
        );
    }

    #[test]
    fn long_curves_keep_their_ends() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (i.into(), 1.0)).collect();
        let thin = thinned(points.clone());
        assert!(thin.len() <= MAX_POINTS + 1);
        assert_eq!((thin[0], thin[thin.len() - 1]), (points[0], points[9999]));
    }
}
