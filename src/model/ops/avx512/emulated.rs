//! AMX for tests on CPUs without it: its instructions are illegal there, and a handler of that signal does what they say.
//!
//! What runs is the machine code that runs on a CPU with AMX; the handler decodes it and refuses what such a CPU would
//! refuse. Encodings and operations after Intel's manual (325383), `LDTILECFG` to `TDPBF16PS`.

#![expect(clippy::print_stderr, reason = "the last words before an abort")]

use std::cell::UnsafeCell;
use std::sync::Once;

use super::Avx512;

/// A configuration and eight tiles.
struct State {
    config: Option<[u8; 64]>,
    tiles: [[[u8; 64]; 16]; 8],
}

thread_local! {
    static STATE: UnsafeCell<State> = const {
        UnsafeCell::new(State { config: None, tiles: [[[0; 64]; 16]; 8] })
    };
}

impl Avx512 {
    /// The same CPU with tiles, if need be emulated ones.
    pub(in super::super) fn with_tiles(self) -> Self {
        static INSTALL: Once = Once::new();
        if !self.tiles && self.pairs {
            INSTALL.call_once(|| {
                // SAFETY: a handler that touches nothing but the state of its thread and what the instruction names
                let installed = unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = handle as *const () as usize;
                    action.sa_flags = libc::SA_SIGINFO;
                    libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut())
                };
                assert_eq!(installed, 0);
            });
        }
        Self {
            tiles: self.pairs,
            ..self
        }
    }
}

extern "C" fn handle(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the context of the thread that the signal interrupted, which is this one
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: instructions are read as far as their encoding goes; nothing else holds this thread's state
    let length = STATE.with(|state| unsafe { (*state.get()).run(at, registers) });
    match length {
        Ok(length) => registers[libc::REG_RIP as usize] += length,
        Err(why) => {
            eprintln!("not an instruction of AMX as it should be: {why}");
            std::process::abort();
        }
    }
}

/// Registers by their number in an instruction.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

impl State {
    /// Runs one instruction; its length.
    ///
    /// # Safety
    /// It starts at `at`, and what it reads and writes is there.
    unsafe fn run(&mut self, at: *const u8, registers: &[i64; 23]) -> Result<i64, &'static str> {
        // SAFETY: no instruction of AMX is shorter
        let [vex, map, prefix, opcode, modrm] = unsafe { at.cast::<[u8; 5]>().read() };
        if vex != 0xc4 || map & 0x1f != 2 || prefix & 0x84 != 0 {
            return Err("encoding");
        }
        let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), modrm & 7);
        let (third, plain) = (usize::from(!prefix >> 3 & 15), prefix & 3);
        let mut length = 5;
        let (mut address, mut stride) = (0i64, 0);
        if mode != 3 {
            let value = |n: u8, high: bool| {
                registers[REGISTERS[usize::from(n) + 8 * usize::from(high)] as usize]
            };
            let mut base = rm;
            if rm == 4 {
                // SAFETY: says the byte before
                let sib = unsafe { at.add(5).read() };
                length += 1;
                (base, stride) = (sib & 7, value(sib >> 3 & 7, map & 0x40 == 0) << (sib >> 6));
            }
            if base == 5 && mode == 0 {
                return Err("an address without a register");
            }
            address = value(base, map & 0x20 == 0);
            // SAFETY: say the bytes before
            unsafe {
                match mode {
                    1 => address += i64::from(at.add(length).cast::<i8>().read()),
                    2 => address += i64::from(at.add(length).cast::<i32>().read_unaligned()),
                    _ => {}
                }
            }
            length += [0, 1, 4][usize::from(mode)];
        }
        let rows_are_apart = mode != 3 && rm == 4;
        match (opcode, plain) {
            (0x49, 0) if mode != 3 => {
                // SAFETY: the caller's
                let config = unsafe { (address as *const [u8; 64]).read() };
                check(&config)?;
                self.config = Some(config);
                self.tiles = [[[0; 64]; 16]; 8];
            }
            (0x49, 0) if modrm == 0xc0 => self.config = None,
            (0x4b, 3 | 2) if rows_are_apart => {
                let (rows, bytes) = self.size(reg)?;
                for (row, tile) in self.tiles[reg][..rows].iter_mut().enumerate() {
                    let memory = (address + row as i64 * stride) as *mut u8;
                    // SAFETY: the caller's
                    unsafe {
                        if plain == 3 {
                            tile.fill(0);
                            tile.as_mut_ptr().copy_from(memory, bytes);
                        } else {
                            memory.copy_from(tile.as_ptr(), bytes);
                        }
                    }
                }
            }
            (0x5c, 2) if mode == 3 => self.multiply(reg, usize::from(rm), third)?,
            _ => return Err("unknown"),
        }
        Ok(length as i64)
    }

    /// Rows of a tile, and bytes in each.
    fn size(&self, tile: usize) -> Result<(usize, usize), &'static str> {
        let config = self.config.ok_or("no configuration")?;
        Ok((config[48 + tile].into(), config[16 + 2 * tile].into()))
    }

    /// `TDPBF16PS out, left, right`.
    fn multiply(&mut self, out: usize, left: usize, right: usize) -> Result<(), &'static str> {
        if right > 7 || out == left || out == right || left == right {
            return Err("tiles");
        }
        let ((rows, row), (of_left, inner), (units, of_right)) =
            (self.size(out)?, self.size(left)?, self.size(right)?);
        if rows != of_left || row != of_right || inner > 4 * units {
            return Err("shapes");
        }
        // without subnormal numbers
        let number = |tile: &[u8; 64], n: usize| {
            flushed(f32::from_bits(
                u32::from(tile[2 * n]) << 16 | u32::from(tile[2 * n + 1]) << 24,
            ))
        };
        for m in 0..rows {
            for n in 0..row / 4 {
                let mut sums = [0f32; 2];
                for unit in 0..inner / 4 {
                    for (half, sum) in sums.iter_mut().enumerate() {
                        let a = number(&self.tiles[left][m], 2 * unit + half);
                        let b = number(&self.tiles[right][unit], 2 * n + half);
                        *sum = flushed(a.mul_add(b, *sum));
                    }
                }
                let at = &mut self.tiles[out][m].as_chunks_mut::<4>().0[n];
                let sum = f32::from_le_bytes(*at) + flushed(sums[0] + sums[1]);
                *at = flushed(sum).to_le_bytes();
            }
        }
        Ok(())
    }
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

/// What `LDTILECFG` refuses.
fn check(config: &[u8; 64]) -> Result<(), &'static str> {
    let reserved = [&config[2..16], &config[32..48], &config[56..]].concat();
    if config[0] != 1 || config[1] != 0 || reserved.iter().any(|x| *x != 0) {
        return Err("palette or reserved bytes");
    }
    let sizes = config[16..32]
        .as_chunks::<2>()
        .0
        .iter()
        .zip(&config[48..56]);
    for ([bytes, high], rows) in sizes {
        if *high != 0 || *bytes > 64 || *rows > 16 || (*bytes == 0) != (*rows == 0) {
            return Err("size of a tile");
        }
    }
    Ok(())
}
