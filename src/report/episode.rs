//! One episode as HTML that needs no script: the original with every view and target drawn on it, the views as the policy saw them, the words, the judgement.
//!
//! What must stay true: boxes are drawn in original pixels by the overlay's own coordinate system, so they cannot drift from the picture.

use super::html::{escape, number, words};
use super::load::Run;
use super::pictures::{Pictures, Placed};
use super::record::{Record, Target, Turn, View, plain};

/// What the page knows about the run an episode belongs to.
pub struct Belongs<'a> {
    pub run: &'a Run,
    /// The run's colour.
    pub colour: usize,
    /// Whether the page shows several runs.
    pub several: bool,
    /// "step 12", or which row of the result table.
    pub when: &'a str,
    /// The episode's link.
    pub key: &'a str,
}

/// The episode's card.
pub fn card(record: &Record, belongs: &Belongs, pictures: &mut Pictures) -> String {
    let right = record.right();
    let (verdict, class) = if right { ("right", "good") } else { ("wrong", "bad") };
    let mut html = format!(
        "<article class=\"episode\" id=\"{}\"><header><span class=\"verdict {class}\">{verdict}</span>",
        escape(belongs.key)
    );
    if belongs.several {
        html.push_str(&format!(
            "<span class=\"run\"><i class=\"swatch s{}\"></i>{}</span>",
            belongs.colour % super::chart::COLOURS,
            escape(&belongs.run.name)
        ));
    }
    html.push_str(&format!("<span>{}</span>", escape(belongs.when)));
    for (label, value) in [
        ("", record.task.clone()),
        ("", record.split.clone()),
        ("", plain(&record.id)),
        ("member ", plain(&record.member)),
    ] {
        if !value.is_empty() {
            html.push_str(&format!("<span class=\"quiet\">{label}{}</span>", escape(&value)));
        }
    }
    html.push_str("</header>");
    if !record.question.is_empty() {
        html.push_str(&format!("<h3>{}</h3>", escape(&record.question)));
    }
    let answer = right_answer(record);
    if !answer.is_empty() {
        html.push_str(&format!("<p class=\"answer\">right answer <b>{}</b></p>", escape(&answer)));
    }
    // Several pictures stand side by side above the words; one stands beside them, with the closer looks below it.
    let class = if record.several_pictures() { "sides row" } else { "sides" };
    html.push_str(&format!("<div class=\"{class}\"><div class=\"looks\">"));
    html.push_str(&originals(record, belongs, pictures));
    html.push_str(&views(record, belongs, pictures));
    html.push_str("</div><div class=\"talk\">");
    html.push_str(&conversation(record));
    html.push_str(&judgement(record));
    html.push_str("</div></div></article>");
    html
}

/// The answer in words.
pub(super) fn right_answer(record: &Record) -> String {
    if !record.several_pictures() || record.targets.is_empty() {
        return plain(&record.answer);
    }
    in_words(record.targets.iter())
}

/// What is where, on several pictures: the boxes themselves are drawn.
pub(super) fn in_words<'a>(boxes: impl Iterator<Item = &'a Target>) -> String {
    let what = |target: &Target| {
        let label = if target.label.is_empty() { "the marked area" } else { &target.label };
        format!("{label} in Image-{}", target.index() + 1)
    };
    boxes.map(what).collect::<Vec<_>>().join(", ")
}

fn originals(record: &Record, belongs: &Belongs, pictures: &mut Pictures) -> String {
    let mut html = String::new();
    for (index, path) in record.images.iter().enumerate() {
        let caption = if record.several_pictures() { format!("Image-{}", index + 1) } else { "original".into() };
        match pictures.original(&belongs.run.locate(path)) {
            Ok(placed) => {
                pictures.show_plainly(&placed);
                let first = record
                    .views
                    .iter()
                    .enumerate()
                    .find(|(i, view)| view.image == index && first_look(record, *i, view));
                let seen = match first.and_then(|(_, view)| view.size) {
                    Some([width, height]) if record.several_pictures() => format!(", seen as {width} × {height}"),
                    _ => String::new(),
                };
                html.push_str(&format!(
                    "<figure class=\"original\" style=\"--ratio:{:.4}\">{}<figcaption>{caption} <span>{} × {} px{seen}</span></figcaption></figure>",
                    placed.ratio(),
                    overlay(record, index, &placed, path),
                    placed.width,
                    placed.height
                ));
            }
            Err(reason) => html.push_str(&missing(path, &reason)),
        }
    }
    html
}

fn missing(path: &str, reason: &str) -> String {
    format!(
        "<div class=\"missing\"><b>picture not shown</b><code>{}</code><span>{}</span></div>",
        escape(path),
        escape(reason)
    )
}

/// The picture with the views after the first look and the targets drawn on it.
fn overlay(record: &Record, image: usize, placed: &Placed, path: &str) -> String {
    let Placed { id, width, height } = placed;
    let mut svg = format!(
        "<svg class=\"picture\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\"><use href=\"#{id}\"/>",
        escape(&format!("the picture {path} with the regions looked at"))
    );
    // Sizes in the picture's pixels that come out alike on the page whatever the picture's resolution.
    let unit = f64::from(*(width.max(height))) / 100.0;
    for target in record.targets.iter().filter(|target| target.index() == image) {
        if let Some(bbox) = target.bbox.filter(drawable) {
            let title = if target.label.is_empty() { "target".to_owned() } else { format!("target: {}", target.label) };
            svg.push_str(&rectangle(bbox, "target", &title));
        }
    }
    for said in record.said().filter(|said| said.image == image + 1) {
        if let Some(bbox) = said.bbox.filter(drawable) {
            let label = if said.label.is_empty() { "a box" } else { &said.label };
            svg.push_str(&rectangle(bbox, "region", &format!("the policy says: {label}")));
        }
    }
    for (number, view) in crops(record) {
        if let Some(region) = view.region.filter(drawable).filter(|_| view.image == image) {
            svg.push_str(&rectangle(region, "region", &format!("crop {number}")));
            let (x, y) = (region[0].clamp(0.0, f64::from(*width)), region[1].max(0.0));
            let (side, size) = (4.4 * unit, 3.2 * unit);
            let above = if y >= side { y - side } else { y };
            svg.push_str(&format!(
                "<rect class=\"flag\" x=\"{x:.1}\" y=\"{above:.1}\" width=\"{side:.1}\" height=\"{side:.1}\"/><text class=\"flag\" x=\"{:.1}\" y=\"{:.1}\" font-size=\"{size:.1}\">{number}</text>",
                x + side / 2.0,
                above + side * 0.74
            ));
        }
    }
    svg.push_str("</svg>");
    svg
}

pub(super) fn drawable(bbox: &[f64; 4]) -> bool {
    bbox.iter().all(|side| side.is_finite())
}

/// A rectangle that stays visible on any picture: a dark line below a bright one.
pub(super) fn rectangle([x1, y1, x2, y2]: [f64; 4], class: &str, title: &str) -> String {
    let place =
        format!("x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{:.1}\" height=\"{:.1}\"", (x2 - x1).max(0.0), (y2 - y1).max(0.0));
    format!("<rect class=\"halo\" {place}/><rect class=\"{class}\" {place}><title>{}</title></rect>", escape(title))
}

/// The views after the first look at each picture, numbered from 1.
fn crops(record: &Record) -> impl Iterator<Item = (usize, &View)> {
    record
        .views
        .iter()
        .enumerate()
        .filter(|(index, view)| !first_look(record, *index, view))
        .map(|(_, view)| view)
        .enumerate()
        .map(|(i, view)| (i + 1, view))
}

/// Whether this is the opening view of its picture: shown before the policy spoke.
pub(super) fn first_look(record: &Record, index: usize, view: &View) -> bool {
    view.turn == 0 && record.views[..index].iter().all(|before| before.image != view.image)
}

fn views(record: &Record, belongs: &Belongs, pictures: &mut Pictures) -> String {
    let mut html = String::new();
    let mut crop = 0;
    for (index, view) in record.views.iter().enumerate() {
        let name = if first_look(record, index, view) {
            if record.several_pictures() {
                continue;
            }
            "first look".to_owned()
        } else {
            crop += 1;
            format!("crop {crop}")
        };
        let (Some(path), Some(region), Some(size)) = (record.images.get(view.image), view.region, view.size) else {
            html.push_str(&missing(&name, "the record does not say which region of which picture"));
            continue;
        };
        match pictures.view(&belongs.run.locate(path), region, size) {
            Ok(placed) => {
                pictures.show_plainly(&placed);
                html.push_str(&format!(
                    "<figure class=\"view\" style=\"--ratio:{:.4}\">{}<figcaption>{name} <span>{}</span></figcaption></figure>",
                    placed.ratio(),
                    seen(record, view, region, &placed),
                    caption(record, view, region, size)
                ));
            }
            Err(reason) => html.push_str(&missing(path, &reason)),
        }
    }
    html
}

/// A view as the policy saw it, with the targets that fall into it.
fn seen(record: &Record, view: &View, region: [f64; 4], placed: &Placed) -> String {
    let Placed { id, width, height } = placed;
    let mut svg = format!(
        "<svg class=\"picture\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"what the policy saw\"><use href=\"#{id}\"/>"
    );
    let [x1, y1, x2, y2] = region;
    let (scale_x, scale_y) = (f64::from(*width) / (x2 - x1), f64::from(*height) / (y2 - y1));
    for target in record.targets.iter().filter(|target| target.index() == view.image) {
        if let Some([a, b, c, d]) = target.bbox.filter(|bbox| covered(*bbox, region) > 0.0) {
            let in_view = [(a - x1) * scale_x, (b - y1) * scale_y, (c - x1) * scale_x, (d - y1) * scale_y];
            if drawable(&in_view) {
                svg.push_str(&rectangle(in_view, "target", "target"));
            }
        }
    }
    svg.push_str("</svg>");
    svg
}

pub(super) fn caption(record: &Record, view: &View, region: [f64; 4], [width, height]: [u32; 2]) -> String {
    let [x1, y1, x2, y2] = region;
    let mut text =
        format!("{} × {} px, seen as {width} × {height}", number((x2 - x1).round()), number((y2 - y1).round()));
    let targets: Vec<&Target> =
        record.targets.iter().filter(|target| target.index() == view.image && target.bbox.is_some()).collect();
    if !targets.is_empty() && view.turn > 0 {
        let shares = targets.iter().filter_map(|target| target.bbox).map(|bbox| covered(bbox, region));
        let share = shares.clone().sum::<f64>() / targets.len() as f64;
        text.push_str(&format!(", holds {:.0} % of the target", share * 100.0));
    }
    text
}

/// The share of `bbox` that lies within `region`.
fn covered([a, b, c, d]: [f64; 4], [x1, y1, x2, y2]: [f64; 4]) -> f64 {
    let area = (c - a) * (d - b);
    let inside = (c.min(x2) - a.max(x1)).max(0.0) * (d.min(y2) - b.max(y1)).max(0.0);
    if area > 0.0 { inside / area } else { 0.0 }
}

fn conversation(record: &Record) -> String {
    let mut html = String::new();
    for turn in &record.turns {
        let class = match turn.role.as_str() {
            "assistant" | "policy" => "assistant",
            "system" => "system",
            _ => "user",
        };
        let tokens = plain(&turn.tokens);
        let tokens = if tokens.is_empty() {
            String::new()
        } else {
            format!("<span class=\"quiet\">{} tokens</span>", escape(&tokens))
        };
        html.push_str(&format!(
            "<div class=\"turn {class}\"><div class=\"role\"><b>{}</b>{tokens}</div><p>{}</p>{}</div>",
            escape(&turn.role),
            words(turn.text.trim_end()),
            readings(turn)
                .iter()
                .map(|text| format!("<code class=\"action\">{}</code>", escape(text)))
                .collect::<String>()
        ));
    }
    html
}

/// What the program read in the policy's words.
pub(super) fn readings(turn: &Turn) -> Vec<String> {
    let place = |bbox: [f64; 4]| format!("box {}", bbox.map(|side| number(side.round())).join(", "));
    let bbox = turn.bbox.map(|bbox| format!("box {}", bbox.map(number).join(", ")));
    let boxes =
        turn.boxes.iter().map(|said| format!("Image-{}: {}", said.image, said.bbox.map(place).unwrap_or_default()));
    let all = [plain(&turn.action), plain(&turn.outcome), bbox.unwrap_or_default()].into_iter().chain(boxes);
    all.filter(|text| !text.is_empty()).collect()
}

fn judgement(record: &Record) -> String {
    let mut parts: Vec<(String, String, &str)> = Vec::new();
    if let Some(reward) = record.reward {
        parts.push(("reward".into(), number(reward), "whole"));
    }
    for (name, value) in &record.rewards {
        parts.push((name.clone(), value.as_f64().map_or_else(|| plain(value), number), "part"));
    }
    if let Some(advantage) = record.advantage {
        let sign = if advantage > 0.0 { "+" } else { "" };
        parts.push((
            "advantage".into(),
            format!("{sign}{}", number(advantage)),
            if advantage < 0.0 { "minus" } else { "plus" },
        ));
    }
    let stop = plain(&record.stop);
    if !stop.is_empty() {
        parts.push(("stop".into(), stop, "part"));
    }
    let mut html = String::from("<dl class=\"judgement\">");
    for (name, value, class) in parts {
        html.push_str(&format!("<div class=\"{class}\"><dt>{}</dt><dd>{}</dd></div>", escape(&name), escape(&value)));
    }
    html.push_str("</dl>");
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::load::bare;
    use serde_json::json;

    fn belongs(run: &Run) -> Belongs<'_> {
        Belongs { run, colour: 0, several: true, when: "step 1", key: "mgpo.s1" }
    }

    #[test]
    fn hostile_words_stay_words_wherever_they_stand() {
        let evil = "<script>alert('x')</script>\" onload=\"x ]]> <|im_end|>";
        let record = Record::from_value(json!({
            "id": evil, "task": evil, "question": evil, "answer": evil, "images": [evil], "split": evil, "member": evil,
            "targets": [{"image": 0, "bbox": [0, 0, 1, 1], "label": evil}],
            "views": [{"image": 0, "region": [0, 0, 1, 1], "size": [28, 28], "turn": 0}, {"image": 9, "turn": 1}],
            "turns": [{"role": evil, "text": evil, "tokens": evil, "action": {evil: evil}, "outcome": evil, "bbox": [1, 2, 3, 4]}],
            "stop": evil, "rewards": {evil: evil}, "reward": 1.0, "advantage": -0.5
        }))
        .unwrap();
        let html = card(&record, &belongs(&bare("/nowhere")), &mut Pictures::default());
        assert!(!html.contains("<script"), "{html}");
        assert!(!html.contains("\" onload"), "{html}");
        assert!(!html.contains("]]>"), "{html}");
        assert!(html.contains("&lt;script&gt;") && html.contains("picture not shown"), "{html}");
    }

    #[test]
    fn a_crop_and_a_target_are_drawn_in_original_pixels() {
        let folder = tempfile::tempdir().unwrap();
        image::RgbImage::new(1000, 500).save(folder.path().join("a.png")).unwrap();
        let record = Record::from_value(json!({
            "images": ["a.png"], "reward": 1.0, "targets": [{"image": 1, "bbox": [420, 210, 460, 230]}],
            "views": [
                {"image": 0, "region": [0, 0, 1000, 500], "size": [224, 112], "turn": 0},
                {"image": 0, "region": [400, 200, 600, 300], "size": [112, 56], "turn": 1}
            ]
        }))
        .unwrap();
        let html = card(&record, &belongs(&bare(&folder.path().to_string_lossy())), &mut Pictures::default());
        assert!(
            html.contains("<rect class=\"region\" x=\"400.0\" y=\"200.0\" width=\"200.0\" height=\"100.0\">"),
            "{html}"
        );
        assert!(
            html.contains("<rect class=\"target\" x=\"420.0\" y=\"210.0\" width=\"40.0\" height=\"20.0\">"),
            "{html}"
        );
        // In the crop: 20 pixels right of 400 at 112/200, 10 below 200 at 56/100.
        assert!(html.contains("<rect class=\"target\" x=\"11.2\" y=\"5.6\" width=\"22.4\" height=\"11.2\">"), "{html}");
        assert!(html.contains("200 × 100 px, seen as 112 × 56, holds 100 % of the target"), "{html}");
        // The first look is not a crop: one region, drawn once on the original.
        assert_eq!(html.matches("class=\"region\"").count(), 1, "{html}");
    }

    #[test]
    fn coverage_by_hand() {
        assert_eq!(covered([0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 20.0, 20.0]), 0.5);
        assert_eq!(covered([0.0, 0.0, 10.0, 10.0], [10.0, 0.0, 20.0, 20.0]), 0.0);
        assert_eq!(covered([3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 9.0, 9.0]), 0.0);
    }
}
