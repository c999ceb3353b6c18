//! The command line. Reads as a contents page: one line a command, the work is in the library.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use foveate::config::BadConfig;
use foveate::{ask, bench, commands, demo, doctor, engine, eval, report, rl, run, sft};
use foveate_kernels::memory::OnLines;

#[global_allocator]
static MEMORY: OnLines = OnLines;

#[derive(Parser)]
#[command(name = "foveate", version, about = "Teaches vision-language models where to look.", max_term_width = 100)]
struct Cli {
    /// Number of threads, at most 1024 (default: all cores)
    #[arg(long, global = true)]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

/// What `score` reads, for its help.
const SCORE_ROWS: &str = r#"A row: {"kind": "choice" | "text" | "number" | "box" | "multi_image", "prediction": TEXT, "answer": ..., "choices"?: [...],
"mode"?: "strict" | "official:NAME", "id"?}, for instance

  echo '{"kind": "choice", "prediction": "<answer>B</answer>", "answer": "B", "choices": ["cat", "dog"]}' | foveate score

All kinds and modes: docs/evaluation.md"#;

#[derive(Subcommand)]
enum Command {
    /// A whole story on this machine: train a small model in several ways, compare, write the report
    Demo {
        #[arg(value_enum, default_value = "mgpo")]
        story: demo::Story,
        /// Folder for runs, data and the report (default: runs/demo, of the other story runs/demo_mirg)
        #[arg(long)]
        out: Option<PathBuf>,
        /// A true miniature, for a first look and for CI
        #[arg(long)]
        quick: bool,
        /// Seed of data, sampling and training order
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Replace an earlier demo in the same folder
        #[arg(long)]
        overwrite: bool,
        /// Train and answer with LibTorch on this device (cpu, cuda, cuda:N) instead of the embedded engine
        #[arg(long)]
        device: Option<String>,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Supervised fine-tuning
    Sft(RunArgs),
    /// Reinforcement learning (GRPO, MGPO and their relatives)
    Rl(RunArgs),
    /// Play only: sample episodes and write them down
    Rollout(RunArgs),
    /// One or more tasks x splits -> a table
    Eval(RunArgs),
    /// Ask a model about a picture and see every turn
    Ask(ask::Options),
    /// Run folders -> one HTML file
    Report {
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Where to write the page (default: report.html in the run folder, or beside several)
        #[arg(long)]
        out: Option<PathBuf>,
        /// Episodes on the page, shared among the runs
        #[arg(long, default_value_t = report::EPISODES)]
        episodes: usize,
        /// Write the main curves and a few episodes as SVG files into this folder, too
        #[arg(long, value_name = "DIR")]
        figures: Option<PathBuf>,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Make the bundled data sets, convert public ones, or check a file of rows
    #[command(subcommand)]
    Data(commands::Data),
    /// New random models, information, export
    #[command(subcommand)]
    Model(commands::Model),
    /// Judge answers: JSON rows on stdin, JSON rows on stdout; or another program's predictions for a benchmark; or compare two evaluations
    #[command(after_help = SCORE_ROWS)]
    Score {
        /// Rows of MIG-Bench, as `data convert` writes them: stdin holds lines of {"id", "prediction", "shown"?}, stdout gets the tables
        #[arg(long, value_name = "ROWS")]
        bench: Option<PathBuf>,
        /// Two evaluations of the same rows, question by question: run folders, or files of their items or episodes
        #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "bench")]
        compare: Vec<PathBuf>,
        /// Enlarge official boxes downward, as MIG-Bench's script does for Migician and for no other model
        #[arg(long, requires = "bench")]
        enlarge: bool,
        /// Tables as JSON (judgements are JSON always)
        #[arg(long)]
        json: bool,
    },
    /// Write every intermediate of one forward pass, to hold against transformers
    Trace(commands::Trace),
    /// Measure one of the standard workloads
    #[command(subcommand)]
    Bench(bench::Workload),
    /// What this machine has, and what a config will need
    Doctor {
        config: Option<PathBuf>,
        /// Overrides, for instance model.recompute=true
        overrides: Vec<String>,
        /// One JSON object on stdout
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct RunArgs {
    /// TOML file of the run
    config: PathBuf,
    /// Overrides, for instance optim.lr=3e-5
    overrides: Vec<String>,
    /// Print the resolved config and the numbers derived from it; do nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on where the run in this folder was stopped: from its newest checkpoint, or its answers
    #[arg(long)]
    resume: bool,
    /// With --resume: go on although the config has changed since the run began
    #[arg(long, requires = "resume")]
    accept_changes: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

impl RunArgs {
    fn invocation(self) -> run::Invocation {
        run::Invocation {
            config: self.config,
            overrides: self.overrides,
            dry_run: self.dry_run,
            start: match (self.resume, self.accept_changes) {
                (false, _) => run::Start::New,
                (true, false) => run::Start::Resume,
                (true, true) => run::Start::ResumeChanged,
            },
            json: self.json,
        }
    }
}

fn main() -> ExitCode {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // `println!` has no error to return. Its panic over a closed pipe is no bug; every other panic is.
        let said = panic.payload().downcast_ref::<String>().map_or("", String::as_str);
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(panic);
    }));
    keep_memory();
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.downcast_ref::<run::Interrupted>().is_some() => {
            eprintln!("{error}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            let usage = error.chain().any(|cause| cause.is::<BadConfig>());
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// Whether the reader of our output went away, as in `foveate score | head -1`: it has what it wanted, so nothing failed. The
/// only pipes this program writes to are the standard ones.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(closed))
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    commands::use_threads(cli.threads)?;
    // On a thread of the pool: from any other, each of the hundreds of thousands of small parallel loops of a run would be handed
    // over and waited for by the operating system, a third of the demo's processor time before this (LOG.md).
    rayon::scope(|_| run_command(cli.command))
}

fn run_command(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo { story, out, quick, seed, overwrite, device, json } => {
            let out = out.unwrap_or_else(|| story.folder().into());
            let engine = engine::Options::on_device(device.as_deref());
            demo::main(&demo::Request { story, out, quick, seed, overwrite, engine, json })
        }
        Command::Sft(args) => sft::main(&args.invocation()),
        Command::Rl(args) => rl::main(&args.invocation()),
        Command::Rollout(args) => rl::rollout_main(&args.invocation()),
        Command::Eval(args) => eval::main(&args.invocation()),
        Command::Ask(options) => ask::main(&options),
        Command::Report { runs, out, episodes, figures, json } => {
            commands::report(&runs, &report::Options { out, episodes, figures }, json)
        }
        Command::Data(command) => command.run(),
        Command::Model(command) => command.run(),
        Command::Score { compare, json, .. } if !compare.is_empty() => {
            commands::score_compare(&compare[0], &compare[1], json)
        }
        Command::Score { bench: Some(rows), enlarge, json, .. } => commands::score_bench(&rows, enlarge, json),
        Command::Score { .. } => commands::score(),
        Command::Trace(command) => command.run(),
        Command::Bench(workload) => workload.run(),
        Command::Doctor { config, overrides, json } => doctor::main(config.as_deref(), &overrides, json),
    }
}

/// Asks glibc to keep freed memory instead of handing it back: a step frees and takes again the same large arrays hundreds of
/// times, and every return costs page faults (a quarter of the time of a step, LOG.md). One arena, because the others are too small
/// for such arrays and would map each of them anew. To be called before there is a second thread.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets parameters of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
        // Never.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
