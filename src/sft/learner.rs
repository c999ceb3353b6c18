//! Who learns the dialogues of a step, and what is told of them: our own kernels, with the dense head and the hints beside the words, or any other
//! engine, which is given the words alone.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Example, Loss, Plan, Source};
use crate::chat::Chat;
use crate::config::BadConfig;
use crate::engine::embedded::{self, EarlyHints, Embedded};
use crate::engine::{self, Group, Scores, Trainer, Training, Weights};
use crate::model::dense::{self, DenseHead, Fit};
use crate::run::{Metrics, Start};
use crate::synth::pretrain::{self, Pretrain};

/// Who learns.
pub(super) enum Learner {
    /// Our own kernels, which also know drawn pictures and what stands in them.
    Here { engine: Box<Embedded>, head: Option<Box<(dense::Options, DenseHead)>> },
    /// Any other engine.
    Elsewhere(Box<dyn Trainer>),
}

impl Learner {
    pub fn open(plan: &Plan, training: &Training, source: &Source, start: Start) -> Result<Learner> {
        if plan.dense.is_some() && !matches!(source, Source::World { .. }) {
            return Err(
                BadConfig("[dense] needs pictures that know their objects; it goes with data.pretrain".into()).into()
            );
        }
        if !plan.engine.is_embedded() {
            return Ok(Learner::Elsewhere(engine::open(&plan.engine, &plan.model, training, start != Start::New)?));
        }
        let engine = Box::new(Embedded::open(&plan.model, Some(training))?);
        let head = match (&plan.dense, source) {
            (Some(options), Source::World { world, .. }) => {
                let words = words(&engine.frontend.chat, world)?;
                let head = DenseHead::new(words, engine.model.config.text.hidden, plan.train.seed);
                Some(Box::new((options.clone(), head)))
            }
            _ => None,
        };
        Ok(Learner::Here { engine, head })
    }

    pub fn engine(&mut self) -> &mut dyn Trainer {
        match self {
            Learner::Here { engine, .. } => &mut **engine,
            Learner::Elsewhere(engine) => &mut **engine,
        }
    }

    pub fn save(&mut self, to: &Path) -> Result<()> {
        self.engine().save(to)?;
        match self {
            Learner::Here { head: Some(head), .. } => head.1.save(to),
            _ => Ok(()),
        }
    }

    pub fn load(&mut self, from: &Path) -> Result<()> {
        self.engine().load(from)?;
        match self {
            Learner::Here { head: Some(head), .. } => head.1.load(from),
            _ => Ok(()),
        }
    }

    /// One optimiser step on some dialogues.
    pub fn update(&mut self, examples: &[Example], step: u64, plan: &Plan, metrics: &mut Metrics) -> Result<()> {
        let mut tally = Tally::new(examples, plan.train.loss);
        match self {
            Learner::Here { engine, head } => teach(engine, examples, step, head.as_deref_mut(), &mut tally, metrics)?,
            Learner::Elsewhere(engine) => {
                let groups: Vec<Group> = examples.iter().map(|e| e.stream.alone()).collect();
                engine.accumulate(&groups, &mut |i, _, scores| Ok(tally.weigh(i, scores)))?;
            }
        }
        let engine = self.engine();
        let rate = plan.optim.lr_at(engine.updates(), plan.train.steps);
        let norm = engine.step(rate)?;
        tally.write(metrics);
        metrics.insert("grad_norm".into(), json!(norm));
        metrics.insert("lr".into(), json!(rate));
        if let Learner::Here { head: Some(head), .. } = self
            && metrics.contains_key("dense/loss")
        {
            let (options, head) = &mut **head;
            head.update(options.lr);
        }
        Ok(())
    }
}

/// What is said of the dialogues of a step while they are learnt.
struct Tally<'a> {
    examples: &'a [Example],
    weighting: Loss,
    /// Trained tokens.
    total: usize,
    loss: f64,
    /// Tokens with more than half of the probability. Greedy decoding says these, and others that lead with less.
    likely: usize,
    /// Sum and count of each task's losses.
    by_task: BTreeMap<&'a str, (f64, usize)>,
}

impl Tally<'_> {
    fn new(examples: &[Example], weighting: Loss) -> Tally<'_> {
        let total = examples.iter().map(|e| e.stream.sampled_count()).sum();
        Tally { examples, weighting, total, loss: 0.0, likely: 0, by_task: BTreeMap::new() }
    }

    /// The weights of dialogue i.
    fn weigh(&mut self, i: usize, scores: &Scores) -> Weights {
        let entry = self.by_task.entry(&self.examples[i].task).or_default();
        for &l in &scores.logprobs {
            self.loss -= f64::from(l);
            self.likely += usize::from(l > -std::f32::consts::LN_2);
            entry.0 -= f64::from(l);
            entry.1 += 1;
        }
        let share = match self.weighting {
            Loss::TokenMean => self.total,
            Loss::DialogueMean => self.examples.len() * scores.logprobs.len(),
        };
        Weights { logprobs: vec![-1.0 / share as f32; scores.logprobs.len()], entropies: None }
    }

    fn write(self, metrics: &mut Metrics) {
        metrics.insert("loss".into(), json!(self.loss / self.total as f64));
        metrics.insert("tokens/likely".into(), json!(self.likely as f64 / self.total as f64));
        for (task, (sum, n)) in self.by_task {
            metrics.insert(format!("loss/{task}"), json!(sum / n.max(1) as f64));
        }
        metrics.insert("tokens/trained".into(), json!(self.total));
        metrics.insert("tokens/all".into(), json!(self.examples.iter().map(|e| e.stream.len()).sum::<usize>()));
    }
}

/// The tokens in which the dense head answers.
fn words(chat: &Chat, world: &Pretrain) -> Result<dense::Words> {
    let single = |text: &str| -> Result<u32> {
        let ids = chat.plain_ids(text)?;
        ensure!(ids.len() == 1, "[dense] needs one token for {text:?}, this tokenizer takes {}", ids.len());
        Ok(ids[0])
    };
    let mut names = std::collections::HashMap::new();
    let mut digits = Vec::new();
    for label in world.labels() {
        // As the words stand in questions and answers: names behind a space, digits bare.
        let token = match label.strip_prefix(pretrain::DIGIT) {
            Some(digit) => {
                let token = single(digit)?;
                digits.push(token);
                token
            }
            None => single(&format!(" {label}"))?,
        };
        names.insert(label, token);
    }
    let snap = world.recipe().snap;
    let numbers = (0..1000 / snap).map(|k| single(&(k * snap).to_string())).collect::<Result<_>>()?;
    let nothing = chat.special.vision_pad.context("[dense] needs a <|vision_pad|> token")?;
    Ok(dense::Words { names, digits, number: single(" number")?, numbers, snap: f64::from(snap), nothing })
}

/// Adds up the gradient of some dialogues, and of what the dense head and the hints ask beside them.
fn teach(
    engine: &mut Embedded,
    examples: &[Example],
    step: u64,
    mut head: Option<&mut (dense::Options, DenseHead)>,
    tally: &mut Tally,
    metrics: &mut Metrics,
) -> Result<()> {
    let images: usize = examples.iter().map(|e| e.drawn.len()).sum();
    let (dense_weight, hint_weight) = match &head {
        Some((o, _)) => {
            let left = o.until_step.map_or(1.0, |end| (1.0 - step as f32 / end as f32).clamp(0.0, 1.0));
            (o.weight * left, o.hints * left)
        }
        None => (0.0, 0.0),
    };
    let mut fit = Fit::default();
    let merge = engine.frontend.processor.merge;
    let side = f64::from(engine.frontend.processor.budget.factor);
    let asked: Vec<dense::Asked> = match &head {
        Some((_, head)) if hint_weight > 0.0 => examples
            .iter()
            .map(|e| {
                let prompt = e.stream.prompt_len();
                let shown = e.stream.images.iter().zip(&e.objects).filter(|(image, _)| image.first < prompt);
                let shown = shown.map(|(image, objects)| dense::Shown {
                    objects,
                    rows: image.first..image.first + image.grid.tokens(merge),
                    columns: (image.grid.w / merge) as usize,
                    side,
                });
                head.hints(&e.stream.ids[..prompt], &shown.collect::<Vec<_>>())
            })
            .collect(),
        _ => examples.iter().map(|_| dense::Asked::default()).collect(),
    };
    let count = |rows: &[Vec<(usize, u32)>]| rows.iter().map(Vec::len).sum::<usize>().max(1);
    let last = engine.model.config.text.layers - 1;
    let rows: Vec<_> = asked.iter().map(|asked| asked.words.clone()).collect();
    let early = dense::EARLY.iter().enumerate().map(|(k, &(_, block))| {
        let rows: Vec<_> = asked.iter().map(|asked| asked.early[k].clone()).collect();
        EarlyHints { block: block.min(last), weight: hint_weight / count(&rows) as f32, rows }
    });
    let hints = embedded::Hints { weight: hint_weight / count(&rows) as f32, rows, early: early.collect() };
    let hinted = engine.accumulate_examples(
        examples,
        &mut |i, scores| Ok(tally.weigh(i, scores)),
        &hints,
        &mut |i, features, grids, table, dtable| {
            let (_, head) = head.as_mut()?;
            if dense_weight == 0.0 {
                return None;
            }
            let views: Vec<dense::View> = grids
                .iter()
                .zip(&examples[i].objects)
                .map(|(&grid, objects)| dense::View { grid, side: 28.0, objects })
                .collect();
            let share = dense_weight * grids.len() as f32 / images as f32;
            let (gradient, one) = head.backward(features, &views, share, table, dtable);
            fit.add(Fit { loss: one.loss * grids.len() as f64 / images as f64, ..one });
            Some(gradient)
        },
    )?;
    if hint_weight > 0.0 {
        metrics.insert("dense/hints".into(), json!(hinted.rows / count(&hints.rows) as f64));
        for (((name, _), hints), sum) in dense::EARLY.iter().zip(&hints.early).zip(hinted.early) {
            metrics.insert(format!("dense/{name}"), json!(sum / count(&hints.rows) as f64));
        }
    }
    if dense_weight > 0.0 {
        metrics.insert("dense/loss".into(), json!(fit.loss));
        metrics.insert("dense/named".into(), json!(fit.named as f64 / fit.on_object.max(1) as f64));
        if fit.on_digit > 0 {
            metrics.insert("dense/read".into(), json!(fit.read as f64 / fit.on_digit as f64));
        }
        metrics.insert("dense/sides".into(), json!(fit.sides / fit.on_object.max(1) as f64));
    }
    Ok(())
}
