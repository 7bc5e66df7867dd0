//! What people read in a terminal of 80 columns: every `--help` as recorded, and no table wider.

use std::{fs, path::Path};

use crate::common::*;

/// Set, it records the texts again instead of comparing them.
const REWRITE: &str = "FASTFLUX_REWRITE_GOLDEN";
const COLUMNS: usize = 80;

fn help(args: &[&str]) -> String {
    let work = folder();
    let out = command(work.path(), args).env("COLUMNS", "80").output();
    let out = out.unwrap();
    assert!(out.status.success(), "{args:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// The first line that does not fit; a line of usage is never broken.
fn too_wide(text: &str) -> Option<&str> {
    let mut lines = text.lines().filter(|line| !line.starts_with("Usage:"));
    lines.find(|line| line.chars().count() > COLUMNS)
}

#[test]
fn every_help_is_as_recorded() {
    let whole = help(&["--help"]);
    let listed = whole.lines().skip_while(|line| *line != "Commands:");
    let listed = listed.skip(1).take_while(|line| !line.is_empty());
    // descriptions that go on in the next line are further in
    let names = listed.filter_map(|line| line.strip_prefix("  "));
    let names = names.filter_map(|line| line.split(' ').next());
    let names: Vec<&str> = names.filter(|n| !n.is_empty() && *n != "help").collect();
    assert!(names.len() >= 13, "{names:?}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/help");
    let mut different = Vec::new();
    let texts = names.iter().map(|name| (*name, help(&[*name, "--help"])));
    for (name, text) in texts.chain([("fastflux", whole.clone())]) {
        assert_eq!(too_wide(&text), None, "{name}");
        let file = folder.join(format!("{name}.txt"));
        if std::env::var_os(REWRITE).is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&file, &text).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != text {
            different.push(name);
        }
    }
    assert!(
        different.is_empty(),
        "the help of {different:?} is not as recorded; {REWRITE}=1 records it"
    );
}

/// A table with `#` for every number, single spaces and no rules: what stays the same on every machine.
fn without_numbers(text: &str) -> String {
    let word = |word: &str| {
        let mut out = String::new();
        let mut digits = false;
        for c in word.chars() {
            let number = c.is_ascii_digit() || (digits && c == '.');
            if number && !digits {
                out.push('#');
            } else if !number {
                out.push(c);
            }
            digits = number;
        }
        // signs and prefixes of units depend on the number
        match out.trim_start_matches(['+', '-']) {
            "" => "-".to_owned(),
            number if number.starts_with('#') => number.to_owned(),
            _ => out,
        }
    };
    let is_rule = |line: &str| !line.is_empty() && line.chars().all(|c| "- ".contains(c));
    let lines = text.lines().filter(|line| !is_rule(line));
    let line = |line: &str| {
        let words: Vec<String> = line.split_whitespace().map(word).collect();
        let line = words.join(" ");
        // which blocks go, and how long it takes, may differ between machines
        match line.split_once(' ') {
            Some((block @ ("double.#" | "single.#"), _)) => format!("{block} …"),
            _ if line.starts_with("time") || line.starts_with("# about") => "time".into(),
            _ => line,
        }
    };
    lines.map(line).collect::<Vec<_>>().join("\n") + "\n"
}

#[test]
fn tables_are_as_recorded_and_fit_into_a_terminal() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let stats = "--recipe quick.json --stats s.safetensors";
    let commands = [
        ("inspect", "inspect".to_owned()),
        ("doctor", "doctor".to_owned()),
        (
            "calibrate-dry-run",
            "calibrate --recipe quick.json --dry-run".to_owned(),
        ),
        (
            "calibrate",
            "calibrate --recipe quick.json --output s.safetensors".to_owned(),
        ),
        ("score", format!("score {stats} --output scores.json")),
        ("plan", "plan --scores scores.json --ratio 0.2".to_owned()),
        (
            "plan-ratios",
            "plan --scores scores.json --ratio 0.1,0.2,0.3 --output c.json".to_owned(),
        ),
        ("plan-for", "plan --for 24GiB".to_owned()),
        (
            "prune",
            format!("prune {stats} --plan plan.json --output pruned"),
        ),
        ("inspect-pruned", "inspect --model pruned".to_owned()),
        (
            "bench",
            "bench --seconds 0 --size 64 --against pruned --batch 1,2".to_owned(),
        ),
        (
            "eval",
            "eval --model pruned --num-prompts 2 --steps 2".to_owned(),
        ),
        (
            "train-dry-run",
            "train-sandwich --model pruned --dry-run".to_owned(),
        ),
        (
            "train",
            "train-sandwich --model pruned --steps 1 --finetune 0 --num-prompts 8".to_owned(),
        ),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tables");
    let mut different = Vec::new();
    for (name, line) in commands {
        let args: Vec<&str> = line.split(' ').collect();
        let text = ok(w, &args);
        assert_eq!(too_wide(&text), None, "{line}\n{text}");
        // what a machine has is its own
        if ["doctor", "eval", "bench"].contains(&name) {
            assert!(text.lines().count() > 2, "{line}\n{text}");
            continue;
        }
        let (file, text) = (folder.join(format!("{name}.txt")), without_numbers(&text));
        if std::env::var_os(REWRITE).is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&file, &text).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != text {
            different.push(format!("{name}:\n{text}"));
        }
    }
    assert!(
        different.is_empty(),
        "these tables are not as recorded ({REWRITE}=1 records them):\n{}",
        different.join("\n")
    );
}
