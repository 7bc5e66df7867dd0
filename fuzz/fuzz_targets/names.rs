//! Any text as a hub id, a file in a repository, and as a message for a terminal.
#![no_main]

use fastflux::{files, ui};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some((id, _)) = files::parse_id(text) {
        assert!(!id.contains("..") && id.matches('/').count() == 1);
    }
    if let Some((_, path)) = files::parse_file(text) {
        assert!(!path.split('/').any(|part| part.is_empty() || part.starts_with('.')));
    }
    let shown = ui::printable_name(text, 200);
    assert!(!shown.chars().any(|c| c.is_control() && c != '\t'));
    assert!(shown.chars().count() <= 201);
});
