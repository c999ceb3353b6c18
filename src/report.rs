//! A run folder as one HTML file: result table, curves, episodes with their pictures, boxes and words.
//!
//! The page opens from disk, reaches for no network and works without scripts; a few lines of script filter the episodes. Input is run folders
//! and the pictures their episodes name, nothing else. What must stay true: every string from outside passes `html::escape`, a missing file leaves a
//! gap and a note on the page rather than no page, and the same folders give the same bytes.

mod chart;
mod curves;
mod episode;
mod html;
mod pictures;
mod record;
mod table;

pub use table::{Cell, Row, TABLE, Table, Unit, tables_json};

use crate::progress;
use crate::run::{self, CONFIG, ENVIRONMENT, Environment, METRICS, Metrics};
use anyhow::{Context, Result, bail};
use chart::COLOURS;
use html::{escape, number};
use pictures::Pictures;
use record::Record;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The page's file name in a run folder.
pub const REPORT: &str = "report.html";
/// Episodes on the page unless asked otherwise.
pub const EPISODES: usize = 20;
/// Steps whose episodes are read: enough for early and late, few enough for runs of any length.
const STEPS_READ: usize = 24;

/// Everything the page shows of one run.
struct Run {
    name: String,
    root: PathBuf,
    metrics: Vec<Metrics>,
    config: Option<String>,
    environment: Option<Environment>,
    tables: Vec<Table>,
    records: Vec<Record>,
    /// The steps that have episodes.
    steps: Vec<u64>,
    /// What could not be read, said on the page.
    notes: Vec<String>,
}

/// Writes the page for `runs` with `episodes` episodes ([`EPISODES`] is a good number). Returns its path: `out` if given; else
/// `report.html` in the folder for one, in the folder that holds them all for several. A folder that is no run itself but holds runs stands for them.
///
/// # Errors
/// When a folder is missing or holds nothing a run leaves, when its metrics or table are damaged, or when the page cannot be written.
pub fn write(runs: &[PathBuf], out: Option<&Path>, episodes: usize) -> Result<PathBuf> {
    let Some(first) = runs.first() else { bail!("name at least one run folder") };
    let out = match out {
        Some(out) => out.to_owned(),
        None => runs[1..].iter().fold(first.clone(), |shared, run| common(&shared, run)).join(REPORT),
    };
    let mut roots: Vec<PathBuf> = Vec::new();
    for folder in runs {
        for root in expand(folder)? {
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
    }
    let loaded = roots.iter().map(|root| load(root)).collect::<Result<Vec<_>>>()?;
    let page = page(&loaded, episodes);
    run::write_atomic(&out, page.as_bytes()).context("writing the report")?;
    Ok(out)
}

/// The folder both paths start with.
fn common(a: &Path, b: &Path) -> PathBuf {
    let shared: PathBuf =
        a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(part, _)| part).collect();
    if shared.as_os_str().is_empty() { PathBuf::from(".") } else { shared }
}

/// The folder itself if it holds anything to show, and the runs inside it.
fn expand(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut inside: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("opening the run folder: {}", folder.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| shows(path))
        .collect();
    // Trainings first, evaluations after them.
    inside.sort_by_key(|path| (!path.join(METRICS).is_file(), path.clone()));
    let own = shows(folder);
    if !own && inside.is_empty() {
        bail!(
            "this is not a run folder: it holds no {METRICS}, {CONFIG}, {TABLE} or episodes, nor a folder that does: {}",
            folder.display()
        );
    }
    let mut roots = if own { vec![folder.to_owned()] } else { Vec::new() };
    roots.extend(inside);
    Ok(roots)
}

/// Whether a folder holds anything the page can show.
fn shows(folder: &Path) -> bool {
    run::holds_run(folder) || folder.join(TABLE).is_file()
}

impl Run {
    /// When an episode was played: its step; in an evaluation, whose "steps" are the rows of its table in order, the row's name.
    fn when(&self, step: u64) -> String {
        let row = self.tables.first().filter(|table| self.metrics.is_empty() && table.rows.len() == self.steps.len());
        let row = row.and_then(|table| table.rows.get(self.steps.iter().position(|&one| one == step)?));
        row.map_or_else(|| format!("step {step}"), |row| row.name.clone())
    }
}

fn load(root: &Path) -> Result<Run> {
    let mut notes = Vec::new();
    let metrics = run::metrics(root)?;
    notes.extend(metrics.note);
    let path = root.join(TABLE);
    let tables = match optional(&path)? {
        Some(text) => {
            table::read_tables(&text).with_context(|| format!("this is not a result table: {}", path.display()))?
        }
        None => Vec::new(),
    };
    let environment = optional(&root.join(ENVIRONMENT))?.and_then(|text| match serde_json::from_str(&text) {
        Ok(environment) => Some(environment),
        Err(error) => {
            notes.push(format!("{ENVIRONMENT} cannot be read: {error}"));
            None
        }
    });
    let steps = run::episode_steps(root)?;
    let mut records = Vec::new();
    for index in spread(steps.len(), STEPS_READ) {
        let step = steps[index];
        match run::episodes::<Value>(root, step) {
            Ok(values) => {
                for (line, value) in values.into_iter().enumerate() {
                    match Record::from_value(value) {
                        Ok(mut record) => {
                            // The file's name is the step, whatever the record says.
                            record.step = step;
                            records.push(record);
                        }
                        Err(error) => notes.push(format!("episode {} of step {step} is left out: {error:#}", line + 1)),
                    }
                }
            }
            Err(error) => notes.push(format!("{error:#}")),
        }
    }
    let absolute = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let name =
        absolute.file_name().map_or_else(|| root.display().to_string(), |name| name.to_string_lossy().into_owned());
    Ok(Run {
        name,
        root: root.to_owned(),
        metrics: metrics.rows,
        config: optional(&root.join(CONFIG))?,
        environment,
        tables,
        records,
        steps,
        notes,
    })
}

/// A file's text, or nothing when there is no such file.
fn optional(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// At most `wanted` of the indices below `count`, at even distances, first and last included.
fn spread(count: usize, wanted: usize) -> Vec<usize> {
    if count <= wanted {
        return (0..count).collect();
    }
    (0..wanted).map(|i| i * (count - 1) / (wanted - 1).max(1)).collect()
}

fn page(runs: &[Run], episodes: usize) -> String {
    let title = runs
        .iter()
        .find_map(|run| run.tables.first().map(|table| table.title.clone()).filter(|title| !title.is_empty()));
    let title = title.unwrap_or_else(|| runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(" and "));
    // Runs with curves or episodes get a colour; a folder that only holds the table needs none.
    let shown: Vec<&Run> = runs.iter().filter(|run| !run.metrics.is_empty() || !run.records.is_empty()).collect();
    let tables: String = runs.iter().map(|run| result(&run.tables, &title)).collect();
    let courses: Vec<curves::Course> =
        shown.iter().map(|run| curves::Course { label: &run.name, rows: &run.metrics }).collect();
    let curves = curves::html(&courses);
    let mut pictures = Pictures::default();
    let cards = episode_cards(&shown, episodes, &mut pictures);
    let setup: String = runs.iter().map(setup).collect();
    let notes: String = runs
        .iter()
        .flat_map(|run| &run.notes)
        .map(|note| format!("<p class=\"warning\">{}</p>", escape(note)))
        .collect();

    let mut nav = String::new();
    let mut body = String::new();
    for (id, name, content) in [
        ("result", "Result", tables),
        ("curves", "Curves", if curves.is_empty() { curves } else { legend(&shown) + &curves }),
        ("episodes", "Episodes", cards),
        ("setup", "Setup", setup),
    ] {
        if !content.is_empty() {
            nav.push_str(&format!("<a href=\"#{id}\">{name}</a>"));
            body.push_str(&format!("<section id=\"{id}\"><h2>{name}</h2>{content}</section>"));
        }
    }
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{title} · foveate</title><style>{style}</style></head>\n<body>{shelf}\
         <nav><span class=\"mark\"><i></i>foveate</span>{nav}</nav><main><header class=\"top\"><h1>{title}</h1>{summary}{notes}</header>\n{body}</main>\
         <script>{script}</script></body></html>\n",
        title = escape(&title),
        style = include_str!("report/style.css"),
        shelf = pictures.shelf(),
        summary = summary(&shown),
        script = include_str!("report/filter.js"),
    )
}

/// The tables of a run; those that do not stand under the page's own title say what they are.
fn result(tables: &[Table], title: &str) -> String {
    let heading = |table: &Table| match table.title.as_str() {
        own if own == title || own.is_empty() => String::new(),
        other => format!("<h3>{}</h3>", escape(other)),
    };
    tables.iter().map(|table| heading(table) + &table.html()).collect()
}

/// One card a run: its colour, what it was, how long it took.
fn summary(runs: &[&Run]) -> String {
    let mut html = String::from("<div class=\"runs\">");
    for (index, run) in runs.iter().enumerate() {
        html.push_str(&format!(
            "<div class=\"runcard\"><b><i class=\"swatch s{}\"></i>{}</b><dl>",
            index % COLOURS,
            escape(&run.name)
        ));
        for (name, value) in facts(run) {
            html.push_str(&format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(&name), escape(&value)));
        }
        html.push_str("</dl></div>");
    }
    html + "</div>"
}

fn facts(run: &Run) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
    if let Some(step) = run.metrics.last().and_then(|row| row.get("step")).and_then(Value::as_u64) {
        fact("steps", step.to_string());
    }
    let seconds: f64 = run.metrics.iter().filter_map(|row| row.get("timing_s/step")?.as_f64()).sum();
    if seconds > 0.0 {
        fact("time", progress::duration(seconds));
    }
    if let Some(config) = &run.config {
        let parsed: Option<toml::Table> = config.parse().ok();
        for key in ["task", "model", "objective", "algorithm", "seed"] {
            if let Some(value) = parsed.as_ref().and_then(|config| named(config, key)) {
                fact(key, value);
            }
        }
    }
    if let Some(environment) = &run.environment {
        let commit = environment.commit.as_deref().map(|commit| format!(" ({})", commit.get(..10).unwrap_or(commit)));
        fact("program", format!("foveate {}{}", environment.version, commit.unwrap_or_default()));
        fact("started", environment.started.replace('T', " ").trim_end_matches('Z').to_owned() + " UTC");
    }
    facts
}

/// A plain value of the config by its key, at the top or one level down.
fn named(config: &toml::Table, key: &str) -> Option<String> {
    let plain = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        _ => None,
    };
    let below = || config.values().filter_map(toml::Value::as_table).find_map(|table| plain(table.get(key)?));
    config.get(key).and_then(plain).or_else(below)
}

fn legend(runs: &[&Run]) -> String {
    let mut html = String::from("<p class=\"legend\">");
    for (index, run) in runs.iter().enumerate().filter(|_| runs.len() > 1) {
        html.push_str(&format!("<span><i class=\"swatch s{}\"></i>{}</span>", index % COLOURS, escape(&run.name)));
    }
    html + "<span class=\"quiet\">faint: every step; bold: smoothed; number: the smoothed end</span></p>"
}

/// The episodes' filters and cards: the wanted number shared among the runs.
fn episode_cards(runs: &[&Run], wanted: usize, pictures: &mut Pictures) -> String {
    let with: Vec<(usize, &Run)> =
        runs.iter().copied().enumerate().filter(|(_, run)| !run.records.is_empty()).collect();
    let mut cards = String::new();
    let mut times: Vec<(u64, String)> = Vec::new();
    let mut count = 0;
    for (place, (index, run)) in with.iter().enumerate() {
        // The first runs take what does not divide.
        let share = wanted / with.len() + usize::from(place < wanted % with.len());
        for chosen in record::choose(&run.records, share) {
            let record = &run.records[chosen];
            let when = run.when(record.step);
            let belongs = episode::Belongs {
                run: *index,
                name: &run.name,
                several: with.len() > 1,
                root: &run.root,
                when: &when,
            };
            count += 1;
            cards.push_str(&episode::card(record, &belongs, pictures));
            // Numbers sort as numbers, and names of one evaluation keep its order.
            if !times.contains(&(record.step, when.clone())) {
                times.push((record.step, when));
            }
        }
    }
    if count == 0 {
        return String::new();
    }
    times.sort();
    let read: usize = with.iter().map(|(_, run)| run.records.len()).sum();
    let mut html = String::from(
        "<div class=\"filters\" hidden><div role=\"group\" aria-label=\"verdict\"><button data-verdict=\"\" aria-pressed=\"true\">all</button>\
         <button data-verdict=\"right\" aria-pressed=\"false\">right</button><button data-verdict=\"wrong\" aria-pressed=\"false\">wrong</button></div>",
    );
    if with.len() > 1 {
        html.push_str("<select name=\"run\" aria-label=\"run\"><option value=\"\">every run</option>");
        for (index, run) in &with {
            html.push_str(&format!("<option value=\"{index}\">{}</option>", escape(&run.name)));
        }
        html.push_str("</select>");
    }
    html.push_str("<select name=\"step\" aria-label=\"step\"><option value=\"\">every step</option>");
    for (_, when) in times {
        html.push_str(&format!("<option>{}</option>", escape(&when)));
    }
    html.push_str(&format!(
        "</select><span class=\"quiet\"><output>{count}</output> shown</span></div>\
         <p class=\"legend\"><span><i class=\"box region\"></i>where it looked closer, or says that the answer is</span><span><i class=\"box target\"></i>where the answer is (never shown to the policy)</span>\
         <span class=\"quiet\">{count} chosen from {} read: right and wrong, early and late</span></p><div class=\"cards\">{cards}</div>",
        number(read as f64)
    ));
    html
}

/// Config and environment, folded.
fn setup(run: &Run) -> String {
    let mut html = String::new();
    if let Some(config) = &run.config {
        html.push_str(&format!(
            "<details><summary>{} <span class=\"quiet\">{CONFIG}</span></summary><pre>{}</pre></details>",
            escape(&run.name),
            escape(config)
        ));
    }
    if let Some(environment) = &run.environment {
        let memory = environment
            .memory
            .map_or_else(|| "unknown".into(), |bytes| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)));
        let lines = [
            ("command", environment.command.join(" ")),
            ("program", format!("foveate {}", environment.version)),
            ("commit", environment.commit.clone().unwrap_or_else(|| "not recorded".into())),
            ("started", environment.started.clone()),
            ("system", environment.system.clone()),
            ("processor", environment.cpu.clone()),
            ("threads", environment.threads.to_string()),
            ("memory", memory),
        ];
        let rows: String =
            lines.iter().map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(value))).collect();
        html.push_str(&format!(
            "<details><summary>{} <span class=\"quiet\">{ENVIRONMENT}</span></summary><dl class=\"facts\">{rows}</dl></details>",
            escape(&run.name)
        ));
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const EVIL: &str = "<script>alert(1)</script>\"'> ]]>";

    /// A run with three steps of hostile episodes, curves, config and table.
    fn hostile_run(root: &Path) {
        let run = run::RunFolder::create(root).unwrap();
        let environment = Environment { command: vec![EVIL.into()], cpu: EVIL.into(), ..Environment::default() };
        run.save_plan(&format!("# {EVIL}\ntask = \"crop\"\n"), &environment).unwrap();
        let mut log = run.metrics_log().unwrap();
        for step in 1..=3 {
            log.append(
                step,
                &Metrics::from_iter([
                    ("reward/mean".to_owned(), json!(0.1 * step as f64)),
                    (EVIL.to_owned(), json!(1)),
                ]),
            )
            .unwrap();
            let episode = json!({"id": EVIL, "question": EVIL, "images": [EVIL], "turns": [{"role": "assistant", "text": EVIL}], "reward": 1.0});
            run.write_episodes(step, &[episode, json!({"views": "not a list"})]).unwrap();
        }
        let table = json!({"title": EVIL, "columns": [EVIL], "rows": [{"name": EVIL, "cells": [{"value": 0.5}]}], "notes": [EVIL]});
        run.save(TABLE, table.to_string().as_bytes()).unwrap();
    }

    #[test]
    fn hostile_text_is_harmless_on_the_whole_page() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        hostile_run(&root);
        let out = write(std::slice::from_ref(&root), None, EPISODES).unwrap();
        assert_eq!(out, root.join(REPORT));
        let page = fs::read_to_string(out).unwrap();
        // The one script is ours, and stands at the end.
        assert_eq!(page.matches("<script").count(), 1);
        assert!(!page.contains("alert(1)</script>") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
        assert!(!page.contains("]]>"));
        assert!(page.contains("is left out"), "the unreadable episode is named on the page");
        assert!(!page.contains("http:") && !page.contains("https:"), "the page reaches for no network");
    }

    #[test]
    fn the_same_folder_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        hostile_run(&root);
        let page = || {
            fs::read(write(std::slice::from_ref(&root), Some(&folder.path().join("page.html")), 7).unwrap()).unwrap()
        };
        assert_eq!(page(), page());
    }

    /// The run folder is the interface: nothing beside it is read, so it can be moved or sent to somebody.
    #[test]
    fn a_folder_that_was_moved_gives_the_same_page() {
        let folder = tempfile::tempdir().unwrap();
        let (before, after) = (folder.path().join("here/run"), folder.path().join("there/run"));
        hostile_run(&before);
        let page = |root: &Path| fs::read(write(&[root.to_owned()], None, EPISODES).unwrap()).unwrap();
        let first = page(&before);
        fs::create_dir(folder.path().join("there")).unwrap();
        fs::rename(&before, &after).unwrap();
        assert!(page(&after) == first);
    }

    #[test]
    fn a_folder_of_runs_stands_for_them_and_several_share_a_page() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["grpo", "mgpo"] {
            hostile_run(&folder.path().join(name));
        }
        assert_eq!(expand(folder.path()).unwrap(), [folder.path().join("grpo"), folder.path().join("mgpo")]);
        let out = write(&[folder.path().join("grpo"), folder.path().join("mgpo")], None, EPISODES).unwrap();
        assert_eq!(out, folder.path().join(REPORT));
        let page = fs::read_to_string(out).unwrap();
        assert!(page.contains("<option value=\"1\">mgpo</option>"));
        let nothing = folder.path().join("empty");
        fs::create_dir(&nothing).unwrap();
        let error = format!("{:#}", write(&[nothing], None, EPISODES).unwrap_err());
        assert!(error.contains("not a run folder"), "{error}");
    }

    #[test]
    fn the_steps_of_an_evaluation_are_the_rows_of_its_table() {
        let folder = tempfile::tempdir().unwrap();
        let run = run::RunFolder::create(folder.path().join("eval")).unwrap();
        let row = |name| json!({"name": name, "cells": [{"value": 0.5}, null]});
        run.save(TABLE, json!({"columns": ["a", "b"], "rows": [row("base"), row("MGPO")]}).to_string().as_bytes())
            .unwrap();
        for step in [1, 2] {
            run.write_episodes(step, &[json!({"id": "q", "reward": 1.0})]).unwrap();
        }
        let out = write(&[folder.path().to_owned()], None, EPISODES).unwrap();
        let page = fs::read_to_string(out).unwrap();
        assert!(page.contains("<option>base</option><option>MGPO</option>"), "the filter lists the table's rows");
        assert!(page.contains("data-step=\"MGPO\"") && !page.contains("step 2"));
    }

    #[test]
    fn early_and_late_steps_are_read() {
        assert_eq!(spread(3, 24), [0, 1, 2]);
        assert_eq!(spread(101, 3), [0, 50, 100]);
        assert_eq!(spread(5, 1), [0]);
    }

    #[test]
    fn config_values_are_found_one_level_down() {
        let config: toml::Table = "seed = 3\n[model]\npath = 'x'\n[rl]\ntask = 'crop'".parse().unwrap();
        assert_eq!(named(&config, "seed"), Some("3".into()));
        assert_eq!(named(&config, "task"), Some("crop".into()));
        assert_eq!(named(&config, "model"), None);
    }
}
