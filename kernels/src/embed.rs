//! Token embedding: rows of a table by id, and the scatter of their gradients.
//!
//! The backward adds row after row in the order of the tokens, so a token that occurs often sums in a fixed order.

/// # Shapes
/// y `[T, D]` = table `[V, D]` at ids `[T]`.
pub fn forward(y: &mut [f32], table: &[f32], ids: &[u32], d: usize) {
    check(y.len(), table.len(), ids, d);
    for (row, &id) in y.chunks_exact_mut(d).zip(ids) {
        row.copy_from_slice(&table[id as usize * d..][..d]);
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
    assert!(
        d > 0 && table.is_multiple_of(d),
        "embed: the table has {table} numbers, not a multiple of D={d}"
    );
    assert_eq!(
        y,
        ids.len() * d,
        "embed: the rows have {y} numbers, expected [T={}, D={d}]",
        ids.len()
    );
    let v = table / d;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
        panic!("embed: token id {id} is outside the vocabulary of {v}");
    }
}
