//! Progress on stderr: how far, how fast, how long still, and the last numbers worth seeing.
//!
//! Hides terminals. On a terminal a bar; otherwise a plain line every few seconds, so that a log file stays readable. Nothing at all for work
//! that ends within two seconds. What must stay true: stdout is never touched, and a message said with [`say`] is never drawn over.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Work shorter than this shows nothing.
const QUIET: Duration = Duration::from_secs(2);
/// How often the display is renewed.
const TICK: Duration = Duration::from_millis(200);
/// How often a plain line is printed when stderr is not a terminal.
const PLAIN: Duration = Duration::from_secs(5);

fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// Prints a line on stderr above whatever bars are shown.
pub fn say(text: &str) {
    bars().suspend(|| eprintln!("{text}"));
}

/// The same, once in a process: for what comes back every epoch.
pub fn say_once(text: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(text.to_owned()) {
        say(text);
    }
}

/// Whether colours may be used on stderr: it is a terminal and they are wanted.
pub fn colours() -> bool {
    std::io::stderr().is_terminal() && colours_wanted()
}

/// Whether colours may be used where there is a terminal: `NO_COLOR` (<https://no-color.org>) is not set.
pub fn colours_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// The state of one piece of work.
#[derive(Clone, Debug)]
struct State {
    what: String,
    unit: String,
    done: u64,
    total: u64,
    /// What was already done when the clock started (a resumed run).
    before: u64,
    message: String,
}

/// A piece of work with a known number of parts, shown while it lasts. Dropping it takes the bar away.
#[derive(Debug)]
pub struct Progress {
    state: Arc<Mutex<State>>,
    started: Instant,
    shown: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Progress {
    /// Starts showing `what`, counted in `unit`s ("step", "question"), `done` of `total` already behind us.
    pub fn start(what: &str, unit: &str, done: u64, total: u64) -> Self {
        let state = State { what: what.into(), unit: unit.into(), done, total, before: done, message: String::new() };
        let state = Arc::new(Mutex::new(state));
        let started = Instant::now();
        let (stop, stopped) = channel();
        let watched = Arc::clone(&state);
        // A thread of its own, so that time goes on for the reader while one long step is being worked on.
        let thread = std::thread::Builder::new().name("progress".into()).spawn(move || {
            let terminal = std::io::stderr().is_terminal();
            let mut bar: Option<ProgressBar> = None;
            let mut printed: Option<(Instant, u64)> = None;
            // Anything else than a timeout means that the work is over.
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(TICK) {
                let elapsed = started.elapsed();
                if elapsed < QUIET {
                    continue;
                }
                let now = read(&watched);
                if terminal {
                    let bar = bar.get_or_insert_with(|| new_bar(&now));
                    bar.set_position(now.done);
                    bar.set_length(now.total);
                    bar.set_message(tail(&now, elapsed));
                } else if printed
                    .is_none_or(|(at, done)| at.elapsed() >= PLAIN && (done != now.done || at.elapsed() >= 6 * PLAIN))
                {
                    printed = Some((Instant::now(), now.done));
                    eprintln!("{} {}/{} {}", now.what, now.done, now.total, tail(&now, elapsed));
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        });
        // Without a thread there is no display; the work goes on all the same.
        Progress { state, started, shown: thread.ok().map(|thread| (stop, thread)) }
    }

    /// Counts one more part done and shows `message` (the last metrics) beside the bar.
    pub fn step(&self, message: impl Into<String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done += 1;
        state.message = message.into();
    }

    /// Sets how much is done of how much; for work that counts itself.
    pub fn at(&self, done: u64, total: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done = done;
        state.total = total;
    }

    /// Counts `parts` more done.
    pub fn add(&self, parts: u64) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).done += parts;
    }

    /// Shows `message` beside the bar.
    pub fn note(&self, message: impl Into<String>) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).message = message.into();
    }

    /// Takes the bar away and, if the work took long enough to be shown, says how long it took.
    pub fn finish(mut self) {
        self.stop();
        let elapsed = self.started.elapsed();
        if elapsed >= QUIET {
            let state = read(&self.state);
            let message = if state.message.is_empty() { String::new() } else { format!(" · {}", state.message) };
            say(&format!(
                "{} {}/{} in {}{message}",
                state.what,
                state.done,
                state.total,
                duration(elapsed.as_secs_f64())
            ));
        }
    }

    fn stop(&mut self) {
        if let Some((stop, thread)) = self.shown.take() {
            // The thread may have ended already; either way there is nothing left to stop.
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop();
    }
}

fn read(state: &Mutex<State>) -> State {
    state.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn new_bar(state: &State) -> ProgressBar {
    let template = if colours() {
        "{prefix:.bold} {bar:24.cyan/8} {pos}/{len} {wide_msg:.dim}"
    } else {
        "{prefix} {bar:24} {pos}/{len} {wide_msg}"
    };
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─");
    let bar = ProgressBar::with_draw_target(Some(state.total), ProgressDrawTarget::hidden())
        .with_style(style)
        .with_prefix(state.what.clone());
    bars().add(bar)
}

/// Rate, time left and the message: what stands after "12/60".
fn tail(state: &State, elapsed: Duration) -> String {
    let new = state.done.saturating_sub(state.before);
    let mut parts = Vec::new();
    if new > 0 && elapsed > Duration::ZERO {
        let each = elapsed.as_secs_f64() / new as f64;
        parts.push(if each >= 1.0 {
            format!("{each:.1} s/{}", state.unit)
        } else {
            format!("{:.1} {}s/s", 1.0 / each, state.unit)
        });
        let left = state.total.saturating_sub(state.done);
        if left > 0 {
            parts.push(format!("{} left", duration(each * left as f64)));
        }
    } else {
        parts.push(duration(elapsed.as_secs_f64()));
    }
    if !state.message.is_empty() {
        parts.push(state.message.clone());
    }
    parts.join(" · ")
}

/// Seconds as a person says them: `8 s`, `3 min 05 s`, `2 h 07 min`.
pub fn duration(seconds: f64) -> String {
    // f64 to u64 saturates: not a number is 0, infinity the largest.
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(done: u64, before: u64) -> State {
        State { what: "training".into(), unit: "step".into(), done, total: 60, before, message: "reward 0.41".into() }
    }

    #[test]
    fn the_rate_counts_only_what_this_process_did() {
        // Resumed at 20, now at 30 after 25 s: 2.5 s each, 30 left make 75 s.
        assert_eq!(tail(&state(30, 20), Duration::from_secs(25)), "2.5 s/step · 1 min 15 s left · reward 0.41");
        assert_eq!(tail(&state(40, 0), Duration::from_secs(10)), "4.0 steps/s · 5 s left · reward 0.41");
        assert_eq!(tail(&state(60, 0), Duration::from_secs(60)), "1.0 s/step · reward 0.41");
        // Nothing done yet: no rate is invented.
        assert_eq!(tail(&state(20, 20), Duration::from_secs(7)), "7 s · reward 0.41");
    }

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(0.4), "0 s");
        assert_eq!(duration(59.6), "1 min 00 s");
        assert_eq!(duration(185.0), "3 min 05 s");
        assert_eq!(duration(7620.0), "2 h 07 min");
        assert_eq!(duration(f64::NAN), "0 s");
    }

    #[test]
    fn short_work_starts_and_ends_in_silence() {
        let progress = Progress::start("reading", "row", 0, 3);
        progress.step("");
        progress.add(2);
        progress.note("done");
        assert_eq!(read(&progress.state).done, 3);
        progress.finish();
    }
}
