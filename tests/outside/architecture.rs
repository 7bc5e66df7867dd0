//! The folder listing tells the story only as long as imports go one way, files are short, and commands only translate.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What each room may import of the crate. `commands` and `main` may import everything; every room may talk through `ui`.
const MAY_IMPORT: [(&str, &[&str]); 18] = [
    ("quant", &[]),
    ("layout", &[]),
    ("device", &[]),
    ("ui", &[]),
    ("files", &[]),
    // `device`: bytes of a file go to a GPU as they lie in it
    ("checkpoint", &["files", "quant", "layout", "device"]),
    ("model", &["quant", "layout"]),
    ("sample", &["files", "checkpoint", "model", "layout"]),
    (
        "pipeline",
        &[
            "sample",
            "model",
            "checkpoint",
            "files",
            "quant",
            "layout",
            "device",
        ],
    ),
    ("fit", &["model", "layout"]),
    (
        "calibrate",
        &[
            "fit",
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "files",
            "layout",
            "device",
        ],
    ),
    // scores are a file, and a chart next to it
    (
        "score",
        &["calibrate", "fit", "model", "checkpoint", "plot", "layout"],
    ),
    (
        "prune",
        &[
            "score",
            "calibrate",
            "fit",
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "layout",
            "device",
        ],
    ),
    (
        "train",
        &[
            "prune",
            "calibrate",
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "files",
            "layout",
            "device",
        ],
    ),
    ("plot", &["layout"]),
    // `files`: `doctor` shows the cache of the hub and the free disk
    (
        "bench",
        &[
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "files",
            "layout",
            "device",
        ],
    ),
    // `eval` times steps as `bench` does, and reads scores and a CLIP model
    (
        "eval",
        &[
            "bench",
            "plot",
            "prune",
            "score",
            "calibrate",
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "files",
            "layout",
            "device",
        ],
    ),
    (
        "verify",
        &[
            "pipeline",
            "sample",
            "model",
            "checkpoint",
            "files",
            "layout",
            "device",
        ],
    ),
];

/// What tests may import in addition: `checkpoint` is tested on whole models, pruned and not.
const TESTS_MAY_IMPORT: [(&str, &[&str]); 1] =
    [("checkpoint", &["model", "pipeline", "fit", "prune"])];

/// No file is longer: when it needs an "and" in its first line, it is split.
const MAX_LINES: usize = 400;
/// A command: options → stage → report → write.
const MAX_LINES_OF_A_COMMAND: usize = 150;

/// Path below `src` without `.rs`, and text, of every source file.
fn sources() -> Vec<(Vec<String>, String)> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") {
                out.push(path);
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&src, &mut files);
    let module = |path: &PathBuf| {
        let path = path.strip_prefix(&src).unwrap().with_extension("");
        let parts = path.components();
        let mut parts: Vec<String> = parts
            .map(|part| part.as_os_str().to_str().unwrap().to_owned())
            .collect();
        parts.pop_if(|last| last == "mod");
        parts
    };
    let read = |path: PathBuf| (module(&path), fs::read_to_string(&path).unwrap());
    files.into_iter().map(read).collect()
}

/// Name and text of every Rust file of the tests.
fn tests() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut files = Vec::new();
    for folder in ["", "outside", "hub"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                files.push((name, fs::read_to_string(path).unwrap()));
            }
        }
    }
    assert!(files.len() > 15, "{files:?}");
    files
}

/// A file's text without comments.
fn code(text: &str) -> String {
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The paths of `a::{b, c::{d, e}}`, flattened.
fn flatten(prefix: &[String], tree: &str, out: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    let (head, list) = match tree.find('{') {
        Some(at) => (&tree[..at], tree[at + 1..].trim_end().strip_suffix('}')),
        None => (tree, None),
    };
    let mut path = prefix.to_vec();
    path.extend(
        head.split("::")
            .map(|part| part.trim().split(' ').next().unwrap_or_default().to_owned())
            .filter(|part| !part.is_empty()),
    );
    let Some(list) = list else {
        out.push(path);
        return;
    };
    let (mut depth, mut start) = (0, 0);
    for (at, c) in list.char_indices().chain([(list.len(), ',')]) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !list[start..at].trim().is_empty() {
                    flatten(&path, &list[start..at], out);
                }
                start = at + 1;
            }
            _ => {}
        }
    }
}

/// All paths that a file names: in `use`, and written out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let first = code[..at].chars().next_back();
        if first.is_none_or(|c| c.is_whitespace() || c == ')') {
            let tree = &code[at + 4..];
            let end = tree.find(';').unwrap_or(tree.len());
            flatten(&[], &tree[..end], &mut out);
        }
    }
    for word in ["crate::", "super::"] {
        for (at, _) in code.match_indices(word) {
            let rest = &code[at..];
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
            flatten(
                &[],
                rest[..end.unwrap_or(rest.len())].trim_end_matches(':'),
                &mut out,
            );
        }
    }
    out
}

/// A path from the crate's root, as the module `of` names it; `None` for a path into another crate.
fn absolute(of: &[String], path: &[String], known: &BTreeSet<Vec<String>>) -> Option<Vec<String>> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    match path.first()?.as_str() {
        "crate" => Some(path[1..].to_vec()),
        "self" => Some([of, &path[1..]].concat()),
        "super" => Some([&of[..of.len().checked_sub(supers)?], &path[supers..]].concat()),
        first => {
            let child = [of, &[first.to_owned()]].concat();
            known.contains(&child).then(|| [of, path].concat())
        }
    }
}

#[test]
fn rooms_import_only_what_lies_below_them() {
    let mut wrong = Vec::new();
    let rooms: BTreeSet<&str> = MAY_IMPORT.iter().map(|(room, _)| *room).collect();
    let mut seen = BTreeSet::new();
    for (module, text) in sources() {
        let room = module[0].as_str();
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == room) else {
            assert!(
                ["cli", "commands", "lib", "main"].contains(&room),
                "`{room}` is not in the table"
            );
            continue;
        };
        seen.insert(room.to_owned());
        let tests = TESTS_MAY_IMPORT.iter().find(|(name, _)| *name == room);
        let tests = tests.map_or(&[][..], |(_, more)| more);
        let at = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
        let at = if module.last().unwrap() == "tests" {
            0
        } else {
            at
        };
        for (part, more) in [(&text[..at], &[][..]), (&text[at..], tests)] {
            for path in paths(&code(part)) {
                let (Some("crate"), Some(to)) = (path.first().map(String::as_str), path.get(1))
                else {
                    continue;
                };
                let to = to.as_str();
                let top = rooms.contains(to) || to == "cli" || to == "commands";
                let fine = to == room || to == "ui" || allowed.contains(&to) || more.contains(&to);
                if top && !fine {
                    wrong.push(format!("{} imports `{to}`", module.join("::")));
                }
            }
        }
    }
    wrong.sort();
    wrong.dedup();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(seen.len(), MAY_IMPORT.len(), "a room of the table is gone");
}

/// A folder's `mod.rs` and the files in it may name each other: it is what they share.
#[test]
fn no_files_import_each_other() {
    let sources = sources();
    let known: BTreeSet<Vec<String>> = sources.iter().map(|(module, _)| module.clone()).collect();
    let mut edges: BTreeMap<&[String], BTreeSet<Vec<String>>> = BTreeMap::new();
    for (module, text) in &sources {
        if ["lib", "main"].contains(&module[0].as_str()) || module.last().unwrap() == "tests" {
            continue;
        }
        let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
        let to = edges.entry(module).or_default();
        for path in paths(&code(text)) {
            let Some(full) = absolute(module, &path, &known) else {
                continue;
            };
            let file = (1..=full.len()).rev().map(|n| full[..n].to_vec());
            let Some(file) = file.into_iter().find(|file| known.contains(file)) else {
                continue;
            };
            // what a folder's own files are named by it is no import
            if file != *module && file[..file.len() - 1] != **module {
                to.insert(file);
            }
        }
    }
    let mut circles = Vec::new();
    for start in edges.keys() {
        // everything that is reached from here
        let mut reached: BTreeSet<&[String]> = BTreeSet::new();
        let mut ahead: Vec<&[String]> = vec![start];
        while let Some(at) = ahead.pop() {
            for to in edges.get(at).into_iter().flatten() {
                if reached.insert(to) {
                    ahead.push(to);
                }
            }
        }
        if reached.contains(start) {
            circles.push(start.join("::"));
        }
    }
    assert_eq!(circles, [] as [&str; 0], "these files import each other");
}

#[test]
fn files_are_short_enough_to_be_read() {
    let mut long = Vec::new();
    for (module, text) in sources() {
        let command = module[0] == "commands" && module.len() > 1 && module[1] != "options";
        let max = if command {
            MAX_LINES_OF_A_COMMAND
        } else {
            MAX_LINES
        };
        // a command's tests are not part of it
        let text = if command {
            text.split("#[cfg(test)]\nmod ").next().unwrap()
        } else {
            &text
        };
        let lines = text.lines().count();
        if lines > max {
            long.push(module.join("/"));
        }
    }
    for (file, text) in tests() {
        if text.lines().count() > MAX_LINES {
            long.push(file);
        }
    }
    assert_eq!(long, [] as [&str; 0], "these files are too long");
}

#[test]
fn imports_are_found_in_every_form() {
    let text = "use crate::{layout::{A, B as C}, model};\nlet x = crate::score::y();\n// crate::ui\npub use super::{a, b::c};\nuse self::d::E;";
    let found: Vec<String> = paths(&code(text)).iter().map(|p| p.join("::")).collect();
    for path in [
        "crate::layout::A",
        "crate::layout::B",
        "crate::model",
        "crate::score::y",
        "super::a",
        "super::b::c",
        "self::d::E",
    ] {
        assert!(found.iter().any(|p| p == path), "{path}: {found:?}");
    }
    assert!(!found.iter().any(|p| p.contains("ui")), "{found:?}");
}
