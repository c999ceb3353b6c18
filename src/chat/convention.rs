//! The coordinate convention of each model family: the one place in the program where a model's numbers mean something.
//!
//! It hides that Qwen2.5-VL speaks in pixels of what it was shown while Qwen2-VL and Qwen3-VL speak in thousandths of each
//! side, and how each writes a box as text. Everything outside works with a [`BBox`] in pixels of the view, and through
//! [`crate::geometry::View`] in pixels of the original.
//!
//! What must stay true: reading what was written gives the same numbers, and writing what was read gives the same text.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::geometry::{BBox, Size};

/// How a model family names a place in an image.
///
/// ```
/// use foveate::{chat::Convention, geometry::{BBox, Size}};
/// let (view, cup) = (Size::new(500, 200), BBox::new(100.0, 50.0, 250.0, 100.0));
/// assert_eq!(Convention::Qwen25.numbers(cup, view), [100, 50, 250, 100]); // pixels
/// assert_eq!(Convention::Qwen3.numbers(cup, view), [200, 250, 500, 500]); // thousandths
/// assert_eq!(Convention::Qwen3.box_in_view([200, 250, 500, 500], view), cup);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// Qwen2-VL: thousandths of each side, written `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`.
    Qwen2,
    /// Qwen2.5-VL: pixels of the view (the resized image), written as JSON with `bbox_2d` and `label`.
    Qwen25,
    /// Qwen3-VL: thousandths of each side, written as JSON with `bbox_2d` and `label`.
    Qwen3,
}

/// How many steps a side has in the relative conventions.
const RELATIVE: f64 = 1000.0;

impl Convention {
    /// The convention that goes with `model_type` in config.json.
    ///
    /// # Errors
    /// A family whose convention is not known: guessing would train on wrong boxes.
    pub fn of(model_type: &str) -> Result<Convention> {
        match model_type {
            "qwen2_vl" => Ok(Convention::Qwen2),
            "qwen2_5_vl" => Ok(Convention::Qwen25),
            "qwen3_vl" | "qwen3_vl_moe" => Ok(Convention::Qwen3),
            other => bail!(
                "choosing the coordinate convention: model_type {other:?} is not known, expected qwen2_vl, qwen2_5_vl, qwen3_vl or qwen3_vl_moe"
            ),
        }
    }

    /// Whether boxes are written as JSON (else as corners in box tokens).
    pub fn is_json(self) -> bool {
        match self {
            Convention::Qwen2 => false,
            Convention::Qwen25 | Convention::Qwen3 => true,
        }
    }

    /// What one unit of the model's numbers is, in pixels of the view: (x, y).
    fn unit(self, view: Size) -> (f64, f64) {
        match self {
            Convention::Qwen25 => (1.0, 1.0),
            Convention::Qwen2 | Convention::Qwen3 => {
                (f64::from(view.width) / RELATIVE, f64::from(view.height) / RELATIVE)
            }
        }
    }

    /// The model's numbers as a box in pixels of the view. Nothing is judged or repaired: that is `geometry::judge_box`'s.
    pub fn box_in_view(self, numbers: [i64; 4], view: Size) -> BBox {
        self.place_in_view(BBox::from(numbers.map(|n| n as f64)), view)
    }

    /// The same for numbers that need not be whole.
    pub fn place_in_view(self, said: BBox, view: Size) -> BBox {
        let (ux, uy) = self.unit(view);
        match self {
            Convention::Qwen25 => said,
            Convention::Qwen2 | Convention::Qwen3 => {
                BBox { x1: said.x1 * ux, y1: said.y1 * uy, x2: said.x2 * ux, y2: said.y2 * uy }
            }
        }
    }

    /// The numbers a model of this family would say for a box in pixels of the view: nearest whole number, kept inside the view.
    pub fn numbers(self, box_in_view: BBox, view: Size) -> [i64; 4] {
        let (ux, uy) = self.unit(view);
        let inside = box_in_view.clamp(&view.bounds());
        // A view has no side of 0, so the units are not 0 either; if one were, the cast would give 0, not a panic.
        [inside.x1 / ux, inside.y1 / uy, inside.x2 / ux, inside.y2 / uy].map(|v| v.round() as i64)
    }

    /// The words an assistant turn of this family names boxes with.
    ///
    /// ```
    /// use foveate::{chat::Convention, geometry::{BBox, Size}};
    /// let (view, cup) = (Size::new(1000, 1000), [("cup", BBox::new(1.0, 2.0, 3.0, 4.0))]);
    /// assert_eq!(Convention::Qwen25.write(&cup, view), "```json\n[{\"bbox_2d\":[1,2,3,4],\"label\":\"cup\"}]\n```");
    /// assert_eq!(Convention::Qwen2.write(&cup, view), "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>");
    /// ```
    pub fn write(self, boxes_in_view: &[(&str, BBox)], view: Size) -> String {
        let parts: Vec<String> = boxes_in_view
            .iter()
            .map(|(label, b)| {
                let [x1, y1, x2, y2] = self.numbers(*b, view);
                if self.is_json() {
                    let label = serde_json::Value::from(*label);
                    format!("{{\"bbox_2d\":[{x1},{y1},{x2},{y2}],\"label\":{label}}}")
                } else {
                    format!(
                        "<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
                    )
                }
            })
            .collect();
        if self.is_json() { format!("```json\n[{}]\n```", parts.join(",")) } else { parts.join("") }
    }

    /// A place as it stands inside a question: `[x1,y1,x2,y2]`, or `(x1,y1),(x2,y2)` for Qwen2-VL. Plain text, no control token.
    pub fn write_place(self, box_in_view: BBox, view: Size) -> String {
        let [x1, y1, x2, y2] = self.numbers(box_in_view, view);
        if self.is_json() { format!("[{x1},{y1},{x2},{y2}]") } else { format!("({x1},{y1}),({x2},{y2})") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Action, Reading};

    #[test]
    fn numbers_survive_the_way_there_and_back() {
        // Sides that thousandths do and do not divide, smaller and larger than 1000.
        for view in [Size::new(28, 1000), Size::new(364, 504), Size::new(1148, 868), Size::new(2044, 28)] {
            for convention in [Convention::Qwen2, Convention::Qwen25, Convention::Qwen3] {
                let (w, h) = match convention {
                    Convention::Qwen25 => (i64::from(view.width), i64::from(view.height)),
                    _ => (1000, 1000),
                };
                for n in [[0, 0, w, h], [1, 2, w / 3, h / 3], [w / 7, h / 2, w - 1, h - 1]] {
                    assert_eq!(convention.numbers(convention.box_in_view(n, view), view), n, "{convention:?} {view}");
                }
            }
        }
    }

    #[test]
    fn a_box_beyond_the_view_is_written_at_its_edge() {
        let n = Convention::Qwen25.numbers(BBox::new(-3.0, 4.4, 700.0, 4.6), Size::new(500, 200));
        assert_eq!(n, [0, 4, 500, 5]);
    }

    #[test]
    fn what_is_written_is_read() {
        let view = Size::new(504, 364);
        let boxes =
            [("hot \"air\" balloon", BBox::new(100.0, 50.0, 250.0, 100.0)), ("dog", BBox::new(0.0, 0.0, 504.0, 364.0))];
        for convention in [Convention::Qwen2, Convention::Qwen25, Convention::Qwen3] {
            let text = convention.write(&boxes, view);
            let Action::Look { boxes: read } = Action::read(&text, &Reading::of(convention)) else { panic!("{text}") };
            assert_eq!(read.len(), 2);
            for ((label, b), claim) in boxes.iter().zip(read) {
                assert_eq!(claim.label.as_deref(), Some(*label));
                assert_eq!(claim.bbox_2d, convention.numbers(*b, view));
            }
        }
    }

    #[test]
    fn unknown_families_are_refused() {
        assert!(Convention::of("llava").unwrap_err().to_string().contains("llava"));
        assert_eq!(Convention::of("qwen2_5_vl").unwrap(), Convention::Qwen25);
    }
}
