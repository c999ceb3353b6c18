//! `foveate data check`: what is wrong with a file of rows, and what a model would be asked.
//!
//! What must stay true: with a model, a row is put into the very words, views and tokens that a run would open its conversation with; the
//! later turns of a conversation come on top and are the policy's. Weights are not opened. Dialogues, which ask nothing, are measured as
//! fine-tuning would learn them (`check/written.rs`).

mod written;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use crate::chat::{Chat, Message};
use crate::config::{self, BadConfig};
use crate::data::{Format, Read, ReadAs, Report, Sample, holds_dialogues};
use crate::geometry::Size;
use crate::image::Processor;
use crate::rollout;
use crate::tasks::{Options as TaskOptions, Task};

#[derive(Args)]
pub struct Check {
    /// A file, a folder, or parts of a set as NAME-*.parquet: any format that docs/data.md names
    file: PathBuf,
    /// The format, where the keys of the rows do not tell it
    #[arg(long)]
    format: Option<String>,
    /// Folder in which relative paths of pictures start [default: that of FILE]
    #[arg(long)]
    images: Option<PathBuf>,
    /// Checkpoint folder: shows the tokens of each row (weights are not opened)
    #[arg(long)]
    model: Option<PathBuf>,
    /// crop or multi_image [default: crop where every row has one picture]
    #[arg(long, requires = "model", conflicts_with = "config")]
    task: Option<String>,
    /// Config of a run or an evaluation, for its tasks and its limits
    #[arg(long, requires = "model")]
    config: Option<PathBuf>,
    /// Overrides of it, for instance task.max_pixels=1003520
    #[arg(requires = "config")]
    overrides: Vec<String>,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

impl Check {
    pub fn run(self) -> Result<()> {
        let config = self.config.as_ref().map(|path| config::load(path, &self.overrides)).transpose()?;
        let read_as = self.read_as(config.as_ref())?;
        let learns =
            config.as_ref().is_some_and(|config| !config.contains_key("task") && !config.contains_key("tasks"));
        if read_as.format.is_none() && self.task.is_none() && (learns || holds_dialogues(&self.file)) {
            return self.check_dialogues(&read_as, config.unwrap_or_default());
        }
        let read = read_as.check(&self.file)?;
        let asked = match &self.model {
            Some(model) => self.ask(model, &read, config)?,
            None => Vec::new(),
        };
        let report = &read.report;
        // A row that several tasks cannot ask is one row.
        let unaskable = asked.iter().flat_map(|asked| &asked.unaskable_ids).collect::<HashSet<_>>().len();
        if self.json {
            let mut out = json!(report);
            if self.model.is_some() {
                out["asked"] = json!(asked);
            }
            println!("{out}");
        } else {
            let rows = report.format.map_or("rows".into(), |format| format!("rows of format {}", format.name()));
            tell(report, &rows);
            asked.iter().for_each(|asked| print!("\n{}", asked.text()));
        }
        self.ensure_good(report, unaskable, "cannot be asked")
    }

    /// # Errors
    /// There are problems, or rows that a config makes nothing of.
    fn ensure_good(&self, report: &Report, unusable: usize, what: &str) -> Result<()> {
        let bad = report.problems.len();
        let unusable = if unusable > 0 { format!(", and {unusable} rows that {what}") } else { String::new() };
        ensure!(bad == 0 && unusable.is_empty(), "{bad} problems{unusable} in {}", self.file.display());
        Ok(())
    }

    /// As the flags say, else as the config does.
    fn read_as(&self, config: Option<&toml::Table>) -> Result<ReadAs> {
        let said = |key: &str| config?.get("data")?.as_table()?.get(key)?.as_str();
        let format = self.format.as_deref().or(said("format")).map(Format::named).transpose()?;
        let images = self.images.clone().or(said("images").map(PathBuf::from));
        Ok(ReadAs { format, images, leave_out_bad: false })
    }

    fn ask(&self, model: &std::path::Path, read: &Read, config: Option<toml::Table>) -> Result<Vec<Asked>> {
        let chat = Chat::load(model)?;
        let processor = Processor::load(model)?;
        let (tasks, limits) = self.tasks(&read.samples, config)?;
        let factor = processor.budget.factor;
        let ask = |(name, options): (String, TaskOptions)| {
            let task = options.task(factor).with_context(|| format!("[{name}]"))?;
            let rows = options.asked(read.samples.clone());
            let rig = Rig { chat: &chat, processor: &processor, task: &*task, sizes: &read.sizes };
            Ok(rig.measure(name, &rows, &limits))
        };
        tasks.into_iter().map(ask).collect()
    }

    /// The tasks by their names, and the limits of the rollout.
    fn tasks(
        &self,
        rows: &[Sample],
        config: Option<toml::Table>,
    ) -> Result<(Vec<(String, TaskOptions)>, rollout::Options)> {
        let (Some(path), Some(mut config)) = (&self.config, config) else {
            let single = rows.iter().all(|row| row.images.len() <= 1);
            let kind = self.task.clone().unwrap_or_else(|| if single { "crop" } else { "multi_image" }.into());
            // Judged by what the rows have: no row is at fault for a config that there is not.
            let free = kind == "crop" && rows.iter().all(|row| row.choices.is_empty());
            let judge = if free { "judge = \"text\"" } else { "" };
            let options: TaskOptions = toml::from_str(&format!("kind = {}\n{judge}", json!(kind)))
                .map_err(|_| BadConfig(format!("--task {kind}: expected crop or multi_image")))?;
            return Ok((vec![(kind, options)], rollout::Options::default()));
        };
        let bad = |section: &str, error: toml::de::Error| {
            BadConfig(format!("[{section}] of the config: {}: {}", config::explain(&error.to_string()), path.display()))
        };
        let limits = match config.remove("rollout") {
            Some(section) => section.try_into().map_err(|e| bad("rollout", e))?,
            None => rollout::Options::default(),
        };
        let tasks: BTreeMap<String, TaskOptions> = match (config.remove("task"), config.remove("tasks")) {
            (Some(task), _) => BTreeMap::from([("task".to_owned(), task.try_into().map_err(|e| bad("task", e))?)]),
            (None, Some(tasks)) => tasks.try_into().map_err(|e| bad("tasks", e))?,
            (None, None) => return Err(BadConfig(format!("the config has no task: {}", path.display())).into()),
        };
        Ok((tasks.into_iter().collect(), limits))
    }
}

/// All that is wrong on stdout, one a line; what there is, and what else is to be known, on stderr.
fn tell(report: &Report, rows: &str) {
    report.problems.iter().for_each(|problem| println!("{problem}"));
    report.notes.iter().for_each(|note| eprintln!("{note}"));
    eprintln!("{} {rows}, {} pictures, {} problems", report.rows, report.pictures, report.problems.len());
}

/// What every row is put through.
struct Rig<'a> {
    chat: &'a Chat,
    processor: &'a Processor,
    task: &'a dyn Task,
    sizes: &'a HashMap<PathBuf, Size>,
}

/// Tokens of the opening of a conversation.
struct Tokens {
    text: usize,
    visual: usize,
    answer: usize,
}

impl Rig<'_> {
    fn tokens(&self, row: &Sample) -> Result<Tokens> {
        self.task.check(row)?;
        let sizes: Vec<Size> = row.images.iter().filter_map(|path| self.sizes.get(path)).copied().collect();
        let opening = self.task.open(row, &sizes)?;
        let visual: Vec<usize> =
            opening.user.views.iter().map(|v| self.processor.grid(v.size).tokens(self.processor.merge)).collect();
        let messages: Vec<Message> = opening
            .system
            .iter()
            .map(|text| Message::system(text.as_str()))
            .chain([Message::user(opening.user.parts)])
            .collect();
        let all = self.chat.encode(&messages, true, &visual)?.ids.len();
        let visual = visual.iter().sum();
        Ok(Tokens { text: all - visual, visual, answer: self.chat.plain_ids(&row.answer)?.len() })
    }

    fn measure(&self, task: String, rows: &[Sample], limits: &rollout::Options) -> Asked {
        let each: Vec<Result<Tokens>> = rows.par_iter().map(|row| self.tokens(row)).collect();
        let (mut unaskable, mut unaskable_ids) = (Vec::new(), Vec::new());
        let mut good = Vec::new();
        for (row, tokens) in rows.iter().zip(each) {
            match tokens {
                Ok(tokens) => good.push((row, tokens)),
                Err(error) => {
                    unaskable.push(format!("{}: {error:#}", row.named()));
                    unaskable_ids.push(row.id.clone());
                }
            }
        }
        let of = |count: fn(&(&Sample, Tokens)) -> usize| Spread::of(good.iter().map(count).collect());
        let room = limits.max_tokens.saturating_sub(limits.max_new_tokens);
        let prompt = |(_, t): &(&Sample, Tokens)| t.text + t.visual;
        let too_long: Vec<String> =
            good.iter().filter(|row| prompt(row) > room).map(|(row, _)| row.id.clone()).collect();
        Asked {
            task,
            rows: good.len(),
            prompt: of(|(_, t)| t.text + t.visual),
            text: of(|(_, t)| t.text),
            visual: of(|(_, t)| t.visual),
            answer: of(|(_, t)| t.answer),
            pictures: of(|(row, _)| row.images.len()),
            max_tokens: limits.max_tokens,
            max_new_tokens: limits.max_new_tokens,
            too_long: too_long.len(),
            first_too_long: too_long.into_iter().take(10).collect(),
            histogram: histogram(good.iter().map(prompt).collect()),
            unaskable,
            unaskable_ids,
        }
    }
}

/// What one task makes of the rows.
#[derive(Serialize)]
struct Asked {
    task: String,
    rows: usize,
    /// Tokens of the first turn: text and pictures.
    prompt: Spread,
    text: Spread,
    visual: Spread,
    answer: Spread,
    pictures: Spread,
    max_tokens: usize,
    max_new_tokens: usize,
    /// Rows whose first turn leaves no room for an answer.
    too_long: usize,
    first_too_long: Vec<String>,
    histogram: Vec<Bin>,
    unaskable: Vec<String>,
    #[serde(skip)]
    unaskable_ids: Vec<String>,
}

#[derive(Default, Serialize)]
struct Spread {
    least: usize,
    median: usize,
    mean: f64,
    most: usize,
}

impl Spread {
    fn of(mut values: Vec<usize>) -> Spread {
        values.sort_unstable();
        let (Some(&least), Some(&most)) = (values.first(), values.last()) else { return Spread::default() };
        let mean = values.iter().sum::<usize>() as f64 / values.len() as f64;
        Spread { least, median: values[values.len() / 2], mean, most }
    }
}

/// Rows whose prompts have `from` to `to` tokens, both included.
#[derive(Debug, PartialEq, Serialize)]
struct Bin {
    from: usize,
    to: usize,
    rows: usize,
}

/// At most ten bins of one round width.
fn histogram(values: Vec<usize>) -> Vec<Bin> {
    const BINS: usize = 10;
    let (Some(&least), Some(&most)) = (values.iter().min(), values.iter().max()) else { return Vec::new() };
    let widths = (0..).flat_map(|power| [1, 2, 5].map(|n| n * 10usize.saturating_pow(power)));
    let width = widths.into_iter().find(|width| most / width - least / width < BINS).unwrap_or(usize::MAX);
    let mut bins: Vec<Bin> =
        (least / width..=most / width).map(|k| Bin { from: k * width, to: (k + 1) * width - 1, rows: 0 }).collect();
    for value in values {
        bins[value / width - least / width].rows += 1;
    }
    bins
}

impl Asked {
    fn text(&self) -> String {
        let mut out = format!("{}: {} rows\n", self.task, self.rows);
        let lines = [
            ("first turn, tokens", &self.prompt),
            ("of text", &self.text),
            ("of pictures", &self.visual),
            ("answer, tokens", &self.answer),
            ("pictures a row", &self.pictures),
        ];
        out.push_str(&spreads(&lines, &self.histogram));
        let limit = format!("{} tokens with {} of an answer", self.max_tokens, self.max_new_tokens);
        out.push_str(&too_long("rows", self.too_long, &limit, &self.first_too_long));
        out.push_str(&first_of(&self.unaskable, "cannot be asked"));
        out
    }
}

fn spreads(lines: &[(&str, &Spread)], histogram: &[Bin]) -> String {
    let mut out = String::new();
    for (what, Spread { least, median, mean, most }) in lines {
        out.push_str(&format!("  {what:<20} {least:>6} to {most:<6} median {median}, mean {mean:.1}\n"));
    }
    let tallest = histogram.iter().map(|bin| bin.rows).max().unwrap_or(1).max(1);
    for Bin { from, to, rows } in histogram {
        let bar = "#".repeat((rows * 40).div_ceil(tallest));
        out.push_str(&format!("  {:>13} {rows:>7} {bar}\n", format!("{from}-{to}")));
    }
    out
}

fn too_long(what: &str, count: usize, limit: &str, first: &[String]) -> String {
    let first = if first.is_empty() { String::new() } else { format!(": {}", first.join(", ")) };
    format!("  {count} {what} are too long for {limit}{first}\n")
}

fn first_of(reasons: &[String], what: &str) -> String {
    const SHOWN: usize = 5;
    let mut out: String = reasons.iter().take(SHOWN).map(|reason| format!("  {what}: {reason}\n")).collect();
    if reasons.len() > SHOWN {
        out.push_str(&format!("  and {} more {what}\n", reasons.len() - SHOWN));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_round_and_hold_every_row() {
        let bin = |from, to, rows| Bin { from, to, rows };
        assert_eq!(histogram(vec![7, 7]), [bin(7, 7, 2)]);
        assert_eq!(
            histogram(vec![0, 12, 19]),
            [
                bin(0, 1, 1),
                bin(2, 3, 0),
                bin(4, 5, 0),
                bin(6, 7, 0),
                bin(8, 9, 0),
                bin(10, 11, 0),
                bin(12, 13, 1),
                bin(14, 15, 0),
                bin(16, 17, 0),
                bin(18, 19, 1)
            ]
        );
        assert!(histogram(Vec::new()).is_empty());
        let wide = histogram((0..1000).map(|k| 300 + k * 7).collect());
        assert!(wide.len() <= 10 && wide.iter().map(|b| b.rows).sum::<usize>() == 1000, "{wide:?}");
    }
}
