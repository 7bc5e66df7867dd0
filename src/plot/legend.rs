//! Where the entries of a legend stand: row below row, none beyond the chart.

use super::{LABEL, MARGIN};

/// From the left of an entry to its text, and from one row to the next, in pixels.
pub(super) const SWATCH: i32 = 20;
pub(super) const ROW: i32 = 18;
/// Width of a letter as a share of its size, on average.
const LETTER: f64 = 0.55;

/// Width of a text in pixels, about.
pub(super) fn width_of(text: &str) -> i32 {
    (text.chars().count() as f64 * f64::from(LABEL) * LETTER) as i32
}

/// `text` with its middle left out, so that it is at most `most` pixels wide.
fn shortened(text: &str, most: i32) -> String {
    if width_of(text) <= most {
        return text.to_owned();
    }
    let letters: Vec<char> = text.chars().collect();
    let kept = (f64::from(most) / (f64::from(LABEL) * LETTER)) as usize;
    let kept = kept.saturating_sub(1).min(letters.len());
    let (head, tail) = (kept / 2, letters.len() - kept.div_ceil(2));
    letters[..head]
        .iter()
        .chain(&['…'])
        .chain(&letters[tail..])
        .collect()
}

/// Where the entries of a legend stand in a chart of `width`, one row below the other: left, row and text.
pub(super) fn places(names: &[&str], width: i32) -> Vec<(i32, i32, String)> {
    let (mut x, mut row) = (MARGIN, 0);
    let place = |name: &&str| {
        let name = shortened(name, width - 2 * MARGIN - SWATCH);
        let taken = SWATCH + width_of(&name);
        if x > MARGIN && x + taken > width - MARGIN {
            (x, row) = (MARGIN, row + 1);
        }
        let place = (x, row, name);
        x += taken + 18;
        place
    };
    names.iter().map(place).collect()
}

/// Height of a legend in a chart of `width`, in pixels.
pub(super) fn height(names: &[&str], width: i32) -> i32 {
    let rows = places(names, width).last().map_or(0, |(_, row, _)| row + 1);
    rows * ROW + if rows > 0 { 4 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legends_stay_within_the_chart_and_no_entry_lies_on_another() {
        let long = "a-rather-long-name-of-a-folder/with-another-long-name-in-it-that-no-chart-has-room-for.safetensors";
        let names = [
            "trained-20",
            long,
            "a",
            "b",
            "pruned-with-a-name",
            "c",
            "größer",
            "another",
            "one more",
        ];
        let places = places(&names, 480);
        let end = |(x, _, name): &(i32, i32, String)| x + SWATCH + width_of(name);
        assert_eq!(places.len(), names.len());
        assert!(
            places.iter().all(|place| end(place) <= 480 - MARGIN),
            "{places:?}"
        );
        for pair in places.windows(2) {
            assert!(
                pair[1].1 > pair[0].1 || pair[1].0 > end(&pair[0]),
                "{places:?}"
            );
        }
        assert!(places[1].2.starts_with("a-rather") && places[1].2.ends_with("safetensors"));
        assert!(height(&names, 480) > 2 * ROW);
        assert_eq!(height(&[], 480), 0);
    }
}
