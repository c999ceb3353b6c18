//! Accuracy by how much of the picture the target takes: whether looking closer helps where there is more to gain (spec 1.14).
//!
//! What must stay true: the bins are the same for every set, so that figures of sets and models can be put beside each other; a row without a
//! target is in none of them.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;

use super::figures::{Figures, cell, share_by_question};
use crate::data::Sample;
use crate::episode::Episode;
use crate::geometry::Size;
use crate::report::{Cell, Row, Table, Unit};
use crate::stats::Estimate;

/// Where bins begin, as shares of the picture's area: tenths of tenths, because targets of the benchmarks lie between a ten-thousandth (a
/// shirt in a street) and all of the picture. The last ends at 1.
pub const EDGES: [f64; 5] = [0.0, 1e-4, 1e-3, 1e-2, 1e-1];
const NAMES: [&str; 5] = ["under 0.01 %", "0.01 to 0.1 %", "0.1 to 1 %", "1 to 10 %", "10 % and more"];

/// The questions whose target takes from `from` up to less than `to` of the picture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bin {
    pub from: f64,
    pub to: f64,
    pub questions: usize,
    pub accuracy: Estimate,
}

/// The share of its picture's area that a row's target takes, from 0 to 1; of several targets the smallest, because that is the one that must
/// still be made out. None without a target, or where its picture's size is not known.
pub fn target_area(row: &Sample, sizes: &HashMap<PathBuf, Size>) -> Option<f64> {
    let share = |target: &crate::data::Target| {
        let size = sizes.get(row.images.get(target.image.checked_sub(1)?)?)?;
        Some(target.bbox.area() / size.area() as f64)
    };
    row.targets.iter().filter_map(share).min_by(f64::total_cmp)
}

fn bin_of(area: f64) -> usize {
    EDGES.iter().rposition(|&edge| area >= edge).unwrap_or(0)
}

/// The bins that have questions. An episode's group is the place of its row in `areas`.
pub(super) fn bins(episodes: &[Episode], areas: &[Option<f64>]) -> Vec<Bin> {
    let mut right: [Vec<(u64, bool)>; EDGES.len()] = Default::default();
    for episode in episodes {
        let area = usize::try_from(episode.group).ok().and_then(|row| areas.get(row).copied().flatten());
        if let Some(area) = area {
            right[bin_of(area)].push((episode.group, episode.right()));
        }
    }
    let bin = |(k, right): (usize, &Vec<(u64, bool)>)| {
        let mut questions: Vec<u64> = right.iter().map(|(question, _)| *question).collect();
        questions.sort_unstable();
        questions.dedup();
        let to = EDGES.get(k + 1).copied().unwrap_or(1.0);
        Bin { from: EDGES[k], to, questions: questions.len(), accuracy: share_by_question(right) }
    };
    right.iter().enumerate().filter(|(_, right)| !right.is_empty()).map(bin).collect()
}

/// The table, where targets are of more than one size.
pub(super) fn table(rows: &[Figures]) -> Option<Table> {
    let of = |row: &Figures, k: usize| row.by_target_area.iter().find(|bin| bin.from == EDGES[k]).cloned();
    let count = |k: usize| rows.iter().filter_map(|row| of(row, k)).map(|bin| bin.questions).max();
    let shown: Vec<(usize, usize)> = (0..EDGES.len()).filter_map(|k| Some((k, count(k)?))).collect();
    if shown.len() < 2 {
        return None;
    }
    let row = |row: &Figures| Row {
        name: row.name.clone(),
        cells: shown
            .iter()
            .map(|&(k, _)| of(row, k).map_or_else(Cell::default, |bin| cell(Some(&bin.accuracy))))
            .collect(),
        about: String::new(),
    };
    Some(Table {
        title: "right answers, by the share of the picture that the target takes".to_owned(),
        columns: shown.iter().map(|&(k, n)| format!("{} ({n})", NAMES[k])).collect(),
        rows: rows.iter().map(row).collect(),
        notes: vec!["in brackets: questions; of several targets the smallest counts".to_owned()],
        unit: Some(Unit::Percent),
        ..Table::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Target;
    use crate::geometry::BBox;

    #[test]
    fn the_smallest_target_counts_and_edges_belong_to_the_larger_bin() {
        let mut row = Sample::question(&["a.png".into(), "b.png".into()], "?", vec![]);
        let target = |image, x2, y2| Target { image, bbox: BBox::new(0.0, 0.0, x2, y2), label: None };
        row.targets = vec![target(1, 100.0, 100.0), target(2, 10.0, 10.0)];
        let sizes = HashMap::from([("a.png".into(), Size::new(1000, 100)), ("b.png".into(), Size::new(100, 1000))]);
        assert_eq!(target_area(&row, &sizes), Some(1e-3));
        assert_eq!(bin_of(1e-3), 2);
        assert_eq!((bin_of(0.0), bin_of(9.9e-5), bin_of(0.5), bin_of(1.0)), (0, 0, 4, 4));
        row.targets.clear();
        assert_eq!(target_area(&row, &sizes), None);
    }
}
