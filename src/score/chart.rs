//! A chart of all scores as SVG: importance of every block, its change by stream, and its change by noise level.

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use super::{BlockScore, Metric, Scores};
use crate::layout::BlockKind;

const DOUBLE: RGBColor = RGBColor(0x2f, 0x6f, 0xb5);
const SINGLE: RGBColor = RGBColor(0xd9, 0x7b, 0x29);
const TEXT: RGBColor = RGBColor(0x7a, 0x4f, 0xa8);
const IMAGE: RGBColor = RGBColor(0x2e, 0x8b, 0x6f);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The chart as the text of an SVG file.
///
/// # Errors
/// When there is no block to draw.
pub fn svg(scores: &Scores) -> Result<String> {
    if scores.blocks.is_empty() {
        return Err(anyhow!("there is no block to draw"));
    }
    let width = (220 + 22 * scores.blocks.len()).clamp(640, 1600) as u32;
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, (width, 900)).into_drawing_area();
        let failed = |e: &dyn std::fmt::Display| anyhow!("cannot draw the chart: {e}");
        root.fill(&WHITE).map_err(|e| failed(&e))?;
        let panels = root.split_evenly((3, 1));
        bars(&panels[0], scores).map_err(|e| failed(&e))?;
        streams(&panels[1], scores).map_err(|e| failed(&e))?;
        times(&panels[2], scores).map_err(|e| failed(&e))?;
        root.present().map_err(|e| failed(&e))?;
    }
    Ok(text)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn meaning(metric: Metric) -> &'static str {
    match metric {
        Metric::Ablation => "error of the final velocity with the block replaced by its linear fit",
        Metric::Removal => "error of the final velocity with the block removed",
        Metric::RelativeChange => "‖y − x‖ / ‖x‖",
        Metric::Cosine => "1 − cos(x, y)",
        Metric::FitError => "share of the change that a linear layer leaves, 1 − R²",
        Metric::FitResidual => "squared change per token that a linear layer leaves",
    }
}

/// The metric that was asked for, or the first that is there.
fn shown(scores: &Scores) -> Metric {
    let has = |metric: &Metric| scores.blocks.iter().all(|b| b.scores.contains_key(metric));
    let first = Metric::ALL.into_iter().find(has);
    Some(scores.metric)
        .filter(has)
        .or(first)
        .unwrap_or_default()
}

/// Names below the bars: every block's where there is room, otherwise some.
fn name(blocks: &[BlockScore], position: f64) -> String {
    let index = position.round();
    let block = (index >= 0.0).then(|| blocks.get(index as usize)).flatten();
    block.map_or_else(String::new, |block| {
        let kind = match block.block.kind {
            BlockKind::Double => 'd',
            BlockKind::Single => 's',
        };
        format!("{kind}{}", block.block.index)
    })
}

fn bars(panel: &Panel, scores: &Scores) -> Drawn {
    let (blocks, metric) = (&scores.blocks, shown(scores));
    let values: Vec<f64> = blocks
        .iter()
        .map(|b| b.scores.get(&metric).copied().unwrap_or_default())
        .collect();
    let positive = |v: &&f64| **v > 0.0 && v.is_finite();
    let least = values
        .iter()
        .filter(positive)
        .copied()
        .fold(f64::INFINITY, f64::min);
    let most = values.iter().filter(positive).copied().fold(0.0, f64::max);
    let (least, most) = if most > 0.0 {
        (least * 0.6, most * 1.4)
    } else {
        (0.1, 1.0)
    };
    let caption = format!("{metric}: {}", meaning(metric));
    let mut chart = ChartBuilder::on(panel)
        .caption(caption, ("sans-serif", 17))
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.7..blocks.len() as f64 - 0.3, (least..most).log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(blocks.len().min(60))
        .x_label_formatter(&|x| name(blocks, *x))
        .y_label_formatter(&|y| format!("{y:.1e}"))
        .draw()?;
    for (kind, color, label) in [
        (BlockKind::Double, DOUBLE, "double-stream blocks"),
        (BlockKind::Single, SINGLE, "single-stream blocks"),
    ] {
        let bars = blocks.iter().zip(&values).enumerate();
        let bars = bars.filter(|(_, (block, value))| block.block.kind == kind && **value > 0.0);
        let bars = bars.map(|(i, (_, value))| {
            let corners = [(i as f64 - 0.38, least), (i as f64 + 0.38, *value)];
            Rectangle::new(corners, color.filled())
        });
        chart
            .draw_series(bars)?
            .label(label)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], color.filled()));
    }
    legend(&mut chart)
}

fn streams(panel: &Panel, scores: &Scores) -> Drawn {
    let blocks = &scores.blocks;
    let most = blocks
        .iter()
        .flat_map(|b| [b.txt.relative_change, b.img.relative_change])
        .filter(|v| v.is_finite())
        .fold(1e-6, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .caption(
            "relative change ‖y − x‖ / ‖x‖ of text and image tokens",
            ("sans-serif", 17),
        )
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.7..blocks.len() as f64 - 0.3, 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(blocks.len().min(60))
        .x_label_formatter(&|x| name(blocks, *x))
        .draw()?;
    type Value = fn(&BlockScore) -> f64;
    let lines: [(Value, RGBColor, &str); 2] = [
        (|b| b.txt.relative_change, TEXT, "text tokens"),
        (|b| b.img.relative_change, IMAGE, "image tokens"),
    ];
    for (value, color, label) in lines {
        let points: Vec<(f64, f64)> = blocks
            .iter()
            .enumerate()
            .map(|(i, block)| (i as f64, value(block)))
            .filter(|(_, y)| y.is_finite())
            .collect();
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 12, y)], color.stroke_width(2)));
        chart.draw_series(
            points
                .into_iter()
                .map(|p| Circle::new(p, 3, color.filled())),
        )?;
    }
    legend(&mut chart)
}

fn times(panel: &Panel, scores: &Scores) -> Drawn {
    let blocks = &scores.blocks;
    let most = blocks
        .iter()
        .flat_map(|b| b.timesteps.iter().map(|t| t.part.relative_change))
        .filter(|v| v.is_finite())
        .fold(1e-6, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .caption(
            "relative change by noise level (darker: more)",
            ("sans-serif", 17),
        )
        .margin(10)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.7..blocks.len() as f64 - 0.3, 0.0..1.0)?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(blocks.len().min(60))
        .x_label_formatter(&|x| name(blocks, *x))
        .y_desc("noise level t")
        .draw()?;
    let cells = blocks.iter().enumerate().flat_map(|(i, block)| {
        block.timesteps.iter().map(move |at| {
            // the square root shows differences among the small ones too
            let depth = (at.part.relative_change / most).clamp(0.0, 1.0).sqrt();
            let fade = |end: u8| (255.0 - depth * (255.0 - f64::from(end))) as u8;
            let color = RGBColor(fade(0x1b), fade(0x3a), fade(0x6b));
            let corners = [(i as f64 - 0.5, at.t - 0.05), (i as f64 + 0.5, at.t + 0.05)];
            Rectangle::new(corners, color.filled())
        })
    });
    chart.draw_series(cells)?;
    Ok(())
}

fn legend<'a, X, Y>(chart: &mut ChartContext<'a, SVGBackend<'a>, Cartesian2d<X, Y>>) -> Drawn
where
    X: Ranged<ValueType = f64>,
    Y: Ranged<ValueType = f64>,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        layout::BlockId,
        score::{AtTime, Part},
    };

    #[test]
    fn every_block_is_in_the_chart() {
        let block = |id: BlockId, value| BlockScore {
            block: id,
            scores: BTreeMap::from([(Metric::Ablation, value)]),
            txt: Part {
                relative_change: 0.5,
                ..Part::default()
            },
            img: Part {
                relative_change: 0.2,
                ..Part::default()
            },
            timesteps: vec![AtTime {
                t: 0.05,
                part: Part::default(),
            }],
        };
        let scores = Scores {
            model: "m".into(),
            source: String::new(),
            metric: Metric::Ablation,
            // a zero and a NaN must not break the logarithmic axis
            blocks: vec![
                block(BlockId::double(0), 0.3),
                block(BlockId::double(1), 0.0),
                block(BlockId::single(0), f64::NAN),
                block(BlockId::single(1), 0.01),
            ],
        };
        let svg = svg(&scores).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for name in ["d0", "d1", "s0", "s1", "ablation"] {
            assert!(svg.contains(name), "{name}");
        }
    }
}
