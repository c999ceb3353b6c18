//! Who answers for whom: one-to-one assignment of largest total weight.
//!
//! What must stay true: the total is the best there is (held against trying every assignment), and the same weights give the
//! same pairs.

/// One-to-one assignment of rows to columns with the largest total weight: which predicted box answers for which target.
///
/// `weights[i][j]` is what pairing row i with column j is worth (an IoU, say); rows must be equally long. As many pairs are made as there
/// are rows or columns, whichever are fewer, even if a pair is worth 0 or less: drop those after. A weight that is not
/// finite (or beyond ±1e100, where sums could overflow) forbids its pair. Returns, for each row, its column or `None`.
///
/// Hungarian method with potentials (Kuhn 1955; Jonker and Volgenant 1987), O(n² m).
///
/// ```
/// use foveate::geometry::assign;
/// // Greedy would take 0.9 first and end with 0.9 + 0.0; together 0.8 + 0.7 is more.
/// assert_eq!(assign(&[vec![0.9, 0.8], vec![0.7, 0.0]]), [Some(1), Some(0)]);
/// ```
///
/// # Panics
/// If rows differ in length: a bug of the caller.
pub fn assign(weights: &[Vec<f64>]) -> Vec<Option<usize>> {
    let rows = weights.len();
    let columns = weights.first().map_or(0, Vec::len);
    assert!(weights.iter().all(|row| row.len() == columns), "assign: rows of different lengths");
    if columns == 0 {
        return vec![None; rows];
    }
    let allowed = |w: f64| w.abs() <= 1e100;
    let (low, high) = weights
        .iter()
        .flatten()
        .copied()
        .filter(|&w| allowed(w))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), w| (l.min(w), h.max(w)));
    if low > high {
        return vec![None; rows];
    }
    // A forbidden pair costs more than any allowed pairs could win back.
    let forbidden = high + (high - low + 1.0) * (rows.min(columns) + 1) as f64;
    let cost = |i: usize, j: usize| {
        let w = weights[i][j];
        if allowed(w) { high - w } else { forbidden - low }
    };
    let mut chosen = vec![None; rows];
    if rows <= columns {
        for (row, column) in cheapest(rows, columns, cost).into_iter().enumerate() {
            chosen[row] = Some(column);
        }
    } else {
        for (column, row) in cheapest(columns, rows, |j, i| cost(i, j)).into_iter().enumerate() {
            chosen[row] = Some(column);
        }
    }
    for (row, column) in chosen.iter_mut().enumerate() {
        *column = column.filter(|&j| allowed(weights[row][j]));
    }
    chosen
}

/// For each of n rows its column, all different, at least total cost; n <= m.
fn cheapest(n: usize, m: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<usize> {
    // Rows are added one at a time, each by the cheapest alternating path to a free column (Dijkstra on reduced costs).
    // Column m is a stand-in that holds the row being added.
    let mut row_price = vec![0.0; n];
    let mut column_price = vec![0.0; m + 1];
    let mut owner: Vec<Option<usize>> = vec![None; m + 1];
    for row in 0..n {
        owner[m] = Some(row);
        let mut distance = vec![f64::INFINITY; m];
        let mut came_from = vec![m; m];
        let mut done = vec![false; m + 1];
        let mut at = m;
        while let Some(i) = owner[at] {
            done[at] = true;
            let (mut next, mut step) = (m, f64::INFINITY);
            for j in (0..m).filter(|&j| !done[j]) {
                let reduced = cost(i, j) - row_price[i] - column_price[j];
                if reduced < distance[j] {
                    distance[j] = reduced;
                    came_from[j] = at;
                }
                if distance[j] < step {
                    step = distance[j];
                    next = j;
                }
            }
            for j in 0..=m {
                if done[j] {
                    if let Some(i) = owner[j] {
                        row_price[i] += step;
                    }
                    column_price[j] -= step;
                } else {
                    distance[j] -= step;
                }
            }
            at = next;
        }
        while at != m {
            owner[at] = owner[came_from[at]];
            at = came_from[at];
        }
    }
    let mut chosen = vec![0; n];
    for (column, row) in owner.iter().take(m).enumerate() {
        if let Some(row) = row {
            chosen[*row] = column;
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn assignment_is_the_best_of_all(rows in 1..5usize, columns in 1..5usize, seed in proptest::collection::vec(-4..5i32, 16)) {
            let weights: Vec<Vec<f64>> = (0..rows).map(|i| (0..columns).map(|j| f64::from(seed[i * 4 + j])).collect()).collect();
            let chosen = assign(&weights);
            let mut used: Vec<usize> = chosen.iter().copied().flatten().collect();
            prop_assert_eq!(used.len(), rows.min(columns));
            let total: f64 = chosen.iter().enumerate().filter_map(|(i, j)| j.map(|j| weights[i][j])).sum();
            used.sort_unstable();
            used.dedup();
            prop_assert_eq!(used.len(), rows.min(columns));
            prop_assert_eq!(total, best(&weights, 0, &mut vec![false; columns], rows.min(columns)));
        }
    }

    /// Every way to make `left` pairs from this row on.
    fn best(weights: &[Vec<f64>], row: usize, taken: &mut Vec<bool>, left: usize) -> f64 {
        if left == 0 {
            return 0.0;
        }
        if row == weights.len() {
            return f64::NEG_INFINITY;
        }
        let mut top = best(weights, row + 1, taken, left);
        for j in 0..taken.len() {
            if !taken[j] {
                taken[j] = true;
                top = top.max(weights[row][j] + best(weights, row + 1, taken, left - 1));
                taken[j] = false;
            }
        }
        top
    }

    #[test]
    fn assignment_at_its_edges() {
        assert_eq!(assign(&[]), Vec::<Option<usize>>::new());
        assert_eq!(assign(&[vec![], vec![]]), [None, None]);
        assert_eq!(assign(&[vec![0.2], vec![0.9], vec![0.5]]), [None, Some(0), None]);
        // A forbidden pair stays unmade, even when that leaves a row alone.
        let no = f64::NEG_INFINITY;
        assert_eq!(assign(&[vec![0.9, no], vec![0.8, no]]), [Some(0), None]);
        assert_eq!(assign(&[vec![0.9, 0.1], vec![0.8, no]]), [Some(1), Some(0)]);
        assert_eq!(assign(&[vec![f64::NAN]]), [None]);
    }
}
