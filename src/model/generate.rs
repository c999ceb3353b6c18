//! Sampling with a key/value cache: many sequences advance together, a prompt's rows are stored once and shared.
//!
//! A [`Cache`] is an array of keys and one of values per layer, which grow as sequences come and go on. A sequence owns a run of
//! rows and may see, before its own, the rows of one other sequence: the prompt of its group. Members may stop at different times and be continued later
//! with any number of tokens, images included (the closer view of a second turn). It hides where rows lie, and that weights are laid
//! out a second time where few rows meet them many times. What must stay true: the hidden state of a token is bit for bit that of a
//! packed pass over the same tokens with the same `shared`/`own` spans, because the kernels give each row the same bits however many
//! rows a call has.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, ensure};
use foveate_kernels::attention::{self, Keys, PANEL, Span};
use foveate_kernels::logprob;
use foveate_kernels::matrix::Compute;

use super::Vlm;
use super::block::{self, Laid, Params, Qkv};
use super::layout::{Affine, Block};
use super::text::{self, FeatureRun};

/// Names a sequence of one cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId(usize);

#[derive(Clone, Debug)]
struct Sequence {
    shared: Range<usize>,
    start: usize,
    len: usize,
    reserved: usize,
}

/// Keys and values of all sequences, made by one state of a model's weights.
pub struct Cache {
    /// Per layer `[rows / PANEL, Hkv, K, PANEL]`; every sequence starts with a panel.
    k: Vec<Vec<f32>>,
    /// Per layer `[rows, Hkv, K]`.
    v: Vec<Vec<f32>>,
    rows: usize,
    /// Values of one row: heads × width.
    width: usize,
    sequences: Vec<Sequence>,
    /// Shared by the caches of one state of the weights.
    laid: Option<Arc<Laid>>,
}

/// Values of the language model up to which its weights are laid out once more for decoding: 128 Mi f32 are 512 MiB.
pub const LAID_OUT: usize = 128 << 20;

/// Values up to which conversations are dealt out to the threads ([`Vlm::lanes`]): 8 Mi f32 are 32 MiB, which still lie in a last cache. Of a larger
/// model each thread would fetch all weights from memory for itself.
const OWN_WEIGHTS: usize = 8 << 20;

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Extension<'a> {
    pub sequence: SequenceId,
    /// `[n]`, at least one.
    pub ids: &'a [u32],
    /// Time, height, width, each `[n]`.
    pub positions: [&'a [i32]; 3],
    /// `[placeholders among ids, D]`, in order.
    pub features: &'a [f32],
}

impl Cache {
    /// An empty one; see `Memory::cache_bytes_per_row` for what a row costs.
    pub fn new(model: &Vlm) -> Cache {
        let text = &model.config.text;
        let layers = || vec![Vec::new(); text.layers];
        Cache {
            k: layers(),
            v: layers(),
            rows: 0,
            width: text.kv_heads * text.head_dim(),
            sequences: Vec::new(),
            laid: model.lay_out().map(Arc::new),
        }
    }

    /// An empty one for other sequences of the same weights.
    pub fn beside(&self) -> Cache {
        let layers = || vec![Vec::new(); self.k.len()];
        Cache { k: layers(), v: layers(), rows: 0, width: self.width, sequences: Vec::new(), laid: self.laid.clone() }
    }

    /// A sequence with room for `reserve` tokens of its own, after all tokens that `shared` holds now.
    pub fn add_sequence(&mut self, shared: Option<SequenceId>, reserve: usize) -> Result<SequenceId> {
        let shared = match shared {
            None => 0..0,
            Some(id) => {
                let prefix = &self.sequences[id.0];
                ensure!(prefix.shared.is_empty(), "a shared prompt cannot itself share another sequence's rows");
                prefix.start..prefix.start + prefix.len
            }
        };
        let reserved = reserve.next_multiple_of(PANEL);
        self.sequences.push(Sequence { shared, start: self.rows, len: 0, reserved });
        self.grow(reserved);
        Ok(SequenceId(self.sequences.len() - 1))
    }

    /// Makes room for `tokens` more of a sequence. Where others stand behind it, it moves to the end; a sequence that others share
    /// must not grow.
    pub fn make_room(&mut self, id: SequenceId, tokens: usize) {
        let Sequence { start, len, reserved, .. } = self.sequences[id.0];
        if reserved - len >= tokens {
            return;
        }
        let wanted = (len + tokens).next_multiple_of(PANEL);
        if start + reserved == self.rows {
            self.grow(wanted - reserved);
        } else {
            let to = self.rows;
            self.grow(wanted);
            // Whole panels, the last one with what lies behind its last key.
            let held = start..start + len.next_multiple_of(PANEL);
            let (from, to_value) = (held.start * self.width..held.end * self.width, to * self.width);
            for array in self.k.iter_mut().chain(&mut self.v) {
                array.copy_within(from.clone(), to_value);
            }
            self.sequences[id.0].start = to;
        }
        self.sequences[id.0].reserved = wanted;
    }

    fn grow(&mut self, rows: usize) {
        self.rows += rows;
        for array in self.k.iter_mut().chain(&mut self.v) {
            array.resize(self.rows * self.width, 0.0);
        }
    }

    /// Tokens a sequence sees: the shared ones and its own.
    pub fn len(&self, id: SequenceId) -> usize {
        let s = &self.sequences[id.0];
        s.shared.len() + s.len
    }

    /// Tokens a sequence can take without more room.
    pub fn room(&self, id: SequenceId) -> usize {
        let s = &self.sequences[id.0];
        s.reserved - s.len
    }
}

impl Vlm {
    /// Appends tokens to sequences and gives the final hidden state of each one's last new token, `[extensions, D]`.
    /// A prompt is one extension of many tokens; a decoding step is one token for each member still speaking.
    pub fn extend(&self, cache: &mut Cache, extensions: &[Extension]) -> Result<Vec<f32>> {
        let config = &self.config.text;
        let (d, dims) = (config.hidden, config.dims());
        let index = &self.weights.layout().text;
        let values = self.values();
        let mut ids = Vec::new();
        let mut axes = [const { Vec::new() }; 3];
        let mut features = Vec::new();
        let mut runs = Vec::new();
        let mut spans: Vec<Span> = Vec::with_capacity(extensions.len());
        let mut taken = vec![false; cache.sequences.len()];
        for e in extensions {
            let n = e.ids.len();
            let s = &cache.sequences[e.sequence.0];
            ensure!(!std::mem::replace(&mut taken[e.sequence.0], true), "a sequence stands twice among the extensions");
            ensure!(n > 0, "an extension without tokens");
            ensure!(n <= s.reserved - s.len, "{n} tokens for a sequence with room for {}", s.reserved - s.len);
            ensure!(e.positions.iter().all(|p| p.len() == n), "positions for another number of tokens than {n}");
            ensure!(
                e.ids.iter().all(|id| (*id as usize) < config.vocab),
                "a token id is outside the vocabulary of {}",
                config.vocab
            );
            if !e.features.is_empty() {
                let pads = ids.len();
                let pads = (0..n).filter(|i| e.ids[*i] == self.config.ids.image_pad).map(|i| pads + i);
                runs.extend(pads.map(|first_row| FeatureRun { first_row, rows: 1 }));
            }
            features.extend_from_slice(e.features);
            ensure!(
                features.len() == runs.len() * d,
                "{} feature values do not fit the image placeholders of the extension ({d} each)",
                e.features.len()
            );
            spans.push(Span {
                queries: ids.len()..ids.len() + n,
                shared: s.shared.clone(),
                own: s.start..s.start + s.len + n,
                causal: true,
            });
            ids.extend_from_slice(e.ids);
            axes.iter_mut().zip(e.positions).for_each(|(axis, p)| axis.extend_from_slice(p));
        }
        if extensions.is_empty() {
            return Ok(Vec::new());
        }

        let laid = cache.laid.clone();
        let params = Params::new(values, laid.as_deref());
        let table = config.rotation(axes.each_ref().map(Vec::as_slice));
        let mut x = text::inputs(index, values, &ids, &features, &runs, d);
        for (l, layer) in index.layers.iter().enumerate() {
            let Qkv { mut q, k, v } = block::project(layer, &dims, params, &x, &table);
            for span in &spans {
                let w = cache.width;
                let n = span.queries.len();
                let to = (span.own.end - n) * w..span.own.end * w;
                let from = span.queries.start * w..span.queries.end * w;
                attention::store_keys(&mut cache.k[l], span.own.end - n, &k[from.clone()], dims.attention());
                cache.v[l][to].copy_from_slice(&v[from]);
            }
            if l + 1 == index.layers.len() {
                // Only the last token of each extension goes on to the head; the others have left their keys.
                let last: Vec<usize> = spans.iter().map(|s| s.queries.end - 1).collect();
                q = block::pick(&q, &last, d);
                x = block::pick(&x, &last, d);
                spans.iter_mut().enumerate().for_each(|(i, s)| s.queries = i..i + 1);
            }
            let mut o = vec![0.0; q.len()];
            let mut lse = vec![0.0; q.len() / dims.k];
            let keys = Keys::Panels(&cache.k[l]);
            attention::forward(&mut o, &mut lse, &q, keys, &cache.v[l], &spans, dims.attention(), Compute::F32);
            x = block::finish(layer, &dims, params, &x, &o);
        }
        for e in extensions {
            cache.sequences[e.sequence.0].len += e.ids.len();
        }
        Ok(block::normed(&x, values.vector(&index.norm), dims.eps).0)
    }

    /// Logits of hidden states that [`Vlm::extend`] gave, banned ids at -inf.
    ///
    /// # Shapes
    /// hidden `[N, D]` -> `[N, V]`
    pub fn next_logits(&self, cache: &Cache, hidden: &[f32], banned: &[u32]) -> Vec<f32> {
        let (d, v) = (self.config.text.hidden, self.config.text.vocab);
        let laid = cache.laid.as_ref().and_then(|laid| laid.get(&self.weights.layout().text.head));
        logprob::logits(hidden, self.head(), laid, banned, d, v)
    }

    /// Over how many threads `conversations` are best dealt out, each with a cache of its own: a small model's threads that share every
    /// product of every token mostly wait for each other.
    pub fn lanes(&self, conversations: usize) -> usize {
        match self.text_values() <= OWN_WEIGHTS {
            true => rayon::current_num_threads().min(conversations).max(1),
            false => 1,
        }
    }

    /// Values of the language model's matrices, its head included.
    fn text_values(&self) -> usize {
        let index = &self.weights.layout().text;
        index.layers.iter().flat_map(Block::maps).map(|map| map.w.len()).sum::<usize>() + index.head.len()
    }

    /// The language model's weights as few rows like them, if they are not too many.
    fn lay_out(&self) -> Option<Laid> {
        let index = &self.weights.layout().text;
        let (d, v) = (self.config.text.hidden, self.config.text.vocab);
        let head = Affine { w: index.head.clone(), b: None, inputs: d, outputs: v, lora: None };
        let maps = || index.layers.iter().flat_map(Block::maps).chain([&head]);
        (self.text_values() <= LAID_OUT).then(|| Laid::new(maps(), self.values()))
    }
}
