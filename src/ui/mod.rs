//! The only place that prints or draws: data to stdout, what people are told and progress to stderr.

use std::io::Write;

use anyhow::{Context, Result};

mod names;
mod reporter;
#[cfg(test)]
mod skip;

pub use names::short_names;
pub use reporter::{Level, Reporter};
#[cfg(test)]
pub(crate) use skip::skip;

/// Most characters of one message: names in strangers' files can be megabytes.
const MAX_MESSAGE: usize = 4000;

/// Text that may hold names from strangers' files, fit for a terminal: control characters, and marks that turn the
/// direction of writing, are escaped; line breaks stay.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if (c.is_control() && !matches!(c, '\n' | '\t')) || turns {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    out
}

/// The same on one line, at most `most` characters long.
pub fn printable_name(text: &str, most: usize) -> String {
    let mut out = printable(text).replace('\n', "\\n");
    if let Some((end, _)) = out.char_indices().nth(most) {
        out.truncate(end);
        out.push('…');
    }
    out
}

/// The causes of an error joined by colons, and the `hint:` lines among them.
fn message(error: &anyhow::Error) -> (String, Vec<String>) {
    let (mut causes, mut hints) = (Vec::new(), Vec::new());
    for cause in error.chain() {
        let text = cause.to_string();
        let mut lines = Vec::new();
        for line in text.lines() {
            if line.starts_with("hint:") {
                hints.push(line.to_owned());
            } else if is_frame(line) {
                break; // candle appends its backtrace to the text of its errors
            } else {
                lines.push(line);
            }
        }
        causes.push(lines.join("\n"));
    }
    causes.dedup();
    (causes.join(": "), hints)
}

/// Whether a line is the first of a backtrace: `   0: core::fmt::…`, without symbols `   0: <unknown>`.
fn is_frame(line: &str) -> bool {
    line.trim_start()
        .strip_prefix("0: ")
        .is_some_and(|rest| rest.contains("::") || rest == "<unknown>")
}

/// Writes data to stdout, with a newline at the end. A reader that has gone (`fastflux inspect | head`) is no error.
///
/// # Errors
/// When stdout is full or cannot be written.
pub fn data(text: impl AsRef<str>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let text = printable(text.as_ref().trim_end_matches('\n'));
    let written = writeln!(out, "{text}").and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to stdout"),
    }
}

/// Writes a value to stdout as indented JSON.
///
/// # Errors
/// When stdout is closed or full.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    data(serde_json::to_string_pretty(value)?)
}

/// Columns to break lines on stderr at: those of the terminal, or `COLUMNS` if it is set; `None` for files and pipes.
fn width() -> Option<usize> {
    let set = std::env::var("COLUMNS").ok().and_then(|n| n.parse().ok());
    let columns = || terminal_size::terminal_size_of(std::io::stderr());
    set.or_else(|| columns().map(|(width, _)| usize::from(width.0)))
}

/// How lines begin that people copy into a shell.
const COMMANDS: [&str; 2] = ["fastflux ", "next: fastflux "];

/// `text` with lines broken between words; words that are longer stay whole. Commands are broken as a shell reads them.
pub fn wrap(text: &str, width: Option<usize>) -> String {
    let Some(width) = width.filter(|width| *width > 0) else {
        return text.to_owned();
    };
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.chars().count() <= width {
            lines.push(line.to_owned());
            continue;
        }
        let spaces: String = line.chars().take_while(|c| *c == ' ').collect();
        let is_command = COMMANDS.iter().any(|start| line.starts_with(start));
        let (mut indent, further, end) = if is_command {
            ("", "  ", " \\")
        } else {
            (spaces.as_str(), spaces.as_str(), "")
        };
        // a flag and its value stay together
        let words = line.trim_start().split(' ');
        let words = words.fold(Vec::<String>::new(), |mut words, word| {
            match words
                .last_mut()
                .filter(|last| !end.is_empty() && last.starts_with("--") && !last.contains(' '))
            {
                Some(flag) if !word.starts_with("--") => *flag += &format!(" {word}"),
                _ => words.push(word.to_owned()),
            }
            words
        });
        let mut current = String::new();
        for word in words {
            let len = current.chars().count() + 1 + word.chars().count();
            if !current.trim_start().is_empty() && len + end.len() > width {
                lines.push(std::mem::take(&mut current) + end);
                indent = further;
            }
            current.push_str(if current.is_empty() { indent } else { " " });
            current.push_str(&word);
        }
        lines.push(current);
    }
    lines.join("\n")
}

/// Columns that tables have at most, and characters that names in them keep.
const TABLE: usize = 80;
const MIN_NAME: usize = 12;

/// `text` in at most `most` characters, its middle left out.
fn cut(text: &str, most: usize) -> String {
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= most {
        return text.to_owned();
    }
    let kept = most.saturating_sub(1);
    let tail = letters.len() - kept.div_ceil(2);
    let parts = letters[..kept / 2].iter().chain(&['…']);
    parts.chain(&letters[tail..]).collect()
}

/// A text table: a header, rows, columns padded; those in `right` are aligned to the right. Names that would make it wider
/// than a terminal lose their middles.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = header.len();
    let width = |c: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(c))
            .map(|cell| cell.chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let mut widths: Vec<usize> = (0..columns).map(width).collect();
    let surplus =
        (widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)).saturating_sub(TABLE);
    let names = (0..columns).filter(|c| !right.contains(c));
    if let Some(c) = names.max_by_key(|c| widths[*c]).filter(|_| surplus > 0) {
        widths[c] = widths[c]
            .saturating_sub(surplus)
            .max(MIN_NAME.min(widths[c]));
    }
    let line = |cells: &[String]| {
        let padded: Vec<String> = (0..columns)
            .map(|c| {
                let cell = cut(cells.get(c).map_or("", String::as_str), widths[c]);
                let fill = " ".repeat(widths[c].saturating_sub(cell.chars().count()));
                if right.contains(&c) {
                    format!("{fill}{cell}")
                } else {
                    format!("{cell}{fill}")
                }
            })
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let header: Vec<String> = header.iter().map(|h| (*h).to_owned()).collect();
    let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
    let lines = [line(&header), line(&rule)]
        .into_iter()
        .chain(rows.iter().map(|row| line(row)));
    lines.collect::<Vec<_>>().join("\n")
}

/// A count with a unit prefix: `11.90 B`, `141.6 M`.
pub fn count(n: f64) -> String {
    scaled(n, 1000.0, &["", "K", "M", "B", "T"])
}

/// A number of things: `1 step`, `12 steps`.
pub fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Bytes with a decimal unit, as disks and model pages give them: `23.80 GB`.
pub fn bytes(n: f64) -> String {
    scaled(n, 1000.0, &["B", "KB", "MB", "GB", "TB"])
}

/// Floating-point operations: `74.36 TFLOP`.
pub fn flops(n: f64) -> String {
    scaled(
        n,
        1000.0,
        &["FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"],
    )
}

/// A time: `40 s`, `12 min`, `3.4 h`, `2.1 days`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

fn scaled(mut n: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while n >= step && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    let text = if unit == 0 {
        format!("{n:.0} {}", units[unit])
    } else {
        format!("{n:.2} {}", units[unit])
    };
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_their_columns() {
        let rows = vec![
            vec!["double.00".into(), "1.5".into()],
            vec!["x".into(), "10.25".into()],
        ];
        let text = table(&["block", "score"], &rows, &[1]);
        assert_eq!(
            text,
            "block      score\n---------  -----\ndouble.00    1.5\nx          10.25"
        );
    }

    #[test]
    fn long_names_lose_their_middles_where_a_table_has_no_room() {
        let row = |name: &str| vec![name.to_owned(), "1.00 GB".to_owned()];
        let long = format!("/models/{}/flux1-dev-20.safetensors", "x".repeat(80));
        let text = table(&["model", "bytes"], &[row("bundled"), row(&long)], &[1]);
        assert!(
            text.lines().all(|line| line.chars().count() <= TABLE),
            "{text}"
        );
        let last = text.lines().last().unwrap();
        assert!(
            last.starts_with("/models/xxx")
                && last.contains("…")
                && last.contains("dev-20.safetensors  1.00 GB")
        );
    }

    #[test]
    fn names_of_strangers_do_nothing_to_a_terminal() {
        let evil = "a\u{1b}[2J\u{7}\u{202e}b\n";
        assert_eq!(printable(evil), "a\\u{1b}[2J\\u{7}\\u{202e}b\n");
        assert_eq!(printable_name("a\nhint: b", 100), "a\\nhint: b");
        assert_eq!(printable_name("abcdef", 3), "abc…");
        assert_eq!(printable("größer → 夜"), "größer → 夜");
    }

    #[test]
    fn hints_come_last_and_backtraces_not_at_all() {
        let cause = anyhow::anyhow!("no driver\n   0: candle_core::error::bt\n   1: main");
        let error = cause.context("cannot use the GPU\nhint: use the CPU");
        let expected = (
            "cannot use the GPU: no driver".to_owned(),
            vec!["hint: use the CPU".to_owned()],
        );
        assert_eq!(message(&error), expected);
    }

    #[test]
    fn lines_break_between_words() {
        let text = "one two three\nhint: averylongwordthatstays";
        let wrapped = wrap(text, Some(9));
        assert_eq!(wrapped, "one two\nthree\nhint:\naverylongwordthatstays");
        assert_eq!(wrap(text, None), text);
        assert_eq!(
            wrap("fastflux one --two three --four", Some(18)),
            "fastflux one \\\n  --two three \\\n  --four"
        );
        assert_eq!(
            wrap("  one  two\n  three four", Some(10)),
            "  one  two\n  three\n  four"
        );
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(bytes(23.8e9), "23.80 GB");
        assert_eq!(count(512.0), "512");
        assert_eq!(
            [0, 1, 2].map(|n| counted(n, "step")),
            ["0 steps", "1 step", "2 steps"]
        );
        assert_eq!(duration(12_240.0), "3.4 h");
        assert_eq!(flops(74.36e12), "74.36 TFLOP");
    }
}
