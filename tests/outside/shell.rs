//! `completions` and `man`.

use std::{fs, process::Command};

use crate::common::*;

#[test]
fn every_shell_has_completions() {
    let work = folder();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = ok(work.path(), &["completions", shell]);
        for word in ["train-sandwich", "max-vram", "quiet"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
    }
}

#[test]
#[cfg(unix)]
fn bash_reads_its_completions() {
    let work = folder();
    let script = ok(work.path(), &["completions", "bash"]);
    fs::write(work.path().join("complete"), script).unwrap();
    let line = "set -e; source ./complete; COMP_WORDS=(fastflux pru); COMP_CWORD=1; \
                _fastflux fastflux pru fastflux; echo \"${COMPREPLY[0]}\"";
    let mut bash = Command::new("bash");
    let out = bash.current_dir(work.path()).args(["-c", line]).output();
    assert_eq!(String::from_utf8(out.unwrap().stdout).unwrap(), "prune\n");
}

#[test]
fn there_is_a_page_for_every_command() {
    let work = folder();
    let main = ok(work.path(), &["man"]);
    assert!(
        main.contains(".TH fastflux 1") && main.contains("train"),
        "{main}"
    );
    let page = ok(work.path(), &["man", "prune"]);
    assert!(page.contains("ratio"), "{page}");
    refused(work.path(), &["man", "nothing"], &["nothing", "hint: "]);
}

#[test]
fn the_version_says_what_was_built() {
    let work = folder();
    let short = ok(work.path(), &["-V"]);
    assert_eq!(
        short.trim(),
        concat!("fastflux ", env!("CARGO_PKG_VERSION"))
    );
    let long = ok(work.path(), &["--version"]);
    assert!(long.starts_with(short.trim()), "{long}");
    assert!(
        long.contains("\nfeatures: ") && long.contains("\nkernels: "),
        "{long}"
    );
}
