//! The model on LibTorch: the same weights, names and packed rows as the embedded one (`model/`), with gradients from autograd.
//!
//! Parameters are one tensor for each entry of the [`Layout`]; the forward passes follow `model/vision.rs` and `model/text.rs` line by line, so
//! the CPU's results are a second opinion on the embedded engine's. It hides in what kinds numbers are held: what is trained is f32, products
//! take it as `compute` says, norms and the sums between blocks are f32.

use std::ops::Range;
use std::sync::Arc;

use foveate_kernels::rope::{self, Table};
use tch::{Device, Kind, Tensor};

use super::attention::Plan;
use super::no_grad;
use crate::geometry::Grid;
use crate::model::block::Dims;
use crate::model::config::VisionConfig;
use crate::model::layout::{Affine, Block, Entry, Layout};
use crate::model::vision::{coordinates, windows};
use crate::model::{Config, Packed, Trainable, Vlm};

struct Parameter {
    /// As it is written: f32 where it is trained, and then on autograd's graph.
    own: Tensor,
    /// As products take it, on no graph.
    used: Tensor,
    trained: bool,
}

pub struct Net {
    pub config: Config,
    pub layout: Arc<Layout>,
    pub device: Device,
    /// What products are computed in.
    kind: Kind,
    parameters: Vec<Parameter>,
}

/// Whether a tensor takes part in products; norms do not.
fn multiplies(entry: &Entry) -> bool {
    entry.shape.len() > 1 || entry.name.ends_with(".bias")
}

/// Cosines and sines of some rows, `[T, 1, K]`.
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

/// How the patches of some images stand to each other.
struct Sight {
    /// The merged token at each sorted place.
    order: Tensor,
    rotation: Rotation,
    /// Attention within windows, and over whole frames.
    plans: [Plan; 2],
}

/// A pass over packed rows, kept for its backward pass.
pub struct Pass {
    /// What went into the first layer, on a graph.
    first: Tensor,
    /// With recomputing: what went into each layer, and behind the last.
    inputs: Vec<Tensor>,
    /// Final hidden states of the asked rows, `[N, D]`: on a graph, or, with recomputing, of what went into the last norm.
    hidden: Tensor,
    rows: Tensor,
    rotation: Rotation,
    plan: Plan,
}

/// A head over final hidden states.
pub struct Head<'a> {
    pub temperature: f32,
    /// Ids that cannot be drawn.
    pub banned: &'a Tensor,
}

/// Logits of one chunk of rows at most: 64 Mi f32 are 256 MiB.
const LOGITS: i64 = 64 << 20;

impl Net {
    /// Puts a model's weights on a device. Where `train` is `None` nothing will be learned.
    pub fn new(model: &Vlm, device: Device, kind: Kind, train: Option<Trainable>) -> Net {
        let layout = model.weights.layout().clone();
        let values = model.weights.values();
        let parameter = |entry: &Entry| {
            let trained = train.is_some_and(|train| train.trains(entry));
            let used = if multiplies(entry) { kind } else { Kind::Float };
            let shape: Vec<i64> = entry.shape.iter().map(|&n| n as i64).collect();
            let numbers = values.matrix(&entry.range).wide();
            let held = Tensor::from_slice(&numbers).view(&shape[..]);
            if trained {
                let own = held.to_device(device).set_requires_grad(true);
                let used = no_grad(|| own.detach().to_kind(used));
                return Parameter { own, used, trained };
            }
            let rounded = held.to_kind(used);
            let exact = rounded.to_kind(Kind::Float).equal(&held);
            let used = rounded.to_device(device);
            // What would lose bits on the device stays as it is on the host, for checkpoints.
            Parameter { own: if exact { used.shallow_clone() } else { held }, used, trained }
        };
        let parameters = layout.entries.iter().map(parameter).collect();
        Net { config: model.config.clone(), layout, device, kind, parameters }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Which entry a range lies in.
    pub fn place(&self, range: &Range<usize>) -> usize {
        // Entries cover the layout without gaps, and what is asked for lies within one of them.
        self.layout.entries.partition_point(|entry| entry.range.end <= range.start)
    }

    /// A tensor, or some rows of one, as products take it.
    fn tensor(&self, range: &Range<usize>, grad: bool) -> Tensor {
        let i = self.place(range);
        let (entry, parameter) = (&self.layout.entries[i], &self.parameters[i]);
        let whole = match grad && parameter.trained {
            true => parameter.own.to_kind(parameter.used.kind()),
            false => parameter.used.shallow_clone(),
        };
        if *range == entry.range {
            return whole;
        }
        let row = entry.range.len() / entry.shape[0];
        whole.narrow(0, ((range.start - entry.range.start) / row) as i64, (range.len() / row) as i64)
    }

    /// The trained tensors: their places among the entries.
    pub fn trained(&self) -> impl Iterator<Item = usize> {
        (0..self.parameters.len()).filter(|&i| self.parameters[i].trained)
    }

    /// A tensor as it is held.
    pub fn own(&self, i: usize) -> &Tensor {
        &self.parameters[i].own
    }

    /// Writes a tensor, in place.
    pub fn write(&mut self, i: usize, change: impl FnOnce(&mut Tensor)) {
        let Parameter { own, used, .. } = &mut self.parameters[i];
        no_grad(|| {
            change(own);
            // Of one kind they are the same numbers.
            if used.kind() != own.kind() {
                used.copy_(own);
            }
        });
    }

    /// What products take of a trained tensor, on no graph.
    pub fn used(&self, i: usize) -> Tensor {
        self.parameters[i].used.shallow_clone()
    }

    /// Has products take something else, and gives what they took.
    pub fn use_instead(&mut self, i: usize, other: Tensor) -> Tensor {
        std::mem::replace(&mut self.parameters[i].used, other)
    }

    fn affine(&self, map: &Affine, x: &Tensor, grad: bool) -> Tensor {
        let get = |range: &Range<usize>| self.tensor(range, grad);
        let y = x.linear(&get(&map.w), map.b.as_ref().map(get));
        match &map.lora {
            Some(lora) => {
                let low = x.linear::<Tensor>(&get(&lora.a.w), None).linear::<Tensor>(&get(&lora.b.w), None);
                y + low * f64::from(lora.scale)
            }
            None => y,
        }
    }

    fn normed(&self, x: &Tensor, weight: &Range<usize>, eps: f32, grad: bool) -> Tensor {
        x.rms_norm([weight.len() as i64], Some(&self.tensor(weight, grad)), f64::from(eps))
    }

    fn rotation(&self, table: &Table) -> Rotation {
        let on_device =
            |numbers: &[f32]| Tensor::from_slice(numbers).view([-1, 1, table.k as i64]).to_device(self.device);
        Rotation { cos: on_device(&table.cos), sin: on_device(&table.sin) }
    }

    /// Queries, keys and values of some rows of a block, rotated: `[T, H, K]` and twice `[T, Hkv, K]`.
    pub fn project(&self, block: &Block, dims: &Dims, x: &Tensor, rotation: &Rotation, grad: bool) -> [Tensor; 3] {
        let x = self.normed(x, &block.norm1, dims.eps, grad).to_kind(self.kind);
        let heads = |map: &Affine| self.affine(map, &x, grad).view([x.size()[0], -1, dims.k as i64]);
        [rotation.of(&heads(&block.q)), rotation.of(&heads(&block.k)), heads(&block.v)]
    }

    /// The rest of a block, behind attention: x `[T, D]`, o `[T, H · K]` -> `[T, D]`.
    pub fn finish(&self, block: &Block, dims: &Dims, x: &Tensor, o: &Tensor, grad: bool) -> Tensor {
        let x = x + self.affine(&block.o, o, grad).to_kind(Kind::Float);
        let n = self.normed(&x, &block.norm2, dims.eps, grad).to_kind(self.kind);
        let active = self.affine(&block.gate, &n, grad).silu() * self.affine(&block.up, &n, grad);
        x + self.affine(&block.down, &active, grad).to_kind(Kind::Float)
    }

    fn block(&self, block: &Block, dims: &Dims, x: &Tensor, rotation: &Rotation, plan: &Plan, grad: bool) -> Tensor {
        let [q, k, v] = self.project(block, dims, x, rotation, grad);
        self.finish(block, dims, x, &plan.attend(&q, &k, &v), grad)
    }

    fn sight(&self, grids: &[Grid]) -> Sight {
        let config = &self.config.vision;
        let windows = windows(grids, config);
        let order: Vec<i64> = windows.order.iter().map(|&i| i as i64).collect();
        let places = coordinates(grids, &windows.order, config.merge);
        Sight {
            order: Tensor::from_slice(&order).to_device(self.device),
            rotation: self.rotation(&rope::vision2d(&places, config.dims().k, VisionConfig::THETA)),
            plans: [&windows.windows, &windows.frames].map(|spans| Plan::new(spans, self.device)),
        }
    }

    /// What goes into the tower's first block: patches, sorted by window.
    fn embedded(&self, patches: &[f32], sight: &Sight, grad: bool) -> Tensor {
        let config = &self.config.vision;
        let (unit, d) = ((config.merge * config.merge) as i64, config.hidden as i64);
        let patches = Tensor::from_slice(patches).view([-1, config.patch_values() as i64]).to_device(self.device);
        // A still picture is the same in every frame: the weights of the frames add up.
        let folded = self.tensor(&self.layout.vision.patch.w, grad).to_kind(Kind::Float);
        let folded = folded.sum_dim_intlist([2i64].as_slice(), false, Kind::Float).view([d, -1]).to_kind(self.kind);
        let x = patches.to_kind(self.kind).linear::<Tensor>(&folded, None).to_kind(Kind::Float);
        x.view([-1, unit, d]).index_select(0, &sight.order).view([-1, d])
    }

    fn tower_block(&self, i: usize, x: &Tensor, sight: &Sight, grad: bool) -> Tensor {
        let config = &self.config.vision;
        let plan = &sight.plans[usize::from(config.full_blocks.contains(&i))];
        self.block(&self.layout.vision.blocks[i], &config.dims(), x, &sight.rotation, plan, grad)
    }

    fn merged(&self, x: &Tensor, sight: &Sight, grad: bool) -> Tensor {
        let (config, index) = (&self.config.vision, &self.layout.vision);
        let wide = (config.merge * config.merge * config.hidden) as i64;
        let x = self.normed(x, &index.merger_norm, VisionConfig::EPS, grad).view([-1, wide]).to_kind(self.kind);
        let merged = self.affine(&index.merger_in, &x, grad).gelu("none");
        let features = self.affine(&index.merger_out, &merged, grad).to_kind(Kind::Float);
        features.index_select(0, &sight.order.argsort(0, false))
    }

    /// Features of some images, f32.
    ///
    /// # Shapes
    /// patches `[P, patch_values]` -> `[tokens, D]`
    pub fn look(&self, patches: &[f32], grids: &[Grid], grad: bool) -> Tensor {
        let sight = self.sight(grids);
        let blocks = 0..self.layout.vision.blocks.len();
        let first = self.embedded(patches, &sight, grad);
        let last = blocks.fold(first, |x, i| self.tower_block(i, &x, &sight, grad));
        self.merged(&last, &sight, grad)
    }

    /// Goes through the tower and back, with the gradient `slope` by its features; `recompute` as in [`Net::run`].
    pub fn look_back(&self, patches: &[f32], grids: &[Grid], slope: &Tensor, recompute: bool) {
        if !recompute {
            return go_back(&self.look(patches, grids, true), slope);
        }
        let sight = self.sight(grids);
        let first = self.embedded(patches, &sight, true);
        let mut inputs = Vec::new();
        let last = no_grad(|| {
            (0..self.layout.vision.blocks.len()).fold(first.detach(), |x, i| {
                let y = self.tower_block(i, &x, &sight, false);
                inputs.push(x);
                y
            })
        });
        let mut slope = again(&last, slope, &|x| self.merged(x, &sight, true));
        for (i, x) in inputs.into_iter().enumerate().rev() {
            slope = again(&x, &slope, &|x| self.tower_block(i, x, &sight, true));
        }
        go_back(&first, &slope);
    }

    /// What goes into the first layer: embeddings, and features `[n, D]` in some rows.
    pub fn inputs(&self, ids: &[u32], features: Option<(&[i64], &Tensor)>, grad: bool) -> Tensor {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let Parameter { own, used, trained } = &self.parameters[self.place(&self.layout.text.embed)];
        let table = if grad && *trained { own } else { used };
        let rows = table.index_select(0, &Tensor::from_slice(&ids).to_device(self.device));
        let x = rows.to_kind(used.kind()).to_kind(Kind::Float);
        match features {
            Some((rows, features)) => x.index_copy(0, &Tensor::from_slice(rows).to_device(self.device), features),
            None => x,
        }
    }

    pub fn turned(&self, positions: [&[i32]; 3]) -> Rotation {
        self.rotation(&self.config.text.rotation(positions))
    }

    /// The final norm: `[N, D]`, f32.
    pub fn last(&self, x: &Tensor, grad: bool) -> Tensor {
        self.normed(x, &self.layout.text.norm, self.config.text.eps, grad)
    }

    /// Runs packed rows, whose images have the features `[tokens, D]`, one after the other. With `grad` it can be gone back through; with
    /// `recompute` each layer is then computed a second time.
    pub fn run(&self, packed: &Packed, features: Option<&Tensor>, grad: bool, recompute: bool) -> Pass {
        let index = &self.layout.text;
        let dims = self.config.text.dims();
        let merge = self.config.vision.merge as u32;
        let rows_of = packed.images.iter().flat_map(|i| i.first_row..i.first_row + i.grid.tokens(merge));
        let rows: Vec<i64> = rows_of.map(|row| row as i64).collect();
        let rotation = self.turned(packed.positions.each_ref().map(Vec::as_slice));
        let plan = Plan::new(&packed.spans, self.device);
        let first = self.inputs(&packed.ids, features.map(|features| (&rows[..], features)), grad);
        let asked: Vec<i64> = packed.targets.iter().map(|t| t.row as i64).collect();
        let asked = Tensor::from_slice(&asked).to_device(self.device);
        let layers = |mut x: Tensor, grad: bool, inputs: &mut Vec<Tensor>| {
            for layer in &index.layers {
                let y = self.block(layer, &dims, &x, &rotation, &plan, grad);
                inputs.push(std::mem::replace(&mut x, y));
            }
            x
        };
        let mut inputs = Vec::new();
        let hidden = match recompute && grad {
            true => no_grad(|| {
                let last = layers(first.detach(), false, &mut inputs).index_select(0, &asked);
                let hidden = self.last(&last, false);
                inputs.push(last);
                hidden
            }),
            false => {
                let last = layers(first.shallow_clone(), grad, &mut Vec::new());
                self.last(&last.index_select(0, &asked), grad)
            }
        };
        Pass { first, inputs, hidden, rows: asked, rotation, plan }
    }

    /// Log-probs and entropies of the targets, `[N]` each, computed chunk by chunk.
    pub fn score(&self, pass: &Pass, targets: &[i64], head: &Head) -> (Vec<f32>, Vec<f32>) {
        let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
        no_grad(|| {
            for (from, n) in self.chunks(targets.len() as i64) {
                let tokens = Tensor::from_slice(&targets[from as usize..(from + n) as usize]).to_device(self.device);
                let (l, e) = self.said(&pass.hidden.narrow(0, from, n), &tokens, head, false);
                logprobs.extend(to_vec(&l));
                entropies.extend(to_vec(&e));
            }
        });
        (logprobs, entropies)
    }

    fn chunks(&self, rows: i64) -> impl Iterator<Item = (i64, i64)> {
        let most = (LOGITS / self.config.text.vocab as i64).max(1);
        (0..rows).step_by(most as usize).map(move |from| (from, most.min(rows - from)))
    }

    /// hidden `[N, D]` -> logits `[N, V]`, f32, the banned at -inf.
    pub fn logits(&self, hidden: &Tensor, banned: &Tensor, grad: bool) -> Tensor {
        let logits = hidden.to_kind(self.kind).linear::<Tensor>(&self.tensor(&self.layout.text.head, grad), None);
        logits.to_kind(Kind::Float).index_fill(1, banned, f64::NEG_INFINITY)
    }

    fn said(&self, hidden: &Tensor, tokens: &Tensor, head: &Head, grad: bool) -> (Tensor, Tensor) {
        let logits = self.logits(hidden, head.banned, grad) / f64::from(head.temperature);
        let all = logits.log_softmax(1, Kind::Float);
        let logprobs = all.gather(1, &tokens.unsqueeze(1), false).squeeze_dim(1);
        // What cannot be drawn adds 0 times minus infinity, which is 0 here.
        let entropies = -(all.exp() * all.clamp_min(-1e30)).sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        (logprobs, entropies)
    }

    /// Adds to the trained tensors the gradient of the weighted sum of log-probs and entropies (none where they are empty).
    pub fn backward(&self, pass: Pass, targets: &[i64], head: &Head, logprobs: &[f32], entropies: &[f32]) {
        let hidden = pass.hidden.detach();
        let mut slopes = Vec::new();
        for (from, n) in self.chunks(targets.len() as i64) {
            let part = from as usize..(from + n) as usize;
            let on_device = |numbers: &[f32]| Tensor::from_slice(numbers).to_device(self.device);
            let rows = hidden.narrow(0, from, n).copy().set_requires_grad(true);
            let tokens = Tensor::from_slice(&targets[part.clone()]).to_device(self.device);
            let (l, e) = self.said(&rows, &tokens, head, true);
            let mut loss = (l * on_device(&logprobs[part.clone()])).sum(Kind::Float);
            if !entropies.is_empty() {
                loss += (e * on_device(&entropies[part])).sum(Kind::Float);
            }
            loss.backward();
            slopes.push(rows.grad());
        }
        let mut slope = Tensor::cat(&slopes, 0);
        let Pass { first, mut inputs, hidden, rows, rotation, plan } = pass;
        let Some(last) = inputs.pop() else { return go_back(&hidden, &slope) };
        let at_rows = again(&last, &slope, &|x| self.last(x, true));
        slope = first.zeros_like().detach().index_add(0, &rows, &at_rows);
        let dims = self.config.text.dims();
        for layer in self.layout.text.layers.iter().rev() {
            let Some(x) = inputs.pop() else { break };
            slope = again(&x, &slope, &|x| self.block(layer, &dims, x, &rotation, &plan, true));
        }
        go_back(&first, &slope);
    }
}

impl Rotation {
    /// `[T, H, K]`, turned in f32.
    fn of(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let x = x.to_kind(Kind::Float);
        let half = x.size()[2] / 2;
        let crossed = Tensor::cat(&[-x.narrow(2, half, half), x.narrow(2, 0, half)], 2);
        (x * &self.cos + crossed * &self.sin).to_kind(kind)
    }
}

/// Computes a second time what came of `x`, now to go back from it: the gradient by `x`.
fn again(x: &Tensor, slope: &Tensor, compute: &dyn Fn(&Tensor) -> Tensor) -> Tensor {
    let x = x.detach().set_requires_grad(true);
    go_back(&compute(&x), slope);
    x.grad()
}

/// Goes back from `y`, whose gradient is `slope`; where nothing that is trained led to it there is nowhere to go.
pub fn go_back(y: &Tensor, slope: &Tensor) {
    if y.requires_grad() {
        (y * slope).sum(Kind::Float).backward();
    }
}

/// A tensor's numbers on the host.
pub fn to_vec(x: &Tensor) -> Vec<f32> {
    let x = x.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1]);
    let mut numbers = vec![0.0; x.numel()];
    let count = numbers.len();
    x.copy_data(&mut numbers, count);
    numbers
}
