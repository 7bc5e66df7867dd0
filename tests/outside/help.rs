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

#[test]
fn tables_fit_into_a_terminal() {
    let work = folder();
    let w = work.path();
    fs::write(w.join("quick.json"), QUICK).unwrap();
    let plan = ["--recipe", "quick.json", "--ratio", "0.2"];
    let bench = ["bench", "--seconds", "0", "--size", "64"];
    let train = ["train-sandwich", "--model", "pruned"];
    // inspect, calibrate, score and plan are still wider
    let commands: [&[&str]; 5] = [
        &[&["prune", "--output", "pruned"], &plan[..]].concat(),
        &[&bench[..], &["--against", "pruned", "--batch", "1,2"]].concat(),
        &[
            "eval",
            "--model",
            "pruned",
            "--num-prompts",
            "4",
            "--steps",
            "2",
        ],
        &[&train[..], &["--dry-run"]].concat(),
        &[
            &train[..],
            &["--steps", "1", "--finetune", "0", "--num-prompts", "8"],
        ]
        .concat(),
    ];
    for args in commands {
        let text = ok(w, args);
        assert!(!text.is_empty(), "{args:?} prints nothing");
        assert_eq!(too_wide(&text), None, "{args:?}\n{text}");
    }
}
