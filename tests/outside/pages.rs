//! The pages that people read: short lines, a README that people finish, links that lead somewhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

const MAX_README_LINES: usize = 120;
/// In characters; tables and code have longer lines.
const MAX_LINE: usize = 160;
const FOLDERS: [&str; 8] = [
    ".",
    ".github",
    "benches",
    "configs",
    "configs/tiny",
    "scripts",
    "scripts/interop",
    "src/model/ops",
];

fn pages() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = FOLDERS.iter().flat_map(|folder| {
        let entries = fs::read_dir(root.join(folder)).unwrap();
        entries.map(|entry| entry.unwrap().path())
    });
    files
        .filter(|file| file.extension().is_some_and(|e| e == "md"))
        .map(|file| {
            let text = fs::read_to_string(&file).unwrap();
            (file, text)
        })
        .collect()
}

#[test]
fn readme_is_short() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let lines = readme.unwrap().lines().count();
    assert!(lines <= MAX_README_LINES, "README.md has {lines} lines");
}

#[test]
fn lines_of_pages_are_short() {
    for (file, text) in pages() {
        let mut is_code = false;
        for (number, line) in (1..).zip(text.lines()) {
            is_code ^= line.starts_with("```");
            let length = line.chars().count();
            assert!(
                is_code || line.starts_with('|') || length <= MAX_LINE,
                "{}:{number} has {length} characters",
                file.display()
            );
        }
    }
}

#[test]
fn links_of_pages_lead_somewhere() {
    let mut followed = 0;
    for (file, text) in pages() {
        let folder = file.parent().unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split(')').next().unwrap();
            let (path, heading) = target.split_once('#').unwrap_or((target, ""));
            if path.contains("://") {
                continue;
            }
            let linked = if path.is_empty() {
                file.clone()
            } else {
                folder.join(path)
            };
            assert!(linked.exists(), "{}: {target}", file.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(linked).unwrap();
                let headings = text.lines().filter(|line| line.starts_with('#'));
                assert!(
                    headings.map(anchor).any(|anchor| anchor == heading),
                    "{}: {target}",
                    file.display()
                );
            }
            followed += 1;
        }
    }
    assert!(followed > 10, "only {followed} links were found");
}

/// The address of a heading on its page: lower case, hyphens for blanks, no other signs.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
