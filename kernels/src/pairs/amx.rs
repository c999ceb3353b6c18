//! The product on the processor's tiles (Intel AMX): eight registers of sixteen rows of sixteen words, and an instruction that multiplies two of
//! them onto a third.
//!
//! Their instructions are written out, because the compiler has none for them yet. What must stay true: tiles are released with the call that set
//! them up, or with the [`Held`] around several, so that no thread leaves them in use.

use super::{Parts, STEP, Sides, WIDTH};
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes of a row of a tile.
const ROW: usize = 64;
/// Steps whose words of a panel stay in the first cache while all rows meet them (24 KiB).
const fn at_once(parts: Parts) -> usize {
    12 / parts.count()
}

/// Whether the processor has tiles of bf16 and the system lets this process use them, which has to be asked for.
pub(super) fn allowed() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| {
        // Leaf 7: bit 22 of edx is AMX-BF16, bit 24 AMX-TILE.
        const TILES: u32 = 1 << 22 | 1 << 24;
        if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).edx & TILES != TILES {
            return false;
        }
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: the call changes nothing but what this process may use; kernels that do not know it give an error.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    })
}

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// Rows that the tiles of this thread are set up for, 0 when they are not.
    static ROWS_NOW: Cell<usize> = const { Cell::new(0) };
    static HOLDERS: Cell<usize> = const { Cell::new(0) };
}

/// Tiles that stay set up between products.
pub(super) struct Held {
    /// Of this thread alone.
    _here: PhantomData<*const ()>,
}

impl Held {
    pub(super) fn new() -> Held {
        HOLDERS.set(HOLDERS.get() + 1);
        Held { _here: PhantomData }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        HOLDERS.set(HOLDERS.get() - 1);
        release();
    }
}

/// Gives the tiles back, unless somebody holds them.
fn release() {
    if HOLDERS.get() == 0 && ROWS_NOW.replace(0) > 0 {
        // SAFETY: they are set up, so they are allowed.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Tiles 0 to 3 are the result, 4 and 5 rows of the left side (2, too, where the result has one row of tiles), 6 and 7 the panel. `rows`: of a tile of the
/// result and of the left side.
///
/// # Safety
/// [`allowed`]; [`release`] follows on the same thread.
unsafe fn configure(rows: usize) {
    if ROWS_NOW.replace(rows) == rows {
        return;
    }
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for tile in 0..8 {
        shapes.row_bytes[tile] = ROW as u16;
        shapes.rows[tile] = if tile < 6 { rows as u8 } else { ROWS as u8 };
    }
    // SAFETY: the shapes are 64 bytes that live as long as the instruction, and such as palette 1 has.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
}

/// # Safety
/// [`allowed`], and sides that hold what [`super::multiply`] asserts.
pub(super) unsafe fn multiply(out: &mut [f32], out_stride: usize, sides: Sides, rows: usize, cols: usize, onto: bool) {
    let whole = rows / (2 * ROWS) * (2 * ROWS);
    let mut r = 0;
    while r < rows {
        // Pairs of tiles while there are rows for them, then one tile with as many rows as there are.
        let (at_once, until) = if r < whole { (2 * ROWS, whole) } else { (ROWS.min(rows - r), rows) };
        let until = if at_once == 2 * ROWS || at_once == ROWS { until - (until - r) % at_once } else { until };
        // SAFETY: tiles are allowed, and released below.
        unsafe { configure(at_once.min(ROWS)) };
        let (all, most) = (sides.pairs / STEP, self::at_once(sides.parts));
        // One stretch of several rows at a time; also where there are no pairs, and the result is what it starts from.
        let stretch = if until - r > at_once { most } else { all }.max(1);
        for (p, c) in (0..cols).step_by(WIDTH).enumerate() {
            let panel = &sides.panels[p * sides.panel..];
            let cols = WIDTH.min(cols - c);
            for first in (0..all.max(1)).step_by(stretch) {
                let words = first * STEP * sides.parts.count();
                let panel = &panel[words * WIDTH..];
                let sides = Sides { pairs: stretch.min(all - first) * STEP, ..sides };
                for r in (r..until).step_by(at_once) {
                    let left = &sides.left[r * sides.left_stride + words..];
                    let out = &mut out[r * out_stride + c..];
                    // SAFETY: behind their starts, left has `at_once` rows of words, panel its words, and out as many rows of `cols` numbers.
                    unsafe { block(out, out_stride, left, panel, sides, at_once, cols, onto || first > 0) };
                }
            }
        }
        r = until;
    }
    release();
}

/// Some rows of a panel's columns.
///
/// # Safety
/// Tiles are configured for `rows`, or for half of them where there are more than a tile's; the sides are long enough.
#[allow(clippy::too_many_arguments)]
#[inline]
unsafe fn block(
    out: &mut [f32],
    out_stride: usize,
    left: &[u32],
    panel: &[u32],
    sides: Sides,
    rows: usize,
    cols: usize,
    onto: bool,
) {
    if cols == WIDTH {
        // SAFETY: the rows lie in `out`.
        return unsafe { tiles(out.as_mut_ptr(), out_stride, left, panel, sides, rows, onto) };
    }
    // A panel that is not full: its columns beside others that nobody reads.
    let mut wide = [0.0f32; 2 * ROWS * WIDTH];
    if onto {
        for (wide, out) in wide.chunks_exact_mut(WIDTH).zip(out.chunks(out_stride)).take(rows) {
            wide[..cols].copy_from_slice(&out[..cols]);
        }
    }
    // SAFETY: `wide` has all rows.
    unsafe { tiles(wide.as_mut_ptr(), WIDTH, left, panel, sides, rows, onto) };
    for (wide, out) in wide.chunks_exact(WIDTH).zip(out.chunks_mut(out_stride)).take(rows) {
        out[..cols].copy_from_slice(&wide[..cols]);
    }
}

/// # Safety
/// As [`block`]; `out` has `rows` rows of `WIDTH` numbers, `stride` apart.
#[inline]
unsafe fn tiles(out: *mut f32, stride: usize, left: &[u32], panel: &[u32], sides: Sides, rows: usize, onto: bool) {
    let (steps, stride, left_stride) = (sides.pairs / STEP, 4 * stride, 4 * sides.left_stride);
    let two = rows > ROWS;
    // SAFETY: the caller has sides and a result that are long enough: a tile of the left side is `ROWS` rows (fewer where so configured) of `STEP`
    // pairs, one of the panel `STEP` rows of half a panel's width, and a step goes on by `STEP` pairs.
    unsafe {
        let lower = out.byte_add(if two { ROWS * stride } else { 0 });
        match (onto, two) {
            (false, _) => {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem))
            }
            (true, _) => asm!(
                "tileloadd tmm0, [{out} + {stride}]",
                "tileloadd tmm1, [{out} + {stride} + 64]",
                out = in(reg) out, stride = in(reg) stride, options(nostack, readonly)
            ),
        }
        if onto && two {
            asm!(
                "tileloadd tmm2, [{out} + {stride}]",
                "tileloadd tmm3, [{out} + {stride} + 64]",
                out = in(reg) lower, stride = in(reg) stride, options(nostack, readonly)
            );
        }
        match sides.parts {
            _ if steps == 0 => {}
            Parts::One => of_one(left, left_stride, panel, steps, two),
            Parts::Three => of_three(left, left_stride, panel, steps, two),
        }
        asm!(
            "tilestored [{out} + {stride}], tmm0",
            "tilestored [{out} + {stride} + 64], tmm1",
            out = in(reg) out, stride = in(reg) stride, options(nostack)
        );
        if two {
            asm!(
                "tilestored [{out} + {stride}], tmm2",
                "tilestored [{out} + {stride} + 64], tmm3",
                out = in(reg) lower, stride = in(reg) stride, options(nostack)
            );
        }
    }
}

/// Onto the result's tiles.
///
/// # Safety
/// As [`tiles`]; there are steps.
#[inline]
unsafe fn of_one(left: &[u32], left_stride: usize, panel: &[u32], steps: usize, two: bool) {
    // SAFETY: the caller's.
    unsafe {
        if two {
            asm!(
                "2:",
                "tileloadd tmm4, [{upper} + {left}]",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tileloadd tmm5, [{lower} + {left}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {panel}, 2048",
                "dec {steps}",
                "jnz 2b",
                upper = inout(reg) left.as_ptr() => _,
                lower = inout(reg) left.as_ptr().byte_add(ROWS * left_stride) => _,
                left = in(reg) left_stride,
                panel = inout(reg) panel.as_ptr() => _,
                row = in(reg) 4 * WIDTH,
                steps = inout(reg) steps => _,
                options(nostack, readonly)
            );
        } else {
            asm!(
                "2:",
                "tileloadd tmm4, [{upper} + {left}]",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {upper}, 64",
                "add {panel}, 2048",
                "dec {steps}",
                "jnz 2b",
                upper = inout(reg) left.as_ptr() => _,
                left = in(reg) left_stride,
                panel = inout(reg) panel.as_ptr() => _,
                row = in(reg) 4 * WIDTH,
                steps = inout(reg) steps => _,
                options(nostack, readonly)
            );
        }
    }
}

/// The same of numbers in three parts, for each step: third, second and first of the left by the first of the panel, first by third, first and second by
/// second. So few tiles are loaded that the products wait for themselves alone.
///
/// # Safety
/// As [`of_one`].
#[inline]
unsafe fn of_three(left: &[u32], left_stride: usize, panel: &[u32], steps: usize, two: bool) {
    // SAFETY: the caller's.
    unsafe {
        if two {
            asm!(
                "2:",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm4, [{upper} + {left} + 128]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {left} + 128]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm4, [{upper} + {left} + 64]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {left} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tileloadd tmm4, [{upper} + {left}]",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {left}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{panel} + {row} + 4096]",
                "tileloadd tmm7, [{panel} + {row} + 4160]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm6, [{panel} + {row} + 2048]",
                "tileloadd tmm7, [{panel} + {row} + 2112]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{upper} + {left} + 64]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "tileloadd tmm5, [{lower} + {left} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 192",
                "add {lower}, 192",
                "add {panel}, 6144",
                "dec {steps}",
                "jnz 2b",
                upper = inout(reg) left.as_ptr() => _,
                lower = inout(reg) left.as_ptr().byte_add(ROWS * left_stride) => _,
                left = in(reg) left_stride,
                panel = inout(reg) panel.as_ptr() => _,
                row = in(reg) 4 * WIDTH,
                steps = inout(reg) steps => _,
                options(nostack, readonly)
            );
        } else {
            asm!(
                "2:",
                "tileloadd tmm4, [{upper} + {left} + 128]",
                "tileloadd tmm6, [{panel} + {row}]",
                "tileloadd tmm7, [{panel} + {row} + 64]",
                "tileloadd tmm5, [{upper} + {left} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm2, [{upper} + {left}]",
                "tdpbf16ps tmm0, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm7",
                "tdpbf16ps tmm0, tmm2, tmm6",
                "tdpbf16ps tmm1, tmm2, tmm7",
                "tileloadd tmm6, [{panel} + {row} + 4096]",
                "tileloadd tmm7, [{panel} + {row} + 4160]",
                "tdpbf16ps tmm0, tmm2, tmm6",
                "tdpbf16ps tmm1, tmm2, tmm7",
                "tileloadd tmm6, [{panel} + {row} + 2048]",
                "tileloadd tmm7, [{panel} + {row} + 2112]",
                "tdpbf16ps tmm0, tmm2, tmm6",
                "tdpbf16ps tmm1, tmm2, tmm7",
                "tdpbf16ps tmm0, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm7",
                "add {upper}, 192",
                "add {panel}, 6144",
                "dec {steps}",
                "jnz 2b",
                upper = inout(reg) left.as_ptr() => _,
                left = in(reg) left_stride,
                panel = inout(reg) panel.as_ptr() => _,
                row = in(reg) 4 * WIDTH,
                steps = inout(reg) steps => _,
                options(nostack, readonly)
            );
        }
    }
}
