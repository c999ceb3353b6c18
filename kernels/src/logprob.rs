//! The head: log-probs and entropies of asked tokens, from hidden rows and the output embedding, with gradients.
//!
//! Hides the logits: they exist for a block of rows at a time and are computed again in the backward, so no [N, V]
//! matrix is kept. Sampling reads the same numbers: `logits` is the same product, and `scale_and_measure` the one
//! place where a row is divided by the temperature and its log-sum-exp is taken (largest logit; then e^(z - max) in
//! 16 interleaved sums per 1024 logits, the blocks added in f64). So a token's log-prob has the same bits when it is
//! drawn and when it is trained.

use crate::linear;
use crate::matmul::{self, Target, View};
use crate::vector::{self, LANES, dispatch, exp};
use rayon::prelude::*;

/// Logits held at once: 16 MiB.
const LOGITS: usize = 1 << 22;
const MOST_ROWS: usize = 256;
/// Logits whose exponentials are summed in f32 before f64 takes over.
const BLOCK: usize = 1024;

/// Log-probs, entropies (in nats), and what the backward needs of each row's normaliser.
pub struct Out {
    /// `[N]`: log-prob of each target; -inf for a banned one.
    pub logprob: Vec<f32>,
    /// `[N]`: entropy of the distribution the target was scored under.
    pub entropy: Vec<f32>,
    stats: Vec<Stats>,
}

/// The normaliser of one row: log-sum-exp = max + log_sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stats {
    pub max: f32,
    pub log_sum: f32,
}

impl Stats {
    #[inline(always)]
    pub fn logprob(&self, scaled_logit: f32) -> f32 {
        (scaled_logit - self.max) - self.log_sum
    }
}

/// Logits of every row, banned ids at -inf; not divided by a temperature.
///
/// # Shapes
/// `[N, V]` = h `[N, D]` · w `[V, D]`ᵀ.
pub fn logits(h: &[f32], w: &[f32], banned: &[u32], d: usize, v: usize) -> Vec<f32> {
    let n = rows(h, w, d, v);
    let mut z = vec![0.0; n * v];
    linear::forward(&mut z, h, w, None, n, d, v);
    ban(&mut z, banned, v);
    z
}

/// Bans ids in rows of logits computed otherwise (with `linear::Packed`, say): they become -inf.
///
/// # Shapes
/// logits `[N, V]`.
pub fn ban(logits: &mut [f32], banned: &[u32], v: usize) {
    for row in logits.chunks_exact_mut(v) {
        for &id in banned {
            assert!(
                (id as usize) < v,
                "logprob: banned id {id} is outside the vocabulary of {v}"
            );
            row[id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// log softmax(h·wᵀ / temperature) at the targets, with banned ids left out of the distribution.
///
/// # Shapes
/// h `[N, D]`, w `[V, D]`, targets `[N]`.
pub fn forward(
    h: &[f32],
    w: &[f32],
    targets: &[u32],
    temperature: f32,
    banned: &[u32],
    d: usize,
    v: usize,
) -> Out {
    let n = check(h, w, targets, temperature, d, v);
    let mut out = Out {
        logprob: Vec::with_capacity(n),
        entropy: Vec::with_capacity(n),
        stats: Vec::with_capacity(n),
    };
    let at_once = block_rows(v);
    for (h, targets) in h.chunks(at_once * d).zip(targets.chunks(at_once)) {
        let mut z = logits(h, w, banned, d, v);
        let scored: Vec<(f32, f32, Stats)> = z
            .par_chunks_exact_mut(v)
            .zip(targets)
            .map(|(z, &target)| {
                let stats = scale_and_measure(z, temperature);
                (
                    stats.logprob(z[target as usize]),
                    entropy(z, stats.max, stats.log_sum),
                    stats,
                )
            })
            .collect();
        for (logprob, entropy, stats) in scored {
            out.logprob.push(logprob);
            out.entropy.push(entropy);
            out.stats.push(stats);
        }
    }
    out
}

/// Gradient of Σ_n weights\[n\]·logprob\[n\] + entropy_weights\[n\]·entropy\[n\]: dh written, dw accumulated.
///
/// ∂logprob/∂z_j = δ_j − p_j and ∂entropy/∂z_j = −p_j (log p_j + entropy), z the logits divided by the temperature.
/// Banned ids get no gradient.
///
/// # Shapes
/// dh, h `[N, D]`; dw, w `[V, D]`; weights, entropy_weights, targets `[N]`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dh: &mut [f32],
    dw: &mut [f32],
    weights: &[f32],
    entropy_weights: Option<&[f32]>,
    out: &Out,
    h: &[f32],
    w: &[f32],
    targets: &[u32],
    temperature: f32,
    banned: &[u32],
    d: usize,
    v: usize,
) {
    let n = check(h, w, targets, temperature, d, v);
    assert_eq!(
        dh.len(),
        h.len(),
        "logprob: dh has {} numbers, h has {}",
        dh.len(),
        h.len()
    );
    assert_eq!(
        dw.len(),
        w.len(),
        "logprob: dw has {} numbers, w has {}",
        dw.len(),
        w.len()
    );
    assert!(
        weights.len() == n && out.stats.len() == n,
        "logprob: {} weights and {} scored rows for N={n}",
        weights.len(),
        out.stats.len()
    );
    assert!(
        entropy_weights.is_none_or(|e| e.len() == n),
        "logprob: {:?} entropy weights for N={n}",
        entropy_weights.map(<[f32]>::len)
    );
    let at_once = block_rows(v);
    for start in (0..n).step_by(at_once) {
        let end = n.min(start + at_once);
        let t = end - start;
        let h = &h[start * d..end * d];
        let mut z = logits(h, w, banned, d, v);
        z.par_chunks_exact_mut(v).enumerate().for_each(|(i, z)| {
            let i = start + i;
            let Stats { max, log_sum } = out.stats[i];
            let entropy_weight = entropy_weights.map_or(0.0, |e| e[i]);
            let inverse = 1.0 / temperature;
            scale(z, temperature);
            let target = targets[i] as usize;
            let allowed = z[target] > f32::NEG_INFINITY;
            gradient(
                z,
                max,
                log_sum,
                weights[i] * inverse,
                entropy_weight * inverse,
                out.entropy[i],
            );
            if allowed {
                z[target] += weights[i] * inverse;
            }
        });
        linear::backward_input(&mut dh[start * d..end * d], &z, w, t, d, v, false);
        let c = Target {
            data: dw,
            offset: 0,
            stride: d,
        };
        matmul::multiply(
            c,
            View::rows(&z, 0, v).transposed(),
            View::rows(h, 0, d),
            v,
            d,
            t,
            1.0,
            true,
            true,
        );
    }
}

fn block_rows(v: usize) -> usize {
    (LOGITS / v.max(1)).clamp(1, MOST_ROWS)
}

/// Divides a row by the temperature and returns its normaliser; the only way a log-prob is ever computed.
pub(crate) fn scale_and_measure(logits: &mut [f32], temperature: f32) -> Stats {
    scale(logits, temperature);
    measure(logits)
}

fn scale(logits: &mut [f32], temperature: f32) {
    assert!(
        temperature > 0.0,
        "logprob: temperature {temperature} must be positive"
    );
    if temperature != 1.0 {
        divide(logits, temperature);
    }
}

dispatch! { fn divide(z: &mut [f32], temperature: f32) = divide_body }
#[inline(always)]
fn divide_body<const LEVEL: u8>(z: &mut [f32], temperature: f32) {
    z.iter_mut().for_each(|z| *z /= temperature);
}

/// The normaliser of a row.
pub(crate) fn measure(z: &[f32]) -> Stats {
    let (max, sum) = max_and_sum(z);
    Stats {
        max,
        log_sum: sum.ln() as f32,
    }
}

dispatch! { fn max_and_sum(z: &[f32]) -> (f32, f64) = max_and_sum_body }
#[inline(always)]
fn max_and_sum_body<const LEVEL: u8>(z: &[f32]) -> (f32, f64) {
    let max = vector::max(z);
    let mut total = 0.0f64;
    for block in z.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = block.as_chunks::<LANES>();
        for chunk in whole {
            for (sum, &z) in lanes.iter_mut().zip(chunk) {
                *sum += exp::<LEVEL>(z - max);
            }
        }
        for (sum, &z) in lanes.iter_mut().zip(rest) {
            *sum += exp::<LEVEL>(z - max);
        }
        total += f64::from(vector::fold(lanes));
    }
    (max, total)
}

dispatch! {
    /// z becomes e^(z - max).
    pub(crate) fn subtract_and_exp(z: &mut [f32], max: f32) = subtract_and_exp_body
}
#[inline(always)]
fn subtract_and_exp_body<const LEVEL: u8>(z: &mut [f32], max: f32) {
    z.iter_mut().for_each(|z| *z = exp::<LEVEL>(*z - max));
}

dispatch! { fn entropy(z: &[f32], max: f32, log_sum: f32) -> f32 = entropy_body }
#[inline(always)]
fn entropy_body<const LEVEL: u8>(z: &[f32], max: f32, log_sum: f32) -> f32 {
    let mut total = 0.0f64;
    for block in z.chunks(BLOCK) {
        let mut lanes = [0.0f32; LANES];
        for chunk in block.chunks(LANES) {
            for (sum, &z) in lanes.iter_mut().zip(chunk) {
                let log_p = (z - max) - log_sum;
                let p = exp::<LEVEL>(log_p);
                *sum -= if p > 0.0 { p * log_p } else { 0.0 };
            }
        }
        total += f64::from(vector::fold(lanes));
    }
    total as f32
}

dispatch! { fn gradient(z: &mut [f32], max: f32, log_sum: f32, weight: f32, entropy_weight: f32, entropy: f32) = gradient_body }
#[inline(always)]
fn gradient_body<const LEVEL: u8>(
    z: &mut [f32],
    max: f32,
    log_sum: f32,
    weight: f32,
    entropy_weight: f32,
    entropy: f32,
) {
    for z in z.iter_mut() {
        let log_p = (*z - max) - log_sum;
        let p = exp::<LEVEL>(log_p);
        let g = -p * (weight + entropy_weight * (log_p + entropy));
        *z = if p > 0.0 { g } else { 0.0 };
    }
}

fn rows(h: &[f32], w: &[f32], d: usize, v: usize) -> usize {
    assert!(
        d > 0 && h.len().is_multiple_of(d),
        "logprob: h has {} numbers, not a multiple of D={d}",
        h.len()
    );
    assert_eq!(
        w.len(),
        v * d,
        "logprob: w has {} numbers, expected [V={v}, D={d}]",
        w.len()
    );
    h.len() / d
}

fn check(h: &[f32], w: &[f32], targets: &[u32], temperature: f32, d: usize, v: usize) -> usize {
    let n = rows(h, w, d, v);
    assert_eq!(
        targets.len(),
        n,
        "logprob: {} targets for N={n} rows",
        targets.len()
    );
    assert!(
        temperature > 0.0,
        "logprob: temperature {temperature} must be positive"
    );
    if let Some(id) = targets.iter().find(|&&id| id as usize >= v) {
        panic!("logprob: target {id} is outside the vocabulary of {v}");
    }
    n
}
