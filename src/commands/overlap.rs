//! `foveate data overlap A B`: pictures and questions that two files share, for instance what is trained on and what is tested.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;

use crate::data::overlap::overlap;
use crate::data::{Format, ReadAs};
use crate::image::Likeness;
use crate::report;
use crate::run::{ensure_ours, write_atomic};

/// Pairs that the terminal lists.
const SHOWN: usize = 20;

#[derive(Args)]
pub struct Overlap {
    /// Rows of any known format, for instance those of training
    a: PathBuf,
    /// Others, for instance those of a benchmark
    b: PathBuf,
    /// The format of A, where the keys of its rows do not tell it
    #[arg(long)]
    format_a: Option<String>,
    #[arg(long)]
    format_b: Option<String>,
    /// Folder in which relative paths of A's pictures start [default: that of A]
    #[arg(long)]
    images_a: Option<PathBuf>,
    #[arg(long)]
    images_b: Option<PathBuf>,
    /// HTML file to write: the pictures side by side
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// One JSON object on stdout, with every pair
    #[arg(long)]
    json: bool,
}

impl Overlap {
    pub fn run(self) -> Result<()> {
        let read_as = |format: &Option<String>, images: &Option<PathBuf>| -> Result<ReadAs> {
            let format = format.as_deref().map(Format::named).transpose()?;
            Ok(ReadAs { format, images: images.clone(), leave_out_bad: true })
        };
        let (as_a, as_b) = (read_as(&self.format_a, &self.images_a)?, read_as(&self.format_b, &self.images_b)?);
        if let Some(file) = &self.report {
            ensure_ours(file, report::DOCTYPE)?;
        }
        let found = overlap((&self.a, &as_a), (&self.b, &as_b))?;
        if let Some(file) = &self.report {
            write_atomic(file, report::overlap_page(&found).as_bytes()).context("writing the report")?;
        }
        if self.json {
            let mut out = json!(found);
            out["report"] = json!(self.report);
            println!("{out}");
            return Ok(());
        }
        for pair in found.pictures.iter().take(SHOWN) {
            let like = match pair.like {
                Likeness::Exact => "exact".to_owned(),
                Likeness::Near { bits, levels } => format!("near, {bits} bits, {levels:.1} levels"),
            };
            println!("{}    {}    {like}", pair.first.display(), pair.second.display());
        }
        if found.pictures.len() > SHOWN {
            println!("and {} more pairs; --json lists them, --report FILE shows them", found.pictures.len() - SHOWN);
        }
        report::overlap_summary(&found).iter().for_each(|line| eprintln!("{line}"));
        if let Some(file) = &self.report {
            println!("{}", file.display());
        }
        Ok(())
    }
}
