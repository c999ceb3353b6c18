//! Which curves the page shows, in which order, under which words.
//!
//! Metrics are known by the names users of verl and TRL know. Those asked about first stand first; unknown names are shown too, folded. What must
//! stay true: every number in `metrics.jsonl` can be found on the page.

use super::chart::{COLOURS, Series, chart};
use super::html::{escape, number};
use crate::run::Metrics;
use serde_json::Value;

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

/// One run's metrics.
pub struct Course<'a> {
    pub label: &'a str,
    pub rows: &'a [Metrics],
}

/// The section of charts, empty when no run has metrics.
pub fn html(runs: &[Course]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for row in runs.iter().flat_map(|run| run.rows) {
        for (name, value) in row {
            if name != "step" && value.is_number() && !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    let mut html = String::new();
    for &index in ORDER {
        let section = &SECTIONS[index];
        let mut mine: Vec<&str> = names.iter().copied().filter(|name| section_of(name) == Some(index)).collect();
        mine.sort_by_key(|name| section.first.iter().position(|first| first == name).unwrap_or(usize::MAX));
        html.push_str(&section_html(section.title, &mine, runs, section.folded));
    }
    let rest: Vec<&str> = names.iter().copied().filter(|name| section_of(name).is_none()).collect();
    html.push_str(&section_html("Everything else", &rest, runs, true));
    html
}

fn section_of(name: &str) -> Option<usize> {
    let wanted = SECTIONS.iter().position(|section| section.first.contains(&name));
    wanted.or_else(|| named_section(name))
}

fn named_section(name: &str) -> Option<usize> {
    SECTIONS.iter().position(|section| section.words.iter().any(|word| name.contains(word)))
}

fn section_html(title: &str, names: &[&str], runs: &[Course], folded: bool) -> String {
    let charts: Vec<String> = names.iter().filter_map(|name| figure(name, runs)).collect();
    if charts.is_empty() {
        return String::new();
    }
    let grid = |charts: &[String]| format!("<div class=\"charts\">{}</div>", charts.concat());
    if folded {
        return format!(
            "<details><summary>{title} <span class=\"quiet\">{}</span></summary>{}</details>",
            charts.len(),
            grid(&charts)
        );
    }
    let (shown, more) = charts.split_at(charts.len().min(SHOWN));
    let mut html = format!("<h3>{title}</h3>{}", grid(shown));
    if !more.is_empty() {
        html.push_str(&format!("<details><summary>{} more</summary>{}</details>", more.len(), grid(more)));
    }
    html
}

fn figure(name: &str, runs: &[Course]) -> Option<String> {
    let series: Vec<Series> = runs
        .iter()
        .enumerate()
        .map(|(index, run)| Series {
            label: run.label.to_owned(),
            colour: index % COLOURS,
            points: points(run.rows, name),
            exact: name == "lr" || name.ends_with("/lr"),
        })
        .filter(|series| series.points.iter().any(|point| point.1.is_finite()))
        .collect();
    let share = is_share(name, &series);
    let svg = chart(name, &series, share)?;
    let mut last = String::new();
    for one in &series {
        if let Some((_, value)) = one.smooth().into_iter().rev().find(|point| point.1.is_finite()) {
            let text = if share { format!("{:.1} %", value * 100.0) } else { number(value) };
            last.push_str(&format!("<b class=\"s{}\" title=\"{}\">{text}</b>", one.colour, escape(&one.label)));
        }
    }
    Some(format!("<figure><figcaption><span>{}</span>{last}</figcaption>{svg}</figure>", escape(name)))
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
    named
        && series.iter().flat_map(|one| &one.points).all(|point| !point.1.is_finite() || (0.0..=1.0).contains(&point.1))
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
        let html = html(&[Course { label: "one", rows: &unknown }, Course { label: "two", rows: &known }]);
        assert!(html.contains("&lt;b&gt;odd&lt;/b&gt;") && !html.contains("<b>odd"), "{html}");
        assert!(html.contains("reward/mean") && html.contains("20.0 %"), "{html}");
        // The second run has the second colour, though it is alone in its chart.
        assert!(html.contains("line s1"), "{html}");
    }

    #[test]
    fn only_what_is_called_a_share_and_is_one_gets_the_full_axis() {
        let series = |values: &[f64]| {
            [Series {
                label: String::new(),
                colour: 0,
                points: values.iter().map(|v| (0.0, *v)).collect(),
                exact: false,
            }]
        };
        assert!(is_share("reward/mean", &series(&[0.0, 0.5])));
        assert!(!is_share("reward/mean", &series(&[0.0, 1.5])));
        assert!(!is_share("actor/grad_norm", &series(&[0.1])));
        assert!(!is_share("reward_std", &series(&[0.1])));
    }
}
