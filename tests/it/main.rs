//! Tests of the whole program, in one binary. Each module says which promise it holds.

mod agreement;
mod ask;
mod bad_input;
mod cli;
mod formats;
mod learns;
mod lora;
mod openai;
mod parity;
mod protocols;
mod resume;
mod rollout;
mod served;
mod teacher;
mod tinker;
mod tiny;
#[cfg(feature = "torch")]
mod torch;
mod vllm;
