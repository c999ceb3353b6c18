//! The language model over packed rows: token ids and image features in, final hidden states out, and back.
//!
//! Rows of many sequences lie one after the other; `spans` say which keys each row may see, `positions` where it stands
//! in its own conversation (three axes, M-RoPE). Nothing here knows about batches, padding or turns. What must stay true:
//! a row's result depends only on the rows its spans name, never on what else is in the call.
//!
//! Source: Qwen2.5 (arXiv:2412.15115): pre-norm, grouped queries with biases on q, k, v, SwiGLU.

use std::cell::Cell;

use foveate_kernels::attention::Span;
use foveate_kernels::matrix::Compute;
use foveate_kernels::rope::{self, Table};
use foveate_kernels::{embed, logprob};

use super::Target;
use super::block::{self, Dims, Grads, Keep, Kept, Rows};
use super::config::TextConfig;
use super::layout::{TextIndex, Trainable};
use super::values::Values;

/// A run of rows that hold image features instead of token embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureRun {
    pub first_row: usize,
    pub rows: usize,
}

/// Words that rows are asked for before some block, through the final norm and the model's own vocabulary: deep supervision (Lee et al.,
/// arXiv 1409.5185). What is asked at the end of the model only is often found out too late to be looked up by later rows.
#[derive(Clone, Copy, Debug)]
pub struct Early<'a> {
    /// The block whose input is asked.
    pub block: usize,
    pub asked: &'a [Target],
    /// By each log-prob: what the loss changes with it.
    pub slope: f32,
    /// The log-probs are added to this.
    pub said: &'a Cell<f64>,
}

impl Early<'_> {
    /// The gradient by the asked rows of `x`, `[N, D]`; that by the vocabulary is added to the arena.
    fn backward(
        &self,
        x: &[f32],
        values: Values,
        index: &TextIndex,
        eps: f32,
        train: Trainable,
        grads: &mut [f32],
    ) -> Vec<f32> {
        let (d, table) = (index.norm.len(), values.matrix(&index.head));
        let rows: Vec<f32> = self.asked.iter().flat_map(|t| &x[t.row * d..(t.row + 1) * d]).copied().collect();
        let tokens: Vec<u32> = self.asked.iter().map(|t| t.token).collect();
        let (hidden, rstd) = block::normed(&rows, values.vector(&index.norm), eps);
        let v = table.len() / d;
        let out = logprob::forward(&hidden, table, &tokens, 1.0, &[], d, v);
        self.said.set(self.said.get() + out.logprob.iter().map(|&l| f64::from(l)).sum::<f64>());
        let dtable = train.embeddings.then(|| &mut grads[index.head.clone()]);
        let mut dhidden = vec![0.0; hidden.len()];
        let slopes = vec![self.slope; tokens.len()];
        logprob::backward(&mut dhidden, dtable, &slopes, None, &out, &hidden, table, &tokens, 1.0, &[], d, v);
        let mut dx = vec![0.0; rows.len()];
        // The norm belongs to the end of the model; what is asked here does not move it.
        block::normed_backward(&mut dx, None, &index.norm, &dhidden, &rows, values, &rstd, false);
        dx
    }
}

/// What the backward pass needs.
pub struct TextTape {
    table: Table,
    layers: Vec<Kept>,
    /// Input of the final norm, `[T, D]` or `[N, D]` for the wanted rows.
    last: Vec<f32>,
}

impl TextConfig {
    pub(crate) fn dims(&self) -> Dims {
        Dims {
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            k: self.head_dim(),
            mlp: self.mlp,
            eps: self.eps,
        }
    }

    /// Rotation angles of some rows.
    pub(crate) fn rotation(&self, positions: [&[i32]; 3]) -> Table {
        rope::mrope(positions, self.head_dim(), self.theta, self.sections)
    }
}

/// Token embeddings, with image features in the rows of `runs`.
///
/// # Shapes
/// ids `[T]`, features `[sum of rows, D]` -> `[T, D]`
pub fn inputs(
    index: &TextIndex,
    values: Values,
    ids: &[u32],
    features: &[f32],
    runs: &[FeatureRun],
    d: usize,
) -> Vec<f32> {
    let mut x = vec![0.0; ids.len() * d];
    embed::forward(&mut x, values.matrix(&index.embed), ids, d);
    let mut from = 0;
    for run in runs {
        let n = run.rows * d;
        x[run.first_row * d..run.first_row * d + n].copy_from_slice(&features[from..from + n]);
        from += n;
    }
    x
}

/// Hidden states after the final norm, of the rows in `wanted` (ascending; all when `None`).
///
/// # Shapes
/// ids `[T]`, positions `3 × [T]`, features `[sum of rows, D]` -> `[T, D]`, or `[N, D]` for N wanted rows
#[allow(clippy::too_many_arguments)]
pub fn forward(
    config: &TextConfig,
    index: &TextIndex,
    values: Values,
    ids: &[u32],
    positions: [&[i32]; 3],
    spans: &[Span],
    features: &[f32],
    runs: &[FeatureRun],
    wanted: Option<&[usize]>,
    keep: Keep,
) -> (Vec<f32>, Option<TextTape>) {
    let dims = config.dims();
    let table = config.rotation(positions);
    let mut x = inputs(index, values, ids, features, runs, dims.hidden);
    let mut layers = Vec::new();
    for (i, layer) in index.layers.iter().enumerate() {
        let rows = Rows {
            table: &table,
            spans,
            wanted: wanted.filter(|_| i + 1 == index.layers.len()),
            attention: Compute::F32,
        };
        let (y, kept) = block::forward(layer, &dims, values, x, rows, keep);
        layers.extend(kept);
        x = y;
    }
    let (hidden, _) = block::normed(&x, values.vector(&index.norm), dims.eps);
    let tape = (keep != Keep::Nothing).then_some(TextTape { table, layers, last: x });
    (hidden, tape)
}

/// Backward of [`forward`], with the same `wanted`: adds to the arena `grads`, returns the gradient by the image features.
///
/// # Shapes
/// dhidden `[T, D]` or `[N, D]` -> `[sum of rows, D]` (empty when no part of the vision tower is trained)
#[allow(clippy::too_many_arguments)]
pub fn backward(
    config: &TextConfig,
    index: &TextIndex,
    values: Values,
    dhidden: &[f32],
    ids: &[u32],
    spans: &[Span],
    runs: &[FeatureRun],
    wanted: Option<&[usize]>,
    tape: TextTape,
    early: &[Early],
    train: Trainable,
    grads: &mut [f32],
) -> Vec<f32> {
    let dims = config.dims();
    let d = dims.hidden;
    let TextTape { table, mut layers, last } = tape;
    let (_, rstd) = block::normed(&last, values.vector(&index.norm), dims.eps);
    let mut dx = vec![0.0; last.len()];
    let norm = (train.text && !train.adapters).then_some(&mut *grads);
    block::normed_backward(&mut dx, norm, &index.norm, dhidden, &last, values, &rstd, false);
    drop(last);
    for (i, layer) in index.layers.iter().enumerate().rev() {
        let Some(kept) = layers.pop() else { break };
        let here = early.iter().filter(|early| early.block == i && !early.asked.is_empty());
        let asked: Vec<(&Early, Vec<f32>)> =
            here.map(|early| (early, early.backward(kept.input(), values, index, dims.eps, train, grads))).collect();
        let trained = Grads::of(grads, train.text, train);
        let rows = Rows {
            table: &table,
            spans,
            wanted: wanted.filter(|_| i + 1 == index.layers.len()),
            attention: Compute::F32,
        };
        dx = block::backward(layer, &dims, values, dx, kept, rows, trained);
        for (early, asked) in asked {
            for (target, drow) in early.asked.iter().zip(asked.chunks_exact(d)) {
                dx[target.row * d..(target.row + 1) * d].iter_mut().zip(drow).for_each(|(a, b)| *a += b);
            }
        }
    }
    let mut dfeatures = Vec::new();
    for run in runs {
        let rows = &mut dx[run.first_row * d..(run.first_row + run.rows) * d];
        if train.tower() {
            dfeatures.extend_from_slice(rows);
        }
        // The placeholder's own embedding was overwritten: nothing flows to it.
        rows.fill(0.0);
    }
    if train.embeddings {
        embed::backward(&mut grads[index.embed.clone()], &dx, ids, d);
    }
    dfeatures
}
