//! Sixteen rows of sixteen words turned round with AVX-512.

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
