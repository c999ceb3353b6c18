//! The page of `data overlap`: pictures that two sets share, side by side, with what is asked about them.
//!
//! What must stay true: every word of a row is escaped; the page reaches for no network and runs no script; it says how many pairs it leaves out.

use std::path::Path;

use base64::Engine as _;
use rayon::prelude::*;

use super::DOCTYPE;
use super::html::escape;
use crate::data::overlap::{Overlap, PicturePair};
use crate::image::{Likeness, decode, encode_jpeg};

/// Pairs on the page; the JSON has all.
const SHOWN: usize = 200;
/// Rows named below a picture, and wordings listed.
const NAMED: usize = 6;
/// The longest side of a picture on the page.
const SIDE: u32 = 360;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}\
    table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}\
    article{border-top:1px solid #8888;padding:1rem 0}.pair{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;flex:1 1 18rem}\
    img{max-width:100%;height:auto;display:block}figcaption{font-size:.85rem;overflow-wrap:anywhere}h3{margin:.2rem 0}";

/// The page.
pub fn overlap_page(found: &Overlap) -> String {
    let pairs: Vec<String> = found.pictures.par_iter().take(SHOWN).map(|pair| article(pair, found)).collect();
    let left_out = match found.pictures.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!("<p>and {n} more pairs, which --json lists</p>"),
    };
    let questions: String = found
        .questions
        .iter()
        .take(SHOWN)
        .map(|pair| {
            format!(
                "<tr><td>{:.2}</td><td>{}<br>{}</td><td>{}<br>{}</td></tr>",
                pair.likeness,
                escape(&pair.first),
                ids(&pair.first_rows),
                escape(&pair.second),
                ids(&pair.second_rows)
            )
        })
        .collect();
    let questions = match found.questions.is_empty() {
        true => "<p>none</p>".to_owned(),
        false => format!(
            "<table><tr><th>words in common</th><th>{}</th><th>{}</th></tr>{questions}</table>{}",
            name(&found.first.path),
            name(&found.second.path),
            match found.questions.len().saturating_sub(SHOWN) {
                0 => String::new(),
                n => format!("<p>and {n} more, which --json lists</p>"),
            }
        ),
    };
    let summary: String = summary(found).iter().map(|line| format!("<p>{}</p>", escape(line))).collect();
    let pairs = if pairs.is_empty() { "<p>none</p>".to_owned() } else { pairs.concat() + &left_out };
    format!(
        "{DOCTYPE}\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\
         <title>What {a} and {b} share</title><style>{STYLE}</style></head><body><h1>What {a} and {b} share</h1>{summary}\
         <h2>Pictures</h2>{pairs}<h2>Questions</h2>{questions}</body></html>\n",
        a = name(&found.first.path),
        b = name(&found.second.path),
    )
}

/// The counts in sentences, for the page and the terminal.
pub fn summary(found: &Overlap) -> Vec<String> {
    let Overlap { first, second, rows, .. } = found;
    let near = found.pictures.len() - found.exact_pictures();
    let share = |n: usize| format!("{n} of {} ({:.1} %)", second.rows, 100.0 * n as f64 / second.rows.max(1) as f64);
    let mut lines = vec![
        format!(
            "{}: {} rows, {} pictures; {}: {} rows, {} pictures.",
            first.path.display(),
            first.rows,
            first.pictures,
            second.path.display(),
            second.rows,
            second.pictures
        ),
        format!("{} pairs of pictures are the same pixel by pixel, {near} to the eye.", found.exact_pictures()),
        format!(
            "Rows of {} whose picture is in the other file: {}; whose question about it is there too: {}.",
            second.path.display(),
            share(rows.picture),
            share(rows.picture_and_question)
        ),
        format!(
            "Wordings: {} of {} are in both files, {} more pairs share at least {:.0} % of their words; rows whose question is in the other file: {}.",
            found.exact_questions(),
            second.questions,
            found.questions.len() - found.exact_questions(),
            100.0 * crate::data::overlap::NEAR,
            share(rows.question)
        ),
    ];
    let problems = first.problems + second.problems;
    if problems > 0 {
        lines.push(format!("{problems} problems, whose rows were left out; foveate data check lists them."));
    }
    if let Some((path, reason)) = found.unread.first() {
        let n = found.unread.len();
        lines.push(format!(
            "{n} pictures cannot be decoded, so nothing is known of them; the first: {reason}: {}",
            path.display()
        ));
    }
    lines
}

fn name(path: &Path) -> String {
    escape(&path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
}

fn ids(rows: &[String]) -> String {
    let more = if rows.len() > NAMED { format!(" and {} more", rows.len() - NAMED) } else { String::new() };
    format!("<small>{}{more}</small>", escape(&rows[..rows.len().min(NAMED)].join(", ")))
}

fn article(pair: &PicturePair, found: &Overlap) -> String {
    let like = match pair.like {
        Likeness::Exact => "the same pixel by pixel".to_owned(),
        Likeness::Near { bits, levels } => {
            format!("the same to the eye: {bits} of 63 bits differ, thumbnails by {levels:.1} grey levels")
        }
    };
    let figure = |set: &Path, path: &Path, [width, height]: [u32; 2], rows: &[String]| {
        let picture = match embedded(path) {
            Ok(data) => format!("<img loading=\"lazy\" alt=\"\" src=\"data:image/jpeg;base64,{data}\">"),
            Err(error) => format!("<p>{}</p>", escape(&format!("{error:#}"))),
        };
        format!(
            "<figure>{picture}<figcaption><b>{}</b> {}, {width}x{height}<br>rows {}</figcaption></figure>",
            name(set),
            escape(&path.display().to_string()),
            ids(rows)
        )
    };
    format!(
        "<article><h3>{like}</h3><div class=\"pair\">{}{}</div></article>",
        figure(&found.first.path, &pair.first, pair.sizes[0], &pair.first_rows),
        figure(&found.second.path, &pair.second, pair.sizes[1], &pair.second_rows)
    )
}

fn embedded(path: &Path) -> anyhow::Result<String> {
    let picture = decode(path)?;
    let image = picture.as_image();
    let longest = image.width().max(image.height());
    let side = |side: u32| (u64::from(side) * u64::from(SIDE.min(longest)) / u64::from(longest)).max(1) as u32;
    let small = ::image::imageops::thumbnail(image, side(image.width()), side(image.height()));
    Ok(base64::engine::general_purpose::STANDARD.encode(encode_jpeg(&small, 80)?))
}
