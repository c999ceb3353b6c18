//! Files of rows as they are published: JSON, JSON lines, TSV with pictures in base64, parquet with pictures in bytes.
//!
//! It hides containers, compression and where in a file a row lies. A [`Record`] holds a row's words and numbers and, for each picture,
//! an address ([`Cell`]); the picture itself is read when somebody asks for it, by [`picture_bytes`], with the same call as for a plain
//! file. What must stay true: no more than one row's pictures are held at a time while rows are listed (a parquet page is held whole,
//! for it is compressed whole); a damaged row or group of rows is handed over as [`Bad`] and the rest goes on; nothing in a file makes any
//! of this panic.

mod cell;
mod json;
mod parquet;
mod tsv;

pub use cell::Cell;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use serde_json::{Map, Value};

/// A row of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Counts from 1: lines of JSON lines, items of a JSON list, rows below the headings of a table.
    pub number: usize,
    pub values: Map<String, Value>,
    /// Addresses of the pictures in the file itself, by column. Names of pictures in files of their own are among the values.
    pub pictures: Vec<(String, Vec<PathBuf>)>,
}

/// Rows that cannot be read: the first of them, how many, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    pub number: usize,
    pub rows: usize,
    pub reason: String,
}

/// What takes the rows one after another.
pub type Each<'a> = &'a mut dyn FnMut(Result<Record, Bad>) -> Result<()>;

/// Columns in which sets keep pictures.
const PICTURES: [&str; 8] =
    ["image", "images", "bytes", "img", "image_bytes", "query_image", "crop_image", "decoded_image"];

/// Most bytes of one row of text: a quotation mark that does not close would otherwise take the rest of the file.
const MOST: u64 = 1 << 30;

/// Hands over every row of a file.
///
/// # Errors
/// The file is not there, cannot be read, or is of no kind that is known; errors of `each`.
pub fn scan(path: &Path, each: Each) -> Result<()> {
    if path.metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
        let from = std::env::current_dir().ok().filter(|_| path.is_relative());
        let from = from.map_or(String::new(), |folder| format!(" in {}", folder.display()));
        bail!("there is no data file {}{from}; is the path right?", path.display());
    }
    match Kind::of(path)? {
        Kind::Json => json::scan(path, each),
        Kind::Tsv => {
            let stamp = Stamp::of(path)?;
            let tsv = tsv::Tsv::scan(path, each)?;
            keep(stamp, Arc::new(Open::Tsv(tsv)));
            Ok(())
        }
        Kind::Parquet => {
            let Open::Parquet(table) = &*open(path)? else { bail!("this is no parquet file: {}", path.display()) };
            table.scan(each)
        }
    }
}

/// How the rows of a file are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Json,
    Tsv,
    Parquet,
}

impl Kind {
    fn of(path: &Path) -> Result<Kind> {
        use std::io::Read;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "json" | "jsonl" | "ndjson" => return Ok(Kind::Json),
            "tsv" => return Ok(Kind::Tsv),
            "parquet" => return Ok(Kind::Parquet),
            _ => {}
        }
        let reading = || format!("reading the data file {}", path.display());
        let mut head = Vec::new();
        std::fs::File::open(path).with_context(reading)?.take(4096).read_to_end(&mut head).with_context(reading)?;
        let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head).trim_ascii_start();
        ensure!(
            head.is_empty() || text.is_empty() || matches!(text[0], b'{' | b'['),
            "reading data: the name ends in {extension:?}{}; expected .jsonl, .json, .tsv or .parquet: {}",
            if head.starts_with(b"PAR1") { " and the file is parquet, rename it" } else { "" },
            path.display()
        );
        Ok(Kind::Json)
    }
}

/// Whether there is something at a picture's address: a file, or the table that should hold it.
pub fn is_there(path: &Path) -> bool {
    path.is_file() || Cell::named(path).is_some_and(|cell| cell.table.is_file())
}

/// The bytes of a picture's file, wherever it lies. A plain file of exactly this name goes first.
///
/// # Errors
/// It is not there; its cell is empty, or not base64.
pub fn picture_bytes(path: &Path) -> Result<Vec<u8>> {
    match Cell::named(path).filter(|_| !path.is_file()) {
        Some(cell) => {
            let reading = || format!("reading a picture from a table: {}", path.display());
            let bytes = match &*open(&cell.table).with_context(reading)? {
                Open::Tsv(table) => table.picture(&cell),
                Open::Parquet(table) => table.picture(&cell),
            };
            decoded(bytes.with_context(reading)?).with_context(reading)
        }
        None => std::fs::read(path).with_context(|| format!("reading a picture: {}", path.display())),
    }
}

/// The picture's own bytes: as they are where they begin as a picture does, else out of base64.
fn decoded(cell: Vec<u8>) -> Result<Vec<u8>> {
    ensure!(!cell.is_empty(), "the cell is empty");
    // PNG and JPEG begin with bytes that no base64 has, WebP with RIFF and its name.
    if matches!(cell[0], 0x89 | 0xff) || (cell.starts_with(b"RIFF") && cell.get(8..12) == Some(b"WEBP")) {
        return Ok(cell);
    }
    let text = match cell.starts_with(b"data:") {
        true => cell.split(|&b| b == b',').nth(1).unwrap_or_default(),
        false => &cell[..],
    };
    let text = match text.iter().any(u8::is_ascii_whitespace) {
        true => text.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect::<Vec<u8>>().into(),
        false => std::borrow::Cow::Borrowed(text),
    };
    // Some writers leave the padding out.
    let engine = base64::engine::GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        base64::engine::GeneralPurposeConfig::new()
            .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
    );
    engine.decode(&*text).with_context(|| {
        let head: String = String::from_utf8_lossy(&text[..text.len().min(24)]).into_owned();
        format!("found {} bytes that begin {head:?}, expected a picture or its base64", text.len())
    })
}

/// A table that was opened: what is known of where its rows lie.
enum Open {
    Tsv(tsv::Tsv),
    Parquet(parquet::Parquet),
}

/// A file as it was when it was opened.
#[derive(Clone, Debug, PartialEq)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(path: &Path) -> Result<Stamp> {
        let found = std::fs::metadata(path).with_context(|| format!("reading the data file {}", path.display()))?;
        Ok(Stamp { path: path.to_owned(), bytes: found.len(), modified: found.modified().ok() })
    }
}

/// Tables stay open: an index costs a pass over the file. Each is small; the pages of parquet are kept elsewhere, and few.
static TABLES: Mutex<Vec<(Stamp, Arc<Open>)>> = Mutex::new(Vec::new());
const MOST_TABLES: usize = 128;

fn open(path: &Path) -> Result<Arc<Open>> {
    let stamp = Stamp::of(path)?;
    let known = |tables: &[(Stamp, Arc<Open>)]| Some(tables.iter().find(|(known, _)| *known == stamp)?.1.clone());
    if let Some(table) = known(&TABLES.lock().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(table);
    }
    // Threads that ask for the first picture of a table at once index it once.
    static OPENING: Mutex<()> = Mutex::new(());
    let _one = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(table) = known(&TABLES.lock().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(table);
    }
    let table = Arc::new(match Kind::of(path)? {
        Kind::Tsv => Open::Tsv(tsv::Tsv::scan(path, &mut |_| Ok(()))?),
        Kind::Parquet => Open::Parquet(parquet::Parquet::open(path)?),
        Kind::Json => bail!("pictures lie in tables of .tsv or .parquet: {}", path.display()),
    });
    keep(stamp, table.clone());
    Ok(table)
}

fn keep(stamp: Stamp, table: Arc<Open>) {
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    tables.retain(|(known, _)| known.path != stamp.path);
    if tables.len() >= MOST_TABLES {
        tables.remove(0);
    }
    tables.push((stamp, table));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_taken_in_the_dress_it_comes_in() {
        let png = b"\x89PNG\r\n\x1a\nrest".to_vec();
        let text = base64::engine::general_purpose::STANDARD.encode(&png);
        assert_eq!(decoded(png.clone()).unwrap(), png);
        assert_eq!(decoded(text.clone().into_bytes()).unwrap(), png);
        assert_eq!(decoded(format!("data:image/png;base64,{text}").into_bytes()).unwrap(), png);
        assert_eq!(decoded(format!("{}\n{}", &text[..8], &text[8..]).into_bytes()).unwrap(), png);
        assert_eq!(decoded(text.trim_end_matches('=').as_bytes().to_vec()).unwrap(), png);
        for bad in ["", "not base64!", "QUJD*"] {
            assert!(decoded(bad.as_bytes().to_vec()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_with_the_name_of_a_cell_is_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("odd.tsv#row=1");
        std::fs::write(&path, "itself").unwrap();
        assert_eq!(picture_bytes(&path).unwrap(), b"itself");
        assert!(is_there(&path) && !is_there(&dir.path().join("odd.tsv#row=2")));
    }

    #[test]
    fn a_file_of_another_kind_is_named_with_what_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.csv");
        std::fs::write(&path, "a,b").unwrap();
        let said = scan(&path, &mut |_| Ok(())).unwrap_err().to_string();
        assert!(said.contains("\"csv\"") && said.contains(".parquet") && said.ends_with("rows.csv"), "{said}");
    }
}
