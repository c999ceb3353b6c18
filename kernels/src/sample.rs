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
    logits
        .iter_mut()
        .filter(|z| **z < kth)
        .for_each(|z| *z = f32::NEG_INFINITY);
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
