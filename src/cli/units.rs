//! How numbers are written on the command line, and the ranges that they must be in.

use std::{collections::hash_map::RandomState, hash::BuildHasher};

use safetensors::Dtype;

/// Units of sizes, in bytes; those of one letter count in powers of two.
const SIZES: [(&str, f64); 13] = [
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("K", 1024.0),
    ("M", 1_048_576.0),
    ("G", 1_073_741_824.0),
    ("T", 1_099_511_627_776.0),
    ("B", 1.0),
];
const COUNTS: [(&str, f64); 3] = [("K", 1e3), ("M", 1e6), ("B", 1e9)];

/// Bytes: `8GiB`, `500MB` or `8G` (as GiB); a number without a unit is refused.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let number = text.trim();
    if number
        .parse::<f64>()
        .is_ok_and(|n| n.is_finite() && n > 0.0)
    {
        return Err(format!("a size needs a unit: {number}GiB?"));
    }
    with_unit(text, &SIZES).ok_or_else(|| "expected a size such as 16GiB or 500MB".to_owned())
}

/// A number of things: `9.5B`, `800M` or a plain number.
pub(super) fn count(text: &str) -> Result<u64, String> {
    with_unit(text, &COUNTS).ok_or_else(|| "expected a number such as 9.5B or 800M".to_owned())
}

fn with_unit(text: &str, units: &[(&str, f64)]) -> Option<u64> {
    let text = text.trim();
    let split = units
        .iter()
        .find_map(|(unit, size)| Some((text.strip_suffix(unit)?, *size)));
    let (number, size) = split.unwrap_or((text, 1.0));
    let number: f64 = number.trim().parse().ok()?;
    (number.is_finite() && number > 0.0).then_some((number * size) as u64)
}

/// A whole number in a range, both ends included.
pub(super) fn whole(
    min: usize,
    max: usize,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|n| (min..=max).contains(n));
        number.ok_or_else(|| format!("expected a number from {min} to {max}"))
    }
}

/// A number in a range, both ends included.
pub(super) fn number(
    min: f64,
    max: f64,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    move |text| {
        let number = text.parse().ok().filter(|n| (min..=max).contains(n));
        number.ok_or_else(|| format!("expected a number from {min} to {max}"))
    }
}

/// A seed: a number, or `random`.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    if text == "random" {
        // short enough to be typed again
        return Ok(u64::from(
            RandomState::new().hash_one(std::process::id()) as u32
        ));
    }
    let seed = text.parse();
    seed.map_err(|_| "expected a whole number, or random".to_owned())
}

/// A share above 0 and below 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|n| *n > 0.0 && *n < 1.0);
    share.ok_or_else(|| "expected a share above 0 and below 1, such as 0.2".to_owned())
}

/// A factor above 1.
pub(super) fn factor(text: &str) -> Result<f64, String> {
    let factor = text
        .parse()
        .ok()
        .filter(|n: &f64| n.is_finite() && *n > 1.0);
    factor.ok_or_else(|| "expected a factor above 1, such as 1.2".to_owned())
}

/// A plain number format of weights.
pub(super) fn weight_dtype(text: &str) -> Result<Dtype, String> {
    match text {
        "bf16" | "bfloat16" => Ok(Dtype::BF16),
        "f16" | "float16" => Ok(Dtype::F16),
        "f32" | "float32" => Ok(Dtype::F32),
        _ => Err("expected bf16, f16 or f32".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_read_as_people_write_them() {
        assert_eq!(bytes("16GiB"), Ok(16 << 30));
        assert_eq!(bytes("1.5 MB"), Ok(1_500_000));
        assert_eq!(bytes("42B"), Ok(42));
        assert!(bytes("16").is_err_and(|why| why.contains("16GiB?")));
        assert_eq!(bytes("1TB"), Ok(1_000_000_000_000));
        assert_eq!(bytes("1TiB"), Ok(1 << 40));
        for (unit, power) in [("K", 10), ("M", 20), ("G", 30), ("T", 40)] {
            assert_eq!(bytes(&format!("2{unit}")), Ok(2 << power));
        }
        assert_eq!(count("9.5B"), Ok(9_500_000_000));
        assert_eq!(count("800M"), Ok(800_000_000));
        for bad in ["", "B", "-1", "nan", "infGB", "1e400", "3 apples"] {
            assert!(bytes(bad).is_err() && count(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn both_ends_of_a_range_are_in_it() {
        let steps = whole(1, 10);
        assert_eq!((steps("1"), steps("10")), (Ok(1), Ok(10)));
        for bad in ["0", "11", "-1", "1.5", "", "18446744073709551616"] {
            assert!(steps(bad).is_err(), "{bad}");
        }
        assert_eq!(number(0.0, 2.0)("0"), Ok(0.0));
        assert!(number(0.0, 2.0)("nan").is_err());
        assert!(share("0").is_err() && share("1").is_err() && share("0.5").is_ok());
        assert!(factor("1").is_err() && factor("inf").is_err() && factor("1.2").is_ok());
    }
}
