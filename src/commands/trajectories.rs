//! `foveate data trajectories`: its flags, and what it says when it is done.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::config::BadConfig;
use crate::eval;
use crate::openai::Price;
use crate::run::Interrupt;
use crate::synth::teacher;
use crate::synth::trajectories::{self, Detail, Episodes, Teacher};

#[derive(Args)]
pub struct Trajectories {
    /// JSONL rows with `objects` and `relations`, such as those of `data make pairs`; for an endpoint, `targets` are enough
    rows: PathBuf,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// At most so many traces a task
    #[arg(long)]
    per_task: Option<usize>,
    /// Share of the rows that traces are made for
    #[arg(long, default_value_t = 0.5)]
    share: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Episodes (RUN/episodes/N.jsonl of `eval`) of these rows answered directly: keep a trace only if with it the answer is
    /// better, by MG-Thinker's rule
    #[arg(long, value_name = "FILE", requires = "reasoned")]
    direct: Option<PathBuf>,
    /// The same answered with the traces (template mirg_traced)
    #[arg(long, value_name = "FILE", requires = "direct")]
    reasoned: Option<PathBuf>,
    #[arg(long)]
    json: bool,
    /// Who writes the traces
    #[arg(long, value_enum, default_value_t = Who::Rules)]
    teacher: Who,
    /// Traces by rules that say only what the answer hangs on, for small models
    #[arg(long)]
    brief: bool,
    #[command(flatten)]
    endpoint: Endpoint,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Who {
    /// Composed from the rows' facts, on this machine
    Rules,
    /// A model that sees the pictures, behind any OpenAI-compatible server
    Endpoint,
}

#[derive(Args)]
#[command(next_help_heading = "With --teacher endpoint")]
struct Endpoint {
    /// The server's address, for instance http://localhost:8000/v1
    #[arg(long)]
    url: Option<String>,
    /// The model's name there
    #[arg(long, requires = "url")]
    model: Option<String>,
    /// Environment variable that holds the key; a server that needs none does without
    #[arg(long, value_name = "NAME", default_value = "OPENAI_API_KEY", requires = "url")]
    api_key_env: String,
    /// Calls under way at once
    #[arg(long, value_name = "N", default_value = "4", requires = "url")]
    concurrency: NonZeroUsize,
    /// At most so many calls a minute
    #[arg(long, value_name = "N", requires = "url")]
    requests_per_minute: Option<f64>,
    /// Further attempts at a row when the server is busy, down or answers nonsense
    #[arg(long, value_name = "N", default_value_t = 5, requires = "url")]
    max_retries: usize,
    /// Seconds that one attempt may take
    #[arg(long, value_name = "SECONDS", default_value = "300", requires = "url")]
    timeout: NonZeroU64,
    /// [default: the server's own]
    #[arg(long, requires = "url")]
    temperature: Option<f64>,
    /// Most tokens of an answer [default: the server's own]
    #[arg(long, value_name = "N", requires = "url")]
    max_tokens: Option<NonZeroUsize>,
    /// Pictures with more pixels are sent smaller
    #[arg(long, value_name = "N", default_value = "1048576", requires = "url")]
    max_pixels: NonZeroU64,
    /// Record of all calls; what is answered there is not asked again [default: OUT.calls.jsonl]
    #[arg(long, value_name = "FILE", requires = "url")]
    calls: Option<PathBuf>,
    /// What a million tokens cost, for the sum at the end
    #[arg(long, num_args = 2, value_names = ["READ", "WRITTEN"], requires = "url")]
    price: Option<Vec<f64>>,
}

impl Endpoint {
    fn options(self, out: &Path) -> Result<teacher::Options> {
        let missing = |flag: &str| BadConfig(format!("--teacher endpoint needs {flag}"));
        let url = self.url.ok_or_else(|| missing("--url, the address of a server such as http://localhost:8000/v1"))?;
        let model = self.model.ok_or_else(|| missing("--model, the name of a model of the server"))?;
        if let Some(temperature) = self.temperature {
            let expected = format!("--temperature {temperature}: expected 0 or more");
            ensure!(temperature.is_finite() && temperature >= 0.0, BadConfig(expected));
        }
        let price = match self.price.as_deref() {
            Some(&[read, written]) => Some(Price(read, written)),
            _ => None,
        };
        price.map_or(Ok(()), |price| price.validate("--price"))?;
        let calls = match self.calls {
            Some(calls) => calls,
            None => {
                beside(out).ok_or_else(|| missing("--calls, a file, because --out names no folder to put it beside"))?
            }
        };
        Ok(teacher::Options {
            api_key_env: self.api_key_env,
            concurrency: self.concurrency,
            requests_per_minute: self.requests_per_minute,
            max_retries: self.max_retries,
            timeout: Duration::from_secs(self.timeout.get()),
            temperature: self.temperature,
            max_tokens: self.max_tokens.map(NonZeroUsize::get),
            max_pixels: self.max_pixels.get(),
            price,
            ..teacher::Options::new(&url, &model, calls)
        })
    }
}

/// `OUT.calls.jsonl`: the folder itself appears at the end, and may be removed without losing what was paid for.
fn beside(out: &Path) -> Option<PathBuf> {
    let mut name = out.file_name()?.to_owned();
    name.push(".calls.jsonl");
    Some(out.with_file_name(name))
}

impl Trajectories {
    fn options(self) -> Result<trajectories::Options> {
        let teacher = match self.teacher {
            Who::Endpoint => {
                let in_vain = "--brief is for traces by rules; an endpoint writes as its model does";
                ensure!(!self.brief, BadConfig(in_vain.into()));
                Teacher::Endpoint(Box::new(self.endpoint.options(&self.out)?))
            }
            Who::Rules => {
                let in_vain = "--url is for --teacher endpoint; give both, or neither for traces by rules";
                ensure!(self.endpoint.url.is_none(), BadConfig(in_vain.into()));
                Teacher::Rules(if self.brief { Detail::Brief } else { Detail::Full })
            }
        };
        let episodes = self.direct.zip(self.reasoned).map(|(direct, reasoned)| Episodes { direct, reasoned });
        let Trajectories { rows, out, per_task, share, seed, .. } = self;
        Ok(trajectories::Options { rows, out, per_task, share, seed, teacher, episodes })
    }

    pub fn run(self) -> Result<()> {
        let json = self.json;
        let options = self.options()?;
        let interrupt = match &options.teacher {
            // Work of seconds, which Ctrl-C may end as usual.
            Teacher::Rules(_) => Interrupt::none(),
            Teacher::Endpoint(_) => Interrupt::install()?,
        };
        let report = trajectories::build(&options, &interrupt)?;
        if json {
            println!("{}", json!({"out": options.out, "report": report, "spent": report.spent}));
            return Ok(());
        }
        println!("{}", options.out.display());
        eprintln!("{} rows: {} with a trace, {} kept for RL", report.rows, report.kept, report.for_rl);
        for (reason, n) in &report.rejected {
            eprintln!("  {n} without: {}", eval::name_of(reason).replace('_', " "));
        }
        if let (Some(spent), Teacher::Endpoint(server)) = (&report.spent, &options.teacher) {
            let (calls, tokens) = (spent.calls, spent.prompt_tokens + spent.completion_tokens);
            let cost = spent.cost.map(|cost| format!(" ({cost:.2})")).unwrap_or_default();
            eprintln!(
                "{calls} calls: {} rows answered for {tokens} tokens{cost}, {} answered before",
                spent.answered, spent.reused
            );
            if let Some((row, why)) = spent.failed.first() {
                eprintln!(
                    "{} rows got no answer, for instance {row}: {why}; to ask for them again, remove the folder and give the same \
                     command. All calls are in {}",
                    spent.failed.len(),
                    server.calls.display()
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        command: Trajectories,
    }

    fn options(flags: &[&str]) -> Result<trajectories::Options> {
        Line::try_parse_from(["trajectories", "rows.jsonl", "--out", "runs/traces/"].iter().chain(flags))?
            .command
            .options()
    }

    #[test]
    fn the_command_line_and_the_library_mean_the_same() {
        let options = options(&["--teacher", "endpoint", "--url", "http://h/v1", "--model", "m"]).unwrap();
        let Teacher::Endpoint(said) = options.teacher else { panic!("an endpoint was asked for") };
        let meant = teacher::Options::new("http://h/v1", "m", "runs/traces.calls.jsonl");
        assert_eq!(format!("{said:?}"), format!("{meant:?}"));
    }

    #[test]
    fn flags_given_in_vain_are_noticed() {
        assert!(matches!(options(&[]).unwrap().teacher, Teacher::Rules(Detail::Full)));
        for (flags, word) in [
            (&["--teacher", "endpoint"][..], "--url"),
            (&["--teacher", "endpoint", "--url", "http://h"], "--model"),
            (&["--url", "http://h", "--model", "m"], "--teacher endpoint"),
            (&["--concurrency", "2"], "--url"),
            (&["--brief", "--teacher", "endpoint", "--url", "http://h", "--model", "m"], "--brief"),
            (&["--teacher", "endpoint", "--url", "http://h", "--model", "m", "--temperature", "nan"], "--temperature"),
            (&["--direct", "a.jsonl"], "--reasoned"),
        ] {
            let error = options(flags).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(word), "{flags:?}: {error}");
        }
    }
}
