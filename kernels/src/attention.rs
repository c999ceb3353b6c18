//! Attention over spans: softmax(scale · q·kᵀ)·v for runs of queries that see a shared run of keys and a run of their own.
//!
//! One kernel serves vision windows, causal text, decoding against a cache and members of a group that share a
//! prompt. Hides the tiling. The order fixed for one query and head, with its visible keys numbered 0.. over `shared` then
//! `own`: keys are taken in blocks of 256 by number, with the running largest score and sums of Milakov & Gimelshein 2018
//! (arXiv:1805.02867); each score is a run of multiply-adds over K; the exponentials are summed in 16 interleaved sums by key
//! number; P·V is a run of multiply-adds over the keys in order. Keys after the last visible one add exact zeros. So the bits
//! depend neither on the other queries, nor on where the keys lie, nor on the threads.
//! The backward ([`backward`](self::backward())) is in a file of its own.

mod backward;
mod task;

pub use self::backward::backward;

use self::task::{Prepared, Task, tasks, transposed};
use crate::panel::{self, WIDTH};
use crate::vector::{self, LANES, dispatch, exp};
use rayon::prelude::*;
use std::ops::Range;

/// One run of queries and the keys it may see: all of `shared`, then `own`.
///
/// With `causal`, query i of n sees own keys up to `own.end - (n - 1 - i)`: the last query sees all of them.
/// Ranges count rows of the q buffer and of the k/v buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub queries: Range<usize>,
    pub shared: Range<usize>,
    pub own: Range<usize>,
    pub causal: bool,
}

impl Span {
    /// Keys visible to query i, counted over `shared` then `own`.
    fn visible(&self, i: usize) -> usize {
        let hidden = if self.causal { self.queries.len() - 1 - i } else { 0 };
        self.shared.len() + self.own.len() - hidden
    }
}

/// Heads H of the queries, heads Hkv of keys and values (H a multiple of it), and K numbers per head.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub heads: usize,
    pub kv_heads: usize,
    pub k: usize,
}

impl Dims {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.k as f32).sqrt()
    }
}

/// Rows and keys whose scores exist at once in the forward: 16 KiB, next to the keys and values of the block in the cache.
const STRIP: usize = 16;
const BLOCK: usize = 256;
/// Room before and behind the scores of a block, because keys come in whole panels.
const MARGIN: usize = WIDTH;
const SCORES: usize = MARGIN + BLOCK + MARGIN;
/// Multiply-adds below which waking other threads costs more than it saves, and those worth one hand-over.
const WORTH_THREADS: usize = 1 << 18;
const WORTH_TASK: usize = 1 << 16;

/// Writes o and lse (log-sum-exp of the scaled scores, for the backward) of every query in a span; other rows stay.
///
/// # Shapes
/// o, q `[Tq, H, K]`; lse `[Tq, H]`; k, v `[Tk, Hkv, K]`.
#[allow(clippy::too_many_arguments)]
pub fn forward(o: &mut [f32], lse: &mut [f32], q: &[f32], k: &[f32], v: &[f32], spans: &[Span], dims: Dims) {
    check(q, k, v, spans, dims);
    assert_eq!(o.len(), q.len(), "attention: o has {} numbers, q has {}", o.len(), q.len());
    assert_eq!(lse.len() * dims.k, q.len(), "attention: lse has {} numbers for q's {}", lse.len(), q.len());
    let tasks = tasks(spans, dims);
    let prepared = Prepared::new(k, v, spans, dims);
    let work: usize = tasks.iter().map(|t| t.work(dims)).sum();
    let attend_task = |task: &Task| {
        let rows = task.gather(q, dims);
        let mut o = vec![0.0; rows.len()];
        let mut lse = vec![0.0; rows.len() / dims.k];
        attend(&mut o, &mut lse, &rows, k, v, &prepared, task, dims);
        (o, lse)
    };
    let done: Vec<(Vec<f32>, Vec<f32>)> = if work < WORTH_THREADS {
        tasks.iter().map(attend_task).collect()
    } else {
        let at_once = (WORTH_TASK * tasks.len()).div_ceil(work).max(1);
        tasks.par_iter().with_min_len(at_once).map(attend_task).collect()
    };
    let group = dims.group();
    for (task, (task_o, task_lse)) in tasks.iter().zip(&done) {
        for ((start, from), from_lse) in
            task.starts(dims).zip(task_o.chunks_exact(group * dims.k)).zip(task_lse.chunks_exact(group))
        {
            o[start..start + from.len()].copy_from_slice(from);
            lse[start / dims.k..][..group].copy_from_slice(from_lse);
        }
    }
}

dispatch! { fn attend(o: &mut [f32], lse: &mut [f32], q: &[f32], k: &[f32], v: &[f32], prepared: &Prepared, task: &Task, dims: Dims) = attend_body }
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_body<const LEVEL: u8>(
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    prepared: &Prepared,
    task: &Task,
    dims: Dims,
) {
    let (kd, group, rows) = (dims.k, dims.group(), lse.len());
    let keys = task.keys();
    let [shared, own] = task.pieces(keys);
    let (before, stride) = (shared.len(), dims.kv_heads * kd);
    let head = task.kv_head * kd;
    let (ready_shared, ready_own) = (prepared.run(&task.span.shared, task), prepared.run(&task.span.own, task));
    let own_t = if ready_own.is_some() { Vec::new() } else { transposed(k, own.clone(), task.kv_head, dims) };
    let keys_t = [ready_shared.map_or(&[][..], |r| &r.keys), ready_own.map_or(&own_t[..], |r| &r.keys)];
    let values = [(ready_shared, &shared), (ready_own, &own)].map(|(ready, run)| {
        let copied = ready.map(|r| &r.values[..]).filter(|values| !values.is_empty());
        copied.map_or_else(|| (&v[(run.start * stride + head).min(v.len())..], stride), |values| (values, kd))
    });
    // Number of the first key of each piece, and past its last.
    let pieces = [0..before, before..keys];
    let mut scores = vec![0.0f32; STRIP.min(rows) * SCORES];
    let mut largest = vec![f32::NEG_INFINITY; rows];
    let mut sums = vec![[0.0f32; LANES]; rows];
    for block in (0..keys).step_by(BLOCK) {
        for r0 in (0..rows).step_by(STRIP) {
            let strip = STRIP.min(rows - r0);
            let seen = task.span.visible(task.block.start + (r0 + strip - 1) / group).min(block + BLOCK);
            if seen <= block {
                continue;
            }
            let q = &q[r0 * kd..];
            // Panels are computed whole: what they leave past their piece is overwritten by the next, or lies in the margins.
            for (piece, panels) in pieces.iter().zip(keys_t) {
                let (from, to) = (block.max(piece.start), seen.min(piece.end));
                if from < to {
                    let (first, last) = ((from - piece.start) / WIDTH, (to - piece.start).div_ceil(WIDTH));
                    for (p, panel) in (first..last).zip(panels.chunks_exact(WIDTH * kd).skip(first)) {
                        let out = &mut scores[MARGIN + piece.start + p * WIDTH - block..];
                        panel::multiply(out, SCORES, q, kd, panel, WIDTH, strip, kd, WIDTH, false);
                    }
                }
            }
            let o = &mut o[r0 * kd..(r0 + strip) * kd];
            for (r, o) in o.chunks_exact_mut(kd).enumerate() {
                let visible = task.span.visible(task.block.start + (r0 + r) / group).clamp(block, seen) - block;
                let row = &mut scores[r * SCORES + MARGIN..][..seen - block];
                let shrink =
                    softmax_terms::<LEVEL>(&mut row[..visible], dims.scale(), &mut largest[r0 + r], &mut sums[r0 + r]);
                row[visible..].fill(0.0);
                if shrink != 1.0 {
                    o.iter_mut().for_each(|o| *o *= shrink);
                }
            }
            for (piece, (values, stride)) in pieces.iter().zip(values) {
                let (from, to) = (block.max(piece.start), seen.min(piece.end));
                if from < to {
                    let weights = &scores[MARGIN + from - block..];
                    let values = &values[(from - piece.start) * stride..];
                    panel::multiply(o, kd, weights, SCORES, values, stride, strip, to - from, kd, true);
                }
            }
        }
    }
    for ((o, lse), (max, sums)) in o.chunks_exact_mut(kd).zip(lse).zip(largest.iter().zip(sums)) {
        let sum = vector::fold(sums);
        let inverse = 1.0 / sum;
        o.iter_mut().for_each(|o| *o *= inverse);
        *lse = max + sum.ln();
    }
}

/// Scores of a block become e^(scale·score − largest), added to `sums`; `largest` and `sums` are those of all blocks so far.
/// Returns what earlier terms have to be multiplied by.
#[inline(always)]
fn softmax_terms<const LEVEL: u8>(row: &mut [f32], scale: f32, largest: &mut f32, sums: &mut [f32; LANES]) -> f32 {
    if row.is_empty() {
        return 1.0;
    }
    row.iter_mut().for_each(|s| *s *= scale);
    let before = *largest;
    let highest = vector::max(row);
    let max = if highest > before { highest } else { before };
    let shrink = if max > before { exp::<LEVEL>(before - max) } else { 1.0 };
    *largest = max;
    let mut lanes = sums.map(|sum| sum * shrink);
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (s, lane) in chunk.iter_mut().zip(&mut lanes) {
            *s = exp::<LEVEL>(*s - max);
            *lane += *s;
        }
    }
    for (s, lane) in rest.iter_mut().zip(&mut lanes) {
        *s = exp::<LEVEL>(*s - max);
        *lane += *s;
    }
    *sums = lanes;
    shrink
}

fn check(q: &[f32], k: &[f32], v: &[f32], spans: &[Span], dims: Dims) {
    let Dims { heads, kv_heads, k: kd } = dims;
    assert!(
        kd > 0 && kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "attention: {heads} heads over {kv_heads} kv heads of {kd}"
    );
    assert!(
        q.len().is_multiple_of(heads * kd),
        "attention: q has {} numbers, not a multiple of [H={heads}, K={kd}]",
        q.len()
    );
    assert!(
        k.len().is_multiple_of(kv_heads * kd),
        "attention: k has {} numbers, not a multiple of [Hkv={kv_heads}, K={kd}]",
        k.len()
    );
    assert_eq!(k.len(), v.len(), "attention: k has {} numbers, v has {}", k.len(), v.len());
    let (tq, tk) = (q.len() / (heads * kd), k.len() / (kv_heads * kd));
    for span in spans {
        let ordered = |r: &Range<usize>, end: usize| r.start <= r.end && r.end <= end;
        assert!(
            ordered(&span.queries, tq) && ordered(&span.shared, tk) && ordered(&span.own, tk),
            "attention: {span:?} is outside {tq} queries and {tk} keys"
        );
        assert!(span.shared.len() + span.own.len() > 0 || span.queries.is_empty(), "attention: {span:?} sees no key");
        assert!(
            !span.causal || span.own.len() >= span.queries.len(),
            "attention: causal {span:?} has fewer own keys than queries"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{
        self, assert_close, assert_same_bits, assert_threads_agree, gradient, numbers, weighted, wide,
    };

    struct Case {
        name: &'static str,
        dims: Dims,
        keys: usize,
        spans: Vec<Span>,
    }

    fn span(queries: Range<usize>, shared: Range<usize>, own: Range<usize>, causal: bool) -> Span {
        Span { queries, shared, own, causal }
    }

    fn cases() -> Vec<Case> {
        let dims = |heads, kv_heads, k| Dims { heads, kv_heads, k };
        vec![
            Case { name: "one token", dims: dims(1, 1, 4), keys: 1, spans: vec![span(0..1, 0..0, 0..1, true)] },
            Case { name: "causal, MHA", dims: dims(3, 3, 8), keys: 7, spans: vec![span(0..7, 0..0, 0..7, true)] },
            Case {
                name: "causal, GQA, many tiles",
                dims: dims(4, 2, 20),
                keys: 75,
                spans: vec![span(0..75, 0..0, 0..75, true)],
            },
            Case {
                name: "windows",
                dims: dims(2, 2, 16),
                keys: 45,
                spans: vec![
                    span(0..9, 0..0, 0..9, false),
                    span(9..33, 0..0, 9..33, false),
                    span(33..45, 0..0, 33..45, false),
                ],
            },
            Case {
                name: "cached decoding",
                dims: dims(4, 1, 12),
                keys: 40,
                spans: vec![
                    span(0..1, 0..0, 0..17, true),
                    span(1..2, 0..0, 17..40, true),
                    span(2..5, 0..0, 20..40, true),
                ],
            },
            Case {
                name: "shared prompt",
                dims: dims(4, 2, 8),
                keys: 60,
                spans: vec![
                    span(0..33, 0..0, 0..33, true),
                    span(33..43, 0..33, 33..43, true),
                    span(43..60, 0..33, 43..60, true),
                ],
            },
            Case {
                name: "cross, shared only",
                dims: dims(2, 1, 8),
                keys: 9,
                spans: vec![span(0..4, 2..9, 0..0, false)],
            },
        ]
    }

    fn queries(case: &Case) -> usize {
        case.spans.iter().map(|s| s.queries.end).max().unwrap_or(0)
    }

    fn run(q: &[f32], k: &[f32], v: &[f32], spans: &[Span], dims: Dims) -> (Vec<f32>, Vec<f32>) {
        let (mut o, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len() / dims.k]);
        forward(&mut o, &mut lse, q, k, v, spans, dims);
        (o, lse)
    }

    #[test]
    fn two_keys_by_hand() {
        // Scores 0 and ln 3: weights 1/4 and 3/4.
        let q = [1.0];
        let (o, lse) = run(
            &q,
            &[0.0, 3f32.ln()],
            &[4.0, 8.0],
            &[span(0..1, 0..0, 0..2, true)],
            Dims { heads: 1, kv_heads: 1, k: 1 },
        );
        assert!((o[0] - 7.0).abs() < 1e-6 && (lse[0] - 4f32.ln()).abs() < 1e-6, "{o:?} {lse:?}");
    }

    #[test]
    fn agrees_with_the_oracle() {
        for case in cases() {
            let dims = case.dims;
            let q = numbers(1, queries(&case) * dims.heads * dims.k);
            let (k, v) =
                (numbers(2, case.keys * dims.kv_heads * dims.k), numbers(3, case.keys * dims.kv_heads * dims.k));
            let (o, lse) = run(&q, &k, &v, &case.spans, dims);
            let (exact, exact_lse) = oracle::attention(&wide(&q), &wide(&k), &wide(&v), &case.spans, dims);
            // Averages of numbers in ±1 with weights good to some 1e-7.
            assert_close(case.name, &o, &exact, 1e-6);
            assert_close(case.name, &lse, &exact_lse, 1e-6);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        for case in cases() {
            let dims = case.dims;
            if case.keys > 60 {
                continue;
            }
            let q = numbers(1, queries(&case) * dims.heads * dims.k);
            let (k, v) =
                (numbers(2, case.keys * dims.kv_heads * dims.k), numbers(3, case.keys * dims.kv_heads * dims.k));
            let d_o = numbers(4, q.len());
            let (o, lse) = run(&q, &k, &v, &case.spans, dims);
            let (mut dq, mut dk, mut dv) = (vec![f32::NAN; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &case.spans, dims);
            let (qs, ks, vs) = (wide(&q), wide(&k), wide(&v));
            let loss =
                |q: &[f64], k: &[f64], v: &[f64]| weighted(&oracle::attention(q, k, v, &case.spans, dims).0, &d_o);
            // Sums over tens of queries of terms good to 1e-7.
            assert_close(&format!("{} dq", case.name), &dq, &gradient(&qs, |q| loss(q, &ks, &vs)), 3e-6);
            assert_close(&format!("{} dk", case.name), &dk, &gradient(&ks, |k| loss(&qs, k, &vs)), 3e-6);
            assert_close(&format!("{} dv", case.name), &dv, &gradient(&vs, |v| loss(&qs, &ks, v)), 3e-6);
        }
    }

    #[test]
    fn a_query_has_the_same_bits_cached_chunked_and_with_a_shared_prompt() {
        for (dims, t) in [
            (Dims { heads: 4, kv_heads: 2, k: 32 }, 150),
            (Dims { heads: 3, kv_heads: 3, k: 20 }, 70),
            (Dims { heads: 16, kv_heads: 1, k: 8 }, 40),
        ] {
            let (q, k, v) = (
                numbers(1, t * dims.heads * dims.k),
                numbers(2, t * dims.kv_heads * dims.k),
                numbers(3, t * dims.kv_heads * dims.k),
            );
            let (all, all_lse) = run(&q, &k, &v, &[span(0..t, 0..0, 0..t, true)], dims);
            let one_by_one: Vec<Span> = (0..t).map(|i| span(i..i + 1, 0..0, 0..i + 1, true)).collect();
            let with_prompt = |cut: usize| vec![span(0..cut, 0..0, 0..cut, true), span(cut..t, 0..cut, cut..t, true)];
            let decoded_after_prompt = |cut: usize| {
                (0..t)
                    .map(|i| {
                        if i < cut {
                            span(i..i + 1, 0..0, 0..i + 1, true)
                        } else {
                            span(i..i + 1, 0..cut, cut..i + 1, true)
                        }
                    })
                    .collect()
            };
            let ways: Vec<(&str, Vec<Span>)> = vec![
                ("one by one", one_by_one),
                ("shared 5", with_prompt(5)),
                ("shared 32", with_prompt(32)),
                ("shared 37", with_prompt(37)),
                ("decoded after 37", decoded_after_prompt(37)),
                (
                    "chunks",
                    vec![span(0..3, 0..0, 0..3, true), span(3..20, 0..0, 0..20, true), span(20..t, 0..0, 0..t, true)],
                ),
            ];
            for (name, spans) in ways {
                let (o, lse) = run(&q, &k, &v, &spans, dims);
                assert_same_bits(name, &o, &all);
                assert_same_bits(name, &lse, &all_lse);
            }
        }
    }

    #[test]
    fn a_shared_prompt_has_the_gradient_of_copies() {
        let dims = Dims { heads: 4, kv_heads: 2, k: 8 };
        let (p, n) = (21, 9);
        let (row_q, row_k) = (dims.heads * dims.k, dims.kv_heads * dims.k);
        let (q, k, v, d_o) = (
            numbers(1, (p + 2 * n) * row_q),
            numbers(2, (p + 2 * n) * row_k),
            numbers(3, (p + 2 * n) * row_k),
            numbers(4, (p + 2 * n) * row_q),
        );
        let grads = |spans: &[Span], q: &[f32], k: &[f32], v: &[f32], d_o: &[f32]| {
            let (o, lse) = run(q, k, v, spans, dims);
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            backward(&mut dq, &mut dk, &mut dv, d_o, &o, &lse, q, k, v, spans, dims);
            (dq, dk, dv)
        };
        let members = [span(p..p + n, 0..p, p..p + n, true), span(p + n..p + 2 * n, 0..p, p + n..p + 2 * n, true)];
        let (dq, dk, _) = grads(&members, &q, &k, &v, &d_o);
        // The same with the prompt's keys written out twice.
        let copy = |x: &[f32], row: usize| [&x[..(p + n) * row], &x[..p * row], &x[(p + n) * row..]].concat();
        let plain =
            [span(p..p + n, 0..0, 0..p + n, true), span(2 * p + n..2 * (p + n), 0..0, p + n..2 * (p + n), true)];
        let (dq2, dk2, _) = grads(&plain, &copy(&q, row_q), &copy(&k, row_k), &copy(&v, row_k), &copy(&d_o, row_q));
        for i in p * row_q..(p + n) * row_q {
            // The same terms, summed over the prompt and the member apart.
            assert!((dq[i] - dq2[i]).abs() < 1e-6, "dq[{i}] = {}, copies give {}", dq[i], dq2[i]);
        }
        for i in 0..p * row_k {
            let both = f64::from(dk2[i]) + f64::from(dk2[(p + n) * row_k + i]);
            // One rounding of a sum of two.
            assert!((f64::from(dk[i]) - both).abs() < 1e-6, "dk[{i}] = {}, copies give {both}", dk[i]);
        }
    }

    #[test]
    fn threads_do_not_change_bits() {
        let dims = Dims { heads: 6, kv_heads: 2, k: 16 };
        let t = 200;
        let spans = [
            span(0..120, 0..0, 0..120, true),
            span(120..160, 0..120, 120..160, true),
            span(160..200, 0..120, 160..200, true),
        ];
        let (q, k, v) = (numbers(1, t * 96), numbers(2, t * 32), numbers(3, t * 32));
        let d_o = numbers(4, q.len());
        assert_threads_agree("forward and backward", || {
            let (o, lse) = run(&q, &k, &v, &spans, dims);
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &spans, dims);
            [o, lse, dq, dk, dv].concat()
        });
    }

    #[test]
    fn huge_scores_stay_finite() {
        let dims = Dims { heads: 1, kv_heads: 1, k: 4 };
        let scaled = |seed| numbers(seed, 40 * 4).iter().map(|x| x * 1e4).collect::<Vec<_>>();
        let (q, k, v) = (scaled(1), scaled(2), numbers(3, 40 * 4));
        let spans = [span(0..40, 0..0, 0..40, true)];
        let (o, lse) = run(&q, &k, &v, &spans, dims);
        let (mut dq, mut dk, mut dv) = (vec![0.0; 160], vec![0.0; 160], vec![0.0; 160]);
        backward(&mut dq, &mut dk, &mut dv, &o, &o, &lse, &q, &k, &v, &spans, dims);
        for x in [o, lse, dq, dk, dv].iter().flatten() {
            assert!(x.is_finite());
        }
    }
}
