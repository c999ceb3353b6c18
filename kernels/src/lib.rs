//! The numeric operations of the Qwen2.5-VL family on the CPU, each with an explicit forward and backward.
//!
//! Every function works on flat row-major `f32` slices with explicit sizes; there is no tensor type and no tape. Weights of forward
//! passes may also be bf16 as they lie in a file ([`matrix::Matrix`]), with the same bits in the result.
//! Letters in the `# Shapes` sections: B sequences, T tokens, V vocabulary, D hidden, H heads, K per head,
//! P patches; N and M are the output and input width of a matrix.
//!
//! What must stay true:
//! - **Row invariance.** The numbers of one row (a token, a patch, a query) have the same bits however many other
//!   rows share the call, wherever the row stands, and however many threads run. Sampling (few rows, cached keys)
//!   and training (many rows, packed) therefore agree exactly. Each file says which order of summation it fixes.
//! - **Gradients of parameters accumulate** (`+=`), gradients of inputs are written (`=`) unless a flag says otherwise.
//! - A wrong slice length is a programming error and panics with the lengths in its message.
//!
//! Work is spread over the current rayon pool; results do not depend on its size. Instruction sets are chosen at run time.

pub mod adamw;
pub mod attention;
pub mod embed;
pub mod linear;
pub mod logprob;
pub mod matrix;
pub mod memory;
pub mod mlp;
pub mod norm;
pub mod rope;
pub mod sample;

#[cfg(test)]
mod oracle;
pub mod pairs;
mod panel;
mod threads;
mod vector;
