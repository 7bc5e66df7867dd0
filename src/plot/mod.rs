//! Draws plain data as SVG text: the one writer of all charts, with their axes, colours and legends.
//!
//! Charts have no background of their own unless they are files, so that a page can show them in its own colours.

use std::error::Error;

use anyhow::{Result, anyhow};
use plotters::{
    coord::{
        Shift,
        ranged1d::{DefaultFormatting, KeyPointHint},
    },
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

pub mod bars;
pub mod curves;
mod legend;
pub mod losses;

/// Colours of curves, in the order of their legends; readable on white and on black.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0x3b, 0x82, 0xd6),
    RGBColor(0xe0, 0x7b, 0x2c),
    RGBColor(0x2e, 0x9e, 0x78),
    RGBColor(0xb0, 0x5c, 0xc8),
    RGBColor(0xd0, 0x4a, 0x4a),
    RGBColor(0x8a, 0x8a, 0x2e),
    RGBColor(0x1a, 0xa8, 0xb8),
    RGBColor(0x9a, 0x6a, 0x4a),
    RGBColor(0xd8, 0x6f, 0xa8),
    RGBColor(0x66, 0x70, 0xc8),
    RGBColor(0x6c, 0xa8, 0x3a),
    RGBColor(0x70, 0x80, 0x90),
];
/// Colour of what is context for the other curves.
const MUTED: RGBColor = RGBColor(0x9a, 0xa0, 0xa6);

/// Sizes of letters, in pixels.
const TITLE: i32 = 15;
const LABEL: i32 = 12;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;
type Coord = Cartesian2d<Axis, Axis>;

/// An SVG of this size in pixels; `draw` draws into it.
fn svg(size: (u32, u32), plate: bool, draw: impl FnOnce(&Area) -> Drawn) -> Result<String> {
    let mut text = String::new();
    let all = |text: &mut String| -> Drawn {
        let root = SVGBackend::with_string(text, size).into_drawing_area();
        if plate {
            root.fill(&WHITE)?;
        }
        draw(&root)?;
        root.present()?;
        Ok(())
    };
    all(&mut text).map_err(|e| anyhow!("cannot draw the chart: {e}"))?;
    Ok(text)
}

fn font(size: i32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&BLACK.mix(0.8))
}

/// Draws a title and a legend above, and returns the area below them.
fn heading<'a>(
    area: &Area<'a>,
    title: &str,
    legend: &[(&str, RGBColor)],
) -> Result<Area<'a>, Box<dyn Error>> {
    let mut height = 0;
    if !title.is_empty() {
        let style = ("sans-serif", TITLE).into_font().color(&BLACK);
        area.draw(&Text::new(title.to_owned(), (MARGIN, 8), style))?;
        height += TITLE + 10;
    }
    if !legend.is_empty() {
        let style = font(LABEL).pos(Pos::new(HPos::Left, VPos::Center));
        let names: Vec<&str> = legend.iter().map(|(name, _)| *name).collect();
        let width = area.dim_in_pixel().0 as i32;
        for ((x, row, name), (_, colour)) in legend::places(&names, width).into_iter().zip(legend) {
            let y = height + 13 + row * legend::ROW;
            let swatch = [(x, y - 4), (x + 14, y + 4)];
            area.draw(&Rectangle::new(swatch, colour.filled()))?;
            area.draw(&Text::new(name, (x + legend::SWATCH, y), style.clone()))?;
        }
        height += legend::height(&names, width);
    }
    Ok(area.margin(height, 0, 0, 0))
}

/// Left of titles and legends, in pixels.
const MARGIN: i32 = 14;
/// Marks of a logarithmic axis at least; with fewer the values between cannot be read.
const MIN_MARKS: usize = 3;

/// Numbers that an axis has a place for: beyond them marks and logarithms are of no use.
const SMALLEST: f64 = 1e-30;
const LARGEST: f64 = 1e30;

/// How values of an axis map to places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scale {
    Linear,
    Log,
}

/// One axis: its range and its marks, in the values of the data.
#[derive(Clone, Debug)]
struct Axis {
    name: String,
    scale: Scale,
    low: f64,
    high: f64,
    marks: Vec<(f64, String)>,
}

impl Axis {
    /// From `low` to `high`, with round marks.
    fn linear(name: &str, low: f64, high: f64) -> Self {
        let marks = linear_marks(low, high);
        Self {
            name: name.to_owned(),
            scale: Scale::Linear,
            low,
            high,
            marks: marks.into_iter().map(|m| (m, number(m))).collect(),
        }
    }

    /// A logarithmic axis around the values above zero, `around` times wider at each end; 0.1 to 1 if there are none.
    fn log(name: &str, values: impl Iterator<Item = f64>, around: f64) -> Self {
        let values = values.filter(|v| (SMALLEST..=LARGEST).contains(v));
        let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        let (low, high) = if high > 0.0 {
            (low / around, high * around)
        } else {
            (0.1, 1.0)
        };
        let mut marks = log_marks(low, high);
        if marks.len() < MIN_MARKS {
            marks = linear_marks(low, high);
        }
        Self {
            name: name.to_owned(),
            scale: Scale::Log,
            low,
            high,
            marks: marks.into_iter().map(|m| (m, number(m))).collect(),
        }
    }

    /// Marks at 0, 1, 2 … with these names.
    fn names(names: Vec<String>) -> Self {
        Self {
            name: String::new(),
            scale: Scale::Linear,
            low: -0.7,
            high: names.len() as f64 - 0.3,
            marks: names
                .into_iter()
                .enumerate()
                .map(|(i, name)| (i as f64, name))
                .collect(),
        }
    }

    /// The mark's label, or nothing between marks.
    fn label(&self, value: f64) -> String {
        let mark = self
            .marks
            .iter()
            .find(|(mark, _)| mark.total_cmp(&value).is_eq());
        mark.map_or_else(String::new, |(_, label)| label.clone())
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let share = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        // 0 on a logarithmic axis is infinitely far down; a screen further on is far enough
        start + (share.clamp(-1.0, 2.0) * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.marks.iter().map(|(mark, _)| *mark).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

/// 1, 2 and 5 times powers of ten; powers of ten alone if there would be many.
fn log_marks(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high / low > 200.0 {
        &[1.0]
    } else {
        &[1.0, 2.0, 5.0]
    };
    let powers = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|mark| (low..=high).contains(mark)).collect()
}

/// Four to nine multiples of 1, 2 or 5 times a power of ten; none of an empty range.
fn linear_marks(low: f64, high: f64) -> Vec<f64> {
    if high <= low {
        return Vec::new();
    }
    let rough = ((high - low) / 6.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let range = (low / step).ceil() as i64..=(high / step).floor() as i64;
    range.map(|i| i as f64 * step).collect()
}

/// As people write it: 0.02, 150, 3e-5.
fn number(value: f64) -> String {
    if value != 0.0 && !(1e-3..1e5).contains(&value.abs()) {
        return format!("{value:.0e}");
    }
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    text.to_owned()
}

/// Two axes to draw between.
struct Chart<'a> {
    context: ChartContext<'a, SVGBackend<'a>, Coord>,
    y: Axis,
}

impl<'a> Chart<'a> {
    fn new(area: &Area<'a>, x: Axis, y: Axis) -> Result<Self, Box<dyn Error>> {
        let below = if x.name.is_empty() { 24 } else { 40 };
        let mut context = ChartBuilder::on(area)
            .margin(8)
            .margin_right(14)
            .x_label_area_size(below)
            .y_label_area_size(64)
            .build_cartesian_2d(x.clone(), y.clone())?;
        context
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.4))
            .label_style(font(LABEL))
            .axis_desc_style(font(LABEL + 1))
            .x_desc(&x.name)
            .y_desc(&y.name)
            .x_label_formatter(&|value| x.label(*value))
            .y_label_formatter(&|value| y.label(*value))
            .draw()?;
        Ok(Self { context, y })
    }

    /// The points that can be shown.
    fn shown<'p>(&self, points: &'p [(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + use<'p> {
        let positive = self.y.scale == Scale::Log;
        let finite = |(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        let points = points.iter().copied().filter(finite);
        points.filter(move |(_, y)| !positive || *y > 0.0)
    }

    fn line(&mut self, points: &[(f64, f64)], colour: RGBColor, width: u32) -> Drawn {
        let series = LineSeries::new(self.shown(points), colour.stroke_width(width));
        self.context.draw_series(series)?;
        Ok(())
    }

    fn dots(&mut self, points: &[(f64, f64)], colour: RGBColor) -> Drawn {
        let dots = self.shown(points);
        let dots = dots.map(|point| Circle::new(point, 3, colour.filled()));
        self.context.draw_series(dots)?;
        Ok(())
    }

    /// A filled rectangle between two corners.
    fn fill(&mut self, corners: [(f64, f64); 2], colour: RGBColor) -> Drawn {
        let area = Rectangle::new(corners, colour.filled());
        self.context.draw_series(std::iter::once(area))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        assert_eq!(log_marks(0.3, 4.0), [0.5, 1.0, 2.0]);
        assert_eq!(log_marks(0.003, 40.0), [0.01, 0.1, 1.0, 10.0]);
        assert_eq!(linear_marks(0.0, 1.0), [0.0, 0.2, 0.4, 0.2 * 3.0, 0.8, 1.0]);
        assert_eq!(linear_marks(0.0, 900.0).len(), 5);
        assert_eq!(linear_marks(3.0, 3.0), Vec::<f64>::new());
    }

    #[test]
    fn numbers_are_written_short() {
        let written = [0.0, 0.02, 0.2 * 3.0, 150.0, 3e-5, 2e6].map(number);
        assert_eq!(written, ["0", "0.02", "0.6", "150", "3e-5", "2e6"]);
    }

    #[test]
    fn a_narrow_range_has_marks_too() {
        for (low, high) in [(0.0071, 0.0095), (0.3, 0.5), (1.1, 1.9), (0.01, 0.02)] {
            let axis = Axis::log("", [low, high].into_iter(), 1.0);
            assert!(axis.marks.len() >= MIN_MARKS, "{:?}", axis.marks);
            assert!(
                axis.marks
                    .iter()
                    .all(|(mark, _)| (low..=high).contains(mark))
            );
        }
    }

    #[test]
    fn what_lies_beyond_an_axis_stays_within_a_screen_of_it() {
        let log = Axis::log("", [1.0, 2.0].into_iter(), 1.1);
        let flat = Axis::linear("", 1.0, 1.0);
        for value in [0.0, -1.0, f64::MAX, f64::INFINITY, f64::NAN] {
            for axis in [&log, &flat] {
                let at = axis.map(&value, (300, 10));
                assert!((-600..=600).contains(&at), "{value} is drawn at {at}");
            }
        }
    }
}
