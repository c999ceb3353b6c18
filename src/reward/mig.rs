//! MIG-Bench's rule and ours, side by side: where the answer to a question over several pictures is read, and what it is worth.
//!
//! `official` repeats the published script, its faults included: the first box of the text in a fixed order of ways to write one,
//! whichever picture is meant. `strict` reads the declared answer alone and asks for the right picture too. What must stay true: the two
//! published versions have different annotations and different scripts, so a [`Truth`] says which it is and its boxes
//! stay as they were published, the impossible ones too: those score 0, and [`Verdict::faulty`] lets a cleaned score leave them out.
//!
//! Original: <https://github.com/thunlp/Migician> `eval/utils.py`. Revised: <https://github.com/AMAP-ML/UniVG-R1> `eval/MIG_bench/utils.py`.

use serde::{Deserialize, Serialize};

use super::boxes::pairs;
use super::{Named, last_turn, parse_named};
use crate::geometry::{BBox, Size};

/// The key of a row under which its [`Truth`] stands.
pub const MIG_BENCH: &str = "mig_bench";

/// The ten tasks, with the names that published tables give them, in their order.
pub const TASKS: [(&str, &str); 10] = [
    ("diff", "Static"),
    ("view_diff", "Robust"),
    ("common_object", "Common"),
    ("object_tracking", "OT"),
    ("multi_view", "MV"),
    ("region", "Region"),
    ("refer_grounding", "Refer"),
    ("group_grounding", "GG"),
    ("reasoning", "Reason"),
    ("correspondence", "Co-Re"),
];

/// Which annotations. Their scores must never share a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// `MIG_data.json`: boxes in shares of each side, 0 to 1.
    Original,
    /// `revised_MIG_bench.json` of UniVG-R1: whole thousandths of each side.
    Revised,
}

impl Version {
    pub fn name(self) -> &'static str {
        match self {
            Version::Original => "original",
            Version::Revised => "revised",
        }
    }

    /// How long a side is in the units of this version's boxes.
    pub fn side(self) -> f64 {
        match self {
            Version::Original => 1.0,
            Version::Revised => 1000.0,
        }
    }

    /// The version that boxes were published in: no share reaches 2 (the largest in the original is 1.048), and only a box of the
    /// first two thousandths would stay below it.
    pub fn of<'a>(boxes: impl IntoIterator<Item = &'a [f64; 4]>) -> Version {
        let thousandths = boxes.into_iter().flatten().any(|side| *side > 2.0);
        if thousandths { Version::Revised } else { Version::Original }
    }
}

/// What the published answers to one question are.
///
/// ```json
/// {"version": "original", "items": [{"image": 2, "box": [0.443, 0.247, 0.522, 0.395]}]}
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Truth {
    pub version: Version,
    /// One as published; several where the questions of a set are asked as one.
    pub items: Vec<Item>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// Counts from 1.
    pub image: usize,
    /// As published, in the units of the version.
    #[serde(rename = "box")]
    pub published: [f64; 4],
}

impl Item {
    /// In shares of the picture's sides.
    pub fn shares(&self, version: Version) -> BBox {
        BBox::from(self.published.map(|side| side / version.side()))
    }

    /// The IoU of what the published rule found, in the units of the version.
    pub fn official_iou(&self, found: Option<BBox>) -> f64 {
        found.map_or(0.0, |found| BBox::from(self.published).iou(&found))
    }

    /// Whether nothing can be right: corners the wrong way round, or outside of the picture. Seven of the original items are so.
    pub fn faulty(&self, version: Version) -> bool {
        let b = self.shares(version);
        !(b.area() > 0.0 && BBox::new(0.0, 0.0, 1.0, 1.0).contains(&b))
    }
}

/// How a text is read officially.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    pub version: Version,
    /// What the published script does to the predictions of its own model and to no other's: y1 x 1.05 and y2 x 1.10, at most 0.999.
    pub enlarge: bool,
    /// The size of the target's picture as the model saw it, if the model speaks in its pixels (Qwen2.5-VL). The published script knows
    /// no such model: without this, its numbers are taken for thousandths.
    pub shown: Option<Size>,
}

/// Ways to write a box in the order in which they are looked for. `#`: a number; `~`: white space or none; `_`: white space.
const WAYS: [(&str, Number); 6] = [
    ("(#,~#),~(#,~#)", Number::Whole),
    ("[#,~#,~#,~#]", Number::Fraction),
    ("(#,#),(#,#)", Number::Fraction),
    ("(#,~#,~#,~#)", Number::Fraction),
    ("[#,~#,~#,~#]", Number::Whole),
    ("<box>#_#_#_#</box>", Number::Whole),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    /// Digits.
    Whole,
    /// Digits, a point, digits.
    Fraction,
}

impl Rule {
    /// The first box of a text, in the units of the version. `None`: none is found, which scores 0.
    ///
    /// ```
    /// use foveate::reward::mig::{Rule, Version};
    /// let rule = Rule { version: Version::Original, enlarge: false, shown: None };
    /// assert_eq!(rule.read("It is at (100,200),(300,400).").map(<[f64; 4]>::from), Some([0.1, 0.2, 0.3, 0.4]));
    /// ```
    pub fn read(&self, text: &str) -> Option<BBox> {
        let (found, number) = WAYS.iter().find_map(|(way, number)| {
            let found = matches(text, way, *number);
            (!found.is_empty()).then_some((found, *number))
        })?;
        let said = *found.first()?;
        if let Some(size) = self.shown {
            let (width, height) = (f64::from(size.width), f64::from(size.height));
            let [x1, y1, x2, y2] = said;
            return Some(self.enlarged(in_units(self.version, [x1 / width, y1 / height, x2 / width, y2 / height])));
        }
        let alone = found.len() == 1;
        match self.version {
            Version::Original => {
                // A published fault: among several boxes a 1 is not divided.
                let thousandths = |side: f64| if alone { side >= 1.0 } else { side > 1.0 };
                let read = said.map(|side| if thousandths(side) { side / 1000.0 } else { side });
                // Another: several boxes are a list of lists, which the enlargement fails on without a word.
                Some(if alone { self.enlarged(read) } else { BBox::from(read) })
            }
            // A published fault: texts of fractions are read as whole numbers, which fails.
            Version::Revised if number == Number::Fraction => None,
            Version::Revised => Some(self.enlarged(said)),
        }
    }

    fn enlarged(&self, read: [f64; 4]) -> BBox {
        let [x1, y1, x2, y2] = read;
        if !self.enlarge {
            return BBox::from(read);
        }
        let side = self.version.side();
        let longer = |y: f64, by: f64| {
            let share = to_thousandths((y / side * by).min(0.999));
            match self.version {
                Version::Original => share,
                Version::Revised => (share * side).trunc(),
            }
        };
        BBox::new(x1, longer(y1, 1.05), x2, longer(y2, 1.10))
    }
}

fn in_units(version: Version, shares: [f64; 4]) -> [f64; 4] {
    shares.map(|share| share * version.side())
}

/// Rounded to three digits as Python does it: by the decimal value, half to even.
fn to_thousandths(value: f64) -> f64 {
    format!("{value:.3}").parse().unwrap_or(value)
}

/// All places of a text that are written in this way, from left to right, none overlapping.
fn matches(text: &str, way: &str, number: Number) -> Vec<[f64; 4]> {
    let opening = way.split('#').next().unwrap_or_default();
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(opening) {
        let from = rest.get(at..).unwrap_or_default();
        rest = match matched(from, way, number) {
            Some((four, after)) => {
                found.push(four);
                after
            }
            None => from.get(1..).unwrap_or_default(),
        };
    }
    found
}

/// Four numbers at the start of a text, and what comes after them.
fn matched<'a>(text: &'a str, way: &str, number: Number) -> Option<([f64; 4], &'a str)> {
    let mut numbers = [0.0; 4];
    let mut count = 0;
    let mut rest = text;
    for sign in way.chars() {
        rest = match sign {
            '#' => {
                let (value, after) = read_number(rest, number)?;
                *numbers.get_mut(count)? = value;
                count += 1;
                after
            }
            '~' => rest.trim_start(),
            '_' => Some(rest.trim_start()).filter(|after| after.len() < rest.len())?,
            literal => rest.strip_prefix(literal)?,
        };
    }
    Some((numbers, rest))
}

fn read_number(text: &str, number: Number) -> Option<(f64, &str)> {
    let digits = |from: &str| from.bytes().take_while(u8::is_ascii_digit).count();
    let mut length = digits(text);
    if length == 0 {
        return None;
    }
    if number == Number::Fraction {
        let after = text.get(length..)?.strip_prefix('.')?;
        let decimals = digits(after);
        length += 1 + decimals;
        if decimals == 0 {
            return None;
        }
    }
    // So many digits that the number has no end belong to no box.
    let value: f64 = text.get(..length)?.parse().ok().filter(|value: &f64| value.is_finite())?;
    Some((value, text.get(length..)?))
}

/// An answer, read both ways.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Said {
    /// The first box, in the units of the version.
    pub official: Option<BBox>,
    /// The declared boxes in shares of the pictures they name; `None` where nothing is declared that can be read.
    pub strict: Option<Vec<Named>>,
}

impl Said {
    /// From the text of a model whose numbers are thousandths or shares or, with the sizes in which the pictures were shown, pixels.
    pub fn of_text(text: &str, truth: &Truth, enlarge: bool, shown: Option<&[Size]>) -> Said {
        let size = |image: usize| shown.and_then(|sizes| sizes.get(image.checked_sub(1)?)).copied();
        let target = truth.items.first().and_then(|item| size(item.image));
        let rule = Rule { version: truth.version, enlarge, shown: target };
        // Of a box as a whole: a side of exactly 1 is the end of the picture among shares, and a thousandth of it among thousandths.
        let thousandths = |sides: [f64; 4]| match sides.iter().all(|side| *side <= 1.0) {
            true => sides,
            false => sides.map(|side| side / 1000.0),
        };
        let shares = |named: Named| {
            let bbox = match (shown, size(named.image)) {
                (None, _) => BBox::from(thousandths(named.bbox.into())),
                (Some(_), Some(size)) => as_shares(named.bbox, size.bounds()),
                (Some(_), None) => BBox::new(0.0, 0.0, 0.0, 0.0),
            };
            Named { bbox, ..named }
        };
        Said {
            official: rule.read(last_turn(text)),
            strict: parse_named(text).map(|boxes| boxes.into_iter().map(shares).collect()),
        }
    }

    /// From boxes in pixels of the original pictures, whose bounds are given. A box on a picture that is not there is nowhere.
    pub fn of_pixels(boxes: Option<&[Named]>, pictures: &[BBox], version: Version) -> Said {
        let place = |named: &Named| {
            let picture = named.image.checked_sub(1).and_then(|k| pictures.get(k));
            let bbox = picture.map_or(BBox::new(0.0, 0.0, 0.0, 0.0), |picture| as_shares(named.bbox, *picture));
            Named { bbox, ..named.clone() }
        };
        let strict: Option<Vec<Named>> = boxes.map(|boxes| boxes.iter().map(place).collect());
        let first = strict.as_ref().and_then(|boxes| boxes.first());
        let official = first.map(|named| BBox::from(in_units(version, named.bbox.into())));
        Said { official, strict }
    }
}

/// Pixels of a picture -> shares of its sides.
fn as_shares(b: BBox, picture: BBox) -> BBox {
    let (width, height) = (picture.width(), picture.height());
    BBox::new(b.x1 / width, b.y1 / height, b.x2 / width, b.y2 / height)
}

/// What an answer is worth for one published item.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// IoU by the published rule; `None` where several items were asked for at once, which that rule does not know.
    pub official: Option<f64>,
    /// Strict: a box is declared on the right picture.
    pub picture: bool,
    /// Strict: and its IoU is at least 0.5.
    pub joint: bool,
    /// The annotation cannot be right, so nothing could have been.
    pub faulty: bool,
}

/// Judges an answer, one verdict an item. Boxes answer for items one to one, right pictures first; an answer with more boxes
/// than were asked for finds nothing.
///
/// ```
/// use foveate::reward::mig::{Item, Said, Truth, Version, judge};
/// let truth = Truth { version: Version::Original, items: vec![Item { image: 2, published: [0.1, 0.2, 0.3, 0.4] }] };
/// let said = |text| judge(&truth, &Said::of_text(text, &truth, false, None))[0];
/// let wrong_picture = said(r#"<answer>[{"image": 1, "bbox_2d": [100, 200, 300, 400], "label": "cup"}]</answer>"#);
/// assert_eq!((wrong_picture.official, wrong_picture.picture, wrong_picture.joint), (Some(1.0), false, false));
/// ```
pub fn judge(truth: &Truth, said: &Said) -> Vec<Verdict> {
    let wanted = |item: &Item| Named { image: item.image, bbox: item.shares(truth.version), label: None };
    let wanted: Vec<Named> = truth.items.iter().map(wanted).collect();
    let declared = said.strict.as_deref().filter(|boxes| boxes.len() <= wanted.len()).unwrap_or(&[]);
    let found = |p: &Named, t: &Named| if p.image == t.image { p.bbox.iou(&t.bbox) } else { 0.0 };
    let pairs = pairs(declared, &wanted, found);
    let alone = truth.items.len() == 1;
    let verdict = |(item, target): (&Item, &Named)| {
        let answer = pairs.iter().find(|(_, t)| std::ptr::eq(*t, target)).map(|(p, _)| *p);
        let on_picture = answer.filter(|p| p.image == target.image);
        Verdict {
            official: alone.then(|| item.official_iou(said.official)),
            picture: on_picture.is_some(),
            joint: on_picture.is_some_and(|p| p.bbox.iou(&target.bbox) >= 0.5),
            faulty: item.faulty(truth.version),
        }
    };
    truth.items.iter().zip(&wanted).map(verdict).collect()
}

/// MIG-Bench's average: the unweighted mean of the ten tasks' figures, or the names of those that lack one. `figures` maps a task's
/// key to its figure.
///
/// # Errors
/// The published names of the tasks that have no figure; over fewer than ten tasks there is no such average.
pub fn average(figures: impl Fn(&str) -> Option<f64>) -> Result<f64, Vec<&'static str>> {
    let all = TASKS.map(|(key, name)| figures(key).ok_or(name));
    let missing: Vec<&str> = all.iter().filter_map(|figure| figure.err()).collect();
    if missing.is_empty() { Ok(all.iter().flatten().sum::<f64>() / TASKS.len() as f64) } else { Err(missing) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL: Rule = Rule { version: Version::Original, enlarge: false, shown: None };
    const REVISED: Rule = Rule { version: Version::Revised, ..ORIGINAL };

    fn read(rule: Rule, text: &str) -> Option<[f64; 4]> {
        rule.read(text).map(<[f64; 4]>::from)
    }

    fn truth(version: Version, items: &[(usize, [f64; 4])]) -> Truth {
        let items = items.iter().map(|&(image, published)| Item { image, published }).collect();
        Truth { version, items }
    }

    #[test]
    fn migicians_ten_cells_average_to_63_82() {
        // Original annotations, Acc@0.5, in the order of TASKS (arXiv 2501.05767).
        let cells = [65.15, 46.81, 84.19, 70.73, 60.07, 74.31, 76.77, 66.53, 59.41, 34.19];
        let cell = |key: &str| TASKS.iter().position(|(k, _)| *k == key).map(|k| cells[k]);
        let mean = average(cell).unwrap();
        assert_eq!(format!("{mean:.2}"), "63.82");
        assert_eq!(average(|key| cell(key).filter(|_| key != "region")), Err(vec!["Region"]));
    }

    #[test]
    fn every_way_to_write_a_box_is_read_in_its_order() {
        let wanted = Some([0.1, 0.2, 0.3, 0.4]);
        for text in [
            "(100,200),(300,400)",
            "It is there: <|box_start|>(100, 200), (300,\t400)<|box_end|>.",
            "[0.1, 0.2,0.3, 0.4]",
            "(0.1,0.2),(0.3,0.4)",
            "(0.1, 0.2, 0.3, 0.4)",
            "[100, 200, 300, 400]",
            "<box>100 200  300 400</box>",
            // Earlier ways win wherever they stand.
            "<box>9 9 9 9</box> [8,8,8,8] (0.7,0.7,0.7,0.7) (0.6,0.6),(0.6,0.6) [0.5,0.5,0.5,0.5] (100,200),(300,400)",
            "<box>9 9 9 9</box> [8,8,8,8] (0.7,0.7,0.7,0.7) (0.6,0.6),(0.6,0.6) [0.1, 0.2, 0.3, 0.4]",
            "<box>9 9 9 9</box> [8,8,8,8] (0.7,0.7,0.7,0.7) (0.1,0.2),(0.3,0.4)",
            "<box>9 9 9 9</box> [8,8,8,8] (0.1, 0.2,0.3,0.4)",
            "<box>9 9 9 9</box> [100,200,300,400]",
            // Of several the first, wherever the answer stands.
            "<think>(100,200),(300,400)</think><answer>(1,2),(3,4)</answer>",
        ] {
            assert_eq!(read(ORIGINAL, text), wanted, "{text}");
        }
        for text in [
            "",
            "nowhere",
            "(1,2,3,4)",
            "[1,2,3]",
            "[0.1,0.2,0.3,1]",
            "(0.1, 0.2),(0.3,0.4)",
            "[ 1,2,3,4]",
            "<box>1,2,3,4</box>",
            "[-1,2,3,4]",
            "é[",
        ] {
            assert_eq!(read(ORIGINAL, text), None, "{text}");
        }
        assert_eq!(read(ORIGINAL, &format!("[{0},{0},{0},{0}]", "9".repeat(400))), None);
    }

    #[test]
    fn the_published_faults_are_repeated() {
        // One box: a 1 is a thousandth. Several: it is the whole side.
        assert_eq!(read(ORIGINAL, "(0,1),(500,999)"), Some([0.0, 0.001, 0.5, 0.999]));
        assert_eq!(read(ORIGINAL, "(0,1),(500,999) (5,5),(9,9)"), Some([0.0, 1.0, 0.5, 0.999]));
        // The script of the revised version keeps whole numbers and fails on fractions.
        assert_eq!(read(REVISED, "(0,1),(500,999)"), Some([0.0, 1.0, 500.0, 999.0]));
        assert_eq!(read(REVISED, "[0.1,0.2,0.3,0.4] [1,2,3,4]"), None);
        // Enlarged only where asked for, and in the original only when there is one box.
        let enlarged = Rule { enlarge: true, ..ORIGINAL };
        assert_eq!(read(enlarged, "(100,200),(300,400)"), Some([0.1, 0.21, 0.3, 0.44]));
        assert_eq!(read(enlarged, "(100,200),(300,950)"), Some([0.1, 0.21, 0.3, 0.999]));
        assert_eq!(read(enlarged, "(100,200),(300,400) (1,2),(3,4)"), Some([0.1, 0.2, 0.3, 0.4]));
        let enlarged = Rule { enlarge: true, ..REVISED };
        assert_eq!(read(enlarged, "(100,200),(300,400) (1,2),(3,4)"), Some([100.0, 210.0, 300.0, 440.0]));
    }

    #[test]
    fn pixels_shares_and_thousandths_of_one_box_score_the_same() {
        // A quarter to a half of 800 x 400 pixels; the answer is a little lower.
        let truth = truth(Version::Original, &[(2, [0.25, 0.3, 0.5, 0.55])]);
        let shown = [Size::new(100, 100), Size::new(800, 400)];
        let named = |b: &str| format!(r#"<answer>[{{"image": 2, "bbox_2d": {b}, "label": "x"}}]</answer>"#);
        let score = |text: &str, shown: Option<&[Size]>| judge(&truth, &Said::of_text(text, &truth, false, shown))[0];
        let pixels = score(&named("[200, 100, 400, 200]"), Some(&shown));
        let shares = score(&named("[0.25, 0.25, 0.5, 0.5]"), None);
        let thousandths = score(&named("[250, 250, 500, 500]"), None);
        let ours = Named { image: 2, bbox: BBox::new(200.0, 100.0, 400.0, 200.0), label: None };
        let played = Said::of_pixels(Some(&[ours]), &shown.map(Size::bounds), Version::Original);
        // 0.2 of 0.3 in height.
        assert!((pixels.official.unwrap() - 2.0 / 3.0).abs() < 1e-12 && pixels.joint);
        assert_eq!([pixels, shares, thousandths], [judge(&truth, &played)[0]; 3]);
        // Taken for thousandths, the pixels would be somewhere else.
        assert!(score(&named("[200, 100, 400, 200]"), None).official.unwrap() < 0.2);
    }

    #[test]
    fn impossible_boxes_score_nothing_and_are_marked() {
        // The five of MIG_data.json that are inverted: whatever is said, even the same or the box set upright.
        for published in [
            [0.027, 0.18, 0.143, 0.051],
            [0.271, 0.382, 0.085, 0.225],
            [0.26, 0.705, 0.555, 0.407],
            [0.192, 0.201, 0.416, 0.09],
            [0.729, 0.64, 0.526, 0.835],
        ] {
            let truth = truth(Version::Original, &[(1, published)]);
            let [x1, y1, x2, y2] = published;
            let upright = [x1.min(x2), y1.min(y2), x1.max(x2), y1.max(y2)];
            for said in [published, upright, [0.0, 0.0, 0.999, 0.999]] {
                let verdict = judge(&truth, &Said::of_text(&format!("{said:?}"), &truth, false, None))[0];
                assert_eq!((verdict.official, verdict.faulty), (Some(0.0), true), "{said:?}");
            }
        }
        // The two that reach beyond their picture; officially they can be found, near enough.
        for published in [[0.319, 0.186, 1.048, 0.535], [0.502, 0.254, 0.99, 1.035]] {
            assert!(Item { image: 1, published }.faulty(Version::Original));
        }
        assert!(!Item { image: 1, published: [0.0, 0.0, 1000.0, 1000.0] }.faulty(Version::Revised));
        assert!(Item { image: 1, published: [0.0, 0.0, 1001.0, 1000.0] }.faulty(Version::Revised));
    }

    #[test]
    fn strict_reads_the_declared_answer_and_asks_for_the_picture() {
        let truth = truth(Version::Revised, &[(2, [100.0, 200.0, 300.0, 400.0])]);
        let score = |text: &str| {
            let v = judge(&truth, &Said::of_text(text, &truth, false, None))[0];
            (v.official.unwrap() >= 0.5, v.picture, v.joint)
        };
        let right = r#"<answer>[{"image": 2, "bbox_2d": [100,200,300,400], "label": "x"}]</answer>"#;
        assert_eq!(score(right), (true, true, true));
        assert_eq!(score(&right.replace("\"image\": 2", "\"image\": 1")), (true, false, false));
        assert_eq!(score(&right.replace("\"image\": 2", "\"image\": 9")), (true, false, false));
        assert_eq!(score(&right.replace("400]", "210]")), (false, true, false));
        // The first box counts officially, the declared one strictly.
        assert_eq!(score(&format!("<think>at [1,2,3,4]</think>{right}")), (false, true, true));
        // Two boxes for one item: one of them would be a guess.
        let twice = right.replace("[{", r#"[{"image": 2, "bbox_2d": [100,200,300,400]}, {"#);
        assert_eq!(score(&twice), (true, false, false));
        assert_eq!(score("no box"), (false, false, false));
    }

    #[test]
    fn items_asked_at_once_are_found_each_by_its_own_box() {
        let (a, b) = ([0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]);
        let truth = truth(Version::Original, &[(2, a), (3, b), (4, a)]);
        let said = |boxes: &[(usize, [f64; 4])]| {
            let named = |&(image, b): &(usize, [f64; 4])| Named { image, bbox: BBox::from(b), label: None };
            let said = Said { official: None, strict: Some(boxes.iter().map(named).collect()) };
            judge(&truth, &said).iter().map(|v| (v.official, v.picture, v.joint)).collect::<Vec<_>>()
        };
        let (found, seen, lost) = ((None, true, true), (None, true, false), (None, false, false));
        assert_eq!(said(&[(3, b), (2, a), (4, b)]), [found, found, seen]);
        assert_eq!(said(&[(2, a)]), [found, lost, lost]);
        assert_eq!(said(&[(2, a), (3, b), (4, a), (4, b)]), [lost; 3]);
    }

    #[test]
    fn the_version_is_known_by_its_units() {
        assert_eq!(Version::of(&[[0.319, 0.186, 1.048, 0.535]]), Version::Original);
        assert_eq!(Version::of(&[[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 5.0, 7.0]]), Version::Revised);
    }
}
