//! Products of bf16 by AMX, the tile unit of Intel's server CPUs (from Sapphire Rapids on): the inner loop that takes the
//! place of AVX512-BF16's where the CPU has it, on the same panels.
//!
//! A tile has 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 bf16, as they lie in the left factor, with 16
//! units of 16 lanes of a panel, and adds to 16 · 16 sums. Here four tiles of sums (32 columns, 32 lanes) are fed by two of
//! either factor, so that every tile that is loaded is used twice.
//!
//! The twin is [`Avx512::multiply`]; sums differ by rounding, since a tile adds the two halves of its pairs apart. Where no
//! test has run on a CPU with AMX, it ran with the six instructions `emulated`; a product at first use is compared before
//! tiles are trusted. Its speed has not been measured yet.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::marker::PhantomData;

use half::bf16;

use super::{Avx512, LANES};
use crate::model::ops::cpu::Element;

/// Lanes of a panel and columns of one call.
pub(in super::super) const SIDE: usize = 2 * LANES;
/// Bytes in a row of a tile.
const ROW: usize = 64;

/// The tile unit, set up on this thread until dropped.
pub(in super::super) struct Tiles {
    // the set-up belongs to the thread
    thread: PhantomData<*const ()>,
}

/// [`SIDE`] rows of the left factor: the first begins at `data[start]`, each `stride` numbers behind the one above it. A
/// row goes on `next` numbers further after each 64 bytes.
#[derive(Clone, Copy)]
pub(in super::super) struct Rows<'a, T> {
    pub(in super::super) data: &'a [T],
    pub(in super::super) start: usize,
    pub(in super::super) stride: usize,
    pub(in super::super) next: usize,
}

/// What `LDTILECFG` reads: palette 1, all eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [
        ROW as u16, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0,
    ],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

impl Avx512 {
    /// Whether this CPU has a tile unit and this process may use it.
    pub(in super::super) fn has_tiles(self) -> bool {
        self.tiles
    }

    /// The tile unit, where this CPU has one and this process may use it.
    pub(in super::super) fn tiles(self) -> Option<Tiles> {
        self.tiles.then(|| {
            // SAFETY: `self.tiles` says that the CPU has the instruction and the system lets it be used
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack)) };
            Tiles {
                thread: PhantomData,
            }
        })
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as when it was set up; no tile is needed any longer
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

impl Tiles {
    /// The products of a panel (`units`, [`SIDE`]), `units` a multiple of 16, with [`SIDE`] rows of the left factor:
    /// (rows, [`SIDE`]), put into `out` or added to it. Each number's sum runs over the units in order.
    pub(in super::super) fn multiply<T: Element>(
        &self,
        panel: &[f32],
        units: usize,
        rows: Rows<T>,
        out: &mut [f32],
        add: bool,
    ) {
        let (blocks, size) = (units / LANES, size_of::<T>());
        assert!(units.is_multiple_of(LANES) && panel.len() >= units * SIDE);
        let out = &mut out[..SIDE * SIDE];
        if !add {
            out.fill(0.0);
        }
        if blocks == 0 {
            return;
        }
        let last = rows.start + (blocks - 1) * rows.next + (SIDE - 1) * rows.stride;
        assert!(last + ROW / size <= rows.data.len());
        // SAFETY: the tiles are set up, as `self` proves; rows, panel and out were measured above. All eight tiles are said
        // to be overwritten.
        unsafe {
            let above = rows.data.as_ptr().add(rows.start);
            asm!(
                "tileloadd tmm0, [{out} + {lanes}*1]",
                "tileloadd tmm1, [{out} + {lanes}*1 + 64]",
                "tileloadd tmm2, [{out} + {lanes}*1 + 2048]",
                "tileloadd tmm3, [{out} + {lanes}*1 + 2112]",
                "2:",
                "tileloadd tmm4, [{above} + {stride}*1]",
                "tileloadd tmm6, [{panel} + {lanes}*1]",
                "tileloadd tmm7, [{panel} + {lanes}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{below} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {above}, {next}",
                "add {below}, {next}",
                "add {panel}, 2048",
                "dec {blocks}",
                "jnz 2b",
                "tilestored [{out} + {lanes}*1], tmm0",
                "tilestored [{out} + {lanes}*1 + 64], tmm1",
                "tilestored [{out} + {lanes}*1 + 2048], tmm2",
                "tilestored [{out} + {lanes}*1 + 2112], tmm3",
                out = in(reg) out.as_mut_ptr(),
                lanes = in(reg) SIDE * size_of::<f32>(),
                above = inout(reg) above => _,
                below = inout(reg) above.add(LANES * rows.stride) => _,
                stride = in(reg) rows.stride * size,
                next = in(reg) rows.next * size,
                panel = inout(reg) panel.as_ptr() => _,
                blocks = inout(reg) blocks => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// Whether this CPU multiplies tiles of bf16, the system lets this process, and a small product comes out right.
pub(super) fn usable() -> bool {
    found() && permitted() && right()
}

/// Whether the CPU has the tile unit as it is used here, and the system keeps its registers.
fn found() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX: u32 = 1 << 24 | 1 << 22;
    const TILES_KEPT: u64 = 1 << 17 | 1 << 18;
    // SAFETY: `xgetbv` follows only where the CPU says that the system has switched it on
    let kept = __cpuid(1).ecx & OSXSAVE != 0 && unsafe { _xgetbv(0) } & TILES_KEPT == TILES_KEPT;
    if !kept || __cpuid(0).eax < 0x1d || __cpuid_count(7, 0).edx & AMX != AMX {
        return false;
    }
    // palette 1: bytes in a row, number of tiles, rows
    let palette = __cpuid_count(0x1d, 1);
    palette.ebx & 0xffff >= ROW as u32 && palette.ebx >> 16 >= 8 && palette.ecx & 0xffff >= 16
}

/// Asks Linux for the eight kilobytes of registers, which no process has from the start.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: a system call that takes two numbers and writes no memory of ours
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// A product of small integers, which must be exact.
fn right() -> bool {
    const INNER: usize = 64;
    let number = |i: usize| ((i * 37 + i / 13) % 9) as f32 - 4.0;
    let left: Vec<bf16> = (0..SIDE * INNER)
        .map(|i| bf16::from_f32(number(i)))
        .collect();
    let right = |n: usize, lane: usize| number(7 * n + 5 * lane + 3);
    let panel: Vec<f32> = (0..INNER / 2 * SIDE)
        .map(|at| {
            let (unit, lane) = (at / SIDE, at % SIDE);
            let bits = |n| u32::from(bf16::from_f32(right(n, lane)).to_bits());
            f32::from_bits(bits(2 * unit) | bits(2 * unit + 1) << 16)
        })
        .collect();
    let mut out = vec![1.0; SIDE * SIDE];
    let simd = Avx512 {
        pairs: true,
        tiles: true,
    };
    let Some(tiles) = simd.tiles() else {
        return false;
    };
    let rows = Rows {
        data: &left,
        start: 0,
        stride: INNER,
        next: ROW / size_of::<bf16>(),
    };
    tiles.multiply(&panel, INNER / 2, rows, &mut out, true);
    out.iter().enumerate().all(|(at, out)| {
        let (row, lane) = (at / SIDE, at % SIDE);
        let sum: f32 = (0..INNER)
            .map(|n| left[row * INNER + n].to_f32() * right(n, lane))
            .sum();
        out.to_bits() == (1.0 + sum).to_bits()
    })
}
