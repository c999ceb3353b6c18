//! Sixteen rows of sixteen words turned round with AVX-512, and f32 rounded to pairs with AVX512-BF16.

use super::{of, pair};
use std::arch::x86_64::*;

const SIDE: usize = 16;

/// to[c, r] = from[r, c] for a block of `SIDE` by `SIDE`: pairs of rows, then fours, then lanes of four twice.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(to: &mut [u32], to_stride: usize, from: &[u32], from_stride: usize) {
    let last = SIDE - 1;
    assert!(
        from.len() >= last * from_stride + SIDE && to.len() >= last * to_stride + SIDE,
        "pairs: a side is too short for a block"
    );
    // SAFETY: the assertion puts `SIDE` words behind each row's start.
    let rows = std::array::from_fn(|r| unsafe { _mm512_loadu_si512(from.as_ptr().add(r * from_stride).cast()) });
    // SAFETY: and behind each that is written.
    unsafe { turn(to.as_mut_ptr(), to_stride, rows) };
}

/// The same of rows whose words lie at any address as pairs of bf16; `from_stride` counts these.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_stored(to: &mut [u32], to_stride: usize, from: &[[u8; 2]], from_stride: usize) {
    let last = SIDE - 1;
    assert!(
        from.len() >= last * from_stride + 2 * SIDE && to.len() >= last * to_stride + SIDE,
        "pairs: a side is too short for a block"
    );
    // SAFETY: the assertion puts `SIDE` words behind each row's start.
    let rows = std::array::from_fn(|r| unsafe { _mm512_loadu_si512(from.as_ptr().add(r * from_stride).cast()) });
    // SAFETY: and behind each that is written.
    unsafe { turn(to.as_mut_ptr(), to_stride, rows) };
}

/// # Safety
/// Behind `to` are `SIDE` rows of `SIDE` words, `to_stride` apart.
#[target_feature(enable = "avx512f")]
unsafe fn turn(to: *mut u32, to_stride: usize, a: [__m512i; SIDE]) {
    let b: [__m512i; SIDE] = std::array::from_fn(|i| {
        let (x, y) = (a[i / 2 * 2], a[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    // Lane l of `c[4 i + j]` holds column 4 l + j of rows 4 i to 4 i + 3.
    let c: [__m512i; SIDE] = std::array::from_fn(|i| {
        let first = i / 4 * 4 + i % 4 / 2;
        let (x, y) = (b[first], b[first + 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    for j in 0..4 {
        let even = [_mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j])];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j])];
        let columns = [
            _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
            _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
        ];
        for (l, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller has room for it.
            unsafe { _mm512_storeu_si512(to.add((4 * l + j) * to_stride).cast(), column) };
        }
    }
}

/// [`super::rows_into`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn rows_into(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, m: usize) {
    const AT_ONCE: usize = 2 * SIDE;
    for (to, x) in to.chunks_mut(to_stride).zip(x.chunks(x_stride)) {
        let (to, x) = (&mut to[..of(m)], &x[..m]);
        let (whole, rest) = x.as_chunks::<AT_ONCE>();
        let (words, last) = to.as_chunks_mut::<SIDE>();
        for (to, x) in words.iter_mut().zip(whole) {
            // SAFETY: both are arrays of as many numbers as are read and written.
            unsafe {
                let (lower, upper) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(SIDE)));
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(upper, lower));
                _mm512_storeu_si512(to.as_mut_ptr().cast(), both);
            }
        }
        debug_assert!(last.is_empty(), "steps are whole");
        if let Some(to) = words.get_mut(whole.len()) {
            to.fill(0);
            let number = |k: usize| rest.get(k).copied().unwrap_or(0.0);
            to.iter_mut()
                .take(rest.len().div_ceil(2))
                .enumerate()
                .for_each(|(i, to)| *to = pair(number(2 * i), number(2 * i + 1)));
        }
    }
}

/// [`super::columns_into`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn columns_into(to: &mut [u32], to_stride: usize, x: &[f32], x_stride: usize, rows: usize, cols: usize) {
    // Halves 0 to 15 are the first row's, 16 to 31 the second's: a word takes one of each.
    let mut places = [0u16; 2 * SIDE];
    places.iter_mut().enumerate().for_each(|(i, place)| *place = (i / 2 + i % 2 * SIDE) as u16);
    // SAFETY: an array of 64 bytes.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    for (i, to) in to.chunks_mut(to_stride).take(rows.div_ceil(2)).enumerate() {
        let first = &x[2 * i * x_stride..][..cols];
        let second = if 2 * i + 1 < rows { Some(&x[(2 * i + 1) * x_stride..][..cols]) } else { None };
        let to = &mut to[..cols];
        let whole = cols / SIDE * SIDE;
        for c in (0..whole).step_by(SIDE) {
            // SAFETY: all three have `SIDE` numbers from c on.
            unsafe {
                let lower = _mm512_loadu_ps(first.as_ptr().add(c));
                let upper = second.map_or(_mm512_setzero_ps(), |second| _mm512_loadu_ps(second.as_ptr().add(c)));
                let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(upper, lower));
                _mm512_storeu_si512(to.as_mut_ptr().add(c).cast(), _mm512_permutexvar_epi16(places, both));
            }
        }
        for c in whole..cols {
            to[c] = pair(first[c], second.map_or(0.0, |second| second[c]));
        }
    }
}
