//! Parquet as Hugging Face writes it: words and numbers are read once, columns of pictures only where a picture is asked for.
//!
//! It hides row groups, pages, nesting and compression. A picture's page must be decompressed whole, so the readers of the last few pages
//! are kept where they stand: rows in order cost one decompression a page, rows at random one each, and most pages are held by a known
//! few. What must stay true: listing rows touches no byte of a picture where the file says how many each row has; whatever the file
//! holds, a fault becomes [`Bad`] rows or an error, and a panic of the library becomes an error too.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use parquet::basic::{ConvertedType, LogicalType, Type as Physical};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length};
use parquet::file::serialized_reader::{ReadOptionsBuilder, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::{Bad, Cell, Each, PICTURES, Record};

pub(super) struct Parquet {
    path: PathBuf,
    /// Tells the readers of this table from others'.
    id: u64,
    file: SerializedFileReader<Chunks>,
    pictures: Vec<Column>,
    /// What is read of every row; None where nothing but pictures is in the file.
    words: Option<Type>,
}

/// The file, opened anew for each piece: the library's own reader of a [`File`] shares one position among all threads, and two that read
/// at once get each other's bytes.
struct Chunks {
    path: PathBuf,
    bytes: u64,
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<BufReader<File>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(start))?;
        // Heads of pages are all that is read this way.
        Ok(BufReader::with_capacity(1 << 10, file))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(start))?;
        // A damaged head may claim any length; only what is there is made room for.
        let there = usize::try_from(self.bytes.saturating_sub(start)).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(length.min(there));
        let read = file.take(length as u64).read_to_end(&mut bytes)?;
        if read < length {
            return Err(ParquetError::EOF(format!("{length} bytes were expected at {start}, and there are {read}")));
        }
        Ok(bytes.into())
    }
}

/// A column of pictures.
#[derive(Clone, Debug, PartialEq)]
struct Column {
    name: String,
    /// Which of the file's leaves holds the bytes.
    leaf: usize,
    /// Several pictures a row.
    listed: bool,
    /// The words of a row say how many pictures it has.
    told: bool,
}

/// A reader that stands before row `next` of a row group.
struct Standing {
    table: u64,
    leaf: usize,
    group: usize,
    next: usize,
    reader: ColumnReaderImpl<ByteArrayType>,
}

/// Each holds one decompressed page, which may be as large as a row group: no more than this many at a time.
const MOST_READERS: usize = 4;
static STANDING: Mutex<Vec<Standing>> = Mutex::new(Vec::new());

/// A cell of text with no more than this on average is a path or a name, no picture.
const LEAST_PICTURE: i64 = 512;

impl Parquet {
    pub fn open(path: &Path) -> Result<Parquet> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let opening = |error: anyhow::Error| {
            anyhow!("opening a parquet file: {error:#}; is it whole, and not a pointer to it? {}", path.display())
        };
        let reading = || format!("reading the data file {}", path.display());
        let bytes = std::fs::metadata(path).with_context(reading)?.len();
        let file = Chunks { path: path.to_owned(), bytes };
        let file = guarded(|| {
            let options = ReadOptionsBuilder::new().with_page_index().build();
            Ok(SerializedFileReader::new_with_options(file, options)?)
        })
        .map_err(opening)?;
        let pictures = columns(&file);
        let root = file.metadata().file_metadata().schema_descr().root_schema();
        let named: Vec<&str> = pictures.iter().map(|column| column.name.as_str()).collect();
        let words = words(root, &named).map_err(opening)?;
        Ok(Parquet { path: path.to_owned(), id: NEXT.fetch_add(1, Ordering::Relaxed), file, pictures, words })
    }

    fn rows_of(&self, group: usize) -> usize {
        usize::try_from(self.file.metadata().row_group(group).num_rows()).unwrap_or(0)
    }

    pub fn scan(&self, each: Each) -> Result<()> {
        let mut first = 1;
        for group in 0..self.file.num_row_groups() {
            let rows = self.rows_of(group);
            let (records, fault) = self.group(group, first, rows);
            let read = records.len();
            for record in records {
                each(Ok(record))?;
            }
            if let Some(fault) = fault {
                let reason = match rows - read {
                    0 | 1 => format!("it cannot be read: {fault:#}"),
                    more => format!("rows {} to {} cannot be read: {fault:#}", first + read, first + read + more - 1),
                };
                each(Err(Bad { number: first + read, rows: rows - read, reason }))?;
            }
            first += rows;
        }
        Ok(())
    }

    /// The rows of a group, as far as they can be read, and why no further.
    fn group(&self, group: usize, first: usize, rows: usize) -> (Vec<Record>, Option<anyhow::Error>) {
        let mut records = Vec::new();
        let read = guarded(|| {
            let counts: Vec<Option<Vec<usize>>> = self
                .pictures
                .iter()
                .map(|column| match column.listed && !column.told {
                    true => self.counts(group, column, rows).map(Some),
                    false => Ok(None),
                })
                .collect::<Result<_>>()?;
            let reader = self.file.get_row_group(group)?;
            let mut words = match &self.words {
                Some(words) => Some(reader.get_row_iter(Some(words.clone()))?),
                None => None,
            };
            for row in 0..rows {
                let values = match words.as_mut().map(|words| words.next()) {
                    None => Map::new(),
                    Some(Some(read)) => object(&read?),
                    Some(None) => bail!("the group says that it has {rows} rows, and ends after {row}"),
                };
                records.push(self.record(group, first + row, values, &counts, row));
            }
            Ok(())
        });
        (records, read.err())
    }

    fn record(
        &self,
        group: usize,
        number: usize,
        mut values: Map<String, Value>,
        counts: &[Option<Vec<usize>>],
        row: usize,
    ) -> Record {
        let mut pictures = Vec::new();
        for (column, counts) in self.pictures.iter().zip(counts) {
            // Of a struct of bytes and path, the path is left; of a list of them, a list.
            let said = values.get(&column.name).cloned().unwrap_or_default();
            let path = |value: &Value| value.get("path").cloned().unwrap_or_default();
            let paths = match &said {
                Value::Array(list) => Value::Array(list.iter().map(path).collect()),
                one => path(one),
            };
            let count = match (counts, &said) {
                (Some(counts), _) => counts.get(row).copied().unwrap_or(0),
                (None, Value::Array(list)) => list.len(),
                (None, Value::Null) if column.told => 0,
                (None, _) => 1,
            };
            values.insert(column.name.clone(), paths);
            if !self.without_bytes(group, column) {
                let at = |picture: usize| {
                    Cell { table: self.path.clone(), row: number, column: column.name.clone(), picture }.path()
                };
                pictures.push((column.name.clone(), (1..=count).map(at).collect()));
            }
        }
        Record { number, values, pictures }
    }

    /// Whether the file itself says that no row of the group has bytes here: then the pictures are files of their own.
    fn without_bytes(&self, group: usize, column: &Column) -> bool {
        let chunk = self.file.metadata().row_group(group).column(column.leaf);
        let nulls = chunk.statistics().and_then(|s| s.null_count_opt());
        nulls.is_some_and(|nulls| i64::try_from(nulls) == Ok(chunk.num_values()) && nulls > 0)
    }

    fn reader(&self, group: usize, leaf: usize) -> Result<ColumnReaderImpl<ByteArrayType>> {
        match self.file.get_row_group(group)?.get_column_reader(leaf)? {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(reader),
            _ => bail!("the column holds no bytes"),
        }
    }

    /// How many pictures each row of a group has; reads them all, one row at a time.
    fn counts(&self, group: usize, column: &Column, rows: usize) -> Result<Vec<usize>> {
        let mut reader = self.reader(group, column.leaf)?;
        (0..rows).map(|_| Ok(next(&mut reader, self.most(column))?.len())).collect()
    }

    /// The level at which a value is there.
    fn most(&self, column: &Column) -> i16 {
        self.file.metadata().file_metadata().schema_descr().column(column.leaf).max_def_level()
    }

    pub fn picture(&self, cell: &Cell) -> Result<Vec<u8>> {
        let column = self.pictures.iter().find(|column| column.name == cell.column);
        let column = column.with_context(|| format!("there is no column of pictures {:?}", cell.column))?;
        let (mut group, mut row) = (0, cell.row - 1);
        while group < self.file.num_row_groups() && row >= self.rows_of(group) {
            row -= self.rows_of(group);
            group += 1;
        }
        ensure!(group < self.file.num_row_groups(), "there is no row {}", cell.row);
        guarded(|| {
            let mut standing = match take(self.id, column.leaf, group, row) {
                Some(standing) => standing,
                None => {
                    let reader = self.reader(group, column.leaf)?;
                    Standing { table: self.id, leaf: column.leaf, group, next: 0, reader }
                }
            };
            let over = row - standing.next;
            let skipped = standing.reader.skip_records(over)?;
            ensure!(skipped == over, "the row group ends before its row {}", row + 1);
            let found = next(&mut standing.reader, self.most(column))?;
            standing.next = row + 1;
            let one = found.get(cell.picture - 1);
            let one = one.with_context(|| format!("the row has {} pictures", found.len()))?;
            let bytes = one.as_ref().context("the picture is missing")?.data().to_vec();
            drop(found);
            put_back(standing);
            Ok(bytes)
        })
    }
}

/// The reader that needs to skip least.
fn take(table: u64, leaf: usize, group: usize, row: usize) -> Option<Standing> {
    let mut all = STANDING.lock().unwrap_or_else(PoisonError::into_inner);
    let fits = |s: &Standing| s.table == table && s.leaf == leaf && s.group == group && s.next <= row;
    let best = all.iter().enumerate().filter(|(_, s)| fits(s)).max_by_key(|(_, s)| s.next)?.0;
    Some(all.remove(best))
}

fn put_back(standing: Standing) {
    let mut all = STANDING.lock().unwrap_or_else(PoisonError::into_inner);
    while all.len() >= MOST_READERS {
        all.remove(0);
    }
    all.push(standing);
}

/// The pictures of the next row; None for one that is missing.
fn next(reader: &mut ColumnReaderImpl<ByteArrayType>, most: i16) -> Result<Vec<Option<ByteArray>>> {
    let (mut values, mut def, mut rep) = (Vec::new(), Vec::new(), Vec::new());
    let (rows, ..) = reader.read_records(1, Some(&mut def), Some(&mut rep), &mut values)?;
    ensure!(rows == 1, "the column ends before its last row");
    if most == 0 {
        return Ok(values.into_iter().map(Some).collect());
    }
    let mut values = values.into_iter();
    // An empty list is one level with nothing behind it.
    let one = |level: &i16| if *level == most { values.next() } else { None };
    let found: Vec<Option<ByteArray>> = def.iter().map(one).collect();
    let empty = found.len() == 1 && found[0].is_none() && !rep.is_empty();
    Ok(if empty { Vec::new() } else { found })
}

/// Runs what reads a file from elsewhere: a panic of the library over what it finds there is an error of the file.
fn guarded<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        let said = said.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(anyhow!("the file is damaged ({})", said.unwrap_or_default()))
    })
}

fn is_text(field: &Type) -> bool {
    let info = field.get_basic_info();
    matches!(info.logical_type_ref(), Some(LogicalType::String | LogicalType::Json | LogicalType::Enum))
        || matches!(info.converted_type(), ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM)
}

fn is_bytes(field: &Type) -> bool {
    field.is_primitive() && field.get_physical_type() == Physical::BYTE_ARRAY
}

/// The columns that hold pictures: a struct with `bytes` under any name, and bytes or long base64 under the usual ones.
fn columns(file: &SerializedFileReader<Chunks>) -> Vec<Column> {
    let schema = file.metadata().file_metadata().schema_descr();
    let mut found: Vec<Column> = Vec::new();
    for (leaf, descr) in schema.columns().iter().enumerate() {
        let parts = descr.path().parts();
        let (Some(name), Some(last)) = (parts.first(), parts.last()) else { continue };
        if !is_bytes(descr.self_type()) || found.iter().any(|column| column.name == *name) {
            continue;
        }
        let listed = descr.max_rep_level() > 0;
        let usual = PICTURES.contains(&name.as_str());
        let in_struct = last == "bytes" && parts.len() > 1 && (usual || !is_text(descr.self_type()));
        let bare = usual && (parts.len() == 1 || (listed && parts.len() == 3));
        if descr.max_rep_level() > 1 || !(in_struct || (bare && (!is_text(descr.self_type()) || is_long(file, leaf)))) {
            continue;
        }
        let beside =
            |other: &[String]| other.len() == parts.len() && other[..other.len() - 1] == parts[..parts.len() - 1];
        let told = in_struct && schema.columns().iter().any(|c| beside(c.path().parts()) && c.path().parts() != parts);
        found.push(Column { name: name.clone(), leaf, listed, told });
    }
    found
}

fn is_long(file: &SerializedFileReader<Chunks>, leaf: usize) -> bool {
    let chunks = || file.metadata().row_groups().iter().map(|group| group.column(leaf));
    let (bytes, values) =
        chunks().fold((0, 0), |(b, v), chunk| (b + chunk.uncompressed_size(), v + chunk.num_values()));
    bytes >= LEAST_PICTURE.saturating_mul(values.max(1))
}

/// The file's schema without bytes of any kind and without base64.
fn words(root: &Type, pictures: &[&str]) -> Result<Option<Type>> {
    let mut fields = Vec::new();
    for field in root.get_fields() {
        let base64 = field.is_primitive() && pictures.contains(&field.name());
        fields.extend(if base64 { None } else { worded(field)? });
    }
    if fields.is_empty() {
        return Ok(None);
    }
    Ok(Some(Type::group_type_builder(root.name()).with_fields(fields).build()?))
}

fn worded(field: &TypePtr) -> Result<Option<TypePtr>> {
    if field.is_primitive() {
        return Ok((!is_bytes(field) || is_text(field)).then(|| field.clone()));
    }
    let mut fields = Vec::new();
    for inner in field.get_fields() {
        if inner.name() != "bytes" || !is_bytes(inner) {
            fields.extend(worded(inner)?);
        }
    }
    // A map without its values is none.
    let info = field.get_basic_info();
    let is_map = matches!(info.converted_type(), ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE);
    if fields.is_empty() || (is_map && fields.len() < field.get_fields().len()) {
        return Ok(None);
    }
    let mut group = Type::group_type_builder(field.name())
        .with_fields(fields)
        .with_logical_type(info.logical_type_ref().cloned())
        .with_converted_type(info.converted_type())
        .with_id(info.has_id().then(|| info.id()));
    if info.has_repetition() {
        group = group.with_repetition(info.repetition());
    }
    Ok(Some(Arc::new(group.build()?)))
}

fn object(row: &Row) -> Map<String, Value> {
    row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(b) => (*b).into(),
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(n) => f64::from(*n).into(),
        // By way of its digits: 0.1 stays 0.1.
        Field::Float(n) => n.to_string().parse::<f64>().unwrap_or(f64::from(*n)).into(),
        Field::Double(n) => (*n).into(),
        Field::Str(text) => text.clone().into(),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => Value::Object(object(row)),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let key = |field: &Field| value(field).as_str().map_or_else(|| field.to_string(), str::to_owned);
            Value::Object(map.entries().iter().map(|(k, v)| (key(k), value(v))).collect())
        }
        Field::Decimal(_)
        | Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_) => field.to_string().into(),
    }
}
