//! The product of bf16 numbers, summed in f32: each side is rounded to bf16, or written as the sum of three bf16 numbers, which loses nothing.
//!
//! Of two such sums six of the nine products are taken; what the others would add is below what f32 rounds away (Henry, Tang & Heinecke 2019,
//! arXiv:1904.06376). So f32 goes through the processor's matrix instructions, three times as fast as through multiply-adds.
//!
//! Numbers that meet in a product lie in pairs, as these instructions want them: a word holds two neighbours of the dimension that is summed over,
//! the first in its lower half. Sixteen words are a step; where a number has three parts, a step of each part follows the one before. It hides
//! whether the processor has tiles (`pairs/amx.rs`) or widens the words and multiplies in f32, which gives the same accuracy and not the speed. What must
//! stay true: an output's bits depend on its row of the left side, its column of the right side and the value it starts from; one product over all
//! pairs has the bits of several over stretches of whole steps, one onto the other.

use crate::vector::{FUSED, PLAIN, WIDE, dispatch, mul_add};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Columns of a panel: two tiles side by side.
pub(crate) const WIDTH: usize = crate::panel::WIDTH;
const _: () = assert!(WIDTH == 32);
/// Pairs of one step: sides are filled up with zeros to whole steps.
pub(crate) const STEP: usize = 16;

/// What stands for a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parts {
    /// The nearest bf16.
    One,
    /// Three that add up to it: each takes the eight leading bits of what is left.
    Three,
}

impl Parts {
    pub(crate) const fn count(self) -> usize {
        match self {
            Parts::One => 1,
            Parts::Three => 3,
        }
    }

    /// Words, in whole steps, that hold `m` numbers.
    pub(crate) const fn words(self, m: usize) -> usize {
        of(m) * self.count()
    }

    /// Words of whole steps before the one in which pair `i` lies.
    pub(crate) const fn whole(self, i: usize) -> usize {
        i / STEP * STEP * self.count()
    }

    /// Where the parts of pair `i` lie, the largest first.
    fn places(self, i: usize) -> impl Iterator<Item = usize> {
        let first = self.whole(i) + i % STEP;
        (0..self.count()).map(move |part| first + part * STEP)
    }
}

/// Pairs, in whole steps, that hold `m` numbers.
pub(crate) const fn of(m: usize) -> usize {
    m.div_ceil(2 * STEP) * STEP
}

/// The words of a row that others of its kind stand beside: where eight of them or more would meet in one place of the first cache, a step further apart.
pub(crate) fn apart(words: usize) -> usize {
    if (words / STEP).is_multiple_of(8) { words + STEP } else { words }
}

/// To the nearest bf16, ties to even, in the lower half of a word. What is not a number stays none; subnormal numbers become 0, as in the
/// processors' own instruction, whose products take them for 0, too.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let normal = if bits & 0x7f80_0000 == 0 { bits >> 16 & 0x8000 } else { nearest };
    if x.is_nan() { 0x7fc0 } else { normal }
}

/// Three bf16 numbers that add up to x, the largest first, in the upper halves of words. Exactly, unless x is below 2^-110 or above 3.38e38: parts
/// that are subnormal count as 0 in the processor's products, and what rounds to infinity becomes no number.
#[inline(always)]
fn split(x: f32) -> [u32; 3] {
    let nearest = |x: f32| x.to_bits().wrapping_add(0x8000) & 0xffff_0000;
    let first = nearest(x);
    let rest = x - f32::from_bits(first);
    let second = nearest(rest);
    // No more than eight bits are left.
    [first, second, (rest - f32::from_bits(second)).to_bits()]
}

/// Two numbers as words, one of each part.
#[inline(always)]
fn pair(first: f32, second: f32, parts: Parts) -> [u32; 3] {
    match parts {
        Parts::One => [round(first) | round(second) << 16, 0, 0],
        Parts::Three => {
            let (first, second) = (split(first), split(second));
            std::array::from_fn(|part| first[part] >> 16 | second[part] & 0xffff_0000)
        }
    }
}

dispatch! {
    /// Rows of `m` numbers as rows of words, the last step filled up with zeros.
    pub(crate) fn rows_into(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, m: usize, parts: Parts) = rows_into_body
}
#[inline(always)]
fn rows_into_body<const LEVEL: u8>(
    to: &mut [u32],
    to_stride: usize,
    x: &[f32],
    x_stride: usize,
    m: usize,
    parts: Parts,
) {
    #[cfg(target_arch = "x86_64")]
    let done = if LEVEL == WIDE { avx512::rows_into(to, to_stride, x, x_stride, m, parts) } else { 0 };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    if done == m {
        return;
    }
    for (to, x) in to.chunks_mut(to_stride).zip(x.chunks(x_stride)) {
        to[parts.whole(done / 2)..parts.words(m)].fill(0);
        for (i, x) in (done / 2..).zip(x[done..m].chunks(2)) {
            let words = pair(x[0], x.get(1).copied().unwrap_or(0.0), parts);
            parts.places(i).zip(words).for_each(|(place, word)| to[place] = word);
        }
    }
}

dispatch! {
    /// Two rows each as one row of words for each part: to[i, c] is of x[2 i, c] and x[2 i + 1, c]. Other columns, and pairs of rows that are not
    /// there, stay.
    pub(crate) fn columns_into(
        to: &mut [u32],
        to_stride: usize,
        x: &[f32],
        x_stride: usize,
        rows: usize,
        cols: usize,
        parts: Parts,
    ) = columns_into_body
}
#[inline(always)]
fn columns_into_body<const LEVEL: u8>(
    to: &mut [u32],
    to_stride: usize,
    x: &[f32],
    x_stride: usize,
    rows: usize,
    cols: usize,
    parts: Parts,
) {
    #[cfg(target_arch = "x86_64")]
    let done = if LEVEL == WIDE { avx512::columns_into(to, to_stride, x, x_stride, rows, cols, parts) } else { 0 };
    #[cfg(not(target_arch = "x86_64"))]
    let done = 0;
    for i in 0..if done < cols { rows.div_ceil(2) } else { 0 } {
        let first = &x[2 * i * x_stride..][..cols];
        let second = if 2 * i + 1 < rows { Some(&x[(2 * i + 1) * x_stride..][..cols]) } else { None };
        for c in done..cols {
            let words = pair(first[c], second.map_or(0.0, |second| second[c]), parts);
            parts.places(i).zip(words).for_each(|(place, word)| to[place * to_stride + c] = word);
        }
    }
}

dispatch! {
    /// to[c, r] = from[r, c]; other places stay.
    pub(crate) fn transpose(to: &mut [u32], to_stride: usize, from: &[u32], from_stride: usize, rows: usize, cols: usize) = transpose_body
}
#[inline(always)]
fn transpose_body<const LEVEL: u8>(
    to: &mut [u32],
    to_stride: usize,
    from: &[u32],
    from_stride: usize,
    rows: usize,
    cols: usize,
) {
    const B: usize = 16;
    for r in (0..rows).step_by(B) {
        for c in (0..cols).step_by(B) {
            #[cfg(target_arch = "x86_64")]
            if LEVEL == WIDE && r + B <= rows && c + B <= cols {
                // SAFETY: this level is chosen on processors with AVX-512 only.
                unsafe {
                    avx512::transpose(
                        &mut to[c * to_stride + r..],
                        to_stride,
                        &from[r * from_stride + c..],
                        from_stride,
                    )
                };
                continue;
            }
            for c in c..cols.min(c + B) {
                for r in r..rows.min(r + B) {
                    to[c * to_stride + r] = from[r * from_stride + c];
                }
            }
        }
    }
}

/// Rows of numbers that are bf16 already, turned round: to[i, r] holds numbers 2 i and 2 i + 1 of row r, the last step filled up with zeros. Other
/// columns stay.
pub(crate) fn stored_into(to: &mut [u32], to_stride: usize, rows: &[[u8; 2]], stride: usize, m: usize, count: usize) {
    let word = |k: usize, pair: &[[u8; 2]]| {
        let half = |k: usize| u32::from(u16::from_le_bytes(pair[k]));
        if k + 1 < m { half(0) | half(1) << 16 } else { half(0) }
    };
    let mut done = (0, 0);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        done = (m / (2 * STEP) * STEP, count / 16 * 16);
        for r in (0..done.1).step_by(16) {
            for i in (0..done.0).step_by(STEP) {
                // SAFETY: the processor has AVX-512.
                unsafe {
                    avx512::transpose_stored(
                        &mut to[i * to_stride + r..],
                        to_stride,
                        &rows[r * stride + 2 * i..],
                        stride,
                    )
                };
            }
        }
    }
    for i in 0..of(m) {
        for r in if i < done.0 { done.1 } else { 0 }..count {
            let k = 2 * i;
            to[i * to_stride + r] = if k < m { word(k, &rows[r * stride + k..]) } else { 0 };
        }
    }
}

/// The left and the right side of a product.
#[derive(Clone, Copy)]
pub(crate) struct Sides<'a> {
    /// Rows of words.
    pub left: &'a [u32],
    pub left_stride: usize,
    /// Panels `[words, WIDTH]`: panel p starts at `p · panel` and gives columns from `p · WIDTH` on.
    pub panels: &'a [u32],
    pub panel: usize,
    /// Of numbers, in whole steps.
    pub pairs: usize,
    pub parts: Parts,
}

impl Sides<'_> {
    fn words(self) -> usize {
        self.pairs * self.parts.count()
    }
}

/// out[r, c] = [out[r, c], when `onto`, +] the sum over the pairs, in order.
///
/// # Shapes
/// out: rows of `out_stride`, `cols` used; left: `[rows, words]`; panels: `[cols / WIDTH, words, WIDTH]`.
pub(crate) fn multiply(out: &mut [f32], out_stride: usize, sides: Sides, rows: usize, cols: usize, onto: bool) {
    if rows == 0 || cols == 0 {
        return;
    }
    let Sides { left, left_stride, panels, panel, pairs, .. } = sides;
    let words = sides.words();
    assert!(
        pairs.is_multiple_of(STEP)
            && left.len() >= (rows - 1) * left_stride + words
            && panels.len() >= (cols.div_ceil(WIDTH) - 1) * panel + words * WIDTH
            && out.len() >= (rows - 1) * out_stride + cols,
        "pairs: a side is too short for [{rows}, {pairs}] and [{pairs}, {cols}]"
    );
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::allowed() {
        // SAFETY: the processor has tiles and the system lets us use them; the assertion above is what it asks of the sides.
        return unsafe { amx::multiply(out, out_stride, sides, rows, cols, onto) };
    }
    multiply_widened(out, out_stride, sides, rows, cols, onto);
}

/// For several products of one thread: as long as this lives the processor's tiles stay set up.
pub(crate) struct Held {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    _tiles: Option<amx::Held>,
}

pub(crate) fn hold() -> Held {
    Held {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        _tiles: amx::allowed().then(amx::Held::new),
    }
}

/// Whether products in bf16 are faster than those in f32 here.
pub fn fast() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::allowed() {
        return true;
    }
    false
}

dispatch! {
    /// [`multiply`] on processors without tiles.
    fn multiply_widened(out: &mut [f32], out_stride: usize, sides: Sides, rows: usize, cols: usize, onto: bool) = widened_body
}
#[inline(always)]
fn widened_body<const LEVEL: u8>(
    out: &mut [f32],
    out_stride: usize,
    sides: Sides,
    rows: usize,
    cols: usize,
    onto: bool,
) {
    for (p, c) in (0..cols).step_by(WIDTH).enumerate() {
        let panel = &sides.panels[p * sides.panel..];
        let cols = WIDTH.min(cols - c);
        let mut r = 0;
        macro_rules! take {
            ($n:literal) => {
                while rows - r >= $n {
                    let out = &mut out[r * out_stride + c..];
                    widened_tile::<LEVEL, $n>(
                        out,
                        out_stride,
                        &sides.left[r * sides.left_stride..],
                        panel,
                        sides,
                        cols,
                        onto,
                    );
                    r += $n;
                }
            };
        }
        match LEVEL {
            WIDE => take!(8),
            FUSED | PLAIN => {}
            _ => unreachable!("no such instruction level"),
        }
        take!(2);
        take!(1);
    }
}

#[inline(always)]
fn widened_tile<const LEVEL: u8, const R: usize>(
    out: &mut [f32],
    out_stride: usize,
    left: &[u32],
    panel: &[u32],
    sides: Sides,
    cols: usize,
    onto: bool,
) {
    let first = |word: u32| f32::from_bits(word << 16);
    let second = |word: u32| f32::from_bits(word & 0xffff_0000);
    let mut acc = [[0.0f32; WIDTH]; R];
    if onto {
        for (r, acc) in acc.iter_mut().enumerate() {
            acc[..cols].copy_from_slice(&out[r * out_stride..][..cols]);
        }
    }
    let rows: [&[u32]; R] = std::array::from_fn(|r| &left[r * sides.left_stride..][..sides.words()]);
    let panel = &panel.as_chunks::<WIDTH>().0[..sides.words()];
    for i in 0..sides.pairs {
        // Parts add up to the number they are of.
        let mut places = sides.parts.places(i);
        let at = places.next().unwrap_or_default();
        let mut left: [[f32; 2]; R] = std::array::from_fn(|r| [first(rows[r][at]), second(rows[r][at])]);
        let mut right = panel[at].map(|word| [first(word), second(word)]);
        for place in places {
            let add = |number: &mut [f32; 2], word| *number = [number[0] + first(word), number[1] + second(word)];
            left.iter_mut().zip(rows).for_each(|(left, row)| add(left, row[place]));
            right.iter_mut().zip(panel[place]).for_each(|(right, word)| add(right, word));
        }
        for half in 0..2 {
            for (acc, left) in acc.iter_mut().zip(left) {
                for (acc, right) in acc.iter_mut().zip(right) {
                    *acc = mul_add::<LEVEL>(left[half], right[half], *acc);
                }
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        out[r * out_stride..][..cols].copy_from_slice(&acc[..cols]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{assert_close, assert_same_bits, halves, numbers};

    const BOTH: [Parts; 2] = [Parts::One, Parts::Three];

    /// The instructions for it round and split as the loops do.
    #[test]
    fn all_ways_write_the_same() {
        let mut x = numbers(1, 6 * 90);
        x.iter_mut().step_by(7).enumerate().for_each(|(i, x)| *x = [f32::NAN, 1e-39, -1e-42, f32::MAX][i % 4]);
        for (rows, m, parts) in
            [(6, 90), (5, 31), (1, 64), (3, 33)].into_iter().flat_map(|(r, m)| BOTH.map(|p| (r, m, p)))
        {
            let stride = apart(parts.words(m));
            let (mut a, mut b) = (vec![7; rows * stride], vec![7; rows * stride]);
            rows_into(&mut a, stride, &x, 90, m, parts);
            rows_into_body::<PLAIN>(&mut b, stride, &x[..rows * 90], 90, m, parts);
            assert_eq!(a, b, "{rows}, {m}, {parts:?}");
            let words = parts.words(rows);
            let (mut a, mut b) = (vec![7; words * 95], vec![7; words * 95]);
            columns_into(&mut a, 95, &x, 90, rows, m, parts);
            columns_into_body::<PLAIN>(&mut b, 95, &x, 90, rows, m, parts);
            assert_eq!(a, b, "columns {rows}, {m}, {parts:?}");
        }
    }

    #[test]
    fn three_parts_add_up_to_the_number() {
        // 1 + 2^-8 is nearer to 1 + 2^-7 by this rule, which takes the half way up; what is too much is taken back.
        let by_hand = split(1.0 + 1.0 / 256.0).map(f32::from_bits);
        assert_eq!(by_hand, [1.0 + 1.0 / 128.0, -1.0 / 256.0, 0.0]);
        let spread = numbers(1, 4000).into_iter().enumerate().map(|(i, x)| x * 2.0f32.powi(i as i32 % 200 - 100));
        for x in spread.chain([0.0, -0.0, 1.0 / 3.0, f32::EPSILON, 3.3e38, -3.3e38, 2.0f32.powi(-110)]) {
            let parts = split(x);
            assert!(parts.iter().all(|bits| bits & 0xffff == 0), "{x:e}: not bf16");
            let sum: f64 = parts.iter().map(|bits| f64::from(f32::from_bits(*bits))).sum();
            assert_eq!(sum, f64::from(x), "{x:e}");
        }
        for x in [f32::NAN, f32::INFINITY, f32::MAX, f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff)] {
            assert!(split(x).iter().any(|bits| f32::from_bits(*bits).is_nan()), "{:x}", x.to_bits());
        }
    }

    /// The value of a number once it is bf16.
    fn rounded(x: f32) -> f32 {
        f32::from_bits(round(x) << 16)
    }

    #[test]
    fn rounding_by_hand() {
        // 1 + 2^-8 is half way between 1 and 1 + 2^-7: the even one. A little more goes up. The largest f32 is nearer to infinity.
        for (x, to) in [
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (1.004, 1.0078125),
            (-2.5, -2.5),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
            (f32::MIN_POSITIVE, f32::MIN_POSITIVE),
            (-1.1e-38, 0.0),
        ] {
            assert_eq!(rounded(x), to, "{x}");
        }
        for bits in [0x7f80_0001, 0x7fff_ffff, 0xffff_ffff] {
            assert!(rounded(f32::from_bits(bits)).is_nan());
        }
    }

    #[test]
    fn words_lie_where_they_should() {
        let x = numbers(1, 80 * 40);
        // Word k of a step's run: which pair it is of, and which part.
        let place = |k: usize, parts: Parts| (k / (STEP * parts.count()) * STEP + k % STEP, k / STEP % parts.count());
        for (m, parts) in [1, 7, 32, 37].into_iter().flat_map(|m| BOTH.map(|parts| (m, parts))) {
            let words = parts.words(m);
            let stride = words + 3;
            let mut to = vec![7; 5 * stride];
            rows_into(&mut to, stride, &x[..5 * 40], 40, m, parts);
            for (i, word) in to.iter().enumerate() {
                let (r, k) = (i / stride, i % stride);
                let at = |k: usize| if k < m { x[r * 40 + k] } else { 0.0 };
                let (i, part) = place(k, parts);
                let expected = if k < words { pair(at(2 * i), at(2 * i + 1), parts)[part] } else { 7 };
                assert_eq!(*word, expected, "{m}: {r}, {k}");
            }
        }
        let sizes = [(5, 33), (4, 1), (1, 40), (75, 32)];
        for (rows, cols, parts) in sizes.into_iter().flat_map(|(r, c)| BOTH.map(|parts| (r, c, parts))) {
            let mut to = vec![7; parts.words(rows) * 41];
            columns_into(&mut to, 41, &x, 40, rows, cols, parts);
            for (i, word) in to.iter().enumerate() {
                let (k, c) = (i / 41, i % 41);
                let at = |r: usize| if r < rows { x[r * 40 + c] } else { 0.0 };
                let (i, part) = place(k, parts);
                let there = c < cols && 2 * i < rows;
                let expected = if there { pair(at(2 * i), at(2 * i + 1), parts)[part] } else { 7 };
                assert_eq!(*word, expected, "{rows}, {cols}: {k}, {c}");
            }
        }
    }

    #[test]
    fn a_transpose_is_one() {
        for (rows, cols) in [(1, 1), (16, 16), (17, 33), (48, 32), (5, 40)] {
            let (from_stride, to_stride) = (cols + 3, rows + 5);
            let from: Vec<u32> = (0..(rows * from_stride) as u32).collect();
            let mut to = vec![u32::MAX; cols * to_stride];
            transpose(&mut to, to_stride, &from, from_stride, rows, cols);
            for (i, word) in to.iter().enumerate() {
                let (c, r) = (i / to_stride, i % to_stride);
                let expected = if r < rows { from[r * from_stride + c] } else { u32::MAX };
                assert_eq!(*word, expected, "{rows}, {cols}: {r}, {c}");
            }
        }
    }

    #[test]
    fn what_is_stored_in_bf16_is_turned_round_as_it_is() {
        for (count, m) in [(1, 1), (16, 32), (20, 75), (32, 64), (5, 33)] {
            let stride = m + 3;
            let (bytes, same) = halves(&numbers(1, count * stride));
            let pairs = of(m);
            let mut rows = vec![0; count * pairs];
            rows_into(&mut rows, pairs, &same, stride, m, Parts::One);
            let (mut expected, mut to) = (vec![7; pairs * WIDTH], vec![7; pairs * WIDTH]);
            transpose(&mut expected, WIDTH, &rows, pairs, count, pairs);
            stored_into(&mut to, WIDTH, &bytes, stride, m, count);
            assert_eq!(to, expected, "{count}, {m}");
        }
    }

    type Multiply = fn(&mut [f32], usize, Sides, usize, usize, bool);

    /// The ways to multiply that this machine has.
    fn ways() -> Vec<(&'static str, Multiply)> {
        let mut ways: Vec<(&str, Multiply)> = vec![("widened", multiply_widened), ("narrow", widened_body::<FUSED>)];
        if fast() {
            ways.push(("tiles", multiply));
        }
        ways
    }

    #[test]
    fn products_are_those_of_the_numbers_in_any_company_and_in_any_stretches() {
        let sizes = [(1, 1, 1), (3, 40, 31), (16, 64, 32), (33, 100, 70), (50, 200, 33), (64, 129, 64), (97, 520, 90)];
        for ((rows, m, cols), parts) in sizes.into_iter().flat_map(|size| BOTH.map(|parts| (size, parts))) {
            let (pairs, words) = (of(m), parts.words(m));
            let (stride, out_stride) = (apart(words), cols + 6);
            let (x, w, start) = (numbers(1, rows * m), numbers(2, cols * m), numbers(3, rows * out_stride));
            let mut left = vec![0; rows * stride];
            rows_into(&mut left, stride, &x, m, m, parts);
            let mut turned = vec![0; cols * words];
            rows_into(&mut turned, words, &w, m, m, parts);
            let mut panels = vec![0; cols.div_ceil(WIDTH) * words * WIDTH];
            for (p, panel) in panels.chunks_mut(words * WIDTH).enumerate() {
                let cols = WIDTH.min(cols - p * WIDTH);
                transpose(panel, WIDTH, &turned[p * WIDTH * words..], words, cols, words);
            }
            let panel = words * WIDTH;
            let sides = Sides { left: &left, left_stride: stride, panels: &panels, panel, pairs, parts };
            let number = |x: f32| f64::from(if parts == Parts::One { rounded(x) } else { x });
            for (name, multiply) in ways() {
                for onto in [false, true] {
                    let mut out = start.clone();
                    multiply(&mut out, out_stride, sides, rows, cols, onto);
                    let mut expected: Vec<f64> = start.iter().map(|&x| f64::from(x)).collect();
                    for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                        let sum: f64 = (0..m).map(|k| number(x[r * m + k]) * number(w[c * m + k])).sum();
                        let there = if onto { expected[r * out_stride + c] } else { 0.0 };
                        expected[r * out_stride + c] = there + sum;
                    }
                    // At most 520 products in ±1, summed one after the other.
                    assert_close(name, &out, &expected, 2e-5);
                    // A row alone, and the sum in two stretches.
                    let last = (rows - 1) * out_stride..(rows - 1) * out_stride + cols;
                    let mut alone = start[last.clone()].to_vec();
                    let one = Sides { left: &left[(rows - 1) * stride..], ..sides };
                    multiply(&mut alone, cols, one, 1, cols, onto);
                    assert_same_bits(name, &alone, &out[last]);
                    if pairs > STEP && cols <= WIDTH {
                        let mut both = start.clone();
                        multiply(&mut both, out_stride, Sides { pairs: STEP, ..sides }, rows, cols, onto);
                        let first = STEP * parts.count();
                        let (left, panels) = (&left[first..], &panels[first * WIDTH..]);
                        let rest = Sides { left, panels, pairs: pairs - STEP, ..sides };
                        multiply(&mut both, out_stride, rest, rows, cols, true);
                        assert_same_bits(name, &both, &out);
                    }
                }
            }
        }
    }

    /// In three parts a long product is as close to the exact one as a run of multiply-adds is, and closer than what these round away: positive
    /// numbers, so that what is left out would add up.
    #[test]
    fn three_parts_are_as_accurate_as_multiply_adds() {
        let (rows, m, cols) = (16, 4096, WIDTH);
        let positive = |seed, n| -> Vec<f32> { numbers(seed, n).iter().map(|x| 1.5 + x / 2.0).collect() };
        let (x, w) = (positive(1, rows * m), positive(2, m * cols));
        let parts = Parts::Three;
        let words = parts.words(m);
        let (mut left, mut panels) = (vec![0; rows * words], vec![0; words * WIDTH]);
        rows_into(&mut left, words, &x, m, m, parts);
        columns_into(&mut panels, WIDTH, &w, cols, m, cols, parts);
        let panel = words * WIDTH;
        let sides = Sides { left: &left, left_stride: words, panels: &panels, panel, pairs: of(m), parts };
        for (name, multiply) in ways() {
            let mut out = vec![0.0; rows * cols];
            multiply(&mut out, cols, sides, rows, cols, false);
            let (mut off, mut off_f32) = (0.0f64, 0.0f64);
            for (i, out) in out.iter().enumerate() {
                let products = (0..m).map(|k| (x[i / cols * m + k], w[k * cols + i % cols]));
                let exact: f64 = products.clone().map(|(x, w)| f64::from(x) * f64::from(w)).sum();
                let run = products.fold(0.0, |sum, (x, w)| x.mul_add(w, sum));
                off += (f64::from(*out) / exact - 1.0).powi(2);
                off_f32 += (f64::from(run) / exact - 1.0).powi(2);
            }
            // Other roundings of as many sums, by chance a little more or less.
            assert!(off.sqrt() <= 1.5 * off_f32.sqrt(), "{name}: off by {off:e}, multiply-adds by {off_f32:e}");
        }
    }
}
