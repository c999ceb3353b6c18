//! Which keys each packed row sees, as calls of LibTorch's attention.
//!
//! It hides that LibTorch knows no shared prefix: spans become blocks of equal length (the windows of the vision tower), whole causal
//! sequences (prompts), and runs of members with a mask over their prompt's rows and their own.

use foveate_kernels::attention::Span;
use tch::{Device, Tensor};

/// Queries of one masked call, if a single member has no more.
const QUERIES: usize = 1024;

enum Piece {
    /// Rows that all see each other, `count` times `len` of them.
    Blocks { rows: Tensor, count: i64, len: i64 },
    /// Rows from..from + len, each of which sees itself and those before it.
    Causal { from: i64, len: i64 },
    /// Rows from..from + len, which see some of the rows `keys`: mask `[len, keys]`.
    Masked { from: i64, len: i64, keys: Tensor, mask: Tensor },
}

/// Calls that give a result for every row.
pub struct Plan {
    pieces: Vec<Piece>,
    /// Where each row lies in what the calls give one after the other; `None`: in order.
    places: Option<Tensor>,
}

impl Plan {
    pub fn new(spans: &[Span], device: Device) -> Plan {
        let mut pieces = Vec::new();
        let mut rest = spans;
        let mut blocks: Vec<(usize, Vec<usize>)> = Vec::new();
        while let Some(span) = rest.first() {
            let mut taken = 1;
            if !span.causal {
                match blocks.iter_mut().find(|(len, _)| *len == span.queries.len()) {
                    Some((_, starts)) => starts.push(span.queries.start),
                    None => blocks.push((span.queries.len(), vec![span.queries.start])),
                }
            } else if span.shared.is_empty() && span.own == span.queries {
                pieces.push(Piece::Causal { from: span.queries.start as i64, len: span.queries.len() as i64 });
            } else {
                let mut queries = span.queries.len();
                while let Some(next) = rest.get(taken).filter(|next| next.causal && next.shared == span.shared) {
                    queries += next.queries.len();
                    if queries > QUERIES {
                        break;
                    }
                    taken += 1;
                }
                pieces.push(masked(&rest[..taken], device));
            }
            rest = &rest[taken..];
        }
        let mut places = None;
        if !blocks.is_empty() {
            let mut order = Vec::new();
            for (len, starts) in blocks {
                let rows: Vec<i64> = starts.iter().flat_map(|&s| (s..s + len).map(|row| row as i64)).collect();
                let (count, len) = (starts.len() as i64, len as i64);
                pieces.push(Piece::Blocks { rows: Tensor::from_slice(&rows).to_device(device), count, len });
                order.extend(rows);
            }
            let mut inverse = vec![0i64; order.len()];
            order.iter().enumerate().for_each(|(i, &row)| inverse[row as usize] = i as i64);
            places = Some(Tensor::from_slice(&inverse).to_device(device));
        }
        Plan { pieces, places }
    }

    /// # Shapes
    /// q `[T, H, K]`, k and v `[T, Hkv, K]` -> `[T, H · K]`
    pub fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let width = q.size()[1] * q.size()[2];
        let one = |piece: &Piece| match piece {
            Piece::Blocks { rows, count, len } => {
                let block = |x: &Tensor| {
                    let [_, heads, width] = size(x);
                    x.index_select(0, rows).view([*count, *len, heads, width])
                };
                dot(&block(q), &block(k), &block(v), None, false).reshape([count * len, width])
            }
            Piece::Causal { from, len } => {
                let rows = |x: &Tensor| x.narrow(0, *from, *len).unsqueeze(0);
                dot(&rows(q), &rows(k), &rows(v), None, true).reshape([*len, width])
            }
            Piece::Masked { from, len, keys, mask } => {
                let rows = |x: &Tensor| x.index_select(0, keys).unsqueeze(0);
                let q = q.narrow(0, *from, *len).unsqueeze(0);
                dot(&q, &rows(k), &rows(v), Some(mask), false).reshape([*len, width])
            }
        };
        let given: Vec<Tensor> = self.pieces.iter().map(one).collect();
        let all = match &given[..] {
            [one] => one.shallow_clone(),
            many => Tensor::cat(many, 0),
        };
        match &self.places {
            Some(places) => all.index_select(0, places),
            None => all,
        }
    }
}

/// Members of one prompt whose rows follow each other.
fn masked(spans: &[Span], device: Device) -> Piece {
    let shared = spans[0].shared.clone();
    let keys: Vec<i64> = shared.clone().chain(spans.iter().flat_map(|s| s.own.clone())).map(|row| row as i64).collect();
    let mut mask = Vec::new();
    let mut before = shared.len();
    for span in spans {
        // The last query is the last own row; one that is not among the own rows' last stands nowhere.
        let older = span.own.len() - span.queries.len();
        for i in 0..span.queries.len() {
            let seen = before..before + older + i + 1;
            mask.extend((0..keys.len()).map(|j| j < shared.len() || seen.contains(&j)));
        }
        before += span.own.len();
    }
    let len = spans.iter().map(|s| s.queries.len()).sum::<usize>() as i64;
    let mask = Tensor::from_slice(&mask).view([len, keys.len() as i64]).to_device(device);
    Piece::Masked { from: spans[0].queries.start as i64, len, keys: Tensor::from_slice(&keys).to_device(device), mask }
}

/// Attention of some sequences, each by itself.
///
/// # Shapes
/// q `[B, n, H, K]`, k and v `[B, m, Hkv, K]`, mask `[n, m]` -> `[B, n, H, K]`
pub fn dot(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, causal: bool) -> Tensor {
    let times = q.size()[2] / k.size()[2];
    let heads = |x: &Tensor, times: i64| match times {
        1 => x.transpose(1, 2),
        _ => x.repeat_interleave_self_int(times, 2, None).transpose(1, 2),
    };
    let (q, k, v) = (heads(q, 1), heads(k, times), heads(v, times));
    Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, causal, None, false).transpose(1, 2)
}

/// The three sizes of a tensor.
fn size(x: &Tensor) -> [i64; 3] {
    let size = x.size();
    [size[0], size[1], size[2]]
}
