//! What a config says of a server: `[engine]` with `kind = "tinker"`.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::config::BadConfig;
use crate::engine::ModelOptions;

/// The loss that carries an objective's derivatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// `sum of -weight · logprob`.
    CrossEntropy,
    /// `sum of -exp(logprob - own logprob) · advantage`, whose ratio is 1.
    ImportanceSampling,
}

/// How a server adds up the losses of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// All of an update, as the protocol means it.
    Sum,
    /// Over a sequence divided by the sum of its weights, then the mean over the sequences of an update: SkyRL's JAX backend.
    SequenceMean,
}

/// How passes and their results are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    Json,
    /// A tenth of the bytes; newer servers know it, and some take nothing else.
    Protobuf,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The server's address.
    pub url: String,
    /// The model as the server names it; `model.path` is a folder with its tokenizer, template and configs.
    pub base_model: String,
    /// 0 trains all weights, where the server can.
    pub lora_rank: usize,
    /// The environment variable that holds the key; unset, none is sent.
    pub api_key_env: String,
    /// Begin from a saved state of the server (`tinker://...`) instead of the base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    pub loss: Loss,
    /// Unset, the loss that the server reports must show that it sums.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduction: Option<Reduction>,
    pub encoding: Encoding,
    /// Requests for samples under way at once.
    pub max_in_flight: usize,
    /// Sequences go in requests of about this size; one that is larger goes alone.
    pub max_request_mib: f64,
    /// Of one call, from connecting to the last byte.
    pub timeout_s: f64,
    /// The pause before a second attempt; it doubles with each one after.
    pub pause_s: f64,
    /// How long the server may be away before the run ends.
    pub patience_s: f64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            url: String::new(),
            base_model: String::new(),
            lora_rank: 32,
            api_key_env: "TINKER_API_KEY".into(),
            state: None,
            loss: Loss::CrossEntropy,
            reduction: None,
            encoding: Encoding::Json,
            max_in_flight: 256,
            max_request_mib: 5.0,
            timeout_s: 60.0,
            pause_s: 1.0,
            patience_s: 600.0,
        }
    }
}

impl Options {
    /// # Errors
    /// What is missing or cannot work, named.
    pub fn validate(&self) -> Result<()> {
        for (key, value, example) in [
            ("url", &self.url, "http://localhost:8000"),
            ("base_model", &self.base_model, "Qwen/Qwen2.5-VL-7B-Instruct"),
        ] {
            if value.trim().is_empty() {
                bail!(BadConfig(format!(
                    "engine.{key} is missing; kind = \"tinker\" needs it, for instance {example:?}"
                )));
            }
        }
        for (key, value) in [("max_request_mib", self.max_request_mib), ("timeout_s", self.timeout_s)] {
            if !(value.is_finite() && value > 0.0 && value < 1e9) {
                bail!(BadConfig(format!("engine.{key} = {value}: expected a number above 0")));
            }
        }
        for (key, value) in [("pause_s", self.pause_s), ("patience_s", self.patience_s)] {
            if !(0.0..1e9).contains(&value) {
                bail!(BadConfig(format!("engine.{key} = {value}: expected a number of seconds, at least 0")));
            }
        }
        if self.max_in_flight == 0 {
            bail!(BadConfig("engine.max_in_flight is 0; nothing could be asked".into()));
        }
        if self.state.as_ref().is_some_and(|state| !state.starts_with("tinker://")) {
            bail!(BadConfig(format!(
                "engine.state = {:?}: expected a path such as tinker://MODEL/weights/NAME",
                self.state
            )));
        }
        // Sum w / max(sum w, 1e-9): the weights of an objective have both signs, and their sum may be 0 or less.
        if self.loss == Loss::CrossEntropy && self.reduction == Some(Reduction::SequenceMean) {
            bail!(BadConfig(
                "engine.reduction = \"sequence_mean\" divides by the sum of the weights, which cannot carry weights of both signs; \
                 add engine.loss = \"importance_sampling\""
                    .into()
            ));
        }
        Ok(())
    }

    /// # Errors
    /// Those of [`Options::validate`], and what the protocol cannot do of what the rest of the config asks.
    pub fn validate_for(&self, model: &ModelOptions, temperature: f32, entropy_coef: f64) -> Result<()> {
        self.validate()?;
        if model.lora.is_some() {
            bail!(BadConfig(
                "model.lora is for engines that train here; a server's adapters are engine.lora_rank".into()
            ));
        }
        if !model.freeze.is_empty() {
            bail!(BadConfig(
                "model.freeze is for engines that train here; a server decides itself what it trains".into()
            ));
        }
        if temperature != 1.0 {
            bail!(BadConfig(format!(
                "rollout.temperature = {temperature}: the protocol computes log-probs at temperature 1, so training through it samples at 1"
            )));
        }
        if entropy_coef != 0.0 {
            bail!(BadConfig(format!(
                "objective.entropy_coef = {entropy_coef}: the protocol carries no weights of entropies; set it to 0"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_named() {
        let good = Options { url: "http://h".into(), base_model: "m".into(), ..Options::default() };
        good.validate().unwrap();
        for (bad, word) in [
            (Options { url: " ".into(), ..good.clone() }, "engine.url"),
            (Options { base_model: String::new(), ..good.clone() }, "engine.base_model"),
            (Options { timeout_s: 0.0, ..good.clone() }, "engine.timeout_s"),
            (Options { patience_s: f64::NAN, ..good.clone() }, "engine.patience_s"),
            (Options { max_in_flight: 0, ..good.clone() }, "engine.max_in_flight"),
            (Options { state: Some("runs/x".into()), ..good.clone() }, "engine.state"),
            (Options { reduction: Some(Reduction::SequenceMean), ..good.clone() }, "importance_sampling"),
        ] {
            let error = bad.validate().unwrap_err();
            assert!(error.is::<BadConfig>() && error.to_string().contains(word), "{error}");
        }
    }
}
