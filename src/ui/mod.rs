//! The only place that prints or draws: data to stdout, what people are told and progress to stderr.

use std::io::Write;

use anyhow::{Context, Result};

mod reporter;
#[cfg(test)]
mod skip;

pub use reporter::{Level, Reporter};
#[cfg(test)]
pub(crate) use skip::skip;

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
    let written =
        writeln!(out, "{}", text.as_ref().trim_end_matches('\n')).and_then(|()| out.flush());
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

/// `text` with lines broken between words; words that are longer stay whole.
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
        let indent: String = line.chars().take_while(|c| *c == ' ').collect();
        let mut current = String::new();
        for word in line.trim_start().split(' ') {
            let len = current.chars().count() + 1 + word.chars().count();
            if !current.trim_start().is_empty() && len > width {
                lines.push(std::mem::take(&mut current));
            }
            current.push_str(if current.is_empty() { &indent } else { " " });
            current.push_str(word);
        }
        lines.push(current);
    }
    lines.join("\n")
}

/// A text table: a header, rows, columns padded; those in `right` are aligned to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = header.len();
    let width = |c: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(c))
            .map(|cell| cell.chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = (0..columns)
            .map(|c| {
                let cell = cells.get(c).map_or("", String::as_str);
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
            wrap("  one  two\n  three four", Some(10)),
            "  one  two\n  three\n  four"
        );
    }

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(bytes(23.8e9), "23.80 GB");
        assert_eq!(count(512.0), "512");
        assert_eq!(duration(12_240.0), "3.4 h");
        assert_eq!(flops(74.36e12), "74.36 TFLOP");
    }
}
