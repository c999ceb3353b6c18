//! What a teacher is told and shown about a row, and how its words become a trace.
//!
//! It hides the wording, the chat format and how pictures travel. What must stay true: boxes go to the teacher in percent, as
//! a check only, and with the order not to tell them; the digest of a request hangs on everything the teacher gets to see
//! (a picture counts by the digest of its file) and on nothing else, so that equal requests are paid for once.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use ::image::metadata::Orientation;
use ::image::{ImageDecoder, ImageFormat, ImageReader};
use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Options;
use crate::data::Sample;
use crate::geometry::{BBox, Size};
use crate::image::{self, PassOrder, decode_bytes, encode_jpeg, resize};
use crate::openai;
use crate::synth::trajectories::{Change, Facts, Object, Relation};
use crate::table::picture_bytes;

/// A file of at most so many bytes travels as it is, if the teacher may see all of its pixels.
const SMALL_FILE: usize = 4 << 20;
const JPEG_QUALITY: u8 = 92;

const ORDERS: &str = "\
You write the thoughts of a careful reader who is shown several pictures and asked where something is. You get the pictures, the \
question, and what is known to be true. Write what the reader thinks before answering, as if all of it had been found by looking.
Rules:
- Call the pictures Image-1, Image-2 and so on, in exactly this form. Every sentence that speaks of an object says in which Image-k it is.
- First say what the pictures show that matters, then compare; the conclusion comes last, and it names the object and its Image-k.
- Call things by the names that you are given.
- No digits but those of Image-k; no coordinates, boxes, percentages or sizes. Say places in words: left, right, above, behind.
- The boxes are for you alone, to check that you look at the right thing. Do not tell or hint at them, nor that anything was known \
before.
- Two to six sentences of plain prose: no list, no heading, no tags, no JSON.";

/// What is asked about one row.
pub(super) struct Request<'a> {
    pub row: &'a str,
    /// SHA-256 of `record`, in hex.
    pub digest: String,
    /// The request with each picture as the digest of its file: what is recorded.
    pub record: Value,
    images: &'a [PathBuf],
    max_pixels: u64,
}

impl<'a> Request<'a> {
    /// # Errors
    /// A picture that cannot be read.
    pub fn new(sample: &'a Sample, facts: &Facts, options: &Options) -> Result<Request<'a>> {
        let (mut urls, mut sizes) = (Vec::new(), Vec::new());
        for path in &sample.images {
            let bytes = picture_bytes(path)?;
            urls.push(format!("sha256:{};max_pixels={}", openai::sha256(&bytes), options.max_pixels));
            sizes.push(image::size(path)?);
        }
        let mut record = json!({
            "model": options.model,
            "messages": [
                {"role": "system", "content": ORDERS},
                {"role": "user", "content": shown(&urls, task(sample, facts, &sizes))},
            ],
        });
        if let Some(temperature) = options.temperature {
            record["temperature"] = json!(temperature);
        }
        if let Some(tokens) = options.max_tokens {
            record["max_tokens"] = json!(tokens);
        }
        let digest = openai::sha256(record.to_string().as_bytes());
        Ok(Request { row: &sample.id, digest, record, images: &sample.images, max_pixels: options.max_pixels })
    }

    /// The request as it is sent: the record with the pictures in their places.
    ///
    /// # Errors
    /// A picture that cannot be decoded.
    pub fn body(&self) -> Result<Vec<u8>> {
        let pictures = self.images.iter().map(|path| data_uri(path, self.max_pixels)).collect::<Result<_>>()?;
        serde_json::to_vec(&openai::with_pictures(self.record.clone(), pictures)).context("writing a request as JSON")
    }
}

/// The parts of the user's message: each picture behind its name, then the text.
fn shown(urls: &[String], text: String) -> Value {
    let picture = |(k, url): (usize, &String)| {
        [
            json!({"type": "text", "text": format!("Image-{}:", k + 1)}),
            json!({"type": "image_url", "image_url": {"url": url}}),
        ]
    };
    let mut parts: Vec<Value> = urls.iter().enumerate().flat_map(picture).collect();
    parts.push(json!({"type": "text", "text": text}));
    parts.into()
}

/// Question and facts.
fn task(sample: &Sample, facts: &Facts, sizes: &[Size]) -> String {
    let mut text =
        format!("Question: {}\n\nKnown, for you to check against and never to mention", sample.question.trim());
    text += " (boxes are left, top, right, bottom in percent of the picture's width and height):\n";
    for (k, (objects, size)) in facts.objects.iter().zip(sizes).enumerate() {
        let known = |o: &Object| match o.attributes.join(", ") {
            about if about.is_empty() => format!("{} {}", o.name, percent(&o.bbox, *size)),
            about => format!("{} ({about}) {}", o.name, percent(&o.bbox, *size)),
        };
        let objects: Vec<String> = objects.iter().map(known).collect();
        if !objects.is_empty() {
            text += &format!("- Image-{}: {}.\n", k + 1, objects.join("; "));
        }
    }
    for relation in &facts.relations {
        text += &format!("- {}\n", in_words(relation));
    }
    for target in &sample.targets {
        let what = target.label.as_deref().unwrap_or("what is asked for");
        let size = sizes.get(target.image - 1).copied().unwrap_or(Size::new(1, 1));
        text += &format!("- The answer: {what} in Image-{}, {}.\n", target.image, percent(&target.bbox, size));
    }
    if sample.targets.is_empty() {
        text += "- The answer: what is asked for is in none of the pictures.\n";
    }
    text + "\nWrite the thoughts now, and nothing else."
}

/// `[left, top, right, bottom]`: the teacher may be shown other pixels than the annotation counts.
fn percent(bbox: &BBox, size: Size) -> String {
    let share = |at: f64, of: u32| (100.0 * at / f64::from(of)).round() as i64;
    let [x1, y1, x2, y2] = <[f64; 4]>::from(*bbox);
    let (w, h) = (size.width, size.height);
    format!("[{}, {}, {}, {}]", share(x1, w), share(y1, h), share(x2, w), share(y2, h))
}

fn in_words(relation: &Relation) -> String {
    match relation {
        Relation::SameObject { reference, target, name } => {
            format!("The {name} that Image-{reference} shows is among the things of Image-{target}.")
        }
        Relation::Difference { change, name, was } => {
            let what = match (change, was) {
                (Change::Added, _) => format!("Image-2 has the {name}, which Image-1 has not"),
                (Change::Removed, _) => format!("Image-1 has the {name}, which Image-2 has not"),
                (Change::Moved, _) => format!("the {name} stands elsewhere in Image-2 than in Image-1"),
                (Change::Swapped, Some(was)) => format!("where Image-1 has the {was}, Image-2 has the {name}"),
                (Change::Swapped, None) => format!("the {name} of Image-2 took the place of something in Image-1"),
            };
            format!("Image-1 and Image-2 show one scene with one change: {what}.")
        }
        Relation::OnlyIn { name, target } => format!("Of all pictures, Image-{target} alone shows the {name}."),
        Relation::PartOf { reference, target, name } => {
            format!("Image-{reference} is a part of Image-{target}, the area around its {name}.")
        }
        Relation::Follows { reference, target, name } => {
            format!("The {name} is to be followed from Image-{reference} to Image-{target}, picture by picture.")
        }
        Relation::Place { reference, name, is } => format!("The {name} is {is} in Image-{reference}."),
        Relation::SameKind { reference, target, name } => {
            format!("Image-{reference} and Image-{target} both show a thing of the kind {name}.")
        }
    }
}

/// A picture as it travels: the file itself where it is small, upright and of a kind that every server reads; else a JPEG
/// of at most `max_pixels`.
fn data_uri(path: &Path, max_pixels: u64) -> Result<String> {
    let bytes = picture_bytes(path)?;
    let picture = decode_bytes(&bytes, &path.display().to_string())?;
    let size = picture.size();
    let kind = match ::image::guess_format(&bytes) {
        Ok(ImageFormat::Jpeg) => Some("jpeg"),
        Ok(ImageFormat::Png) => Some("png"),
        _ => None,
    };
    if let Some(kind) = kind
        && size.area() <= max_pixels
        && bytes.len() <= SMALL_FILE
        && is_upright(&bytes)
    {
        return Ok(openai::data_uri(kind, &bytes));
    }
    let jpeg = match within(size, max_pixels) {
        same if same == size => encode_jpeg(picture.as_image(), JPEG_QUALITY)?,
        smaller => encode_jpeg(&resize(picture.as_image(), smaller, PassOrder::default())?, JPEG_QUALITY)?,
    };
    Ok(openai::data_uri("jpeg", &jpeg))
}

/// Whether the pixels stand in the file as they should be seen: not every server follows EXIF.
fn is_upright(bytes: &[u8]) -> bool {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok();
    let orientation = reader.and_then(|reader| reader.into_decoder().ok()?.orientation().ok());
    orientation == Some(Orientation::NoTransforms)
}

/// The largest size of the same shape with at most so many pixels.
fn within(size: Size, max_pixels: u64) -> Size {
    let scale = (max_pixels as f64 / size.area() as f64).sqrt();
    if scale >= 1.0 {
        return size;
    }
    let side = |length: u32| ((f64::from(length) * scale) as u32).max(1);
    Size::new(side(size.width), side(size.height))
}

/// The trace in a teacher's text, in one line. Some think first and some wrap what they were asked for: what stands behind
/// `</think>` counts, and the thoughts themselves where there is nothing but an answer; fences and an answer block are taken off.
///
/// ```text
/// <think>Image-1 shows a fox.</think><answer>[...]</answer>   ->  Image-1 shows a fox.
/// <think>What do they want?</think> Image-1 shows a fox.      ->  Image-1 shows a fox.
/// ```
pub(super) fn trace(text: &str) -> String {
    // Some templates write the opening tag into the prompt.
    let (thoughts, rest) = match text.rsplit_once("</think>") {
        Some((before, after)) => (before.rsplit("<think>").next().unwrap_or(before), after),
        None => ("", text.trim_start().strip_prefix("<think>").unwrap_or(text)),
    };
    let [thoughts, rest] = [thoughts, rest].map(|part| {
        let part = part.split("<answer>").next().unwrap_or(part).trim();
        let inner = part.strip_prefix("```").and_then(|part| part.strip_suffix("```"));
        // The first line of a fence names a language.
        inner.map_or(part, |inner| inner.split_once('\n').map_or(inner, |(_, inner)| inner))
    });
    let is_answer = |part: &str| part.trim_start().is_empty() || part.trim_start().starts_with(['[', '{']);
    let kept = if is_answer(rest) { thoughts } else { rest };
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Target;
    use ::image::RgbImage;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use std::fs;

    fn options(max_pixels: u64) -> Options {
        Options { max_pixels, ..Options::new("http://h", "m", "calls.jsonl") }
    }

    /// Two pictures of 200 x 100, the second with a fox.
    fn row(folder: &Path) -> Sample {
        for (name, grey) in [("1.png", 10), ("2.png", 200)] {
            RgbImage::from_pixel(200, 100, [grey; 3].into()).save(folder.join(name)).unwrap();
        }
        let target = Target { image: 2, bbox: BBox::new(20.0, 20.0, 100.0, 40.0), label: Some("fox".into()) };
        let extra = json!({
            "objects": [[], [{"name": "fox", "bbox": [20, 20, 100, 40]}, {"name": "cup", "bbox": [150, 0, 199, 99]}]],
            "relations": [{"relation": "only_in", "name": "fox", "target": 2}],
        });
        Sample {
            targets: vec![target],
            extra: extra.as_object().unwrap().clone(),
            ..Sample::question(&[folder.join("1.png"), folder.join("2.png")], "Where is the fox?", vec![])
        }
    }

    #[test]
    fn the_teacher_sees_pictures_in_order_the_question_and_the_facts() {
        let folder = tempfile::tempdir().unwrap();
        let row = row(folder.path());
        let request = Request::new(&row, &Facts::of(&row).unwrap(), &options(1 << 20)).unwrap();
        let body: Value = serde_json::from_slice(&request.body().unwrap()).unwrap();
        let parts = body["messages"][1]["content"].as_array().unwrap();
        assert_eq!((&parts[0]["text"], &parts[2]["text"]), (&json!("Image-1:"), &json!("Image-2:")));
        for (part, name) in [(&parts[1], "1.png"), (&parts[3], "2.png")] {
            let sent = part["image_url"]["url"].as_str().unwrap().strip_prefix("data:image/png;base64,").unwrap();
            assert_eq!(BASE64.decode(sent).unwrap(), fs::read(folder.path().join(name)).unwrap(), "the file as it is");
        }
        let text = parts[4]["text"].as_str().unwrap();
        for words in [
            "Question: Where is the fox?",
            "- Image-2: fox [10, 20, 50, 40]; cup [75, 0, 100, 99].",
            "Image-2 alone shows the fox",
            "The answer: fox in Image-2, [10, 20, 50, 40].",
        ] {
            assert!(text.contains(words), "{words:?} is not in: {text}");
        }
        assert!(!text.contains("- Image-1:"), "nothing is known of it: {text}");
        assert!(body.get("temperature").is_none() && body.get("max_tokens").is_none(), "the server's own");
        assert!(!request.record.to_string().contains("base64"), "the record holds no picture");
    }

    #[test]
    fn the_digest_hangs_on_what_is_asked_and_on_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let row = row(folder.path());
        let of = |row: &Sample, options: &Options| Request::new(row, &Facts::of(row).unwrap(), options).unwrap().digest;
        let first = of(&row, &options(1 << 20));
        assert_eq!(first.len(), 64);
        let elsewhere = Options { url: "http://other".into(), max_retries: 9, ..options(1 << 20) };
        assert_eq!(of(&Sample { id: "renamed".into(), ..row.clone() }, &elsewhere), first);
        let moved = Target { bbox: BBox::new(0.0, 0.0, 9.0, 9.0), ..row.targets[0].clone() };
        let others = [
            of(&Sample { question: "Where is the cup?".into(), ..row.clone() }, &options(1 << 20)),
            of(&Sample { targets: vec![moved], ..row.clone() }, &options(1 << 20)),
            of(&row, &options(1000)),
            of(&row, &Options { model: "n".into(), ..options(1 << 20) }),
            of(&row, &Options { temperature: Some(0.0), ..options(1 << 20) }),
            of(&row, &Options { max_tokens: Some(100), ..options(1 << 20) }),
        ];
        assert!(others.iter().all(|other| *other != first));
        RgbImage::from_pixel(200, 100, [11; 3].into()).save(folder.path().join("1.png")).unwrap();
        assert_ne!(of(&row, &options(1 << 20)), first, "another picture under the same name");
    }

    #[test]
    fn large_pictures_travel_smaller_and_strange_ones_as_jpeg() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        RgbImage::from_fn(200, 100, |x, y| [x as u8, y as u8, 0].into()).save(&path).unwrap();
        let sent = |path: &Path, most| {
            let uri = data_uri(path, most).unwrap();
            let (kind, data) = uri.split_once(";base64,").unwrap();
            (kind.to_owned(), decode_bytes(&BASE64.decode(data).unwrap(), "sent").unwrap().size())
        };
        assert_eq!(sent(&path, 20_000), ("data:image/png".into(), Size::new(200, 100)));
        assert_eq!(sent(&path, 5_000), ("data:image/jpeg".into(), Size::new(100, 50)));
        let webp = folder.path().join("a.webp");
        RgbImage::new(30, 20).save(&webp).unwrap();
        assert_eq!(sent(&webp, 5_000), ("data:image/jpeg".into(), Size::new(30, 20)));
        fs::write(&path, "nothing").unwrap();
        assert!(data_uri(&path, 5_000).unwrap_err().to_string().contains("a.png"));
        assert_eq!(within(Size::new(10_000, 1), 100), Size::new(1000, 1));
    }

    #[test]
    fn a_turned_photograph_is_sent_upright() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/decode");
        let turned: Vec<PathBuf> = fs::read_dir(folder)
            .unwrap()
            .map(|file| file.unwrap().path())
            .filter(|path| !is_upright(&fs::read(path).unwrap()))
            .collect();
        assert!(!turned.is_empty(), "golden files missing");
        for path in turned {
            let uri = data_uri(&path, 1 << 20).unwrap();
            let bytes = BASE64.decode(uri.split_once(";base64,").unwrap().1).unwrap();
            assert_eq!(decode_bytes(&bytes, "sent").unwrap().size(), image::size(&path).unwrap());
            assert!(is_upright(&bytes));
        }
    }

    #[test]
    fn traces_are_taken_out_of_what_teachers_wrap_them_in() {
        let plain = "Image-1 shows a fox. So it is in Image-2.";
        for text in [
            plain,
            " Image-1 shows a fox.\n\nSo it is in Image-2.\n",
            "```\nImage-1 shows a fox. So it is in Image-2.\n```",
            "```text\nImage-1 shows a fox. So it is in Image-2.\n```",
            "<think>Image-1 shows a fox. So it is in Image-2.</think>",
            "<think>\nImage-1 shows a fox. So it is in Image-2.\n</think>\n<answer>[{\"image\": 2}]</answer>",
            "<think>Image-1 shows a fox. So it is in Image-2.</think>\n```json\n[{\"image\": 2}]\n```",
            "<think>What do they want?</think>Image-1 shows a fox. So it is in Image-2.",
            "What do they want?</think>\nImage-1 shows a fox. So it is in Image-2.",
            "<think>What?</think><think>Image-1 shows a fox. So it is in Image-2.</think>",
            "Image-1 shows a fox. So it is in Image-2. <answer>[]</answer>",
        ] {
            assert_eq!(trace(text), plain, "{text}");
        }
        for text in ["", "<think></think>", "<answer>2</answer>", "</think>", "```", "``````", "[{\"image\": 2}]"] {
            assert!(trace(text).is_empty() || trace(text) == "```", "{text}: {}", trace(text));
        }
    }
}
