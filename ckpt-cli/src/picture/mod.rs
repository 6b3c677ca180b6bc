//! Reports as one HTML file: tables and SVG drawings, nothing loaded from elsewhere, readable in light and dark.

mod charts;
mod lanes;
mod style;
pub(crate) mod topology;

use std::{fmt::Write as _, path::Path};

use ckpt_core::{Error, ErrorKind, Key};

pub(crate) use self::{
    charts::{Rate, bandwidth, histogram},
    lanes::{Bar, Kind, Lane, lanes},
};
use crate::output::Table;

/// Width of every drawing in its own units; the browser scales it.
const WIDTH: f64 = 1000.0;

/// A report that grows section by section.
#[derive(Debug)]
pub(crate) struct Page {
    title: String,
    body: String,
}

impl Page {
    pub(crate) fn new(title: &str) -> Self {
        Self { title: title.to_owned(), body: String::new() }
    }

    pub(crate) fn heading(&mut self, text: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(text));
    }

    pub(crate) fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
    }

    /// A drawing of this module.
    pub(crate) fn drawing(&mut self, svg: &str) {
        let _ = writeln!(self.body, "<figure>{svg}</figure>");
    }

    pub(crate) fn table(&mut self, table: &Table) {
        let row = |cells: &[String], tag: &str| -> String {
            cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
        };
        let _ = writeln!(
            self.body,
            "<div class=\"scroll\"><table><thead><tr>{}</tr></thead><tbody>",
            row(table.header(), "th")
        );
        for cells in table.rows() {
            let _ = writeln!(self.body, "<tr>{}</tr>", row(cells, "td"));
        }
        self.body.push_str("</tbody></table></div>\n");
    }

    /// The whole file.
    pub(crate) fn render(&self) -> String {
        let title = escape(&self.title);
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <meta name=\"color-scheme\" content=\"light dark\"><title>{title}</title>\n<style>{}</style></head>\n\
             <body><main><h1>{title}</h1>\n{}<footer>ckpt {}</footer></main></body></html>\n",
            style::SHEET,
            self.body,
            env!("CARGO_PKG_VERSION"),
        )
    }

    pub(crate) fn write(&self, file: &Path) -> anyhow::Result<()> {
        Ok(std::fs::write(file, self.render()).map_err(|error| {
            Error::new(
                ErrorKind::ConfigInvalid,
                "write the report",
                "the file cannot be written; choose another --html",
            )
            .with(Key::Path, file.display())
            .caused_by(error)
        })?)
    }
}

/// Text inside HTML and SVG.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// An SVG element of the usual width.
fn svg(height: f64, label: &str, content: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>{content}</svg>",
        escape(label)
    )
}

/// A round number of seconds between two ticks, so that there are 4 to 10 of them.
fn tick(span: f64) -> f64 {
    let mut step = 10_f64.powf((span / 5.0).log10().floor());
    if !step.is_finite() || step <= 0.0 {
        return 1.0;
    }
    while span / step > 10.0 {
        step *= if span / step > 25.0 { 5.0 } else { 2.0 };
    }
    step
}

/// `1.5 s`, `20 ms`, `300 us`.
pub(crate) fn seconds(value: f64) -> String {
    let digits = |value: f64| {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match value {
        0.0 => "0".to_owned(),
        v if v < 1e-3 => format!("{} us", digits(v * 1e6)),
        v if v < 1.0 => format!("{} ms", digits(v * 1e3)),
        v => format!("{} s", digits(v)),
    }
}

/// A time axis under a drawing of `height`, from `left` to the right edge.
fn time_axis(left: f64, height: f64, span: f64) -> String {
    let mut text = String::new();
    let step = tick(span);
    let mut at = 0.0;
    while at <= span * 1.0001 {
        let x = left + at / span.max(1e-12) * (WIDTH - left);
        let anchor = if at + step > span {
            "end"
        } else if at == 0.0 {
            "start"
        } else {
            "middle"
        };
        let _ = write!(
            text,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{height:.1}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            height + 14.0,
            seconds(at)
        );
        at += step;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_closed_and_loads_nothing() {
        let mut page = Page::new("a < b & \"c\"");
        page.heading("one");
        let mut table = Table::new(&["name", "value"]);
        table.row(["<script>", "1"]);
        page.table(&table);
        let bar = Bar { kind: Kind::Load, start: 0.0, end: 0.5, name: "bucket 1".into() };
        page.drawing(&lanes(&[Lane { name: "rank 0".into(), bars: vec![bar] }], &[]));
        page.drawing(&histogram("times", &[0.1, 0.2, 0.2, 0.9]));
        page.drawing(&bandwidth(&[Rate {
            name: "in".into(),
            kind: Kind::Exchange,
            moved: vec![(0.0, 1.0, 1e9)],
        }]));
        let text = page.render();
        assert!(text.contains("a &lt; b &amp; &quot;c&quot;") && !text.contains("<script>"));
        for reference in ["http:", "https:", "src=", "href=", "url(", "@import"] {
            assert!(!text.contains(reference), "{reference}");
        }
        for tag in ["svg", "figure", "table", "main", "html", "g"] {
            let opened =
                text.matches(&format!("<{tag}>")).count() + text.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, text.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn ticks_are_few_and_round() {
        for span in [1e-6, 0.003, 0.31, 1.0, 17.0, 999.0] {
            let count = span / tick(span);
            assert!((2.0..=10.0).contains(&count), "{span}: {count}");
        }
        assert_eq!(seconds(0.25), "250 ms");
        assert_eq!(seconds(0.0), "0");
        assert_eq!(seconds(2.5), "2.5 s");
    }

    #[test]
    fn empty_drawings_are_drawings() {
        for drawing in [lanes(&[], &[]), histogram("none", &[]), bandwidth(&[])] {
            assert!(drawing.starts_with("<svg") && !drawing.contains("NaN") && !drawing.contains("inf"));
        }
    }
}
