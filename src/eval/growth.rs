//! How time and memory of a step grow with picture size, blocks and batch: what was measured beside what is forecast.
//! Measuring is `commands::bench_growth`'s business.

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};
use serde::Serialize;

const MEASURED: RGBColor = RGBColor(0x2f, 0x6f, 0xb5);
const FORECAST: RGBColor = RGBColor(0xd9, 0x7b, 0x29);
const SIZE: (u32, u32) = (1260, 760);

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Sides of square pictures, in pixels.
    Size,
    /// Blocks of the model.
    Blocks,
    /// Pictures in a forward.
    Batch,
}

impl Axis {
    /// All of them, in the order of the chart.
    pub const ALL: [Self; 3] = [Self::Size, Self::Blocks, Self::Batch];

    fn name(self) -> &'static str {
        match self {
            Self::Size => "side of the picture, pixels",
            Self::Blocks => "blocks",
            Self::Batch => "pictures in a forward",
        }
    }
}

/// One step of one size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Which curve it is on.
    pub axis: Axis,
    /// Side of the picture, in pixels.
    pub size: usize,
    /// Image tokens of a picture.
    pub image_tokens: usize,
    /// Text tokens of a picture.
    pub text_tokens: usize,
    /// Blocks of the model.
    pub blocks: usize,
    /// Pictures in a forward.
    pub batch: usize,
    /// Floating-point operations.
    pub flops: u64,
    /// Median, in seconds; `None` where it was not measured.
    pub seconds: Option<f64>,
    /// Most memory of the process during the step, in bytes, mapped files left out; `None` where nobody says, and on
    /// devices with memory of their own.
    pub bytes: Option<u64>,
    /// What the process took before, weights, and the widest moment of a block, in bytes.
    pub forecast_bytes: u64,
    /// By the operations, at the speed of the point with the most of them; `None` until something was measured.
    pub forecast_seconds: Option<f64>,
}

impl Point {
    fn along(&self, axis: Axis) -> f64 {
        let value = match axis {
            Axis::Size => self.size,
            Axis::Blocks => self.blocks,
            Axis::Batch => self.batch,
        };
        value as f64
    }
}

/// Forecasts times from the point whose operations are the most: small ones are not bound by arithmetic.
pub fn forecast(points: &mut [Point]) {
    let measured = points.iter().filter_map(|p| Some((p.flops, p.seconds?)));
    let Some((flops, seconds)) = measured.max_by_key(|(flops, _)| *flops) else {
        return;
    };
    for point in points {
        point.forecast_seconds = Some(point.flops as f64 / flops as f64 * seconds);
    }
}

/// Time above, memory below, along each axis; both logarithmic.
///
/// # Errors
/// When there is no point to draw.
pub fn svg(points: &[Point], title: &str) -> Result<String> {
    if points.is_empty() {
        return Err(anyhow!("there is no point to draw"));
    }
    let mut text = String::new();
    let draw = |text: &mut String| -> Drawn {
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(title, ("sans-serif", 18))?;
        let panels = root.split_evenly((2, Axis::ALL.len()));
        for (axis, panel) in Axis::ALL.into_iter().zip(0..) {
            let mut along: Vec<&Point> = points.iter().filter(|p| p.axis == axis).collect();
            along.sort_by(|a, b| a.along(axis).total_cmp(&b.along(axis)));
            let seconds = Curves {
                axis,
                y: "seconds a step",
                measured: curve(&along, axis, |p| p.seconds),
                forecast: curve(&along, axis, |p| p.forecast_seconds),
            };
            let gigabytes = |bytes: u64| bytes as f64 / 1e9;
            let memory = Curves {
                axis,
                y: "memory, GB",
                measured: curve(&along, axis, |p| p.bytes.map(gigabytes)),
                forecast: curve(&along, axis, |p| Some(gigabytes(p.forecast_bytes))),
            };
            seconds.draw(&panels[panel])?;
            memory.draw(&panels[Axis::ALL.len() + panel])?;
        }
        root.present()?;
        Ok(())
    };
    draw(&mut text).map_err(|e| anyhow!("cannot draw the chart: {e}"))?;
    Ok(text)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn curve(points: &[&Point], axis: Axis, value: impl Fn(&Point) -> Option<f64>) -> Vec<(f64, f64)> {
    let points = points
        .iter()
        .filter_map(|p| Some((p.along(axis), value(p)?)));
    points.filter(|(x, y)| *x > 0.0 && *y > 0.0).collect()
}

/// 1, 2 and 5 times powers of ten; powers of ten alone where there would be many.
fn marks(low: f64, high: f64) -> Vec<f64> {
    let steps: &[f64] = if high / low > 200.0 {
        &[1.0]
    } else {
        &[1.0, 2.0, 5.0]
    };
    let powers = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
    all.filter(|mark| (low..=high).contains(mark)).collect()
}

/// One panel.
struct Curves {
    axis: Axis,
    y: &'static str,
    measured: Vec<(f64, f64)>,
    forecast: Vec<(f64, f64)>,
}

impl Curves {
    fn draw(&self, panel: &DrawingArea<SVGBackend, Shift>) -> Drawn {
        let all = || self.measured.iter().chain(&self.forecast);
        let range = |of: fn(&(f64, f64)) -> f64, around: f64| {
            let values = all().map(of);
            let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), v| {
                (low.min(v), high.max(v))
            });
            if high > 0.0 {
                low / around..high * around
            } else {
                0.1..1.0
            }
        };
        let mut at: Vec<f64> = all().map(|p| p.0).collect();
        at.sort_by(f64::total_cmp);
        at.dedup();
        let (across, up) = (range(|p| p.0, 1.12), range(|p| p.1, 1.5));
        let marks = marks(up.start, up.end);
        let mut chart = ChartBuilder::on(panel)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(66)
            .build_cartesian_2d(
                across.log_scale().base(2.0).with_key_points(at),
                up.log_scale().with_key_points(marks),
            )?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .label_style(("sans-serif", 13))
            .axis_desc_style(("sans-serif", 14))
            .x_desc(self.axis.name())
            .y_desc(self.y)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| {
                let places = (-y.log10()).ceil().max(0.0) as usize;
                format!("{y:.places$}")
            })
            .draw()?;
        let dashes = self.forecast.clone();
        chart
            .draw_series(LineSeries::new(dashes, FORECAST.stroke_width(2)))?
            .label("forecast")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], FORECAST.stroke_width(3)));
        chart
            .draw_series(LineSeries::new(
                self.measured.clone(),
                MEASURED.stroke_width(2),
            ))?
            .label("measured")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], MEASURED.stroke_width(3)));
        let dots = self.measured.iter();
        chart.draw_series(dots.map(|p| Circle::new(*p, 4, MEASURED.filled())))?;
        chart
            .configure_series_labels()
            .label_font(("sans-serif", 13))
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .position(SeriesLabelPosition::UpperLeft)
            .draw()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(axis: Axis, size: usize, flops: u64, seconds: Option<f64>) -> Point {
        Point {
            axis,
            size,
            image_tokens: size * size / 256,
            text_tokens: 8,
            blocks: 3,
            batch: 1,
            flops,
            seconds,
            bytes: seconds.map(|_| 2_000_000),
            forecast_bytes: 3_000_000,
            forecast_seconds: None,
        }
    }

    #[test]
    fn times_are_forecast_from_the_largest_that_was_measured() {
        let mut points = [
            point(Axis::Size, 256, 100, Some(0.5)),
            point(Axis::Size, 512, 400, Some(1.0)),
            point(Axis::Size, 1024, 4000, None),
        ];
        forecast(&mut points);
        let got: Vec<f64> = points.iter().filter_map(|p| p.forecast_seconds).collect();
        assert_eq!(got, [0.25, 1.0, 10.0]);
        let mut none = [point(Axis::Batch, 256, 100, None)];
        forecast(&mut none);
        assert_eq!(none[0].forecast_seconds, None);
    }

    #[test]
    fn marks_are_round_and_few() {
        assert_eq!(marks(0.3, 4.0), [0.5, 1.0, 2.0]);
        assert_eq!(marks(0.003, 40.0), [0.01, 0.1, 1.0, 10.0]);
    }

    #[test]
    fn the_chart_has_a_panel_for_time_and_memory_along_each_axis() {
        let mut points = vec![
            point(Axis::Size, 256, 100, Some(0.5)),
            point(Axis::Size, 2048, 400, None),
            point(Axis::Batch, 256, 100, Some(0.5)),
        ];
        forecast(&mut points);
        let svg = svg(&points, "a & b").unwrap();
        for text in [
            "a &amp; b",
            "pictures in a forward",
            "seconds a step",
            "2048",
            "forecast",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("NaN"));
        assert!(super::svg(&[], "").is_err());
    }
}
