//! What a model costs in memory: bytes of its parameters, and bytes of a row or a patch on the way forward and back.
//!
//! The numbers follow what `block`, `text`, `vision` and `generate` keep; `engine/embedded/memory.rs` adds them up for a step.

use super::block::Keep;
use super::config::Config;
use super::layout::{Group, Layout, Trainable};

/// Sizes in bytes, all in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Memory {
    pub parameters: usize,
    pub trained: usize,
    /// Weights alone: sampling.
    pub weights_bytes: u64,
    /// Gradients of the whole arena, or of the adapters alone, and the two moments of AdamW of what is trained.
    pub training_bytes: u64,
    /// The language model's weights without its embeddings.
    pub text_bytes: u64,
    /// The head, a matrix `[V, D]`.
    pub head_bytes: u64,
    /// The largest block's weights.
    pub block_bytes: u64,
    /// Kept per packed row of a training pass, everything kept.
    pub tape_bytes_per_row: u64,
    /// Kept per packed row when each layer is computed again.
    pub recompute_bytes_per_row: u64,
    /// Beside what is kept: what one block's backward pass makes of a row.
    pub scratch_bytes_per_row: u64,
    /// Kept per patch of an image when the tower is trained, the patch itself included.
    pub tape_bytes_per_patch: u64,
    /// The same when each block is computed again.
    pub recompute_bytes_per_patch: u64,
    /// And when attention over the whole picture is not.
    pub attended_bytes_per_patch: u64,
    /// Beside what is kept: what one block's backward pass makes of a patch.
    pub scratch_bytes_per_patch: u64,
    /// The pixels of a patch.
    pub pixel_bytes_per_patch: u64,
    /// An image token's features.
    pub feature_bytes: u64,
    /// Key and value cache per token while sampling.
    pub cache_bytes_per_row: u64,
}

/// Width, key/value width, query heads and MLP width of a block.
struct Widths {
    hidden: usize,
    kv: usize,
    heads: usize,
    mlp: usize,
}

impl Widths {
    /// What `block::Tape` holds of a row: x, q, o, mid; k, v; lse; gate, up.
    fn tape(&self) -> u64 {
        4 * (4 * self.hidden + 2 * self.kv + self.heads + 2 * self.mlp) as u64
    }

    /// What `block::backward` makes of a row: the MLP's product, and dy, dmid, d_o, n2.
    fn scratch(&self) -> u64 {
        4 * (self.mlp + 4 * self.hidden) as u64
    }
}

/// Memory of a configuration in a layout of it, with adapters or without.
pub fn memory(config: &Config, layout: &Layout, train: Trainable) -> Memory {
    let trained: usize = layout.entries.iter().filter(|e| train.trains(e)).map(|e| e.range.len()).sum();
    // The gradients of a frozen base are never touched, so the system gives them no pages.
    let gradients = if train.adapters { trained } else { layout.len };
    let (t, v) = (&config.text, &config.vision);
    let text = Widths { hidden: t.hidden, kv: t.kv_heads * t.head_dim(), heads: t.heads, mlp: t.mlp };
    let vision = Widths { hidden: v.hidden, kv: v.hidden, heads: v.heads, mlp: v.mlp };
    let pixels = 4 * v.patch_values() as u64;
    // The patch, its angles, and the merger's two inputs.
    let beside = pixels + 4 * (2 * v.head_dim() + 2 * v.hidden) as u64;
    let text_block = layout.count(Group::Text) / t.layers.max(1);
    let vision_block = layout.count(Group::Vision) / v.depth.max(1);
    Memory {
        parameters: layout.len,
        trained,
        weights_bytes: 4 * layout.len as u64,
        training_bytes: 4 * gradients as u64 + 8 * trained as u64,
        text_bytes: 4 * layout.count(Group::Text) as u64,
        head_bytes: 4 * (t.vocab * t.hidden) as u64,
        block_bytes: 4 * text_block.max(vision_block) as u64,
        tape_bytes_per_row: t.layers as u64 * text.tape(),
        recompute_bytes_per_row: 4 * (t.layers * t.hidden) as u64 + text.tape(),
        scratch_bytes_per_row: text.scratch(),
        tape_bytes_per_patch: beside + v.depth as u64 * vision.tape(),
        recompute_bytes_per_patch: beside + 4 * (v.depth * v.hidden) as u64,
        attended_bytes_per_patch: beside + 4 * (v.depth * v.hidden + v.full_blocks.len() * (v.hidden + v.heads)) as u64,
        scratch_bytes_per_patch: vision.scratch(),
        pixel_bytes_per_patch: pixels,
        feature_bytes: 4 * t.hidden as u64,
        cache_bytes_per_row: 8 * (t.layers * text.kv) as u64,
    }
}

impl Memory {
    /// Kept of a patch for the tower's backward pass.
    pub fn of_patch(&self, keep: Keep) -> u64 {
        match keep {
            Keep::Nothing => 0,
            Keep::Inputs => self.recompute_bytes_per_patch,
            Keep::Attended => self.attended_bytes_per_patch,
            Keep::Everything => self.tape_bytes_per_patch,
        }
    }
}
