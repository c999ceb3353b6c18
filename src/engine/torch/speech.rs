//! Sampling on LibTorch: the keys and values of a prompt lie once for all of its continuations, and a later turn reads only what is new.
//!
//! A [`Talk`] is some conversations that began in one call. Its members speak together, one token each per step: their queries meet the keys of
//! their prompt in one product for all members, and each its own keys beside it. It hides where keys lie, and that prompts and members of
//! different lengths stand in tensors of one length.

use anyhow::{Context, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::attention::{Plan, dot};
use super::net::{Net, Rotation, to_vec};
use crate::chat::Chat;
use crate::engine::embedded::lane::draw;
use crate::engine::{Completion, Prompt, Sampling};
use crate::model::block::Dims;
use crate::model::{self, Positions};
use foveate_kernels::attention::Span;

/// Room for tokens of a member's own is a multiple of it, and doubled where it is too small.
const ROOM: usize = 64;

/// Who speaks, and how.
pub struct Voice<'a> {
    pub net: &'a Net,
    pub chat: &'a Chat,
    pub banned: &'a Tensor,
    pub sampling: &'a Sampling,
    /// Rows of prompts and crops that are read in one call; a longer one is read alone.
    pub read_at_once: usize,
}

/// A conversation to be continued, and the features `[tokens, D]` of the images among what is not read yet, one after the other.
pub struct Unread<'a> {
    pub prompt: &'a Prompt<'a>,
    pub features: Option<Tensor>,
}

pub struct Talk {
    /// Keys and values of the prompts, per layer `[N, Hkv, P, K]`.
    shared: Vec<[Tensor; 2]>,
    shared_len: Vec<usize>,
    /// Those of each member behind its prompt, per layer `[S, Hkv, C, K]`.
    own: Vec<[Tensor; 2]>,
    own_len: Vec<usize>,
    /// Each member's prompt.
    prompt_of: Vec<usize>,
}

/// Rows that are read in one call: of prompt or member `of`, from its `from`th token on.
struct Reading<'a> {
    of: usize,
    from: usize,
    unread: &'a Unread<'a>,
    positions: Positions,
}

impl Reading<'_> {
    fn ids(&self) -> &[u32] {
        &self.unread.prompt.stream.ids[self.from..]
    }
}

impl Talk {
    /// Reads prompts and continues each once for every seed.
    pub fn begin(voice: &Voice, unread: &[Unread]) -> Result<(Talk, Vec<Vec<Completion>>)> {
        let _guard = no_grad_guard();
        let longest = unread.iter().map(|u| u.prompt.stream.len()).max().unwrap_or(0);
        let prompt_of: Vec<usize> =
            unread.iter().enumerate().flat_map(|(i, u)| u.prompt.seeds.iter().map(move |_| i)).collect();
        let mut talk = Talk {
            shared: empty(voice.net, unread.len(), longest),
            shared_len: unread.iter().map(|u| u.prompt.stream.len()).collect(),
            own: empty(voice.net, prompt_of.len(), ROOM),
            own_len: vec![0; prompt_of.len()],
            prompt_of,
        };
        let (hidden, next) = talk.read(voice, readings(voice, unread, |i| (i, 0))?, false);
        let rows: Vec<i64> = talk.prompt_of.iter().map(|&i| i as i64).collect();
        let hidden = hidden.index_select(0, &Tensor::from_slice(&rows).to_device(voice.net.device));
        let next = talk.prompt_of.iter().map(|&i| next[i]).collect();
        let said = talk.speak(voice, unread, hidden, next)?;
        Ok((talk, said))
    }

    /// Reads on in some members and continues each.
    pub fn go_on(&self, voice: &Voice, unread: &[Unread], members: &[usize]) -> Result<(Talk, Vec<Vec<Completion>>)> {
        let _guard = no_grad_guard();
        let new = |i: usize| unread[i].prompt.stream.len() - self.rows(members[i]);
        let needed = (0..members.len()).map(|i| self.own_len[members[i]] + new(i)).max().unwrap_or(0);
        let room = (needed + 1).next_multiple_of(ROOM);
        let chosen: Vec<i64> = members.iter().map(|&m| m as i64).collect();
        let chosen = Tensor::from_slice(&chosen).to_device(voice.net.device);
        let own = empty(voice.net, members.len(), room);
        copy(&own, &self.own, |from| from.index_select(0, &chosen));
        let mut talk = Talk {
            shared: self.shared.iter().map(|kv| kv.each_ref().map(Tensor::shallow_clone)).collect(),
            shared_len: self.shared_len.clone(),
            own,
            own_len: members.iter().map(|&m| self.own_len[m]).collect(),
            prompt_of: members.iter().map(|&m| self.prompt_of[m]).collect(),
        };
        let readings = readings(voice, unread, |i| (i, self.rows(members[i])))?;
        let (hidden, next) = talk.read(voice, readings, true);
        let said = talk.speak(voice, unread, hidden, next)?;
        Ok((talk, said))
    }

    /// Tokens of a member's conversation that need not be read again.
    pub fn rows(&self, member: usize) -> usize {
        self.shared_len[self.prompt_of[member]] + self.own_len[member]
    }

    /// Reads into the prompts, or into the members behind them. The final hidden state of each last row `[N, D]`, and the position that follows.
    fn read(&mut self, voice: &Voice, readings: Vec<Reading>, members: bool) -> (Tensor, Vec<i32>) {
        let (mut hidden, mut rest) = (Vec::new(), &readings[..]);
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |reading: &&Reading| {
                rows += reading.ids().len();
                rows <= voice.read_at_once
            };
            let fit = rest.iter().take_while(fits).count().max(1);
            hidden.push(self.read_some(voice.net, &rest[..fit], members));
            rest = &rest[fit..];
        }
        (Tensor::cat(&hidden, 0), readings.iter().map(|reading| reading.positions.next).collect())
    }

    fn read_some(&mut self, net: &Net, readings: &[Reading], members: bool) -> Tensor {
        let dims = net.config.text.dims();
        let ids: Vec<u32> = readings.iter().flat_map(|r| r.ids()).copied().collect();
        let axes = [0, 1, 2].map(|axis| -> Vec<i32> {
            readings.iter().flat_map(|r| &r.positions.axes[axis][r.from..]).copied().collect()
        });
        let rotation = net.turned(axes.each_ref().map(Vec::as_slice));
        let pads = (0..ids.len()).filter(|&row| ids[row] == net.config.ids.image_pad).map(|row| row as i64);
        let pads: Vec<i64> = pads.collect();
        let features: Vec<&Tensor> = readings.iter().filter_map(|r| r.unread.features.as_ref()).collect();
        let features = (!features.is_empty()).then(|| Tensor::cat(&features, 0));
        let mut x = net.inputs(&ids, features.as_ref().map(|features| (&pads[..], features)), false);
        let mut starts = Vec::with_capacity(readings.len());
        let mut spans = Vec::with_capacity(readings.len());
        for reading in readings {
            let start = spans.last().map_or(0, |span: &Span| span.queries.end);
            let rows = start..start + reading.ids().len();
            starts.push(start as i64);
            spans.push(Span { queries: rows.clone(), shared: 0..0, own: rows, causal: true });
        }
        let plan = Plan::new(&spans, net.device);
        let masks: Vec<Tensor> = readings.iter().filter(|_| members).map(|r| self.mask(net, r)).collect();
        for (l, layer) in net.layout.text.layers.iter().enumerate() {
            let [q, k, v] = net.project(layer, &dims, &x, &rotation, false);
            for (reading, &start) in readings.iter().zip(&starts) {
                let n = reading.ids().len() as i64;
                let (into, at) = match members {
                    true => (&self.own[l], self.own_len[reading.of] as i64),
                    false => (&self.shared[l], 0),
                };
                for (cache, new) in into.iter().zip([&k, &v]) {
                    cache.get(reading.of as i64).narrow(1, at, n).copy_(&new.narrow(0, start, n).transpose(0, 1));
                }
            }
            let o = match members {
                false => plan.attend(&q, &k, &v),
                true => {
                    let one = |((reading, &start), mask): ((&Reading, &i64), &Tensor)| {
                        let n = reading.ids().len() as i64;
                        let [k, v] = self.seen(l, reading.of, n);
                        let q = q.narrow(0, start, n).unsqueeze(0);
                        dot(&q, &k, &v, Some(mask), false).reshape([n, -1])
                    };
                    Tensor::cat(&readings.iter().zip(&starts).zip(&masks).map(one).collect::<Vec<_>>(), 0)
                }
            };
            x = net.finish(layer, &dims, &x, &o, false);
        }
        if members {
            readings.iter().for_each(|reading| self.own_len[reading.of] += reading.ids().len());
        }
        let last: Vec<i64> = spans.iter().map(|span| span.queries.end as i64 - 1).collect();
        net.last(&x.index_select(0, &Tensor::from_slice(&last).to_device(net.device)), false)
    }

    /// Keys and values of a member's prompt and its own, with n new ones: `[1, m, Hkv, K]` each.
    fn seen(&self, layer: usize, member: usize, n: i64) -> [Tensor; 2] {
        let prompt = self.prompt_of[member];
        [0, 1].map(|i| {
            let shared = self.shared[layer][i].get(prompt as i64).narrow(1, 0, self.shared_len[prompt] as i64);
            let own = self.own[layer][i].get(member as i64).narrow(1, 0, self.own_len[member] as i64 + n);
            Tensor::cat(&[shared, own], 1).transpose(0, 1).unsqueeze(0)
        })
    }

    /// New rows of a member see all that is older, and each other as far as they come before.
    fn mask(&self, net: &Net, reading: &Reading) -> Tensor {
        let (older, n) = (self.rows(reading.of) as i64, reading.ids().len() as i64);
        Tensor::ones([n, older + n], (Kind::Bool, net.device)).tril(older)
    }

    /// Token by token until all have stopped. One list a prompt.
    fn speak(
        &mut self,
        voice: &Voice,
        unread: &[Unread],
        mut hidden: Tensor,
        mut next: Vec<i32>,
    ) -> Result<Vec<Vec<Completion>>> {
        let Voice { net, sampling, .. } = *voice;
        let seeds: Vec<u64> = unread.iter().flat_map(|u| u.prompt.seeds).copied().collect();
        let mut random: Vec<ChaCha8Rng> = seeds.iter().map(|&seed| ChaCha8Rng::seed_from_u64(seed)).collect();
        let mut said: Vec<Completion> = seeds.iter().map(|_| Completion::empty()).collect();
        let mut done = vec![false; said.len()];
        let steps = Steps::new(self, net);
        for n in 1..=sampling.max_new_tokens {
            // A number for each, also for those who are done, would not change what the others draw: each has a source of its own.
            let us: Vec<f64> = (0..said.len()).map(|s| if done[s] { 0.0 } else { random[s].random::<f64>() }).collect();
            let logits = net.logits(&hidden, voice.banned, false);
            let drawn = drawn(&logits, sampling, &us);
            for (s, &(id, logprob)) in drawn.iter().enumerate() {
                if !done[s] {
                    done[s] = said[s].hear(id, logprob, voice.chat, sampling)?;
                }
            }
            // The last token of a turn has no keys yet: it is read at the start of the next turn, if there is one.
            if n == sampling.max_new_tokens || done.iter().all(|&done| done) {
                break;
            }
            let ids: Vec<u32> = drawn.iter().map(|&(id, _)| id).collect();
            self.make_room(net);
            hidden = self.step(net, &steps, &ids, &next);
            for s in (0..said.len()).filter(|&s| !done[s]) {
                self.own_len[s] += 1;
                next[s] += 1;
            }
        }
        let mut said = said.into_iter();
        Ok(unread.iter().map(|u| said.by_ref().take(u.prompt.seeds.len()).collect()).collect())
    }

    /// Makes room for one more token of each member.
    fn make_room(&mut self, net: &Net) {
        let room = self.own[0][0].size()[2] as usize;
        if self.own_len.iter().any(|&len| len + 1 > room) {
            let larger = empty(net, self.own_len.len(), 2 * room);
            copy(&larger, &self.own, Tensor::shallow_clone);
            self.own = larger;
        }
    }

    /// One more token of each member, whose keys are written behind its own: final hidden states `[S, D]`.
    fn step(&self, net: &Net, steps: &Steps, ids: &[u32], positions: &[i32]) -> Tensor {
        let dims = net.config.text.dims();
        let rotation: Rotation = net.turned([positions; 3]);
        let mut x = net.inputs(ids, None, false);
        let at: Vec<i64> = self.own_len.iter().map(|&len| len as i64).collect();
        let room = at.iter().max().map_or(0, |longest| longest + 1);
        let at = Tensor::from_slice(&at).to_device(net.device).view([-1, 1, 1, 1]);
        let unseen = Tensor::arange(room, (Kind::Int64, net.device)).view([1, 1, 1, -1]).gt_tensor(&at);
        for (l, layer) in net.layout.text.layers.iter().enumerate() {
            let [q, k, v] = net.project(layer, &dims, &x, &rotation, false);
            let width = [k.size()[0], k.size()[1], 1, k.size()[2]];
            for (cache, new) in self.own[l].iter().zip([&k, &v]) {
                let _ = { cache.shallow_clone() }.scatter_(2, &at.expand(width, true), &new.unsqueeze(2));
            }
            let own = self.own[l].each_ref().map(|cache| cache.narrow(2, 0, room));
            let o = steps.attend(&q, &self.shared[l], &own, &unseen, &dims);
            x = net.finish(layer, &dims, &x, &o, false);
        }
        net.last(&x, false)
    }
}

/// What all steps of a turn have in common: members in rows of their prompts.
struct Steps {
    /// For each of G places at each prompt, the member there; any, where there is none. `[N · G]`
    members: Tensor,
    /// For each member its place. `[S]`
    places: Tensor,
    prompts: i64,
    /// Which keys of the prompts are none, `[N, 1, 1, P]`.
    unseen: Tensor,
}

impl Steps {
    fn new(talk: &Talk, net: &Net) -> Steps {
        let prompts = talk.shared_len.len();
        let mut of_prompt: Vec<Vec<i64>> = vec![Vec::new(); prompts];
        talk.prompt_of.iter().enumerate().for_each(|(member, &prompt)| of_prompt[prompt].push(member as i64));
        let most = of_prompt.iter().map(Vec::len).max().unwrap_or(0);
        let mut places = vec![0i64; talk.prompt_of.len()];
        for (p, members) in of_prompt.iter().enumerate() {
            members.iter().enumerate().for_each(|(i, &member)| places[member as usize] = (p * most + i) as i64);
        }
        let filled = |members: &Vec<i64>| {
            let mut members = members.clone();
            members.resize(most, 0);
            members
        };
        let members: Vec<i64> = of_prompt.iter().flat_map(filled).collect();
        let on_device = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(net.device);
        let lengths: Vec<i64> = talk.shared_len.iter().map(|&len| len as i64).collect();
        let rows = talk.shared.first().map_or(0, |kv| kv[0].size()[2]);
        let unseen = Tensor::arange(rows, (Kind::Int64, net.device)).view([1, 1, 1, -1]);
        let unseen = unseen.ge_tensor(&on_device(&lengths).view([-1, 1, 1, 1]));
        Steps { members: on_device(&members), places: on_device(&places), prompts: prompts as i64, unseen }
    }

    /// # Shapes
    /// q `[S, H, K]`, shared `[N, Hkv, P, K]`, own `[S, Hkv, C, K]` -> `[S, H · K]`
    fn attend(&self, q: &Tensor, shared: &[Tensor; 2], own: &[Tensor; 2], unseen: &Tensor, dims: &Dims) -> Tensor {
        let (kv, k) = (dims.kv_heads as i64, dims.k as i64);
        let (members, times) = (q.size()[0], (dims.heads / dims.kv_heads) as i64);
        let scale = 1.0 / (k as f64).sqrt();
        let by_head = q.view([members, kv, times, k]);
        // All members of a prompt in one product: [N, Hkv, G · times, ...] and back.
        let gather = |x: &Tensor| {
            let last = x.size()[3];
            let x = x.index_select(0, &self.members).view([self.prompts, -1, kv, times, last]);
            x.transpose(1, 2).reshape([self.prompts, kv, -1, last])
        };
        let scatter = |x: &Tensor| {
            let last = x.size()[3];
            let x = x.view([self.prompts, kv, -1, times, last]).transpose(1, 2);
            x.reshape([-1, kv, times, last]).index_select(0, &self.places)
        };
        let masked = |scores: Tensor, unseen: &Tensor| (scores * scale).masked_fill(unseen, f64::NEG_INFINITY);
        // Scores are f32 as the trainer's are: rounded to bf16, large ones would be off by whole nats.
        let scores = |q: &Tensor, k: &Tensor| q.to_kind(Kind::Float).matmul(&k.to_kind(Kind::Float).transpose(2, 3));
        let at_prompt = masked(scores(&gather(&by_head), &shared[0]), &self.unseen);
        let at_own = masked(scores(&by_head, &own[0]), unseen);
        let (prompt, room) = (at_prompt.size()[3], at_own.size()[3]);
        let shares = Tensor::cat(&[scatter(&at_prompt), at_own], 3).softmax(3, Kind::Float).to_kind(q.kind());
        let of_prompt = scatter(&gather(&shares.narrow(3, 0, prompt)).matmul(&shared[1]));
        let of_own = shares.narrow(3, prompt, room).matmul(&own[1]);
        (of_prompt + of_own).reshape([members, -1])
    }
}

/// A token and its log-prob for each row of logits `[S, V]`.
fn drawn(logits: &Tensor, sampling: &Sampling, us: &[f64]) -> Vec<(u32, f32)> {
    if sampling.top_k.is_some() || sampling.top_p.is_some() {
        let vocab = logits.size()[1] as usize;
        return to_vec(logits).chunks_mut(vocab).zip(us).map(|(row, &u)| draw(row, sampling, u)).collect();
    }
    let (logits, chosen) = if sampling.temperature <= 0.0 {
        (logits.shallow_clone(), logits.argmax(1, true))
    } else {
        let logits = logits / f64::from(sampling.temperature);
        let passed = logits.softmax(1, Kind::Double).cumsum(1, Kind::Double);
        let wanted = Tensor::from_slice(us).to_device(logits.device()).unsqueeze(1);
        let total = passed.narrow(1, passed.size()[1] - 1, 1);
        // The first whose running sum is above what is wanted; the sum ends at the total, which is.
        let chosen = (wanted * total).searchsorted::<Tensor>(&passed, false, true, "right", None);
        (logits, chosen.clamp_max(passed.size()[1] - 1))
    };
    let logprobs = to_vec(&logits.log_softmax(1, Kind::Float).gather(1, &chosen, false));
    let chosen = chosen.to_device(Device::Cpu);
    (0..).zip(logprobs).map(|(s, logprob)| (chosen.int64_value(&[s, 0]) as u32, logprob)).collect()
}

/// Per layer room for the keys and values of `n` sequences.
fn empty(net: &Net, n: usize, room: usize) -> Vec<[Tensor; 2]> {
    let text = &net.config.text;
    let size = [n as i64, text.kv_heads as i64, room as i64, text.head_dim() as i64];
    (0..text.layers).map(|_| [(); 2].map(|()| Tensor::zeros(size, (net.kind(), net.device)))).collect()
}

/// Copies keys and values, as far as there is room.
fn copy(to: &[[Tensor; 2]], from: &[[Tensor; 2]], chosen: impl Fn(&Tensor) -> Tensor) {
    for (to, from) in to.iter().flatten().zip(from.iter().flatten()) {
        let kept = from.size()[2].min(to.size()[2]);
        to.narrow(2, 0, kept).copy_(&chosen(&from.narrow(2, 0, kept)));
    }
}

/// What is to be read of each conversation; `place` says whose it is and how much is known.
fn readings<'a>(
    voice: &Voice,
    unread: &'a [Unread<'a>],
    place: impl Fn(usize) -> (usize, usize),
) -> Result<Vec<Reading<'a>>> {
    let one = |(i, unread): (usize, &'a Unread<'a>)| {
        let stream = unread.prompt.stream;
        let positions =
            model::positions(&stream.ids, &stream.grids(), &voice.net.config).context("placing a conversation")?;
        let (of, from) = place(i);
        Ok(Reading { of, from, unread, positions })
    };
    unread.iter().enumerate().map(one).collect()
}
