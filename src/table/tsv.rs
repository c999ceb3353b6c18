//! TSV with pictures in base64, as VLMEvalKit's sets are published: one pass finds where each row begins, a picture is then one read.
//!
//! What must stay true: one row is held at a time; the file is found to have changed rather than misread. A picture cell of a few
//! characters is the `index` of the row that holds the picture, and a list (`['…', '…']`) holds several.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Bad, Cell, Each, MOST, PICTURES, Record};

pub(super) struct Tsv {
    path: PathBuf,
    columns: Vec<String>,
    /// Where each row begins, and the end of the last.
    starts: Vec<u64>,
}

/// No base64 of a picture is as short as this; the index of another row is.
const LONGEST_INDEX: usize = 64;

/// A file of which a single row may only take so much.
struct Limited {
    file: File,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            return Err(std::io::Error::other("one row takes more than 1 GiB; is a quotation mark not closed?"));
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let n = self.file.read(&mut into[..most])?;
        self.left -= n as u64;
        Ok(n)
    }
}

fn builder() -> csv::ReaderBuilder {
    let mut builder = csv::ReaderBuilder::new();
    builder.delimiter(b'\t').has_headers(false).flexible(true).buffer_capacity(1 << 18);
    builder
}

impl Tsv {
    /// Reads the file once, handing over its rows without their pictures.
    pub fn scan(path: &Path, each: Each) -> Result<Tsv> {
        let file = File::open(path).with_context(|| format!("reading the data file {}", path.display()))?;
        let mut reader = builder().from_reader(Limited { file, left: MOST });
        let mut row = csv::ByteRecord::new();
        let headings = reader.read_byte_record(&mut row).with_context(|| format!("reading {}", path.display()))?;
        ensure!(headings, "the file is empty, expected a line of headings: {}", path.display());
        let columns: Vec<String> = row.iter().map(|cell| String::from_utf8_lossy(cell).trim().to_owned()).collect();
        let mut table = Tsv { path: path.to_owned(), columns, starts: Vec::new() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        loop {
            reader.get_mut().left = MOST;
            let number = table.starts.len() + 1;
            match reader.read_byte_record(&mut row) {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    each(Err(Bad { number, rows: 1, reason: format!("the rest of the file cannot be read: {e}") }))?;
                    break;
                }
            }
            // The position may lie before blank lines, which the reader skips again.
            table.starts.push(row.position().map_or(0, csv::Position::byte));
            let record = table.record(number, &row, &seen);
            if let Some(index) = record.as_ref().ok().and_then(|r| r.values.get("index")?.as_str()) {
                seen.insert(index.to_owned(), number);
            }
            each(record.map_err(|reason| Bad { number, rows: 1, reason }))?;
        }
        table.starts.push(reader.position().byte());
        Ok(table)
    }

    fn record(&self, number: usize, row: &csv::ByteRecord, seen: &HashMap<String, usize>) -> Result<Record, String> {
        if row.len() != self.columns.len() {
            return Err(format!("found {} cells, expected {} as there are headings", row.len(), self.columns.len()));
        }
        let mut record = Record { number, ..Record::default() };
        for (heading, cell) in self.columns.iter().zip(row) {
            if PICTURES.contains(&heading.as_str()) {
                let pictures = self.pictures(number, heading, cell, seen)?;
                record.pictures.push((heading.clone(), pictures));
                record.values.insert(heading.clone(), Value::Null);
                continue;
            }
            let text =
                std::str::from_utf8(cell).map_err(|e| format!("the cell under {heading:?} is not UTF-8 ({e})"))?;
            // An empty cell says nothing, as a missing key does.
            let value = if text.is_empty() { Value::Null } else { Value::String(text.to_owned()) };
            record.values.insert(heading.clone(), value);
        }
        Ok(record)
    }

    fn pictures(
        &self,
        number: usize,
        heading: &str,
        cell: &[u8],
        seen: &HashMap<String, usize>,
    ) -> Result<Vec<PathBuf>, String> {
        let at = |row: usize, picture: usize| {
            Cell { table: self.path.clone(), row, column: heading.to_owned(), picture }.path()
        };
        let cell = cell.trim_ascii();
        if cell.is_empty() {
            return Ok(Vec::new());
        }
        if cell.starts_with(b"[") {
            return Ok((1..=listed(cell).len()).map(|picture| at(number, picture)).collect());
        }
        if cell.len() <= LONGEST_INDEX {
            let index = String::from_utf8_lossy(cell);
            // A row may stand for itself by what is no index either: that is told when it is opened.
            return match seen.get(&*index) {
                Some(&row) => Ok(vec![at(row, 1)]),
                None => Ok(vec![at(number, 1)]),
            };
        }
        Ok(vec![at(number, 1)])
    }

    pub fn picture(&self, cell: &Cell) -> Result<Vec<u8>> {
        let place = cell.row.checked_sub(1).and_then(|k| Some((*self.starts.get(k)?, *self.starts.get(k + 1)?)));
        let Some((start, end)) = place else {
            bail!("there is no row {}, the file has {}", cell.row, self.starts.len().saturating_sub(1))
        };
        let column = self.columns.iter().position(|heading| *heading == cell.column);
        let column = column.with_context(|| format!("there is no column {:?}", cell.column))?;
        let mut file = File::open(&self.path).context("opening the table")?;
        file.seek(SeekFrom::Start(start)).context("finding the row")?;
        let mut text = Vec::with_capacity(usize::try_from(end.saturating_sub(start)).unwrap_or(0));
        file.take(end.saturating_sub(start)).read_to_end(&mut text).context("reading the row")?;
        let mut row = csv::ByteRecord::new();
        let found = builder().from_reader(&text[..]).read_byte_record(&mut row).context("reading the row")?;
        ensure!(found && row.len() == self.columns.len(), "the row is not as it was: has the file changed?");
        drop(text);
        let bytes = row.get(column).unwrap_or_default().trim_ascii();
        if bytes.starts_with(b"[") {
            let several = listed(bytes);
            let one = several.get(cell.picture - 1);
            return Ok(one.with_context(|| format!("the cell holds {} pictures", several.len()))?.to_vec());
        }
        ensure!(cell.picture == 1, "the cell holds one picture");
        Ok(bytes.to_vec())
    }
}

/// The texts of a list as JSON or Python writes one: what stands between quotation marks, which base64 does not hold.
fn listed(cell: &[u8]) -> Vec<&[u8]> {
    let quoted = |b: &u8| matches!(b, b'\'' | b'"');
    cell.split(quoted).skip(1).step_by(2).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(path: &Path) -> Vec<Result<Record, Bad>> {
        let mut all = Vec::new();
        Tsv::scan(path, &mut |record| {
            all.push(record);
            Ok(())
        })
        .unwrap();
        all
    }

    fn text(path: &Path) -> String {
        let cell = Cell::named(path).unwrap();
        String::from_utf8(Tsv::scan(&cell.table, &mut |_| Ok(())).unwrap().picture(&cell).unwrap()).unwrap()
    }

    #[test]
    fn rows_are_found_again_behind_quotes_newlines_and_blank_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a#b.tsv");
        let long = |c: char| c.to_string().repeat(80);
        let (a, b, c) = (long('a'), long('b'), long('c'));
        std::fs::write(
            &path,
            format!(
                "\u{feff}index\timage\tquestion\n1\t{a}\t\"What \"\"is\"\"\tit,\nand where?\"\n\n2\t\"['{b}', '{c}']\"\tBoth?\n3\t1\tAgain?\n4\t{c}\n5\t{b}\tLast"
            ),
        )
        .unwrap();
        let rows = records(&path);
        let first = rows[0].as_ref().unwrap();
        assert_eq!(first.values["question"], "What \"is\"\tit,\nand where?");
        assert_eq!((first.number, text(&first.pictures[0].1[0])), (1, a.clone()));
        let both = &rows[1].as_ref().unwrap().pictures[0].1;
        assert_eq!((text(&both[0]), text(&both[1])), (b.clone(), c));
        assert_eq!(text(&rows[2].as_ref().unwrap().pictures[0].1[0]), a, "the picture of index 1");
        let bad = rows[3].as_ref().unwrap_err();
        assert!(bad.number == 4 && bad.reason.contains("2 cells, expected 3"), "{bad:?}");
        assert_eq!(text(&rows[4].as_ref().unwrap().pictures[0].1[0]), b);
    }
}
