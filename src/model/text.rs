//! The language model over packed rows: token ids and image features in, final hidden states out, and back.
//!
//! Rows of many sequences lie one after the other; `spans` say which keys each row may see, `positions` where it stands
//! in its own conversation (three axes, M-RoPE). Nothing here knows about batches, padding or turns. What must stay true:
//! a row's result depends only on the rows its spans name, never on what else is in the call.
//!
//! Source: Qwen2.5 (arXiv:2412.15115): pre-norm, grouped queries with biases on q, k, v, SwiGLU.

use foveate_kernels::attention::Span;
use foveate_kernels::embed;
use foveate_kernels::rope::{self, Table};

use super::block::{self, Dims, Keep, Kept, Rows};
use super::config::TextConfig;
use super::layout::{TextIndex, Trainable};

/// A run of rows that hold image features instead of token embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureRun {
    pub first_row: usize,
    pub rows: usize,
}

/// What the backward pass needs.
pub struct TextTape {
    table: Table,
    layers: Vec<Kept>,
    /// Input of the final norm, `[T, D]` or `[N, D]` for the wanted rows.
    last: Vec<f32>,
}

impl TextConfig {
    pub(super) fn dims(&self) -> Dims {
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
    pub(super) fn rotation(&self, positions: [&[i32]; 3]) -> Table {
        rope::mrope(positions, self.head_dim(), self.theta, self.sections)
    }
}

/// Token embeddings, with image features in the rows of `runs`.
///
/// # Shapes
/// ids `[T]`, features `[sum of rows, D]` -> `[T, D]`
pub fn inputs(
    index: &TextIndex,
    weights: &[f32],
    ids: &[u32],
    features: &[f32],
    runs: &[FeatureRun],
    d: usize,
) -> Vec<f32> {
    let mut x = vec![0.0; ids.len() * d];
    embed::forward(&mut x, &weights[index.embed.clone()], ids, d);
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
    weights: &[f32],
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
    let mut x = inputs(index, weights, ids, features, runs, dims.hidden);
    let mut layers = Vec::new();
    for (i, layer) in index.layers.iter().enumerate() {
        let rows = Rows { table: &table, spans, wanted: wanted.filter(|_| i + 1 == index.layers.len()) };
        let (y, kept) = block::forward(layer, &dims, weights, x, rows, keep);
        layers.extend(kept);
        x = y;
    }
    let (hidden, _) = block::normed(&x, &weights[index.norm.clone()], dims.eps);
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
    weights: &[f32],
    dhidden: &[f32],
    ids: &[u32],
    spans: &[Span],
    runs: &[FeatureRun],
    wanted: Option<&[usize]>,
    tape: TextTape,
    train: Trainable,
    grads: &mut [f32],
) -> Vec<f32> {
    let dims = config.dims();
    let d = dims.hidden;
    let TextTape { table, mut layers, last } = tape;
    let (_, rstd) = block::normed(&last, &weights[index.norm.clone()], dims.eps);
    let mut dx = vec![0.0; last.len()];
    let norm = train.text.then_some(&mut *grads);
    block::normed_backward(&mut dx, norm, &index.norm, dhidden, &last, weights, &rstd, false);
    drop(last);
    for (i, layer) in index.layers.iter().enumerate().rev() {
        let Some(kept) = layers.pop() else { break };
        let trained = train.text.then_some(&mut *grads);
        let rows = Rows { table: &table, spans, wanted: wanted.filter(|_| i + 1 == index.layers.len()) };
        dx = block::backward(layer, &dims, weights, dx, kept, rows, trained);
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
