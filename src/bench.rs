//! `foveate bench`: the standard workloads, measured. One JSON object on stdout, with the fields of the Python yardstick where it does the same work.
//! `bench/step.rs` are those on rows with pictures, `bench/decoder.rs` those of a plain decoder.

mod decoder;
mod step;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Subcommand, ValueEnum};

use self::decoder::{Speak, Train};
use self::step::{Rig, Step};
use crate::geometry::Budget;
use crate::image::bench_image;
use crate::model::Compute;

#[derive(Subcommand)]
pub enum Workload {
    /// One MGPO step: two sampled turns, reference, update
    Step(Step),
    /// One SFT step: forward, backward and update of written two-turn conversations
    Sft(Step),
    /// Tokens per second of sampling
    Decode(Step),
    /// Training steps of a plain decoder with random weights: no picture, nothing shared
    Train(Train),
    /// Sampling after short prompts of words with a decoder of random weights
    Speak(Speak),
    /// Decode, crop, resize and cut a picture into patches
    Image {
        picture: PathBuf,
        #[arg(long, default_value_t = 1_003_520)]
        max_pixels: u64,
        #[arg(long, default_value_t = 200_704)]
        min_pixels: u64,
    },
}

impl Workload {
    pub fn run(self) -> Result<()> {
        let out = match self {
            Workload::Step(step) => Rig::open(&step)?.step(&step)?,
            Workload::Sft(step) => Rig::open(&step)?.sft(&step)?,
            Workload::Decode(step) => Rig::open(&step)?.decode(&step)?,
            Workload::Train(train) => train.run()?,
            Workload::Speak(speak) => speak.run()?,
            Workload::Image { picture, max_pixels, min_pixels } => {
                bench_image(&picture, Budget::new(min_pixels, max_pixels, 28))?
            }
        };
        println!("{out}");
        Ok(())
    }
}

/// As the peer names them.
#[derive(Clone, Copy, ValueEnum)]
enum DtypeName {
    Float32,
    Bf16x6,
    Bfloat16,
}

impl DtypeName {
    fn compute(self) -> Compute {
        match self {
            DtypeName::Float32 => Compute::F32,
            DtypeName::Bf16x6 => Compute::Bf16x6,
            DtypeName::Bfloat16 => Compute::Bf16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            DtypeName::Float32 => "float32",
            DtypeName::Bf16x6 => "bf16x6",
            DtypeName::Bfloat16 => "bfloat16",
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 1e4).round() / 1e4
}
