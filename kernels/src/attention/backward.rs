//! The gradient of attention, tile by tile: no row of scores ever exists whole (Dao et al. 2022, arXiv:2205.14135).
//!
//! The work is cut by keys. A [`Unit`] is a stretch of one run of keys for one head; it meets, in the order of the spans, every
//! block of queries that sees it, and adds up dk and dv of its own keys alone. A tile is 32 keys by a block of rows, its scores
//! held with keys as rows, which is how dk and dv want them; only dq wants them the other way round. The order of summation
//! depends on the spans and on the constants here, never on the threads.

use super::task::{Task, head_rows, tasks};
use super::{Dims, Span, check};
use crate::panel::{self, WIDTH};
use crate::vector::{self, dispatch, exp};
use rayon::prelude::*;
use std::ops::Range;

/// Keys of a unit: enough of them to make up for gathering the queries again, few enough to spread over threads.
const KEYS: usize = 1024;
/// Units whose partial gradients are held at once.
const BATCH: usize = 64;

/// A stretch of one run of keys, for one head of keys, with the tasks that see it.
struct Unit<'a> {
    /// Rows of the key buffer.
    keys: Range<usize>,
    kv_head: usize,
    /// Each task with the number that the unit's first key has among the keys its span sees.
    seen_by: Vec<(&'a Task<'a>, usize)>,
}

/// What a unit adds: dk and dv of its keys, [keys, K], and for each of its tasks dq, [rows, K].
struct Partial {
    dk: Vec<f32>,
    dv: Vec<f32>,
    dq: Vec<Vec<f32>>,
}

/// A task's rows as a unit needs them.
struct Rows {
    /// `[R, K]`, and transposed as panels `[panels, K, WIDTH]`.
    q: Vec<f32>,
    q_t: Vec<f32>,
    d_o: Vec<f32>,
    d_o_t: Vec<f32>,
    /// `[R]`, room for whole panels behind.
    lse: Vec<f32>,
    delta: Vec<f32>,
    /// Keys that each row sees.
    visible: Vec<usize>,
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
) {
    check(q, k, v, spans, dims);
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
    dq.fill(0.0);
    let tasks = tasks(spans, dims);
    let kd = dims.k;
    let width = dims.group() * kd;
    for batch in units(&tasks).chunks(BATCH) {
        let done: Vec<Partial> = batch.par_iter().map(|unit| of_unit(unit, d_o, o, lse, q, k, v, dims)).collect();
        for (unit, part) in batch.iter().zip(&done) {
            for ((task, _), rows) in unit.seen_by.iter().zip(&part.dq) {
                for (start, from) in task.starts(dims).zip(rows.chunks_exact(width)) {
                    dq[start..start + width].iter_mut().zip(from).for_each(|(sum, g)| *sum += g);
                }
            }
            let parts = part.dk.chunks_exact(kd).zip(part.dv.chunks_exact(kd));
            for (row, (from_k, from_v)) in unit.keys.clone().zip(parts) {
                let at = (row * dims.kv_heads + unit.kv_head) * kd;
                dk[at..at + kd].iter_mut().zip(from_k).for_each(|(sum, g)| *sum += g);
                dv[at..at + kd].iter_mut().zip(from_v).for_each(|(sum, g)| *sum += g);
            }
        }
    }
}

/// The stretches of all runs of keys, in the order in which the tasks first see them.
fn units<'a>(tasks: &'a [Task<'a>]) -> Vec<Unit<'a>> {
    let mut units: Vec<Unit> = Vec::new();
    let mut places: std::collections::HashMap<(usize, usize, usize), usize> = std::collections::HashMap::new();
    for task in tasks {
        let before = task.span.shared.len();
        for (run, first) in [(&task.span.shared, 0), (&task.span.own, before)] {
            for start in run.clone().step_by(KEYS) {
                let number = first + start - run.start;
                if number >= task.keys() {
                    break;
                }
                let keys = start..run.end.min(start + KEYS);
                let place = *places.entry((keys.start, keys.end, task.kv_head)).or_insert_with(|| {
                    units.push(Unit { keys, kv_head: task.kv_head, seen_by: Vec::new() });
                    units.len() - 1
                });
                units[place].seen_by.push((task, number));
            }
        }
    }
    units
}

#[allow(clippy::too_many_arguments)]
fn of_unit(unit: &Unit, d_o: &[f32], o: &[f32], lse: &[f32], q: &[f32], k: &[f32], v: &[f32], dims: Dims) -> Partial {
    let [k, v] = [k, v].map(|x| head_rows(x, &unit.keys, unit.kv_head, dims));
    let (mut dk, mut dv) = (vec![0.0; k.len()], vec![0.0; v.len()]);
    let mut dq = Vec::with_capacity(unit.seen_by.len());
    for &(task, number) in &unit.seen_by {
        let rows = rows_of(task, d_o, o, lse, q, dims);
        let mut of_task = vec![0.0; rows.q.len()];
        add_task(&mut of_task, &mut dk, &mut dv, &rows, &k, &v, number, dims);
        dq.push(of_task);
    }
    Partial { dk, dv, dq }
}

fn rows_of(task: &Task, d_o: &[f32], o: &[f32], lse: &[f32], q: &[f32], dims: Dims) -> Rows {
    let (kd, group) = (dims.k, dims.group());
    let (q, o, d_o) = (task.gather(q, dims), task.gather(o, dims), task.gather(d_o, dims));
    let rows = q.len() / kd;
    let panels = rows.div_ceil(WIDTH);
    let transposed = |x: &[f32]| {
        let mut out = vec![0.0; panels * WIDTH * kd];
        for (p, panel) in out.chunks_exact_mut(WIDTH * kd).enumerate() {
            let first = p * WIDTH;
            panel::transpose_into(panel, &x[first * kd..], kd, kd, WIDTH.min(rows - first));
        }
        out
    };
    let mut of_rows: Vec<f32> = task.starts(dims).flat_map(|s| lse[s / kd..][..group].iter().copied()).collect();
    of_rows.resize(panels * WIDTH, 0.0);
    let mut delta = vec![0.0; panels * WIDTH];
    products(&mut delta[..rows], &o, &d_o, kd);
    let visible = (0..rows).map(|r| task.span.visible(task.block.start + r / group)).collect();
    Rows { q_t: transposed(&q), d_o_t: transposed(&d_o), q, d_o, lse: of_rows, delta, visible }
}

dispatch! { fn products(out: &mut [f32], a: &[f32], b: &[f32], k: usize) = products_body }
#[inline(always)]
fn products_body<const LEVEL: u8>(out: &mut [f32], a: &[f32], b: &[f32], k: usize) {
    for ((out, a), b) in out.iter_mut().zip(a.chunks_exact(k)).zip(b.chunks_exact(k)) {
        *out = vector::dot::<LEVEL>(a, b);
    }
}

/// Adds what one task and the keys `k`, `v` (of which the first is number `first` for the task) give to dq, dk and dv.
#[allow(clippy::too_many_arguments)]
fn add_task(
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
    rows: &Rows,
    k: &[f32],
    v: &[f32],
    first: usize,
    dims: Dims,
) {
    let kd = dims.k;
    let n = rows.visible.len();
    let width = rows.lse.len();
    let last = rows.visible.iter().copied().max().unwrap_or(0);
    let mut p = vec![0.0f32; WIDTH * width];
    let mut ds = vec![0.0f32; WIDTH * width];
    let mut turned = vec![0.0f32; n * WIDTH];
    let mut part = vec![0.0f32; WIDTH * kd];
    let keys = k.len() / kd;
    for tile in (0..keys).step_by(WIDTH) {
        if first + tile >= last {
            break;
        }
        let count = WIDTH.min(keys - tile);
        let (k, v) = (&k[tile * kd..(tile + count) * kd], &v[tile * kd..(tile + count) * kd]);
        for (out, panels, keys) in [(&mut p, &rows.q_t, k), (&mut ds, &rows.d_o_t, v)] {
            for (at, panel) in panels.chunks_exact(WIDTH * kd).enumerate() {
                panel::multiply(&mut out[at * WIDTH..], width, keys, kd, panel, WIDTH, count, kd, WIDTH, false);
            }
        }
        probabilities(&mut p, &mut ds, rows, count, first + tile, dims.scale());
        for (sum, weights, values) in [(&mut *dv, &p, &rows.d_o), (&mut *dk, &ds, &rows.q)] {
            panel::multiply(&mut part, kd, weights, width, values, kd, count, n, kd, false);
            sum[tile * kd..(tile + count) * kd].iter_mut().zip(&part).for_each(|(sum, g)| *sum += g);
        }
        panel::transpose_into(&mut turned, &ds, width, n, count);
        panel::multiply(dq, kd, &turned, WIDTH, k, kd, n, count, kd, true);
    }
}

dispatch! {
    /// p: scores in, probabilities out (0 where hidden); ds: d_o·vᵀ in, scale·dS out. Keys are rows; the first is number `first`.
    fn probabilities(p: &mut [f32], ds: &mut [f32], rows: &Rows, keys: usize, first: usize, scale: f32) = probabilities_body
}
#[inline(always)]
fn probabilities_body<const LEVEL: u8>(
    p: &mut [f32],
    ds: &mut [f32],
    rows: &Rows,
    keys: usize,
    first: usize,
    scale: f32,
) {
    let width = rows.lse.len();
    for (j, (p, ds)) in p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)).enumerate().take(keys) {
        for ((p, ds), (lse, delta)) in p.iter_mut().zip(ds.iter_mut()).zip(rows.lse.iter().zip(&rows.delta)) {
            *p = exp::<LEVEL>(*p * scale - lse);
            *ds = *p * (*ds - delta) * scale;
        }
        // Rows see ever more keys, so the ones that do not see this key come first.
        let hidden = if rows.visible[0] > first + j { 0 } else { rows.visible.partition_point(|v| *v <= first + j) };
        p[..hidden].fill(0.0);
        ds[..hidden].fill(0.0);
    }
}
