//! The folder listing tells the story only as long as imports go one way.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What each module may import of the crate. `commands` and `main` may import everything.
const MAY_IMPORT: [(&str, &[&str]); 17] = [
    ("quant", &[]),
    ("layout", &[]),
    ("device", &[]),
    ("ui", &[]),
    ("files", &["ui"]),
    ("checkpoint", &["quant", "layout", "files"]),
    (
        "pipeline",
        &[
            "layout",
            "device",
            "ui",
            "files",
            "checkpoint",
            "model",
            "sample",
        ],
    ),
    ("model", &["quant", "layout"]),
    ("sample", &["files", "checkpoint", "model"]),
    (
        "calibrate",
        &["layout", "device", "files", "checkpoint", "model", "sample"],
    ),
    ("plot", &["layout"]),
    ("score", &["layout", "model", "calibrate", "plot"]),
    (
        "prune",
        &[
            "layout",
            "device",
            "checkpoint",
            "model",
            "sample",
            "calibrate",
            "score",
        ],
    ),
    (
        "train",
        &[
            "layout",
            "device",
            "files",
            "checkpoint",
            "model",
            "sample",
            "calibrate",
            "score",
            "prune",
            "pipeline",
            "ui",
        ],
    ),
    (
        "verify",
        &[
            "layout",
            "device",
            "ui",
            "files",
            "checkpoint",
            "model",
            "sample",
            "pipeline",
        ],
    ),
    (
        "bench",
        &[
            "layout",
            "device",
            "ui",
            "checkpoint",
            "model",
            "sample",
            "pipeline",
        ],
    ),
    (
        "eval",
        &[
            // how long and how much memory
            "bench",
            "layout",
            // how numbers are written
            "ui",
            "device",
            // where a CLIP model is
            "files",
            "checkpoint",
            "model",
            "sample",
            "calibrate",
            "score",
            "pipeline",
            "plot",
        ],
    ),
];

/// No file is longer: when it needs an "and" in its first line, it is split.
const MOST_LINES: usize = 500;

fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// The crate's modules that a file names, its tests left out.
fn imports(text: &str) -> BTreeSet<String> {
    let code: String = text
        .split("#[cfg(test)]\nmod ")
        .next()
        .unwrap()
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let mut out = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let word = |text: &str| -> String {
            text.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        let Some(list) = rest.strip_prefix('{') else {
            out.insert(word(rest));
            continue;
        };
        // the names at the outer level of `crate::{a, b::{c, d}}`
        let (mut depth, mut name) = (0, String::new());
        for c in list.chars() {
            match c {
                '}' if depth == 0 => break,
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    out.insert(word(name.trim()));
                    name.clear();
                }
                c => name.push(c),
            }
        }
        out.insert(word(name.trim()));
    }
    out.remove("");
    out
}

#[test]
fn modules_import_only_what_comes_before_them() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let modules: BTreeSet<&str> = MAY_IMPORT
        .iter()
        .map(|(name, _)| *name)
        .chain(["commands", "cli"])
        .collect();
    let mut seen = 0;
    for (module, allowed) in MAY_IMPORT {
        let mut files = vec![src.join(format!("{module}.rs"))];
        files.retain(|file| file.exists());
        if src.join(module).is_dir() {
            sources(&src.join(module), &mut files);
        }
        for file in files.iter().filter(|file| !file.ends_with("tests.rs")) {
            seen += 1;
            for import in imports(&fs::read_to_string(file).unwrap()) {
                let fine = import == module
                    || allowed.contains(&import.as_str())
                    || !modules.contains(import.as_str());
                assert!(fine, "{} imports `{import}`", file.display());
            }
        }
    }
    assert!(seen > 80, "only {seen} files were looked at");
}

#[test]
fn files_are_short_enough_to_be_read() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    for file in files {
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= MOST_LINES, "{} has {lines} lines", file.display());
    }
}

#[test]
fn imports_are_found_in_every_form() {
    let text = "use crate::{layout::{A, B}, model};\nlet x = crate::score::y();\n// crate::ui\n#[cfg(test)]\nmod tests { use crate::cli; }";
    let found = imports(text);
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["layout", "model", "score"]
    );
}
