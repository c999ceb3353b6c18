//! Every layout of docs/data.md is read, checked and evaluated as it is published; what is damaged is counted and named, and the
//! rest goes on. The files are written here, small and of exactly these layouts.

mod layouts;
mod write;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use foveate::data::{Format, ReadAs};
use foveate::image;
use foveate::table::Cell;
use parquet::basic::Compression;
use serde_json::Value;

use crate::tiny;
use layouts::{Ask, LAYOUTS, Layout, png};
use write::*;

fn foveate(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foveate"));
    command.current_dir(dir).env("NO_COLOR", "1").args(args).stdin(Stdio::null()).output().unwrap()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn json(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(out)))
}

fn named(layout: &Layout) -> String {
    format!("{}, {}", layout.format.name(), layout.about)
}

/// A folder with the layout's files in a folder of its own, and the path of what is to be read.
fn written(layout: &Layout) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let set = dir.path().join("set");
    std::fs::create_dir(&set).unwrap();
    let path = (layout.write)(&set);
    (dir, path)
}

#[test]
fn every_format_is_in_the_table_and_in_the_docs() {
    let docs = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/data.md")).unwrap();
    for format in Format::ALL {
        assert!(LAYOUTS.iter().any(|layout| layout.format == format), "{}", format.name());
        assert!(docs.contains(&format!("| `{}` |", format.name())), "{} is not in docs/data.md", format.name());
    }
}

#[test]
fn every_layout_is_read() {
    for layout in LAYOUTS {
        let (_dir, path) = written(layout);
        let read = ReadAs::default().good(&path).unwrap();
        let name = named(layout);
        assert_eq!(read.report.problems, [], "{name}");
        assert_eq!(read.report.format, Some(layout.format), "{name}");
        assert_eq!(read.samples.len(), layout.questions, "{name}");
        let looked = std::panic::catch_unwind(|| (layout.look)(&read.samples));
        assert!(looked.is_ok(), "{name}: {:#?}", read.samples);
        // Said by name, it is the same.
        let again = ReadAs { format: Some(layout.format), ..ReadAs::default() }.all(&path).unwrap();
        assert_eq!(again, read.samples, "{name}");
    }
}

#[test]
fn every_layout_is_checked() {
    let models = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(models.path(), 3);
    for layout in LAYOUTS {
        let (dir, path) = written(layout);
        let name = named(layout);
        let task = if matches!(layout.ask, Ask::Boxes) { "multi_image" } else { "crop" };
        // The model's own judge of choices cannot ask for words: a config says which.
        let judge = match layout.ask {
            Ask::Choice => "choice",
            Ask::Number => "number",
            Ask::Text | Ask::Boxes => "text",
        };
        let config =
            if task == "crop" { format!("[task]\njudge = '{judge}'\n") } else { format!("[task]\nkind='{task}'\n") };
        std::fs::write(dir.path().join("task.toml"), config).unwrap();
        let (path, model) = (path.to_str().unwrap(), model.to_str().unwrap());
        let out = foveate(dir.path(), &["data", "check", path, "--model", model, "--config", "task.toml", "--json"]);
        assert!(out.status.success(), "{name}: {}", said(&out));
        let report = json(&out);
        assert_eq!(report["format"], layout.format.name(), "{name}");
        let asked = &report["asked"][0];
        assert_eq!((&asked["rows"], &asked["too_long"]), (&layout.questions.into(), &0.into()), "{name}: {asked}");
        assert!(asked["visual"]["least"].as_u64() > Some(0) && asked["answer"]["least"].as_u64() > Some(0), "{name}");
        let bins = asked["histogram"].as_array().unwrap();
        let counted: u64 = bins.iter().map(|bin| bin["rows"].as_u64().unwrap()).sum();
        assert_eq!(counted, layout.questions as u64, "{name}");
    }
}

fn config(data: &Path, ask: &Ask) -> String {
    let task = match ask {
        Ask::Choice => "template='short'\njudge='choice'",
        Ask::Text => "template='short'\njudge='text'",
        Ask::Number => "template='short'\njudge='number'",
        Ask::Boxes => "kind='multi_image'\ntemplate='mirg_short'",
    };
    format!(
        "[model]\npath='model'\n[data]\ntest='{}'\n[rollout]\nmax_new_tokens=3\nmax_tokens=1024\n\
         [tasks.t]\n{task}\nmax_pixels=6272\nmin_pixels=3136\n[eval]\nout='eval'\n",
        data.display()
    )
}

#[test]
fn every_layout_is_evaluated_and_reported() {
    let models = tempfile::tempdir().unwrap();
    let model = tiny::checkpoint(models.path(), 3);
    for layout in LAYOUTS {
        let (dir, path) = written(layout);
        let (dir, name) = (dir.path(), named(layout));
        std::fs::write(dir.join("eval.toml"), config(&path, &layout.ask)).unwrap();
        let model = format!("model.path={}", model.display());
        let out = foveate(dir, &["eval", "eval.toml", &model, "--json"]);
        assert!(out.status.success(), "{name}: {}", said(&out));
        let played = json(&out);
        assert_eq!(played["rows"]["t"]["questions"], layout.questions, "{name}");
        assert_eq!(played["unasked"], Value::Array(vec![]), "{name}");
        // The page finds the pictures again by what the records say, wherever they lie.
        let out = foveate(dir, &["report", "eval"]);
        assert!(out.status.success(), "{name}: {}", said(&out));
        let page = std::fs::read_to_string(dir.join("eval/report.html")).unwrap();
        assert!(page.contains("<figure class=\"original\"") && page.contains("data:image/jpeg"), "{name}");
        assert!(!page.contains("reading a picture"), "{name}: a picture was not found");
    }
}

const HEADINGS: [&str; 6] = ["index", "image", "question", "A", "B", "answer"];

fn question(index: &str, picture: &str, second: &str) -> Vec<String> {
    [index, picture, "Which?", "left", second, "A"].map(String::from).to_vec()
}

#[test]
fn bad_rows_are_counted_and_named_and_the_rest_is_evaluated() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::checkpoint(dir, 3);
    let good = base64(&png(1));
    let cut = png(1)[..400.min(png(1).len() / 2)].to_vec();
    let rows = [
        question("0", &good, "right"),
        question("1", &good.replace(&good[40..44], "!?*!"), "right"),
        question("2", &good, ""),
        question("0", &good, "right"),
        question("4", &base64(&cut), "right"),
        question("5", &good, "right")[..4].to_vec(),
        question("6", &good, "right"),
    ];
    tsv(&dir.join("set.tsv"), &HEADINGS, &rows);
    let out = foveate(dir, &["data", "check", "set.tsv", "--json"]);
    assert_eq!(out.status.code(), Some(1), "{}", said(&out));
    let report = json(&out);
    let found: Vec<(u64, &str)> = report["problems"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| (p["row"].as_u64().unwrap(), p["key"].as_str().unwrap()))
        .collect();
    assert_eq!(found, [(2, "images[0]"), (3, "options"), (4, "id"), (5, "images[0]"), (6, "")], "{report}");
    assert_eq!((&report["rows"], &report["questions"]), (&7.into(), &2.into()));

    std::fs::write(dir.join("eval.toml"), config(Path::new("set.tsv"), &Ask::Choice)).unwrap();
    let out = foveate(dir, &["eval", "eval.toml", "--json"]);
    assert!(out.status.success(), "{}", said(&out));
    let played = json(&out);
    assert_eq!((&played["rows"]["t"]["questions"], played["unasked"].as_array().unwrap().len()), (&2.into(), 5));
    assert!(played["table"]["notes"][0].as_str().unwrap().starts_with("5 rows were not asked"), "{}", played["table"]);
    let words = said(&out);
    for word in
        ["row 2", "row 3, key \"options\"", "found 1 options", "row 4, key \"id\"", "row 6", "#row=5", "damaged"]
    {
        assert!(words.contains(word), "{word} is not in {words}");
    }
    // Training takes no file with a bad row.
    let rl = "[model]\npath='model'\n[data]\ntrain='set.tsv'\n[task]\n[rollout]\nmax_new_tokens=3\nmax_tokens=1024\n[train]\nout='rl'\nsteps=1\n";
    std::fs::write(dir.join("rl.toml"), rl).unwrap();
    let out = foveate(dir, &["rl", "rl.toml"]);
    assert!(
        out.status.code() == Some(1) && said(&out).contains("row 2") && said(&out).contains("set.tsv"),
        "{}",
        said(&out)
    );
    assert!(!dir.join("rl").exists());
    let out = foveate(dir, &["rl", "rl.toml", "data.leave_out_bad=true", "--dry-run"]);
    assert!(out.status.success() && said(&out).contains("problems, whose rows are left out"), "{}", said(&out));
}

#[test]
fn what_a_row_would_cost_is_shown() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    tiny::checkpoint(dir, 3);
    let path = tiny::rows(dir, 3);
    let check = |rest: &[&str]| {
        let path = path.to_str().unwrap();
        foveate(dir, &[&["data", "check", path, "--model", "model"], rest].concat())
    };
    let out = check(&["--task", "multi_image"]);
    assert!(out.status.success() && said(&out).contains("multi_image: 3 rows"), "{}", said(&out));
    assert!(said(&out).contains("first turn, tokens") && said(&out).contains("0 rows are too long"), "{}", said(&out));
    let out = check(&[]);
    assert!(out.status.success() && said(&out).contains("crop: 3 rows"), "{}", said(&out));
    // A config that asks for one of choices makes nothing of rows without any.
    std::fs::write(dir.join("choice.toml"), "[task]\njudge='choice'\n").unwrap();
    let out = check(&["--config", "choice.toml"]);
    assert!(out.status.code() == Some(1) && said(&out).contains("task: 0 rows"), "{}", said(&out));
    assert!(said(&out).contains("cannot be asked: row row-0: the answer is \"7\""), "{}", said(&out));
    assert!(said(&out).contains("0 problems, and 3 rows that cannot be asked in"), "{}", said(&out));
    let config =
        "[task]\njudge='number'\nmax_pixels=6272\nmin_pixels=3136\n[rollout]\nmax_tokens=60\nmax_new_tokens=50\n";
    std::fs::write(dir.join("c.toml"), config).unwrap();
    let out = check(&["--config", "c.toml"]);
    assert!(
        said(&out).contains("3 rows are too long for 60 tokens with 50 of an answer: row-0, row-1"),
        "{}",
        said(&out)
    );
    let out = check(&["--config", "c.toml", "task.max_pixel=1"]);
    assert!(out.status.code() == Some(2) && said(&out).contains("`max_pixels`"), "{}", said(&out));
    let out = check(&["--task", "crops"]);
    assert!(out.status.code() == Some(2) && said(&out).contains("expected crop or multi_image"), "{}", said(&out));
}

/// Where the questions of a row group lie in the file.
fn words_of(path: &Path, group: usize) -> std::ops::Range<usize> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let file = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
    let group = file.metadata().row_group(group);
    let column = group.columns().iter().find(|c| c.column_path().string() == "question").unwrap();
    let (start, length) = column.byte_range();
    start as usize..(start + length) as usize
}

#[test]
fn a_damaged_part_is_named_and_the_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let part = |k: usize| dir.path().join(format!("test-0000{k}-of-00003.parquet"));
    let noise =
        |k: usize| (0..9000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8 ^ k as u8).collect::<Vec<u8>>();
    for k in 0..3 {
        // Behind each picture a text that takes a page of its own, so that words can be damaged and not headings.
        let words = |row: usize| noise(row + 7 * k).iter().map(|b| char::from(b'a' + b % 26)).collect::<String>();
        let columns = [
            pictures("image", &[png(0), png(1), png(2), png(3)]),
            texts("question", &[&words(0), &words(1), &words(2), &words(3)]),
            texts("answer", &["a", "b", "c", "d"]),
        ];
        parquet(&part(k), &columns, 2, Compression::SNAPPY);
    }
    let whole = std::fs::read(part(1)).unwrap();
    std::fs::write(part(1), &whole[..whole.len() / 2]).unwrap();
    // The words of the last part's second group, far behind the heading of their page.
    let words = words_of(&part(2), 1);
    let mut bytes = std::fs::read(part(2)).unwrap();
    bytes[words.start + words.len() / 4..words.end - words.len() / 4].fill(0xff);
    std::fs::write(part(2), bytes).unwrap();

    let read = ReadAs::default().check(dir.path()).unwrap();
    let problems = &read.report.problems;
    assert_eq!((read.report.rows, read.samples.len()), (8, 6), "{problems:#?}");
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(problems[0].row == 0 && problems[0].reason.contains("is it whole"), "{problems:#?}");
    assert!(problems[1].row == 3 && problems[1].reason.contains("rows 3 to 4 cannot be read"), "{problems:#?}");
    assert_eq!(problems[1].file.as_deref(), Some(part(2).as_path()));
    let alone = ReadAs::default().good(&part(1)).unwrap_err().to_string();
    assert!(alone.ends_with("test-00001-of-00003.parquet") && alone.contains("is it whole"), "{alone}");
}

#[test]
fn no_cut_and_no_flip_of_a_table_is_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.parquet");
    let columns = [
        picture_lists("images", &[vec![png(0), png(1)], vec![], vec![png(2)]]),
        texts("question", &["a", "b", "c"]),
        texts("answer", &["x", "y", "z"]),
    ];
    parquet(&path, &columns, 2, Compression::SNAPPY);
    let whole = std::fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        if let Ok(read) = (ReadAs { format: Some(Format::Vqa), ..ReadAs::default() }).check(&path) {
            assert!(read.samples.len() <= 3);
        }
        let cell = Cell { table: path.clone(), row: 3, column: "images".into(), picture: 1 };
        let _ = image::decode(&cell.path());
    };
    for end in (0..whole.len()).step_by(211) {
        read(&whole[..end]);
    }
    for at in (0..whole.len()).step_by(83) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x5a;
        read(&bytes);
    }
}

#[test]
fn many_threads_read_one_table_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |k: u32| (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761 + k) >> 13) as u8).collect::<Vec<u8>>();
    // What begins as a PNG is handed over as it is.
    let all: Vec<Vec<u8>> = (0..64).map(|k| [b"\x89PNG".to_vec(), bytes(k)].concat()).collect();
    let table = dir.path().join("t.parquet");
    parquet_in_pages(&table, &[pictures("image", &all)], 16, Compression::SNAPPY, 1 << 17);
    let cells = dir.path().join("t.tsv");
    let rows: Vec<Vec<String>> = all.iter().map(|b| vec![base64(b)]).collect();
    tsv(&cells, &["image"], &rows);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (all, table, cells) = (&all, &table, &cells);
            scope.spawn(move || {
                for k in 0..256 {
                    let row = (k * (2 * thread + 1) + 5 * thread) % all.len();
                    let file = if k % 4 == 0 { cells } else { table };
                    let cell = Cell { table: file.clone(), row: row + 1, column: "image".into(), picture: 1 };
                    assert!(foveate::table::picture_bytes(&cell.path()).unwrap() == all[row], "row {row} in {file:?}");
                }
            });
        }
    });
}

#[test]
fn rows_of_our_own_may_name_pictures_in_tables() {
    let dir = tempfile::tempdir().unwrap();
    tsv(
        &dir.path().join("a#b.tsv"),
        &HEADINGS,
        &[question("0", &base64(&png(3)), "x"), question("1", &base64(&png(5)), "x")],
    );
    let row = r#"{"id": "1", "images": ["a#b.tsv#row=2", "a#b.tsv#row=1"], "question": "?", "answer": "x"}"#;
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, row).unwrap();
    let rows = foveate::data::read(&path).unwrap();
    let first = |k: usize| image::decode(&rows[0].images[k]).unwrap().rgb()[0] / 40;
    assert_eq!((first(0), first(1)), (5, 3));
    // Written and read again, they are the same, relative to the folder.
    foveate::data::write(&path, &rows).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains(r##""a#b.tsv#row=2""##));
    assert_eq!(foveate::data::read(&path).unwrap(), rows);
    std::fs::write(&path, row.replace("row=2", "row=3")).unwrap();
    let error = foveate::data::read(&path).unwrap_err().to_string();
    assert!(error.contains("row 1, key \"images[0]\"") && error.contains("no row 3, the file has 2"), "{error}");
}

#[test]
fn a_file_that_no_format_or_two_fit_is_refused_with_what_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let headings = ["index", "image", "question", "A", "B", "answer", "cycle_category", "target_instances"];
    let row = ["0", &base64(&png(1)), "Which?", "left", "right", "A", "0", "[]"].map(String::from).to_vec();
    tsv(&dir.path().join("both.tsv"), &headings, &[row]);
    tsv(&dir.path().join("none.tsv"), &["words"], &[vec!["x".into()], vec!["y".into()]]);
    let out = foveate(dir.path(), &["data", "check", "both.tsv"]);
    assert!(out.status.code() == Some(1) && said(&out).contains("fit hr_bench, tree_bench"), "{}", said(&out));
    let out = foveate(dir.path(), &["data", "check", "both.tsv", "--format", "hr_bench"]);
    assert!(out.status.success(), "{}", said(&out));
    let out = foveate(dir.path(), &["data", "check", "none.tsv"]);
    assert!(said(&out).contains("has the keys \"words\"") && said(&out).contains("mme_realworld"), "{}", said(&out));
    assert!(said(&out).contains("2 rows"), "{}", said(&out));
    let out = foveate(dir.path(), &["data", "check", "none.tsv", "--format", "hrbench"]);
    assert!(out.status.code() == Some(2) && said(&out).contains("hr_bench"), "{}", said(&out));
}

/// Not a test: what pictures in tables cost, printed. `cargo nextest run --run-ignored only -E 'test(cost_of_tables)' --no-capture`
#[test]
#[ignore = "a measurement, for LOG.md"]
fn the_cost_of_tables() {
    let dir = tempfile::tempdir().unwrap();
    let rows = 500;
    // A megabyte that no codec makes smaller, as a photograph is.
    let noise = |k: usize| {
        let mut state = k as u64 + 1;
        let image = image::RgbImage::from_fn(600, 580, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            [(state >> 56) as u8, (state >> 48) as u8, (state >> 40) as u8].into()
        });
        image::encode_png(&image).unwrap()
    };
    let all: Vec<Vec<u8>> = (0..rows).map(noise).collect();
    let order: Vec<usize> = (0..rows).map(|k| (k * 271) % rows).collect();
    let measure = |path: &Path| {
        let start = std::time::Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_foveate"))
            .args(["data", "check", path.to_str().unwrap(), "--format", "vqa"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut peak = 0;
        while child.try_wait().unwrap().is_none() {
            peak = peak.max(foveate::run::peak_of(&child.id().to_string()).unwrap_or(0) >> 20);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert!(child.wait().unwrap().success());
        let size = std::fs::metadata(path).unwrap().len() >> 20;
        eprintln!("{}: {size} MiB", path.file_name().unwrap().to_str().unwrap());
        eprintln!("  data check in {:.1} s, its peak {peak} MiB", start.elapsed().as_secs_f64());
        let at = |row: usize| Cell { table: path.into(), row: row + 1, column: "image".into(), picture: 1 }.path();
        for (what, rows) in [("in order", (0..rows).collect()), ("at random", order.clone())] {
            let start = std::time::Instant::now();
            rows.iter().for_each(|&row| drop(foveate::table::picture_bytes(&at(row)).unwrap()));
            eprintln!("  {what}: {:.2} ms a picture", start.elapsed().as_secs_f64() * 1e3 / rows.len() as f64);
        }
        std::fs::remove_file(path).unwrap();
    };
    let path = dir.path().join("t.tsv");
    let row = |k: usize| [k.to_string(), base64(&all[k]), "?".into(), "x".into()].to_vec();
    tsv(&path, &["index", "image", "question", "answer"], &(0..rows).map(row).collect::<Vec<_>>());
    measure(&path);
    for (name, compression) in [("snappy", Compression::SNAPPY), ("zstd", Compression::ZSTD(Default::default()))] {
        for (pages, page) in [("small pages", 1 << 20), ("a page a group of 100", 1 << 30)] {
            let path = dir.path().join(format!("{name}, {pages}.parquet"));
            let columns =
                [pictures("image", &all), texts("question", &vec!["?"; rows]), texts("answer", &vec!["x"; rows])];
            parquet_in_pages(&path, &columns, 100, compression, page);
            measure(&path);
        }
    }
}

/// What was trained on and what is tested may come in any format; a picture is known again smaller and compressed anew.
#[test]
fn what_two_files_share_is_found_across_formats() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path();
    for (name, width, height) in [("one.png", 320, 240), ("two.png", 200, 330)] {
        tiny::picture(&dir.join(name), width, height);
    }
    let own = [
        r#"{"id": "a", "images": ["one.png"], "question": "Which <b>colour</b> is the car left of the door?", "answer": "red"}"#,
        r#"{"id": "b", "images": ["two.png"], "question": "How many?", "answer": "2"}"#,
    ];
    std::fs::write(dir.join("train.jsonl"), own.join("\n")).unwrap();
    let picture = foveate::image::decode(&dir.join("one.png")).unwrap();
    let size = foveate::geometry::Size::new(150, 110);
    let small = foveate::image::resize(picture.as_image(), size, foveate::image::PassOrder::default()).unwrap();
    let jpeg = foveate::image::encode_jpeg(&small, 50).unwrap();
    let mut asked = question("0", &base64(&jpeg), "right");
    asked[2] = "which <b>colour</b> is the car, left of the door".into();
    let rows = [asked, question("1", &base64(&png(2)), "right")];
    tsv(&dir.join("test.tsv"), &HEADINGS, &rows);
    let out = foveate(dir, &["data", "overlap", "train.jsonl", "test.tsv", "--report", "shared.html", "--json"]);
    assert!(out.status.success(), "{}", said(&out));
    let found = json(&out);
    let pairs = found["pictures"].as_array().unwrap();
    assert_eq!(pairs.len(), 1, "{found}");
    assert_eq!(
        (&pairs[0]["kind"], &pairs[0]["first"], &pairs[0]["second"]),
        (&"near".into(), &"one.png".into(), &"test.tsv#row=1".into())
    );
    assert_eq!(found["rows"], serde_json::json!({"picture": 1, "picture_and_question": 1, "question": 1}));
    let page = std::fs::read_to_string(dir.join("shared.html")).unwrap();
    assert_eq!(page.matches("data:image/jpeg;base64,").count(), 2);
    assert!(page.contains("&lt;b&gt;colour") && !page.contains("<b>colour"), "words of rows are escaped");
    // Nothing of a file that cannot be read is taken for nothing in common.
    let out = foveate(dir, &["data", "overlap", "train.jsonl", "none.jsonl"]);
    assert!(out.status.code() == Some(1) && said(&out).contains("none.jsonl"), "{}", said(&out));
}
