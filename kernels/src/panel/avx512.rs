//! bf16 rows into a panel with AVX-512: what limits decoding after memory itself is turning weights round, and compilers do it one by one.

use super::WIDTH;
use std::arch::x86_64::*;

/// Rows and inputs of a block.
pub(super) const ROWS: usize = 16;
pub(super) const INPUTS: usize = 32;

/// Writes a block of `ROWS` rows as columns: panel[k, c] is the k-th number of row c, widened.
///
/// Two neighbours of a row are a word; the words go through a transpose of 16 by 16 in four steps of shuffles, and each then gives two
/// rows of the panel, by a shift and by a mask.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(panel: &mut [f32], rows: &[[u8; 2]], stride: usize) {
    assert!(
        rows.len() >= (ROWS - 1) * stride + INPUTS && panel.len() >= (INPUTS - 1) * WIDTH + ROWS,
        "panel: a side is too short for a block"
    );
    // SAFETY: the assertion puts `INPUTS` numbers of two bytes behind each row's start.
    let a: [__m512i; ROWS] =
        std::array::from_fn(|r| unsafe { _mm512_loadu_si512(rows.as_ptr().add(r * stride).cast()) });
    // Pairs of rows, then fours: lane l of `c[4 i + j]` holds word 4 l + j of rows 4 i to 4 i + 3.
    let b: [__m512i; ROWS] = std::array::from_fn(|i| {
        let (x, y) = (a[i / 2 * 2], a[i / 2 * 2 + 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(x, y) } else { _mm512_unpackhi_epi32(x, y) }
    });
    let c: [__m512i; ROWS] = std::array::from_fn(|i| {
        let first = i / 4 * 4 + i % 4 / 2;
        let (x, y) = (b[first], b[first + 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(x, y) } else { _mm512_unpackhi_epi64(x, y) }
    });
    for j in 0..4 {
        // Even and odd lanes of rows 0 to 7 and of rows 8 to 15.
        let even = [_mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j])];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]), _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j])];
        let words = [
            _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
            _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
        ];
        for (l, word) in words.into_iter().enumerate() {
            let k = 2 * (4 * l + j);
            let upper = _mm512_and_si512(word, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            // SAFETY: the assertion puts `ROWS` numbers behind each of the `INPUTS` rows of the panel.
            unsafe {
                _mm512_storeu_si512(panel.as_mut_ptr().add(k * WIDTH).cast(), _mm512_slli_epi32::<16>(word));
                _mm512_storeu_si512(panel.as_mut_ptr().add((k + 1) * WIDTH).cast(), upper);
            }
        }
    }
}
