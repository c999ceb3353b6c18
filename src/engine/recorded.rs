//! A sampler whose answers are recorded as they come, so that playing goes on where it was stopped.
//!
//! It stands before any engine and hides the file. What must stay true: what was asked once is never asked again, and gives the very answer
//! it gave; a batch of questions is written when all of its turns are over, so that one that was cut off is played again as a whole; an answer
//! of other weights or under another plan is never taken for one of these.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::{Completion, Finish, Prompt, Sampler, Sampling};
use crate::model::lora;
use crate::openai::sha256;
use crate::progress::say;
use crate::run::ANSWERS;
use crate::table;

/// One call of [`Sampler::sample`], a line of the file.
#[derive(Serialize, Deserialize)]
struct Call {
    /// Of the plan and the weights.
    of: String,
    /// Of the prompts, their seeds and the sampling.
    digest: String,
    completions: Vec<Vec<Completion>>,
}

pub struct Recorded<'a> {
    engine: &'a mut dyn Sampler,
    of: String,
    path: PathBuf,
    file: File,
    known: HashMap<String, Vec<Vec<Completion>>>,
    /// Digests of the files of pictures.
    pictures: HashMap<Arc<Path>, String>,
    /// Lines of the batch under way.
    pending: Vec<u8>,
    /// Why writing failed: told by the next call, and by [`Recorded::finish`].
    failed: Option<anyhow::Error>,
}

impl<'a> Recorded<'a> {
    /// `plan` is all that answers hang on beside the prompts and the files of `model` (and of its base, where it is an adapter).
    ///
    /// # Errors
    /// The record cannot be read or written, or a line of it is damaged that is not the last.
    pub fn open(engine: &'a mut dyn Sampler, folder: &Path, plan: &str, model: &Path) -> Result<Recorded<'a>> {
        let path = folder.join(ANSWERS);
        let opening = || format!("opening the record of answers: {}", path.display());
        let of = identity(plan, model)?;
        let mut file = File::options().read(true).append(true).create(true).open(&path).with_context(opening)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(opening)?;
        let (mut known, mut others, mut whole) = (HashMap::new(), 0, 0);
        for (i, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
            // A kill may cut the last line short: that much is played again.
            if !line.ends_with(b"\n") {
                file.set_len(whole as u64).with_context(opening)?;
                break;
            }
            whole += line.len();
            if line.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Call>(line) {
                Ok(call) if call.of == of => drop(known.insert(call.digest, call.completions)),
                Ok(_) => others += 1,
                Err(error) => bail!(
                    "line {} of the record of answers is damaged ({error}); take it out, and what it answers is asked again: {}",
                    i + 1,
                    path.display()
                ),
            }
        }
        if others > 0 {
            say(&format!(
                "{others} recorded calls are of another plan or of other weights, and are not used: {}",
                path.display()
            ));
        }
        Ok(Recorded { engine, of, path, file, known, pictures: HashMap::new(), pending: Vec::new(), failed: None })
    }

    /// # Errors
    /// The last answers could not be written.
    pub fn finish(mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Of all that answers hang on beside the weights: words, seeds, sampling, and of each picture what its file holds and what was shown of it.
    fn digest(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(sampling).context("writing the sampling as JSON")?);
        for Prompt { stream, seeds, session: _ } in prompts {
            hash.update((stream.len() as u64).to_le_bytes());
            stream.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            hash.update((seeds.len() as u64).to_le_bytes());
            seeds.iter().for_each(|seed| hash.update(seed.to_le_bytes()));
            for image in &stream.images {
                let picture = match self.pictures.get(&image.path) {
                    Some(known) => known,
                    None => {
                        let digest = sha256(&table::picture_bytes(&image.path)?);
                        self.pictures.entry(image.path.clone()).or_insert(digest)
                    }
                };
                let (region, size) = (image.view.region, image.view.size);
                hash.update(format!("{picture}\0{region:?}\0{}x{}\0", size.width, size.height));
            }
        }
        Ok(hex(hash))
    }

    fn write(&mut self) -> Result<()> {
        let lines = std::mem::take(&mut self.pending);
        let before = self.file.metadata().map(|file| file.len());
        let written = self.file.write_all(&lines).and_then(|()| self.file.sync_data());
        if let (Err(_), Ok(before)) = (&written, before) {
            // Half a line that a full disk left.
            let _ = self.file.set_len(before);
        }
        written.with_context(|| format!("recording answers: {}", self.path.display()))
    }
}

impl Sampler for Recorded<'_> {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let digest = self.digest(prompts, sampling)?;
        let fits = |known: &&Vec<Vec<Completion>>| known.iter().map(Vec::len).eq(prompts.iter().map(|p| p.seeds.len()));
        if let Some(known) = self.known.get(&digest).filter(fits) {
            return Ok(known.clone());
        }
        let completions = self.engine.sample(prompts, sampling)?;
        let call = Call { of: self.of.clone(), digest, completions };
        serde_json::to_writer(&mut self.pending, &call).context("writing answers as JSON")?;
        self.pending.push(b'\n');
        // Another protocol may ask the same again.
        self.known.insert(call.digest, call.completions.clone());
        Ok(call.completions)
    }

    fn end_step(&mut self) {
        self.engine.end_step();
        if let (false, Err(error)) = (self.pending.is_empty(), self.write()) {
            self.failed = Some(error);
        }
    }
}

/// Of the plan, and of name, length and age of every file of the checkpoint: to read the weights twice would cost more than answers that are
/// asked again.
fn identity(plan: &str, model: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(plan);
    // A server holds the weights of its own; then the base need not be here.
    let base = lora::base_or(model).ok().filter(|base| base != model);
    for folder in [Some(model.to_owned()), base].into_iter().flatten() {
        let listing = || format!("listing the checkpoint {}", folder.display());
        let mut files: Vec<PathBuf> =
            fs::read_dir(&folder).with_context(listing)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        files.sort();
        for path in files {
            let file = fs::metadata(&path).with_context(listing)?;
            if file.is_file() {
                hash.update(format!("{}\0{}\0{:?}\0", path.display(), file.len(), file.modified().ok()));
            }
        }
    }
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Log-probs as JSON has them: what is not a number, because the engine does not tell it, is null.
pub(super) fn numbers_or_null<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(|value| value.is_finite().then_some(value)))
}

/// A [`Completion`] as it stands in the file, which a person may have changed.
#[derive(Deserialize)]
pub(super) struct Line {
    ids: Vec<u32>,
    logprobs: Vec<Option<f32>>,
    finish: Finish,
}

impl TryFrom<Line> for Completion {
    type Error = String;

    fn try_from(Line { ids, logprobs, finish }: Line) -> Result<Completion, String> {
        if ids.len() != logprobs.len() {
            return Err(format!("{} ids with {} logprobs", ids.len(), logprobs.len()));
        }
        let logprobs = logprobs.into_iter().map(|value| value.unwrap_or(f32::NAN)).collect();
        Ok(Completion { ids, logprobs, finish })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::episode::Stream;

    /// Answers with the seed, and counts how often it is asked.
    struct Parrot(usize);

    impl Sampler for Parrot {
        fn sample(&mut self, prompts: &[Prompt], _: &Sampling) -> Result<Vec<Vec<Completion>>> {
            self.0 += 1;
            let say = |seed: &u64| Completion {
                ids: vec![*seed as u32, self.0 as u32],
                logprobs: vec![-0.1, f32::NAN],
                finish: Finish::EndOfTurn,
            };
            Ok(prompts.iter().map(|prompt| prompt.seeds.iter().map(say).collect()).collect())
        }

        fn end_step(&mut self) {}
    }

    /// Asks for each of the batches of seeds, the last of which may be cut off; gives the second token of each answer, and how often the
    /// engine was asked.
    fn play(folders: [&Path; 2], plan: &str, batches: &[&[u64]], cut: bool) -> (Vec<u32>, usize) {
        let mut engine = Parrot(0);
        let mut recorded = Recorded::open(&mut engine, folders[0], plan, folders[1]).unwrap();
        let mut stream = Stream::default();
        stream.push_context(&[1, 2, 3], Vec::new(), 99, 2).unwrap();
        let mut said = Vec::new();
        for (k, seeds) in batches.iter().enumerate() {
            let sampling = Sampling {
                temperature: 0.0,
                top_k: None,
                top_p: None,
                max_new_tokens: 4,
                stop: Vec::new(),
                ignore_end: false,
            };
            let answers = recorded.sample(&[Prompt { session: 0, stream: &stream, seeds }], &sampling).unwrap();
            assert_eq!(answers[0].iter().map(|a| u64::from(a.ids[0])).collect::<Vec<_>>(), *seeds);
            assert!(answers[0].iter().all(|a| a.logprobs[0] == -0.1 && a.logprobs[1].is_nan()));
            said.extend(answers[0].iter().map(|a| a.ids[1]));
            if !(cut && k + 1 == batches.len()) {
                recorded.end_step();
            }
        }
        recorded.finish().unwrap();
        (said, engine.0)
    }

    #[test]
    fn what_was_answered_is_not_asked_again_and_a_batch_that_was_cut_off_is() {
        let (run, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = [run.path(), model.path()];
        assert_eq!(play(folders, "a", &[&[7, 8], &[9]], true), (vec![1, 1, 2], 2));
        // The first batch is there; the second one, which did not end, is asked by an engine that has said nothing yet.
        assert_eq!(play(folders, "a", &[&[7, 8], &[9], &[9]], false), (vec![1, 1, 1, 1], 1));
        // A line that a kill cut short.
        let path = run.path().join(ANSWERS);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        fs::write(&path, &text[..text.len() - 9]).unwrap();
        assert_eq!(play(folders, "a", &[&[7, 8], &[9]], false), (vec![1, 1, 1], 1));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        // Another plan, other weights.
        assert_eq!(play(folders, "b", &[&[9]], false).1, 1);
        fs::write(model.path().join("model.safetensors"), "new").unwrap();
        assert_eq!(play(folders, "a", &[&[9]], false).1, 1);
        // A blank line is no call; one that answers less than was asked is none of it.
        fs::write(&path, "\n").unwrap();
        assert_eq!(play(folders, "a", &[&[7, 8]], false).1, 1);
        let text = fs::read_to_string(&path).unwrap();
        let mut call: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        call["completions"][0].as_array_mut().unwrap().pop();
        fs::write(&path, format!("{call}\n")).unwrap();
        assert_eq!(play(folders, "a", &[&[7, 8]], false), (vec![1, 1], 1));
        fs::write(&path, "{}\n").unwrap();
        let mut engine = Parrot(0);
        let error = Recorded::open(&mut engine, run.path(), "a", model.path()).err().unwrap();
        assert!(format!("{error:#}").contains("line 1 of the record of answers is damaged"), "{error:#}");
    }
}
