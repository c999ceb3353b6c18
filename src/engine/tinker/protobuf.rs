//! The same requests and results as `wire.rs`, as protobuf: what newer servers want of `forward_backward`, and a tenth of the bytes.
//!
//! Numbers and fields of the messages are those of the `tinker` SDK 0.38 (`tinker/proto`, package `tinker_public`); `forward` is there a
//! `forward_backward` that is told to go forward only. Of results only what is needed is read.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::wire::{self, Chunk, ForwardBackwardInput, Passed, Sampled, StopReason};

#[derive(Clone, PartialEq, Message)]
struct ForwardBackwardRequest {
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
    model_input: Vec<ModelInputChunk>,
    #[prost(btree_map = "string, message", tag = "2")]
    loss_fn_inputs: BTreeMap<String, Tensor>,
}

#[derive(Clone, PartialEq, Message)]
struct ModelInputChunk {
    #[prost(oneof = "One", tags = "1, 2")]
    chunk: Option<One>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum One {
    #[prost(message, tag = "1")]
    EncodedText(EncodedText),
    #[prost(message, tag = "2")]
    Image(Image),
}

#[derive(Clone, PartialEq, Message)]
struct EncodedText {
    /// int32, little-endian.
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

#[derive(Clone, Copy, PartialEq, Eq, Debug, prost::Enumeration)]
#[repr(i32)]
enum DType {
    Unspecified = 0,
    Float32 = 1,
    Int64 = 2,
    Int32 = 3,
    Bfloat16 = 4,
}

#[derive(Clone, PartialEq, Message)]
struct Tensor {
    #[prost(bytes = "vec", optional, tag = "1")]
    dense: Option<Vec<u8>>,
    #[prost(enumeration = "DType", tag = "3")]
    dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct ForwardBackwardOutput {
    #[prost(message, repeated, tag = "2")]
    loss_fn_outputs: Vec<ArrayRecord>,
    #[prost(btree_map = "string, double", tag = "3")]
    metrics: BTreeMap<String, f64>,
}

/// Several data, field by field.
#[derive(Clone, PartialEq, Message)]
struct ArrayRecord {
    #[prost(btree_map = "string, message", tag = "2")]
    fields: BTreeMap<String, BatchedTensor>,
    #[prost(int64, tag = "3")]
    num_datums: i64,
}

#[derive(Clone, PartialEq, Message)]
struct BatchedTensor {
    #[prost(bytes = "vec", tag = "1")]
    data: Vec<u8>,
    /// int64: where each datum's bytes begin, and where the last one's end.
    #[prost(bytes = "vec", tag = "2")]
    offsets: Vec<u8>,
    #[prost(enumeration = "DType", tag = "3")]
    dtype: i32,
}

#[derive(Clone, PartialEq, Message)]
struct SampleResponse {
    #[prost(message, repeated, tag = "1")]
    sequences: Vec<SampledSequence>,
    /// float32; not a number where there is none.
    #[prost(bytes = "vec", optional, tag = "2")]
    prompt_logprobs: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct SampledSequence {
    /// 0: at one of `stop`; 1: at the limit.
    #[prost(int32, tag = "1")]
    stop_reason: i32,
    #[prost(bytes = "vec", tag = "2")]
    tokens: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "3")]
    logprobs: Option<Vec<u8>>,
}

/// # Errors
/// Numbers that the messages have no room for.
pub(super) fn request(
    model_id: &str,
    seq_id: u64,
    input: &ForwardBackwardInput,
    forward_only: bool,
) -> Result<Vec<u8>> {
    let datum = |datum: &wire::Datum| -> Result<Datum> {
        let chunk = |chunk: &Chunk| -> Result<ModelInputChunk> {
            let one = match chunk {
                Chunk::EncodedText { tokens } => One::EncodedText(EncodedText { tokens: int32s(tokens)? }),
                Chunk::Image { data, format, expected_tokens } => One::Image(Image {
                    data: data.to_vec(),
                    format: (*format).into(),
                    expected_tokens: Some(i32::try_from(*expected_tokens)?),
                }),
            };
            Ok(ModelInputChunk { chunk: Some(one) })
        };
        let model_input = datum.model_input.chunks.iter().map(chunk).collect::<Result<_>>()?;
        let tensor = |(name, tensor): (&&str, &wire::Tensor)| ((*name).to_owned(), tensor_of(tensor));
        Ok(Datum { model_input, loss_fn_inputs: datum.loss_fn_inputs.iter().map(tensor).collect() })
    };
    let message = ForwardBackwardRequest {
        model_id: model_id.into(),
        seq_id: i32::try_from(seq_id)?,
        data: input.data.iter().map(datum).collect::<Result<_>>()?,
        loss_fn: input.loss_fn.into(),
        forward_only,
    };
    Ok(message.encode_to_vec())
}

fn int32s(ids: &[u32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(4 * ids.len());
    for id in ids {
        bytes.extend(i32::try_from(*id)?.to_le_bytes());
    }
    Ok(bytes)
}

fn tensor_of(tensor: &wire::Tensor) -> Tensor {
    let (dense, dtype, shape) = match tensor {
        wire::Tensor::Ids { data, shape } => {
            (data.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect(), DType::Int64, shape)
        }
        wire::Tensor::Numbers { data, shape } => {
            (data.iter().flat_map(|number| number.to_le_bytes()).collect(), DType::Float32, shape)
        }
    };
    Tensor { dense: Some(dense), dtype: dtype.into(), shape: shape.iter().map(|&n| n as i64).collect() }
}

/// The result of a pass.
///
/// # Errors
/// What is no such result, or one without log-probs.
pub(super) fn passed(body: &[u8]) -> Result<Passed> {
    let read = ForwardBackwardOutput::decode(body).context("reading the result of a forward pass")?;
    let mut logprobs = Vec::new();
    for record in &read.loss_fn_outputs {
        let Some(field) = record.fields.get("logprobs") else {
            bail!("the result of a forward pass has log-probs for 0 of {} sequences", record.num_datums);
        };
        let numbers = floats(&field.data, field.dtype)?;
        let width = field.data.len() / numbers.len().max(1);
        let (offsets, rest) = field.offsets.as_chunks::<8>();
        let offsets: Vec<usize> =
            offsets.iter().map(|at| usize::try_from(i64::from_le_bytes(*at))).collect::<Result<_, _>>()?;
        let ordered = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
        ensure!(
            rest.is_empty() && ordered && offsets.last().is_none_or(|&end| end <= field.data.len()),
            "the result of a forward pass is damaged: its offsets leave its {} bytes",
            field.data.len()
        );
        logprobs
            .extend(offsets.windows(2).map(|pair| numbers[pair[0] / width.max(1)..pair[1] / width.max(1)].to_vec()));
    }
    Ok(Passed { logprobs, metrics: read.metrics })
}

/// The result of `asample`.
///
/// # Errors
/// What is no such result.
pub(super) fn sampled(body: &[u8]) -> Result<Sampled> {
    let read = SampleResponse::decode(body).context("reading what the server sampled")?;
    let sequence = |sequence: SampledSequence| -> Result<wire::Sequence> {
        let stop_reason = match sequence.stop_reason {
            0 => StopReason::Stop,
            1 => StopReason::Length,
            other => bail!("the server stopped for a reason of number {other}, which this program does not know"),
        };
        let (tokens, rest) = sequence.tokens.as_chunks::<4>();
        ensure!(rest.is_empty(), "what the server sampled is damaged: {} bytes of tokens", sequence.tokens.len());
        let id = |bytes: &[u8; 4]| u32::try_from(i32::from_le_bytes(*bytes)).context("a token of a negative number");
        // Absent, or there and empty: not told, where there are tokens.
        let told = sequence.logprobs.filter(|bytes| !bytes.is_empty() || tokens.is_empty());
        let logprobs = told.map(|bytes| floats(&bytes, DType::Float32.into())).transpose()?;
        Ok(wire::Sequence { stop_reason, tokens: tokens.iter().map(id).collect::<Result<_>>()?, logprobs })
    };
    let told = read.prompt_logprobs.filter(|bytes| !bytes.is_empty());
    let prompt = told.map(|bytes| floats(&bytes, DType::Float32.into())).transpose()?;
    Ok(Sampled {
        sequences: read.sequences.into_iter().map(sequence).collect::<Result<_>>()?,
        prompt_logprobs: prompt.map(|all| all.into_iter().map(|one| (!one.is_nan()).then_some(one)).collect()),
    })
}

fn floats(bytes: &[u8], dtype: i32) -> Result<Vec<f32>> {
    let (whole, numbers): (bool, Vec<f32>) = match DType::try_from(dtype) {
        Ok(DType::Float32) => {
            let (numbers, rest) = bytes.as_chunks::<4>();
            (rest.is_empty(), numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        Ok(DType::Bfloat16) => {
            let (numbers, rest) = bytes.as_chunks::<2>();
            let wide = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            (rest.is_empty(), numbers.iter().map(wide).collect())
        }
        other => bail!("the server sends log-probs as {other:?}, expected float32 or bfloat16"),
    };
    ensure!(whole, "the server's numbers are damaged: {} bytes", bytes.len());
    Ok(numbers)
}

/// Bytes that the `tinker` SDK 0.38 wrote (`forward_backward_request_to_proto` and its message classes, deterministic).
#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().map(|c| (c as char).to_digit(16).unwrap() as u8).collect();
        digits.as_chunks::<2>().0.iter().map(|[high, low]| high << 4 | low).collect()
    }

    #[test]
    fn a_request_is_the_one_that_the_sdk_sends() {
        let sent = concat!(
            "0a016d10031a640a0c0a0a0a0807000000080000000a0e120c0a030102031203706e67180412280a0d7461726765745f746f6b656e7312170a1008",
            "0000000000000000000000000000001802220102121a0a0777656967687473120f0a0800000000cdccccbd1801220102220d63726f73735f656e74",
            "726f7079"
        );
        let input = ForwardBackwardInput::example();
        assert_eq!(request("m", 3, &input, false).unwrap(), bytes(sent));
        assert_eq!(request("m", 3, &input, true).unwrap(), bytes(&format!("{sent}3001")));
    }

    #[test]
    fn results_are_read_as_the_sdk_reads_them() {
        let of_pass = bytes(concat!(
            "0a0d783a41727261795265636f7264126f0a016112300a10656c656d656e74776973655f6c6f7373121c1218000000000000000000000000000000",
            "000000000000000000180112360a086c6f6770726f6273122a0a0c000080bf000000c0000060c01218000000000000000004000000000000000c00",
            "00000000000018011802122a12260a086c6f6770726f6273121a0a0480bf40c0121000000000000000000400000000000000180418011a130a086c",
            "6f73733a73756d11000000000000f83f"
        ));
        let read = passed(&of_pass).unwrap();
        assert_eq!(read.logprobs, [vec![-1.0], vec![-2.0, -3.5], vec![-1.0, -3.0]]);
        assert_eq!(read.metrics["loss:sum"], 1.5);
        let of_samples =
            bytes("0a160801120805000000060000001a08000000bf000080be0a0612040900000012080000c07f0000c0bf2001");
        let Sampled { sequences, prompt_logprobs } = sampled(&of_samples).unwrap();
        assert_eq!((&sequences[0].tokens[..], sequences[0].stop_reason), (&[5, 6][..], StopReason::Length));
        assert_eq!(
            (sequences[0].logprobs.as_deref(), prompt_logprobs),
            (Some(&[-0.5, -0.25][..]), Some(vec![None, Some(-1.5)]))
        );
        assert_eq!((&sequences[1].tokens[..], sequences[1].stop_reason), (&[9][..], StopReason::Stop));
        assert!(sequences[1].logprobs.is_none());
    }

    /// Whatever a server sends is read, or refused in words.
    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let field = |data: Vec<u8>, offsets: &[i64], dtype: i32| {
            let offsets = offsets.iter().flat_map(|at| at.to_le_bytes()).collect();
            let logprobs = BTreeMap::from([("logprobs".to_owned(), BatchedTensor { data, offsets, dtype })]);
            let record = ArrayRecord { fields: logprobs, num_datums: 1 };
            passed(&ForwardBackwardOutput { loss_fn_outputs: vec![record], metrics: BTreeMap::new() }.encode_to_vec())
        };
        assert_eq!(field(Vec::new(), &[0, 0], 1).unwrap().logprobs, [Vec::<f32>::new()]);
        for (data, offsets, dtype) in [
            (vec![0; 8], &[0, 12][..], 1),
            (vec![0; 8], &[8, 0], 1),
            (vec![0; 8], &[-4, 4], 1),
            (vec![0; 7], &[0, 4], 1),
            (vec![0; 8], &[0, 8], 2),
            (vec![0; 8], &[0, 8], 77),
        ] {
            assert!(field(data, offsets, dtype).is_err(), "{offsets:?} {dtype}");
        }
        let good = bytes("0a160801120805000000060000001a08000000bf000080be0a0612040900000012080000c07f0000c0bf2001");
        for end in 0..good.len() {
            let _ = (sampled(&good[..end]), passed(&good[..end]));
        }
        let record = ArrayRecord { fields: BTreeMap::new(), num_datums: 2 };
        let bare = ForwardBackwardOutput { loss_fn_outputs: vec![record], metrics: BTreeMap::new() }.encode_to_vec();
        assert!(passed(&bare).unwrap_err().to_string().contains("0 of 2"));
    }
}
