//! Grounding over training: where the policy looks, as heat maps, and the same questions at different steps, as filmstrips.
//!
//! A look is a region that the policy named, whatever was shown for it. What must stay true: questions for a strip are taken at even
//! distances and not by how they went, and a step's map counts every look that was read of that step, not only the episodes on the page.

use super::episode::{drawable, rectangle};
use super::html::{escape, number};
use super::load::{Run, spread};
use super::pictures::{Pictures, Wanted};
use super::record::{Record, plain};
use super::viewer::{Shown, answered, looked};
use ::image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use base64::Engine as _;

/// Maps of a run at most, and strips of a run, and frames of a strip.
const MAPS: usize = 5;
const STRIPS: usize = 4;
const FRAMES: usize = 8;
/// Cells of a map.
const GRID: (usize, usize) = (64, 48);

/// The regions named at one step, as shares of their pictures.
#[derive(Default)]
struct Looks {
    regions: Vec<[f64; 4]>,
    /// The same as seen from the middle of the target, where the question has one.
    around: Vec<[f64; 4]>,
}

/// The heat maps of the runs that name regions.
pub fn maps(runs: &[(&Run, usize)]) -> String {
    let mut html = String::new();
    for (run, colour) in runs {
        let steps: Vec<u64> = run.steps.iter().copied().filter(|&step| records_of(run, step).any(has_look)).collect();
        let chosen = spread(steps.len(), MAPS);
        if chosen.is_empty() {
            continue;
        }
        let figures: String = chosen.iter().map(|&index| map(run, steps[index])).collect();
        html.push_str(&format!(
            "<h4><i class=\"swatch s{}\"></i>{}</h4><div class=\"maps\">{figures}</div>",
            colour % super::chart::COLOURS,
            escape(&run.name)
        ));
    }
    if html.is_empty() {
        return html;
    }
    format!(
        "<p class=\"legend\"><span><i class=\"ramp\"></i>share of all looks that cover a place, from none to most</span>\
         <span class=\"quiet\">left: places in the picture; right: places around the target, which the cross marks</span></p>{html}"
    )
}

fn records_of(run: &Run, step: u64) -> impl Iterator<Item = &Record> {
    run.records.iter().filter(move |record| record.step == step)
}

fn has_look(record: &Record) -> bool {
    !looked(record).is_empty()
}

fn map(run: &Run, step: u64) -> String {
    let looks = looks(records_of(run, step));
    let when = run.when(step);
    let holds =
        looks.around.iter().filter(|[x1, y1, x2, y2]| *x1 <= 0.0 && *y1 <= 0.0 && *x2 >= 0.0 && *y2 >= 0.0).count();
    let area = looks.regions.iter().map(|[x1, y1, x2, y2]| (x2 - x1) * (y2 - y1)).sum::<f64>()
        / looks.regions.len().max(1) as f64;
    let mut caption = format!(
        "<b>{}</b> {} looks, {} % of the picture each",
        escape(&when),
        looks.regions.len(),
        number((area * 1000.0).round() / 10.0)
    );
    let mut pictures = heat(&looks.regions, [0.0, 0.0, 1.0, 1.0], &format!("where it looks in the picture, {when}"));
    if !looks.around.is_empty() {
        pictures.push_str(&heat(
            &looks.around,
            [-0.5, -0.5, 0.5, 0.5],
            &format!("where it looks around the target, {when}"),
        ));
        caption.push_str(&format!(
            ", {:.0} % over the middle of the target",
            100.0 * holds as f64 / looks.around.len() as f64
        ));
    }
    format!("<figure><div class=\"pair\">{pictures}</div><figcaption>{caption}</figcaption></figure>")
}

fn looks<'a>(records: impl Iterator<Item = &'a Record>) -> Looks {
    let mut looks = Looks::default();
    for record in records {
        for (image, [x1, y1, x2, y2]) in looked(record) {
            // The first view of a picture is all of it.
            let whole = record.views.iter().find(|view| view.image == image).and_then(|view| view.region);
            let Some([left, top, right, bottom]) = whole.filter(|[l, t, r, b]| r > l && b > t) else { continue };
            let (width, height) = (right - left, bottom - top);
            looks.regions.push([(x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height]);
            let target = record.targets.iter().find(|target| target.index() == image).and_then(|target| target.bbox);
            if let Some([a, b, c, d]) = target.filter(drawable) {
                let (x, y) = ((a + c) / 2.0, (b + d) / 2.0);
                looks.around.push([(x1 - x) / width, (y1 - y) / height, (x2 - x) / width, (y2 - y) / height]);
            }
        }
    }
    looks
}

/// How many of the boxes cover the middle of each cell of the window.
fn cover(boxes: &[[f64; 4]], [left, top, right, bottom]: [f64; 4]) -> Vec<u32> {
    let (columns, rows) = GRID;
    let mut counts = vec![0; columns * rows];
    for &[x1, y1, x2, y2] in boxes {
        for (index, count) in counts.iter_mut().enumerate() {
            let x = left + (right - left) * ((index % columns) as f64 + 0.5) / columns as f64;
            let y = top + (bottom - top) * ((index / columns) as f64 + 0.5) / rows as f64;
            *count += u32::from(x1 <= x && x < x2 && y1 <= y && y < y2);
        }
    }
    counts
}

fn heat(boxes: &[[f64; 4]], window: [f64; 4], label: &str) -> String {
    let counts = cover(boxes, window);
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let pixels: Vec<u8> = counts.iter().flat_map(|&count| ramp(f64::from(count) / f64::from(most))).collect();
    let mut png = Vec::new();
    let size = (GRID.0 as u32, GRID.1 as u32);
    if PngEncoder::new(&mut png).write_image(&pixels, size.0, size.1, ExtendedColorType::Rgb8).is_err() {
        return String::new();
    }
    let cross = if window[0] < 0.0 { "<path class=\"cross\" d=\"M32 20V28M28 24H36\"/>" } else { "" };
    format!(
        "<svg class=\"heat\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\"><image width=\"{}\" height=\"{}\" href=\"data:image/png;base64,{}\"/>{cross}</svg>",
        size.0,
        size.1,
        escape(label),
        size.0,
        size.1,
        base64::engine::general_purpose::STANDARD.encode(png)
    )
}

/// Dark for never, over red to pale yellow for most: lightness alone tells the order, so that no reader needs the colours.
fn ramp(share: f64) -> [u8; 3] {
    const STOPS: [[f64; 3]; 5] =
        [[24.0, 22.0, 38.0], [88.0, 28.0, 92.0], [188.0, 56.0, 72.0], [243.0, 132.0, 48.0], [252.0, 236.0, 164.0]];
    let at = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let below = (at as usize).min(STOPS.len() - 2);
    let part = at - below as f64;
    std::array::from_fn(|k| (STOPS[below][k] + part * (STOPS[below + 1][k] - STOPS[below][k])).round() as u8)
}

/// One question at several steps: which run, and the episodes in order.
pub struct Strip<'a> {
    run: &'a Run,
    colour: usize,
    frames: Vec<&'a Record>,
}

/// The strips of all runs: held-out questions where the run asked some while it trained, else questions that came more than once.
pub fn strips<'a>(runs: &[(&'a Run, usize)]) -> Vec<Strip<'a>> {
    let mut strips = Vec::new();
    for &(run, colour) in runs {
        let from = if run.validation.is_empty() { &run.records } else { &run.validation };
        let mut questions: Vec<(String, Vec<&Record>)> = Vec::new();
        let mut place = std::collections::HashMap::new();
        // A turn that was asked for a region is a frame, whether one could be read or not.
        for record in from.iter().filter(|record| has_look(record) || !record.first_outcome().is_empty()) {
            let id = plain(&record.id);
            let at = *place.entry(id.clone()).or_insert_with(|| {
                questions.push((id, Vec::new()));
                questions.len() - 1
            });
            let frames = &mut questions[at].1;
            // One answer a step: its siblings are in the viewer.
            if frames.last().is_none_or(|last| last.step != record.step) {
                frames.push(record);
            }
        }
        let longest = questions.iter().map(|(_, frames)| frames.len()).max().unwrap_or(0);
        if longest < 2 {
            continue;
        }
        questions.retain(|(_, frames)| frames.len() == longest);
        for index in spread(questions.len(), STRIPS) {
            let all = &questions[index].1;
            strips.push(Strip { run, colour, frames: spread(all.len(), FRAMES).into_iter().map(|i| all[i]).collect() });
        }
    }
    strips
}

/// The pictures that the strips need.
pub fn wanted(strips: &[Strip]) -> Vec<Wanted> {
    let of = |strip: &Strip| strip.frames.first().map(|first| pictures_of(strip.run, first)).unwrap_or_default();
    strips.iter().flat_map(of).collect()
}

fn pictures_of(run: &Run, record: &Record) -> Vec<Wanted> {
    // The picture with the target is where the policy should look.
    let image = record.targets.first().map_or(0, |target| target.index());
    let path = record.images.get(image).or(record.images.first());
    path.map(|path| Wanted { path: run.locate(path), view: None }).into_iter().collect()
}

/// The strips as HTML; a frame whose episode is in the viewer leads there.
pub fn strips_html(strips: &[Strip], shown: &[Shown], pictures: &mut Pictures) -> String {
    let mut html = String::new();
    let mut last = "";
    for strip in strips {
        let Some(first) = strip.frames.first() else { continue };
        if strip.run.name != last {
            html.push_str(&format!(
                "<h4><i class=\"swatch s{}\"></i>{}</h4>",
                strip.colour % super::chart::COLOURS,
                escape(&strip.run.name)
            ));
            last = &strip.run.name;
        }
        let frames: String = strip.frames.iter().map(|record| frame(strip, record, shown, pictures)).collect();
        html.push_str(&format!(
            "<p class=\"asked\">{} <span class=\"quiet\">right answer {}</span></p><div class=\"strip\" tabindex=\"0\" role=\"group\" aria-label=\"{}\">{frames}</div>",
            escape(&first.question),
            escape(&super::episode::right_answer(first)),
            escape(&format!("the question at {} moments", strip.frames.len()))
        ));
    }
    html
}

fn frame(strip: &Strip, record: &Record, shown: &[Shown], pictures: &mut Pictures) -> String {
    let picture = drawn(strip.run, record, pictures);
    let when =
        if strip.run.validation.is_empty() { strip.run.when(record.step) } else { format!("step {}", record.step) };
    let (mark, class) = if record.right() { ("✓", "good") } else { ("✗", "bad") };
    let inside = format!(
        "{picture}<figcaption><b>{}</b><span class=\"{class}\">{} {mark}</span></figcaption>",
        escape(&when),
        escape(&answered(record))
    );
    let link = shown.iter().find(|one| std::ptr::eq(one.record, record)).map(|one| &one.key);
    match link {
        Some(key) => format!("<figure><a href=\"#{}\">{inside}</a></figure>", escape(key)),
        None => format!("<figure>{inside}</figure>"),
    }
}

/// The picture with target and looks.
fn drawn(run: &Run, record: &Record, pictures: &mut Pictures) -> String {
    let image = record.targets.first().map_or(0, |target| target.index()).min(record.images.len().saturating_sub(1));
    let Some(path) = record.images.get(image) else { return String::new() };
    let placed = match pictures.original(&run.locate(path)) {
        Ok(placed) => placed,
        Err(reason) => return format!("<div class=\"missing\">{}</div>", escape(&reason)),
    };
    pictures.show_plainly(&placed);
    let mut svg = format!(
        "<svg class=\"picture\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"the picture with the region that was named\"><use href=\"#{}\"/>",
        placed.width, placed.height, placed.id
    );
    for target in record.targets.iter().filter(|target| target.index() == image) {
        if let Some(bbox) = target.bbox.filter(drawable) {
            svg.push_str(&rectangle(bbox, "target", "target"));
        }
    }
    for (_, bbox) in looked(record).into_iter().filter(|(on, _)| *on == image) {
        svg.push_str(&rectangle(bbox, "region", "where it looked"));
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::load::bare;
    use serde_json::json;

    fn look(step: u64, id: &str, bbox: [f64; 4]) -> Record {
        Record::from_value(json!({
            "id": id, "step": step, "images": ["a.png"], "question": "where?",
            "targets": [{"image": 1, "bbox": [40, 40, 60, 60]}],
            "views": [{"image": 0, "region": [0, 0, 100, 100], "size": [28, 28], "turn": 0}],
            "turns": [{"role": "assistant", "text": "here", "bbox": bbox, "outcome": "valid"}]
        }))
        .unwrap()
    }

    #[test]
    fn looks_are_counted_where_they_are() {
        let records = [look(1, "a", [0.0, 0.0, 50.0, 100.0]), look(1, "b", [25.0, 0.0, 100.0, 100.0])];
        let looks = looks(records.iter());
        assert_eq!(looks.regions, [[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 1.0, 1.0]]);
        // The target's middle is the middle of the picture.
        assert_eq!(looks.around[0], [-0.5, -0.5, 0.0, 0.5]);
        let counts = cover(&looks.regions, [0.0, 0.0, 1.0, 1.0]);
        assert_eq!((counts[0], counts[20], counts[63]), (1, 2, 1));
    }

    #[test]
    fn the_ramp_grows_lighter() {
        let light = |share| ramp(share).iter().map(|&c| u32::from(c)).sum::<u32>();
        assert!((0..10).all(|i| light(f64::from(i) / 10.0) < light(f64::from(i + 1) / 10.0)));
        assert_eq!(ramp(0.0), [24, 22, 38]);
    }

    #[test]
    fn a_strip_is_one_question_in_the_order_of_steps() {
        let mut run = bare("run");
        for step in [1, 2, 3] {
            for id in ["a", "b"] {
                // Two answers a step, of which the first is shown.
                run.records.extend([look(step, id, [0.0; 4]), look(step, id, [1.0; 4])]);
            }
        }
        run.records.push(look(3, "once", [0.0; 4]));
        let strips = strips(&[(&run, 0)]);
        let steps: Vec<Vec<u64>> = strips.iter().map(|s| s.frames.iter().map(|r| r.step).collect()).collect();
        assert_eq!(steps, [[1, 2, 3], [1, 2, 3]]);
        assert!(strips[0].frames.iter().all(|frame| plain(&frame.id) == "a"));
    }
}
