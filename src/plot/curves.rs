//! Named curves over one axis, on a logarithmic scale.

use anyhow::Result;

use super::{Axis, COLOURS, Chart, heading, legend, svg};

/// Width and height of a chart below its legend, in pixels: letters stay readable on a phone.
const SIZE: (u32, u32) = (480, 300);

/// A named curve.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// As the legend says it.
    pub name: String,
    /// (x, y); points that are not finite, or not above zero, are left out.
    pub points: Vec<(f64, f64)>,
}

/// All curves in one chart; `None` if no point is left to draw.
///
/// # Errors
/// When drawing fails.
pub fn svg_of(x_name: &str, y_name: &str, curves: &[Curve]) -> Result<Option<String>> {
    let shown = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite() && *y > 0.0;
    let all = || curves.iter().flat_map(|c| c.points.iter().filter(shown));
    let ends = |(low, high): (f64, f64), v: f64| (low.min(v), high.max(v));
    let (left, right) = all()
        .map(|p| p.0)
        .fold((f64::INFINITY, f64::NEG_INFINITY), ends);
    if !left.is_finite() {
        return Ok(None);
    }
    let margin = ((right - left) * 0.03).max(1e-3);
    let coloured: Vec<_> = curves.iter().zip(COLOURS.into_iter().cycle()).collect();
    let legend: Vec<_> = coloured
        .iter()
        .map(|(c, colour)| (c.name.as_str(), *colour))
        .collect();
    let legend = if curves.len() > 1 { &legend[..] } else { &[] };
    let names: Vec<&str> = legend.iter().map(|(name, _)| *name).collect();
    let (width, height) = SIZE;
    let size = (width, height + legend::height(&names, width as i32) as u32);
    svg(size, false, |root| {
        let below = heading(root, "", legend)?;
        let x = Axis::linear(x_name, left - margin, right + margin);
        let y = Axis::log(y_name, all().map(|p| p.1), 1.25);
        let mut chart = Chart::new(&below, x, y)?;
        for (curve, colour) in &coloured {
            chart.line(&curve.points, *colour, 2)?;
            chart.dots(&curve.points, *colour)?;
        }
        Ok(())
    })
    .map(Some)
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
        let draw = |curves: &[Curve]| svg_of("t", "error", curves).unwrap();
        let good = curve(&[(0.0, 1.0), (0.5, f64::NAN), (1.0, 0.0), (0.7, 2.0)]);
        let svg = draw(&[good, curve(&[(0.0, 0.0)])]).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("a &amp; b") && !svg.contains("NaN"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!(draw(&[curve(&[(0.0, 0.0)])]), None);
        // one point, so no width at all
        assert!(draw(&[curve(&[(3.0, 1.0)])]).is_some());
    }
}
