//! `foveate doctor`: what this machine has, and what a config will need, before anything is loaded.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use foveate_kernels::pairs;

use crate::commands::gib;
use crate::config;
use crate::data::{ReadAs, Sample};
use crate::engine::{self, torch, vllm};
use crate::eval;
use crate::image::Processor;
use crate::need::{self, Need};
use crate::progress;
use crate::rl;
use crate::run::Environment;
use crate::sft;
use crate::tasks::Options as TaskOptions;

pub fn main(path: Option<&Path>, overrides: &[String], as_json: bool) -> Result<()> {
    let machine = Environment::now();
    let backends = json!({"embedded": true});
    let simd = instruction_sets();
    let need = match path {
        Some(path) => needs(path, overrides)?,
        None => None,
    };
    if as_json {
        println!(
            "{}",
            json!({"machine": machine, "instruction_sets": simd, "engines": backends, "needs": need.as_ref().map(Need::to_json)})
        );
        return Ok(());
    }
    println!("processor         {}", machine.cpu);
    println!("instruction sets  {}", simd.join(" "));
    let tiles = if pairs::fast() {
        "faster than f32 (model.compute: bf16, bf16x6)"
    } else {
        "no faster than f32: no tiles (Intel AMX)"
    };
    println!("products in bf16  {tiles}");
    println!("threads           {}", rayon::current_num_threads());
    println!("memory            {}", machine.memory.map_or("unknown".into(), gib));
    println!("engines           {}", engines().join(", "));
    if let Some(need) = need {
        println!("\n{}", path.map(|p| p.display().to_string()).unwrap_or_default());
        for (name, bytes) in need.parts().into_iter().filter(|(_, bytes)| *bytes > 0) {
            println!("{:17} {}", name.replace('_', " "), gib(bytes));
        }
        let left = Environment::memory_left().unwrap_or(u64::MAX);
        println!("can be had        {}", gib(left));
        if need.total() > left {
            println!("\nThis will not fit. {}.", need.advice());
        }
    }
    Ok(())
}

/// What a config holds at its peak; nothing to speak of where a server holds the weights. Which kind of run it is, its sections say.
fn needs(path: &Path, overrides: &[String]) -> Result<Option<Need>> {
    let sections: toml::Table = config::load(path, overrides)?;
    let command = config::command_of(&sections);
    if command == "eval" {
        let plan: eval::Plan = config::load(path, overrides)?;
        if held_elsewhere(&plan.engine) {
            return Ok(None);
        }
        let factor = Processor::load(&plan.model.path)?.budget.factor;
        // Bad rows are not asked, and are told of when it begins.
        let read = plan.data.test.exists().then(|| plan.data.read_as().good(&plan.data.test)).transpose()?;
        let rows = |options: &TaskOptions| match &read {
            Some(read) => Ok(options.asked(read.samples.clone())),
            None => rows_of(&plan.data.test, options, &plan.data.read_as()),
        };
        let sizes = read.as_ref().map(|read| read.sizes.clone()).unwrap_or_default();
        let mut asked = plan.asks(factor, &sizes, &rows)?;
        for eval::Asked { name, task, samples, .. } in &mut asked {
            eval::keep_askable(name, &**task, samples, &plan.data.test)?;
        }
        return need::of_eval(&plan, &asked).map(Some);
    }
    if command == "sft" {
        let plan: sft::Plan = config::load(path, overrides)?;
        if !plan.engine.has_own_kernels() && held_elsewhere(&plan.engine) {
            return Ok(None);
        }
        return sft::need(&plan).map(Some);
    }
    let plan = config::load::<rl::Plan>(path, overrides)?.resolve()?;
    if !plan.engine.has_own_kernels() && held_elsewhere(&plan.engine) {
        return Ok(None);
    }
    let task = plan.task.task(Processor::load(&plan.model.path)?.budget.factor)?;
    need::of_rl(&plan, &*task, &rows_of(&plan.data.train, &plan.task, &plan.data.read_as())?, true).map(Some)
}

/// What `engine.kind` can be here.
fn engines() -> Vec<String> {
    let devices = torch::devices();
    let torch = match devices.is_empty() {
        true => "torch where it is built in".to_owned(),
        false => format!("torch ({})", devices.join(", ")),
    };
    vec!["embedded (CPU)".into(), torch, "tinker, vllm and openai (servers)".into()]
}

fn held_elsewhere(engine: &engine::Options) -> bool {
    let server = match engine {
        engine::Options::Embedded {} => return false,
        engine::Options::Torch(torch::Options { device })
        | engine::Options::Vllm(vllm::Options { device: Some(device), .. }) => {
            progress::say(&format!(
                "LibTorch holds the weights on {device}, and its memory is not reckoned; docs/cluster.md has a table"
            ));
            return true;
        }
        engine::Options::Tinker(options) => options.url.clone(),
        engine::Options::Openai(options) => options.urls.join(", "),
        engine::Options::Vllm(options) => options.urls.join(", "),
    };
    progress::say(&format!("the weights are held by a server, {server}; this machine keeps decoded pictures alone"));
    true
}

/// The rows as a task asks them, or none where they are not there yet: the question is what a run would need.
fn rows_of(path: &Path, task: &TaskOptions, read_as: &ReadAs) -> Result<Vec<Sample>> {
    // The parts of a set may be named with a star.
    if path.exists() || path.to_string_lossy().contains('*') {
        return task.read(path, read_as);
    }
    progress::say(&format!("no data yet, so every picture is taken to be large: {}", path.display()));
    Ok(Vec::new())
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
        if pairs::fast() {
            found.push("amx_bf16");
        }
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}
