//! The head: log-probs and entropies of asked tokens, from hidden rows and the output embedding, with gradients.
//!
//! Hides the logits: they exist for a block of rows at a time and are computed again in the backward, so no [N, V]
//! matrix is kept. Sampling reads the same numbers: `logits` is the same product, and `scale_and_measure` the one
//! place where a row is divided by the temperature and its log-sum-exp is taken (largest logit; then e^(z - max) in
//! 16 interleaved sums per 1024 logits, the blocks added in f64). So a token's log-prob has the same bits when it is
//! drawn and when it is trained.

use crate::linear::{self, Packed};
use crate::matrix::Matrix;
use crate::vector::{self, LANES, dispatch, exp};
use rayon::prelude::*;

/// Logits held at once: 16 MiB.
const LOGITS: usize = 1 << 22;
const MOST_ROWS: usize = 1024;
/// Numbers of an output embedding up to which it is laid out once for all blocks of rows: 32 MiB.
const LAID_OUT: usize = 1 << 23;
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

/// The normaliser of one row (log-sum-exp = max + log_sum) and its entropy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stats {
    pub max: f32,
    pub log_sum: f32,
    pub entropy: f32,
}

impl Stats {
    #[inline(always)]
    pub fn logprob(&self, scaled_logit: f32) -> f32 {
        (scaled_logit - self.max) - self.log_sum
    }
}

/// Logits of every row, banned ids at -inf; not divided by a temperature. `laid`: w laid out, where it is.
///
/// # Shapes
/// `[N, V]` = h `[N, D]` · w `[V, D]`ᵀ.
pub fn logits<'a>(
    h: &[f32],
    w: impl Into<Matrix<'a>>,
    laid: Option<&Packed>,
    banned: &[u32],
    d: usize,
    v: usize,
) -> Vec<f32> {
    let w = w.into();
    let mut z = vec![0.0; rows(h, w, d, v) * v];
    write_logits(&mut z, h, w, laid, banned, d, v);
    z
}

fn write_logits(z: &mut [f32], h: &[f32], w: Matrix, laid: Option<&Packed>, banned: &[u32], d: usize, v: usize) {
    let n = h.len() / d;
    match laid {
        Some(laid) => laid.forward(z, h, None, false, n),
        None => linear::forward(z, h, w, None, false, n, d, v),
    }
    for row in z.chunks_exact_mut(v) {
        for &id in banned {
            assert!((id as usize) < v, "logprob: banned id {id} is outside the vocabulary of {v}");
            row[id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// log softmax(h·wᵀ / temperature) at the targets, with banned ids left out of the distribution.
///
/// # Shapes
/// h `[N, D]`, w `[V, D]`, targets `[N]`.
pub fn forward<'a>(
    h: &[f32],
    w: impl Into<Matrix<'a>>,
    targets: &[u32],
    temperature: f32,
    banned: &[u32],
    d: usize,
    v: usize,
) -> Out {
    let w = w.into();
    let n = check(h, w, targets, temperature, d, v);
    let mut out = Out { logprob: Vec::with_capacity(n), entropy: Vec::with_capacity(n), stats: Vec::with_capacity(n) };
    let at_once = block_rows(v);
    let laid = (n > at_once && w.len() <= LAID_OUT).then(|| Packed::new(w, d, v));
    let mut logits = vec![0.0; at_once.min(n) * v];
    for (h, targets) in h.chunks(at_once * d).zip(targets.chunks(at_once)) {
        let z = &mut logits[..targets.len() * v];
        write_logits(z, h, w, laid.as_ref(), banned, d, v);
        let scored: Vec<(f32, Stats)> = z
            .par_chunks_exact_mut(v)
            .zip(targets)
            .map(|(z, &target)| {
                let stats = scale_and_measure(z, temperature);
                (stats.logprob(z[target as usize]), stats)
            })
            .collect();
        for (logprob, stats) in scored {
            out.logprob.push(logprob);
            out.entropy.push(stats.entropy);
            out.stats.push(stats);
        }
    }
    out
}

/// Gradient of Σ_n weights\[n\]·logprob\[n\] + entropy_weights\[n\]·entropy\[n\]: dh written, dw accumulated unless the head is frozen (`None`).
///
/// ∂logprob/∂z_j = δ_j − p_j and ∂entropy/∂z_j = −p_j (log p_j + entropy), z the logits divided by the temperature.
/// Banned ids get no gradient.
///
/// # Shapes
/// dh, h `[N, D]`; dw, w `[V, D]`; weights, entropy_weights, targets `[N]`.
#[allow(clippy::too_many_arguments)]
pub fn backward<'a>(
    dh: &mut [f32],
    mut dw: Option<&mut [f32]>,
    weights: &[f32],
    entropy_weights: Option<&[f32]>,
    out: &Out,
    h: &[f32],
    w: impl Into<Matrix<'a>>,
    targets: &[u32],
    temperature: f32,
    banned: &[u32],
    d: usize,
    v: usize,
) {
    let w = w.into();
    let n = check(h, w, targets, temperature, d, v);
    assert_eq!(dh.len(), h.len(), "logprob: dh has {} numbers, h has {}", dh.len(), h.len());
    let places = dw.as_ref().map_or(w.len(), |dw| dw.len());
    assert_eq!(places, w.len(), "logprob: dw has {places} numbers, w has {}", w.len());
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
    let laid = (n > at_once && w.len() <= LAID_OUT).then(|| (Packed::new(w, d, v), Packed::turned(w, d, v)));
    let mut logits = vec![0.0; at_once.min(n) * v];
    for start in (0..n).step_by(at_once) {
        let end = n.min(start + at_once);
        let t = end - start;
        let h = &h[start * d..end * d];
        let z = &mut logits[..t * v];
        write_logits(z, h, w, laid.as_ref().map(|(laid, _)| laid), banned, d, v);
        z.par_chunks_exact_mut(v).enumerate().for_each(|(i, z)| {
            let i = start + i;
            let Stats { max, log_sum, .. } = out.stats[i];
            let entropy_weight = entropy_weights.map_or(0.0, |e| e[i]);
            let inverse = 1.0 / temperature;
            scale(z, temperature);
            let target = targets[i] as usize;
            let allowed = z[target] > f32::NEG_INFINITY;
            gradient(z, max, log_sum, weights[i] * inverse, entropy_weight * inverse, out.entropy[i]);
            if allowed {
                z[target] += weights[i] * inverse;
            }
        });
        let dh = &mut dh[start * d..end * d];
        match &laid {
            Some((_, turned)) => turned.forward(dh, z, None, false, t),
            None => linear::backward_input(dh, z, w, t, d, v, false),
        }
        if let Some(dw) = dw.as_deref_mut() {
            linear::backward_weight(dw, None, z, h, t, d, v, w.compute);
        }
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
    assert!(temperature > 0.0, "logprob: temperature {temperature} must be positive");
    if temperature != 1.0 {
        divide(logits, temperature);
    }
}

dispatch! { fn divide(z: &mut [f32], temperature: f32) = divide_body }
#[inline(always)]
fn divide_body<const LEVEL: u8>(z: &mut [f32], temperature: f32) {
    z.iter_mut().for_each(|z| *z /= temperature);
}

/// The normaliser and entropy of a row; with e = e^(z − max) and S = Σe the entropy is ln S − Σ e·(z − max) / S.
pub(crate) fn measure(z: &[f32]) -> Stats {
    let Sums { max, exps, moments } = sums(z);
    let log_sum = exps.ln();
    Stats { max, log_sum: log_sum as f32, entropy: (log_sum - moments / exps) as f32 }
}

/// Largest z, Σ e^(z − max) and Σ e^(z − max)·(z − max).
struct Sums {
    max: f32,
    exps: f64,
    moments: f64,
}

dispatch! { fn sums(z: &[f32]) -> Sums = sums_body }
#[inline(always)]
fn sums_body<const LEVEL: u8>(z: &[f32]) -> Sums {
    let max = vector::max(z);
    let mut out = Sums { max, exps: 0.0, moments: 0.0 };
    for block in z.chunks(BLOCK) {
        let (mut exps, mut moments) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (whole, rest) = block.as_chunks::<LANES>();
        let mut add = |lane: usize, z: f32| {
            // A banned id is at -inf, where 0·(-inf) would spoil the sum.
            let below = (z - max).max(f32::MIN);
            let e = exp::<LEVEL>(below);
            exps[lane] += e;
            moments[lane] += e * below;
        };
        for chunk in whole {
            for (lane, &z) in chunk.iter().enumerate() {
                add(lane, z);
            }
        }
        for (lane, &z) in rest.iter().enumerate() {
            add(lane, z);
        }
        out.exps += f64::from(vector::fold(exps));
        out.moments += f64::from(vector::fold(moments));
    }
    out
}

dispatch! {
    /// z becomes e^(z - max).
    pub(crate) fn subtract_and_exp(z: &mut [f32], max: f32) = subtract_and_exp_body
}
#[inline(always)]
fn subtract_and_exp_body<const LEVEL: u8>(z: &mut [f32], max: f32) {
    z.iter_mut().for_each(|z| *z = exp::<LEVEL>(*z - max));
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

fn rows(h: &[f32], w: Matrix, d: usize, v: usize) -> usize {
    assert!(d > 0 && h.len().is_multiple_of(d), "logprob: h has {} numbers, not a multiple of D={d}", h.len());
    assert_eq!(w.len(), v * d, "logprob: w has {} numbers, expected [V={v}, D={d}]", w.len());
    h.len() / d
}

fn check(h: &[f32], w: Matrix, targets: &[u32], temperature: f32, d: usize, v: usize) -> usize {
    let n = rows(h, w, d, v);
    assert_eq!(targets.len(), n, "logprob: {} targets for N={n} rows", targets.len());
    assert!(temperature > 0.0, "logprob: temperature {temperature} must be positive");
    if let Some(id) = targets.iter().find(|&&id| id as usize >= v) {
        panic!("logprob: target {id} is outside the vocabulary of {v}");
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{
        self, assert_close, assert_same_bits, assert_threads_agree, gradient, numbers, weighted, wide,
    };
    use crate::sample;

    #[test]
    fn a_row_by_hand() {
        // Logits ln 1, ln 2, ln 5 with the last banned: 1/3 and 2/3.
        let w = [0.0, 2f32.ln(), 5f32.ln()];
        let out = forward(&[1.0, 1.0], &w[..], &[1, 2], 1.0, &[2], 1, 3);
        assert!((out.logprob[0] - (2f32 / 3.0).ln()).abs() < 1e-6);
        assert_eq!(out.logprob[1], f32::NEG_INFINITY);
        let entropy = -(1.0 / 3.0f32) * (1.0 / 3.0f32).ln() - (2.0 / 3.0f32) * (2.0 / 3.0f32).ln();
        assert!((out.entropy[0] - entropy).abs() < 1e-6);
    }

    #[test]
    fn agrees_with_the_oracle_and_its_finite_differences() {
        for (n, d, v, temperature, banned) in
            [(1, 3, 5, 1.0, vec![]), (4, 5, 37, 0.7, vec![3, 36]), (30, 4, 19, 1.3, vec![0])]
        {
            let (h, w) = (numbers(1, n * d), numbers(2, v * d));
            let targets: Vec<u32> = (0..n)
                .map(|i| (1 + i * 7 % (v - 3)) as u32)
                .map(|id| if banned.contains(&id) { id + 1 } else { id })
                .collect();
            let (weights, entropy_weights) = (numbers(3, n), numbers(4, n));
            let (hs, ws) = (wide(&h), wide(&w));
            let exact = |h: &[f64], w: &[f64]| oracle::logprob(h, w, &targets, f64::from(temperature), &banned, d, v);
            let out = forward(&h, &w, &targets, temperature, &banned, d, v);
            // Logits of a few units rounded at 1e-7, and a sum of v exponentials.
            assert_close("logprob", &out.logprob, &exact(&hs, &ws).0, 1e-6);
            assert_close("entropy", &out.entropy, &exact(&hs, &ws).1, 1e-6);
            for entropies in [None, Some(&entropy_weights[..])] {
                let loss = |h: &[f64], w: &[f64]| {
                    let (logprob, entropy) = exact(h, w);
                    weighted(&logprob, &weights) + entropies.map_or(0.0, |e| weighted(&entropy, e))
                };
                let (mut dh, mut dw) = (vec![f32::NAN; n * d], vec![0.0; v * d]);
                backward(
                    &mut dh,
                    Some(&mut dw),
                    &weights,
                    entropies,
                    &out,
                    &h,
                    &w,
                    &targets,
                    temperature,
                    &banned,
                    d,
                    v,
                );
                assert_close("dh", &dh, &gradient(&hs, |h| loss(h, &ws)), 3e-6);
                assert_close("dw", &dw, &gradient(&ws, |w| loss(&hs, w)), 3e-6);
                let mut alone = vec![f32::NAN; n * d];
                backward(&mut alone, None, &weights, entropies, &out, &h, &w, &targets, temperature, &banned, d, v);
                assert_same_bits("dh of a frozen head", &alone, &dh);
            }
        }
    }

    #[test]
    fn what_is_drawn_has_the_log_prob_that_is_trained() {
        let (n, d, v) = (300, 24, 1500);
        let (h, w) = (numbers(1, n * d), numbers(2, v * d));
        let banned = [0, 17, 1499];
        for temperature in [1.0, 0.6, 1.7] {
            let drawn: Vec<(u32, f32)> = (0..n)
                .map(|i| {
                    // One row at a time, as decoding does.
                    let mut z = logits(&h[i * d..(i + 1) * d], &w, None, &banned, d, v);
                    sample::categorical(&mut z, temperature, (i as f64 + 0.5) / n as f64)
                })
                .collect();
            let targets: Vec<u32> = drawn.iter().map(|d| d.0).collect();
            assert!(targets.iter().all(|id| !banned.contains(id)));
            let sampled: Vec<f32> = drawn.iter().map(|d| d.1).collect();
            let trained = forward(&h, &w, &targets, temperature, &banned, d, v);
            assert_same_bits("logprob", &sampled, &trained.logprob);
        }
    }

    #[test]
    fn huge_logits_give_no_nan() {
        let (h, w) = ([1e4f32, -1e4], [1e4f32, 0.0, -1e4]);
        let out = forward(&h, &w[..], &[0, 0], 1.0, &[1], 1, 3);
        assert_eq!(out.logprob, [0.0, -2e8]);
        assert_eq!(out.entropy, [0.0, 0.0]);
        let (mut dh, mut dw) = ([0.0; 2], [0.0; 3]);
        backward(&mut dh, Some(&mut dw), &[1.0, 1.0], Some(&[1.0, 1.0]), &out, &h, &w[..], &[0, 0], 1.0, &[1], 1, 3);
        assert!(dh.iter().chain(&dw).all(|g| g.is_finite()), "{dh:?} {dw:?}");
    }

    #[test]
    fn threads_do_not_change_bits() {
        let (n, d, v) = (300, 16, 900);
        let (h, w, targets) = (numbers(1, n * d), numbers(2, v * d), vec![5; n]);
        let weights = numbers(3, n);
        assert_threads_agree("logprob", || {
            let out = forward(&h, &w, &targets, 0.9, &[1], d, v);
            let (mut dh, mut dw) = (vec![0.0; n * d], vec![0.0; v * d]);
            backward(&mut dh, Some(&mut dw), &weights, Some(&weights), &out, &h, &w, &targets, 0.9, &[1], d, v);
            [out.logprob, out.entropy, dh, dw].concat()
        });
    }
}
