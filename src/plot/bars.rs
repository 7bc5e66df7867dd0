//! Scores of blocks: a bar for each, its change by stream, and its change by noise level.

use anyhow::{Result, ensure};
use plotters::prelude::RGBColor;

use super::{Area, Axis, COLOURS, Chart, Drawn, heading, number, svg};
use crate::layout::{BlockId, BlockKind};

/// Height of the three panels together, in pixels.
const HEIGHT: u32 = 900;
/// Names below the bars at most.
const MAX_NAMES: usize = 60;

/// The chart's data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockBars {
    /// What the bars show.
    pub title: String,
    /// In the order of the model.
    pub blocks: Vec<BlockBar>,
}

/// One block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockBar {
    /// Which one.
    pub block: BlockId,
    /// Height of its bar; one that is not above zero has none.
    pub value: f64,
    /// Relative change of text tokens, ‖y − x‖ / ‖x‖.
    pub text_change: f64,
    /// Relative change of image tokens.
    pub image_change: f64,
    /// Noise level in \[0, 1\] and relative change there.
    pub change_by_time: Vec<(f64, f64)>,
}

/// The chart as the text of an SVG file.
///
/// # Errors
/// When there is no block to draw.
pub fn svg_of(bars: &BlockBars) -> Result<String> {
    ensure!(!bars.blocks.is_empty(), "there is no block to draw");
    let width = (220 + 22 * bars.blocks.len()).clamp(640, 1600) as u32;
    svg((width, HEIGHT), true, |root| {
        let panels = root.split_evenly((3, 1));
        values(&panels[0], bars)?;
        streams(&panels[1], bars)?;
        times(&panels[2], bars)
    })
}

/// Names of the blocks: all of them if there is room, otherwise every n-th.
fn names(bars: &BlockBars) -> Axis {
    let every = bars.blocks.len().div_ceil(MAX_NAMES);
    let names = bars.blocks.iter().enumerate().map(|(i, bar)| {
        let kind = match bar.block.kind {
            BlockKind::Double => 'd',
            BlockKind::Single => 's',
        };
        if i % every == 0 {
            format!("{kind}{}", bar.block.index)
        } else {
            String::new()
        }
    });
    Axis::names(names.collect())
}

fn values(panel: &Area, bars: &BlockBars) -> Drawn {
    let kinds = [
        (BlockKind::Double, "double-stream blocks", COLOURS[0]),
        (BlockKind::Single, "single-stream blocks", COLOURS[1]),
    ];
    let legend = kinds.map(|(_, name, colour)| (name, colour));
    let below = heading(panel, &bars.title, &legend)?;
    let y = Axis::log("", bars.blocks.iter().map(|b| b.value), 1.5);
    let base = y.low;
    let mut chart = Chart::new(&below, names(bars), y)?;
    for (kind, _, colour) in kinds {
        for (i, bar) in (0..).zip(&bars.blocks) {
            if bar.block.kind == kind && bar.value > 0.0 && bar.value.is_finite() {
                let at = f64::from(i);
                chart.fill([(at - 0.38, base), (at + 0.38, bar.value)], colour)?;
            }
        }
    }
    Ok(())
}

fn streams(panel: &Area, bars: &BlockBars) -> Drawn {
    type Value = fn(&BlockBar) -> f64;
    let lines: [(Value, &str, RGBColor); 2] = [
        (|b| b.text_change, "text tokens", COLOURS[3]),
        (|b| b.image_change, "image tokens", COLOURS[2]),
    ];
    let legend = lines.map(|(_, name, colour)| (name, colour));
    let title = "relative change ‖y − x‖ / ‖x‖ of text and image tokens";
    let below = heading(panel, title, &legend)?;
    let all = bars
        .blocks
        .iter()
        .flat_map(|b| [b.text_change, b.image_change]);
    let most = all.filter(|v| v.is_finite()).fold(1e-6, f64::max);
    let mut chart = Chart::new(&below, names(bars), Axis::linear("", 0.0, most * 1.05))?;
    for (value, _, colour) in lines {
        let values = bars.blocks.iter().map(value);
        let points: Vec<(f64, f64)> = (0..).zip(values).map(|(i, y)| (f64::from(i), y)).collect();
        chart.line(&points, colour, 2)?;
        chart.dots(&points, colour)?;
    }
    Ok(())
}

fn times(panel: &Area, bars: &BlockBars) -> Drawn {
    let all = bars.blocks.iter().flat_map(|b| &b.change_by_time);
    let all = all.map(|(_, change)| *change).filter(|v| v.is_finite());
    let most = all.fold(1e-6, f64::max);
    let most_text = format!("{most:.2} (the most)");
    let none = number(0.0);
    let legend = [
        (none.as_str(), depth(0.0)),
        ("", depth(0.25)),
        ("", depth(0.5)),
        (most_text.as_str(), depth(1.0)),
    ];
    let below = heading(panel, "relative change by noise level", &legend)?;
    let y = Axis::linear("noise level t", 0.0, 1.0);
    let mut chart = Chart::new(&below, names(bars), y)?;
    for (i, bar) in (0..).zip(&bars.blocks) {
        let at = f64::from(i);
        for (t, change) in &bar.change_by_time {
            // the square root shows differences among the small ones too
            let share = (change / most).clamp(0.0, 1.0).sqrt();
            let corners = [(at - 0.5, t - 0.05), (at + 0.5, t + 0.05)];
            chart.fill(corners, depth(share))?;
        }
    }
    Ok(())
}

/// From almost white to dark blue.
fn depth(share: f64) -> RGBColor {
    let fade =
        |start: u8, end: u8| (f64::from(start) + share * (f64::from(end) - f64::from(start))) as u8;
    RGBColor(fade(0xf4, 0x1b), fade(0xf7, 0x3a), fade(0xfb, 0x6b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_in_the_chart() {
        let bar = |block: BlockId, value| BlockBar {
            block,
            value,
            text_change: 0.5,
            image_change: 0.2,
            change_by_time: vec![(0.05, 0.1), (0.15, f64::NAN)],
        };
        let bars = BlockBars {
            title: "ablation: error".to_owned(),
            // a zero and a NaN must not break the logarithmic axis
            blocks: vec![
                bar(BlockId::double(0), 0.3),
                bar(BlockId::double(1), 0.0),
                bar(BlockId::single(0), f64::NAN),
                bar(BlockId::single(1), 0.01),
            ],
        };
        let svg = svg_of(&bars).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for name in ["d0", "d1", "s0", "s1", "ablation", "noise level"] {
            assert!(svg.contains(name), "{name}");
        }
        assert!(!svg.contains("NaN"));
        assert!(svg_of(&BlockBars::default()).is_err());
    }
}
