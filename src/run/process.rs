//! What a long run asks of its own process: was it asked to stop, how much memory did it take, where did the time go.
//!
//! Hides signals, `/proc` and `getrusage`. What must stay true: the first Ctrl-C never loses work and the second never waits.

use crate::{progress, run::Metrics};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The exit code of a run that was interrupted and could write its checkpoint, or was stopped at once.
pub const EXIT_INTERRUPTED: i32 = 130;

/// A flag that Ctrl-C or SIGTERM raises; loops look at it between steps.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes over Ctrl-C, SIGTERM and SIGHUP for the whole process. The first raises the flag and says so; the second exits with 130.
    /// Every call gives the same flag.
    ///
    /// # Errors
    /// When the operating system refuses the signal handler.
    pub fn install() -> Result<Self> {
        static INSTALLED: OnceLock<Interrupt> = OnceLock::new();
        if let Some(interrupt) = INSTALLED.get() {
            return Ok(interrupt.clone());
        }
        let interrupt = Interrupt::default();
        let asked = Arc::clone(&interrupt.asked);
        // ctrlc runs this on a thread of its own, not in the signal handler, so printing is allowed.
        ctrlc::set_handler(move || {
            if asked.swap(true, Ordering::SeqCst) {
                progress::say("stopped at once; what was written until now can be gone on from");
                std::process::exit(EXIT_INTERRUPTED);
            }
            progress::say("finishing what is under way; press again to stop at once");
        })
        .context("taking over Ctrl-C")?;
        Ok(INSTALLED.get_or_init(|| interrupt).clone())
    }

    /// For a command that has nothing to finish: the same signals end the process at once with 130, after `before`, which may wait for
    /// a file that is being written. What it returns (locks, say) is held until the process has ended.
    ///
    /// # Errors
    /// When the operating system refuses the signal handler.
    pub fn end_at_once<T>(before: impl Fn() -> T + Send + 'static) -> Result<()> {
        ctrlc::set_handler(move || {
            let _held = before();
            std::process::exit(EXIT_INTERRUPTED);
        })
        .context("taking over Ctrl-C")
    }

    /// A flag no signal raises: for library use and tests.
    pub fn none() -> Self {
        Interrupt::default()
    }

    /// Raises the flag from the program itself.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Whether the loop should finish its step, write a checkpoint and end.
    pub fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

/// The most memory this process has held at once, in bytes (0 where the system does not say).
///
/// Linux is asked through `/proc`, which counts from this program's start: `getrusage` also remembers what the process that
/// started it held, so a program called by a larger one would report the larger one's peak as its own.
pub fn peak_rss() -> u64 {
    peak_of("self").unwrap_or_else(|| {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: getrusage writes one rusage into the memory we own; all-zero bytes are a valid rusage if it fails.
        let usage = unsafe {
            libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
            usage.assume_init()
        };
        let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0);
        // Linux counts in KiB, macOS in bytes.
        if cfg!(target_os = "macos") { peak } else { peak * 1024 }
    })
}

/// The most memory that a process has held until now, in bytes. `process` is its number, or `self`; None where there is no
/// `/proc` or no such process any more.
pub fn peak_of(process: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// A run that ended because a person asked for it; the program's exit code is 130.
#[derive(Debug)]
pub struct Interrupted(String);

impl Interrupted {
    /// After `step`, whose checkpoint lies in `folder`.
    pub fn after(step: u64, folder: &std::path::Path) -> Interrupted {
        Interrupted(format!(
            "interrupted after step {step}; its checkpoint is written, go on with --resume: {}",
            folder.display()
        ))
    }

    /// In the demo, which goes on by itself when it is called again.
    pub fn in_demo(out: &std::path::Path) -> Interrupted {
        Interrupted(format!(
            "interrupted; the same command goes on where the training stopped (--overwrite starts over): {}",
            out.display()
        ))
    }

    /// Among the calls of a teacher, which are recorded in `calls`.
    pub fn in_calls(calls: &std::path::Path) -> Interrupted {
        Interrupted(format!(
            "interrupted; the same command goes on and pays for no answer twice, they are in {}",
            calls.display()
        ))
    }

    /// Where answers are recorded as they come.
    pub fn among_answers(folder: &std::path::Path) -> Interrupted {
        Interrupted(format!("interrupted; the answers so far are kept, go on with --resume: {}", folder.display()))
    }

    /// In work that keeps no checkpoint.
    pub fn without_checkpoint() -> Interrupted {
        Interrupted("interrupted; this command keeps no checkpoint, start it again".into())
    }
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// How a command with a config file was called.
#[derive(Clone, Debug)]
pub struct Invocation {
    pub config: std::path::PathBuf,
    /// `key=value`
    pub overrides: Vec<String>,
    /// Print the resolved plan, do nothing.
    pub dry_run: bool,
    pub start: super::Start,
    pub json: bool,
}

impl Invocation {
    /// What `--dry-run` prints: the resolved plan, as TOML or as one JSON object.
    pub fn show<P: Serialize>(&self, plan: &P) -> Result<()> {
        if self.json {
            println!("{}", json!({"config": plan}));
        } else {
            print!("{}", crate::config::to_toml(plan)?);
        }
        Ok(())
    }
}

/// Seconds of one step by part, for the `timing_s/*` metrics.
///
/// ```
/// use foveate::run::{Metrics, Stopwatch};
/// let mut watch = Stopwatch::start();
/// let answer = watch.time("generate", || 6 * 7);
/// let mut metrics = Metrics::new();
/// watch.write(&mut metrics);
/// assert_eq!(answer, 42);
/// assert_eq!(metrics.keys().collect::<Vec<_>>(), ["timing_s/generate", "timing_s/step"]);
/// ```
#[derive(Debug)]
pub struct Stopwatch {
    started: Instant,
    parts: Vec<(&'static str, Duration)>,
}

impl Stopwatch {
    /// Starts the step's clock.
    pub fn start() -> Self {
        Stopwatch { started: Instant::now(), parts: Vec::new() }
    }

    /// Runs `work` and adds its seconds to the part `name`.
    pub fn time<R>(&mut self, name: &'static str, work: impl FnOnce() -> R) -> R {
        let started = Instant::now();
        let result = work();
        self.add(name, started.elapsed());
        result
    }

    /// Adds a duration measured elsewhere to the part `name`.
    pub fn add(&mut self, name: &'static str, duration: Duration) {
        match self.parts.iter_mut().find(|(part, _)| *part == name) {
            Some((_, sum)) => *sum += duration,
            None => self.parts.push((name, duration)),
        }
    }

    /// Seconds since the start.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Writes `timing_s/NAME` for each part and `timing_s/step` for the whole.
    pub fn write(&self, metrics: &mut Metrics) {
        for (name, duration) in &self.parts {
            metrics.insert(format!("timing_s/{name}"), json!(duration.as_secs_f64()));
        }
        metrics.insert("timing_s/step".into(), json!(self.seconds()));
    }
}

/// Where a run ran: saved beside its config so that numbers can be traced to a program and a machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// Version of this program.
    pub version: String,
    /// Commit it was built from, where the build said (`FOVEATE_COMMIT`).
    pub commit: Option<String>,
    /// What it is of; older folders do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<super::Kind>,
    /// The command line.
    pub command: Vec<String>,
    /// When the run started, UTC, `2026-01-31T12:00:00Z`.
    pub started: String,
    /// Operating system and architecture.
    pub system: String,
    /// The processor's name and the vector instructions it has.
    pub cpu: String,
    /// Worker threads.
    pub threads: usize,
    /// Memory of the machine, bytes.
    pub memory: Option<u64>,
}

impl Environment {
    /// Reads the machine and the process.
    pub fn now() -> Self {
        Environment {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("FOVEATE_COMMIT").map(str::to_owned),
            kind: None,
            command: std::env::args().collect(),
            started: now(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            cpu: cpu(),
            threads: rayon::current_num_threads(),
            memory: meminfo("MemTotal"),
        }
    }

    /// Bytes that this process can take at most: what the machine has free, or the limit of the process or its control group
    /// where that is less. What counts towards a limit already is not taken off, since caches are in it that give way. `None`
    /// where the system does not say.
    pub fn memory_left() -> Option<u64> {
        let of_group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|m| m.trim().parse().ok());
        [meminfo("MemAvailable"), of_group, address_space()].into_iter().flatten().min()
    }
}

/// The limit that `ulimit -v` sets.
fn address_space() -> Option<u64> {
    let mut limit = std::mem::MaybeUninit::<libc::rlimit>::zeroed();
    // SAFETY: getrlimit writes one rlimit into the memory we own; it is read only when the call succeeded.
    let limit = unsafe { (libc::getrlimit(libc::RLIMIT_AS, limit.as_mut_ptr()) == 0).then(|| limit.assume_init()) }?;
    (limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// The line `key: value` of a `/proc` file, where there is one.
fn proc_line(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn cpu() -> String {
    let name = proc_line("/proc/cpuinfo", "model name").unwrap_or_else(|| "processor unknown".into());
    let mut sets = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        sets.push("AVX-512");
    } else if std::arch::is_x86_feature_detected!("avx2") {
        sets.push("AVX2");
    }
    if foveate_kernels::pairs::fast() {
        sets.push("AMX");
    }
    if sets.is_empty() { name } else { format!("{name} ({})", sets.join(", ")) }
}

/// Bytes under a key of `/proc/meminfo`, which counts in KiB.
fn meminfo(key: &str) -> Option<u64> {
    let line = proc_line("/proc/meminfo", key)?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The time as it stands in records, UTC, `2026-01-31T12:00:00Z`.
pub fn now() -> String {
    utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

/// Seconds since 1970 as a UTC timestamp. Days to date after Howard Hinnant, "chrono-compatible low-level date algorithms".
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_the_ones_of_date() {
        // `date -u -d @N +%FT%TZ`
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn peak_memory_counts_what_was_touched() {
        let before = peak_rss();
        let block = std::hint::black_box(vec![1_u8; 64 << 20]);
        // The allocation may reuse pages this process already gave back, so the peak is only bounded from below.
        assert!(peak_rss() >= before && peak_rss() >= block.len() as u64);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn less_memory_is_left_than_there_is() {
        let (left, all) = (Environment::memory_left().unwrap(), Environment::now().memory.unwrap());
        assert!(0 < left && left < all, "{left} of {all}");
    }

    #[test]
    fn a_flag_is_shared_by_its_clones() {
        let flag = Interrupt::none();
        let held_by_the_loop = flag.clone();
        assert!(!held_by_the_loop.asked());
        flag.ask();
        assert!(held_by_the_loop.asked());
    }

    #[test]
    fn parts_with_the_same_name_add_up() {
        let mut watch = Stopwatch::start();
        watch.add("update", Duration::from_millis(250));
        watch.add("update", Duration::from_millis(500));
        let mut metrics = Metrics::new();
        watch.write(&mut metrics);
        assert_eq!(metrics["timing_s/update"], json!(0.75));
    }
}
