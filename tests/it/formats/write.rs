//! Small files of the layouts that sets are published in, written here: parquet as Hugging Face nests it, TSV with base64, JSON.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::{Type, TypePtr};

/// A value of a leaf.
#[derive(Clone)]
pub enum Val {
    Null,
    Text(String),
    Bytes(Vec<u8>),
    Int(i64),
    Real(f64),
}

/// How a column is nested.
#[derive(Clone, Copy, PartialEq)]
pub enum Shape {
    Flat,
    Struct,
    List,
    /// A list of structs.
    Structs,
}

/// A column: for each of its leaves, row by row, the values of the row (one, or those of its list).
pub struct Column {
    pub name: &'static str,
    pub shape: Shape,
    pub leaves: Vec<(&'static str, Vec<Vec<Val>>)>,
}

pub fn text(text: &str) -> Val {
    Val::Text(text.to_owned())
}

pub fn flat(name: &'static str, values: Vec<Val>) -> Column {
    Column { name, shape: Shape::Flat, leaves: vec![(name, values.into_iter().map(|v| vec![v]).collect())] }
}

pub fn texts(name: &'static str, values: &[&str]) -> Column {
    flat(name, values.iter().map(|v| text(v)).collect())
}

pub fn ints(name: &'static str, values: &[i64]) -> Column {
    flat(name, values.iter().map(|v| Val::Int(*v)).collect())
}

pub fn lists(name: &'static str, values: Vec<Vec<Val>>) -> Column {
    Column { name, shape: Shape::List, leaves: vec![("element", values)] }
}

/// A picture each row, as `datasets` embeds it.
pub fn pictures(name: &'static str, values: &[Vec<u8>]) -> Column {
    let bytes = values.iter().map(|b| vec![Val::Bytes(b.clone())]).collect();
    let paths = values.iter().enumerate().map(|(k, _)| vec![text(&format!("{k}.png"))]).collect();
    Column { name, shape: Shape::Struct, leaves: vec![("bytes", bytes), ("path", paths)] }
}

/// Several a row.
pub fn picture_lists(name: &'static str, values: &[Vec<Vec<u8>>]) -> Column {
    let bytes = values.iter().map(|row| row.iter().map(|b| Val::Bytes(b.clone())).collect()).collect();
    let paths = values.iter().map(|row| row.iter().map(|_| Val::Null).collect()).collect();
    Column { name, shape: Shape::Structs, leaves: vec![("bytes", bytes), ("path", paths)] }
}

pub fn messages(name: &'static str, rows: &[Vec<(&str, &str)>]) -> Column {
    let of = |pick: fn(&(&str, &str)) -> Val| rows.iter().map(|row| row.iter().map(pick).collect()).collect();
    Column { name, shape: Shape::Structs, leaves: vec![("content", of(|m| text(m.1))), ("role", of(|m| text(m.0)))] }
}

fn group(name: &str, repetition: Repetition, fields: Vec<TypePtr>, list: bool) -> TypePtr {
    let mut builder = Type::group_type_builder(name).with_repetition(repetition).with_fields(fields);
    if list {
        builder = builder.with_logical_type(Some(LogicalType::List)).with_converted_type(ConvertedType::LIST);
    }
    Arc::new(builder.build().unwrap())
}

fn leaf(name: &str, values: &[Vec<Val>]) -> TypePtr {
    let first = values.iter().flatten().find(|v| !matches!(v, Val::Null));
    let (physical, logical) = match first {
        Some(Val::Int(_)) => (Physical::INT64, None),
        Some(Val::Real(_)) => (Physical::DOUBLE, None),
        Some(Val::Bytes(_)) => (Physical::BYTE_ARRAY, None),
        Some(Val::Text(_) | Val::Null) | None => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
    };
    let builder = Type::primitive_type_builder(name, physical).with_repetition(Repetition::OPTIONAL);
    Arc::new(builder.with_logical_type(logical).build().unwrap())
}

fn schema(columns: &[Column]) -> TypePtr {
    let field = |column: &Column| {
        let inner: Vec<TypePtr> = column.leaves.iter().map(|(name, values)| leaf(name, values)).collect();
        let list = |element: Vec<TypePtr>| {
            group(column.name, Repetition::OPTIONAL, vec![group("list", Repetition::REPEATED, element, false)], true)
        };
        match column.shape {
            Shape::Flat => inner[0].clone(),
            Shape::Struct => group(column.name, Repetition::OPTIONAL, inner, false),
            Shape::List => list(inner),
            Shape::Structs => list(vec![group("element", Repetition::OPTIONAL, inner, false)]),
        }
    };
    Arc::new(Type::group_type_builder("schema").with_fields(columns.iter().map(field).collect()).build().unwrap())
}

/// Writes a table with so many rows a group.
pub fn parquet(path: &Path, columns: &[Column], group_rows: usize, compression: Compression) {
    parquet_in_pages(path, columns, group_rows, compression, 1 << 20);
}

/// The same with pages of so many bytes.
pub fn parquet_in_pages(path: &Path, columns: &[Column], group_rows: usize, compression: Compression, page: usize) {
    let rows = columns[0].leaves[0].1.len();
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_data_page_size_limit(page)
        .set_dictionary_enabled(page <= 1 << 20)
        .build();
    let mut writer =
        SerializedFileWriter::new(File::create(path).unwrap(), schema(columns), Arc::new(properties)).unwrap();
    for from in (0..rows).step_by(group_rows) {
        let to = rows.min(from + group_rows);
        let mut out = writer.next_row_group().unwrap();
        for column in columns {
            let most = match column.shape {
                Shape::Flat => 1,
                Shape::Struct => 2,
                Shape::List => 3,
                Shape::Structs => 4,
            };
            for (_, values) in &column.leaves {
                let (mut def, mut rep, mut found) = (Vec::new(), Vec::new(), Vec::new());
                for row in &values[from..to] {
                    if row.is_empty() {
                        def.push(1);
                        rep.push(0);
                    }
                    for (k, value) in row.iter().enumerate() {
                        def.push(if matches!(value, Val::Null) { most - 1 } else { most });
                        rep.push(i16::from(k > 0));
                        found.push(value.clone());
                    }
                }
                let mut column_writer = out.next_column().unwrap().unwrap();
                let rep = (most > 2).then_some(&rep[..]);
                found.retain(|v| !matches!(v, Val::Null));
                match found.first() {
                    Some(Val::Int(_)) => {
                        let ints: Vec<i64> =
                            found.iter().map(|v| if let Val::Int(n) = v { *n } else { panic!() }).collect();
                        column_writer.typed::<Int64Type>().write_batch(&ints, Some(&def), rep).unwrap();
                    }
                    Some(Val::Real(_)) => {
                        let reals: Vec<f64> =
                            found.iter().map(|v| if let Val::Real(x) = v { *x } else { panic!() }).collect();
                        column_writer.typed::<DoubleType>().write_batch(&reals, Some(&def), rep).unwrap();
                    }
                    _ => {
                        let bytes = |v: &Val| match v {
                            Val::Text(text) => ByteArray::from(text.as_str()),
                            Val::Bytes(bytes) => ByteArray::from(bytes.clone()),
                            _ => panic!(),
                        };
                        let bytes: Vec<ByteArray> = found.iter().map(bytes).collect();
                        column_writer.typed::<ByteArrayType>().write_batch(&bytes, Some(&def), rep).unwrap();
                    }
                }
                column_writer.close().unwrap();
            }
        }
        out.close().unwrap();
    }
    writer.close().unwrap();
}

pub fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// A table with a line of headings; cells are quoted as pandas does it.
pub fn tsv(path: &Path, headings: &[&str], rows: &[Vec<String>]) {
    let cell = |text: &str| match text.contains(['\t', '\n', '"']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    };
    let line = |cells: Vec<String>| cells.iter().map(|c| cell(c)).collect::<Vec<_>>().join("\t");
    let mut text = line(headings.iter().map(|h| (*h).to_owned()).collect());
    for row in rows {
        text.push('\n');
        text.push_str(&line(row.clone()));
    }
    std::fs::write(path, text + "\n").unwrap();
}
