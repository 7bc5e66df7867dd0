//! The charts that a report draws itself, as SVG text whose black and white follow the page's colours.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Colours of curves, in the order of models; readable on white and on black.
pub(super) const COLOURS: [RGBColor; 6] = [
    RGBColor(0x3b, 0x82, 0xd6),
    RGBColor(0xe0, 0x7b, 0x2c),
    RGBColor(0x2e, 0x9e, 0x78),
    RGBColor(0xb0, 0x5c, 0xc8),
    RGBColor(0xd0, 0x4a, 0x4a),
    RGBColor(0x8a, 0x8a, 0x2e),
];

/// Width and height of a chart: letters stay readable on a phone.
const SIZE: (u32, u32) = (480, 280);

/// A named curve.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Curves on a logarithmic axis; points that are not above zero are left out. `None` where none is left.
pub(super) fn curves(
    x_name: &str,
    y_name: &str,
    curves: &[Curve],
    dots: bool,
) -> Result<Option<String>> {
    let positive = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite() && p.1 > 0.0;
    let all = || curves.iter().flat_map(|c| c.points.iter().filter(positive));
    let range = |of: fn(&(f64, f64)) -> f64| {
        let ends = |(low, high): (f64, f64), v: f64| (low.min(v), high.max(v));
        all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), ends)
    };
    let ((left, right), (low, high)) = (range(|p| p.0), range(|p| p.1));
    if !left.is_finite() {
        return Ok(None);
    }
    let mut text = String::new();
    let draw = |text: &mut String| -> Result<(), Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
        let margin = ((right - left) * 0.03).max(1e-9);
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(38)
            .y_label_area_size(62)
            .build_cartesian_2d(
                left - margin..right + margin,
                (low * 0.8..high * 1.25).log_scale(),
            )?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .label_style(("sans-serif", 12))
            .axis_desc_style(("sans-serif", 13))
            .x_desc(x_name)
            .y_desc(y_name)
            .y_label_formatter(&|y| {
                if *y < 0.01 {
                    format!("{y:.0e}")
                } else {
                    format!("{y}")
                }
            })
            .draw()?;
        for (curve, color) in curves.iter().zip(COLOURS.iter().cycle()) {
            let points: Vec<(f64, f64)> = curve.points.iter().filter(positive).copied().collect();
            chart
                .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
                .label(&curve.name)
                .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(3)));
            if dots {
                let dots = points
                    .into_iter()
                    .map(|p| Circle::new(p, 3, color.filled()));
                chart.draw_series(dots)?;
            }
        }
        if curves.len() > 1 {
            chart
                .configure_series_labels()
                .label_font(("sans-serif", 12))
                .background_style(WHITE.mix(0.8))
                .position(SeriesLabelPosition::UpperRight)
                .draw()?;
        }
        root.present()?;
        Ok(())
    };
    draw(&mut text).map_err(|e| anyhow!("cannot draw a chart: {e}"))?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_and_nans_are_left_out_of_a_logarithmic_chart() {
        let curve = |points: &[(f64, f64)]| Curve {
            name: "a & b".to_owned(),
            points: points.to_vec(),
        };
        let good = curve(&[(0.0, 1.0), (0.5, f64::NAN), (1.0, 0.0), (0.7, 2.0)]);
        let svg = curves("t", "error", &[good, curve(&[(0.0, 0.0)])], true)
            .unwrap()
            .unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("a &amp; b") && !svg.contains("NaN"));
        assert!(
            curves("t", "error", &[curve(&[(0.0, 0.0)])], true)
                .unwrap()
                .is_none()
        );
        // one point, so no width at all
        assert!(
            curves("t", "error", &[curve(&[(3.0, 1.0)])], true)
                .unwrap()
                .is_some()
        );
    }
}
