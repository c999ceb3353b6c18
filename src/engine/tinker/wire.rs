//! What goes over the wire as JSON: the fields of the Tinker API as its servers read them.
//!
//! Read in NovaSky-AI/SkyRL (`skyrl/tinker/api.py`, a9564572) and in the types of the `tinker` SDK (thinking-machines-lab/tinker, d595dc2).
//! Requests hold the SDK's fields and no others, because its types forbid extra ones; of replies only what is needed is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize, Serializer};

/// A piece of a prompt.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Chunk {
    EncodedText {
        tokens: Vec<u32>,
    },
    Image {
        #[serde(serialize_with = "base64")]
        data: Arc<Vec<u8>>,
        format: &'static str,
        /// Advisory by the protocol; SkyRL refuses a request whose picture has another number.
        expected_tokens: usize,
    },
}

fn base64<S: Serializer>(data: &Arc<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(data.as_slice()))
}

#[derive(Clone, Debug, Serialize)]
pub struct ModelInput {
    pub chunks: Vec<Chunk>,
}

/// A vector and its type.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "dtype")]
pub enum Tensor {
    #[serde(rename = "int64")]
    Ids { data: Vec<u32>, shape: [usize; 1] },
    #[serde(rename = "float32")]
    Numbers { data: Vec<f32>, shape: [usize; 1] },
}

impl Tensor {
    pub fn ids(data: Vec<u32>) -> Tensor {
        Tensor::Ids { shape: [data.len()], data }
    }

    pub fn numbers(data: Vec<f32>) -> Tensor {
        Tensor::Numbers { shape: [data.len()], data }
    }
}

/// One sequence: all but its last token go in, and `target_tokens` are all but its first.
#[derive(Clone, Debug, Serialize)]
pub struct Datum {
    pub model_input: ModelInput,
    pub loss_fn_inputs: BTreeMap<&'static str, Tensor>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ForwardBackwardInput {
    pub data: Vec<Datum>,
    pub loss_fn: &'static str,
}

#[derive(Debug, Serialize)]
pub struct Forward<'a> {
    pub model_id: &'a str,
    pub seq_id: u64,
    pub forward_input: &'a ForwardBackwardInput,
}

#[derive(Debug, Serialize)]
pub struct ForwardBackward<'a> {
    pub model_id: &'a str,
    pub seq_id: u64,
    pub forward_backward_input: &'a ForwardBackwardInput,
}

#[derive(Debug, Serialize)]
pub struct Sample<'a> {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub sampling_session_id: &'a str,
    pub seq_id: u64,
    pub num_samples: usize,
    pub prompt: ModelInput,
    pub sampling_params: SamplingParams,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prompt_logprobs: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct SamplingParams {
    pub max_tokens: usize,
    /// Sample i of a request is drawn with seed + i.
    pub seed: u64,
    /// Ids, never texts: a token that ends a turn is kept by every server, the handling of texts differs.
    pub stop: Vec<u32>,
    pub temperature: f32,
    /// -1 is no limit.
    pub top_k: i64,
    pub top_p: f32,
}

#[derive(Debug, Serialize)]
pub struct AdamParams {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// 0 does not clip.
    pub grad_clip_norm: f64,
}

/// The result of `asample`.
#[derive(Debug, Deserialize)]
pub struct Sampled {
    pub sequences: Vec<Sequence>,
    #[serde(default)]
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Sequence {
    pub stop_reason: StopReason,
    pub tokens: Vec<u32>,
    #[serde(default)]
    pub logprobs: Option<Vec<f32>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// At `max_tokens`.
    Length,
    /// At one of `stop`.
    Stop,
}

/// The result of `forward` and `forward_backward`.
#[derive(Debug, Default, PartialEq)]
pub struct Passed {
    /// Of each datum, one a target token.
    pub logprobs: Vec<Vec<f32>>,
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct PassedJson {
    loss_fn_outputs: Vec<BTreeMap<String, TensorJson>>,
    #[serde(default)]
    metrics: BTreeMap<String, Option<f64>>,
}

#[derive(Deserialize)]
struct TensorJson {
    data: Vec<f32>,
}

impl Passed {
    /// # Errors
    /// What is no such result, or one without log-probs.
    pub fn from_json(body: &[u8]) -> Result<Passed> {
        let read: PassedJson = serde_json::from_slice(body).context("reading the result of a forward pass")?;
        let n = read.loss_fn_outputs.len();
        let logprobs: Vec<Vec<f32>> =
            read.loss_fn_outputs.into_iter().filter_map(|mut out| Some(out.remove("logprobs")?.data)).collect();
        ensure!(
            logprobs.len() == n,
            "the result of a forward pass has log-probs for {} of {n} sequences",
            logprobs.len()
        );
        Ok(Passed { logprobs, metrics: numbers(read.metrics) })
    }
}

/// The result of `optim_step`: its metrics, those that are numbers.
///
/// # Errors
/// What is no such result.
pub fn stepped(body: &[u8]) -> Result<BTreeMap<String, f64>> {
    #[derive(Deserialize)]
    struct Stepped {
        #[serde(default)]
        metrics: Option<BTreeMap<String, Option<f64>>>,
    }
    let read: Stepped = serde_json::from_slice(body).context("reading the result of an optimiser step")?;
    Ok(numbers(read.metrics.unwrap_or_default()))
}

fn numbers(metrics: BTreeMap<String, Option<f64>>) -> BTreeMap<String, f64> {
    // What is not finite is null in JSON.
    metrics.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect()
}

/// A metric by its name, which servers lengthen in front (`skyrl.ai/grad_norm`) and behind (`loss:sum`).
pub fn metric(metrics: &BTreeMap<String, f64>, names: &[&str]) -> Option<f64> {
    let bare = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    metrics.iter().find(|(name, _)| names.contains(&bare(name).as_str())).map(|(_, value)| *value)
}

#[cfg(test)]
impl ForwardBackwardInput {
    /// A sequence of two words and a picture, for tests of how it is written.
    pub(super) fn example() -> ForwardBackwardInput {
        let image = Chunk::Image { data: Arc::new(vec![1, 2, 3]), format: "png", expected_tokens: 4 };
        ForwardBackwardInput {
            data: vec![Datum {
                model_input: ModelInput { chunks: vec![Chunk::EncodedText { tokens: vec![7, 8] }, image] },
                loss_fn_inputs: BTreeMap::from([
                    ("target_tokens", Tensor::ids(vec![8, 0])),
                    ("weights", Tensor::numbers(vec![0.0, -0.1])),
                ]),
            }],
            loss_fn: "cross_entropy",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_have_the_fields_of_the_sdk() {
        let input = ForwardBackwardInput::example();
        let sent = ForwardBackward { model_id: "m", seq_id: 3, forward_backward_input: &input };
        assert_eq!(
            serde_json::to_value(sent).unwrap(),
            json!({"model_id": "m", "seq_id": 3, "forward_backward_input": {"loss_fn": "cross_entropy", "data": [{
                "model_input": {"chunks": [
                    {"type": "encoded_text", "tokens": [7, 8]},
                    {"type": "image", "data": "AQID", "format": "png", "expected_tokens": 4},
                ]},
                "loss_fn_inputs": {
                    "target_tokens": {"dtype": "int64", "data": [8, 0], "shape": [2]},
                    "weights": {"dtype": "float32", "data": [0.0, -0.1f32], "shape": [2]},
                },
            }]}})
        );
        // Shortest digits that read back as the same f32, so nothing is lost on the way.
        assert!(serde_json::to_string(&input).unwrap().contains("[0.0,-0.1]"));
    }

    #[test]
    fn results_are_read_with_what_other_servers_add() {
        let body = json!({"loss_fn_output_type": "scalar", "type": "x", "metrics": {"total_loss:sum": 1.5, "odd": null},
                          "loss_fn_outputs": [{"logprobs": {"data": [-1.0, 0], "dtype": "float32", "shape": [2]},
                                               "elementwise_loss": {"data": [0.0, 0.0]}}]});
        let passed = Passed::from_json(body.to_string().as_bytes()).unwrap();
        assert_eq!(passed.logprobs, [[-1.0, 0.0]]);
        assert_eq!(metric(&passed.metrics, &["loss:sum", "total_loss:sum"]), Some(1.5));
        assert!(passed.metrics["odd"].is_nan());
        let error = Passed::from_json(br#"{"loss_fn_outputs": [{}]}"#).unwrap_err().to_string();
        assert!(error.contains("0 of 1"), "{error}");
        let step = stepped(br#"{"metrics": {"skyrl.ai/grad_norm": 0.25}}"#).unwrap();
        assert_eq!(metric(&step, &["grad_norm"]), Some(0.25));
        assert!(stepped(br#"{"metrics": null}"#).unwrap().is_empty());
    }
}
