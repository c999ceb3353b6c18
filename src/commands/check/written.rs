//! Dialogues as fine-tuning learns them: the tokens of the whole conversation, and those that are trained.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::{Bin, Check, Spread, first_of, histogram, spreads, tell, too_long};
use crate::chat::Chat;
use crate::config::{self, BadConfig};
use crate::data::{Dialogues, ReadAs};
use crate::episode::Stream;
use crate::image::Processor;
use crate::sft;

/// What fine-tuning makes of the dialogues.
#[derive(Serialize)]
struct Written {
    dialogues: usize,
    /// Tokens of the whole conversation.
    tokens: Spread,
    /// Those of the assistant.
    trained: Spread,
    visual: Spread,
    pictures: Spread,
    max_tokens: usize,
    too_long: usize,
    first_too_long: Vec<String>,
    histogram: Vec<Bin>,
    /// Dialogues that cannot be put into tokens, and why.
    unusable: Vec<String>,
}

impl Check {
    pub(super) fn check_dialogues(&self, read_as: &ReadAs, config: toml::Table) -> Result<()> {
        let data = self.sft_data(config)?;
        let read = read_as.check_dialogues(&self.file)?;
        let written = self.model.as_ref().map(|model| measure(model, &data, &read)).transpose()?;
        if self.json {
            let mut out = json!(read.report);
            out["format"] = "dialogues".into();
            if let Some(written) = &written {
                out["written"] = json!(written);
            }
            println!("{out}");
        } else {
            tell(&read.report, "dialogues");
            written.iter().for_each(|written| print!("\n{}", written.text()));
        }
        self.ensure_good(&read.report, written.map_or(0, |written| written.unusable.len()), "cannot be learnt")
    }

    /// `[data]` of the config, or what it is without one.
    fn sft_data(&self, mut config: toml::Table) -> Result<sft::DataOptions> {
        ensure!(
            !config.contains_key("task") && !config.contains_key("tasks"),
            BadConfig("the config has a task, which asks rows; these are dialogues, which ask nothing (configs/sft_dialogues.toml)".into())
        );
        let section = config.remove("data").unwrap_or_else(|| toml::Table::new().into());
        Ok(section.try_into().map_err(|error: toml::de::Error| {
            BadConfig(format!("[data] of the config: {}", config::explain(&error.to_string())))
        })?)
    }
}

fn measure(model: &Path, data: &sft::DataOptions, read: &Dialogues) -> Result<Written> {
    let (chat, processor) = (Chat::load(model)?, Processor::load(model)?);
    let budget = data.budget(processor.budget);
    let stream = |dialogue| {
        sft::stream_of_dialogue(&chat, &processor, dialogue, budget, |path| {
            read.sizes.get(path).copied().with_context(|| format!("a picture was not looked at: {}", path.display()))
        })
    };
    let each: Vec<Result<Stream>> = read.rows.par_iter().map(stream).collect();
    let (mut good, mut unusable) = (Vec::new(), Vec::new());
    for (dialogue, stream) in read.rows.iter().zip(each) {
        match stream {
            Ok(stream) => good.push((dialogue.number, stream)),
            Err(error) => unusable.push(format!("{error:#}")),
        }
    }
    let of = |count: &dyn Fn(&Stream) -> usize| Spread::of(good.iter().map(|(_, stream)| count(stream)).collect());
    let visual = |stream: &Stream| stream.images.iter().map(|image| image.grid.tokens(processor.merge)).sum::<usize>();
    let long: Vec<String> = good
        .iter()
        .filter(|(_, stream)| stream.len() > data.max_tokens)
        .map(|(number, _)| format!("row {number}"))
        .collect();
    Ok(Written {
        dialogues: good.len(),
        tokens: of(&|stream| stream.len()),
        trained: of(&|stream| stream.sampled_count()),
        visual: of(&visual),
        pictures: of(&|stream| stream.images.len()),
        max_tokens: data.max_tokens,
        too_long: long.len(),
        first_too_long: long.into_iter().take(10).collect(),
        histogram: histogram(good.iter().map(|(_, stream)| stream.len()).collect()),
        unusable,
    })
}

impl Written {
    fn text(&self) -> String {
        let mut out = format!("{} dialogues\n", self.dialogues);
        let lines = [
            ("tokens", &self.tokens),
            ("trained", &self.trained),
            ("of pictures", &self.visual),
            ("pictures a dialogue", &self.pictures),
        ];
        out.push_str(&spreads(&lines, &self.histogram));
        let limit = format!("{} tokens", self.max_tokens);
        out.push_str(&too_long("dialogues", self.too_long, &limit, &self.first_too_long));
        out.push_str(&first_of(&self.unusable, "cannot be learnt"));
        out
    }
}
