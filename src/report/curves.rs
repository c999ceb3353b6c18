//! Which curves the page shows, in which order, under which words.
//!
//! Metrics are known by the names users of verl and TRL know. Those asked about first stand first; unknown names are shown too, folded. What must
//! stay true: every number in `metrics.jsonl` can be found on the page.

use super::chart::{COLOURS, Series, chart};
use super::html::{escape, number};
use crate::run::Metrics;
use serde_json::{Value, json};

/// A question a reader has, and the names that answer it: a name belongs to the first section with a word it contains.
struct Section {
    title: &'static str,
    words: &'static [&'static str],
    /// Names wanted first, in this order.
    first: &'static [&'static str],
    folded: bool,
}

const SECTIONS: &[Section] = &[
    Section {
        title: "Time and memory",
        words: &["timing_s/", "perf/", "memory", "throughput", "tokens"],
        first: &["timing_s/step"],
        folded: true,
    },
    Section {
        title: "Where it looks",
        words: &["contain", "crop", "box", "iou", "ground", "tool_call", "num_turns", "image_selection", "dense/"],
        first: &["grounding/contains_target", "grounding/valid_box", "grounding/box_area"],
        folded: false,
    },
    Section {
        title: "What it learns",
        words: &["reward", "val/", "acc", "loss/"],
        first: &["reward/mean", "val/accuracy", "val/contains_target", "loss", "accuracy"],
        folded: false,
    },
    Section {
        title: "What it writes",
        words: &["length", "stop", "token", "truncat", "drift"],
        first: &["response_length/mean"],
        folded: false,
    },
    Section {
        title: "How it is optimised",
        words: &[
            "actor/",
            "loss",
            "entropy",
            "kl",
            "grad_norm",
            "lr",
            "clip",
            "ratio",
            "advantage",
            "mismatch",
            "correction",
            "sft/",
        ],
        first: &["actor/entropy", "actor/kl_loss", "actor/grad_norm", "actor/pg_loss", "actor/pg_clipfrac", "actor/lr"],
        folded: false,
    },
];

/// The order in which sections stand on the page, as indices into [`SECTIONS`].
const ORDER: &[usize] = &[2, 1, 3, 4, 0];

/// Charts shown before the rest of a section is folded.
const SHOWN: usize = 6;

/// Steps of a curve that are handed to the page's script; of longer ones it gets the means of stretches.
const MOST_STEPS: usize = 2000;

/// One experiment's metrics: of a run, or of several that differ by their seed.
pub struct Course<'a> {
    pub label: &'a str,
    pub colour: usize,
    pub runs: Vec<&'a [Metrics]>,
}

/// The charts of a page.
#[derive(Default)]
pub struct Curves {
    /// Sections of charts, empty when no run has metrics.
    pub html: String,
    /// What each chart shows, in the order of their `data-curve`, so that a script can smooth it otherwise.
    pub data: Vec<Value>,
}

/// Draws every metric of the runs.
pub fn draw(courses: &[Course]) -> Curves {
    let mut curves = Curves::default();
    for (title, names, folded) in sections(courses) {
        section(title, &names, courses, folded, &mut curves);
    }
    curves
}

/// The sections with their metrics' names in the order of the page.
fn sections<'a>(courses: &[Course<'a>]) -> Vec<(&'static str, Vec<&'a str>, bool)> {
    let mut names: Vec<&str> = Vec::new();
    let mut known = std::collections::HashSet::new();
    for row in courses.iter().flat_map(|course| &course.runs).copied().flatten() {
        for (name, value) in row {
            if name != "step" && value.is_number() && known.insert(name.as_str()) {
                names.push(name);
            }
        }
    }
    let mut sections = Vec::new();
    for &index in ORDER {
        let section = &SECTIONS[index];
        let mut mine: Vec<&str> = names.iter().copied().filter(|name| section_of(name) == Some(index)).collect();
        mine.sort_by_key(|name| section.first.iter().position(|first| first == name).unwrap_or(usize::MAX));
        sections.push((section.title, mine, section.folded));
    }
    let rest: Vec<&str> = names.iter().copied().filter(|name| section_of(name).is_none()).collect();
    sections.push(("Everything else", rest, true));
    sections
}

/// The metrics asked about first, with their charts' series: what a paper would show.
pub fn main_curves<'a>(courses: &[Course<'a>]) -> Vec<(&'a str, Vec<Series>, bool)> {
    let of = |name: &'a str| (name, series(name, courses), is_share(name, &series(name, courses)));
    let wanted = |name: &str| SECTIONS.iter().any(|section| !section.folded && section.first.contains(&name));
    sections(courses).into_iter().flat_map(|(_, names, _)| names).filter(|name| wanted(name)).map(of).collect()
}

fn section_of(name: &str) -> Option<usize> {
    let wanted = SECTIONS.iter().position(|section| section.first.contains(&name));
    wanted.or_else(|| named_section(name))
}

fn named_section(name: &str) -> Option<usize> {
    SECTIONS.iter().position(|section| section.words.iter().any(|word| name.contains(word)))
}

fn section(title: &str, names: &[&str], courses: &[Course], folded: bool, curves: &mut Curves) {
    let charts: Vec<String> = names.iter().filter_map(|name| figure(name, courses, &mut curves.data)).collect();
    if charts.is_empty() {
        return;
    }
    let html = &mut curves.html;
    let grid = |charts: &[String]| format!("<div class=\"charts\">{}</div>", charts.concat());
    if folded {
        html.push_str(&format!(
            "<details><summary>{title} <span class=\"quiet\">{}</span></summary>{}</details>",
            charts.len(),
            grid(&charts)
        ));
        return;
    }
    let (shown, more) = charts.split_at(charts.len().min(SHOWN));
    html.push_str(&format!("<h3>{title}</h3>{}", grid(shown)));
    if !more.is_empty() {
        html.push_str(&format!("<details><summary>{} more</summary>{}</details>", more.len(), grid(more)));
    }
}

/// A metric of all experiments that have it.
fn series(name: &str, courses: &[Course]) -> Vec<Series> {
    let has = |points: &Vec<(f64, f64)>| points.iter().any(|point| point.1.is_finite());
    courses
        .iter()
        .map(|course| Series {
            label: course.label.to_owned(),
            colour: course.colour % COLOURS,
            runs: course.runs.iter().map(|rows| points(rows, name)).filter(has).collect(),
            exact: name == "lr" || name.ends_with("/lr"),
        })
        .filter(|series| !series.runs.is_empty())
        .collect()
}

fn figure(name: &str, courses: &[Course], data: &mut Vec<Value>) -> Option<String> {
    let series = series(name, courses);
    let share = is_share(name, &series);
    let svg = chart(name, &series, share)?;
    let mut last = String::new();
    for one in &series {
        if let Some(at) = one.smooth().into_iter().rev().find(|at| at.mean.is_finite()) {
            let text = if share { format!("{:.1} %", at.mean * 100.0) } else { number(at.mean) };
            last.push_str(&format!("<b class=\"s{}\" title=\"{}\">{text}</b>", one.colour, escape(&one.label)));
        }
    }
    let curve = data.len();
    data.push(json!({"name": name, "share": share, "lines": series.iter().map(line).collect::<Vec<_>>()}));
    Some(format!(
        "<figure data-curve=\"{curve}\"><figcaption><span>{}</span>{last}</figcaption>{svg}</figure>",
        escape(name)
    ))
}

fn line(series: &Series) -> Value {
    let run = |points: &Vec<(f64, f64)>| {
        let points = shortened(points);
        let x: Vec<u64> = points.iter().map(|point| point.0 as u64).collect();
        let y: Vec<Option<f64>> = points.iter().map(|point| short(point.1)).collect();
        json!([x, y])
    };
    let runs: Vec<Value> = series.runs.iter().map(run).collect();
    json!({"label": series.label, "colour": series.colour, "exact": series.exact, "runs": runs})
}

/// Five digits are more than a chart shows.
fn short(value: f64) -> Option<f64> {
    value.is_finite().then(|| format!("{value:.4e}").parse().unwrap_or(value))
}

fn shortened(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_STEPS {
        return points.to_vec();
    }
    let mean = |part: &[(f64, f64)]| {
        let known: Vec<f64> = part.iter().map(|point| point.1).filter(|value| value.is_finite()).collect();
        (part[part.len() - 1].0, known.iter().sum::<f64>() / known.len() as f64)
    };
    points.chunks(points.len().div_ceil(MOST_STEPS)).map(mean).collect()
}

/// (step, value) of one metric; a row that lacks it has no point, a null in it is a gap.
fn points(rows: &[Metrics], name: &str) -> Vec<(f64, f64)> {
    rows.iter()
        .filter_map(|row| {
            let step = row.get("step")?.as_f64()?;
            Some((step, row.get(name)?)).map(|(step, value)| (step, Value::as_f64(value).unwrap_or(f64::NAN)))
        })
        .collect()
}

/// Whether the metric is a share, to be drawn between 0 and 1: its name says so and its values agree.
fn is_share(name: &str, series: &[Series]) -> bool {
    const WORDS: &[&str] =
        &["reward/mean", "rewards/", "acc", "contain", "frac", "rate", "share", "clip_ratio", "iou", "valid"];
    let named = WORDS.iter().any(|word| name.contains(word)) && !name.contains("std") && !name.starts_with("actor/");
    let values = || series.iter().flat_map(|one| &one.runs).flatten().map(|point| point.1);
    named && values().all(|value| !value.is_finite() || (0.0..=1.0).contains(&value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rows(name: &str, values: &[f64]) -> Vec<Metrics> {
        values
            .iter()
            .enumerate()
            .map(|(step, value)| {
                Metrics::from_iter([("step".to_owned(), json!(step)), (name.to_owned(), json!(value))])
            })
            .collect()
    }

    #[test]
    fn a_supervised_run_has_its_loss_first() {
        assert_eq!(section_of("loss"), section_of("accuracy"));
        assert_eq!(section_of("loss"), section_of("loss/list"));
        assert_ne!(section_of("loss"), section_of("actor/pg_loss"));
    }

    #[test]
    fn names_find_their_section() {
        let title = |name| section_of(name).map(|index| SECTIONS[index].title);
        assert_eq!(title("reward/mean"), Some("What it learns"));
        assert_eq!(title("rewards/answer/mean"), Some("What it learns"));
        assert_eq!(title("grounding/contains_target"), Some("Where it looks"));
        assert_eq!(title("response_length/mean"), Some("What it writes"));
        assert_eq!(title("actor/grad_norm"), Some("How it is optimised"));
        assert_eq!(title("timing_s/generate"), Some("Time and memory"));
        assert_eq!(title("weather"), None);
    }

    #[test]
    fn every_metric_is_on_the_page_and_names_are_escaped() {
        let unknown = rows("<b>odd</b>", &[1.0, 2.0]);
        let known = rows("reward/mean", &[0.1, 0.2]);
        let course = |label, colour, rows| Course { label, colour, runs: vec![rows] };
        let Curves { html, data } = draw(&[course("one", 0, &unknown), course("two", 1, &known)]);
        assert!(html.contains("&lt;b&gt;odd&lt;/b&gt;") && !html.contains("<b>odd"), "{html}");
        assert!(html.contains("reward/mean") && html.contains("20.0 %"), "{html}");
        // The second run has the second colour, though it is alone in its chart.
        assert!(html.contains("line s1"), "{html}");
        // Each chart carries the place of its numbers.
        assert!(html.contains("data-curve=\"0\"") && html.contains("data-curve=\"1\""), "{html}");
        assert_eq!(data[0]["lines"][0]["runs"], json!([[[0, 1], [0.1, 0.2]]]));
    }

    #[test]
    fn a_long_curve_is_handed_on_as_means() {
        let long: Vec<(f64, f64)> = (0..5000).map(|step| (f64::from(step), f64::from(step % 2))).collect();
        let short = shortened(&long);
        assert_eq!((short.len(), short[0], short[1666]), (1667, (2.0, 1.0 / 3.0), (4999.0, 0.5)));
    }

    #[test]
    fn only_what_is_called_a_share_and_is_one_gets_the_full_axis() {
        let series = |values: &[f64]| {
            [Series {
                label: String::new(),
                colour: 0,
                runs: vec![values.iter().map(|v| (0.0, *v)).collect()],
                exact: false,
            }]
        };
        assert!(is_share("reward/mean", &series(&[0.0, 0.5])));
        assert!(!is_share("reward/mean", &series(&[0.0, 1.5])));
        assert!(!is_share("actor/grad_norm", &series(&[0.1])));
        assert!(!is_share("reward_std", &series(&[0.1])));
    }
}
