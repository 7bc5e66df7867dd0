//! OCP 8-bit floating point: e4m3 without infinities (`torch.float8_e4m3fn`), and e5m2 (`torch.float8_e5m2`).

use std::sync::LazyLock;

use half::f16;

/// The largest number that e5m2 holds.
pub(super) const E5M2_MAX: f32 = 57_344.0;
/// The largest number that e4m3 holds.
pub const F8_MAX: f32 = 448.0;
/// The bits of [`F8_MAX`]; all ones is NaN.
const MAX_BITS: u8 = 0x7e;
const NAN_BITS: u8 = 0x7f;

/// What each byte of e4m3 stands for.
pub(super) const fn e4m3_table() -> &'static [f32; 256] {
    static TABLE: [f32; 256] = make_table();
    &TABLE
}

/// What each byte of e5m2 stands for: it is the upper half of a float16.
pub(super) fn e5m2_table() -> &'static [f32; 256] {
    static TABLE: LazyLock<[f32; 256]> =
        LazyLock::new(|| std::array::from_fn(|byte| f16::from_bits((byte as u16) << 8).to_f32()));
    &TABLE
}

/// The nearest byte of e5m2, ties to even; numbers beyond ±57344 become ±57344.
pub(super) fn encode_e5m2(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let x = x.abs();
    let bits = if x.is_nan() {
        NAN_BITS
    } else if x >= E5M2_MAX {
        0x7b
    } else if x < 2f32.powi(-14) {
        // four of these units are the smallest normal number, whose bits follow
        (x * 65_536.0).round_ties_even() as u8
    } else {
        let bits = x.to_bits();
        let rounded = (bits + 0xf_ffff + ((bits >> 21) & 1)) >> 21;
        ((rounded - ((127 - 15) << 2)) as u8).min(0x7b)
    };
    sign | bits
}

const fn make_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = decode(byte as u8);
        byte += 1;
    }
    table
}

/// One sign, four bits of exponent (bias 7), three of mantissa; subnormals are eighths of 2⁻⁶.
const fn decode(byte: u8) -> f32 {
    let (exponent, mantissa) = (((byte >> 3) & 0xf) as u32, (byte & 7) as u32);
    let magnitude = if byte & NAN_BITS == NAN_BITS {
        f32::NAN
    } else if exponent == 0 {
        mantissa as f32 / 512.0
    } else {
        f32::from_bits(((exponent + 127 - 7) << 23) | (mantissa << 20))
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The nearest byte, ties to even; numbers beyond ±448 become ±448.
pub(super) fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let x = x.abs();
    let bits = if x.is_nan() {
        NAN_BITS
    } else if x >= F8_MAX {
        MAX_BITS
    } else if x < 1.0 / 64.0 {
        // eight of these units are the smallest normal number, whose bits follow
        (x * 512.0).round_ties_even() as u8
    } else {
        let bits = x.to_bits();
        let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
        ((rounded - ((127 - 7) << 3)) as u8).min(MAX_BITS)
    };
    sign | bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_what_the_specification_says() {
        let table = e4m3_table();
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(table[byte].to_bits(), value.to_bits());
        }
        assert!(table[0x7f].is_nan() && table[0xff].is_nan());
        assert_eq!(table.iter().filter(|v| !v.is_finite()).count(), 2);
    }

    #[test]
    fn e5m2_is_the_upper_half_of_float16() {
        let table = e5m2_table();
        assert_eq!((table[0x3c], table[0x3d], table[0xbc]), (1.0, 1.25, -1.0));
        assert_eq!((table[0x7b], table[0x01]), (E5M2_MAX, 2f32.powi(-16)));
        assert!(table[0x7c].is_infinite() && table[0x7d].is_nan());
        for byte in 0..=255u8 {
            if table[usize::from(byte)].is_finite() {
                assert_eq!(encode_e5m2(table[usize::from(byte)]), byte);
            }
        }
        for byte in 0..0x7bu8 {
            let (low, high) = (table[usize::from(byte)], table[usize::from(byte + 1)]);
            let middle = f32::midpoint(low, high);
            assert_eq!(encode_e5m2(middle), byte + (byte & 1));
            assert_eq!(encode_e5m2(middle.next_down()), byte);
            assert_eq!(encode_e5m2(middle.next_up()), byte + 1);
        }
    }

    #[test]
    fn every_number_goes_to_the_nearest_byte() {
        let table = e4m3_table();
        for byte in 0..=255u8 {
            let value = table[usize::from(byte)];
            if value.is_finite() {
                assert_eq!(encode(value), byte);
            }
        }
        // halfway between neighbours: the one with an even mantissa
        for byte in 0..MAX_BITS {
            let (low, high) = (table[usize::from(byte)], table[usize::from(byte + 1)]);
            let middle = f32::midpoint(low, high);
            let even = byte + (byte & 1);
            assert_eq!(encode(middle), even);
            assert_eq!(encode(-middle), even | 0x80);
            assert_eq!(encode(middle.next_down()), byte);
            assert_eq!(encode(middle.next_up()), byte + 1);
        }
        for beyond in [449.0, 470.0, 1e30, f32::INFINITY] {
            assert_eq!(encode(beyond), MAX_BITS);
            assert_eq!(encode(-beyond), MAX_BITS | 0x80);
        }
        assert_eq!(encode(f32::NAN) & 0x7f, NAN_BITS);
    }
}
