//! One transformer block, forward and backward, used by the vision tower and the language model alike.
//!
//! `mid = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1)))`, `y = mid + down(silu(gate(n2)) * up(n2))`, with
//! `n1 = rmsnorm(x)`, `n2 = rmsnorm(mid)`. It hides what is kept for the backward pass: norms and the product of the MLP
//! are cheap and computed again, results of matrix products and of attention are kept ([`Tape`]), or, to save memory,
//! only the block's input, with the result of attention or without. All give the same gradients bit for bit, because every kernel gives the
//! same bits for the same inputs.

use std::collections::HashMap;
use std::ops::Range;

use foveate_kernels::attention::{self, Keys, Span};
use foveate_kernels::matrix::Compute;
use foveate_kernels::rope::{self, Table};
use foveate_kernels::{linear, memory, mlp, norm};
use rayon::prelude::*;

use super::layout::{Affine, Block, Lora, Trainable};
use super::values::Values;

/// Sizes of a block: width D, query and key/value heads, K per head, MLP width, epsilon of the norms.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub k: usize,
    pub mlp: usize,
    pub eps: f32,
}

impl Dims {
    pub fn attention(&self) -> attention::Dims {
        attention::Dims { heads: self.heads, kv_heads: self.kv_heads, k: self.k }
    }
}

/// How much a forward pass keeps for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: no gradient is wanted.
    Nothing,
    /// Each block's input; the rest is computed a second time. A third more work, a fraction of the memory.
    Inputs,
    /// That, and what attention gave: where rows see thousands of keys, the dearest result for its bytes.
    Attended,
    /// The result of every matrix product.
    Everything,
}

/// What a block's rows have in common.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// `[T, K]`
    pub table: &'a Table,
    pub spans: &'a [Span],
    /// The rows whose result is wanted, ascending; all when `None`. In the last block only rows with a target are: the
    /// others have done their part once their keys and values are there, and skip the output projection and the MLP.
    pub wanted: Option<&'a [usize]>,
    /// What attention's own products are computed in: bf16 is for spans that share nothing and hide nothing.
    pub attention: Compute,
}

/// What the backward pass of a block needs. Shapes: `x` `[T, D]`; `q`, `o` `[T, H, K]`; `k`, `v` `[T, Hkv, K]`
/// (`q` and `k` rotated); `lse` `[T, H]`; and for the N wanted rows `mid` `[N, D]`; `gate`, `up` `[N, MLP]`.
pub struct Tape {
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    o: Vec<f32>,
    lse: Vec<f32>,
    mid: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

pub enum Kept {
    Input(Vec<f32>),
    /// Input, result and log-sum-exp of attention.
    Attended([Vec<f32>; 3]),
    All(Box<Tape>),
}

impl Kept {
    /// The block's input, `[T, D]`.
    pub fn input(&self) -> &[f32] {
        match self {
            Kept::Input(x) | Kept::Attended([x, ..]) => x,
            Kept::All(tape) => &tape.x,
        }
    }
}

/// Queries, keys and values of some rows, rotated.
pub struct Qkv {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The parameters, and some of their matrices laid out for our own product.
#[derive(Clone, Copy)]
pub struct Params<'a> {
    pub values: Values<'a>,
    pub laid: Option<&'a Laid>,
    /// The caller has spread the rows over the threads: a product stays where it is.
    spread: bool,
}

impl<'a> Params<'a> {
    pub fn new(values: Values<'a>, laid: Option<&'a Laid>) -> Params<'a> {
        Params { values, laid, spread: false }
    }
}

/// Matrices laid out once for our own product (`linear::Packed`), by the place of each in the arena.
pub struct Laid(HashMap<usize, linear::Packed>);

impl Laid {
    /// Of some maps.
    pub fn new<'a>(maps: impl Iterator<Item = &'a Affine>, values: Values) -> Laid {
        Laid::each(maps, |map| linear::Packed::new(values.matrix(&map.w), map.inputs, map.outputs))
    }

    /// Of a block's maps for the gradients by their inputs.
    fn turned(block: &Block, values: Values) -> Laid {
        let maps = block.maps().into_iter();
        Laid::each(maps, |map| linear::Packed::turned(values.matrix(&map.w), map.inputs, map.outputs))
    }

    fn each<'a>(maps: impl Iterator<Item = &'a Affine>, lay: impl Fn(&Affine) -> linear::Packed + Sync) -> Laid {
        let adapters = |map: &'a Affine| map.lora.iter().flat_map(|lora| [&lora.a, &lora.b]);
        let maps: Vec<&Affine> = maps.flat_map(|map| std::iter::once(map).chain(adapters(map))).collect();
        Laid(maps.into_par_iter().map(|map| (map.w.start, lay(map))).collect())
    }

    pub fn get(&self, place: &Range<usize>) -> Option<&linear::Packed> {
        self.0.get(&place.start)
    }
}

impl Block {
    pub fn maps(&self) -> [&Affine; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

impl Affine {
    /// # Shapes
    /// x `[T, inputs]` -> `[T, outputs]`
    pub fn forward(&self, values: Values, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        self.run(&mut y, Params::new(values, None), x, false);
        y
    }

    /// Writes y, or adds to it when `onto`.
    ///
    /// # Shapes
    /// x `[T, inputs]`, y `[T, outputs]`
    fn run(&self, y: &mut [f32], params: Params, x: &[f32], onto: bool) {
        let t = x.len() / self.inputs;
        let bias = self.b.as_ref().map(|b| params.values.vector(b));
        match params.laid.and_then(|laid| laid.get(&self.w)) {
            Some(packed) if params.spread => packed.forward_here(y, x, bias, onto, t),
            Some(packed) => packed.forward(y, x, bias, onto, t),
            None => linear::forward(y, x, params.values.matrix(&self.w), bias, onto, t, self.inputs, self.outputs),
        }
        if let Some(lora) = &self.lora {
            lora.b.run(y, params, &lora.narrow(params, x), true);
        }
    }

    /// Writes (or adds, when `accumulate`) the gradient by the input.
    pub fn backward_input(&self, dx: &mut [f32], dy: &[f32], values: Values, accumulate: bool) {
        let t = dy.len() / self.outputs;
        linear::backward_input(dx, dy, values.matrix(&self.w), t, self.inputs, self.outputs, accumulate);
        if let Some(lora) = &self.lora {
            lora.a.backward_input(dx, &lora.narrow_back(values, dy), values, true);
        }
    }

    /// The same over matrices that are laid out for it.
    fn run_back(&self, dx: &mut [f32], dy: &[f32], turned: &Laid, accumulate: bool) {
        let t = dy.len() / self.outputs;
        match turned.get(&self.w) {
            Some(packed) => packed.forward_here(dx, dy, None, accumulate, t),
            None => unreachable!("a block's maps are all laid out"),
        }
        if let Some(lora) = &self.lora {
            let mut du = vec![0.0; t * lora.b.inputs];
            lora.b.run_back(&mut du, dy, turned, false);
            du.iter_mut().for_each(|du| *du *= lora.scale);
            lora.a.run_back(dx, &du, turned, true);
        }
    }
}

impl Lora {
    /// `scale · x · aᵀ`
    ///
    /// # Shapes
    /// x `[T, M]` -> `[T, R]`
    fn narrow(&self, params: Params, x: &[f32]) -> Vec<f32> {
        let mut u = vec![0.0; x.len() / self.a.inputs * self.a.outputs];
        self.a.run(&mut u, params, x, false);
        u.iter_mut().for_each(|u| *u *= self.scale);
        u
    }

    /// The gradient by `x · aᵀ`.
    ///
    /// # Shapes
    /// dy `[T, N]` -> `[T, R]`
    fn narrow_back(&self, values: Values, dy: &[f32]) -> Vec<f32> {
        let mut du = vec![0.0; dy.len() / self.b.outputs * self.b.inputs];
        self.b.backward_input(&mut du, dy, values, false);
        du.iter_mut().for_each(|du| *du *= self.scale);
        du
    }
}

/// Where gradients are added: of the maps and norms themselves, or of the adapters alone.
pub struct Grads<'a> {
    arena: &'a mut [f32],
    adapters: bool,
}

impl<'a> Grads<'a> {
    /// The arena, if a part of the model is trained at all.
    pub fn of(arena: &'a mut [f32], trained: bool, train: Trainable) -> Option<Grads<'a>> {
        trained.then_some(Grads { arena, adapters: train.adapters })
    }

    /// The arena for what no adapter stands beside: norms, the patch embedding.
    pub fn own(&mut self) -> Option<&mut [f32]> {
        (!self.adapters).then_some(&mut *self.arena)
    }

    /// Adds the gradients of maps, each with its dy, that have the same input.
    pub fn add(&mut self, maps: &[(&Affine, &[f32])], x: &[f32], values: Values) {
        if !self.adapters {
            return backward_weights(self.arena, maps, x, values.compute);
        }
        for (map, dy) in maps {
            let Some(lora) = &map.lora else { continue };
            let u = lora.narrow(Params::new(values, None), x);
            backward_weights(self.arena, &[(&lora.b, dy)], &u, values.compute);
            backward_weights(self.arena, &[(&lora.a, &lora.narrow_back(values, dy))], x, values.compute);
        }
    }
}

/// Adds the gradients by the weights and biases of maps, each with its dy, that have the same input.
fn backward_weights(grads: &mut [f32], maps: &[(&Affine, &[f32])], x: &[f32], compute: Compute) {
    let inputs = maps[0].0.inputs;
    // The gradients lie apart in the arena, in whatever order.
    let mut places: Vec<(usize, &Range<usize>)> = Vec::new();
    for (i, (map, _)) in maps.iter().enumerate() {
        places.push((2 * i, &map.w));
        places.extend(map.b.iter().map(|b| (2 * i + 1, b)));
    }
    places.sort_by_key(|(_, place)| place.start);
    let mut parts: Vec<Option<&mut [f32]>> = (0..2 * maps.len()).map(|_| None).collect();
    let (mut rest, mut at) = (grads, 0);
    for (i, place) in places {
        let (part, others) = rest[place.start - at..].split_at_mut(place.len());
        (parts[i], rest, at) = (Some(part), others, place.end);
    }
    let mut outers = Vec::with_capacity(maps.len());
    for (part, &(_, dy)) in parts.chunks_exact_mut(2).zip(maps) {
        outers.push(linear::Outer { dw: part[0].take().unwrap_or_default(), db: part[1].take(), dy });
    }
    linear::backward_weights(outers, x, x.len() / inputs, inputs, compute);
}

/// RMS-normalised rows and their reciprocal root mean squares.
///
/// # Shapes
/// x `[T, D]`, weight `[D]` -> `[T, D]`, `[T]`
pub fn normed(x: &[f32], weight: &[f32], eps: f32) -> (Vec<f32>, Vec<f32>) {
    let d = weight.len();
    let mut y = vec![0.0; x.len()];
    let mut rstd = vec![0.0; x.len() / d];
    norm::forward(&mut y, &mut rstd, x, weight, d, eps);
    (y, rstd)
}

/// Backward of [`normed`]: gradient by `x` written to `dx` or added to it, gradient by the weight added to the arena.
#[allow(clippy::too_many_arguments)]
pub fn normed_backward(
    dx: &mut [f32],
    grads: Option<&mut [f32]>,
    place: &Range<usize>,
    dy: &[f32],
    x: &[f32],
    values: Values,
    rstd: &[f32],
    accumulate: bool,
) {
    let d = place.len();
    let mut unused;
    let dw = match grads {
        Some(g) => &mut g[place.clone()],
        None => {
            unused = vec![0.0; d];
            &mut unused[..]
        }
    };
    norm::backward(dx, dw, dy, x, values.vector(place), rstd, d, accumulate);
}

/// Some maps laid out, unless they are already or the rows are too few to be worth it.
fn laid_out<const N: usize>(maps: [&Affine; N], params: Params, rows: usize) -> Option<Laid> {
    (params.laid.is_none() && rows >= linear::FEW_ROWS).then(|| Laid::new(maps.into_iter(), params.values))
}

/// Parameters as the tasks of some rows use them, and the rows of one task: few rows stay together, and each of their products is
/// spread over the threads instead.
fn cut<'a>(params: Params<'a>, own: &'a Option<Laid>, rows: usize) -> (Params<'a>, usize) {
    let laid = own.as_ref().or(params.laid);
    let spread = rows >= linear::FEW_ROWS;
    let chunk = if spread { linear::rows_at_once(rows, params.values.compute) } else { rows.max(1) };
    (Params { laid, spread, ..params }, chunk)
}

/// First half up to attention: norm, projections, rotation.
///
/// # Shapes
/// x `[T, D]`, table `[T, K]`
pub fn project(block: &Block, dims: &Dims, params: Params, x: &[f32], table: &Table) -> Qkv {
    let t = x.len() / dims.hidden;
    let own = laid_out([&block.q, &block.k, &block.v], params, t);
    let (params, chunk) = cut(params, &own, t);
    let (wide, narrow) = (dims.heads * dims.k, dims.kv_heads * dims.k);
    let [mut q, mut k, mut v] = [wide, narrow, narrow].map(|width| memory::Rows::new(t * width));
    q.chunks(chunk * wide)
        .zip(k.chunks(chunk * narrow))
        .zip(v.chunks(chunk * narrow))
        .zip(x.par_chunks(chunk * dims.hidden))
        .enumerate()
        .for_each(|(i, (((q, k), v), x))| {
            let (q, k, v) = (q.clear(), k.clear(), v.clear());
            let (n1, rstd) = normed(x, params.values.vector(&block.norm1), dims.eps);
            block.q.run(q, params, &n1, false);
            block.k.run(k, params, &n1, false);
            block.v.run(v, params, &n1, false);
            let angles = table.rows(i * chunk..i * chunk + rstd.len());
            rope::apply(q, angles, dims.heads);
            rope::apply(k, angles, dims.kv_heads);
        });
    Qkv { q: q.done(), k: k.done(), v: v.done() }
}

/// From the attention's result to the block's: output projection, both residuals, MLP. Gives y, mid, gate and up.
///
/// # Shapes
/// x `[T, D]`, o `[T, H, K]`
fn finish_keeping(block: &Block, dims: &Dims, params: Params, x: &[f32], o: &[f32]) -> [Vec<f32>; 4] {
    let t = x.len() / dims.hidden;
    let own = laid_out([&block.o, &block.gate, &block.up, &block.down], params, t);
    let (params, chunk) = cut(params, &own, t);
    let Dims { hidden: d, mlp: wide, .. } = *dims;
    let [mut y, mut mid, mut gate, mut up] = [d, d, wide, wide].map(|width| memory::Rows::new(t * width));
    y.chunks(chunk * d)
        .zip(mid.chunks(chunk * d))
        .zip(gate.chunks(chunk * wide).zip(up.chunks(chunk * wide)))
        .zip(x.par_chunks(chunk * d).zip(o.par_chunks(chunk * dims.heads * dims.k)))
        .for_each(|(((y, mid), (gate, up)), (x, o))| {
            let (y, mid) = (y.clear(), mid.clear());
            finish_rows(block, dims, params, [x, o], y, Some(mid), [gate.clear(), up.clear()]);
        });
    [y, mid, gate, up].map(memory::Rows::done)
}

/// The same where no backward pass will follow.
///
/// # Shapes
/// x `[T, D]`, o `[T, H, K]` -> `[T, D]`
pub fn finish(block: &Block, dims: &Dims, params: Params, x: &[f32], o: &[f32]) -> Vec<f32> {
    let t = x.len() / dims.hidden;
    let own = laid_out([&block.o, &block.gate, &block.up, &block.down], params, t);
    let (params, chunk) = cut(params, &own, t);
    let mut y = memory::Rows::new(x.len());
    y.chunks(chunk * dims.hidden)
        .zip(x.par_chunks(chunk * dims.hidden).zip(o.par_chunks(chunk * dims.heads * dims.k)))
        .for_each(|(y, (x, o))| {
            let wide = x.len() / dims.hidden * dims.mlp;
            let (mut gate, mut up) = (vec![0.0; wide], vec![0.0; wide]);
            finish_rows(block, dims, params, [x, o], y.clear(), None, [&mut gate, &mut up]);
        });
    y.done()
}

fn finish_rows(
    block: &Block,
    dims: &Dims,
    params: Params,
    [x, o]: [&[f32]; 2],
    y: &mut [f32],
    mid: Option<&mut [f32]>,
    [gate, up]: [&mut [f32]; 2],
) {
    y.copy_from_slice(x);
    block.o.run(y, params, o, true);
    if let Some(mid) = mid {
        mid.copy_from_slice(y);
    }
    let (n2, _) = normed(y, params.values.vector(&block.norm2), dims.eps);
    block.gate.run(gate, params, &n2, false);
    block.up.run(up, params, &n2, false);
    let mut h = n2;
    h.resize(gate.len(), 0.0);
    mlp::swiglu_forward(&mut h, gate, up);
    block.down.run(y, params, &h, true);
}

/// The named rows of `x`, each of `width` values.
pub fn pick(x: &[f32], rows: &[usize], width: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        y.extend_from_slice(&x[row * width..(row + 1) * width]);
    }
    y
}

/// The backward of [`pick`] for different rows: all other rows are 0.
fn put_back(dy: &[f32], rows: &[usize], width: usize, len: usize) -> Vec<f32> {
    let mut dx = vec![0.0; len];
    for (chunk, &row) in dy.chunks_exact(width).zip(rows) {
        dx[row * width..(row + 1) * width].copy_from_slice(chunk);
    }
    dx
}

/// The attention's result and log-sum-exp, and of the wanted rows the block's input and that result.
struct Attended {
    qkv: Qkv,
    o: Vec<f32>,
    lse: Vec<f32>,
    /// Where only some rows are wanted: `[N, D]`, `[N, H, K]`.
    picked: Option<[Vec<f32>; 2]>,
}

/// `known`: the result and log-sum-exp, where they were kept.
fn attend(block: &Block, dims: &Dims, values: Values, x: &[f32], rows: Rows, known: Option<[Vec<f32>; 2]>) -> Attended {
    let qkv = project(block, dims, Params::new(values, None), x, rows.table);
    let [o, lse] = known.unwrap_or_else(|| {
        let mut o = vec![0.0; qkv.q.len()];
        let mut lse = vec![0.0; x.len() / dims.hidden * dims.heads];
        let keys = Keys::Rows(&qkv.k);
        let (dims, compute) = (dims.attention(), rows.attention);
        attention::forward(&mut o, &mut lse, &qkv.q, keys, &qkv.v, rows.spans, dims, compute);
        [o, lse]
    });
    let picked = rows.wanted.map(|wanted| [pick(x, wanted, dims.hidden), pick(&o, wanted, dims.heads * dims.k)]);
    Attended { qkv, o, lse, picked }
}

fn forward_all(
    block: &Block,
    dims: &Dims,
    values: Values,
    x: Vec<f32>,
    rows: Rows,
    known: Option<[Vec<f32>; 2]>,
) -> (Vec<f32>, Tape) {
    let Attended { qkv: Qkv { q, k, v }, o, lse, picked } = attend(block, dims, values, &x, rows, known);
    let [of_x, of_o] = picked.as_ref().map_or([&x, &o], |[x, o]| [x, o]);
    let [y, mid, gate, up] = finish_keeping(block, dims, Params::new(values, None), of_x, of_o);
    (y, Tape { x, q, k, v, o, lse, mid, gate, up })
}

/// Runs a block over packed rows that attend within `spans`.
///
/// # Shapes
/// x `[T, D]` -> `[T, D]`, or `[N, D]` for the wanted rows
pub fn forward(
    block: &Block,
    dims: &Dims,
    values: Values,
    x: Vec<f32>,
    rows: Rows,
    keep: Keep,
) -> (Vec<f32>, Option<Kept>) {
    if keep == Keep::Everything {
        let (y, tape) = forward_all(block, dims, values, x, rows, None);
        return (y, Some(Kept::All(Box::new(tape))));
    }
    let Attended { qkv, o, lse, picked } = attend(block, dims, values, &x, rows, None);
    drop(qkv);
    let [of_x, of_o] = picked.as_ref().map_or([&x, &o], |[x, o]| [x, o]);
    let y = finish(block, dims, Params::new(values, None), of_x, of_o);
    let kept = match keep {
        Keep::Inputs => Some(Kept::Input(x)),
        Keep::Attended => Some(Kept::Attended([x, o, lse])),
        _ => None,
    };
    (y, kept)
}

/// Backward of [`forward`]: turns the gradient by the result into the gradient by the input, and adds the gradients of
/// the block's parameters to the arena `grads`, unless it is frozen (`None`).
///
/// # Shapes
/// dy `[T, D]`, or `[N, D]` for the wanted rows -> `[T, D]`
pub fn backward(
    block: &Block,
    dims: &Dims,
    values: Values,
    dy: Vec<f32>,
    kept: Kept,
    rows: Rows,
    mut grads: Option<Grads>,
) -> Vec<f32> {
    let Tape { x, q, k, v, o, lse, mid, mut gate, mut up } = match kept {
        Kept::All(tape) => *tape,
        Kept::Input(x) => forward_all(block, dims, values, x, rows, None).1,
        Kept::Attended([x, o, lse]) => forward_all(block, dims, values, x, rows, Some([o, lse])).1,
    };
    let Dims { hidden: d, mlp: wide, .. } = *dims;
    let turned = Laid::turned(block, values);
    // Rows that one task takes through all that is done to each alone.
    let chunk = linear::most_rows(values.compute);

    // MLP: y = mid + down(h). Then attention: mid = x + o(attention).
    let n = mid.len() / d;
    let [mut h, mut n2, mut dmid, mut d_o] =
        [wide, d, d, dims.heads * dims.k].map(|width| memory::Rows::new(n * width));
    let mut dnorm = vec![0.0; n.div_ceil(chunk) * d];
    h.chunks(chunk * wide)
        .zip(gate.par_chunks_mut(chunk * wide).zip(up.par_chunks_mut(chunk * wide)))
        .zip(n2.chunks(chunk * d).zip(dmid.chunks(chunk * d)))
        .zip(d_o.chunks(chunk * dims.heads * dims.k).zip(dnorm.par_chunks_mut(d)))
        .zip(dy.par_chunks(chunk * d).zip(mid.par_chunks(chunk * d)))
        .for_each(|((((h, (gate, up)), (n2, dmid)), (d_o, dnorm)), (dy, mid))| {
            let (h, n2, dmid, d_o) = (h.clear(), n2.clear(), dmid.clear(), d_o.clear());
            block.down.run_back(h, dy, &turned, false);
            mlp::swiglu_backward(h, gate, up);
            let mut dn = vec![0.0; dy.len()];
            block.gate.run_back(&mut dn, gate, &turned, false);
            block.up.run_back(&mut dn, up, &turned, true);
            let mut rstd = vec![0.0; mid.len() / d];
            let weight = values.vector(&block.norm2);
            norm::forward(n2, &mut rstd, mid, weight, d, dims.eps);
            dmid.copy_from_slice(dy);
            norm::backward(dmid, dnorm, &dn, mid, weight, &rstd, d, true);
            block.o.run_back(d_o, dmid, &turned, false);
        });
    let (h, n2, mut dmid, mut d_o) = (h.done(), n2.done(), dmid.done(), d_o.done());
    let picked = rows.wanted.map(|wanted| pick(&o, wanted, dims.heads * dims.k));
    if let Some(g) = &mut grads {
        g.add(&[(&block.down, &dy)], &h, values);
        g.add(&[(&block.gate, &gate), (&block.up, &up)], &n2, values);
        g.add(&[(&block.o, &dmid)], picked.as_ref().unwrap_or(&o), values);
        if let Some(own) = g.own() {
            add_up(&mut own[block.norm2.clone()], &dnorm);
        }
    }
    drop((h, gate, up, n2, dy, mid));
    if let Some(wanted) = rows.wanted {
        d_o = put_back(&d_o, wanted, dims.heads * dims.k, o.len());
        dmid = put_back(&dmid, wanted, d, x.len());
    }

    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    attention::backward(
        &mut dq,
        &mut dk,
        &mut dv,
        &d_o,
        &o,
        &lse,
        &q,
        &k,
        &v,
        rows.spans,
        dims.attention(),
        rows.attention,
    );
    drop((d_o, o, q, k, v));
    let mut n1 = memory::Rows::new(x.len());
    let mut dnorm = vec![0.0; (x.len() / d).div_ceil(chunk) * d];
    let mut dx = dmid;
    let narrow = dims.kv_heads * dims.k;
    dq.par_chunks_mut(chunk * dims.heads * dims.k)
        .zip(dk.par_chunks_mut(chunk * narrow).zip(dv.par_chunks(chunk * narrow)))
        .zip(n1.chunks(chunk * d).zip(dx.par_chunks_mut(chunk * d)))
        .zip(dnorm.par_chunks_mut(d).zip(x.par_chunks(chunk * d)))
        .enumerate()
        .for_each(|(i, (((dq, (dk, dv)), (n1, dx)), (dnorm, x)))| {
            let n1 = n1.clear();
            let mut rstd = vec![0.0; x.len() / d];
            let angles = rows.table.rows(i * chunk..i * chunk + rstd.len());
            rope::apply_backward(dq, angles, dims.heads);
            rope::apply_backward(dk, angles, dims.kv_heads);
            let mut dn = vec![0.0; x.len()];
            block.q.run_back(&mut dn, dq, &turned, false);
            block.k.run_back(&mut dn, dk, &turned, true);
            block.v.run_back(&mut dn, dv, &turned, true);
            let weight = values.vector(&block.norm1);
            norm::forward(n1, &mut rstd, x, weight, d, dims.eps);
            norm::backward(dx, dnorm, &dn, x, weight, &rstd, d, true);
        });
    if let Some(mut g) = grads {
        let n1 = n1.done();
        g.add(&[(&block.q, &dq), (&block.k, &dk), (&block.v, &dv)], &n1, values);
        if let Some(own) = g.own() {
            add_up(&mut own[block.norm1.clone()], &dnorm);
        }
    }
    dx
}

/// Adds the parts of a gradient, in order.
fn add_up(sum: &mut [f32], parts: &[f32]) {
    for part in parts.chunks_exact(sum.len()) {
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
