//! Every intermediate of one forward pass in one file, to be held against transformers (`foveate trace`).
//!
//! It takes ids, grids and pixels that are already made and does nothing to them; rendering a conversation belongs to
//! `chat`. The names and types of the tensors are an interface: others read the file.

use std::borrow::Cow;
use std::path::Path;

use anyhow::Result;
use foveate_kernels::sample;
use safetensors::tensor::{Dtype, View};

use super::block::Keep;
use super::generate::{Cache, Extension};
use super::layout::Trainable;
use super::weights::in_place;
use super::{Head, Packed, Vlm, positions, vision};
use crate::geometry::Grid;

/// Named tensors of one pass, in the order they were computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    pub input_ids: Vec<u32>,
    /// Time, height, width, each `[T]`.
    pub position_ids: [Vec<i32>; 3],
    /// `[P, framed_values]`
    pub pixel_values: Vec<f32>,
    pub image_grid_thw: Vec<Grid>,
    /// `[tokens, D]`
    pub image_features: Vec<f32>,
    /// `[T, V]`
    pub logits: Vec<f32>,
    /// `[T]`, of token t given what came before; 0 at the first.
    pub logprobs: Vec<f32>,
    /// New tokens of greedy decoding.
    pub greedy_ids: Option<Vec<u32>>,
    framed_values: usize,
    hidden: usize,
    vocab: usize,
}

/// How far to decode greedily after the given tokens.
#[derive(Clone, Copy, Debug)]
pub struct Greedy<'a> {
    pub tokens: usize,
    /// Ids that end decoding; the id itself is kept.
    pub stop: &'a [u32],
}

/// Runs the model over one conversation.
///
/// # Shapes
/// ids `[T]`, patches `[P, patch_values]`
pub fn trace(model: &Vlm, ids: &[u32], grids: &[Grid], patches: Vec<f32>, greedy: Option<Greedy>) -> Result<Trace> {
    let config = &model.config;
    let placed = positions(ids, grids, config)?;
    let packed = Packed::single(ids, grids, patches, config)?.every_next_token();
    let hidden = model.hidden(&packed)?;
    let logits = model.logits(&hidden);
    let scored = model.evaluate(&packed, Head::PLAIN, Keep::Nothing, Trainable::ALL)?;
    let image_features = model.encode(&packed.patches, grids)?;
    let greedy_ids = greedy.map(|g| decode(model, ids, &placed, &image_features, g)).transpose()?;
    Ok(Trace {
        input_ids: ids.to_vec(),
        position_ids: placed.axes,
        pixel_values: vision::framed(&config.vision, &packed.patches),
        image_grid_thw: grids.to_vec(),
        image_features,
        logits,
        logprobs: if ids.is_empty() { Vec::new() } else { [&[0.0], &scored.logprobs[..]].concat() },
        greedy_ids,
        framed_values: config.vision.framed_values(),
        hidden: config.text.hidden,
        vocab: config.text.vocab,
    })
}

fn decode(
    model: &Vlm,
    ids: &[u32],
    placed: &positions::Positions,
    features: &[f32],
    greedy: Greedy,
) -> Result<Vec<u32>> {
    let mut cache = Cache::new(model);
    let sequence = cache.add_sequence(None, ids.len() + greedy.tokens)?;
    let prompt = Extension { sequence, ids, positions: placed.as_slices(), features };
    let mut hidden = model.extend(&mut cache, &[prompt])?;
    let mut new = Vec::new();
    while new.len() < greedy.tokens {
        let (token, _) = sample::greedy(&model.logits(&hidden));
        let position = [placed.next + new.len() as i32];
        new.push(token);
        if greedy.stop.contains(&token) || new.len() == greedy.tokens {
            break;
        }
        let step = Extension { sequence, ids: &[token], positions: [&position; 3], features: &[] };
        hidden = model.extend(&mut cache, &[step])?;
    }
    Ok(new)
}

struct Tensor<'a> {
    shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    F32(&'a [f32]),
    I64(Vec<i64>),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::F32(_) => Dtype::F32,
            Values::I64(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(match &self.values {
            Values::F32(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Values::I64(x) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
    }

    fn data_len(&self) -> usize {
        match &self.values {
            Values::F32(x) => 4 * x.len(),
            Values::I64(x) => 8 * x.len(),
        }
    }
}

impl Trace {
    /// Writes the tensors as one safetensors file.
    pub fn write(&self, path: &Path) -> Result<()> {
        let t = self.input_ids.len();
        let whole = |shape: &[usize], values: Vec<i64>| Tensor { shape: shape.to_vec(), values: Values::I64(values) };
        let real = |width: usize, values| Tensor { shape: rows(values, width), values: Values::F32(values) };
        let mut tensors = vec![
            ("input_ids", whole(&[t], self.input_ids.iter().map(|x| *x as i64).collect())),
            ("position_ids", whole(&[3, t], self.position_ids.iter().flatten().map(|x| *x as i64).collect())),
            ("pixel_values", real(self.framed_values, &self.pixel_values)),
            (
                "image_grid_thw",
                whole(
                    &[self.image_grid_thw.len(), 3],
                    self.image_grid_thw.iter().flat_map(|g| [g.t, g.h, g.w]).map(i64::from).collect(),
                ),
            ),
            ("image_features", real(self.hidden, &self.image_features)),
            ("logits", real(self.vocab, &self.logits)),
            ("logprobs", Tensor { shape: vec![t], values: Values::F32(&self.logprobs) }),
        ];
        if let Some(ids) = &self.greedy_ids {
            tensors.push(("greedy_ids", whole(&[ids.len()], ids.iter().map(|x| *x as i64).collect())));
        }
        in_place(path, |beside| {
            safetensors::serialize_to_file(tensors, None, beside).map_err(|e| anyhow::anyhow!("{e}"))
        })
    }
}

fn rows(values: &[f32], width: usize) -> Vec<usize> {
    vec![values.len() / width, width]
}
