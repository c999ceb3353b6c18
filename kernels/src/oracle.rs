//! The slow and clear version of every operation, in f64: what the fast ones are tested against.
//!
//! Written to be read beside the formula, one loop per sum. Gradients are not written here: tests take central finite
//! differences of these functions (`gradient`), so a mistake in a derivation cannot appear twice.

use crate::attention::{Dims, Span};

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// The nearest bf16 below in magnitude of each number, as bytes and as f32.
pub fn halves(x: &[f32]) -> (Vec<[u8; 2]>, Vec<f32>) {
    x.iter()
        .map(|v| {
            let upper = (v.to_bits() >> 16) as u16;
            (upper.to_le_bytes(), f32::from_bits(u32::from(upper) << 16))
        })
        .unzip()
}

/// y `[T, N]` = x `[T, M]` · w `[N, M]`ᵀ + b.
pub fn linear(x: &[f64], w: &[f64], b: Option<&[f64]>, t: usize, m: usize, n: usize) -> Vec<f64> {
    let mut y = vec![0.0; t * n];
    for row in 0..t {
        for out in 0..n {
            let sum: f64 = (0..m).map(|i| x[row * m + i] * w[out * m + i]).sum();
            y[row * n + out] = sum + b.map_or(0.0, |b| b[out]);
        }
    }
    y
}

pub fn rms_norm(x: &[f64], w: &[f64], d: usize, eps: f64) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks_exact(d) {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / d as f64;
        y.extend(row.iter().zip(w).map(|(v, w)| v / (mean + eps).sqrt() * w));
    }
    y
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// Φ by adding up the normal density's Taylor series (|x| < 6 is enough for the tests).
pub fn gelu(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= x * x / (2 * n + 1) as f64;
        sum += term;
    }
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    x * (0.5 + density * sum)
}

/// Attention output `[Tq, H, K]` and log-sum-exp `[Tq, H]`.
pub fn attention(q: &[f64], k: &[f64], v: &[f64], spans: &[Span], dims: Dims) -> (Vec<f64>, Vec<f64>) {
    let Dims { heads, kv_heads, k: kd } = dims;
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![0.0; q.len() / kd];
    for span in spans {
        let n = span.queries.len();
        for (i, query) in span.queries.clone().enumerate() {
            let end = if span.causal { span.own.end - (n - 1 - i) } else { span.own.end };
            let keys: Vec<usize> = span.shared.clone().chain(span.own.start..end).collect();
            for head in 0..heads {
                let kv = head / (heads / kv_heads);
                let at = (query * heads + head) * kd;
                let key_at = |row: usize| (row * kv_heads + kv) * kd;
                let score =
                    |&row: &usize| (0..kd).map(|c| q[at + c] * k[key_at(row) + c]).sum::<f64>() / (kd as f64).sqrt();
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (s, &row) in scores.iter().zip(&keys) {
                    for c in 0..kd {
                        o[at + c] += (s - max).exp() / sum * v[key_at(row) + c];
                    }
                }
                lse[query * heads + head] = max + sum.ln();
            }
        }
    }
    (o, lse)
}

/// Log-probs of the targets and entropies, banned ids left out.
pub fn logprob(
    h: &[f64],
    w: &[f64],
    targets: &[u32],
    temperature: f64,
    banned: &[u32],
    d: usize,
    v: usize,
) -> (Vec<f64>, Vec<f64>) {
    let z = linear(h, w, None, targets.len(), d, v);
    let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
    for (row, &target) in z.chunks_exact(v).zip(targets) {
        let allowed: Vec<usize> = (0..v).filter(|&id| !banned.contains(&(id as u32))).collect();
        let max = allowed.iter().map(|&id| row[id] / temperature).fold(f64::NEG_INFINITY, f64::max);
        let lse = max + allowed.iter().map(|&id| (row[id] / temperature - max).exp()).sum::<f64>().ln();
        let log_p = |id: usize| row[id] / temperature - lse;
        logprobs.push(if allowed.contains(&(target as usize)) { log_p(target as usize) } else { f64::NEG_INFINITY });
        entropies.push(allowed.iter().map(|&id| -log_p(id).exp() * log_p(id)).sum());
    }
    (logprobs, entropies)
}

/// Central differences of `loss` at x. With steps of 1e-5 in f64 the error is near 1e-9, far below f32's.
pub fn gradient(x: &[f64], mut loss: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + step;
            let above = loss(&x);
            x[i] = at - step;
            let below = loss(&x);
            x[i] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Σ x·y: turns an output into a loss whose gradient by that output is y.
pub fn weighted(x: &[f64], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(a, &b)| a * f64::from(b)).sum()
}

/// Numbers in ±1 that differ from call to call only by `seed`.
pub fn numbers(seed: u64, n: usize) -> Vec<f32> {
    use rand::{Rng, SeedableRng};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Fails at the first number further from `exact` than `tolerance` (relative to numbers above 1, absolute below).
#[track_caller]
pub fn assert_close(name: &str, found: &[f32], exact: &[f64], tolerance: f64) {
    assert_eq!(found.len(), exact.len(), "{name}: length");
    for (i, (&a, &b)) in found.iter().zip(exact).enumerate() {
        let off = (f64::from(a) - b).abs() / b.abs().max(1.0);
        assert!(off <= tolerance, "{name}[{i}] = {a}, expected {b}, off by {off:e}");
    }
}

#[track_caller]
pub fn assert_same_bits(name: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{name}: length");
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!(x.to_bits() == y.to_bits(), "{name}[{i}]: {x} and {y} differ in bits");
    }
}

/// Runs `work` in pools of 1, 2 and 5 threads and requires the same bits.
#[track_caller]
pub fn assert_threads_agree(name: &str, work: impl Fn() -> Vec<f32> + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&work)
    };
    let one = run(1);
    for threads in [2, 5] {
        assert_same_bits(name, &one, &run(threads));
    }
}
