//! Token embedding: rows of a table by id, and the scatter of their gradients.
//!
//! The backward adds row after row in the order of the tokens, so a token that occurs often sums in a fixed order.

use crate::matrix::Matrix;

/// # Shapes
/// y `[T, D]` = table `[V, D]` at ids `[T]`.
pub fn forward<'a>(y: &mut [f32], table: impl Into<Matrix<'a>>, ids: &[u32], d: usize) {
    let table = table.into();
    check(y.len(), table.len(), ids, d);
    for (row, &id) in y.chunks_exact_mut(d).zip(ids) {
        table.widen_into(row, id as usize * d);
    }
}

/// # Shapes
/// dtable `[V, D]` += dy `[T, D]` at ids `[T]`.
pub fn backward(dtable: &mut [f32], dy: &[f32], ids: &[u32], d: usize) {
    check(dy.len(), dtable.len(), ids, d);
    for (row, &id) in dy.chunks_exact(d).zip(ids) {
        for (sum, g) in dtable[id as usize * d..][..d].iter_mut().zip(row) {
            *sum += g;
        }
    }
}

fn check(y: usize, table: usize, ids: &[u32], d: usize) {
    assert!(d > 0 && table.is_multiple_of(d), "embed: the table has {table} numbers, not a multiple of D={d}");
    assert_eq!(y, ids.len() * d, "embed: the rows have {y} numbers, expected [T={}, D={d}]", ids.len());
    let v = table / d;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
        panic!("embed: token id {id} is outside the vocabulary of {v}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_by_id_and_gradients_go_back() {
        let table = [0.0, 1.0, 10.0, 11.0, 20.0, 21.0];
        let mut y = [0.0; 6];
        forward(&mut y, &table[..], &[2, 0, 2], 2);
        assert_eq!(y, [20.0, 21.0, 0.0, 1.0, 20.0, 21.0]);
        let mut grad = [0.5; 6];
        backward(&mut grad, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 0, 2], 2);
        assert_eq!(grad, [3.5, 4.5, 0.5, 0.5, 6.5, 8.5]);
    }

    #[test]
    #[should_panic(expected = "token id 3 is outside the vocabulary of 3")]
    fn an_unknown_id_is_named() {
        forward(&mut [0.0; 2], &[0.0; 6][..], &[3], 2);
    }
}
