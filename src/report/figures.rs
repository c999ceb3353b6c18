//! Figures for papers and READMEs: each an SVG file that stands by itself, on white.
//!
//! The main curves and a few episodes that looked somewhere; everything else is the page. What must stay true: a file reaches for nothing outside itself, text in it is escaped, and the
//! same folders give the same files.

use super::chart::{self, Series};
use super::curves::{self, Course};
use super::episode::{drawable, rectangle, right_answer};
use super::html::escape;
use super::pictures::{Pictures, Placed};
use super::record::{self, Record};
use super::viewer::{Shown, answered, looked};
use crate::run;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Episodes drawn.
const EPISODES: usize = 6;
/// Width of an episode's figure, and of its original.
const WIDTH: f64 = 900.0;
const ORIGINAL: f64 = 560.0;

const STYLE: &str = "text{font-family:Helvetica,Arial,'DejaVu Sans',sans-serif;fill:#1d1f24}.tick{font-size:10.5px;fill:#5f6470}.grid{stroke:#e4e4df;fill:none}\
.raw,.line{fill:none;stroke-linejoin:round}.raw{stroke-width:1;opacity:.3}.line{stroke-width:2}.band{stroke:none;opacity:.2}\
.s0{stroke:#2f5fd0}.s1{stroke:#d9622b}.s2{stroke:#1c8a63}.s3{stroke:#9a4fc4}.s4{stroke:#b8860b}.s5{stroke:#c23a72}\
.band.s0,.dot.s0{fill:#2f5fd0}.band.s1,.dot.s1{fill:#d9622b}.band.s2,.dot.s2{fill:#1c8a63}.band.s3,.dot.s3{fill:#9a4fc4}.band.s4,.dot.s4{fill:#b8860b}.band.s5,.dot.s5{fill:#c23a72}\
.halo,.region,.target{fill:none;vector-effect:non-scaling-stroke}.halo{stroke:#000;stroke-opacity:.6;stroke-width:4.5}.region{stroke:#ffb020;stroke-width:2.4}.target{stroke:#35d07f;stroke-width:2.2;stroke-dasharray:6 4}\
.quiet{fill:#5f6470}.good{fill:#16794a}.bad{fill:#b3372f}.bold{font-weight:600}";

/// Writes the figures into `folder` and returns their paths.
pub fn write(folder: &Path, courses: &[Course], shown: &[Shown], pictures: &mut Pictures) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("making the folder for figures: {}", folder.display()))?;
    let mut files: Vec<(String, String)> = Vec::new();
    for (name, series, share) in curves::main_curves(courses) {
        if let Some(svg) = curve(name, &series, share) {
            files.push((format!("curve-{}.svg", file_name(name)), svg));
        }
    }
    // Episodes that looked somewhere tell most.
    let looking: Vec<&Shown> = shown.iter().filter(|one| !looked(one.record).is_empty()).collect();
    let from: Vec<&Shown> = if looking.is_empty() { shown.iter().collect() } else { looking };
    let records: Vec<Record> = from.iter().map(|one| one.record.clone()).collect();
    for (number, index) in record::choose(&records, EPISODES).into_iter().enumerate() {
        if let Some(svg) = episode(from[index], pictures) {
            files.push((format!("episode-{}.svg", number + 1), svg));
        }
    }
    files
        .into_iter()
        .map(|(name, svg)| {
            let path = folder.join(name);
            run::write_atomic(&path, svg.as_bytes()).context("writing a figure")?;
            Ok(path)
        })
        .collect()
}

fn file_name(metric: &str) -> String {
    metric.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect()
}

/// A chart with its name above and its legend below.
fn curve(name: &str, series: &[Series], share: bool) -> Option<String> {
    let chart = chart::chart(name, series, share)?;
    let inner = chart.split_once('>')?.1.strip_suffix("</svg>")?;
    let rows = if series.len() > 1 { series.len() } else { 0 };
    let height = 218.0 + 16.0 * rows as f64;
    let legend: String = series
        .iter()
        .take(rows)
        .enumerate()
        .map(|(row, one)| {
            let y = 226.0 + 16.0 * row as f64;
            format!(
                "<circle class=\"dot s{}\" cx=\"48\" cy=\"{:.1}\" r=\"4\"/><text x=\"58\" y=\"{y:.1}\" font-size=\"11\">{}</text>",
                one.colour,
                y - 4.0,
                escape(&one.label)
            )
        })
        .collect();
    let body = format!(
        "<text x=\"8\" y=\"17\" font-size=\"12\" class=\"bold\">{}</text><g transform=\"translate(0 22)\">{inner}</g>{legend}",
        escape(name)
    );
    Some(document(380.0, height, &body))
}

fn document(width: f64, height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} {height:.0}\"><style>{STYLE}</style>\
         <rect width=\"{width:.0}\" height=\"{height:.0}\" fill=\"#ffffff\"/>{body}</svg>\n"
    )
}

/// The question, the original with its boxes, the views as the policy saw them, and its words.
fn episode(shown: &Shown, pictures: &mut Pictures) -> Option<String> {
    let record = shown.record;
    let mut body = String::new();
    let mut y = 20.0;
    for line in wrapped(&record.question, 110) {
        y += 14.0;
        body.push_str(&text(20.0, y, 15.0, "bold", &line));
        y += 6.0;
    }
    let (mark, class) = if record.right() { ("right", "good") } else { ("wrong", "bad") };
    y += 14.0;
    body.push_str(&text(
        20.0,
        y,
        12.0,
        class,
        &format!("{mark}: says {}, the answer is {} ({})", answered(record), right_answer(record), shown.when),
    ));
    let top = y + 14.0;

    let several = record.several_pictures();
    let width = if several { (WIDTH - 40.0) / record.images.len() as f64 - 8.0 } else { ORIGINAL };
    let (mut x, mut bottom) = (20.0, top);
    for (index, path) in record.images.iter().enumerate() {
        let placed = pictures.original(&shown.run.locate(path)).ok()?;
        let (drawn, height) = original(record, index, &placed, pictures, [x, top, width]);
        body.push_str(&drawn);
        bottom = f64::max(bottom, top + height);
        x += width + 12.0;
    }
    let mut right = top;
    for view in record.views.iter().filter(|_| !several) {
        let (Some(path), Some(region), Some(size)) = (record.images.get(view.image), view.region, view.size) else {
            continue;
        };
        let Ok(placed) = pictures.view(&shown.run.locate(path), region, size) else { continue };
        let width = WIDTH - 40.0 - ORIGINAL - 12.0;
        let height = width / placed.ratio();
        body.push_str(&format!(
            "<image x=\"{x:.1}\" y=\"{right:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" href=\"{}\"/>",
            pictures.data_uri(&placed)
        ));
        right += height + 14.0;
        let name = if view.turn == 0 { "first look" } else { "closer" };
        body.push_str(&text(x, right, 11.0, "quiet", &format!("{name}, seen as {} × {}", size[0], size[1])));
        right += 14.0;
    }
    let mut y = f64::max(bottom, right) + 8.0;
    for turn in record.turns.iter().filter(|turn| turn.role == "assistant") {
        for line in wrapped(turn.text.trim(), 128) {
            y += 16.0;
            body.push_str(&text(20.0, y, 12.0, "", &line));
        }
        y += 6.0;
    }
    Some(document(WIDTH, y + 18.0, &body))
}

fn original(
    record: &Record,
    image: usize,
    placed: &Placed,
    pictures: &Pictures,
    [x, y, width]: [f64; 3],
) -> (String, f64) {
    let height = width / placed.ratio();
    let mut svg = format!(
        "<svg x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" viewBox=\"0 0 {0} {1}\"><image width=\"{0}\" height=\"{1}\" preserveAspectRatio=\"none\" href=\"{2}\"/>",
        placed.width,
        placed.height,
        pictures.data_uri(placed)
    );
    for target in record.targets.iter().filter(|target| target.index() == image) {
        if let Some(bbox) = target.bbox.filter(drawable) {
            svg.push_str(&rectangle(bbox, "target", "target"));
        }
    }
    for (_, bbox) in looked(record).into_iter().filter(|(on, _)| *on == image) {
        svg.push_str(&rectangle(bbox, "region", "where it looked"));
    }
    (svg + "</svg>", height)
}

fn text(x: f64, y: f64, size: f64, class: &str, words: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" class=\"{class}\">{}</text>", escape(words))
}

/// Lines of at most `most` characters, broken at blanks where there are some; a dozen lines at most.
fn wrapped(words: &str, most: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in words.split_whitespace() {
        let letters: Vec<char> = word.chars().collect();
        for part in letters.chunks(most) {
            let part: String = part.iter().collect();
            let Some(last) = lines.last_mut() else { continue };
            if last.is_empty() {
                *last = part;
            } else if last.chars().count() + 1 + part.chars().count() <= most {
                last.push(' ');
                last.push_str(&part);
            } else {
                lines.push(part);
            }
        }
    }
    lines.truncate(12);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_at_blanks_and_long_words_break_anywhere() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
    }

    #[test]
    fn a_curve_stands_by_itself() {
        let series = Series { label: "<b>".into(), colour: 1, runs: vec![vec![(0.0, 0.1), (1.0, 0.2)]], exact: false };
        let svg = curve("reward/mean", &[series.clone(), series], true).unwrap();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains("&lt;b&gt;") && !svg.contains("<b>"), "{svg}");
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count(), "{svg}");
    }
}
