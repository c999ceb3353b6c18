//! Matrices as they are stored: f32 in memory, or bf16 as it lies in a file; and how products over them are computed.
//!
//! Hides the width of a number from the products. bf16 is the upper half of an f32, so widening is exact, and a product over bf16
//! weights has the bits of the same product over the widened ones. Numbers are widened where they are laid out for a product, a few
//! kilobytes at a time, and nowhere is a whole matrix copied. Files may put their numbers at any address, so bf16 is pairs of bytes.

use crate::pairs::{self, Parts};
use crate::panel;
use crate::vector::dispatch;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Row-major numbers; the shape is the caller's.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub numbers: Numbers<'a>,
    /// How products over it are computed.
    pub compute: Compute,
}

#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    F32(&'a [f32]),
    /// Little-endian, as safetensors has them.
    Bf16(&'a [[u8; 2]]),
}

/// What both sides of a product are; sums are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    #[default]
    F32,
    /// f32, each number written as the sum of three in bf16 and six products taken of two of them: as accurate as [`Compute::F32`] for numbers
    /// from 2^-110 to 3.38e38 (infinities become no numbers), with other bits, which are the same on all processors with tiles.
    Bf16x6,
    /// Rounded to bf16 before they meet.
    Bf16,
}

impl Compute {
    /// What stands for a number where products are of bf16.
    pub(crate) fn parts(self) -> Option<Parts> {
        match self {
            Compute::F32 => None,
            Compute::Bf16x6 => Some(Parts::Three),
            Compute::Bf16 => Some(Parts::One),
        }
    }
}

impl<'a> From<&'a [f32]> for Matrix<'a> {
    fn from(values: &'a [f32]) -> Self {
        Matrix { numbers: Numbers::F32(values), compute: Compute::F32 }
    }
}

impl<'a> From<&'a Vec<f32>> for Matrix<'a> {
    fn from(values: &'a Vec<f32>) -> Self {
        values.as_slice().into()
    }
}

impl<'a> From<&'a [[u8; 2]]> for Matrix<'a> {
    fn from(values: &'a [[u8; 2]]) -> Self {
        Matrix { numbers: Numbers::Bf16(values), compute: Compute::F32 }
    }
}

impl<'a> Matrix<'a> {
    pub fn computed(self, compute: Compute) -> Matrix<'a> {
        Matrix { compute, ..self }
    }

    pub fn len(self) -> usize {
        match self.numbers {
            Numbers::F32(values) => values.len(),
            Numbers::Bf16(values) => values.len(),
        }
    }

    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Some of the numbers.
    pub fn part(self, range: Range<usize>) -> Matrix<'a> {
        let numbers = match self.numbers {
            Numbers::F32(values) => Numbers::F32(&values[range]),
            Numbers::Bf16(values) => Numbers::Bf16(&values[range]),
        };
        Matrix { numbers, ..self }
    }

    /// Numbers in f32, from the one at `from` on.
    pub fn widen_into(self, out: &mut [f32], from: usize) {
        match self.part(from..from + out.len()).numbers {
            Numbers::F32(values) => out.copy_from_slice(values),
            Numbers::Bf16(values) => widen(out, values),
        }
    }

    /// The numbers in f32, where they lie or widened.
    pub fn wide(self) -> Cow<'a, [f32]> {
        match self.numbers {
            Numbers::F32(values) => Cow::Borrowed(values),
            Numbers::Bf16(values) => {
                let mut out = vec![0.0; values.len()];
                widen(&mut out, values);
                Cow::Owned(out)
            }
        }
    }

    /// Whether each number is finite.
    pub fn is_finite(self) -> bool {
        const CHUNK: usize = 1 << 20;
        match self.numbers {
            Numbers::F32(values) => values.par_chunks(CHUNK).all(|values| values.iter().all(|x| x.is_finite())),
            Numbers::Bf16(values) => values.par_chunks(CHUNK).all(all_finite),
        }
    }

    /// Writes `cols` rows as columns of a panel: panel[c, k] of [k, `panel::WIDTH`] is the number at `from + c · stride + k`.
    pub(crate) fn transpose_into(self, panel: &mut [f32], from: usize, stride: usize, k: usize, cols: usize) {
        match self.numbers {
            Numbers::F32(values) => panel::transpose_into(panel, &values[from..], stride, k, cols),
            Numbers::Bf16(values) => panel::transpose_bf16_into(panel, &values[from..], stride, k, cols),
        }
    }

    /// The same as a panel of words, in whole steps of `pairs::WIDTH` columns; other columns stay.
    pub(crate) fn pair_into(self, panel: &mut [u32], from: usize, stride: usize, k: usize, cols: usize, parts: Parts) {
        let turn = |panel: &mut [u32], values: &[f32], stride: usize| {
            let words = parts.words(k);
            let mut rows = vec![0; cols * pairs::apart(words)];
            pairs::rows_into(&mut rows, pairs::apart(words), values, stride, k, parts);
            pairs::transpose(panel, pairs::WIDTH, &rows, pairs::apart(words), cols, words);
        };
        match (self.numbers, parts) {
            (Numbers::F32(values), _) => turn(panel, &values[from..], stride),
            (Numbers::Bf16(values), Parts::One) => {
                pairs::stored_into(panel, pairs::WIDTH, &values[from..], stride, k, cols);
            }
            (Numbers::Bf16(values), Parts::Three) => {
                let mut wide = vec![0.0; cols * k];
                for (wide, values) in wide.chunks_mut(k.max(1)).zip(values[from..].chunks(stride.max(1))) {
                    widen(wide, &values[..k]);
                }
                turn(panel, &wide, k.max(1));
            }
        }
    }
}

/// A bf16 number as f32: exact.
#[inline(always)]
pub(crate) fn wide(bf16: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bf16)) << 16)
}

dispatch! { fn widen(out: &mut [f32], values: &[[u8; 2]]) = widen_body }
#[inline(always)]
fn widen_body<const LEVEL: u8>(out: &mut [f32], values: &[[u8; 2]]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out = wide(*value));
}

dispatch! { fn all_finite(values: &[[u8; 2]]) -> bool = all_finite_body }
#[inline(always)]
fn all_finite_body<const LEVEL: u8>(values: &[[u8; 2]]) -> bool {
    // All ones in the exponent are infinities and what is not a number. No early end: it would forbid vectors.
    values.iter().fold(true, |all, value| all & (u16::from_le_bytes(*value) & 0x7f80 != 0x7f80))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{assert_same_bits, halves, numbers};

    /// 1 is 0x3f80, -2 is 0xc000, the smallest subnormal 0x0001.
    #[test]
    fn values_by_hand() {
        let bytes = [[0x80, 0x3f], [0x00, 0xc0], [0x01, 0x00], [0x80, 0x7f]];
        let mut out = [0.0; 4];
        Matrix::from(&bytes[..]).widen_into(&mut out, 0);
        assert_eq!(out, [1.0, -2.0, f32::from_bits(1 << 16), f32::INFINITY]);
        Matrix::from(&bytes[..]).widen_into(&mut out[..2], 1);
        assert_eq!(out[..2], [-2.0, f32::from_bits(1 << 16)]);
    }

    #[test]
    fn one_number_that_is_not_finite_is_found() {
        let (mut bytes, mut same) = halves(&numbers(1, 1000));
        assert!(Matrix::from(&bytes[..]).is_finite() && Matrix::from(&same).is_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            (bytes[777], same[777]) = (((bad.to_bits() >> 16) as u16).to_le_bytes(), bad);
            assert!(!Matrix::from(&bytes[..]).is_finite() && !Matrix::from(&same).is_finite());
        }
    }

    #[test]
    fn a_part_is_the_same_numbers_in_either_width() {
        let (bytes, same) = halves(&numbers(1, 40));
        for range in [0..40, 3..17, 9..9] {
            let mut out = vec![f32::NAN; range.len()];
            Matrix::from(&bytes[..]).part(range.clone()).widen_into(&mut out, 0);
            assert_same_bits("bf16", &out, &same[range.clone()]);
            Matrix::from(&same).part(range.clone()).widen_into(&mut out, 0);
            assert_same_bits("f32", &out, &same[range]);
        }
    }
}
