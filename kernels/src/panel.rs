//! The matrix product: a few rows times a panel of columns, each output a run of fused multiply-adds over k in order.
//!
//! Everything is built from it: linear layers, attention and their gradients. A panel is a matrix [k, `WIDTH`] stored row by
//! row; callers lay their matrices out in panels that stay in the first cache, and cut k to that end. What must stay true: an
//! output's bits depend on its row of `a`, its column of the panel and the value it starts from, never on the tile it was
//! computed in.

use crate::matrix::wide;
use crate::vector::{FUSED, PLAIN, WIDE, dispatch, mul_add};

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Columns of a panel.
pub(crate) const WIDTH: usize = 32;
/// Rows of a panel between what is multiplied and what is asked for: 3 KiB.
const AHEAD: usize = 24;

/// What a product meets in `out`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Onto {
    /// Nothing that counts: it is overwritten.
    Nothing,
    /// What the run of multiply-adds starts from.
    Start,
    /// What the whole run is added to.
    Sum,
}

/// The left side of a product: a[r, k] is `data[r · row + k · step]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    data: &'a [f32],
    row: usize,
    step: usize,
}

impl<'a> Left<'a> {
    /// Stored row by row.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row: stride, step: 1 }
    }

    /// Stored column by column: the rows of `data` are the k of the product.
    pub(crate) fn turned(data: &'a [f32], stride: usize) -> Self {
        Self { data, row: 1, step: stride }
    }

    fn from(self, r: usize) -> Self {
        Self { data: &self.data[r * self.row..], ..self }
    }
}

dispatch! {
    /// out[r, c] = [out[r, c] +] Σ_k a[r, k] · panel[k, c], k in order.
    ///
    /// A function of its own for each instruction set: inlined into larger ones, its loops keep their bounds checks.
    ///
    /// # Shapes
    /// out: rows of `out_stride`, `cols` used; a: `[rows, k]`; panel: k rows of `panel_stride`, `cols` used.
    pub(crate) fn multiply(
        out: &mut [f32],
        out_stride: usize,
        a: Left,
        panel: &[f32],
        panel_stride: usize,
        rows: usize,
        k: usize,
        cols: usize,
        onto: Onto,
    ) = multiply_body[0]
}
dispatch! {
    /// [`multiply`] with a panel that lies in no near cache and is met once: it is asked for before it is needed.
    pub(crate) fn multiply_far(
        out: &mut [f32],
        out_stride: usize,
        a: Left,
        panel: &[f32],
        panel_stride: usize,
        rows: usize,
        k: usize,
        cols: usize,
        onto: Onto,
    ) = multiply_body[AHEAD]
}
dispatch! {
    /// [`multiply`] with each of some panels [k, WIDTH]; panel p starts at `p · step` and gives columns from `p · WIDTH` on.
    pub(crate) fn multiply_panels(
        out: &mut [f32],
        out_stride: usize,
        a: Left,
        panels: &[f32],
        step: usize,
        rows: usize,
        k: usize,
    ) = multiply_panels_body
}
#[inline(always)]
fn multiply_panels_body<const LEVEL: u8>(
    out: &mut [f32],
    out_stride: usize,
    a: Left,
    panels: &[f32],
    step: usize,
    rows: usize,
    k: usize,
) {
    let mut panels = panels;
    let mut out = out;
    // A run of multiply-adds waits for itself: few rows take several panels at once.
    while LEVEL == WIDE && rows < 4 && panels.len() > 3 * step {
        let mut r = 0;
        while rows - r >= 2 {
            side_by_side::<LEVEL, 2, 2>(&mut out[r * out_stride..], out_stride, a.from(r), panels, step, k);
            let (out, panels) = (&mut out[r * out_stride + 2 * WIDTH..], &panels[2 * step..]);
            side_by_side::<LEVEL, 2, 2>(out, out_stride, a.from(r), panels, step, k);
            r += 2;
        }
        if r < rows {
            side_by_side::<LEVEL, 1, 4>(&mut out[r * out_stride..], out_stride, a.from(r), panels, step, k);
        }
        (out, panels) = (&mut out[4 * WIDTH..], panels.get(4 * step..).unwrap_or_default());
    }
    for (p, panel) in panels.chunks(step).enumerate() {
        let out = &mut out[p * WIDTH..];
        multiply_body::<LEVEL, 0>(out, out_stride, a, panel, WIDTH, rows, k, WIDTH, Onto::Nothing);
    }
}

/// R rows times P panels, from zero.
#[inline(always)]
fn side_by_side<const LEVEL: u8, const R: usize, const P: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left,
    panels: &[f32],
    step: usize,
    k: usize,
) {
    let mut acc = [[[0.0f32; WIDTH]; P]; R];
    let panels: [&[[f32; WIDTH]]; P] = std::array::from_fn(|p| &panels[p * step..][..k * WIDTH].as_chunks().0[..k]);
    for kk in 0..k {
        for (r, acc) in acc.iter_mut().enumerate() {
            let x = a.data[r * a.row + kk * a.step];
            for (acc, panel) in acc.iter_mut().zip(panels) {
                for (acc, b) in acc.iter_mut().zip(&panel[kk]) {
                    *acc = mul_add::<LEVEL>(x, *b, *acc);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        out[r * out_stride..][..P * WIDTH].copy_from_slice(acc.as_flattened());
    }
}

/// A: rows of the panel that it is asked for before they are needed, 0 for none.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn multiply_body<const LEVEL: u8, const A: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left,
    panel: &[f32],
    panel_stride: usize,
    rows: usize,
    k: usize,
    cols: usize,
    onto: Onto,
) {
    let mut c = 0;
    // Wide registers take a block of 32 columns as two vectors; narrow ones 16 at a time, or the tile would spill.
    // Few rows more, because a run of multiply-adds waits for itself.
    while LEVEL == WIDE && rows < 4 && c + 64 <= cols {
        columns::<LEVEL, 64, A>(&mut out[c..], out_stride, a, &panel[c..], panel_stride, rows, k, onto);
        c += 64;
    }
    while LEVEL == WIDE && c + 32 <= cols {
        columns::<LEVEL, 32, A>(&mut out[c..], out_stride, a, &panel[c..], panel_stride, rows, k, onto);
        c += 32;
    }
    while c + 16 <= cols {
        columns::<LEVEL, 16, A>(&mut out[c..], out_stride, a, &panel[c..], panel_stride, rows, k, onto);
        c += 16;
    }
    while c + 8 <= cols {
        columns::<LEVEL, 8, A>(&mut out[c..], out_stride, a, &panel[c..], panel_stride, rows, k, onto);
        c += 8;
    }
    while c < cols {
        columns::<LEVEL, 1, A>(&mut out[c..], out_stride, a, &panel[c..], panel_stride, rows, k, onto);
        c += 1;
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn columns<const LEVEL: u8, const W: usize, const A: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left,
    panel: &[f32],
    panel_stride: usize,
    rows: usize,
    k: usize,
    onto: Onto,
) {
    let mut r = 0;
    macro_rules! take {
        ($n:literal) => {
            while rows - r >= $n {
                tile::<LEVEL, $n, W, A>(
                    &mut out[r * out_stride..],
                    out_stride,
                    a.from(r),
                    panel,
                    panel_stride,
                    k,
                    onto,
                );
                r += $n;
            }
        };
    }
    // 8 rows × 2 vectors fill the 32 wide registers; 4 rows × 2 vectors the 16 narrow ones.
    match LEVEL {
        WIDE => take!(8),
        FUSED | PLAIN => {}
        _ => unreachable!("no such instruction level"),
    }
    take!(4);
    take!(2);
    take!(1);
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile<const LEVEL: u8, const R: usize, const W: usize, const A: usize>(
    out: &mut [f32],
    out_stride: usize,
    a: Left,
    panel: &[f32],
    panel_stride: usize,
    k: usize,
    onto: Onto,
) {
    let mut acc = [[0.0f32; W]; R];
    if onto == Onto::Start {
        for (r, acc) in acc.iter_mut().enumerate() {
            acc.copy_from_slice(&out[r * out_stride..][..W]);
        }
    }
    // Steps that are not known beforehand, even where they are 1: knowing one, the compiler shuffles where it should broadcast.
    let Left { data: a, row, step } = a;
    if k > 0 {
        let last = (R - 1) * row + (k - 1) * step;
        assert!(last < a.len() && (k - 1) * panel_stride + W <= panel.len(), "panel: a side is too short");
    }
    for kk in 0..k {
        if A > 0 {
            ask_for::<W>(panel.as_ptr().wrapping_add((kk + A) * panel_stride));
        }
        // SAFETY: the assertion puts the last row of the panel, W numbers wide, inside it.
        let b = unsafe { &*panel.as_ptr().add(kk * panel_stride).cast::<[f32; W]>() };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the assertion puts the largest of these indices inside `a`.
            let x = unsafe { *a.get_unchecked(r * row + kk * step) };
            for w in 0..W {
                acc[w] = mul_add::<LEVEL>(x, b[w], acc[w]);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        let out = &mut out[r * out_stride..][..W];
        match onto {
            Onto::Sum => out.iter_mut().zip(acc).for_each(|(out, acc)| *out += acc),
            _ => out.copy_from_slice(acc),
        }
    }
}

/// Has W numbers brought into the first cache, if there are any at that address; elsewhere the processor is left to itself.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn ask_for<const W: usize>(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..(W * size_of::<f32>()).div_ceil(crate::memory::LINE) {
        use std::arch::x86_64::*;
        // SAFETY: every processor of this kind has the instruction, and it reads nothing that the program could see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(line * crate::memory::LINE)) };
    }
}

dispatch! {
    /// Writes `cols` rows of a row-major matrix as columns of a panel: panel[k, c] = rows[c, k]; other columns stay.
    pub(crate) fn transpose_into(panel: &mut [f32], rows: &[f32], stride: usize, k: usize, cols: usize) = transpose_body
}
#[inline(always)]
fn transpose_body<const LEVEL: u8>(panel: &mut [f32], rows: &[f32], stride: usize, k: usize, cols: usize) {
    const B: usize = 8;
    let mut k0 = 0;
    while k0 < k {
        let kb = B.min(k - k0);
        let mut c0 = 0;
        while c0 < cols {
            let cb = B.min(cols - c0);
            if kb == B && cb == B {
                let mut block = [[0.0f32; B]; B];
                for (c, line) in block.iter_mut().enumerate() {
                    line.copy_from_slice(&rows[(c0 + c) * stride + k0..][..B]);
                }
                for kk in 0..B {
                    let mut line = [0.0f32; B];
                    for c in 0..B {
                        line[c] = block[c][kk];
                    }
                    panel[(k0 + kk) * WIDTH + c0..][..B].copy_from_slice(&line);
                }
            } else {
                for c in 0..cb {
                    for kk in 0..kb {
                        panel[(k0 + kk) * WIDTH + c0 + c] = rows[(c0 + c) * stride + k0 + kk];
                    }
                }
            }
            c0 += cb;
        }
        k0 += kb;
    }
}

dispatch! {
    /// [`transpose_into`] of bf16 numbers, widened.
    pub(crate) fn transpose_bf16_into(panel: &mut [f32], rows: &[[u8; 2]], stride: usize, k: usize, cols: usize) = transpose_bf16_body
}
#[inline(always)]
fn transpose_bf16_body<const LEVEL: u8>(panel: &mut [f32], rows: &[[u8; 2]], stride: usize, k: usize, cols: usize) {
    #[cfg(target_arch = "x86_64")]
    if LEVEL == WIDE && k >= avx512::INPUTS && cols.is_multiple_of(avx512::ROWS) {
        for k0 in starts(k, avx512::INPUTS) {
            for c0 in (0..cols).step_by(avx512::ROWS) {
                // SAFETY: this level is chosen on processors with AVX-512 only.
                unsafe { avx512::transpose(&mut panel[k0 * WIDTH + c0..], &rows[c0 * stride + k0..], stride) };
            }
        }
        return;
    }
    // Neighbours in k stay together as the halves of a word until they lie in place: half as much to move about, and each half
    // becomes an f32 by one shift or mask.
    const B: usize = 8;
    let whole = if k >= 2 * B { cols - cols % B } else { 0 };
    for k0 in starts(k, 2 * B) {
        for c0 in (0..whole).step_by(B) {
            let mut block = [[0u32; B]; B];
            for (c, line) in block.iter_mut().enumerate() {
                let pairs: &[[u8; 4]] = rows[(c0 + c) * stride + k0..][..2 * B].as_flattened().as_chunks().0;
                line.iter_mut().zip(pairs).for_each(|(word, pair)| *word = u32::from_le_bytes(*pair));
            }
            for kk in 0..B {
                let (mut first, mut second) = ([0.0f32; B], [0.0f32; B]);
                for c in 0..B {
                    first[c] = f32::from_bits(block[c][kk] << 16);
                    second[c] = f32::from_bits(block[c][kk] & 0xffff_0000);
                }
                panel[(k0 + 2 * kk) * WIDTH + c0..][..B].copy_from_slice(&first);
                panel[(k0 + 2 * kk + 1) * WIDTH + c0..][..B].copy_from_slice(&second);
            }
        }
    }
    for c in whole..cols {
        for kk in 0..k {
            panel[kk * WIDTH + c] = wide(rows[c * stride + kk]);
        }
    }
}

/// Where blocks of `size` start that cover `k`; the last ends with it and may lie over the one before. None when `k` is smaller.
#[inline(always)]
fn starts(k: usize, size: usize) -> impl Iterator<Item = usize> {
    let whole = (0..k / size).map(move |i| i * size);
    let last = (k > size && !k.is_multiple_of(size)).then(|| k - size);
    whole.chain(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{assert_same_bits, halves, numbers};

    /// One output: a run of multiply-adds in order.
    fn by_hand(a: &[f32], panel: &[f32], stride: usize, c: usize, onto: Onto, there: f32) -> f32 {
        let start = if onto == Onto::Start { there } else { 0.0 };
        let run = a.iter().enumerate().fold(start, |sum, (k, &x)| x.mul_add(panel[k * stride + c], sum));
        if onto == Onto::Sum { there + run } else { run }
    }

    #[test]
    fn every_tile_is_one_run_of_fused_multiply_adds() {
        let (k, a_stride, stride, out_stride) = (21, 25, 90, 95);
        let (a, panel, start) = (numbers(1, 25 * a_stride), numbers(2, k * stride), numbers(3, 20 * out_stride));
        for (left, turned) in [(Left::rows(&a, a_stride), false), (Left::turned(&a, a_stride), true)] {
            for rows in [1, 2, 3, 7, 8, 19] {
                for cols in [1, 5, 8, 15, 16, 31, 32, 90] {
                    for onto in [Onto::Nothing, Onto::Start, Onto::Sum] {
                        let expected: Vec<f32> = (0..rows * cols)
                            .map(|i| {
                                let (r, c) = (i / cols, i % cols);
                                let row: Vec<f32> = (0..k)
                                    .map(|kk| if turned { a[kk * a_stride + r] } else { a[r * a_stride + kk] })
                                    .collect();
                                by_hand(&row, &panel, stride, c, onto, start[r * out_stride + c])
                            })
                            .collect();
                        let narrow = |f: &dyn Fn(&mut [f32])| -> Vec<f32> {
                            let mut out = start.clone();
                            f(&mut out);
                            (0..rows * cols).map(|i| out[i / cols * out_stride + i % cols]).collect()
                        };
                        // Both levels that fuse agree, whatever their tiles.
                        let wide = narrow(&|out| {
                            multiply_body::<WIDE, AHEAD>(out, out_stride, left, &panel, stride, rows, k, cols, onto)
                        });
                        let fused = narrow(&|out| {
                            multiply_body::<FUSED, 0>(out, out_stride, left, &panel, stride, rows, k, cols, onto)
                        });
                        assert_same_bits("wide", &wide, &expected);
                        assert_same_bits("fused", &fused, &expected);
                        let chosen =
                            narrow(&|out| multiply(out, out_stride, left, &panel, stride, rows, k, cols, onto));
                        for (x, y) in chosen.iter().zip(&expected) {
                            // A machine without fused multiply-add rounds twice.
                            assert!((x - y).abs() < 1e-5);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn panels_side_by_side_are_columns_side_by_side() {
        let k = 9;
        // Apart from each other, as the heads of a cache are.
        let step = 3 * k * WIDTH;
        for (rows, panels) in [(11, 3), (1, 1), (1, 4), (1, 7), (2, 4), (2, 9), (3, 5), (4, 5)] {
            let (a, b) = (numbers(1, rows * k), numbers(2, (panels - 1) * step + k * WIDTH));
            let mut all = vec![0.0; rows * panels * WIDTH];
            multiply_panels(&mut all, panels * WIDTH, Left::rows(&a, k), &b, step, rows, k);
            for (p, panel) in b.chunks(step).enumerate() {
                let mut one = vec![0.0; rows * WIDTH];
                multiply(&mut one, WIDTH, Left::rows(&a, k), panel, WIDTH, rows, k, WIDTH, Onto::Nothing);
                for (row, all) in one.chunks_exact(WIDTH).zip(all.chunks_exact(panels * WIDTH)) {
                    assert_same_bits("panel", row, &all[p * WIDTH..(p + 1) * WIDTH]);
                }
            }
        }
    }

    #[test]
    fn a_panel_is_the_transpose() {
        for (k, cols) in [(1, 1), (8, 8), (9, 17), (24, 32), (33, 32), (48, 23), (187, 32), (31, 16), (70, 16)] {
            let stride = k + 3;
            let rows = numbers(1, cols * stride);
            let mut panel = vec![7.0; k * WIDTH];
            transpose_into(&mut panel, &rows, stride, k, cols);
            let (bytes, same) = halves(&rows);
            let mut widened = vec![7.0; k * WIDTH];
            transpose_bf16_into(&mut widened, &bytes, stride, k, cols);
            // The way of processors without wide vectors.
            let mut narrow = vec![7.0; k * WIDTH];
            transpose_bf16_body::<FUSED>(&mut narrow, &bytes, stride, k, cols);
            assert_same_bits("narrow", &narrow, &widened);
            for kk in 0..k {
                for c in 0..WIDTH {
                    let expected = if c < cols { rows[c * stride + kk] } else { 7.0 };
                    assert_eq!(panel[kk * WIDTH + c], expected);
                    let expected = if c < cols { same[c * stride + kk] } else { 7.0 };
                    assert_eq!(widened[kk * WIDTH + c], expected);
                }
            }
        }
    }
}
