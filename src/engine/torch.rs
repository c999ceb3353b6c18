//! The engine on LibTorch (cargo feature `torch`): the same model on a GPU, or on the CPU as a second opinion.
//!
//! Weights, checkpoints, positions, packing and the words of the config (`[model]`: `freeze`, `lora`, `compute`, `recompute`, `micro_batch_tokens`) are
//! those of the embedded engine; gradients come from LibTorch's autograd, attention from its own kernels. `torch/net.rs` is the model,
//! `torch/attention.rs` who sees whom, `torch/speech.rs` sampling, `torch/engine.rs` what the loop asks for. What must stay true: a checkpoint of either engine
//! opens and goes on in the other; sampling's log-probs are never taken for the trainer's, which computes in another order.

#[cfg(feature = "torch")]
mod attention;
#[cfg(feature = "torch")]
mod engine;
#[cfg(feature = "torch")]
mod net;
#[cfg(feature = "torch")]
mod speech;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::BadConfig;
#[cfg(feature = "torch")]
pub use engine::Torch;

/// `[engine]` with `kind = "torch"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl Default for Options {
    fn default() -> Options {
        Options { device: "cuda".into() }
    }
}

impl Options {
    /// # Errors
    /// A device that is none; a program that was built without LibTorch.
    pub fn validate(&self) -> Result<()> {
        self.device()?;
        #[cfg(not(feature = "torch"))]
        anyhow::bail!(BadConfig(
            "engine.kind = \"torch\": this program was built without LibTorch; docs/cluster.md says how to build it with --features torch".into()
        ));
        #[cfg(feature = "torch")]
        Ok(())
    }

    /// The number of a CUDA device; `None` is the CPU.
    fn device(&self) -> Result<Option<usize>> {
        let number = match self.device.as_str() {
            "cpu" => return Ok(None),
            "cuda" => Some(0),
            other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()),
        };
        let number = number.ok_or_else(|| {
            BadConfig(format!("engine.device = {:?}: expected \"cpu\", \"cuda\" or \"cuda:N\"", self.device))
        })?;
        Ok(Some(number))
    }
}

/// Without autograd's graph, also where it ends in a panic.
#[cfg(feature = "torch")]
fn no_grad<T>(work: impl FnOnce() -> T) -> T {
    let _guard = tch::no_grad_guard();
    work()
}

/// The devices that LibTorch sees; none where the program was built without it.
pub fn devices() -> Vec<String> {
    #[cfg(feature = "torch")]
    return engine::devices();
    #[cfg(not(feature = "torch"))]
    Vec::new()
}

/// Does something in which LibTorch may fail, which tch tells by a panic: that becomes an error, and is not printed.
#[cfg(feature = "torch")]
fn guarded<T>(doing: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    use std::any::Any;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};
    use std::sync::Once;
    static HOOK: Once = Once::new();
    fn text(panic: &(dyn Any + Send)) -> Option<&str> {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        // As tch's errors look when they are unwrapped.
        Some(text?.split_once("Torch(\"")?.1)
    }
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            if text(panic.payload()).is_none() {
                usual(panic);
            }
        }));
    });
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let Some(said) = text(&*panic) else { resume_unwind(panic) };
        // Behind the first line stand the addresses of its own functions.
        let said = said.split("\\n").next().unwrap_or(said).trim();
        let advice = match said.contains("out of memory") {
            true => "; lower model.micro_batch_tokens, set model.recompute = true, train adapters ([model.lora]) or ask for fewer prompts in a step",
            false => "",
        };
        anyhow::bail!("{doing}: LibTorch says {said:?}{advice}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_torch_names_them() {
        let device = |name: &str| Options { device: name.into() }.device();
        for (name, number) in [("cpu", None), ("cuda", Some(0)), ("cuda:3", Some(3))] {
            assert_eq!(device(name).unwrap(), number);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "CPU"] {
            let error = device(name).unwrap_err();
            assert!(error.is::<BadConfig>() && error.to_string().contains("cuda:N"), "{error}");
        }
    }

    #[cfg(not(feature = "torch"))]
    #[test]
    fn without_libtorch_it_says_how_to_get_it() {
        let error = Options::default().validate().unwrap_err();
        assert!(error.is::<BadConfig>() && error.to_string().contains("--features torch"), "{error}");
    }
}
