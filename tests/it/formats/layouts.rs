//! One small file of each layout, with what must come out of it. The table of docs/data.md is this one.

use std::path::{Path, PathBuf};

use foveate::data::{Format, Published, Sample};
use foveate::geometry::BBox;
use parquet::basic::{Compression, ZstdLevel};
use serde_json::json;

use super::write::*;
use crate::tiny;

/// How the rows are asked in an evaluation.
pub enum Ask {
    Choice,
    Text,
    Number,
    Boxes,
}

pub struct Layout {
    pub format: Format,
    /// Tells two layouts of one format apart.
    pub about: &'static str,
    pub ask: Ask,
    pub questions: usize,
    /// Writes the files into a folder of their own and says what to read.
    pub write: fn(&Path) -> PathBuf,
    pub look: fn(&[Sample]),
}

/// A picture of 60 x 40 that is no other number's.
pub fn png(number: u8) -> Vec<u8> {
    let image = foveate::image::RgbImage::from_fn(60, 40, |x, y| [number * 40, (x * 4) as u8, (y * 6) as u8].into());
    foveate::image::encode_png(&image).unwrap()
}

fn files(dir: &Path, names: &[&str]) {
    for (k, name) in names.iter().enumerate() {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, png(k as u8)).unwrap();
    }
}

fn json_file(dir: &Path, name: &str, value: serde_json::Value) -> PathBuf {
    std::fs::write(dir.join(name), value.to_string()).unwrap();
    dir.join(name)
}

fn lines(dir: &Path, name: &str, rows: &[serde_json::Value]) -> PathBuf {
    let text: Vec<String> = rows.iter().map(ToString::to_string).collect();
    std::fs::write(dir.join(name), text.join("\n")).unwrap();
    dir.join(name)
}

fn published(row: &Sample) -> Published {
    Published::of_row(row).unwrap()
}

/// The first pixel of a row's picture says which of [`png`] it is.
fn shown(row: &Sample) -> u8 {
    foveate::image::decode(&row.images[0]).unwrap().rgb()[0] / 40
}

const FIVE: [&str; 5] = ["(A) 2", "(B) 3", "(C) 4", "(D) 5", "(E) The image does not feature the content."];

fn mme_item(id: &str, image: &str) -> serde_json::Value {
    json!({"Question_id": id, "Image": image, "Text": "How many cars are there?", "Question Type": "Multiple Choice",
        "Answer choices": FIVE, "Ground truth": "C", "Category": "vehicle/count", "Subtask": "Monitoring", "Task": "Perception"})
}

fn mme_look(rows: &[Sample]) {
    let row = &rows[1];
    assert_eq!((row.answer.as_str(), row.task.as_deref()), ("C", Some("Perception/Monitoring")));
    assert_eq!((row.choices[2].as_str(), row.choices[4].as_str()), ("4", "The image does not feature the content."));
    let published = published(row);
    assert_eq!((published.options[0].as_str(), published.subcategory.as_deref()), ("(A) 2", Some("vehicle/count")));
    assert_eq!((published.answer, published.order), (json!("C"), vec![]));
    assert_eq!((shown(&rows[0]), shown(&rows[1])), (0, 1));
}

fn hr_rows() -> Vec<Vec<String>> {
    let row = |k: u8, answer: &str, options: [&str; 4], cycle: &str| {
        let words = [k.to_string(), "What \"colour\" is it?".into(), answer.into()];
        let rest = ["single".to_owned(), cycle.to_owned(), base64(&png(k))];
        [&words[..], &options.map(String::from)[..], &rest[..]].concat()
    };
    vec![row(0, "A", ["red", "blue", "green", "grey"], "0"), row(1, "B", ["grey", "red", "blue", "green"], "1")]
}

const HR: [&str; 10] = ["index", "question", "answer", "A", "B", "C", "D", "category", "cycle_category", "image"];

fn hr_look(rows: &[Sample]) {
    assert_eq!((rows[1].id.as_str(), rows[1].answer.as_str()), ("hr_bench-1", "B"));
    assert_eq!(rows[1].choices, ["grey", "red", "blue", "green"]);
    let published = published(&rows[1]);
    assert_eq!((published.cycle.as_deref(), published.category.as_deref()), (Some("1"), Some("single")));
    assert_eq!((shown(&rows[0]), shown(&rows[1])), (0, 1));
}

fn one_two() -> Vec<Vec<u8>> {
    vec![png(0), png(1)]
}

pub const LAYOUTS: &[Layout] = &[
    Layout {
        format: Format::Own,
        about: "JSON lines",
        ask: Ask::Number,
        questions: 2,
        write: |dir| tiny::rows(dir, 2),
        look: |rows| assert_eq!(rows[1].id, "row-1"),
    },
    Layout {
        format: Format::Vstar,
        about: "test_questions.jsonl",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            files(dir, &["direct_attributes/sa_1.jpg", "relative_position/sa_2.jpg"]);
            let beside = json!({"target_object": ["cup"], "bbox": [[5, 6, 20, 10]], "question": "?", "options": []});
            json_file(dir, "direct_attributes/sa_1.json", beside);
            let row = |id: u8, image: &str, category: &str| {
                json!({"question_id": id, "image": image, "category": category, "label": "B",
                    "text": "What is the colour of the cup?\n(A) red\n(B) blue\n(C) green\n(D) grey\nAnswer with the option's letter from the given choices directly."})
            };
            lines(
                dir,
                "test_questions.jsonl",
                &[
                    row(0, "direct_attributes/sa_1.jpg", "direct_attributes"),
                    row(1, "relative_position/sa_2.jpg", "relative_position"),
                ],
            )
        },
        look: |rows| {
            assert_eq!(rows[0].question, "What is the colour of the cup?");
            assert_eq!((rows[0].choices.join("|").as_str(), rows[0].answer.as_str()), ("red|blue|green|grey", "B"));
            assert_eq!(rows[1].task.as_deref(), Some("relative_position"));
            assert_eq!(rows[0].targets[0].bbox, BBox::new(5.0, 6.0, 25.0, 16.0));
            let published = published(&rows[0]);
            assert!(published.text.unwrap().ends_with("directly.") && published.options[0] == "(A) red");
        },
    },
    Layout {
        format: Format::Vstar,
        about: "lmms-lab's parquet",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            let question =
                "Which? \n(A) left\n(B) right\nAnswer with the option's letter from the given choices directly.";
            let columns = [
                pictures("image", &one_two()),
                texts("text", &[question, question]),
                texts("category", &["direct_attributes", "relative_position"]),
                texts("label", &["A", "B"]),
                texts("question_id", &["0", "1"]),
            ];
            parquet(&dir.join("test.parquet"), &columns, 1, Compression::SNAPPY);
            dir.join("test.parquet")
        },
        look: |rows| assert_eq!((rows[1].answer.as_str(), shown(&rows[1])), ("B", 1)),
    },
    Layout {
        format: Format::VstarFolder,
        about: "a JSON beside each picture",
        ask: Ask::Choice,
        questions: 3,
        write: |dir| {
            files(dir, &["direct_attributes/sa_1.jpg", "direct_attributes/sa_3.jpg", "relative_position/sa_2.jpg"]);
            let beside = json!({"target_object": ["cup"], "bbox": [[5, 6, 20, 10]], "question": "Which colour?",
                "options": ["The cup is red.", "The cup is blue.", "The cup is green.", "The cup is grey."]});
            for name in ["direct_attributes/sa_1.json", "direct_attributes/sa_3.json", "relative_position/sa_2.json"] {
                json_file(dir, name, beside.clone());
            }
            dir.to_owned()
        },
        look: |rows| {
            for row in rows {
                let right = row.answer.as_bytes()[0] - b'A';
                let published = published(row);
                assert_eq!(row.choices[usize::from(right)], "The cup is red.", "the first is right");
                assert_eq!((published.order[usize::from(right)], published.answer), (0, json!("A")));
                assert_eq!((published.boxes, published.sides), (vec![[5.0, 6.0, 20.0, 10.0]], true));
                assert_eq!(row.targets[0].label.as_deref(), Some("cup"));
            }
            assert!(rows.iter().any(|row| row.answer != "A"), "they were shuffled");
            assert_eq!(rows[2].id, "vstar_folder-relative_position/sa_2");
        },
    },
    Layout {
        format: Format::MmeRealworld,
        about: "JSON",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            files(dir, &["monitoring/a.jpg", "monitoring/b.jpg"]);
            json_file(
                dir,
                "MME_RealWorld.json",
                json!([mme_item("m/1", "monitoring/a.jpg"), mme_item("m/2", "monitoring/b.jpg")]),
            )
        },
        look: mme_look,
    },
    Layout {
        format: Format::MmeRealworldTable,
        about: "lmms-eval's parquet of base64, in parts",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            std::fs::create_dir(dir.join("data")).unwrap();
            for part in 0..2 {
                let columns = [
                    texts("bytes", &[&base64(&noisy(part as u8))]),
                    ints("index", &[part]),
                    texts("question", &["How many cars are there?"]),
                    lists("multi-choice options", vec![FIVE.iter().map(|o| text(o)).collect()]),
                    texts("answer", &["C"]),
                    texts("category", &["Perception/Monitoring"]),
                    texts("l2-category", &["vehicle/count"]),
                ];
                let name = format!("data/train-0000{part}-of-00002.parquet");
                parquet(&dir.join(name), &columns, 9, Compression::ZSTD(ZstdLevel::default()));
            }
            dir.to_owned()
        },
        look: mme_look,
    },
    Layout {
        format: Format::HrBench,
        about: "TSV",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            tsv(&dir.join("hr_bench_4k.tsv"), &HR, &hr_rows());
            dir.join("hr_bench_4k.tsv")
        },
        look: hr_look,
    },
    Layout {
        format: Format::HrBench,
        about: "parquet of base64",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            let rows = hr_rows();
            let column = |k: usize, name: &'static str| match name {
                "index" => ints(name, &[0, 1]),
                "image" => texts(name, &[&base64(&noisy(0)), &base64(&noisy(1))]),
                _ => texts(name, &[&rows[0][k], &rows[1][k]]),
            };
            let columns: Vec<Column> = HR.iter().enumerate().map(|(k, name)| column(k, name)).collect();
            parquet(&dir.join("hr_bench_4k.parquet"), &columns, 9, Compression::SNAPPY);
            dir.join("hr_bench_4k.parquet")
        },
        look: hr_look,
    },
    Layout {
        format: Format::TreeBench,
        about: "TSV",
        ask: Ask::Choice,
        questions: 1,
        write: |dir| {
            let headings = ["index", "image", "question", "A", "B", "C", "D", "answer", "category", "target_instances"];
            let row = [
                "0",
                &base64(&png(0)),
                "Which is nearer?",
                "cup",
                "hat",
                "",
                "",
                "B",
                "Reasoning/Ordering",
                "[[1, 2, 30, 20], [5, 5, 9, 9]]",
            ];
            tsv(&dir.join("TreeBench.tsv"), &headings, &[row.map(String::from).to_vec()]);
            dir.join("TreeBench.tsv")
        },
        look: |rows| {
            assert_eq!(
                (rows[0].choices.join("|").as_str(), rows[0].task.as_deref()),
                ("cup|hat", Some("Reasoning/Ordering"))
            );
            assert_eq!((rows[0].targets.len(), rows[0].targets[0].bbox), (2, BBox::new(1.0, 2.0, 30.0, 20.0)));
            assert_eq!(published(&rows[0]).boxes[1], [5.0, 5.0, 9.0, 9.0]);
        },
    },
    Layout {
        format: Format::TreeBench,
        about: "TSV with the options in one text, or in the question",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            let headings =
                ["index", "image", "question", "multi-choice options", "answer", "category", "target_instances"];
            let row = |index: &str, question: &str, options: &str, category: &str| {
                [index, &base64(&png(0)), question, options, "B", category, "[[1, 2, 30, 20]]"]
                    .map(String::from)
                    .to_vec()
            };
            let rows = [
                row("0", "Which is nearer?", "A. cup\nB. hat", "Reasoning/Ordering"),
                row("1", "What is written?\nA. cup\nB. hat", "", "Perception/OCR"),
            ];
            tsv(&dir.join("TreeBench.tsv"), &headings, &rows);
            dir.join("TreeBench.tsv")
        },
        look: |rows| {
            for (row, question) in rows.iter().zip(["Which is nearer?", "What is written?"]) {
                assert_eq!((row.choices.join("|").as_str(), row.answer.as_str()), ("cup|hat", "B"));
                assert_eq!((row.question.as_str(), row.targets.len()), (question, 1));
                assert_eq!(published(row).options, ["A. cup", "B. hat"]);
            }
        },
    },
    Layout {
        format: Format::OptionsTable,
        about: "TSV with shared pictures",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            let headings = ["index", "image", "hint", "question", "A", "B", "answer"];
            let row = |index: &str, image: &str, hint: &str| {
                [index, image, hint, "Is it?", "yes", "no", "A"].map(String::from).to_vec()
            };
            tsv(&dir.join("mcq.tsv"), &headings, &[row("7", &base64(&png(2)), ""), row("8", "7", "Look.")]);
            dir.join("mcq.tsv")
        },
        look: |rows| {
            assert_eq!((shown(&rows[1]), rows[1].question.as_str()), (2, "Look.\nIs it?"));
            assert_eq!(rows[0].images, rows[1].images);
        },
    },
    Layout {
        format: Format::VisualProbe,
        about: "JSON",
        ask: Ask::Text,
        questions: 1,
        write: |dir| {
            files(dir, &["images/1.jpg"]);
            json_file(
                dir,
                "val.json",
                json!([{"images": ["VisualProbe_Easy/images/1.jpg"], "problem": "<image>\nWhat is written there?", "solution": "EXIT"}]),
            )
        },
        look: |rows| {
            assert_eq!((rows[0].question.as_str(), rows[0].answer.as_str()), ("What is written there?", "EXIT"));
        },
    },
    Layout {
        format: Format::ZoomBench,
        about: "parquet",
        ask: Ask::Text,
        questions: 2,
        write: |dir| {
            let columns = [
                texts("id", &["z1", "z2"]),
                texts("query", &["What is on it?\nA. a cup\nB. a hat", "How many are there?"]),
                texts("response", &["B", "12"]),
                pictures("image", &one_two()),
                pictures("crop_image", &[png(3), png(4)]),
                texts("question_type", &["mcq", "open"]),
            ];
            parquet(&dir.join("test.parquet"), &columns, 1, Compression::UNCOMPRESSED);
            dir.join("test.parquet")
        },
        look: |rows| {
            assert_eq!((rows[0].choices.join("|").as_str(), rows[0].answer.as_str()), ("a cup|a hat", "B"));
            assert!(rows[1].choices.is_empty() && rows[1].answer == "12");
            assert_eq!((shown(&rows[0]), shown(&rows[1])), (0, 1), "never the crop");
        },
    },
    Layout {
        format: Format::Pope,
        about: "JSON lines",
        ask: Ask::Text,
        questions: 2,
        write: |dir| {
            files(dir, &["COCO_val2014_000000310196.jpg"]);
            let row = |id: u8, label: &str| json!({"question_id": id, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a cup in the image?", "label": label});
            lines(dir, "coco_pope_random.json", &[row(1, "yes"), row(2, "no")])
        },
        look: |rows| assert_eq!((rows[0].answer.as_str(), rows[1].id.as_str()), ("yes", "pope-2")),
    },
    Layout {
        format: Format::Pope,
        about: "lmms-lab's parquet",
        ask: Ask::Text,
        questions: 2,
        write: |dir| {
            let columns = [
                texts("id", &["0", "1"]),
                texts("question_id", &["1", "1"]),
                texts("question", &["Is there a cup?", "Is there a hat?"]),
                texts("answer", &["Yes", "no"]),
                texts("image_source", &["COCO_val2014_000000310196", "COCO_val2014_000000310196"]),
                pictures("image", &one_two()),
                texts("category", &["adversarial", "popular"]),
            ];
            parquet(&dir.join("test.parquet"), &columns, 9, Compression::SNAPPY);
            dir.join("test.parquet")
        },
        look: |rows| {
            assert_eq!((rows[0].answer.as_str(), rows[1].task.as_deref()), ("yes", Some("popular")));
            assert_eq!(published(&rows[0]).other["image_source"], "COCO_val2014_000000310196");
        },
    },
    Layout {
        format: Format::Counting,
        about: "lmms-eval's parquet (pixmo_count)",
        ask: Ask::Number,
        questions: 2,
        write: |dir| {
            let columns = [
                pictures("image", &one_two()),
                texts("question", &["<image>How many people are there?", "How many cups are there?"]),
                texts("answer", &["4", "12"]),
            ];
            parquet(&dir.join("test.parquet"), &columns, 9, Compression::SNAPPY);
            dir.join("test.parquet")
        },
        look: |rows| {
            assert_eq!((rows[0].question.as_str(), rows[1].answer.as_str()), ("How many people are there?", "12"))
        },
    },
    Layout {
        format: Format::Fsc147,
        about: "lmms-eval's parquet",
        ask: Ask::Number,
        questions: 2,
        write: |dir| {
            let columns = [
                pictures("image", &one_two()),
                texts("pos_caption", &["the sea shells.", "Grapes"]),
                ints("pos_count", &[20, 103]),
            ];
            parquet(&dir.join("test.parquet"), &columns, 9, Compression::SNAPPY);
            dir.join("test.parquet")
        },
        look: |rows| {
            assert_eq!(
                (rows[0].question.as_str(), rows[1].answer.as_str()),
                ("How many sea shells are there in the image?", "103")
            )
        },
    },
    Layout {
        format: Format::Vqa,
        about: "parquet",
        ask: Ask::Text,
        questions: 1,
        write: |dir| {
            let columns =
                [pictures("image", &[png(1)]), texts("question", &["What is it?"]), texts("answer", &["a cup"])];
            parquet(&dir.join("test.parquet"), &columns, 9, Compression::GZIP(Default::default()));
            dir.join("test.parquet")
        },
        look: |rows| assert_eq!((rows[0].answer.as_str(), shown(&rows[0])), ("a cup", 1)),
    },
    Layout {
        format: Format::Refcoco,
        about: "lmms-lab's parquet",
        ask: Ask::Boxes,
        questions: 3,
        write: |dir| {
            let columns = [
                texts("question_id", &["7", "8"]),
                pictures("image", &one_two()),
                texts("question", &["Describe it.", "Describe it."]),
                lists("answer", vec![vec![text("left man"), text("man in blue")], vec![text("cup")]]),
                lists("segmentation", vec![vec![Val::Real(1.0)], vec![]]),
                lists(
                    "bbox",
                    [[1.0, 2.0, 20.0, 10.0], [3.5, 4.0, 10.0, 10.0]].map(|b| b.map(Val::Real).to_vec()).to_vec(),
                ),
                texts("file_name", &["COCO_train2014_000000581857_16.jpg", "COCO_train2014_000000581857_3.jpg"]),
            ];
            parquet(&dir.join("val.parquet"), &columns, 9, Compression::SNAPPY);
            dir.join("val.parquet")
        },
        look: |rows| {
            assert_eq!(rows[1].question, "Locate this in the picture: man in blue");
            assert_eq!(rows[1].targets[0].bbox, BBox::new(1.0, 2.0, 21.0, 12.0));
            assert_eq!((rows[2].id.as_str(), shown(&rows[2])), ("refcoco-2-1", 1));
            assert_eq!(published(&rows[2]).boxes, [[3.5, 4.0, 10.0, 10.0]]);
        },
    },
    Layout {
        format: Format::VlmR1,
        about: "JSON",
        ask: Ask::Boxes,
        questions: 1,
        write: |dir| {
            files(dir, &["train2014/COCO_train2014_000000581857.jpg"]);
            let row = json!({"dataset": "refcoco", "image": "train2014/COCO_train2014_000000581857.jpg", "solution": [1, 2, 30, 20],
                "problem": "<image>Please provide the bounding box coordinate of the region this sentence describes: a cat"});
            json_file(dir, "refcoco_val.json", json!([row]))
        },
        look: |rows| {
            assert_eq!(
                (rows[0].targets[0].label.as_deref(), rows[0].targets[0].bbox),
                (Some("a cat"), BBox::new(1.0, 2.0, 30.0, 20.0))
            )
        },
    },
    Layout {
        format: Format::Coco,
        about: "JSON",
        ask: Ask::Boxes,
        questions: 2,
        write: |dir| {
            files(dir, &["000000000001.jpg"]);
            let box_of = |id: u8, category: u8, bbox: [f64; 4], crowd: u8| json!({"id": id, "image_id": 1, "category_id": category, "bbox": bbox, "iscrowd": crowd, "segmentation": []});
            json_file(
                dir,
                "instances.json",
                json!({
                "info": {}, "images": [{"id": 1, "file_name": "000000000001.jpg", "width": 60, "height": 40}],
                "annotations": [box_of(1, 3, [1.0, 1.0, 10.0, 10.0], 0), box_of(2, 3, [20.0, 1.0, 40.5, 10.0], 0), box_of(3, 5, [1.0, 1.0, 9.0, 9.0], 0), box_of(4, 5, [1.0, 1.0, 50.0, 30.0], 1)],
                "categories": [{"id": 3, "name": "cup"}, {"id": 5, "name": "traffic light"}]}),
            )
        },
        look: |rows| {
            assert_eq!((rows[0].question.as_str(), rows[0].targets.len()), ("Locate every cup in the picture", 2));
            assert_eq!(
                rows[0].targets[1].bbox,
                BBox::new(20.0, 1.0, 60.0, 11.0),
                "what rounding left outside is cut off"
            );
            assert_eq!((rows[1].id.as_str(), rows[1].targets.len()), ("coco-1-traffic_light", 1));
        },
    },
    Layout {
        format: Format::Verl,
        about: "parquet, MGPO's columns",
        ask: Ask::Choice,
        questions: 2,
        write: |dir| {
            let struct_of = |name, leaves| Column { name, shape: Shape::Struct, leaves };
            let both = |value: &str| vec![vec![text(value)], vec![text(value)]];
            let columns = [
                texts("data_source", &["Perception/Monitoring", "Perception/Monitoring"]),
                messages("prompt", &vec![vec![("system", "Answer in a box."), ("user", "<image>\nHow many cars?")]; 2]),
                picture_lists("images", &[vec![png(0)], vec![png(1)]]),
                texts("question", &["How many cars?", "How many cars?"]),
                lists("choices", vec![FIVE.iter().map(|o| text(o)).collect(); 2]),
                struct_of("reward_model", vec![("ground_truth", both("D")), ("style", both("rule"))]),
                struct_of("extra_info", vec![("index", vec![vec![Val::Int(4)], vec![Val::Int(5)]])]),
            ];
            parquet(&dir.join("train.parquet"), &columns, 1, Compression::SNAPPY);
            dir.join("train.parquet")
        },
        look: |rows| {
            assert_eq!(
                (rows[1].question.as_str(), rows[1].answer.as_str(), rows[1].choices.len()),
                ("How many cars?", "D", 5)
            );
            assert_eq!((shown(&rows[1]), rows[1].task.as_deref()), (1, Some("Perception/Monitoring")));
            assert_eq!(published(&rows[1]).id.as_deref(), Some("5"));
        },
    },
    Layout {
        format: Format::Trl,
        about: "JSON lines",
        ask: Ask::Text,
        questions: 2,
        write: |dir| {
            files(dir, &["a.jpg", "b.jpg"]);
            let chat =
                json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]);
            lines(
                dir,
                "train.jsonl",
                &[
                    json!({"prompt": chat, "images": ["a.jpg"], "solution": "a cup"}),
                    json!({"prompt": "What is there?", "image": "b.jpg", "answer": "a hat"}),
                ],
            )
        },
        look: |rows| {
            assert_eq!((rows[0].question.as_str(), rows[0].answer.as_str()), ("What is it?", "a cup"));
            assert_eq!((rows[1].question.as_str(), rows[1].answer.as_str()), ("What is there?", "a hat"));
        },
    },
    Layout {
        format: Format::Sharegpt,
        about: "LLaVA's JSON",
        ask: Ask::Text,
        questions: 2,
        write: |dir| {
            files(dir, &["coco/a.jpg", "coco/b.jpg"]);
            let said = |from: &str, value: &str| json!({"from": from, "value": value});
            json_file(
                dir,
                "train.json",
                json!([
                    {"id": "1", "image": "coco/a.jpg", "conversations": [said("human", "<image>\nWhat is it?"), said("gpt", "a cup"), said("human", "And beside it?"), said("gpt", "a hat")]},
                    {"id": "1", "images": ["coco/b.jpg"], "messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "the left one"}]},
                ]),
            )
        },
        look: |rows| {
            assert_eq!((rows[0].question.as_str(), rows[0].answer.as_str()), ("What is it?", "a cup"));
            assert_eq!((&rows[0].extra["turns"], rows[1].answer.as_str()), (&json!(2), "the left one"));
        },
    },
];

/// As [`png`], and large enough that its base64 is taken for a picture where only its length can tell.
fn noisy(number: u8) -> Vec<u8> {
    let noise = |x: u32, y: u32| (x * 7919 + y * 104_729 + x * y * 31) as u8;
    let image = foveate::image::RgbImage::from_fn(60, 40, |x, y| [number * 40, noise(x, y), noise(y, x + 3)].into());
    foveate::image::encode_png(&image).unwrap()
}
