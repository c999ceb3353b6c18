//! Evaluations under several protocols, their items, and two evaluations held beside each other: the program from outside.

use std::path::Path;

use serde_json::Value;

use crate::cli::{good, json, refused};
use crate::tiny;

/// Plates, and the bundled model, which names regions and reads what it sees.
fn plates(dir: &Path, rows: usize) {
    let rows = rows.to_string();
    good(dir, &["data", "make", "plates", "--out", "plates", "--train", "1", "--test", &rows, "--size", "672x504"]);
}

fn config(dir: &Path, protocols: &str) {
    let text = format!(
        "[model]\npath='{}'\n[data]\ntest='plates/test.jsonl'\n[rollout]\ntemperature=0.0\nmax_new_tokens=20\nmax_tokens=384\n\
         [tasks.look]\ntemplate='short'\njudge='number'\nmax_pixels=51744\nmin_pixels=28224\n\
         [eval]\nout='eval'\nfree_turns=3\nprotocols={protocols}\n",
        tiny::nano().display()
    );
    std::fs::write(dir.join("eval.toml"), text).unwrap();
}

const ALL: &str = "['no_tool', 'one_turn', 'result_only', 'two_turns', 'free', 'format_only', 'crop_alone', 'random_crop', 'true_crop']";

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(json).collect()
}

#[test]
fn all_protocols_are_one_table_and_every_question_has_its_class() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    plates(dir, 4);
    config(dir, ALL);
    let out = json(&good(dir, &["eval", "eval.toml", "--json"]));
    let rows: Vec<&str> =
        out["table"]["rows"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    let names = ALL.trim_matches(['[', ']']).replace('\'', "");
    assert_eq!(rows.join(", "), names, "a row for each, in the order of the config");
    let columns: Vec<&str> = out["table"]["columns"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    assert_eq!(columns[3..], ["over no_tool", "p"]);
    let cells = |k: usize| out["table"]["rows"][k]["cells"].as_array().unwrap();
    assert!(cells(0)[3]["value"].is_null() && cells(1)[3]["value"] == 0.0 && cells(1)[4]["value"] == 1.0);
    assert!(cells(7)[1]["value"].is_null(), "a control has no boxes of its own");
    assert_eq!(out["rows"]["two_turns"]["by_target_area"][0]["questions"], 4);

    let items = lines(&dir.join("eval/items.jsonl"));
    assert_eq!((items.len(), out["items"].as_str()), (4, Some("eval/items.jsonl")));
    let necessity = &out["by_task"][0];
    assert!(necessity["title"].as_str().unwrap().starts_with("Was the crop needed?"));
    let classes = ["only_with", "only_without", "both", "neither"];
    for row in necessity["rows"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        for (k, class) in classes.iter().enumerate() {
            let written = items.iter().filter(|item| item["crop_necessity"][name] == *class).count();
            assert_eq!(row["cells"][k]["value"], written as f64, "{name} {class}");
        }
    }
    for item in &items {
        assert_eq!(item["right"].as_object().unwrap().len(), 9);
        assert_eq!(item["right"]["no_tool"], item["right"]["one_turn"], "one prompt in this template");
        assert!(item["target_area"].as_f64().is_some_and(|area| area > 0.0 && area < 0.1));
    }
    // What was named in two turns is given in one.
    let (given, named) = (lines(&dir.join("eval/episodes/2.jsonl")), lines(&dir.join("eval/episodes/3.jsonl")));
    let seen = given.iter().zip(&named).filter(|(given, named)| {
        assert_eq!(given["id"], named["id"]);
        let valid = named["turns"].as_array().unwrap().iter().any(|turn| turn["outcome"] == "valid");
        assert_eq!(given["views"].as_array().unwrap().len(), if valid { 2 } else { 1 });
        assert!(!valid || given["views"][1]["region"] == named["views"][1]["region"]);
        valid
    });
    assert!(seen.count() > 0, "the bundled model names regions");

    // The page and the comparison read the folder.
    good(dir, &["report", "eval"]);
    let same = json(&good(dir, &["score", "--compare", "eval", "eval", "--json"]));
    assert_eq!(same["comparisons"].as_array().unwrap().len(), 9);
    assert_eq!(
        (&same["comparisons"][0]["all"]["difference"]["value"], &same["comparisons"][0]["all"]["difference"]["p"]),
        (&0.0.into(), &1.0.into())
    );
    let two = good(dir, &["score", "--compare", "eval/episodes/3.jsonl", "eval/episodes/0.jsonl"]);
    assert!(two.contains("two_turns and no_tool, strict rule") && two.contains("all (4)"), "{two}");
    good(dir, &["eval", "eval.toml", "data.limit=2", "eval.out=less", "eval.protocols=['no_tool']"]);
    refused(dir, &["score", "--compare", "eval", "less"], 1, &["2 only in eval", "data.limit"]);
}

#[test]
fn several_answers_each_see_their_own_region() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    plates(dir, 2);
    config(dir, "['one_turn', 'crop_alone', 'two_turns']");
    let out = json(&good(dir, &["eval", "eval.toml", "--json", "eval.samples=2", "rollout.temperature=1.0"]));
    let notes = out["table"]["notes"].to_string();
    assert!(notes.contains("Avg@2"), "{notes}");
    let (alone, named) = (lines(&dir.join("eval/episodes/1.jsonl")), lines(&dir.join("eval/episodes/2.jsonl")));
    assert_eq!((alone.len(), named.len()), (4, 4));
    for (alone, named) in alone.iter().zip(&named) {
        assert_eq!((&alone["id"], &alone["member"]), (&named["id"], &named["member"]));
        let views = named["views"].as_array().unwrap();
        let valid = named["turns"].as_array().unwrap().iter().any(|turn| turn["outcome"] == "valid");
        let shown = if valid && views.len() > 1 { &views[1]["region"] } else { &views[0]["region"] };
        assert_eq!(&alone["views"][0]["region"], shown);
    }
    for item in lines(&dir.join("eval/items.jsonl")) {
        assert_eq!(item["right"]["two_turns"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn what_protocols_decide_is_not_written_twice() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    tiny::rows(dir, 2);
    std::fs::create_dir(dir.join("plates")).unwrap();
    tiny::rows(&dir.join("plates"), 2);
    std::fs::rename(dir.join("plates/train.jsonl"), dir.join("plates/test.jsonl")).unwrap();
    config(dir, "['no_tool', 'result_only']");
    refused(dir, &["eval", "eval.toml"], 2, &["result_only", "two_turns"]);
    config(dir, "['no_tool', 'no_tool']");
    refused(dir, &["eval", "eval.toml"], 2, &["no_tool twice"]);
    config(dir, "['two_turns']");
    refused(dir, &["eval", "eval.toml", "tasks.look.turns=1"], 2, &["tasks.look", "turns"]);
    refused(dir, &["eval", "eval.toml", "tasks.look.show=nothing"], 2, &["take out the key show"]);
    refused(dir, &["eval", "eval.toml", "eval.protocols=['three_turns']"], 2, &["three_turns", "two_turns"]);
    refused(dir, &["eval", "eval.toml", "eval.protocols=['free']", "eval.free_turns=0"], 2, &["eval.free_turns"]);
    // Rows without a target cannot be shown one.
    let rows = std::fs::read_to_string(dir.join("plates/test.jsonl")).unwrap();
    let bare: Vec<String> = rows
        .lines()
        .map(|line| {
            let mut row = json(line);
            row.as_object_mut().unwrap().remove("targets");
            row.to_string()
        })
        .collect();
    std::fs::write(dir.join("plates/test.jsonl"), bare.join("\n")).unwrap();
    refused(dir, &["eval", "eval.toml", "eval.protocols=['no_tool','true_crop']"], 1, &["true_crop", "no target"]);
    assert!(!dir.join("eval").exists());
    let plan = good(dir, &["eval", "eval.toml", "--dry-run"]);
    assert!(plan.contains("protocols = [\"two_turns\"]"), "{plan}");
}
