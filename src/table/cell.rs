//! The address of a picture that lies in a table's cell, written as a path.
//!
//! `hr_bench_4k.tsv#row=17` is the picture of the seventeenth row, `train.parquet#row=3&column=images&picture=2` the second of the third
//! row's. It is a path so that it can be joined to a folder, made relative, kept in a record and read back wherever a file's path can. What
//! must stay true: printing and reading are inverses; nothing is a cell but what ends exactly so behind a name that ends in `.tsv` or
//! `.parquet`, so a file whose name holds a `#` is a file, and a table's own name may hold one too.

use std::path::{Path, PathBuf};

/// The column that an address does not name.
pub const USUAL: &str = "image";

const ROW: &str = "#row=";
const COLUMN: &str = "&column=";
const PICTURE: &str = "&picture=";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    pub table: PathBuf,
    /// Counts from 1; the line of headings is no row.
    pub row: usize,
    pub column: String,
    /// Counts from 1: a cell may hold several.
    pub picture: usize,
}

impl Cell {
    /// The cell that a path names, if it names one.
    ///
    /// ```
    /// use foveate::table::Cell;
    /// let cell = Cell::named(std::path::Path::new("d/a.parquet#row=3&column=images&picture=2")).unwrap();
    /// assert_eq!((cell.row, cell.column.as_str(), cell.picture), (3, "images", 2));
    /// assert_eq!(Cell::named(std::path::Path::new("d/cat#row=3.png")), None);
    /// ```
    pub fn named(path: &Path) -> Option<Cell> {
        let (table, place) = path.to_str()?.rsplit_once(ROW)?;
        let ends = |end: &str| table.len() > end.len() && table.to_ascii_lowercase().ends_with(end);
        if !ends(".tsv") && !ends(".parquet") {
            return None;
        }
        let (place, picture) = match place.split_once(PICTURE) {
            Some((place, picture)) => (place, counted(picture)?),
            None => (place, 1),
        };
        let (row, column) = match place.split_once(COLUMN) {
            Some((row, column)) => (row, plain(column)?),
            None => (place, USUAL.to_owned()),
        };
        Some(Cell { table: table.into(), row: counted(row)?, column, picture })
    }

    pub fn path(&self) -> PathBuf {
        let mut path = self.table.clone().into_os_string();
        path.push(format!("{ROW}{}", self.row));
        if self.column != USUAL {
            path.push(format!("{COLUMN}{}", guarded(&self.column)));
        }
        if self.picture != 1 {
            path.push(format!("{PICTURE}{}", self.picture));
        }
        path.into()
    }
}

/// A number from 1, written as a person would: no sign, no leading zero.
fn counted(text: &str) -> Option<usize> {
    let digits = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| digits)
}

/// A heading with what has a meaning in addresses and paths written as `%` and two hexadecimal digits.
fn guarded(column: &str) -> String {
    let mut out = String::with_capacity(column.len());
    for c in column.chars() {
        match c {
            '%' | '&' | '#' | '=' | '/' | '\\' => out.push_str(&format!("%{:02X}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

fn plain(guarded: &str) -> Option<String> {
    let mut pieces = guarded.split('%');
    let mut out = pieces.next()?.to_owned();
    for piece in pieces {
        let (code, rest) = piece.split_at_checked(2)?;
        out.push(char::from(u8::from_str_radix(code, 16).ok().filter(u8::is_ascii)?));
        out.push_str(rest);
    }
    // Anything that is not written this way is no address.
    (!out.is_empty() && self::guarded(&out) == guarded).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_ends_as_an_address_is_one() {
        for path in [
            "a.png",
            "a.png#row=1",
            "cat#row=1.png",
            "a.tsv",
            "a.tsv#row=",
            "a.tsv#row=0",
            "a.tsv#row=01",
            "a.tsv#row=+1",
            "a.tsv#row=1&picture=0",
            "a.tsv#row=1&column=",
            "a.tsv#row=1&column=a#b",
            "a.tsv#row=1&column=%zz",
            ".tsv#row=1",
            "a.tsv#row=1/b.png",
        ] {
            assert_eq!(Cell::named(Path::new(path)), None, "{path}");
        }
        let odd = Cell::named(Path::new("d#row=2/my#set.TSV#row=17")).unwrap();
        assert_eq!((odd.table.as_path(), odd.row), (Path::new("d#row=2/my#set.TSV"), 17));
        assert_eq!(odd.path(), Path::new("d#row=2/my#set.TSV#row=17"));
    }

    proptest! {
        #[test]
        fn printing_and_reading_are_inverses(
            name in "[a-z#=&% ]{1,9}",
            row in 1usize..9999,
            column in "\\PC{1,9}",
            picture in 1usize..9,
        ) {
            let cell = Cell { table: format!("d/{name}.parquet").into(), row, column, picture };
            prop_assert_eq!(Cell::named(&cell.path()), Some(cell));
        }
    }
}
