//! Where each parameter lies in the one flat array that holds them all.
//!
//! A model is a single `Vec<f32>`; a [`Layout`] says which stretch of it is which Hugging Face tensor. Gradients and
//! optimiser moments are further arrays of the same layout, so an optimiser is one loop and a checkpoint is one walk.
//! The typed indices ([`Block`], [`VisionIndex`], [`TextIndex`]) hide names from the computation: nothing in the hot
//! path looks a tensor up by string. The matrices of an adapter (`lora`) lie behind the model's own. What must stay true: entries
//! follow each other without a gap and cover the whole array, and a bias lies after its weight.

use std::ops::Range;
use std::sync::Arc;

use super::config::Config;

/// The parts of a model that can be trained or frozen on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Patch embedding and vision blocks.
    Vision,
    /// The two-layer projection from vision to language width.
    Merger,
    /// Token embeddings, and the output head (the same tensor when tied).
    Embeddings,
    /// Decoder layers and the final norm.
    Text,
}

/// Which groups get gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trainable {
    pub vision: bool,
    pub merger: bool,
    pub embeddings: bool,
    pub text: bool,
    /// In these groups only the adapters learn, and the model's own weights stay as they are.
    pub adapters: bool,
}

impl Trainable {
    pub const ALL: Trainable = Trainable { vision: true, merger: true, embeddings: true, text: true, adapters: false };

    pub fn has(&self, group: Group) -> bool {
        match group {
            Group::Vision => self.vision,
            Group::Merger => self.merger,
            Group::Embeddings => self.embeddings,
            Group::Text => self.text,
        }
    }

    /// Whether a tensor is trained.
    pub fn trains(&self, entry: &Entry) -> bool {
        self.has(entry.group) && entry.adapter == self.adapters
    }

    /// Whether any gradient has to flow back into the image features.
    pub fn tower(&self) -> bool {
        self.vision || self.merger
    }
}

/// One named tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The published name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
    pub group: Group,
    /// One of the matrices of an adapter, beside the model's own tensors.
    pub adapter: bool,
}

/// A linear map `y = x · wᵀ + b`, as ranges into the arena; `w` is `[outputs, inputs]`.
#[derive(Clone, Debug)]
pub struct Affine {
    pub w: Range<usize>,
    pub b: Option<Range<usize>>,
    pub inputs: usize,
    pub outputs: usize,
    pub lora: Option<Box<Lora>>,
}

/// What an adapter adds to a map of M inputs and N outputs: `y += scale · x · aᵀ · bᵀ`, with a `[R, M]` and b `[N, R]`
/// (LoRA, arXiv 2106.09685, section 4.1).
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Affine,
    pub b: Affine,
    pub scale: f32,
}

/// One transformer block; vision and text blocks are the same computation with other sizes.
#[derive(Clone, Debug)]
pub struct Block {
    pub norm1: Range<usize>,
    pub q: Affine,
    pub k: Affine,
    pub v: Affine,
    pub o: Affine,
    pub norm2: Range<usize>,
    pub gate: Affine,
    pub up: Affine,
    pub down: Affine,
}

#[derive(Clone, Debug)]
pub struct VisionIndex {
    pub patch: Affine,
    pub blocks: Vec<Block>,
    pub merger_norm: Range<usize>,
    pub merger_in: Affine,
    pub merger_out: Affine,
}

#[derive(Clone, Debug)]
pub struct TextIndex {
    pub embed: Range<usize>,
    pub layers: Vec<Block>,
    pub norm: Range<usize>,
    /// Output head `[V, D]`; the embedding's own range when tied.
    pub head: Range<usize>,
}

/// A map that gets an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Module {
    /// The published name, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    pub rank: usize,
    pub scale: f32,
}

/// The parts of an adapter's names.
pub const LORA_A: &str = "lora_A";
pub const LORA_B: &str = "lora_B";

/// Names, shapes and places of all parameters of one configuration.
#[derive(Clone, Debug)]
pub struct Layout {
    pub entries: Vec<Entry>,
    pub len: usize,
    pub vision: VisionIndex,
    pub text: TextIndex,
}

struct Builder {
    entries: Vec<Entry>,
    len: usize,
}

impl Builder {
    fn tensor(&mut self, name: String, shape: &[usize], group: Group) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.entries.push(Entry { name, shape: shape.to_vec(), range: range.clone(), group, adapter: false });
        range
    }

    fn affine(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool, group: Group) -> Affine {
        let w = self.tensor(format!("{name}.weight"), &[outputs, inputs], group);
        let b = bias.then(|| self.tensor(format!("{name}.bias"), &[outputs], group));
        Affine { w, b, inputs, outputs, lora: None }
    }
}

/// Rows `from..from + outputs` of a fused map, as a map of its own.
fn rows(fused: &Affine, from: usize, outputs: usize) -> Affine {
    let w = fused.w.start + from * fused.inputs;
    Affine {
        w: w..w + outputs * fused.inputs,
        b: fused.b.as_ref().map(|b| b.start + from..b.start + from + outputs),
        inputs: fused.inputs,
        outputs,
        lora: None,
    }
}

impl Layout {
    /// Lays out a model: embeddings, decoder layers, final norm, head when untied, vision tower, merger.
    pub fn new(config: &Config) -> Arc<Layout> {
        let (text, vision) = (&config.text, &config.vision);
        let mut b = Builder { entries: Vec::new(), len: 0 };
        let g = Group::Text;
        let d = text.hidden;
        let embed = b.tensor("model.embed_tokens.weight".into(), &[text.vocab, d], Group::Embeddings);
        let kv = text.kv_heads * text.head_dim();
        let layers = (0..text.layers)
            .map(|i| {
                let p = format!("model.layers.{i}");
                Block {
                    norm1: b.tensor(format!("{p}.input_layernorm.weight"), &[d], g),
                    q: b.affine(&format!("{p}.self_attn.q_proj"), d, d, true, g),
                    k: b.affine(&format!("{p}.self_attn.k_proj"), kv, d, true, g),
                    v: b.affine(&format!("{p}.self_attn.v_proj"), kv, d, true, g),
                    o: b.affine(&format!("{p}.self_attn.o_proj"), d, d, false, g),
                    norm2: b.tensor(format!("{p}.post_attention_layernorm.weight"), &[d], g),
                    gate: b.affine(&format!("{p}.mlp.gate_proj"), text.mlp, d, false, g),
                    up: b.affine(&format!("{p}.mlp.up_proj"), text.mlp, d, false, g),
                    down: b.affine(&format!("{p}.mlp.down_proj"), d, text.mlp, false, g),
                }
            })
            .collect();
        let norm = b.tensor("model.norm.weight".into(), &[d], g);
        let head = if text.tied {
            embed.clone()
        } else {
            b.tensor("lm_head.weight".into(), &[text.vocab, d], Group::Embeddings)
        };

        let g = Group::Vision;
        let c = vision.hidden;
        let patch_shape = [c, vision.in_channels, vision.temporal_patch, vision.patch, vision.patch];
        let patch = Affine {
            w: b.tensor("visual.patch_embed.proj.weight".into(), &patch_shape, g),
            b: None,
            inputs: vision.framed_values(),
            outputs: c,
            lora: None,
        };
        let blocks = (0..vision.depth)
            .map(|i| {
                let p = format!("visual.blocks.{i}");
                let norm1 = b.tensor(format!("{p}.norm1.weight"), &[c], g);
                let norm2 = b.tensor(format!("{p}.norm2.weight"), &[c], g);
                let qkv = b.affine(&format!("{p}.attn.qkv"), 3 * c, c, true, g);
                Block {
                    norm1,
                    norm2,
                    q: rows(&qkv, 0, c),
                    k: rows(&qkv, c, c),
                    v: rows(&qkv, 2 * c, c),
                    o: b.affine(&format!("{p}.attn.proj"), c, c, true, g),
                    gate: b.affine(&format!("{p}.mlp.gate_proj"), vision.mlp, c, true, g),
                    up: b.affine(&format!("{p}.mlp.up_proj"), vision.mlp, c, true, g),
                    down: b.affine(&format!("{p}.mlp.down_proj"), c, vision.mlp, true, g),
                }
            })
            .collect();
        let g = Group::Merger;
        let wide = c * vision.merge * vision.merge;
        let merger_norm = b.tensor("visual.merger.ln_q.weight".into(), &[c], g);
        let merger_in = b.affine("visual.merger.mlp.0", wide, wide, true, g);
        let merger_out = b.affine("visual.merger.mlp.2", vision.out_hidden, wide, true, g);
        Arc::new(Layout {
            vision: VisionIndex { patch, blocks, merger_norm, merger_in, merger_out },
            text: TextIndex { embed, layers, norm, head },
            entries: b.entries,
            len: b.len,
        })
    }

    /// The same with adapters behind the model's own tensors, in the order of `modules`.
    ///
    /// # Panics
    /// At a module that is no linear map of the model; `lora` has looked.
    pub fn adapted(&self, modules: &[Module]) -> Arc<Layout> {
        let mut layout = self.clone();
        for Module { name, rank, scale } in modules {
            let entry = self.find(&format!("{name}.weight")).cloned();
            let Some(Entry { shape, range, group, .. }) = entry else { panic!("the model has no map {name}") };
            let [outputs, inputs] = shape[..] else { panic!("{name} is no linear map") };
            let mut matrix = |part: &str, outputs: usize, inputs: usize| {
                let range = layout.len..layout.len + outputs * inputs;
                layout.len = range.end;
                let (name, shape) = (format!("{name}.{part}.weight"), vec![outputs, inputs]);
                layout.entries.push(Entry { name, shape, range: range.clone(), group, adapter: true });
                Affine { w: range, b: None, inputs, outputs, lora: None }
            };
            let (a, b) = (matrix(LORA_A, *rank, inputs), matrix(LORA_B, outputs, *rank));
            // A fused map is used in parts, each with its rows of b.
            for map in layout.maps_mut().filter(|map| range.contains(&map.w.start)) {
                let from = (map.w.start - range.start) / inputs;
                map.lora = Some(Box::new(Lora { a: a.clone(), b: rows(&b, from, map.outputs), scale: *scale }));
            }
        }
        Arc::new(layout)
    }

    fn maps_mut(&mut self) -> impl Iterator<Item = &mut Affine> {
        let Layout { vision: VisionIndex { blocks, merger_in, merger_out, .. }, text, .. } = self;
        let blocks = text.layers.iter_mut().chain(blocks).flat_map(|block| {
            let Block { q, k, v, o, gate, up, down, .. } = block;
            [q, k, v, o, gate, up, down]
        });
        blocks.chain([merger_in, merger_out])
    }

    /// What an adapter adds to a map.
    pub fn lora(&self, module: &str) -> Option<&Lora> {
        let place = self.find(&format!("{module}.weight"))?.range.start;
        self.maps().find(|map| map.w.start == place)?.lora.as_deref()
    }

    /// The linear maps of the blocks and of the merger.
    fn maps(&self) -> impl Iterator<Item = &Affine> {
        let VisionIndex { blocks, merger_in, merger_out, .. } = &self.vision;
        self.text.layers.iter().chain(blocks).flat_map(Block::maps).chain([merger_in, merger_out])
    }

    /// Whether there are adapters.
    pub fn has_adapters(&self) -> bool {
        self.entries.last().is_some_and(|entry| entry.adapter)
    }

    /// The entry of this published name.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// Number of parameters in a group.
    pub fn count(&self, group: Group) -> usize {
        self.entries.iter().filter(|e| e.group == group).map(|e| e.range.len()).sum()
    }
}

/// All values of one layout in memory: weights that may be trained, gradients or optimiser moments.
#[derive(Clone, Debug)]
pub struct Arena {
    pub layout: Arc<Layout>,
    pub data: Vec<f32>,
}

/// Derivatives of a loss by every parameter; frozen groups stay 0.
pub type Gradients = Arena;

impl Arena {
    pub fn zeros(layout: &Arc<Layout>) -> Arena {
        Arena { layout: layout.clone(), data: vec![0.0; layout.len] }
    }

    /// The values of one named tensor.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.layout.find(name).map(|e| &self.data[e.range.clone()])
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        let range = self.layout.find(name)?.range.clone();
        Some(&mut self.data[range])
    }
}

#[cfg(test)]
mod tests {
    use super::super::presets;
    use super::*;

    /// 3,754,622,976 is the count published for Qwen2.5-VL-3B (its index file: 7,509,245,952 bytes of bf16), and
    /// 8,292,166,656 that of the 7B (16,584,333,312 bytes).
    #[test]
    fn published_sizes() {
        assert_eq!(Layout::new(&presets::qwen25_vl_3b()).len, 3_754_622_976);
        assert_eq!(Layout::new(&presets::qwen25_vl_7b()).len, 8_292_166_656);
    }

    #[test]
    fn entries_cover_the_arena_without_gaps() {
        let layout = Layout::new(&presets::nano(1000));
        let mut end = 0;
        for e in &layout.entries {
            assert_eq!(e.range.start, end, "{}", e.name);
            end = e.range.end;
        }
        assert_eq!(end, layout.len);
        let qkv = layout.find("visual.blocks.1.attn.qkv.weight").unwrap();
        let block = &layout.vision.blocks[1];
        assert_eq!((block.q.w.start, block.v.w.end), (qkv.range.start, qkv.range.end));
    }
}
