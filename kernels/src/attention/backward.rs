//! The gradient of attention, tile by tile: no row of scores ever exists whole (Dao et al. 2022, arXiv:2205.14135).
//!
//! The work is cut by keys. A [`Unit`] is a stretch of keys for one head; it meets, in the order of the spans, every block of
//! queries that sees it, and writes what it adds to dk, dv and dq into a place of its own; the places are added up afterwards, in
//! the order of the units. A tile is 32 keys by so many rows that everything about them stays in the first cache; its scores
//! are held row by row, and the products for dk and dv read them by columns (`paired.rs` turns these products round). The order
//! of summation depends on the spans and on the constants here, never on the threads.

use super::task::{Task, tasks, transposed};
use super::{Dims, Span, WORTH_THREADS, check, paired};
use crate::matrix::Compute;
use crate::pairs::{self, Parts};
use crate::panel::{self, Left, Onto, WIDTH};
use crate::threads::each;
use crate::vector::{self, dispatch, exp2, mul_add};
use std::ops::Range;

/// Keys of a unit: enough of them to make up for gathering the queries again, few enough to spread over threads.
const KEYS: usize = 1024;
/// Numbers that the rows of a tile have in q, and as many in d_o: 16 KiB each.
const TILE: usize = 4096;
/// Rows of a tile whose numbers are in three parts.
const SPLIT_ROWS: usize = 64;
/// Numbers that the places of units running at once may have; 64 MiB.
const PLACES: usize = 16 << 20;

/// A stretch of keys, for one head of keys, with the tasks that see it.
struct Unit {
    /// Rows of the key buffer.
    keys: Range<usize>,
    kv_head: usize,
    /// Each task, with the number that the stretch's first key has among the keys its span sees.
    seen_by: Vec<(usize, usize)>,
}

impl Unit {
    /// Numbers of its place: dk and dv of its keys, `[keys, K]` each, then dq of each of its tasks, `[rows, K]`.
    fn place(&self, tasks: &[Task], dims: Dims) -> usize {
        let rows: usize = self.seen_by.iter().map(|&(task, _)| tasks[task].rows(dims)).sum();
        (2 * self.keys.len() + rows) * dims.k
    }
}

/// What a unit works on, kept for the next.
#[derive(Default)]
struct Scratch {
    /// Its keys and values as panels `[panels, K, WIDTH]`.
    k_t: Vec<f32>,
    v_t: Vec<f32>,
    /// A task's rows, `[R, K]`.
    q: Vec<f32>,
    /// Some of them as the forward multiplies them in bf16.
    scaled: Vec<f32>,
    d_o: Vec<f32>,
    /// `[R]`, in units of ln 2.
    lse: Vec<f32>,
    /// Σ_k d_o∘o, `[R]`.
    delta: Vec<f32>,
    /// Keys that each row sees.
    visible: Vec<usize>,
    /// Probabilities and their derivatives of a tile, `[rows, WIDTH]`.
    p: Vec<f32>,
    ds: Vec<f32>,
    paired: paired::Scratch,
}

/// The buffers that a backward reads.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    d_o: &'a [f32],
    lse: &'a [f32],
    /// `[Tq, H]`
    delta: &'a [f32],
    dims: Dims,
    compute: Compute,
}

/// Gradients from d_o: dq written (zero for queries in no span), dk and dv accumulated.
///
/// With P = softmax(S), S = scale·q·kᵀ: dv = Pᵀ·d_o, dS = P∘(d_o·vᵀ − Σ_k d_o∘o), dq = scale·dS·k, dk = scale·dSᵀ·q.
///
/// # Shapes
/// dq, d_o, o, q `[Tq, H, K]`; lse `[Tq, H]`; dk, dv, k, v `[Tk, Hkv, K]`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    d_o: &[f32],
    o: &[f32],
    lse: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    spans: &[Span],
    dims: Dims,
    compute: Compute,
) {
    check(q, k, v, spans, dims);
    if compute != Compute::F32 {
        paired::check(spans);
    }
    assert!(
        dq.len() == q.len() && d_o.len() == q.len() && o.len() == q.len(),
        "attention: dq, d_o, o have {}, {}, {} numbers, q has {}",
        dq.len(),
        d_o.len(),
        o.len(),
        q.len()
    );
    assert_eq!(lse.len() * dims.k, q.len(), "attention: lse has {} numbers for q's {}", lse.len(), q.len());
    assert!(
        dk.len() == k.len() && dv.len() == v.len(),
        "attention: dk, dv have {}, {} numbers, k has {}",
        dk.len(),
        dv.len(),
        k.len()
    );
    let tasks = tasks(spans, dims);
    let units = units(&tasks, spans, dims);
    let work: usize = units.iter().map(|u| u.place(&tasks, dims) * u.keys.len()).sum();
    let threads = work >= WORTH_THREADS;

    let mut delta = vec![0.0; lse.len()];
    each(
        threads,
        delta.chunks_mut(CHUNK).zip(o.chunks(CHUNK * dims.k).zip(d_o.chunks(CHUNK * dims.k))),
        || (),
        |(), part| {
            let (delta, (o, d_o)) = part;
            products(delta, o, d_o, dims.k);
        },
    );
    let inputs = Inputs { q, k, v, d_o, lse, delta: &delta, dims, compute };
    dq.fill(0.0);
    let mut places: Vec<f32> = Vec::new();
    let mut rest = &units[..];
    while !rest.is_empty() {
        // Whole stretches, with all of their heads.
        let (mut n, mut sizes, mut total) = (0, Vec::new(), 0);
        for stretch in rest.chunk_by(|a, b| a.keys == b.keys) {
            let wanted: Vec<usize> = stretch.iter().map(|u| u.place(&tasks, dims)).collect();
            let sum = wanted.iter().sum::<usize>();
            if n > 0 && total + sum > PLACES {
                break;
            }
            n += stretch.len();
            total += sum;
            sizes.extend(wanted);
        }
        let (batch, later) = rest.split_at(n);
        rest = later;
        places.clear();
        places.resize(total, 0.0);
        let mut left = &mut places[..];
        let parts = batch.iter().zip(&sizes).map(|(unit, size)| {
            let (mine, others) = std::mem::take(&mut left).split_at_mut(*size);
            left = others;
            (unit, mine)
        });
        each(threads, parts, Scratch::default, |scratch, (unit, place)| fill(place, unit, &tasks, &inputs, scratch));
        add_up(dq, dk, dv, batch, &sizes, &places, &tasks, threads, dims);
    }
}

/// Rows of [`products`] that one task takes.
const CHUNK: usize = 4096;

/// The stretches in order, each for every head. Runs may overlap, so they are cut wherever one begins or ends: no two units write to
/// the same keys.
fn units(tasks: &[Task], spans: &[Span], dims: Dims) -> Vec<Unit> {
    let runs = || spans.iter().flat_map(|s| [&s.shared, &s.own]).filter(|r| !r.is_empty());
    let mut cuts: Vec<usize> = runs().flat_map(|r| [r.start, r.end]).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let mut stretches: Vec<Range<usize>> = Vec::new();
    for pair in cuts.windows(2) {
        stretches.extend((pair[0]..pair[1]).step_by(KEYS).map(|start| start..pair[1].min(start + KEYS)));
    }
    let mut units: Vec<Unit> = stretches
        .iter()
        .flat_map(|keys| (0..dims.kv_heads).map(|kv_head| Unit { keys: keys.clone(), kv_head, seen_by: Vec::new() }))
        .collect();
    for (t, task) in tasks.iter().enumerate() {
        for (run, first) in [(&task.span.shared, 0), (&task.span.own, task.span.shared.len())] {
            let at = stretches.partition_point(|s| s.start < run.start);
            for (s, stretch) in stretches.iter().enumerate().skip(at).take_while(|(_, s)| s.end <= run.end) {
                let number = first + stretch.start - run.start;
                if number >= task.keys() {
                    break;
                }
                units[s * dims.kv_heads + task.kv_head].seen_by.push((t, number));
            }
        }
    }
    units.retain(|u| !u.seen_by.is_empty());
    units
}

/// Adds the places of some units to the gradients.
#[allow(clippy::too_many_arguments)]
fn add_up(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    units: &[Unit],
    sizes: &[usize],
    places: &[f32],
    tasks: &[Task],
    threads: bool,
    dims: Dims,
) {
    let kd = dims.k;
    // Where each unit's place starts, and for each task the parts of dq.
    let mut starts = Vec::with_capacity(units.len());
    let mut of_task: Vec<Vec<usize>> = vec![Vec::new(); tasks.len()];
    let mut start = 0;
    for (unit, size) in units.iter().zip(sizes) {
        starts.push(start);
        let mut at = start + 2 * unit.keys.len() * kd;
        for &(task, _) in &unit.seen_by {
            of_task[task].push(at);
            at += tasks[task].rows(dims) * kd;
        }
        start += size;
    }

    let row = dims.kv_heads * kd;
    let (mut dk, mut dv, mut at) = (dk, dv, 0);
    let mut first = 0;
    let stretches = units.chunk_by(|a, b| a.keys == b.keys).map(|heads| {
        let keys = &heads[0].keys;
        let mine_k = std::mem::take(&mut dk)[(keys.start - at) * row..].split_at_mut(keys.len() * row);
        let mine_v = std::mem::take(&mut dv)[(keys.start - at) * row..].split_at_mut(keys.len() * row);
        (dk, dv, at) = (mine_k.1, mine_v.1, keys.end);
        let starts = &starts[first..first + heads.len()];
        first += heads.len();
        (heads, starts, mine_k.0, mine_v.0)
    });
    each(
        threads,
        stretches,
        || (),
        |(), (heads, starts, dk, dv)| {
            for (unit, &start) in heads.iter().zip(starts) {
                let n = unit.keys.len() * kd;
                for (sum, part) in
                    [(&mut *dk, &places[start..start + n]), (&mut *dv, &places[start + n..start + 2 * n])]
                {
                    for (sum, part) in sum.chunks_exact_mut(row).zip(part.chunks_exact(kd)) {
                        let sum = &mut sum[unit.kv_head * kd..(unit.kv_head + 1) * kd];
                        sum.iter_mut().zip(part).for_each(|(sum, g)| *sum += g);
                    }
                }
            }
        },
    );

    let (row, width) = (dims.heads * kd, dims.group() * kd);
    let (mut dq, mut at) = (dq, 0);
    let blocks = tasks.chunks(dims.kv_heads).zip(of_task.chunks(dims.kv_heads)).map(|(tasks, parts)| {
        let queries = tasks[0].queries();
        let mine = std::mem::take(&mut dq)[(queries.start - at) * row..].split_at_mut(queries.len() * row);
        (dq, at) = (mine.1, queries.end);
        (tasks, parts, mine.0)
    });
    each(
        threads,
        blocks,
        || (),
        |(), (tasks, parts, dq)| {
            for (task, parts) in tasks.iter().zip(parts) {
                for &start in parts {
                    for (sum, part) in dq.chunks_exact_mut(row).zip(places[start..].chunks_exact(width)) {
                        let sum = &mut sum[task.kv_head * width..(task.kv_head + 1) * width];
                        sum.iter_mut().zip(part).for_each(|(sum, g)| *sum += g);
                    }
                }
            }
        },
    );
}

/// Writes what a unit adds into its place.
fn fill(place: &mut [f32], unit: &Unit, tasks: &[Task], inputs: &Inputs, scratch: &mut Scratch) {
    let dims = inputs.dims;
    let (dk, rest) = place.split_at_mut(unit.keys.len() * dims.k);
    let (dv, mut dq) = rest.split_at_mut(unit.keys.len() * dims.k);
    let parts = inputs.compute.parts().filter(|parts| paired::worth(*parts, unit.keys.len()));
    let _tiles = parts.map(|_| pairs::hold());
    let mut stretch =
        parts.map(|parts| paired::Stretch::new(inputs.k, inputs.v, &unit.keys, unit.kv_head, dims, parts));
    let panels = [(&mut scratch.k_t, inputs.k), (&mut scratch.v_t, inputs.v)];
    for (to, from) in panels.into_iter().filter(|_| stretch.is_none()) {
        transposed(to, from, unit.keys.clone(), unit.kv_head, dims);
    }
    for &(task, number) in &unit.seen_by {
        let task = &tasks[task];
        scratch.read(task, inputs);
        let rows = task.rows(dims);
        let (mine, others) = std::mem::take(&mut dq).split_at_mut(rows * dims.k);
        dq = others;
        let at_once = match parts {
            Some(Parts::Three) => SPLIT_ROWS,
            _ => (TILE / dims.k).max(1).next_multiple_of(8),
        };
        for first in (0..rows).step_by(at_once) {
            let rows = first..rows.min(first + at_once);
            match &mut stretch {
                Some(stretch) => add_paired(mine, scratch, rows, stretch, number, inputs),
                None => add_rows(mine, dk, dv, scratch, rows, unit, number, inputs),
            }
        }
    }
    if let Some(stretch) = stretch {
        stretch.write(dk, dv, dims.k);
    }
}

impl Scratch {
    fn read(&mut self, task: &Task, inputs: &Inputs) {
        let dims = inputs.dims;
        let (kd, group) = (dims.k, dims.group());
        for (to, from) in [(&mut self.q, inputs.q), (&mut self.d_o, inputs.d_o)] {
            to.clear();
            task.starts(dims).for_each(|start| to.extend_from_slice(&from[start..start + group * kd]));
        }
        self.lse.clear();
        self.delta.clear();
        for start in task.starts(dims).map(|start| start / kd) {
            self.lse.extend(inputs.lse[start..start + group].iter().map(|lse| lse * std::f32::consts::LOG2_E));
            self.delta.extend_from_slice(&inputs.delta[start..start + group]);
        }
        self.visible.clear();
        self.visible.extend((0..task.rows(dims)).map(|r| task.span.visible(task.block.start + r / group)));
    }
}

dispatch! { fn products(out: &mut [f32], a: &[f32], b: &[f32], k: usize) = products_body }
#[inline(always)]
fn products_body<const LEVEL: u8>(out: &mut [f32], a: &[f32], b: &[f32], k: usize) {
    for ((out, a), b) in out.iter_mut().zip(a.chunks_exact(k)).zip(b.chunks_exact(k)) {
        *out = vector::dot::<LEVEL>(a, b);
    }
}

/// Adds what some rows of a task and the keys of a unit (of which the first is number `number` for the task) give to dq, dk and dv.
#[allow(clippy::too_many_arguments)]
fn add_rows(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    scratch: &mut Scratch,
    rows: Range<usize>,
    unit: &Unit,
    number: usize,
    inputs: &Inputs,
) {
    let dims = inputs.dims;
    let (kd, stride) = (dims.k, dims.kv_heads * dims.k);
    let Scratch { k_t, v_t, q, scaled: _, d_o, lse, delta, visible, p, ds, paired: _ } = scratch;
    p.resize(rows.len() * WIDTH, 0.0);
    ds.resize(rows.len() * WIDTH, 0.0);
    for tile in (0..unit.keys.len()).step_by(WIDTH) {
        // Rows see ever more keys: the first ones may see none of these.
        let unseeing = visible[rows.clone()].partition_point(|v| *v <= number + tile);
        let rows = rows.start + unseeing..rows.end;
        if rows.is_empty() {
            break;
        }
        let (n, count) = (rows.len(), WIDTH.min(unit.keys.len() - tile));
        let values = rows.start * kd..rows.end * kd;
        for (out, left, panels) in [(&mut *p, &q[values.clone()], &k_t), (&mut *ds, &d_o[values.clone()], &v_t)] {
            let panel = &panels[tile * kd..];
            panel::multiply(out, WIDTH, Left::rows(left, kd), panel, WIDTH, n, kd, WIDTH, Onto::Nothing);
        }
        let of_rows = (&lse[rows.clone()], &delta[rows.clone()], &visible[rows]);
        probabilities(p, ds, of_rows, number + tile, (dims.scale_in_log2(), dims.scale()));
        for (sum, weights, right) in [(&mut *dv, &*p, &d_o), (&mut *dk, &*ds, &q)] {
            let (sum, right) = (&mut sum[tile * kd..], &right[values.clone()]);
            panel::multiply(sum, kd, Left::turned(weights, WIDTH), right, kd, count, n, kd, Onto::Start);
        }
        let k = &inputs.k[(unit.keys.start + tile) * stride + unit.kv_head * kd..];
        panel::multiply(&mut dq[values], kd, Left::rows(ds, WIDTH), k, stride, n, count, kd, Onto::Start);
    }
}

/// The same where products are of bf16 numbers: every row sees all keys.
fn add_paired(
    dq: &mut [f32],
    scratch: &mut Scratch,
    rows: Range<usize>,
    stretch: &mut paired::Stretch,
    number: usize,
    inputs: &Inputs,
) {
    let Dims { k: kd, .. } = inputs.dims;
    let Scratch { q, scaled, d_o, lse, delta, visible, p, ds, paired, .. } = scratch;
    let values = rows.start * kd..rows.end * kd;
    let of_rows = (&lse[rows.clone()], &delta[rows.clone()], &visible[rows]);
    let make = |p: &mut [f32], ds: &mut [f32], first| {
        probabilities(p, ds, of_rows, number + first, (1.0, inputs.dims.scale()));
    };
    scaled.clear();
    scaled.extend(q[values.clone()].iter().map(|q| q * inputs.dims.scale_in_log2()));
    let sides = [&q[values.clone()], scaled, &d_o[values.clone()]];
    paired::add_rows(&mut dq[values], sides, [p, ds], stretch, paired, kd, make);
}

dispatch! {
    /// p: scores in, probabilities out (0 where hidden); ds: d_o·vᵀ in, scale·dS out. The first key is number `first`; of each row
    /// come the log-sum-exp, delta, and how many keys it sees. The first factor makes the scores those of the forward, in units of ln 2.
    fn probabilities(p: &mut [f32], ds: &mut [f32], rows: (&[f32], &[f32], &[usize]), first: usize, factors: (f32, f32)) = probabilities_body
}
#[inline(always)]
fn probabilities_body<const LEVEL: u8>(
    p: &mut [f32],
    ds: &mut [f32],
    rows: (&[f32], &[f32], &[usize]),
    first: usize,
    (in_log2, scale): (f32, f32),
) {
    let (lse, delta, visible) = rows;
    let tile = p.as_chunks_mut::<WIDTH>().0.iter_mut().zip(ds.as_chunks_mut::<WIDTH>().0);
    for ((p, ds), ((lse, delta), visible)) in tile.zip(lse.iter().zip(delta).zip(visible)) {
        for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
            // Above 0, where the exponential is none, stand only keys that the row does not see.
            *p = exp2::<LEVEL>(mul_add::<LEVEL>(*p, in_log2, -lse));
            *ds = *p * (*ds - delta) * scale;
        }
        let seen = visible - first;
        if seen < WIDTH {
            p[seen..].fill(0.0);
            ds[seen..].fill(0.0);
        }
    }
}
