//! Results as files: CSV and HTML.

use std::path::{Path, PathBuf};

use ckpt_core::{Error, ErrorKind, Key};
use clap::Args;

use crate::{machine::Machine, output::Table, picture::Page};

/// Where a result goes besides stdout
#[derive(Args, Clone, Debug, Default)]
pub(super) struct FileArgs {
    /// Write the table to FILE as CSV, with the machine in every row
    #[arg(long, value_name = "FILE", help_heading = crate::GLOBAL)]
    pub(super) csv: Option<PathBuf>,
    /// Write a report to FILE: one page with tables and drawings, which loads nothing
    #[arg(long, value_name = "FILE", help_heading = crate::GLOBAL)]
    pub(super) html: Option<PathBuf>,
}

impl FileArgs {
    /// Writes what was asked for; `draw` adds drawings to the report.
    pub(super) fn write(
        &self,
        title: &str,
        machine: &Machine,
        table: &Table,
        draw: impl FnOnce(&mut Page),
    ) -> anyhow::Result<()> {
        if let Some(file) = &self.csv {
            write_csv(file, machine, table)?;
        }
        if let Some(file) = &self.html {
            let mut page = Page::new(title);
            page.text(&machine.line());
            page.table(table);
            draw(&mut page);
            page.heading("Machine");
            let mut about = Table::new(&["what", "value"]);
            let libraries =
                machine.libraries.iter().map(|one| ("found", format!("{}: {}", one.name, one.detail)));
            about.pairs(machine.columns().into_iter().chain(libraries));
            page.table(&about);
            page.write(file)?;
        }
        Ok(())
    }
}

fn write_csv(file: &Path, machine: &Machine, table: &Table) -> anyhow::Result<()> {
    let columns = machine.columns();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.map(quote).collect();
        text.push_str(&cells.join(","));
        text.push('\n');
    };
    line(&mut table.header().iter().map(String::as_str).chain(columns.iter().map(|(name, _)| *name)));
    for row in table.rows() {
        line(&mut row.iter().map(String::as_str).chain(columns.iter().map(|(_, value)| value.as_str())));
    }
    Ok(std::fs::write(file, text).map_err(|error| {
        Error::new(
            ErrorKind::ConfigInvalid,
            "write the results",
            "the file cannot be written; choose another --csv",
        )
        .with(Key::Path, file.display())
        .caused_by(error)
    })?)
}

fn quote(cell: &str) -> String {
    match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_csv_file_names_the_machine_in_every_row() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("r.csv");
        let mut table = Table::new(&["size", "what"]);
        table.row(["1", "a, \"b\""]);
        let machine = Machine { host: "here".into(), ..Machine::default() };
        FileArgs { csv: Some(file.clone()), html: None }.write("t", &machine, &table, |_| {}).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        assert_eq!(text, "size,what,host,cpu,driver,hca,version,commit\n1,\"a, \"\"b\"\"\",here,,,,,\n");
    }
}
