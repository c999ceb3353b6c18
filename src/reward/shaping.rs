//! Options that shape a reward: length, repetition.

use std::collections::HashSet;
use std::hash::Hash;

/// Soft over-long punishment, 0 to -1: nothing up to `limit - margin` tokens, then falling linearly to -1 at `limit`, and
/// -1 beyond. DAPO, arXiv 2503.14476.
///
/// ```
/// assert_eq!(foveate::reward::over_long(1000, 1024, 48), -0.5);
/// ```
pub fn over_long(tokens: usize, limit: usize, margin: usize) -> f64 {
    let free = limit.saturating_sub(margin);
    match tokens {
        t if t <= free => 0.0,
        t if t >= limit => -1.0,
        // free < t < limit, so limit - free is at least 2.
        t => -((t - free) as f64) / ((limit - free) as f64),
    }
}

/// Minus the share of repeated n-grams, 0 to -1: `distinct / all - 1`. Of words or of token ids. Shorter texts give 0.
/// After arXiv 2502.03373.
///
/// ```
/// // to be · be to · to be: three pairs, two of them distinct.
/// assert!((foveate::reward::repetition(&["to", "be", "to", "be"], 2) + 1.0 / 3.0).abs() < 1e-12);
/// ```
pub fn repetition<T: Eq + Hash>(items: &[T], n: usize) -> f64 {
    if n == 0 || items.len() < n {
        return 0.0;
    }
    let all = items.len() - n + 1;
    let distinct: HashSet<&[T]> = items.windows(n).collect();
    distinct.len() as f64 / all as f64 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_long_at_its_corners() {
        assert_eq!(over_long(976, 1024, 48), 0.0);
        assert_eq!(over_long(1024, 1024, 48), -1.0);
        assert_eq!(over_long(5000, 1024, 48), -1.0);
        assert_eq!(over_long(10, 10, 0), 0.0);
        assert_eq!(over_long(11, 10, 0), -1.0);
        assert_eq!(over_long(3, 2, 9), -1.0);
    }

    #[test]
    fn repetition_at_its_corners() {
        assert_eq!(repetition(&[1, 2, 3], 3), 0.0);
        assert_eq!(repetition(&[1, 1, 1, 1, 1], 1), -0.8);
        assert_eq!(repetition(&[1], 2), 0.0);
    }
}
