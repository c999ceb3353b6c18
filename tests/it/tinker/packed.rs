//! What the double reads and writes as protobuf: the messages once more, from the SDK's description and not from our own.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message;
use serde_json::{Value, json};

#[derive(Clone, PartialEq, Message)]
struct Pass {
    #[prost(string, tag = "1")]
    model_id: String,
    #[prost(int32, tag = "2")]
    seq_id: i32,
    #[prost(message, repeated, tag = "3")]
    data: Vec<Datum>,
    #[prost(string, tag = "4")]
    loss_fn: String,
    #[prost(bool, tag = "6")]
    forward_only: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Datum {
    #[prost(message, repeated, tag = "1")]
    chunks: Vec<Chunk>,
    #[prost(btree_map = "string, message", tag = "2")]
    inputs: BTreeMap<String, Tensor>,
}

/// One of both.
#[derive(Clone, PartialEq, Message)]
struct Chunk {
    #[prost(message, optional, tag = "1")]
    text: Option<Text>,
    #[prost(message, optional, tag = "2")]
    image: Option<Image>,
}

#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(bytes = "vec", tag = "1")]
    tokens: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(bytes = "vec", tag = "1")]
    data: Vec<u8>,
    #[prost(string, tag = "2")]
    format: String,
    #[prost(int32, optional, tag = "3")]
    expected_tokens: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(bytes = "vec", tag = "1")]
    dense: Vec<u8>,
    #[prost(int32, tag = "3")]
    dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Output {
    #[prost(message, repeated, tag = "2")]
    records: Vec<Record>,
    #[prost(btree_map = "string, double", tag = "3")]
    metrics: BTreeMap<String, f64>,
}

#[derive(Clone, PartialEq, Message)]
struct Record {
    #[prost(btree_map = "string, message", tag = "2")]
    fields: BTreeMap<String, Batched>,
    #[prost(int64, tag = "3")]
    num_datums: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Batched {
    #[prost(bytes = "vec", tag = "1")]
    data: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    offsets: Vec<u8>,
    #[prost(int32, tag = "3")]
    dtype: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Samples {
    #[prost(message, repeated, tag = "1")]
    sequences: Vec<Sequence>,
    #[prost(bytes = "vec", optional, tag = "2")]
    prompt_logprobs: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Sequence {
    #[prost(int32, tag = "1")]
    stop_reason: i32,
    #[prost(bytes = "vec", tag = "2")]
    tokens: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "3")]
    logprobs: Option<Vec<u8>>,
}

/// A pass as the operation and the body that it is in JSON.
pub fn request(bytes: &[u8]) -> (&'static str, Value) {
    let Pass { model_id, seq_id, data, loss_fn, forward_only } = Pass::decode(bytes).unwrap();
    let chunk = |chunk: &Chunk| match (&chunk.text, &chunk.image) {
        (Some(text), None) => {
            let ids: Vec<i32> = text.tokens.as_chunks::<4>().0.iter().map(|id| i32::from_le_bytes(*id)).collect();
            json!({"type": "encoded_text", "tokens": ids})
        }
        (None, Some(image)) => json!({
            "type": "image", "data": STANDARD.encode(&image.data), "format": image.format, "expected_tokens": image.expected_tokens
        }),
        both => panic!("{both:?}"),
    };
    let tensor = |tensor: &Tensor| {
        let (dtype, data): (&str, Value) = match tensor.dtype {
            1 => ("float32", tensor.dense.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect()),
            2 => ("int64", tensor.dense.as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x)).collect()),
            other => panic!("DTYPE {other}"),
        };
        json!({"dtype": dtype, "data": data, "shape": tensor.shape})
    };
    let datum = |datum: &Datum| {
        let inputs: BTreeMap<&String, Value> = datum.inputs.iter().map(|(name, one)| (name, tensor(one))).collect();
        json!({"model_input": {"chunks": datum.chunks.iter().map(chunk).collect::<Vec<_>>()}, "loss_fn_inputs": inputs})
    };
    let input = json!({"data": data.iter().map(datum).collect::<Vec<_>>(), "loss_fn": loss_fn});
    match forward_only {
        true => ("forward", json!({"model_id": model_id, "seq_id": seq_id, "forward_input": input})),
        false => ("forward_backward", json!({"model_id": model_id, "seq_id": seq_id, "forward_backward_input": input})),
    }
}

/// A result that newer servers write as protobuf; others stay JSON.
pub fn result(said: &Value) -> Option<Vec<u8>> {
    let floats = |list: &Value| -> Vec<u8> {
        let number = |x: &Value| x.as_f64().map_or(f32::NAN, |x| x as f32).to_le_bytes();
        list.as_array().unwrap().iter().flat_map(number).collect()
    };
    if let Some(outputs) = said["loss_fn_outputs"].as_array() {
        // A record for each half, as a server may that has two workers.
        let record = |half: &[Value]| {
            let (mut data, mut offsets) = (Vec::new(), 0i64.to_le_bytes().to_vec());
            for one in half {
                data.extend(floats(&one["logprobs"]["data"]));
                offsets.extend((data.len() as i64).to_le_bytes());
            }
            let fields = BTreeMap::from([("logprobs".to_owned(), Batched { data, offsets, dtype: 1 })]);
            Record { fields, num_datums: half.len() as i64 }
        };
        let (first, second) = outputs.split_at(outputs.len() / 2);
        let metric = |(name, value): (&String, &Value)| Some((name.clone(), value.as_f64()?));
        let metrics = said["metrics"].as_object().unwrap().iter().filter_map(metric).collect();
        return Some(Output { records: vec![record(first), record(second)], metrics }.encode_to_vec());
    }
    let sequence = |one: &Value| Sequence {
        stop_reason: i32::from(one["stop_reason"] == "length"),
        tokens: one["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|id| (id.as_i64().unwrap() as i32).to_le_bytes())
            .collect(),
        logprobs: Some(floats(&one["logprobs"])),
    };
    let sequences = said["sequences"].as_array()?.iter().map(sequence).collect();
    let told = &said["prompt_logprobs"];
    Some(Samples { sequences, prompt_logprobs: (!told.is_null()).then(|| floats(told)) }.encode_to_vec())
}
