//! Products however they are cut.

use super::*;
use crate::model::testing::{close, random};

#[test]
fn fused_equals_plain_however_it_is_cut() -> Result<()> {
    for (rows, input, columns) in [
        (0, 8, 3),
        (1, 8, 3),
        (1, 128, 768),
        (28, 128, 896),
        (300, 70, 1300),
        (1100, 33, 200),
    ] {
        let (x, weight) = (random("x", (rows, input))?, random("w", (columns, input))?);
        close(&product(&x, &weight, None)?, &plain(&x, &weight)?, 1e-6)?;
        let view = random("w", (columns, input + 5))?.narrow(1, 3, input)?;
        close(&product(&x, &view, None)?, &plain(&x, &view)?, 1e-6)?;
    }
    Ok(())
}

#[test]
fn products_are_cut_into_enough_pieces_and_no_crumbs() {
    assert_eq!(parts(0, 128, 768, 2), (1, 1));
    assert_eq!(parts(1, 128, 768, 2), (1, 1));
    assert_eq!(parts(1344, 128, 896, 2), (8, 1));
    assert_eq!(parts(28, 3072, 3072, 2), (1, 8));
    assert_eq!(parts(4608, 3072, 21_504, 2), (8, 21));
}
