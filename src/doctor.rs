//! `foveate doctor`: what this machine has, and what a config will need, before anything is loaded.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::commands::gib;
use crate::config;
use crate::engine::embedded;
use crate::eval;
use crate::model::{Config, Trainable, presets};
use crate::rl;
use crate::rollout;
use crate::run::Environment;
use crate::sft;
use crate::tasks::crop;

pub fn main(path: Option<&Path>, as_json: bool) -> Result<()> {
    let machine = Environment::now();
    let backends = json!({"embedded": true});
    let simd = instruction_sets();
    let need = match path {
        Some(path) => Some(needs(path)?),
        None => None,
    };
    if as_json {
        println!("{}", json!({"machine": machine, "instruction_sets": simd, "engines": backends, "needs": need}));
        return Ok(());
    }
    println!("processor         {}", machine.cpu);
    println!("instruction sets  {}", simd.join(" "));
    println!("threads           {}", rayon::current_num_threads());
    println!("memory            {}", machine.memory.map_or("unknown".into(), gib));
    println!("engines           embedded (CPU)");
    if let Some(need) = need {
        println!("\n{}", path.map(|p| p.display().to_string()).unwrap_or_default());
        for key in ["weights", "training_state", "reference", "activations", "cache", "pictures", "total"] {
            if let Some(bytes) = need[key].as_u64() {
                println!("{key:17} {}", gib(bytes));
            }
        }
        let room = machine.memory.unwrap_or(u64::MAX) as f64;
        if need["total"].as_f64().unwrap_or(0.0) > 0.9 * room {
            println!(
                "\nThis will not fit. Set model.recompute = true, lower model.micro_batch_tokens or the pixel budget, or freeze parts of the model."
            );
        }
    }
    Ok(())
}

/// Rough sizes in bytes of what a config holds at its peak. Which kind of run it is, its sections say.
fn needs(path: &Path) -> Result<Value> {
    let sections: toml::Table = config::load(path, &[])?;
    if sections.contains_key("tasks") {
        let plan: eval::Plan = config::load(path, &[])?;
        let memory = presets::memory(&Config::load(&plan.model.path)?, Trainable::ALL);
        let episode = plan.tasks.values().map(|task| episode_rows(task, &plan.rollout)).max().unwrap_or(0);
        let cache = memory.cache_bytes_per_row * episode * (plan.eval.batch * plan.eval.samples) as u64;
        return Ok(sum(&[
            ("weights", memory.weights_bytes),
            ("cache", cache),
            ("pictures", plan.model.picture_cache_mib << 20),
        ]));
    }
    if !sections.contains_key("task") {
        let plan: sft::Plan = config::load(path, &[])?;
        let memory = presets::memory(&Config::load(&plan.model.path)?, plan.model.trainable()?);
        return Ok(sum(&[
            ("weights", memory.weights_bytes),
            ("training_state", memory.training_bytes),
            ("activations", activations(&plan.model, &memory)?),
        ]));
    }
    let plan: rl::Plan = config::load::<rl::Plan>(path, &[])?.resolve()?;
    let model = Config::load(&plan.model.path)?;
    let memory = presets::memory(&model, plan.model.trainable()?);
    let objective = plan.objective()?;
    let reference = if objective.needs_reference() { 4 * memory.trained as u64 } else { 0 };
    let episodes = (plan.train.prompts * plan.train.group) as u64;
    let cache = memory.cache_bytes_per_row * episode_rows(&plan.task, &plan.rollout) * episodes;
    Ok(sum(&[
        ("weights", memory.weights_bytes),
        ("training_state", memory.training_bytes),
        ("reference", reference),
        ("activations", activations(&plan.model, &memory)?),
        ("cache", cache),
        ("pictures", plan.model.picture_cache_mib << 20),
    ]))
}

/// Tokens of the longest conversation.
fn episode_rows(task: &crop::Options, rollout: &rollout::Options) -> u64 {
    ((task.max_pixels / 784) + rollout.max_new_tokens as u64) * task.turns as u64
}

/// Bytes that one forward pass keeps for its backward pass.
fn activations(options: &embedded::Options, memory: &presets::Memory) -> Result<u64> {
    let rows = options.micro_batch_tokens as u64;
    let per_row = if options.recompute { memory.recompute_bytes_per_row } else { memory.tape_bytes_per_row };
    // An image token is four patches; at most every row is one.
    let patches = if options.trainable()?.tower() { 4 * rows * memory.tape_bytes_per_patch } else { 0 };
    Ok(rows * per_row + patches)
}

/// The parts and their total. Sampling and learning alternate: the cache is gone when activations are kept.
fn sum(parts: &[(&str, u64)]) -> Value {
    let part = |name: &str| parts.iter().find(|(n, _)| *n == name).map_or(0, |(_, bytes)| *bytes);
    let total: u64 = parts.iter().map(|(_, bytes)| bytes).sum::<u64>() - part("cache").min(part("activations"));
    let mut out: serde_json::Map<String, Value> = parts.iter().map(|(k, b)| ((*k).to_owned(), json!(b))).collect();
    out.insert("total".into(), json!(total));
    Value::Object(out)
}

/// What the kernels will choose from on this processor.
fn instruction_sets() -> Vec<&'static str> {
    #[allow(unused_mut)]
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        for (name, there) in [
            ("avx2", std::is_x86_feature_detected!("avx2")),
            ("fma", std::is_x86_feature_detected!("fma")),
            ("avx512f", std::is_x86_feature_detected!("avx512f")),
            ("avx512bf16", std::is_x86_feature_detected!("avx512bf16")),
        ] {
            if there {
                found.push(name);
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}
