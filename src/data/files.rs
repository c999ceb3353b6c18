//! Which files a path stands for: one file, the parts that a set was cut into, or the folder of V*.
//!
//! What must stay true: parts are read in the order of their names; splits of a set (train, test) are never mixed: a folder that holds
//! several is refused with their names.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// What is to be read for a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// One after another.
    Rows(Vec<PathBuf>),
    /// V*: each JSON is a row, with the picture beside it.
    Beside(Vec<(PathBuf, PathBuf)>),
}

/// The folders of V* that are the benchmark.
const VSTAR: [&str; 2] = ["direct_attributes", "relative_position"];
const ENDS: [&str; 4] = ["parquet", "tsv", "jsonl", "json"];
const PICTURES: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

pub(super) fn of(path: &Path) -> Result<Files> {
    if path.is_dir() {
        return of_folder(path);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if let (Some((start, end)), false) = (name.split_once('*'), path.exists()) {
        let folder = path.parent().unwrap_or(Path::new(""));
        let fits = |file: &PathBuf| {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        };
        let found: Vec<PathBuf> = inside(folder)?.into_iter().filter(fits).collect();
        ensure!(!found.is_empty(), "no file has such a name: {}", path.display());
        return Ok(Files::Rows(found));
    }
    Ok(Files::Rows(vec![path.to_owned()]))
}

fn of_folder(folder: &Path) -> Result<Files> {
    let parts: Vec<PathBuf> = VSTAR.iter().map(|name| folder.join(name)).filter(|part| part.is_dir()).collect();
    let mut rows = Vec::new();
    for part in if parts.is_empty() { vec![folder.to_owned()] } else { parts } {
        for file in inside(&part)?.into_iter().filter(|file| has_end(file, &["json"])) {
            let picture = PICTURES.iter().map(|end| file.with_extension(end)).find(|picture| picture.is_file());
            // Without the benchmark's folders only a JSON beside a picture tells that this is its layout.
            match picture {
                Some(picture) => rows.push((file, picture)),
                None if part != folder => rows.push((file.clone(), file.with_extension("jpg"))),
                None => {}
            }
        }
    }
    if !rows.is_empty() {
        return Ok(Files::Beside(rows));
    }
    // Hugging Face keeps tables in a folder `data`.
    for place in [folder.to_owned(), folder.join("data")] {
        let files: Vec<PathBuf> = match place.is_dir() {
            true => inside(&place)?.into_iter().filter(|file| has_end(file, &ENDS)).collect(),
            false => Vec::new(),
        };
        let tables: Vec<PathBuf> = files.iter().filter(|file| has_end(file, &["parquet"])).cloned().collect();
        let files = if tables.is_empty() { files } else { tables };
        let mut sets: Vec<String> = files.iter().map(|file| set(file)).collect();
        sets.dedup();
        match sets.len() {
            0 => continue,
            1 => return Ok(Files::Rows(files)),
            _ => {
                bail!(
                    "the folder holds {}; name one file, or parts as in NAME-*.parquet: {}",
                    sets.join(", "),
                    place.display()
                )
            }
        }
    }
    bail!("the folder holds no .{}, nor the folders of V*: {}", ENDS.join(", ."), folder.display())
}

/// What a part belongs to: `test` of `test-00002-of-00005.parquet`, otherwise its own name.
fn set(file: &Path) -> String {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let part = stem.split_once("-of-").and_then(|(before, all)| {
        let (name, number) = before.rsplit_once('-')?;
        let all = all.split('-').next().unwrap_or_default();
        (digits(number) && digits(all)).then_some(name)
    });
    part.map_or_else(|| file.file_name().unwrap_or_default().to_string_lossy().into_owned(), str::to_owned)
}

fn has_end(file: &Path, ends: &[&str]) -> bool {
    file.extension().and_then(|e| e.to_str()).is_some_and(|e| ends.contains(&e.to_ascii_lowercase().as_str()))
}

/// The files of a folder, by name.
fn inside(folder: &Path) -> Result<Vec<PathBuf>> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let reading = || format!("looking into the folder {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let hidden = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with('.'));
        if path.is_file() && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_put_together_and_splits_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let make = |name: &str| std::fs::write(data.join(name), "").unwrap();
        for name in ["test-00001-of-00002.parquet", "test-00000-of-00002-0a1b.parquet", "README.md", ".hidden.json"] {
            make(name);
        }
        let names = |path: &Path| match of(path).unwrap() {
            Files::Rows(files) => {
                files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(names(dir.path()), ["test-00000-of-00002-0a1b.parquet", "test-00001-of-00002.parquet"]);
        make("train-00000-of-00001.parquet");
        let said = of(dir.path()).unwrap_err().to_string();
        assert!(said.contains("test, train") && said.ends_with("data"), "{said}");
        assert_eq!(names(&data.join("test-*.parquet")).len(), 2);
        assert!(of(&data.join("no-*.parquet")).is_err());
        let empty = tempfile::tempdir().unwrap();
        assert!(of(empty.path()).unwrap_err().to_string().contains("no .parquet"));
    }

    #[test]
    fn a_json_beside_each_picture_is_vstar() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("direct_attributes");
        std::fs::create_dir(&part).unwrap();
        for name in ["b.json", "b.jpg", "a.json", "a.png", "c.json"] {
            std::fs::write(part.join(name), "").unwrap();
        }
        std::fs::write(dir.path().join("test_questions.jsonl"), "").unwrap();
        let Files::Beside(rows) = of(dir.path()).unwrap() else { panic!() };
        let pictures: Vec<_> = rows.iter().map(|(_, p)| p.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(pictures, ["a.png", "b.jpg", "c.jpg"], "a lost picture is told of, not left out");
    }
}
