//! Results on stdout: a table for people, one JSON object for programs.

use std::{
    fmt::{self, Write as _},
    io::{IsTerminal, Write as _},
};

use anyhow::Context as _;
use serde::Serialize;

/// Where a command's results go. People see lines and tables; with `--json` only the object is printed.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    json: bool,
}

impl Output {
    /// `json`: the global flag.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether `--json` was given.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// One line for people.
    pub fn line(&self, text: impl fmt::Display) {
        if !self.json {
            write_line(&text.to_string());
        }
    }

    /// A table for people.
    pub fn table(&self, table: &Table) {
        if !self.json {
            let width = std::io::stdout().is_terminal().then(terminal_width);
            write_line(table.render(width).trim_end_matches('\n'));
        }
    }

    /// The command's one object for programs; call it last.
    pub fn object(&self, value: &impl Serialize) -> anyhow::Result<()> {
        if self.json {
            write_line(&serde_json::to_string(value).context("write the result as JSON")?);
        }
        Ok(())
    }
}

/// A reader that went away (`ckpt doctor | head`) is not an error of ours, so failures to print are ignored.
fn write_line(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
}

fn terminal_width() -> usize {
    let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    columns.unwrap_or(100).max(40)
}

/// Columns padded to their widest cell; the last one is wrapped to the terminal.
#[derive(Clone, Debug, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles.
    pub fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(|title| (*title).to_owned()).collect(), rows: Vec::new() }
    }

    /// Appends a row.
    pub fn row<C: fmt::Display>(&mut self, cells: impl IntoIterator<Item = C>) {
        self.rows.push(cells.into_iter().map(|cell| cell.to_string()).collect());
    }

    /// Appends rows of a name and its value.
    pub fn pairs<'a>(&mut self, rows: impl IntoIterator<Item = (&'a str, String)>) {
        for (name, value) in rows {
            self.row([name, &value]);
        }
    }

    pub(crate) fn header(&self) -> &[String] {
        &self.header
    }

    pub(crate) fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// The text, each line ended; `width` limits the last column.
    pub fn render(&self, width: Option<usize>) -> String {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let columns = lines().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| lines().filter_map(|l| l.get(column)).map(|c| c.chars().count()).max().unwrap_or(0))
            .collect();
        let indent: usize = widths.iter().take(columns.saturating_sub(1)).map(|w| w + 2).sum();
        let room = width.map_or(usize::MAX, |width| width.saturating_sub(indent).max(20));
        let mut text = String::new();
        for line in lines() {
            let mut start = String::new();
            for (cell, width) in line.iter().zip(&widths).take(columns.saturating_sub(1)) {
                let _ = write!(start, "{cell:<width$}  ");
            }
            let last = line.get(columns.saturating_sub(1)).map_or("", String::as_str);
            for (number, part) in wrap(last, room).into_iter().enumerate() {
                let begin = if number == 0 { start.clone() } else { " ".repeat(indent) };
                text.push_str(format!("{begin}{part}").trim_end());
                text.push('\n');
            }
        }
        text
    }
}

fn wrap(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if used > 0 && used + 1 + len > room {
            lines.push(String::new());
            used = 0;
        }
        let line =
            lines.last_mut().expect("there is always a line: the vector starts with one and only grows");
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        line.push_str(word);
        used += len;
    }
    lines
}

/// `512.0 MiB`, `1.25 GiB`.
pub fn format_bytes(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let value = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", value / KIB),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", value / KIB.powi(2)),
        _ => format!("{:.2} GiB", value / KIB.powi(3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_the_last_one_wraps() {
        let mut table = Table::new(&["name", "why"]);
        table.row(["tcp", "works"]);
        table.row(["mooncake", "one two three four five six"]);
        assert_eq!(
            table.render(Some(25)),
            "name      why\ntcp       works\nmooncake  one two three four\n          five six\n"
        );
        assert_eq!(table.render(None).lines().count(), 3);
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(format_bytes(1023), "1023 B");
        assert_eq!(format_bytes(1536), "1.5 KiB");
        assert_eq!(format_bytes(512 << 20), "512.0 MiB");
        assert_eq!(format_bytes(5 << 30), "5.00 GiB");
    }
}
