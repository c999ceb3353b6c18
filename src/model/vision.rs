//! The vision tower of Qwen2.5-VL: patches in, one feature per merged token out.
//!
//! Patch embedding, blocks whose attention is confined to windows of 112 pixels except in a few blocks that see the whole
//! image, then the merger (norm, four neighbours side by side, two-layer GELU MLP to the language model's width). The rows
//! are sorted by window once at the start and put back at the end; everything between works on sorted rows. What must stay
//! true: attention never crosses an image, so several images in one call give what each gives alone.
//!
//! Source: Qwen2.5-VL technical report (arXiv:2502.13923) section 2.1; the order of windows follows transformers'
//! `get_vision_window_index`.

use foveate_kernels::attention::Span;
use foveate_kernels::matrix::Matrix;
use foveate_kernels::rope::{self, Table};
use foveate_kernels::{linear, mlp};

use super::block::{self, Dims, Grads, Keep, Kept, Rows};
use super::config::VisionConfig;
use super::layout::{Trainable, VisionIndex};
use super::values::Values;
use crate::geometry::Grid;

/// How the rows of some images are sorted by window, and who sees whom.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// `order[i]` is the merged token, in reading order over all images, at sorted place `i`.
    pub order: Vec<usize>,
    /// Patch rows of each window, in sorted order.
    pub windows: Vec<Span>,
    /// Patch rows of each frame of each image.
    pub frames: Vec<Span>,
}

fn whole(rows: std::ops::Range<usize>) -> Span {
    Span { queries: rows.clone(), shared: 0..0, own: rows, causal: false }
}

/// Sorts merged tokens by window: images, frames, windows in reading order, tokens within a window in reading order.
/// Windows at the right and lower edge are smaller. transformers pads each side by a full window when it divides, and
/// drops the empty windows again; no window is empty here to begin with.
pub fn windows(grids: &[Grid], config: &VisionConfig) -> Windows {
    let side = config.window / config.merge / config.patch;
    let unit = config.merge * config.merge;
    let mut order = Vec::new();
    let (mut windows, mut frames) = (Vec::new(), Vec::new());
    let mut base = 0;
    for grid in grids {
        let (h, w) = (grid.h as usize / config.merge, grid.w as usize / config.merge);
        for _ in 0..grid.t {
            for top in (0..h).step_by(side) {
                for left in (0..w).step_by(side) {
                    let start = order.len();
                    for y in top..(top + side).min(h) {
                        order.extend((left..(left + side).min(w)).map(|x| base + y * w + x));
                    }
                    windows.push(whole(start * unit..order.len() * unit));
                }
            }
            frames.push(whole(base * unit..(base + h * w) * unit));
            base += h * w;
        }
    }
    Windows { order, windows, frames }
}

/// Row and column of every patch, in sorted order. The four patches of a merged token stay neighbours.
pub(crate) fn coordinates(grids: &[Grid], order: &[usize], merge: usize) -> Vec<(u32, u32)> {
    let m = merge as u32;
    let mut tokens = Vec::with_capacity(order.len());
    for grid in grids {
        for _ in 0..grid.t {
            for y in 0..grid.h / m {
                tokens.extend((0..grid.w / m).map(|x| (y * m, x * m)));
            }
        }
    }
    let within = |(y, x): (u32, u32)| (0..m * m).map(move |i| (y + i / m, x + i % m));
    order.iter().flat_map(|&i| within(tokens[i])).collect()
}

/// Moves chunks of `width` values: chunk `i` of the result is chunk `order[i]` of `x`.
fn sorted(x: &[f32], order: &[usize], width: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for &i in order {
        y.extend_from_slice(&x[i * width..(i + 1) * width]);
    }
    y
}

/// Inverse of [`sorted`].
fn unsorted(x: &[f32], order: &[usize], width: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (chunk, &i) in x.chunks_exact(width).zip(order) {
        y[i * width..(i + 1) * width].copy_from_slice(chunk);
    }
    y
}

/// What the backward pass needs.
pub struct VisionTape {
    windows: Windows,
    table: Table,
    blocks: Vec<Kept>,
    /// Input of the merger's norm, `[P, D]`.
    last: Vec<f32>,
    /// Result of the merger's first map, `[tokens, 4D]`.
    merged: Vec<f32>,
}

impl VisionConfig {
    pub(crate) fn dims(&self) -> Dims {
        Dims {
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.heads,
            k: self.head_dim(),
            mlp: self.mlp,
            eps: VisionConfig::EPS,
        }
    }
}

/// Features of some images.
///
/// # Shapes
/// patches `[P, patch_values]`, in the processor's order (frames, then merged tokens in reading order, then the patches
/// of a token) -> features `[tokens, out_hidden]` in reading order, images one after the other
pub fn forward(
    config: &VisionConfig,
    index: &VisionIndex,
    values: Values,
    patches: &[f32],
    grids: &[Grid],
    keep: Keep,
) -> (Vec<f32>, Option<VisionTape>) {
    let dims = config.dims();
    let (unit, rows) = (config.merge * config.merge, patches.len() / config.patch_values());
    let windows = windows(grids, config);
    let table = rope::vision2d(&coordinates(grids, &windows.order, config.merge), dims.k, VisionConfig::THETA);

    let mut embedded = vec![0.0; rows * dims.hidden];
    let folded = folded(config, values.vector(&index.patch.w));
    let folded = Matrix::from(&folded).computed(values.compute);
    linear::forward(&mut embedded, patches, folded, None, false, rows, config.patch_values(), dims.hidden);
    let mut x = sorted(&embedded, &windows.order, unit * dims.hidden);
    drop(embedded);
    let mut blocks = Vec::new();
    for (i, b) in index.blocks.iter().enumerate() {
        let full = config.full_blocks.contains(&i);
        let spans = if full { &windows.frames } else { &windows.windows };
        // Attention within a window costs less than the products around it.
        let keep = if keep == Keep::Attended && !full { Keep::Inputs } else { keep };
        let (y, kept) = block::forward(
            b,
            &dims,
            values,
            x,
            Rows { table: &table, spans, wanted: None, attention: values.compute },
            keep,
        );
        blocks.extend(kept);
        x = y;
    }
    let (normed, _) = block::normed(&x, values.vector(&index.merger_norm), dims.eps);
    let merged = index.merger_in.forward(values, &normed);
    let mut active = normed;
    mlp::gelu_forward(&mut active, &merged);
    let features = index.merger_out.forward(values, &active);
    let features = unsorted(&features, &windows.order, config.out_hidden);
    let tape = (keep != Keep::Nothing).then_some(VisionTape { windows, table, blocks, last: x, merged });
    (features, tape)
}

/// Adds the gradients of the tower's trained parameters to the arena `grads`.
///
/// # Shapes
/// dfeatures `[tokens, out_hidden]`, patches as in [`forward`]
#[allow(clippy::too_many_arguments)]
pub fn backward(
    config: &VisionConfig,
    index: &VisionIndex,
    values: Values,
    dfeatures: &[f32],
    patches: &[f32],
    tape: VisionTape,
    train: Trainable,
    grads: &mut [f32],
) {
    if !train.tower() {
        return;
    }
    let dims = config.dims();
    let unit = config.merge * config.merge;
    let VisionTape { windows, table, mut blocks, last, merged } = tape;

    let dy = sorted(dfeatures, &windows.order, config.out_hidden);
    let (normed, rstd) = block::normed(&last, values.vector(&index.merger_norm), dims.eps);
    let mut active = vec![0.0; merged.len()];
    let mut merger = Grads::of(grads, train.merger, train);
    if let Some(merger) = &mut merger {
        mlp::gelu_forward(&mut active, &merged);
        merger.add(&[(&index.merger_out, &dy)], &active, values);
    }
    let dactive = &mut active;
    index.merger_out.backward_input(dactive, &dy, values, false);
    let mut dmerged = vec![0.0; merged.len()];
    mlp::gelu_backward(&mut dmerged, dactive, &merged);
    if let Some(merger) = &mut merger {
        merger.add(&[(&index.merger_in, &dmerged)], &normed, values);
    }
    let mut dnormed = normed;
    index.merger_in.backward_input(&mut dnormed, &dmerged, values, false);
    let mut dx = vec![0.0; last.len()];
    let own = merger.as_mut().and_then(Grads::own);
    block::normed_backward(&mut dx, own, &index.merger_norm, &dnormed, &last, values, &rstd, false);
    drop((dnormed, dmerged, active, last));
    if !train.vision {
        return;
    }
    for (i, b) in index.blocks.iter().enumerate().rev() {
        let Some(kept) = blocks.pop() else { return };
        let spans = if config.full_blocks.contains(&i) { &windows.frames } else { &windows.windows };
        let rows = Rows { table: &table, spans, wanted: None, attention: values.compute };
        dx = block::backward(b, &dims, values, dx, kept, rows, Grads::of(grads, true, train));
    }
    if train.adapters {
        return;
    }
    let dembedded = unsorted(&dx, &windows.order, unit * dims.hidden);
    let (inputs, rows) = (config.patch_values(), patches.len() / config.patch_values());
    let mut dfolded = vec![0.0; config.hidden * inputs];
    linear::backward_weight(&mut dfolded, None, &dembedded, patches, rows, inputs, config.hidden, values.compute);
    let square = config.patch * config.patch;
    let framed = grads[index.patch.w.clone()].chunks_exact_mut(config.temporal_patch * square);
    for (frames, dfolded) in framed.zip(dfolded.chunks_exact(square)) {
        frames.chunks_exact_mut(square).for_each(|dw| dw.iter_mut().zip(dfolded).for_each(|(dw, d)| *dw += d));
    }
}

/// The weights of the patch embedding for pictures that are the same in every frame: summed over the frames.
///
/// # Shapes
/// w `[D, channels, frames, side, side]` -> `[D, patch_values]`
fn folded(config: &VisionConfig, w: &[f32]) -> Vec<f32> {
    let square = config.patch * config.patch;
    let mut sum = vec![0.0; config.hidden * config.patch_values()];
    for (sum, frames) in sum.chunks_exact_mut(square).zip(w.chunks_exact(config.temporal_patch * square)) {
        frames.chunks_exact(square).for_each(|w| sum.iter_mut().zip(w).for_each(|(sum, w)| *sum += w));
    }
    sum
}

/// Patches as transformers has them, every frame written out.
///
/// # Shapes
/// `[P, patch_values]` -> `[P, framed_values]`
pub fn framed(config: &VisionConfig, patches: &[f32]) -> Vec<f32> {
    let channels = patches.chunks_exact(config.patch * config.patch);
    channels.flat_map(|channel| std::iter::repeat_n(channel, config.temporal_patch)).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::super::presets;
    use super::*;

    fn small_windows() -> VisionConfig {
        VisionConfig { window: 56, ..presets::nano(100).vision } // two merged tokens a side
    }

    /// 3 x 3 tokens, windows of 2 x 2: the right and lower windows are cut off.
    #[test]
    fn windows_that_do_not_divide() {
        let w = windows(&[Grid { t: 1, h: 6, w: 6 }], &small_windows());
        assert_eq!(w.order, [0, 1, 3, 4, 2, 5, 6, 7, 8]);
        let ends: Vec<usize> = w.windows.iter().map(|s| s.own.end).collect();
        assert_eq!(ends, [16, 24, 32, 36]);
        assert_eq!(w.frames, [whole(0..36)]);
    }

    /// 2 x 4 tokens divide exactly: two full windows, no empty ones; then a second image, numbered on.
    #[test]
    fn windows_that_divide_and_a_second_image() {
        let w = windows(&[Grid { t: 1, h: 4, w: 8 }, Grid { t: 1, h: 2, w: 2 }], &small_windows());
        assert_eq!(w.order, [0, 1, 4, 5, 2, 3, 6, 7, 8]);
        let ends: Vec<usize> = w.windows.iter().map(|s| s.own.end).collect();
        assert_eq!(ends, [16, 32, 36]);
        assert_eq!(w.frames, [whole(0..32), whole(32..36)]);
    }

    #[test]
    fn patches_of_a_token_are_neighbours() {
        let c = coordinates(&[Grid { t: 1, h: 2, w: 4 }], &[1, 0], 2);
        assert_eq!(c, [(0, 2), (0, 3), (1, 2), (1, 3), (0, 0), (0, 1), (1, 0), (1, 1)]);
    }
}
