//! Choosing a token from one row of logits.
//!
//! The log-prob returned is computed by the very routine `logprob::forward` uses, so that sampling and training agree in every
//! bit. `top_k` and `top_p` only narrow a row (others become -inf) and are for evaluation: a truncated distribution is not the one training scores.

use crate::logprob;

/// Draws from softmax(logits / temperature) with the uniform number `u` in [0, 1); returns the id and its log-prob.
///
/// The logits are left divided by the temperature. Ids at -inf are never drawn.
///
/// # Shapes
/// logits `[V]`.
pub fn categorical(logits: &mut [f32], temperature: f32, u: f64) -> (u32, f32) {
    assert!((0.0..1.0).contains(&u), "sample: u={u} is outside [0, 1)");
    let stats = logprob::scale_and_measure(logits, temperature);
    let mut share = logits.to_vec();
    logprob::subtract_and_exp(&mut share, stats.max);
    let total: f64 = share.iter().map(|&p| f64::from(p)).sum();
    let wanted = u * total;
    let mut passed = 0.0;
    // The running sum ends at exactly `total`, which is above u·total, so the search always finds an id that adds something.
    let chosen = share.iter().position(|&p| {
        passed += f64::from(p);
        passed > wanted
    });
    let chosen = chosen.unwrap_or(0);
    (chosen as u32, stats.logprob(logits[chosen]))
}

/// The likeliest id (the smallest among equals) and its log-prob at temperature 1.
///
/// # Shapes
/// logits `[V]`.
pub fn greedy(logits: &[f32]) -> (u32, f32) {
    assert!(!logits.is_empty(), "sample: no logits");
    let mut best = 0;
    for (id, &z) in logits.iter().enumerate() {
        if z > logits[best] {
            best = id;
        }
    }
    let stats = logprob::measure(logits);
    (best as u32, stats.logprob(logits[best]))
}

/// Keeps the k largest logits (all equal to the k-th as well); the others become -inf.
pub fn top_k(logits: &mut [f32], k: usize) {
    if k == 0 || k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, &mut kth, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    logits.iter_mut().filter(|z| **z < kth).for_each(|z| *z = f32::NEG_INFINITY);
}

/// Keeps the smallest set of likeliest ids whose probability at `temperature` reaches p (Holtzman et al. 2020, arXiv:1904.09751).
pub fn top_p(logits: &mut [f32], temperature: f32, p: f64) {
    if p >= 1.0 {
        return;
    }
    let mut scaled = logits.to_vec();
    let stats = logprob::scale_and_measure(&mut scaled, temperature);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| scaled[b].total_cmp(&scaled[a]));
    let mut kept = 0.0;
    for id in order {
        // The likeliest id always stays: nothing has been kept before it.
        if kept >= p && kept > 0.0 {
            logits[id] = f32::NEG_INFINITY;
        }
        kept += f64::from(stats.logprob(scaled[id])).exp();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Vec<f32> {
        // Probabilities 1/2, 1/4, 0, 1/4.
        vec![4f32.ln(), 2f32.ln(), f32::NEG_INFINITY, 2f32.ln()]
    }

    #[test]
    fn the_uniform_number_picks_by_cumulative_probability() {
        for (u, id, p) in [
            (0.0, 0, 0.5),
            (0.49, 0, 0.5),
            (0.51, 1, 0.25),
            (0.74, 1, 0.25),
            (0.76, 3, 0.25),
            (1.0 - f64::EPSILON / 2.0, 3, 0.25f32),
        ] {
            let (drawn, logprob) = categorical(&mut row(), 1.0, u);
            assert_eq!(drawn, id, "u={u}");
            assert!((logprob - p.ln()).abs() < 1e-6, "u={u}: {logprob}");
        }
    }

    #[test]
    fn temperature_is_part_of_the_log_prob() {
        // At temperature 1/2 the odds 4:2:2 become 16:4:4.
        let (id, logprob) = categorical(&mut row(), 0.5, 0.0);
        assert_eq!(id, 0);
        assert!((logprob - (16f32 / 24.0).ln()).abs() < 1e-6);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let (id, logprob) = greedy(&[0.0, 3.0, 3.0, f32::NEG_INFINITY]);
        assert_eq!(id, 1);
        assert!((logprob - (3f64.exp() / (1.0 + 2.0 * 3f64.exp())).ln() as f32).abs() < 1e-6);
    }

    #[test]
    fn truncation_keeps_the_likeliest() {
        let mut z = row();
        top_k(&mut z, 1);
        assert_eq!(z[0], 4f32.ln());
        assert_eq!(z[1..], [f32::NEG_INFINITY; 3]);
        // 1/2 alone does not reach 0.6; with the first 1/4 it does.
        let mut z = row();
        top_p(&mut z, 1.0, 0.6);
        assert_eq!(z, [4f32.ln(), 2f32.ln(), f32::NEG_INFINITY, f32::NEG_INFINITY]);
        let mut z = row();
        top_p(&mut z, 1.0, 0.0);
        assert_eq!(z[1..], [f32::NEG_INFINITY; 3]);
    }

    #[test]
    fn drawn_frequencies_follow_the_probabilities() {
        let mut counts = [0; 4];
        for i in 0..1000 {
            counts[categorical(&mut row(), 1.0, (f64::from(i) + 0.5) / 1000.0).0 as usize] += 1;
        }
        assert_eq!(counts, [500, 250, 0, 250]);
    }
}
