//! A line chart as inline SVG: raw values faint, their smoothed course bold, several runs in one frame; runs that differ by
//! their seed are one bold mean within a band.
//!
//! Pure: numbers in, text out; colours are classes of the style sheet, so that light and dark both work. What must stay true: a value that is
//! not finite is a gap, never a coordinate, and a chart's text grows with its width in pixels, not with the number of steps.

use super::html::{escape, number};
use crate::stats::ema;
use std::collections::HashMap;

/// One experiment in a chart: a run, or several of them that differ by their seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// The experiment's name.
    pub label: String,
    /// Which colour of the palette.
    pub colour: usize,
    /// For each run (step, value) in the order of steps; values may be NaN.
    pub runs: Vec<Vec<(f64, f64)>>,
    /// Drawn as it is: a schedule has no noise to smooth away.
    pub exact: bool,
}

/// A course at one step: the mean of the runs, the lowest and the highest of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct At {
    pub step: f64,
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

impl Series {
    /// The smoothed course: for each run an average over its last ten steps or so (none for short runs), then the mean over the runs, at
    /// the steps that all of them have.
    pub fn smooth(&self) -> Vec<At> {
        let smoothed: Vec<Vec<(f64, f64)>> = self.runs.iter().map(|run| self.smooth_run(run)).collect();
        let Some((first, others)) = smoothed.split_first() else { return Vec::new() };
        let by_step = |run: &Vec<(f64, f64)>| run.iter().map(|&(step, value)| (step.to_bits(), value)).collect();
        let others: Vec<HashMap<u64, f64>> = others.iter().map(by_step).collect();
        let mut course = Vec::with_capacity(first.len());
        for &(step, value) in first {
            let values: Option<Vec<f64>> = others.iter().map(|run| run.get(&step.to_bits()).copied()).collect();
            let Some(values) = values else { continue };
            let all = || values.iter().copied().chain([value]);
            course.push(At {
                step,
                mean: all().sum::<f64>() / (values.len() + 1) as f64,
                low: all().fold(f64::INFINITY, f64::min),
                high: all().fold(f64::NEG_INFINITY, f64::max),
            });
        }
        course
    }

    fn smooth_run(&self, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        if self.exact {
            return points.to_vec();
        }
        let values: Vec<f64> = points.iter().map(|point| point.1).collect();
        points.iter().map(|point| point.0).zip(ema(&values, keep(values.len()))).collect()
    }

    fn finite(&self) -> impl Iterator<Item = (f64, f64)> {
        self.runs.iter().flatten().copied().filter(|(x, y)| x.is_finite() && y.is_finite())
    }

    /// With few points the dots are the data and a faint copy of the same line would only blur it.
    fn few(&self) -> bool {
        self.runs.len() == 1 && self.finite().count() <= 12
    }
}

/// The weight of the past in the smoothing of so many values.
pub fn keep(values: usize) -> f64 {
    (1.0 - 10.0 / values as f64).clamp(0.0, 0.9)
}

/// How many colours the style sheet has.
pub const COLOURS: usize = 6;

const WIDTH: f64 = 380.0;
const HEIGHT: f64 = 190.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 24.0;
/// Points drawn per line at most: about one per pixel.
const MOST_POINTS: usize = 320;

/// Draws the chart, or `None` when no series has a finite value. With `share`, the vertical axis is 0 to 1.
pub fn chart(title: &str, series: &[Series], share: bool) -> Option<String> {
    let all: Vec<(f64, f64)> = series.iter().flat_map(Series::finite).collect();
    let (first, last) = range(all.iter().map(|point| point.0))?;
    let (low, high) = range(all.iter().map(|point| point.1))?;
    let ticks = if share { vec![0.0, 0.25, 0.5, 0.75, 1.0] } else { nice_ticks(low, high, 4) };
    let (bottom, top) = (low.min(ticks[0]), high.max(ticks[ticks.len() - 1]));
    let x = |step: f64| {
        let share = if last > first { (step - first) / (last - first) } else { 0.5 };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let y = |value: f64| HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM);

    let mut svg = format!(
        "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\" data-axes=\"{first} {last} {bottom} {top}\" data-frame=\"{LEFT} {} {TOP} {}\">",
        escape(&format!("{title} by step")),
        WIDTH - RIGHT,
        HEIGHT - BOTTOM
    );
    for tick in &ticks {
        let at = y(*tick);
        svg.push_str(&format!(
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 7.0,
            at + 3.5,
            number(*tick)
        ));
    }
    for tick in step_ticks(first, last) {
        let anchor = if tick == last && last > first { "end" } else { "middle" };
        svg.push_str(&format!(
            "<text class=\"tick\" x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
            x(tick),
            HEIGHT - 7.0,
            number(tick)
        ));
    }
    for one in series {
        let colour = one.colour % COLOURS;
        let course = one.smooth();
        let (few, several) = (one.few(), one.runs.len() > 1);
        if several {
            svg.push_str(&band(&course, &x, &y, &format!("band s{colour}")));
        } else if !few && !one.exact {
            svg.push_str(&line(&thin(&one.runs[0]), &x, &y, &format!("raw s{colour}")));
        }
        let drawn: Vec<(f64, f64)> = match few {
            true => one.runs[0].clone(),
            false => thin(&course.iter().map(|at| (at.step, at.mean)).collect::<Vec<_>>()),
        };
        svg.push_str(&line(&drawn, &x, &y, &format!("line s{colour}")));
        let dots: Vec<(f64, f64)> = match few {
            true => one.finite().collect(),
            false => drawn.iter().rev().find(|point| point.1.is_finite()).copied().into_iter().collect(),
        };
        for (step, value) in dots {
            svg.push_str(&format!(
                "<circle class=\"dot s{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{}\"/>",
                x(step),
                y(value),
                if few { 2.6 } else { 3.0 }
            ));
        }
    }
    svg.push_str("</svg>");
    Some(svg)
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| {
        Some(range.map_or((value, value), |(low, high): (f64, f64)| (low.min(value), high.max(value))))
    })
}

/// A polyline with a break wherever a value is missing.
fn line(points: &[(f64, f64)], x: &impl Fn(f64) -> f64, y: &impl Fn(f64) -> f64, class: &str) -> String {
    let mut path = String::new();
    let mut drawing = false;
    for &(step, value) in points {
        if step.is_finite() && value.is_finite() {
            path.push_str(&format!("{}{:.1} {:.1}", if drawing { "L" } else { "M" }, x(step), y(value)));
            drawing = true;
        } else {
            drawing = false;
        }
    }
    format!("<path class=\"{class}\" d=\"{path}\"/>")
}

/// The area between the lowest and the highest run.
fn band(course: &[At], x: &impl Fn(f64) -> f64, y: &impl Fn(f64) -> f64, class: &str) -> String {
    let stretch = course.len().div_ceil(MOST_POINTS).max(1);
    let known: Vec<&At> = course.iter().filter(|at| at.mean.is_finite()).step_by(stretch).collect();
    let upper = known.iter().map(|at| (at.step, at.high));
    let lower = known.iter().rev().map(|at| (at.step, at.low));
    let corners: Vec<String> =
        upper.chain(lower).map(|(step, value)| format!("{:.1} {:.1}", x(step), y(value))).collect();
    if corners.is_empty() { String::new() } else { format!("<path class=\"{class}\" d=\"M{}Z\"/>", corners.join("L")) }
}

/// At most [`MOST_POINTS`] points: of each stretch its lowest and its highest, so that no spike is lost.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MOST_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MOST_POINTS / 2);
    let mut out = Vec::with_capacity(MOST_POINTS);
    for part in points.chunks(stretch) {
        let finite = || part.iter().enumerate().filter(|(_, point)| point.1.is_finite());
        let lowest = finite().min_by(|a, b| a.1.1.total_cmp(&b.1.1));
        let highest = finite().max_by(|a, b| a.1.1.total_cmp(&b.1.1));
        if let (Some(lowest), Some(highest)) = (lowest, highest) {
            let (first, second) = if lowest.0 <= highest.0 { (lowest, highest) } else { (highest, lowest) };
            out.push(*first.1);
            if first.0 != second.0 {
                out.push(*second.1);
            }
        }
    }
    out
}

/// Round values that cover `low..=high`: multiples of 1, 2 or 5 times a power of ten, about `wanted` of them, at least two.
fn nice_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let (low, high) = if high > low {
        (low, high)
    } else {
        let room = if low == 0.0 { 1.0 } else { low.abs() * 0.5 };
        (low - room, high + room)
    };
    let step = round_step((high - low) / wanted as f64);
    let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
    (0..=(last - first) as usize).map(|i| (first + i as f64) * step).collect()
}

/// The 1, 2 or 5 times a power of ten just above or equal to `rough`.
fn round_step(rough: f64) -> f64 {
    let power = 10_f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough * (1.0 - 1e-9)).unwrap_or(10.0);
    factor * power
}

/// Whole steps to label: round ones inside, the first and the last always.
fn step_ticks(first: f64, last: f64) -> Vec<f64> {
    if last <= first {
        return vec![first];
    }
    let step = round_step((last - first) / 4.0).max(1.0);
    let mut ticks = vec![first];
    let mut next = (first / step).floor() * step + step;
    while next < last {
        // No label that would touch its neighbours at either end.
        if next - first >= 0.6 * step && last - next >= 0.6 * step {
            ticks.push(next);
        }
        next += step;
    }
    ticks.push(last);
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: Vec<(f64, f64)>) -> Series {
        Series { label: "run".into(), colour: 0, runs: vec![points], exact: false }
    }

    #[test]
    fn corners_of_the_data_are_corners_of_the_frame() {
        let svg = chart("reward", &[series(vec![(0.0, 0.0), (10.0, 1.0)])], true).unwrap();
        // Bottom left of the frame is (44, 166), top right is (370, 10).
        assert!(svg.contains("<path class=\"line s0\" d=\"M44.0 166.0L370.0 10.0\"/>"), "{svg}");
    }

    #[test]
    fn several_seeds_are_their_mean_within_a_band() {
        let runs = vec![vec![(0.0, 0.0), (10.0, 0.5), (20.0, 1.0)], vec![(0.0, 0.0), (10.0, 1.0)]];
        let both = Series { runs, ..series(vec![]) };
        let course = both.smooth();
        // Step 20 is the first run's alone.
        assert_eq!(course.len(), 2);
        assert_eq!(course[1], At { step: 10.0, mean: 0.75, low: 0.5, high: 1.0 });
        let svg = chart("reward", &[both], true).unwrap();
        assert!(svg.contains("<path class=\"band s0\" d=\"M44.0 166.0L207.0 10.0L207.0 88.0L44.0 166.0Z\"/>"), "{svg}");
        assert!(!svg.contains("class=\"raw"), "{svg}");
    }

    #[test]
    fn a_missing_value_is_a_gap() {
        let points = vec![(0.0, 0.0), (1.0, 1.0), (2.0, f64::NAN), (3.0, 1.0), (4.0, 0.0)];
        let svg = chart("reward", &[series(points)], true).unwrap();
        assert!(svg.contains("d=\"M44.0 166.0L125.5 10.0M288.5 10.0L370.0 166.0\""), "{svg}");
        assert!(!svg.contains("NaN"), "{svg}");
        assert_eq!(chart("nothing", &[series(vec![(0.0, f64::NAN)])], false), None);
        assert_eq!(chart("nothing", &[], false), None);
    }

    #[test]
    fn one_point_and_equal_values_have_a_frame() {
        for points in [vec![(5.0, 3.0)], vec![(1.0, 0.0), (2.0, 0.0)]] {
            let svg = chart("x", &[series(points)], false).unwrap();
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn titles_are_escaped() {
        let svg = chart("\"><script>", &[series(vec![(0.0, 1.0)])], false).unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&quot;&gt;&lt;script&gt;"), "{svg}");
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(nice_ticks(0.0, 10.0, 4), [0.0, 5.0, 10.0]);
        assert_eq!(nice_ticks(3.0, 97.0, 4), [0.0, 50.0, 100.0]);
        assert_eq!(nice_ticks(0.0, 8.0, 4), [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(nice_ticks(-1.0, 1.0, 4), [-1.0, -0.5, 0.0, 0.5, 1.0]);
        assert_eq!(step_ticks(1.0, 60.0), [1.0, 20.0, 40.0, 60.0]);
        assert_eq!(step_ticks(7.0, 7.0), [7.0]);
    }

    #[test]
    fn long_runs_stay_small_and_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), (f64::from(i) / 900.0).sin())).collect();
        points[31_234].1 = 40.0;
        let thinned = thin(&points);
        assert!(thinned.len() <= MOST_POINTS, "{}", thinned.len());
        assert!(thinned.contains(&(31_234.0, 40.0)));
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let svg = chart("x", &[series(points)], false).unwrap();
        // Two lines of at most 320 points of at most 14 characters, and the frame.
        assert!(svg.len() < 2 * 320 * 14 + 3000, "{}", svg.len());
    }
}
