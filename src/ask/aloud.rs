//! The conversation on a terminal while it is going on: what is looked at, then the words as they are drawn.
//!
//! [`Aloud`] stands between the turn loop and the engine as a sampler of its own, so neither knows that somebody watches. What must stay true:
//! a model's words are text; a control character among them is shown, never obeyed.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use super::saving::Saving;
use crate::engine::embedded::Embedded;
use crate::engine::{Completion, Frontend, Prompt, Sampler, Sampling};
use crate::episode::{Placed, Stream};
use crate::progress::{self, Progress};

/// Stdout, and whether a person sees it.
#[derive(Clone, Copy)]
pub struct Screen {
    pub terminal: bool,
    colours: bool,
}

impl Screen {
    pub fn new() -> Screen {
        let terminal = io::stdout().is_terminal();
        Screen { terminal, colours: terminal && progress::colours_wanted() }
    }

    /// A heading.
    pub fn head(self, text: &str) -> String {
        self.styled("1", text)
    }

    /// What is said about the conversation, beside its words.
    pub fn aside(self, text: &str) -> String {
        self.styled("2", text)
    }

    fn styled(self, style: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Words of a model, which a terminal must not take for orders.
    pub fn words(self, text: &str) -> String {
        if self.terminal { harmless(text) } else { text.to_owned() }
    }
}

/// Control characters other than ends of lines and tabs as the signs that picture them.
fn harmless(text: &str) -> String {
    let sign = |c: char| match c {
        '\n' | '\t' => c,
        '\0'..='\x1f' => char::from_u32(0x2400 + u32::from(c)).unwrap_or('\u{FFFD}'),
        '\x7f' => '\u{2421}',
        _ if c.is_control() => '\u{FFFD}',
        // Marks that turn the reading direction of what follows.
        '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => '\u{FFFD}',
        _ => c,
    };
    text.chars().map(sign).collect()
}

/// The engine, overheard.
pub struct Aloud<'a> {
    pub engine: &'a mut Embedded,
    pub frontend: &'a Frontend,
    pub saving: Option<&'a mut Saving>,
    pub screen: Screen,
    /// Pictures that were asked about; the views behind them are closer looks.
    pub asked: usize,
    /// Views that were told of.
    pub told: usize,
}

impl Aloud<'_> {
    fn tell_views(&mut self, stream: &Stream) -> Result<()> {
        for placed in stream.images.iter().skip(self.told) {
            let picture = self.frontend.pictures.get(&placed.path)?;
            let size = picture.size();
            println!("{}", self.screen.aside(&seen(placed, self.told < self.asked, &size.to_string())));
            if let Some(saving) = &mut self.saving {
                let file = saving.view(&picture, &placed.view)?;
                println!("{}", wrote(self.screen, &file));
            }
            self.told += 1;
        }
        Ok(())
    }

    /// One turn: its words as they come, then how long they took.
    fn listen(&mut self, prompt: &Prompt, sampling: &Sampling) -> Result<Vec<Completion>> {
        self.tell_views(prompt.stream)?;
        println!("{}", self.screen.head("── assistant"));
        io::stdout().flush()?;
        let started = Instant::now();
        let mut reading = Some(Progress::start("reading the prompt", "prompt", 0, 1));
        // Where boxes are not JSON, special tokens are their words.
        let mut words = self.frontend.chat.words(self.frontend.convention.is_json());
        let (mut read, mut last) = (0.0, '\n');
        let mut say = |text: &str| -> Result<()> {
            if let Some(end) = text.chars().last() {
                last = end;
                let mut out = io::stdout().lock();
                out.write_all(harmless(text).as_bytes())?;
                out.flush()?;
            }
            Ok(())
        };
        let completions = self.engine.sample_aloud(prompt, sampling, &mut |id| {
            if reading.take().is_some() {
                read = started.elapsed().as_secs_f64();
            }
            say(&words.push(id)?)
        })?;
        say(&words.rest()?)?;
        if last != '\n' {
            println!();
        }
        let spoken: usize = completions.iter().map(|c| c.ids.len()).sum();
        let took = started.elapsed().as_secs_f64();
        // The first token comes of the prompt.
        let each = (took - read) / (spoken.max(2) - 1) as f64;
        let pace = if each < 0.1 { format!("{:.0} ms", each * 1e3) } else { format!("{each:.2} s") };
        let told = format!("   {spoken} tokens in {took:.1} s: the first after {read:.1} s, then {pace} each");
        println!("{}", self.screen.aside(&told));
        Ok(completions)
    }
}

/// What a view shows: a whole picture, or where a closer look was taken.
fn seen(placed: &Placed, whole: bool, size: &str) -> String {
    let (path, view) = (placed.path.display(), &placed.view);
    if whole {
        return format!("   {path}: {size} pixels, seen as {}", view.size);
    }
    format!("   a closer look at {} of {path}, seen as {}", super::corners(&view.region), view.size)
}

impl Sampler for Aloud<'_> {
    fn sample(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<Vec<Vec<Completion>>> {
        prompts.iter().map(|prompt| self.listen(prompt, sampling)).collect()
    }

    fn end_step(&mut self) {
        self.engine.end_step();
    }
}

/// That a file was saved.
pub fn wrote(screen: Screen, path: &Path) -> String {
    screen.aside(&format!("   wrote {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What would clear the screen, ring, move the cursor or turn the text round is shown instead.
    #[test]
    fn words_cannot_order_a_terminal_about() {
        assert_eq!(harmless("a\x1b[2Jb\r\x07\tc\n"), "a␛[2Jb␍␇\tc\n");
        assert_eq!(harmless("\u{9b}31m \u{7f} \u{202e}olleh"), "\u{FFFD}31m ␡ \u{FFFD}olleh");
        assert_eq!(harmless("größer 🦊 狐"), "größer 🦊 狐");
    }
}
