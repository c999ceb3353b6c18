//! The result table: `table.json` in, a table with intervals as bars out; also as plain text for a terminal.
//!
//! The type is what `demo` and `eval` write. What must stay true: a cell without an interval or a value is shown as such, never as zero.

use super::html::{escape, number};
use crate::stats::Estimate;
use anyhow::Context;
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// The file's name in a run folder.
pub const TABLE: &str = "table.json";

/// A result table.
///
/// ```
/// use foveate::{report::{Cell, Row, Table, Unit}, stats::wilson};
/// let table = Table {
///     title: "Held-out questions".into(),
///     columns: vec!["accuracy".into()],
///     rows: vec![Row { name: "base".into(), cells: vec![Cell::from(wilson(90, 300))], about: String::new() }],
///     notes: vec![],
///     unit: Some(Unit::Share),
///     ..Table::default()
/// };
/// assert!(table.to_string().contains("base    30.0 % (25.1–35.4)"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Table {
    /// What was measured.
    pub title: String,
    /// One heading a cell; the column of names has none.
    pub columns: Vec<String>,
    /// One system each.
    pub rows: Vec<Row>,
    /// Sentences below the table.
    pub notes: Vec<String>,
    /// What the numbers are; without it, a column that stays between 0 and 1 is taken for shares.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// The units of single columns, where they have their own; by place, null where they have not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<Option<Unit>>,
}

/// The unit of a table's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// 0 to 1, shown in per cent.
    Share,
    /// 0 to 100, shown in per cent.
    Percent,
    /// A difference of two figures in per cent, shown with its sign.
    Points,
    /// Counts and probabilities: only the number, without a bar.
    Plain,
    /// Anything else.
    Number,
}

/// One line of a table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// The system's name.
    pub name: String,
    /// One cell a column; null in the file is an empty cell.
    #[serde(deserialize_with = "cells_or_nulls")]
    pub cells: Vec<Cell>,
    /// A few words on what it is, optional.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub about: String,
}

/// A table file: the main table, and with it those of its figures by task.
#[derive(Serialize, Deserialize)]
struct File {
    #[serde(flatten)]
    table: Table,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    by_task: Vec<Table>,
}

/// The text of a table file: the first table, with the others as its `by_task`.
///
/// # Errors
/// There is no table.
pub fn tables_json(tables: &[Table]) -> anyhow::Result<Vec<u8>> {
    let (first, others) = tables.split_first().context("there is no table to write")?;
    Ok(serde_json::to_vec_pretty(&File { table: first.clone(), by_task: others.to_vec() })?)
}

/// The tables of a table file.
pub(super) fn read_tables(text: &str) -> serde_json::Result<Vec<Table>> {
    let File { table, by_task } = serde_json::from_str(text)?;
    Ok([table].into_iter().chain(by_task).collect())
}

fn cells_or_nulls<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Cell>, D::Error> {
    let cells = Vec::<Option<Cell>>::deserialize(deserializer)?;
    Ok(cells.into_iter().map(Option::unwrap_or_default).collect())
}

/// A number, perhaps with its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cell {
    /// The estimate; `None` when there is none (shown as a dash).
    pub value: Option<f64>,
    /// Lower end of the interval.
    pub low: Option<f64>,
    /// Upper end of the interval.
    pub high: Option<f64>,
    /// How many observations.
    pub n: Option<u64>,
}

impl From<Estimate> for Cell {
    fn from(estimate: Estimate) -> Self {
        let finite = |value: f64| value.is_finite().then_some(value);
        Cell {
            value: finite(estimate.value),
            low: finite(estimate.low),
            high: finite(estimate.high),
            n: Some(estimate.n as u64),
        }
    }
}

impl Cell {
    fn interval(&self) -> Option<(f64, f64)> {
        Some((self.low?, self.high?))
    }
}

/// How the numbers of one column are written and what a full bar means.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    /// Of `whole` (1 or 100), written in per cent.
    Share { whole: f64 },
    /// Of per cent; bars grow from the middle, which is 0, to either side as far as the greatest.
    Points { most: f64 },
    /// Without bars.
    Plain,
    /// Anything else; bars run from the smaller of 0 and the least value to the greatest.
    Number { low: f64, high: f64 },
}

impl Scale {
    fn of(table: &Table, column: usize) -> Self {
        let cells = || table.rows.iter().filter_map(|row| row.cells.get(column));
        let values: Vec<f64> = cells().flat_map(|cell| [cell.value, cell.low, cell.high]).flatten().collect();
        let low = values.iter().copied().fold(0.0, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        match table.units.get(column).copied().flatten().or(table.unit) {
            Some(Unit::Share) => Scale::Share { whole: 1.0 },
            Some(Unit::Percent) => Scale::Share { whole: 100.0 },
            Some(Unit::Points) => Scale::Points { most: high.max(-low) },
            Some(Unit::Plain) => Scale::Plain,
            None if low >= 0.0 && high <= 1.0 => Scale::Share { whole: 1.0 },
            Some(Unit::Number) | None => Scale::Number { low, high },
        }
    }

    fn text(self, value: f64) -> String {
        match self {
            Scale::Share { whole } => format!("{:.1} %", value / whole * 100.0),
            Scale::Points { .. } => points(value),
            Scale::Plain | Scale::Number { .. } => number(value),
        }
    }

    fn interval(self, (low, high): (f64, f64)) -> String {
        match self {
            Scale::Share { whole } => format!("{:.1}–{:.1}", low / whole * 100.0, high / whole * 100.0),
            Scale::Points { .. } => format!("{} to {}", points(low), points(high)),
            Scale::Plain | Scale::Number { .. } => format!("{} to {}", number(low), number(high)),
        }
    }

    /// Position along the bar, per cent.
    fn place(self, value: f64) -> f64 {
        let share = match self {
            Scale::Share { whole } => value / whole,
            Scale::Points { most } if most > 0.0 => 0.5 + value / most / 2.0,
            Scale::Number { low, high } if high > low => (value - low) / (high - low),
            Scale::Points { .. } => 0.5,
            Scale::Plain | Scale::Number { .. } => 0.0,
        };
        (share * 100.0).clamp(0.0, 100.0)
    }
}

/// With its sign, and without one where it rounds to nothing.
fn points(value: f64) -> String {
    let text = format!("{value:+.1}");
    if matches!(text.as_str(), "+0.0" | "-0.0") { "0.0".into() } else { text }
}

impl Table {
    /// The columns' number, whatever headings and rows say.
    fn width(&self) -> usize {
        self.rows.iter().map(|row| row.cells.len()).max().unwrap_or(0)
    }

    /// The heading of a column. Tables whose first heading is that of the names are understood too.
    fn heading(&self, column: usize) -> &str {
        let skip = usize::from(self.columns.len() == self.width() + 1);
        self.columns.get(column + skip).map_or("", String::as_str)
    }

    /// The table as HTML.
    pub(super) fn html(&self) -> String {
        let width = self.width();
        let scales: Vec<Scale> = (0..width).map(|column| Scale::of(self, column)).collect();
        let mut html = String::from("<div class=\"scroll\"><table class=\"result\"><thead><tr><th></th>");
        for column in 0..width {
            html.push_str(&format!("<th scope=\"col\">{}</th>", escape(self.heading(column))));
        }
        html.push_str("</tr></thead><tbody>");
        for row in &self.rows {
            let about =
                if row.about.is_empty() { String::new() } else { format!("<small>{}</small>", escape(&row.about)) };
            html.push_str(&format!("<tr><th scope=\"row\">{}{about}</th>", escape(&row.name)));
            for (column, scale) in scales.iter().enumerate() {
                html.push_str(&cell_html(
                    row.cells.get(column).copied().unwrap_or_default(),
                    *scale,
                    self.heading(column),
                ));
            }
            html.push_str("</tr>");
        }
        html.push_str("</tbody></table></div>");
        for note in &self.notes {
            html.push_str(&format!("<p class=\"note\">{}</p>", escape(note)));
        }
        html
    }
}

fn cell_html(cell: Cell, scale: Scale, heading: &str) -> String {
    let label = format!("data-label=\"{}\"", escape(heading));
    let Some(value) = cell.value else {
        return format!("<td {label}><span class=\"none\">—</span></td>");
    };
    let mut html = match cell.n {
        Some(n) => format!("<td {label} title=\"n = {n}\">"),
        None => format!("<td {label}>"),
    };
    html.push_str(&format!("<div class=\"value\"><b>{}</b>", escape(&scale.text(value))));
    if let Some(interval) = cell.interval() {
        html.push_str(&format!("<span>{}</span>", escape(&scale.interval(interval))));
    }
    if scale == Scale::Plain {
        return html + "</div></td>";
    }
    // The bar grows from zero, wherever zero is on this scale.
    let (zero, at) = (scale.place(0.0), scale.place(value));
    html.push_str(&format!(
        "</div><div class=\"bar\"><i style=\"left:{:.2}%;width:{:.2}%\"></i>",
        zero.min(at),
        (at - zero).abs()
    ));
    if let Some((low, high)) = cell.interval() {
        let (low, high) = (scale.place(low), scale.place(high));
        html.push_str(&format!("<u style=\"left:{low:.2}%;width:{:.2}%\"></u>", (high - low).max(0.0)));
    }
    html.push_str("</div></td>");
    html
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.width();
        let mut lines = vec![vec![String::new()]];
        lines[0].extend((0..width).map(|column| self.heading(column).to_owned()));
        let scales: Vec<Scale> = (0..width).map(|column| Scale::of(self, column)).collect();
        for row in &self.rows {
            let mut line = vec![row.name.clone()];
            for (column, scale) in scales.iter().enumerate() {
                let cell = row.cells.get(column).copied().unwrap_or_default();
                let interval = cell.interval().map(|interval| format!(" ({})", scale.interval(interval)));
                line.push(
                    cell.value.map_or_else(|| "—".into(), |value| scale.text(value) + &interval.unwrap_or_default()),
                );
            }
            lines.push(line);
        }
        let widths: Vec<usize> = (0..=width)
            .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
            .collect();
        writeln!(f, "{}", self.title)?;
        for line in &lines {
            let mut text = String::from("  ");
            for (cell, width) in line.iter().zip(&widths) {
                text.push_str(&format!("{cell:<width$}    "));
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_and_its_interval_are_placed_in_per_cent() {
        let table: Table = serde_json::from_str(
            r#"{"title": "t", "columns": ["accuracy"], "rows": [{"name": "<MGPO>", "cells": [{"value": 0.625, "low": 0.5, "high": 0.75, "n": 64}]}]}"#,
        )
        .unwrap();
        let html = table.html();
        assert!(html.contains("<b>62.5 %</b><span>50.0–75.0</span>"), "{html}");
        assert!(html.contains("left:0.00%;width:62.50%") && html.contains("left:50.00%;width:25.00%"), "{html}");
        assert!(html.contains("&lt;MGPO&gt;") && html.contains("title=\"n = 64\""), "{html}");
    }

    #[test]
    fn numbers_below_zero_grow_to_the_left_of_zero() {
        let cell = |value| Cell { value: Some(value), ..Cell::default() };
        let row = |value| Row { name: "r".into(), cells: vec![cell(value)], about: String::new() };
        let table = Table { columns: vec!["gain".into()], rows: vec![row(-5.0), row(15.0)], ..Table::default() };
        // Zero is a quarter of the way from -5 to 15.
        let html = table.html();
        assert!(html.contains("left:0.00%;width:25.00%") && html.contains("left:25.00%;width:75.00%"), "{html}");
    }

    #[test]
    fn what_is_missing_is_a_dash() {
        let table: Table =
            serde_json::from_str(r#"{"columns": ["", "a", "b"], "rows": [{"name": "x", "cells": [{"value": 2}, {"value": null, "n": 0}]}, {"cells": [null]}]}"#).unwrap();
        let html = table.html();
        assert_eq!(html.matches("<span class=\"none\">—</span>").count(), 3, "{html}");
        assert!(html.contains("<th scope=\"col\">a</th><th scope=\"col\">b</th>"), "{html}");
    }

    #[test]
    fn the_unit_decides_before_the_guess() {
        let table = |unit: &str| -> Table {
            serde_json::from_str(&format!(
                r#"{{"unit": "{unit}", "columns": ["a"], "rows": [{{"name": "x", "cells": [{{"value": 0.5}}]}}]}}"#
            ))
            .unwrap()
        };
        assert!(table("share").html().contains("<b>50.0 %</b>"));
        assert!(table("percent").html().contains("<b>0.5 %</b>"));
        assert!(table("number").html().contains("<b>0.5</b>"));
    }

    #[test]
    fn a_column_can_have_a_unit_of_its_own() {
        let cell = |value, low, high| Cell { value: Some(value), low, high, n: None };
        let row = |difference: Cell, p| Row {
            name: "r".into(),
            cells: vec![cell(50.0, None, None), difference, p],
            about: String::new(),
        };
        let table = Table {
            columns: vec!["accuracy".into(), "difference".into(), "p".into()],
            rows: vec![
                row(cell(-5.0, Some(-10.0), Some(0.04)), cell(0.03, None, None)),
                row(cell(2.5, Some(1.0), Some(4.0)), cell(1.2e-9, None, None)),
            ],
            unit: Some(Unit::Percent),
            units: vec![None, Some(Unit::Points), Some(Unit::Plain)],
            ..Table::default()
        };
        let text = table.to_string();
        assert!(text.contains("50.0 %      -5.0 (-10.0 to 0.0)    0.03"), "{text}");
        assert!(text.contains("+2.5 (+1.0 to +4.0)    1.2e-9"), "{text}");
        // Zero is the middle; five of at most ten points reach half of the left half.
        let html = table.html();
        assert!(html.contains("left:25.00%;width:25.00%") && html.contains("left:50.00%;width:12.50%"), "{html}");
        assert_eq!(html.matches("class=\"bar\"").count(), 4, "two of the first column, two of the second");
        let again: Table = serde_json::from_slice(&tables_json(std::slice::from_ref(&table)).unwrap()).unwrap();
        assert_eq!(again, table);
    }

    #[test]
    fn text_columns_line_up() {
        let share = |value| Cell { value: Some(value), low: Some(0.25), high: Some(0.75), n: None };
        let row = |name: &str, value| Row {
            name: name.into(),
            cells: vec![share(value), Cell::default()],
            about: String::new(),
        };
        let table = Table {
            title: "Result".into(),
            columns: vec!["accuracy".into(), "contains".into()],
            rows: vec![row("base", 0.3), row("MGPO", 0.7)],
            notes: vec!["95 % intervals".into()],
            ..Table::default()
        };
        let expected = "Result\n          accuracy              contains\n  base    30.0 % (25.0–75.0)    —\n  MGPO    70.0 % (25.0–75.0)    —\n  95 % intervals\n";
        assert_eq!(table.to_string(), expected);
    }
}
