//! One transformer block, forward and backward, used by the vision tower and the language model alike.
//!
//! `mid = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1)))`, `y = mid + down(silu(gate(n2)) * up(n2))`, with
//! `n1 = rmsnorm(x)`, `n2 = rmsnorm(mid)`. It hides what is kept for the backward pass: norms and the product of the MLP
//! are cheap and computed again, results of matrix products and of attention are kept ([`Tape`]), or, to save memory,
//! only the block's input ([`Kept::Input`]). Both give the same gradients bit for bit, because every kernel gives the
//! same bits for the same inputs.

use std::collections::HashMap;
use std::ops::Range;

use foveate_kernels::attention::{self, Span};
use foveate_kernels::rope::{self, Table};
use foveate_kernels::{linear, mlp, norm};

use super::layout::{Affine, Block};

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
    All(Box<Tape>),
}

/// Queries, keys and values of some rows, rotated.
pub struct Qkv {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The second half of a block.
pub struct Rest {
    pub y: Vec<f32>,
    mid: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

/// The arena of parameters, and some of its matrices laid out for few rows.
#[derive(Clone, Copy)]
pub struct Params<'a> {
    pub data: &'a [f32],
    pub laid: Option<&'a Laid>,
}

impl<'a> From<&'a [f32]> for Params<'a> {
    fn from(data: &'a [f32]) -> Params<'a> {
        Params { data, laid: None }
    }
}

impl<'a> From<&'a Vec<f32>> for Params<'a> {
    fn from(data: &'a Vec<f32>) -> Params<'a> {
        Params { data, laid: None }
    }
}

/// Matrices laid out once for products with few rows (`linear::Packed`), by the place of each in the arena.
pub struct Laid(HashMap<usize, linear::Packed>);

impl Laid {
    /// Rows from which on the plain product is as fast.
    pub const ROWS: usize = linear::FEW_ROWS;

    /// Of matrices `[outputs, inputs]`, given as place, inputs, outputs.
    pub fn new(maps: impl Iterator<Item = (Range<usize>, usize, usize)>, data: &[f32]) -> Laid {
        Laid(maps.map(|(w, inputs, outputs)| (w.start, linear::Packed::new(&data[w], inputs, outputs))).collect())
    }

    pub fn get(&self, place: &Range<usize>) -> Option<&linear::Packed> {
        self.0.get(&place.start)
    }
}

impl Affine {
    /// # Shapes
    /// x `[T, inputs]` -> `[T, outputs]`
    pub fn forward<'a>(&self, params: impl Into<Params<'a>>, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        self.run(&mut y, params.into(), x, false);
        y
    }

    /// The same, added to `y`.
    ///
    /// # Shapes
    /// x `[T, inputs]`, y `[T, outputs]`
    pub fn add_to<'a>(&self, y: &mut [f32], params: impl Into<Params<'a>>, x: &[f32]) {
        self.run(y, params.into(), x, true);
    }

    fn run(&self, y: &mut [f32], params: Params, x: &[f32], onto: bool) {
        let t = x.len() / self.inputs;
        let bias = self.b.clone().map(|b| &params.data[b]);
        match params.laid.filter(|_| t < Laid::ROWS).and_then(|laid| laid.get(&self.w)) {
            Some(packed) => packed.forward(y, x, bias, onto, t),
            None => linear::forward(y, x, &params.data[self.w.clone()], bias, onto, t, self.inputs, self.outputs),
        }
    }

    /// Writes (or adds, when `accumulate`) the gradient by the input.
    pub fn backward_input(&self, dx: &mut [f32], dy: &[f32], weights: &[f32], accumulate: bool) {
        let t = dy.len() / self.outputs;
        linear::backward_input(dx, dy, &weights[self.w.clone()], t, self.inputs, self.outputs, accumulate);
    }

    /// Adds the gradient by weight and bias to the arena `grads`.
    pub fn backward_weight(&self, grads: &mut [f32], dy: &[f32], x: &[f32]) {
        let t = dy.len() / self.outputs;
        match self.b.clone() {
            Some(b) => {
                let (head, tail) = grads.split_at_mut(b.start);
                let db = &mut tail[..b.len()];
                let dw = &mut head[self.w.clone()];
                linear::backward_weight(dw, Some(db), dy, x, t, self.inputs, self.outputs);
            }
            None => {
                let dw = &mut grads[self.w.clone()];
                linear::backward_weight(dw, None, dy, x, t, self.inputs, self.outputs);
            }
        }
    }
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
    weights: &[f32],
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
    norm::backward(dx, dw, dy, x, &weights[place.clone()], rstd, d, accumulate);
}

/// First half up to attention: norm, projections, rotation.
///
/// # Shapes
/// x `[T, D]`, table `[T, K]`
pub fn project<'a>(block: &Block, dims: &Dims, params: impl Into<Params<'a>>, x: &[f32], table: &Table) -> Qkv {
    let params = params.into();
    let (n1, _) = normed(x, &params.data[block.norm1.clone()], dims.eps);
    let mut q = block.q.forward(params, &n1);
    let mut k = block.k.forward(params, &n1);
    let v = block.v.forward(params, &n1);
    rope::apply(&mut q, table, dims.heads);
    rope::apply(&mut k, table, dims.kv_heads);
    Qkv { q, k, v }
}

/// From the attention's result to the block's: output projection, both residuals, MLP.
///
/// # Shapes
/// x `[T, D]`, o `[T, H, K]`
pub fn finish<'a>(block: &Block, dims: &Dims, params: impl Into<Params<'a>>, x: &[f32], o: &[f32]) -> Rest {
    let params = params.into();
    let mut mid = x.to_vec();
    block.o.add_to(&mut mid, params, o);
    let (n2, _) = normed(&mid, &params.data[block.norm2.clone()], dims.eps);
    let gate = block.gate.forward(params, &n2);
    let up = block.up.forward(params, &n2);
    let mut h = n2;
    h.resize(gate.len(), 0.0);
    mlp::swiglu_forward(&mut h, &gate, &up);
    let mut y = mid.clone();
    block.down.add_to(&mut y, params, &h);
    Rest { y, mid, gate, up }
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

fn forward_all(block: &Block, dims: &Dims, weights: &[f32], x: Vec<f32>, rows: Rows) -> (Vec<f32>, Tape) {
    let t = x.len() / dims.hidden;
    let Qkv { q, k, v } = project(block, dims, weights, &x, rows.table);
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![0.0; t * dims.heads];
    attention::forward(&mut o, &mut lse, &q, &k, &v, rows.spans, dims.attention());
    let Rest { y, mid, gate, up } = match rows.wanted {
        None => finish(block, dims, weights, &x, &o),
        Some(wanted) => {
            let (x, o) = (pick(&x, wanted, dims.hidden), pick(&o, wanted, dims.hidden));
            finish(block, dims, weights, &x, &o)
        }
    };
    (y, Tape { x, q, k, v, o, lse, mid, gate, up })
}

/// Runs a block over packed rows that attend within `spans`.
///
/// # Shapes
/// x `[T, D]` -> `[T, D]`, or `[N, D]` for the wanted rows
pub fn forward(
    block: &Block,
    dims: &Dims,
    weights: &[f32],
    x: Vec<f32>,
    rows: Rows,
    keep: Keep,
) -> (Vec<f32>, Option<Kept>) {
    let (y, tape) = forward_all(block, dims, weights, x, rows);
    let kept = match keep {
        Keep::Nothing => None,
        Keep::Inputs => Some(Kept::Input(tape.x)),
        Keep::Everything => Some(Kept::All(Box::new(tape))),
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
    weights: &[f32],
    mut dy: Vec<f32>,
    kept: Kept,
    rows: Rows,
    mut grads: Option<&mut [f32]>,
) -> Vec<f32> {
    let tape = match kept {
        Kept::All(tape) => *tape,
        Kept::Input(x) => forward_all(block, dims, weights, x, rows).1,
    };

    // MLP: y = mid + down(h)
    let mut h = vec![0.0; tape.gate.len()];
    if let Some(g) = grads.as_deref_mut() {
        mlp::swiglu_forward(&mut h, &tape.gate, &tape.up);
        block.down.backward_weight(g, &dy, &h);
    }
    let dh = &mut h;
    block.down.backward_input(dh, &dy, weights, false);
    let mut dgate = vec![0.0; tape.gate.len()];
    let mut dup = vec![0.0; tape.up.len()];
    mlp::swiglu_backward(&mut dgate, &mut dup, dh, &tape.gate, &tape.up);
    let (n2, rstd2) = normed(&tape.mid, &weights[block.norm2.clone()], dims.eps);
    if let Some(g) = grads.as_deref_mut() {
        block.gate.backward_weight(g, &dgate, &n2);
        block.up.backward_weight(g, &dup, &n2);
    }
    let mut dn = n2;
    block.gate.backward_input(&mut dn, &dgate, weights, false);
    block.up.backward_input(&mut dn, &dup, weights, true);
    normed_backward(&mut dy, grads.as_deref_mut(), &block.norm2, &dn, &tape.mid, weights, &rstd2, true);
    drop((h, dgate, dup));

    // Attention: mid = x + o(attention); dy is now the gradient by mid.
    let mut d_o = vec![0.0; dy.len()];
    block.o.backward_input(&mut d_o, &dy, weights, false);
    match rows.wanted {
        None => {
            if let Some(g) = grads.as_deref_mut() {
                block.o.backward_weight(g, &dy, &tape.o);
            }
        }
        Some(wanted) => {
            if let Some(g) = grads.as_deref_mut() {
                block.o.backward_weight(g, &dy, &pick(&tape.o, wanted, dims.hidden));
            }
            d_o = put_back(&d_o, wanted, dims.hidden, tape.o.len());
            dy = put_back(&dy, wanted, dims.hidden, tape.x.len());
        }
    }
    let mut dq = vec![0.0; tape.q.len()];
    let mut dk = vec![0.0; tape.k.len()];
    let mut dv = vec![0.0; tape.v.len()];
    attention::backward(
        &mut dq,
        &mut dk,
        &mut dv,
        &d_o,
        &tape.o,
        &tape.lse,
        &tape.q,
        &tape.k,
        &tape.v,
        rows.spans,
        dims.attention(),
    );
    rope::apply_backward(&mut dq, rows.table, dims.heads);
    rope::apply_backward(&mut dk, rows.table, dims.kv_heads);
    let (n1, rstd1) = normed(&tape.x, &weights[block.norm1.clone()], dims.eps);
    dn.resize(n1.len(), 0.0);
    if let Some(g) = grads.as_deref_mut() {
        block.q.backward_weight(g, &dq, &n1);
        block.k.backward_weight(g, &dk, &n1);
        block.v.backward_weight(g, &dv, &n1);
    }
    block.q.backward_input(&mut dn, &dq, weights, false);
    block.k.backward_input(&mut dn, &dk, weights, true);
    block.v.backward_input(&mut dn, &dv, weights, true);
    normed_backward(&mut dy, grads, &block.norm1, &dn, &tape.x, weights, &rstd1, true);
    dy
}
