//! Attention over spans: softmax(scale · q·kᵀ)·v for runs of queries that see a shared run of keys and a run of their own.
//!
//! One kernel serves vision windows, causal text, decoding against a cache and members of a group that share a
//! prompt. Hides the tiling. The order fixed for one query and head, with its visible keys numbered 0.. over `shared` then
//! `own`: keys are taken in blocks of 384 by number (192 where the call asks for three parts), with the running largest score and sums of Milakov & Gimelshein 2018
//! (arXiv:1805.02867); each score is a run of multiply-adds over K; the exponentials are summed in 16 interleaved sums by key
//! number; P·V is a run of multiply-adds over the keys in order. Keys after the last visible one add exact zeros. So the bits
//! depend neither on the other queries, nor on where the keys lie, nor on the threads. Short spans with the same shared keys
//! (members of a group that speak) meet these together, several rows at a time.
//! The backward ([`backward`](self::backward())) is in a file of its own, and so are the products in bf16 that a vision tower may ask for (`paired.rs`).

mod backward;
mod paired;
mod task;

pub use self::backward::backward;

use self::task::{Block, Prepared, blocks, transposed};
use crate::matrix::Compute;
use crate::pairs::{self, Parts};
use crate::panel::{self, Left, Onto, WIDTH};
use crate::vector::{self, LANES, dispatch, exp2};
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

    /// What makes of q·k a score in units of ln 2.
    fn scale_in_log2(&self) -> f32 {
        self.scale() * std::f32::consts::LOG2_E
    }
}

/// Rows and keys whose scores exist at once in the forward: 24 KiB, next to the keys and values of the block in the cache.
#[derive(Clone, Copy)]
struct Cut {
    rows: usize,
    keys: usize,
}

impl Cut {
    fn of(parts: Option<Parts>) -> Cut {
        match parts {
            // Two times sixteen rows, or products on tiles wait for each other's sums.
            Some(Parts::Three) => Cut { rows: STRIP, keys: 192 },
            Some(Parts::One) | None => Cut { rows: 16, keys: 384 },
        }
    }

    /// Numbers of a row of scores.
    fn stride(self) -> usize {
        MARGIN + self.keys + MARGIN
    }
}

/// Most rows of a cut.
const STRIP: usize = 32;
/// Room before and behind the scores of a block, because keys come in whole panels.
const MARGIN: usize = WIDTH;
/// Multiply-adds below which waking other threads costs more than it saves, and those worth one hand-over.
const WORTH_THREADS: usize = 1 << 18;
const WORTH_TASK: usize = 1 << 16;

/// Rows of keys that [`Keys::Panels`] lay out together.
pub const PANEL: usize = WIDTH;

/// Where keys are read from.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// `[Tk, Hkv, K]`
    Rows(&'a [f32]),
    /// `[Tk / PANEL, Hkv, K, PANEL]`, as [`store_keys`] lays them out: for a cache, whose keys are read token after token. Every
    /// run of keys starts at a multiple of [`PANEL`]; what lies behind its last key does not matter.
    Panels(&'a [f32]),
}

/// Writes keys to rows `first..` of a cache.
///
/// # Shapes
/// panels `[Tk / PANEL, Hkv, K, PANEL]`, k `[n, Hkv, K]`
pub fn store_keys(panels: &mut [f32], first: usize, k: &[f32], dims: Dims) {
    let width = dims.kv_heads * dims.k;
    assert!(k.len().is_multiple_of(width), "attention: {} numbers of keys, not rows of {width}", k.len());
    for (row, k) in (first..).zip(k.chunks_exact(width)) {
        let panel = &mut panels[row / PANEL * PANEL * width..][..PANEL * width];
        for (column, k) in panel.chunks_exact_mut(PANEL).zip(k) {
            column[row % PANEL] = *k;
        }
    }
}

/// Writes o and lse (log-sum-exp of the scaled scores, for the backward) of every query in a span; other rows stay. Spans come in
/// the order of their queries. In bf16, which is for rows of keys and for spans that share nothing and hide nothing, all products are of rounded
/// numbers, or, where a span has enough keys, of numbers in three parts.
///
/// # Shapes
/// o, q `[Tq, H, K]`; lse `[Tq, H]`; v and the keys `[Tk, Hkv, K]`.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: Keys,
    v: &[f32],
    spans: &[Span],
    dims: Dims,
    compute: Compute,
) {
    let (Keys::Rows(all) | Keys::Panels(all)) = k;
    check(q, all, v, spans, dims);
    if let Keys::Panels(panels) = k {
        let whole = panels.len().is_multiple_of(PANEL * dims.kv_heads * dims.k);
        assert!(whole, "attention: {} numbers of cached keys, not whole panels", panels.len());
        let aligned = |s: &Span| s.shared.start.is_multiple_of(PANEL) && s.own.start.is_multiple_of(PANEL);
        assert!(spans.iter().all(aligned), "attention: a run of cached keys does not start with a panel");
    }
    assert_eq!(o.len(), q.len(), "attention: o has {} numbers, q has {}", o.len(), q.len());
    assert_eq!(lse.len() * dims.k, q.len(), "attention: lse has {} numbers for q's {}", lse.len(), q.len());
    if compute != Compute::F32 {
        paired::check(spans);
        assert!(matches!(k, Keys::Rows(_)), "attention in bf16 is for rows of keys");
    }
    let prepared = Prepared::new(k, v, spans, dims, compute);
    let blocks = blocks(spans, dims);
    let work: usize = blocks.iter().map(|b| b.work(dims)).sum();
    // Every block writes rows of its own.
    let (mut o, mut lse, mut at) = (o, lse, 0);
    let parts = blocks.into_iter().map(|block| {
        let rows = block.queries();
        let (skip, n) = (rows.start - at, rows.len());
        at = rows.end;
        let mine = std::mem::take(&mut o)[skip * dims.heads * dims.k..].split_at_mut(n * dims.heads * dims.k);
        let mine_lse = std::mem::take(&mut lse)[skip * dims.heads..].split_at_mut(n * dims.heads);
        (o, lse) = (mine.1, mine_lse.1);
        (block, mine.0, mine_lse.0)
    });
    let attend = |scratch: &mut Scratch, (block, o, lse): (Block, &mut [f32], &mut [f32])| {
        attend(o, lse, q, k, v, &prepared, &block, scratch, dims);
    };
    if work < WORTH_THREADS {
        let mut scratch = Scratch::default();
        parts.for_each(|part| attend(&mut scratch, part));
    } else {
        let parts: Vec<_> = parts.collect();
        let at_once = (WORTH_TASK * parts.len()).div_ceil(work).max(1);
        parts.into_par_iter().with_min_len(at_once).for_each_init(Scratch::default, attend);
    }
}

/// What one block of queries works on, kept for the next.
#[derive(Default)]
struct Scratch {
    /// Rows of one head of keys, times scale / ln 2: `[R, K]`.
    q: Vec<f32>,
    /// Keys that each row sees.
    visible: Vec<usize>,
    /// What has been summed so far: `[R, K]`, and of each row the largest score and the sums of the exponentials.
    o: Vec<f32>,
    largest: Vec<f32>,
    sums: Vec<[f32; LANES]>,
    scores: Vec<f32>,
    /// Panels of own keys that were not prepared.
    own: Vec<f32>,
    /// Rows of queries, and of the scores' exponentials, in pairs.
    pairs: [Vec<u32>; 2],
}

/// Keys and values of a run as one head reads them.
#[derive(Clone, Copy)]
struct Piece<'a> {
    /// Number of its first key among those that the span sees, and how many keys it has.
    first: usize,
    keys: usize,
    /// Panels of [K, WIDTH] and how far each is from the next.
    panels: &'a [f32],
    step: usize,
    /// Values, `WIDTH` numbers of each key: how far apart keys are, and the next `WIDTH` numbers.
    values: &'a [f32],
    stride: usize,
    next: usize,
    paired: Option<&'a paired::Run>,
}

dispatch! { fn attend(o: &mut [f32], lse: &mut [f32], q: &[f32], k: Keys, v: &[f32], prepared: &Prepared, block: &Block, scratch: &mut Scratch, dims: Dims) = attend_body }
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_body<const LEVEL: u8>(
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: Keys,
    v: &[f32],
    prepared: &Prepared,
    block: &Block,
    scratch: &mut Scratch,
    dims: Dims,
) {
    let (kd, group) = (dims.k, dims.group());
    let (row, width) = (dims.heads * kd, group * kd);
    let queries = block.queries();
    let rows = queries.len() * group;
    let Scratch { q: my_q, visible, o: my_o, largest, sums, scores, own: own_panels, pairs: [q_pairs, weights] } =
        scratch;
    let parts = prepared.parts;
    let _tiles = parts.map(|_| pairs::hold());
    let cut = Cut::of(parts);
    scores.resize(cut.rows * cut.stride(), 0.0);
    visible.clear();
    for (span, queries) in block.members() {
        visible.extend(queries.flat_map(|i| std::iter::repeat_n(span.visible(i), group)));
    }
    let scale = dims.scale_in_log2();
    for head in 0..dims.kv_heads {
        my_q.clear();
        for query in q[queries.start * row..queries.end * row].chunks_exact(row) {
            my_q.extend(query[head * width..(head + 1) * width].iter().map(|q| q * scale));
        }
        my_o.clear();
        my_o.resize(rows * kd, 0.0);
        largest.clear();
        largest.resize(rows, f32::NEG_INFINITY);
        sums.clear();
        sums.resize(rows, [0.0; LANES]);

        let piece = |run: &Range<usize>, first: usize| {
            let ready = prepared.run(run, head);
            let width_all = dims.kv_heads * kd;
            let (values, stride, next) = match ready {
                Some(ready) if !ready.values.is_empty() => (&ready.values[..], WIDTH, run.len() * WIDTH),
                _ => (&v[(run.start * width_all + head * kd).min(v.len())..], width_all, WIDTH),
            };
            let (panels, step) = match k {
                Keys::Panels(k) => (&k[(run.start * width_all + head * kd * WIDTH).min(k.len())..], width_all * WIDTH),
                Keys::Rows(_) => (ready.map_or(&[][..], |r| &r.keys), kd * WIDTH),
            };
            let paired = ready.and_then(|ready| ready.paired.as_ref());
            Piece { first, keys: run.len(), panels, step, values, stride, next, paired }
        };
        // Blocks of keys that all members share are met by all rows at once, the rest by each member's rows.
        let shared = piece(&block.spans[0].shared, 0);
        let common = if block.spans.len() > 1 { shared.keys / cut.keys * cut.keys } else { 0 };
        let in_words = prepared.run(&block.spans[0].own, head).is_some_and(|run| run.paired.is_some());
        let q_pairs = parts.filter(|_| in_words).map(|parts| paired::Rows::of(q_pairs, my_q, kd, rows, kd, parts));
        let mut state = State { q: my_q, q_pairs, weights, visible, o: my_o, largest, sums, scores, cut, kd };
        for keys in (0..common).step_by(cut.keys) {
            state.meet::<LEVEL>(0..rows, keys, &[shared]);
        }
        let mut first = 0;
        for (span, queries) in block.members() {
            let rows = first..first + queries.len() * group;
            first = rows.end;
            let mut own = piece(&span.own, span.shared.len());
            if let (Keys::Rows(k), true) = (k, own.panels.is_empty() && own.paired.is_none()) {
                transposed(own_panels, k, span.own.clone(), head, dims);
                own.panels = own_panels;
            }
            for keys in (common..span.visible(queries.end - 1)).step_by(cut.keys) {
                state.meet::<LEVEL>(rows.clone(), keys, &[shared, own]);
            }
        }

        let done = my_o.chunks_exact(width).zip(largest.chunks_exact(group).zip(sums.chunks_exact(group)));
        for ((from, (max, sums)), (o, lse)) in done.zip(o.chunks_exact_mut(row).zip(lse.chunks_exact_mut(dims.heads))) {
            let o = &mut o[head * width..(head + 1) * width];
            let lse = &mut lse[head * group..(head + 1) * group];
            for (i, (o, from)) in o.chunks_exact_mut(kd).zip(from.chunks_exact(kd)).enumerate() {
                let sum = vector::fold(sums[i]);
                let inverse = 1.0 / sum;
                o.iter_mut().zip(from).for_each(|(o, from)| *o = from * inverse);
                lse[i] = max[i] * std::f32::consts::LN_2 + sum.ln();
            }
        }
    }
}

/// The running softmax of some rows; scores are in units of ln 2.
struct State<'a> {
    q: &'a [f32],
    q_pairs: Option<paired::Rows<'a>>,
    weights: &'a mut Vec<u32>,
    visible: &'a [usize],
    o: &'a mut [f32],
    largest: &'a mut [f32],
    sums: &'a mut [[f32; LANES]],
    scores: &'a mut [f32],
    cut: Cut,
    kd: usize,
}

impl State<'_> {
    /// Takes in the keys with numbers from `block` on, a cut's at most.
    #[inline(always)]
    fn meet<const LEVEL: u8>(&mut self, rows: Range<usize>, block: usize, pieces: &[Piece]) {
        let (kd, stride) = (self.kd, self.cut.stride());
        for r0 in rows.clone().step_by(self.cut.rows) {
            let strip = self.cut.rows.min(rows.end - r0);
            // Rows see ever more keys.
            let seen = self.visible[r0 + strip - 1].min(block + self.cut.keys);
            if seen <= block {
                continue;
            }
            // Panels are computed whole: what they leave past their piece is overwritten by the next, or lies in the margins.
            let parts = pieces.iter().filter_map(|piece| {
                let (from, to) = (block.max(piece.first), seen.min(piece.first + piece.keys));
                (from < to).then_some((piece, from, to))
            });
            for (piece, from, to) in parts.clone() {
                if let (Some(q), Some(run)) = (self.q_pairs, piece.paired) {
                    run.scores(&mut self.scores[MARGIN..], stride, q.from(r0), from, to - from, strip);
                    continue;
                }
                let (first, last) = ((from - piece.first) / WIDTH, (to - piece.first).div_ceil(WIDTH));
                let out = &mut self.scores[MARGIN + piece.first + first * WIDTH - block..];
                let panels = &piece.panels[first * piece.step..(last - 1) * piece.step + WIDTH * kd];
                panel::multiply_panels(out, stride, Left::rows(&self.q[r0 * kd..], kd), panels, piece.step, strip, kd);
            }
            // The largest scores of all rows first: their exponentials are then one vector.
            let mut largest = [f32::NEG_INFINITY; STRIP];
            largest[..strip].copy_from_slice(&self.largest[r0..r0 + strip]);
            let before = largest;
            let visible = |r: usize| self.visible[r0 + r].clamp(block, seen) - block;
            for (r, largest) in largest[..strip].iter_mut().enumerate() {
                let highest = vector::max(&self.scores[r * stride + MARGIN..][..visible(r)]);
                *largest = if highest > *largest { highest } else { *largest };
            }
            let mut shrink = [1.0; STRIP];
            for ((shrink, before), largest) in shrink.iter_mut().zip(before).zip(largest) {
                *shrink = if largest > before { exp2::<LEVEL>(before - largest) } else { 1.0 };
            }
            self.largest[r0..r0 + strip].copy_from_slice(&largest[..strip]);
            let o = &mut self.o[r0 * kd..(r0 + strip) * kd];
            for (r, o) in o.chunks_exact_mut(kd).enumerate() {
                let (row, hidden) = self.scores[r * stride + MARGIN..][..seen - block].split_at_mut(visible(r));
                softmax_terms::<LEVEL>(row, largest[r], shrink[r], &mut self.sums[r0 + r]);
                hidden.fill(0.0);
                if shrink[r] != 1.0 {
                    o.iter_mut().for_each(|o| *o *= shrink[r]);
                }
            }
            for (piece, from, to) in parts {
                let weights = &self.scores[MARGIN + from - block..];
                if let Some(run) = piece.paired {
                    run.add_values(o, self.weights, (weights, stride), (from, to - from), strip, kd);
                    continue;
                }
                let values = &piece.values[(from - piece.first) * piece.stride..];
                // Where the numbers of a key lie side by side, all of them at once (a single key in panels does, too).
                let at_once = if piece.next == WIDTH { kd } else { WIDTH };
                for (i, c) in (0..kd).step_by(at_once).enumerate() {
                    let (left, values) = (Left::rows(weights, stride), &values[i * piece.next..]);
                    let cols = at_once.min(kd - c);
                    panel::multiply(&mut o[c..], kd, left, values, piece.stride, strip, to - from, cols, Onto::Start);
                }
            }
        }
    }
}

/// Scores of a block become 2^(score − largest), added to `sums`, whose earlier terms are multiplied by `shrink`.
#[inline(always)]
fn softmax_terms<const LEVEL: u8>(row: &mut [f32], largest: f32, shrink: f32, sums: &mut [f32; LANES]) {
    let mut lanes = sums.map(|sum| sum * shrink);
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (s, lane) in chunk.iter_mut().zip(&mut lanes) {
            *s = exp2::<LEVEL>(*s - largest);
            *lane += *s;
        }
    }
    for (s, lane) in rest.iter_mut().zip(&mut lanes) {
        *s = exp2::<LEVEL>(*s - largest);
        *lane += *s;
    }
    *sums = lanes;
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
    for pair in spans.windows(2) {
        assert!(pair[0].queries.end <= pair[1].queries.start, "attention: {:?} stands before {:?}", pair[0], pair[1]);
    }
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
        forward(&mut o, &mut lse, q, Keys::Rows(k), v, spans, dims, Compute::F32);
        (o, lse)
    }

    /// In a cache runs start at panels, and what lies behind a run is not read.
    #[test]
    fn cached_keys_give_the_same_bits() {
        let dims = Dims { heads: 4, kv_heads: 2, k: 40 };
        let width = dims.kv_heads * dims.k;
        let (shared, owns) = (600, [33, 70, 1]);
        // Packed: the shared run, then each own run; in the cache each starts with a panel.
        let rows = shared + owns.iter().sum::<usize>();
        let (q, k, v) = (numbers(1, 90 * dims.heads * dims.k), numbers(2, rows * width), numbers(3, rows * width));
        let (mut packed, mut cached) = (Vec::new(), Vec::new());
        let places = shared.next_multiple_of(PANEL) + owns.iter().map(|n| n.next_multiple_of(PANEL)).sum::<usize>();
        let (mut panels, mut values) = (vec![f32::NAN; places * width], vec![f32::NAN; places * width]);
        let mut store = |at: usize, from: Range<usize>| {
            let from = from.start * width..from.end * width;
            store_keys(&mut panels, at, &k[from.clone()], dims);
            values[at * width..at * width + from.len()].copy_from_slice(&v[from]);
        };
        store(0, 0..shared);
        let (mut at, mut from, mut first) = (shared.next_multiple_of(PANEL), shared, 0);
        for (own, queries) in owns.into_iter().zip([20, 69, 1]) {
            store(at, from..from + own);
            packed.push(span(first..first + queries, 0..shared, from..from + own, true));
            cached.push(span(first..first + queries, 0..shared, at..at + own, true));
            (at, from, first) = (at + own.next_multiple_of(PANEL), from + own, first + queries);
        }
        let (o, lse) = run(&q, &k, &v, &packed, dims);
        let (mut found, mut found_lse) = (vec![0.0; q.len()], vec![0.0; lse.len()]);
        forward(&mut found, &mut found_lse, &q, Keys::Panels(&panels), &values, &cached, dims, Compute::F32);
        let all = first * dims.heads;
        assert_same_bits("o", &found[..all * dims.k], &o[..all * dims.k]);
        assert_same_bits("lse", &found_lse[..all], &lse[..all]);
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
            backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &case.spans, dims, Compute::F32);
            let (qs, ks, vs) = (wide(&q), wide(&k), wide(&v));
            let loss =
                |q: &[f64], k: &[f64], v: &[f64]| weighted(&oracle::attention(q, k, v, &case.spans, dims).0, &d_o);
            // Sums over tens of queries of terms good to 1e-7.
            assert_close(&format!("{} dq", case.name), &dq, &gradient(&qs, |q| loss(q, &ks, &vs)), 3e-6);
            assert_close(&format!("{} dk", case.name), &dk, &gradient(&ks, |k| loss(&qs, k, &vs)), 3e-6);
            assert_close(&format!("{} dv", case.name), &dv, &gradient(&vs, |v| loss(&qs, &ks, v)), 3e-6);
        }
    }

    /// Windows and pictures in bf16: against the oracle, whose gradient by finite differences of the exact operation is the one that is meant; a query has
    /// the same bits in any company.
    #[test]
    fn in_bf16_it_is_close_to_the_oracle_and_its_gradient() {
        // Numbers in ±1 keep eight bits: an average of them is off by some 2^-9, a score of K products over sqrt(K) by as much. In three parts nothing
        // is rounded but sums.
        for (dims, lengths, compute, close) in [
            (Dims { heads: 2, kv_heads: 2, k: 32 }, vec![1, 9, 40], Compute::Bf16, 1e-2),
            (Dims { heads: 4, kv_heads: 2, k: 20 }, vec![33, 64], Compute::Bf16, 1e-2),
            (Dims { heads: 1, kv_heads: 1, k: 64 }, vec![800], Compute::Bf16, 1e-2),
            (Dims { heads: 2, kv_heads: 1, k: 20 }, vec![9, 300, 257], Compute::Bf16x6, 2e-6),
            (Dims { heads: 1, kv_heads: 1, k: 80 }, vec![1100], Compute::Bf16x6, 2e-6),
        ] {
            let t = lengths.iter().sum::<usize>();
            let mut first = 0;
            let spans: Vec<Span> = lengths
                .iter()
                .map(|n| {
                    first += n;
                    span(first - n..first, 0..0, first - n..first, false)
                })
                .collect();
            let (q, d_o) = (numbers(1, t * dims.heads * dims.k), numbers(4, t * dims.heads * dims.k));
            let (k, v) = (numbers(2, t * dims.kv_heads * dims.k), numbers(3, t * dims.kv_heads * dims.k));
            let (mut o, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len() / dims.k]);
            forward(&mut o, &mut lse, &q, Keys::Rows(&k), &v, &spans, dims, compute);
            let (exact, exact_lse) = oracle::attention(&wide(&q), &wide(&k), &wide(&v), &spans, dims);
            assert_close("o", &o, &exact, close);
            assert_close("lse", &lse, &exact_lse, close);
            let some = |part: std::ops::Range<usize>| {
                let (mut one, mut its) = (vec![f32::NAN; q.len()], vec![f32::NAN; lse.len()]);
                let alone = [span(part.clone(), 0..0, spans[spans.len() - 1].own.clone(), false)];
                forward(&mut one, &mut its, &q, Keys::Rows(&k), &v, &alone, dims, compute);
                let width = dims.heads * dims.k;
                assert_same_bits(
                    "o",
                    &one[part.start * width..part.end * width],
                    &o[part.start * width..part.end * width],
                );
            };
            some(t - 1..t);
            some(t - lengths[lengths.len() - 1]..t);

            let (mut dq, mut dk, mut dv) = (vec![f32::NAN; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &spans, dims, compute);
            let (mut qf, mut kf, mut vf) = (vec![f32::NAN; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            let (full, full_lse) = run(&q, &k, &v, &spans, dims);
            backward(&mut qf, &mut kf, &mut vf, &d_o, &full, &full_lse, &q, &k, &v, &spans, dims, Compute::F32);
            // Of the gradient in f32, which finite differences have seen.
            for (name, found, exact) in [("dq", dq, qf), ("dk", dk, kf), ("dv", dv, vf)] {
                let off: f64 = found.iter().zip(&exact).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let size: f64 = exact.iter().map(|b| f64::from(*b).powi(2)).sum();
                assert!(
                    off <= (1.2 * close).powi(2) * size,
                    "{name} of {lengths:?}: off by {} of {}",
                    off.sqrt(),
                    size.sqrt()
                );
            }
        }
    }

    /// The backward makes its probabilities anew: of scores that are rounded otherwise than the forward's, large ones add up to something else than 1.
    #[test]
    fn in_bf16_probabilities_add_up_to_1_in_the_backward_too() {
        let (dims, t) = (Dims { heads: 1, kv_heads: 1, k: 32 }, 200);
        let spans = [span(0..t, 0..0, 0..t, false)];
        let q: Vec<f32> = numbers(1, t * dims.k).iter().map(|q| q * 40.0).collect();
        let (k, v, d_o) = (numbers(2, t * dims.k), numbers(3, t * dims.k), vec![1.0; t * dims.k]);
        let (mut o, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; t]);
        forward(&mut o, &mut lse, &q, Keys::Rows(&k), &v, &spans, dims, Compute::Bf16);
        let (mut dq, mut dk, mut dv) = (vec![f32::NAN; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &spans, dims, Compute::Bf16);
        let sum = dv.iter().step_by(dims.k).map(|x| f64::from(*x)).sum::<f64>() / t as f64;
        assert!((sum - 1.0).abs() < 1e-3, "they add up to {sum}");
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
            backward(&mut dq, &mut dk, &mut dv, d_o, &o, &lse, q, k, v, spans, dims, Compute::F32);
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
        let t = 300;
        let spans = [
            span(0..220, 0..0, 0..220, true),
            span(220..260, 0..220, 220..260, true),
            span(260..300, 0..220, 260..300, true),
        ];
        let (q, k, v) = (numbers(1, t * 96), numbers(2, t * 32), numbers(3, t * 32));
        let d_o = numbers(4, q.len());
        assert_threads_agree("forward and backward", || {
            let (o, lse) = run(&q, &k, &v, &spans, dims);
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, &spans, dims, Compute::F32);
            [o, lse, dq, dk, dv].concat()
        });
        let spans = [span(0..t - 40, 0..0, 0..t - 40, false), span(t - 40..t, 0..0, t - 40..t, false)];
        let long = [span(0..t, 0..0, 0..t, false)];
        for (spans, compute) in [(&spans[..], Compute::Bf16), (&spans, Compute::Bf16x6), (&long, Compute::Bf16x6)] {
            assert_threads_agree("in bf16", || {
                let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / dims.k]);
                forward(&mut o, &mut lse, &q, Keys::Rows(&k), &v, spans, dims, compute);
                let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
                backward(&mut dq, &mut dk, &mut dv, &d_o, &o, &lse, &q, &k, &v, spans, dims, compute);
                [o, lse, dq, dk, dv].concat()
            });
        }
    }

    #[test]
    fn huge_scores_stay_finite() {
        let dims = Dims { heads: 1, kv_heads: 1, k: 4 };
        let scaled = |seed| numbers(seed, 40 * 4).iter().map(|x| x * 1e4).collect::<Vec<_>>();
        let (q, k, v) = (scaled(1), scaled(2), numbers(3, 40 * 4));
        let spans = [span(0..40, 0..0, 0..40, true)];
        let (o, lse) = run(&q, &k, &v, &spans, dims);
        let (mut dq, mut dk, mut dv) = (vec![0.0; 160], vec![0.0; 160], vec![0.0; 160]);
        backward(&mut dq, &mut dk, &mut dv, &o, &o, &lse, &q, &k, &v, &spans, dims, Compute::F32);
        for x in [o, lse, dq, dk, dv].iter().flatten() {
            assert!(x.is_finite());
        }
    }
}
