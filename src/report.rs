//! A run folder as one HTML file: result table, curves, where the policy looks, episodes with their pictures, boxes and words.
//!
//! The page opens from disk, reaches for no network and shows what matters without scripts; with them one walks through hundreds of episodes. Input is run folders
//! and the pictures their episodes name, nothing else. What must stay true: every string from outside passes `html::escape` or `html::json_in_script`, a
//! missing file leaves a gap and a note on the page rather than no page, only the page's own script may run, and the same folders give the same bytes.

mod chart;
mod curves;
mod episode;
mod figures;
mod grounding;
mod html;
mod load;
mod overlap;
mod pictures;
mod record;
mod seeds;
mod setup;
mod table;
mod viewer;

pub use overlap::{overlap_page, summary as overlap_summary};
pub use table::{Cell, Row, TABLE, Table, Unit, tables_json};

use crate::run;
use anyhow::{Context, Result, bail};
use base64::Engine as _;
use chart::COLOURS;
use curves::{Course, Curves};
use html::{escape, json_in_script, number};
use load::Run;
use pictures::Pictures;
use seeds::Family;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use viewer::Shown;

/// The page's file name in a run folder.
pub const REPORT: &str = "report.html";
/// Episodes on the page unless asked otherwise.
pub const EPISODES: usize = 500;
/// Of these, so many are shown without scripts.
const PLAIN_EPISODES: usize = 16;

/// Each subject of the page's script, in the order in which they need each other; and of its style.
const SCRIPTS: [&str; 6] = [
    include_str!("report/page.js"),
    include_str!("report/curves.js"),
    include_str!("report/stage.js"),
    include_str!("report/talk.js"),
    include_str!("report/list.js"),
    include_str!("report/viewer.js"),
];
const STYLES: [&str; 2] = [include_str!("report/page.css"), include_str!("report/viewer.css")];

/// What to write.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The page; else `report.html` in the folder for one run, in the folder that holds them all for several.
    pub out: Option<PathBuf>,
    /// Episodes on the page ([`EPISODES`] is a good number).
    pub episodes: usize,
    /// A folder for figures as files, too.
    pub figures: Option<PathBuf>,
}

/// How every page begins.
pub const DOCTYPE: &str = "<!doctype html>";

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    pub page: PathBuf,
    pub figures: Vec<PathBuf>,
}

/// Writes the page for `runs`. A folder that is no run itself but holds runs stands for them.
///
/// # Errors
/// When a folder is missing or holds nothing a run leaves, when its metrics or table are damaged, or when the page cannot be written.
pub fn write(runs: &[PathBuf], options: &Options) -> Result<Written> {
    let Some(first) = runs.first() else { bail!("name at least one run folder") };
    let out = match &options.out {
        Some(out) => out.clone(),
        None => runs[1..].iter().fold(first.clone(), |shared, run| load::common(&shared, run)).join(REPORT),
    };
    run::ensure_ours(&out, DOCTYPE)?;
    let loaded = load::load_all(runs)?;
    let shown = Contents::of(&loaded, options.episodes);
    let mut pictures = Pictures::of(&shown.pictures());
    let page = shown.page(&mut pictures);
    run::write_atomic(&out, page.as_bytes()).context("writing the report")?;
    let figures = match &options.figures {
        Some(folder) => figures::write(folder, &shown.courses(), &shown.episodes, &mut pictures)?,
        None => Vec::new(),
    };
    Ok(Written { page: out, figures })
}

/// What the page will show, chosen before anything is drawn.
struct Contents<'a> {
    all: &'a [Run],
    /// Runs with curves or episodes get a colour; a folder that only holds the table needs none.
    runs: Vec<(&'a Run, usize)>,
    families: Vec<Family>,
    episodes: Vec<Shown<'a>>,
    strips: Vec<grounding::Strip<'a>>,
}

impl<'a> Contents<'a> {
    fn of(all: &'a [Run], episodes: usize) -> Self {
        let with: Vec<&Run> = all.iter().filter(|run| !run.metrics.is_empty() || !run.records.is_empty()).collect();
        let families = seeds::families(&with);
        let colour =
            |run: usize| families.iter().position(|family| family.members.contains(&run)).unwrap_or(0) % COLOURS;
        let runs: Vec<(&Run, usize)> = with.iter().enumerate().map(|(index, run)| (*run, colour(index))).collect();
        let episodes = viewer::choose(&runs, episodes);
        let strips = grounding::strips(&runs);
        Contents { all, runs, families, episodes, strips }
    }

    fn pictures(&self) -> Vec<pictures::Wanted> {
        viewer::wanted(&self.episodes).into_iter().chain(grounding::wanted(&self.strips)).collect()
    }

    fn courses(&self) -> Vec<Course<'_>> {
        let mut courses = Vec::new();
        for (colour, family) in self.families.iter().enumerate() {
            let runs = family.members.iter().map(|&member| self.runs[member].0.metrics.as_slice()).collect();
            courses.push(Course { label: &family.label, colour: colour % COLOURS, runs });
        }
        courses
    }

    fn page(&self, pictures: &mut Pictures) -> String {
        let titles = self.all.iter().filter_map(|run| run.tables.first().map(|table| &table.title));
        let title = titles.into_iter().find(|title| !title.is_empty()).cloned();
        let names = || self.all.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(" and ");
        let title = title.unwrap_or_else(names);
        let tables: String = self.all.iter().map(|run| result(&run.tables, &title)).collect();
        let Curves { html: curves, data } = curves::draw(&self.courses());
        let curves = if curves.is_empty() { curves } else { self.legend() + &curves };
        let looks = self.looks(pictures);
        let episodes = self.episodes(pictures);
        let setup: String = self.all.iter().map(setup::setup).collect();
        let notes = self.all.iter().flat_map(|run| &run.notes);
        let notes: String = notes.map(|note| format!("<p class=\"warning\">{}</p>", escape(note))).collect();

        let (mut nav, mut body) = (String::new(), String::new());
        for (id, name, content) in [
            ("result", "Result", tables),
            ("curves", "Curves", curves),
            ("looks", "Where it looks", looks),
            ("episodes", "Episodes", episodes),
            ("setup", "Setup", setup),
        ] {
            if !content.is_empty() {
                nav.push_str(&format!("<a href=\"#{id}\">{name}</a>"));
                body.push_str(&format!("<section id=\"{id}\"><h2>{name}</h2>{content}</section>"));
            }
        }
        let shown: Vec<Value> = self.episodes.iter().map(|one| viewer::data(one, pictures)).collect();
        let runs: Vec<Value> =
            self.runs.iter().map(|(run, colour)| json!({"name": run.name, "colour": colour})).collect();
        let data = json_in_script(&json!({"runs": runs, "curves": data, "episodes": shown}));
        let script = SCRIPTS.concat();
        // Only this very text may run: what slipped through every other guard would still not.
        let hash = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(script.as_bytes()));
        format!(
            "{DOCTYPE}\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'\">\
             <meta name=\"color-scheme\" content=\"light dark\"><title>{title} · foveate</title><style>{style}</style></head>\n<body>{shelf}\
             <a class=\"skip\" href=\"#episodes\">to the episodes</a><nav aria-label=\"sections\"><span class=\"mark\"><i></i>foveate</span>{nav}</nav>\
             <main><header class=\"top\"><h1>{title}</h1>{summary}{notes}</header>\n{body}</main>\n\
             <script type=\"application/json\" id=\"data\">{data}</script>{store}\n<script>{script}</script></body></html>\n",
            title = escape(&title),
            style = STYLES.concat(),
            shelf = pictures.shelf(),
            summary = setup::summary(&self.runs),
            store = pictures.store(),
        )
    }

    /// What the colours and lines of the charts mean.
    fn legend(&self) -> String {
        let drawn = |family: &&Family| family.members.iter().any(|&member| !self.runs[member].0.metrics.is_empty());
        let drawn: Vec<&Family> = self.families.iter().filter(drawn).collect();
        let mut html = String::from("<div class=\"legend\" id=\"curve-legend\">");
        for family in drawn.iter().filter(|_| drawn.len() > 1) {
            let colour = self.runs[family.members[0]].1;
            html.push_str(&format!("<span><i class=\"swatch s{colour}\"></i>{}</span>", escape(&family.label)));
        }
        let bands = match drawn.iter().any(|family| family.members.len() > 1) {
            true => "; several seeds: their mean, and a band from the lowest to the highest",
            false => "",
        };
        html + &format!(
            "<span class=\"quiet\">faint: every step; bold: smoothed; number: the smoothed end{bands}</span></div>"
        )
    }

    fn looks(&self, pictures: &mut Pictures) -> String {
        let strips = grounding::strips_html(&self.strips, &self.episodes, pictures);
        let maps = grounding::maps(&self.runs);
        if strips.is_empty() && maps.is_empty() {
            return String::new();
        }
        let about = "<p class=\"legend\"><span><i class=\"box region\"></i>the region that the policy named</span>\
             <span><i class=\"box target\"></i>where the answer is (never shown to the policy)</span>\
             <span class=\"quiet\">the same questions at different moments, taken at even distances, not by how they went</span></p>";
        let part = |name: &str, content: String| match content.is_empty() {
            true => content,
            false => format!("<h3>{name}</h3>{content}"),
        };
        part("The same questions over time", if strips.is_empty() { strips } else { format!("{about}{strips}") })
            + &part("All looks", maps)
    }

    /// The viewer's place, and for readers without scripts a few episodes.
    fn episodes(&self, pictures: &mut Pictures) -> String {
        if self.episodes.is_empty() {
            return String::new();
        }
        let records: Vec<record::Record> = self.episodes.iter().map(|one| one.record.clone()).collect();
        let several = self.runs.len() > 1;
        let mut cards = String::new();
        let chosen = record::choose(&records, PLAIN_EPISODES);
        for &index in &chosen {
            let Shown { run, colour, record, when, key, .. } = &self.episodes[index];
            cards.push_str(&episode::card(
                record,
                &episode::Belongs { run, colour: *colour, several, when, key },
                pictures,
            ));
        }
        let read: usize = self.runs.iter().map(|(run, _)| run.records.len() + run.validation.len()).sum();
        format!(
            "<p class=\"legend\"><span><i class=\"box region\"></i>where it looked closer, or says that the answer is</span><span><i class=\"box target\"></i>where the answer is (never shown to the policy)</span>\
             <span class=\"quiet\">{} episodes of {} read: whole groups, early and late</span></p><div id=\"viewer\"></div>\
             <noscript><p class=\"note\">Without scripts, {} of them are shown: right and wrong, early and late.</p><div class=\"cards\">{cards}</div></noscript>",
            number(self.episodes.len() as f64),
            number(read as f64),
            chosen.len()
        )
    }
}

/// The tables of a run; those that do not stand under the page's own title say what they are.
fn result(tables: &[Table], title: &str) -> String {
    let heading = |table: &Table| match table.title.as_str() {
        own if own == title || own.is_empty() => String::new(),
        other => format!("<h3>{}</h3>", escape(other)),
    };
    tables.iter().map(|table| heading(table) + &table.html()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Environment, Metrics};
    use std::fs;
    use std::path::Path;

    const EVIL: &str = "<script>alert(1)</script>\"'> ]]> <!--";

    /// A run with three steps of hostile episodes, curves, config and table.
    fn hostile_run(root: &Path) {
        let run = run::RunFolder::create(root, run::Kind::Eval).unwrap();
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
            let turn = json!({"role": "assistant", "text": EVIL, "pieces": [EVIL, "</script>"], "bbox": [0, 0, 1, 1], "outcome": EVIL});
            let view = json!({"image": 0, "region": [0, 0, 2, 2], "size": [28, 28]});
            let target = json!({"image": 1, "bbox": [0, 0, 1, 1], "label": EVIL});
            let episode = json!({
                "id": EVIL, "question": EVIL, "answer": EVIL, "task": EVIL, "split": EVIL, "group": EVIL, "member": EVIL, "stop": EVIL,
                "images": [EVIL], "views": [view], "targets": [target], "turns": [turn], "rewards": {EVIL: EVIL}, "reward": 1.0
            });
            run.write_episodes(step, &[episode.clone(), json!({"views": "not a list"})]).unwrap();
            run.write_validation(step, &[episode]).unwrap();
        }
        let table = json!({"title": EVIL, "columns": [EVIL], "rows": [{"name": EVIL, "cells": [{"value": 0.5}]}], "notes": [EVIL]});
        run.save(TABLE, table.to_string().as_bytes()).unwrap();
    }

    fn at(out: &Path) -> Options {
        Options { out: Some(out.to_owned()), episodes: EPISODES, figures: None }
    }

    fn page_of(roots: &[PathBuf]) -> String {
        let options = Options { episodes: EPISODES, ..Options::default() };
        fs::read_to_string(write(roots, &options).unwrap().page).unwrap()
    }

    /// Every script element of a page: how it opens, and what it holds.
    fn scripts(page: &str) -> Vec<(&str, &str)> {
        let elements = page.split("<script").skip(1);
        elements.map(|rest| rest.split_once("</script>").unwrap().0.split_once('>').unwrap()).collect()
    }

    #[test]
    fn hostile_text_is_harmless_on_the_whole_page() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        hostile_run(&root);
        let page = page_of(std::slice::from_ref(&root));
        // Data, and our one script at the end, which is the only one that the page lets run.
        let scripts = scripts(&page);
        let kinds: Vec<&str> = scripts.iter().map(|script| script.0).collect();
        assert_eq!(kinds, [" type=\"application/json\" id=\"data\"", ""]);
        assert_eq!(page.matches("</script").count(), scripts.len());
        assert_eq!(scripts[1].1, SCRIPTS.concat());
        let hash = base64::engine::general_purpose::STANDARD.encode(Sha256::digest(scripts[1].1));
        assert!(page.contains(&format!("script-src 'sha256-{hash}'")));
        assert!(!page.contains("alert(1)</script>") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
        assert!(!page.contains("]]>") && !page.contains("<!--"));
        assert!(page.contains("is left out"), "the unreadable episode is named on the page");
        assert!(!page.contains("http:") && !page.contains("https:"), "the page reaches for no network");
        // The viewer gets the words as they are, and nothing else.
        let data: Value = serde_json::from_str(scripts[0].1).unwrap();
        let episode = &data["episodes"][0];
        assert_eq!((&episode["question"], &episode["turns"][0]["pieces"][0]), (&json!(EVIL), &json!(EVIL)));
        assert_eq!(data["episodes"].as_array().unwrap().len(), 6, "three of training, three held out");
    }

    /// Model text reaches the page through text nodes and attributes of the DOM alone.
    #[test]
    fn the_script_never_makes_markup_of_words() {
        for word in
            ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"]
        {
            assert!(SCRIPTS.iter().all(|script| !script.contains(word)), "{word}");
        }
        assert!(SCRIPTS.iter().all(|script| !script.contains("</script") && !script.contains("<!--")));
    }

    #[test]
    fn the_same_folder_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        hostile_run(&root);
        let options = at(&folder.path().join("page.html"));
        let page = || fs::read(write(std::slice::from_ref(&root), &options).unwrap().page).unwrap();
        assert_eq!(page(), page());
    }

    /// The run folder is the interface: nothing beside it is read, so it can be moved or sent to somebody.
    #[test]
    fn a_folder_that_was_moved_gives_the_same_page() {
        let folder = tempfile::tempdir().unwrap();
        let (before, after) = (folder.path().join("here/run"), folder.path().join("there/run"));
        hostile_run(&before);
        let first = page_of(std::slice::from_ref(&before));
        fs::create_dir(folder.path().join("there")).unwrap();
        fs::rename(&before, &after).unwrap();
        assert!(page_of(std::slice::from_ref(&after)) == first);
    }

    #[test]
    fn a_folder_of_runs_stands_for_them_and_several_share_a_page() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["grpo", "mgpo"] {
            hostile_run(&folder.path().join(name));
        }
        assert_eq!(load::expand(folder.path()).unwrap(), [folder.path().join("grpo"), folder.path().join("mgpo")]);
        let both = [folder.path().join("grpo"), folder.path().join("mgpo")];
        let options = Options { episodes: EPISODES, ..Options::default() };
        let out = write(&both, &options).unwrap().page;
        assert_eq!(out, folder.path().join(REPORT));
        let page = fs::read_to_string(out).unwrap();
        assert!(page.contains("\"runs\":[{\"name\":\"grpo\",\"colour\":0},{\"name\":\"mgpo\",\"colour\":1}]"));
        let nothing = folder.path().join("empty");
        fs::create_dir(&nothing).unwrap();
        let error = format!("{:#}", write(&[nothing], &options).unwrap_err());
        assert!(error.contains("not a run folder"), "{error}");
    }

    #[test]
    fn the_steps_of_an_evaluation_are_the_rows_of_its_table() {
        let folder = tempfile::tempdir().unwrap();
        let run = run::RunFolder::create(folder.path().join("eval"), run::Kind::Eval).unwrap();
        let row = |name| json!({"name": name, "cells": [{"value": 0.5}, null]});
        run.save(TABLE, json!({"columns": ["a", "b"], "rows": [row("base"), row("MGPO")]}).to_string().as_bytes())
            .unwrap();
        for step in [1, 2] {
            run.write_episodes(step, &[json!({"id": "q", "reward": 1.0})]).unwrap();
        }
        let page = page_of(&[folder.path().to_owned()]);
        assert!(page.contains("\"when\":\"base\"") && page.contains("\"when\":\"MGPO\"") && !page.contains("step 2"));
    }

    #[test]
    fn figures_are_files_that_stand_by_themselves() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        let run = run::RunFolder::create(&root, run::Kind::Eval).unwrap();
        ::image::RgbImage::new(40, 30).save(root.join("a.png")).unwrap();
        let mut log = run.metrics_log().unwrap();
        for step in 1..=3 {
            log.append(step, &Metrics::from_iter([("reward/mean".to_owned(), json!(0.1 * step as f64))])).unwrap();
            let turn = json!({"role": "assistant", "text": EVIL, "bbox": [1, 2, 10, 20]});
            let view = json!({"image": 0, "region": [0, 0, 40, 30], "size": [28, 28]});
            let episode = json!({"id": "q", "question": EVIL, "images": ["a.png"], "views": [view], "turns": [turn], "reward": 1.0});
            run.write_episodes(step, &[episode]).unwrap();
        }
        let options = Options { figures: Some(folder.path().join("figures")), ..at(&folder.path().join("page.html")) };
        let written = write(&[root], &options).unwrap();
        let names: Vec<String> =
            written.figures.iter().map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, ["curve-reward-mean.svg", "episode-1.svg", "episode-2.svg", "episode-3.svg"]);
        for path in &written.figures {
            let svg = fs::read_to_string(path).unwrap();
            assert!(!svg.contains("<script") && !svg.contains("<!--"), "{svg}");
            assert_eq!(svg.matches("href=").count(), svg.matches("href=\"data:image/jpeg").count(), "{svg}");
        }
        let episode = fs::read_to_string(&written.figures[1]).unwrap();
        assert!(
            episode.contains("<rect class=\"region\" x=\"1.0\" y=\"2.0\" width=\"9.0\" height=\"18.0\">"),
            "{episode}"
        );
    }
}
