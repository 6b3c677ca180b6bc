//! What each rank did when: one lane for each kind of step.

use std::fmt::Write as _;

use super::{WIDTH, escape, seconds, svg, time_axis};

/// A kind of step; it decides the colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Load,
    Pull,
    Exchange,
    Reload,
    Other,
}

impl Kind {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Pull => "pull",
            Self::Exchange => "exchange",
            Self::Reload => "reload",
            Self::Other => "other",
        }
    }

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Load => "H2D",
            Self::Pull => "pull",
            Self::Exchange => "network",
            Self::Reload => "reload",
            Self::Other => "other",
        }
    }
}

/// Something that took time, in seconds from the drawing's left edge.
#[derive(Clone, Debug)]
pub(crate) struct Bar {
    pub(crate) kind: Kind,
    pub(crate) start: f64,
    pub(crate) end: f64,
    /// Shown under the pointer.
    pub(crate) name: String,
}

/// All of one rank.
#[derive(Clone, Debug)]
pub(crate) struct Lane {
    pub(crate) name: String,
    pub(crate) bars: Vec<Bar>,
}

const LEFT: f64 = 120.0;
const ROW: f64 = 13.0;
const GAP: f64 = 9.0;
/// Bars that are nearer than this are drawn as one.
const FINEST: f64 = 0.6;

/// Lanes below each other over one time axis; `marks` are times with a name.
pub(crate) fn lanes(lanes: &[Lane], marks: &[(f64, String)]) -> String {
    let ends = lanes.iter().flat_map(|lane| &lane.bars).map(|bar| bar.end);
    let span = ends.chain(marks.iter().map(|(at, _)| *at)).fold(0.0, f64::max).max(1e-9);
    let scale = (WIDTH - LEFT) / span;
    let (mut content, mut y) = (String::new(), 24.0);
    let mut kinds: Vec<Kind> = lanes.iter().flat_map(|lane| &lane.bars).map(|bar| bar.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for (place, kind) in kinds.iter().enumerate() {
        let x = LEFT + place as f64 * 90.0;
        let _ = write!(
            content,
            "<rect class=\"{}\" x=\"{x:.1}\" y=\"2\" width=\"10\" height=\"10\" rx=\"2\"/><text x=\"{:.1}\" y=\"11\">{}</text>",
            kind.class(),
            x + 14.0,
            kind.label()
        );
    }
    for lane in lanes {
        let own: Vec<Kind> =
            kinds.iter().copied().filter(|kind| lane.bars.iter().any(|bar| bar.kind == *kind)).collect();
        let middle = y + ROW * own.len().max(1) as f64 / 2.0 + 4.0;
        let _ = write!(content, "<text x=\"0\" y=\"{middle:.1}\">{}</text>", escape(&lane.name));
        for kind in own {
            row(&mut content, lane, kind, y, scale);
            y += ROW;
        }
        y += GAP;
    }
    let height = y.max(40.0);
    let mut all = format!("<g>{}</g>", time_axis(LEFT, height, span));
    all.push_str(&content);
    for (at, name) in marks {
        let x = LEFT + at * scale;
        let _ = write!(
            all,
            "<line class=\"grid\" x1=\"{x:.1}\" y1=\"18\" x2=\"{x:.1}\" y2=\"{height:.1}\" stroke-dasharray=\"3 3\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"20\" text-anchor=\"end\">{}</text>",
            x - 3.0,
            escape(name)
        );
    }
    svg(height + 20.0, "what each rank does when", &all)
}

/// The bars of one kind of one lane; close ones become one.
fn row(content: &mut String, lane: &Lane, kind: Kind, y: f64, scale: f64) {
    let mut bars: Vec<&Bar> = lane.bars.iter().filter(|bar| bar.kind == kind).collect();
    bars.sort_by(|a, b| a.start.total_cmp(&b.start));
    let mut bars = bars.into_iter().peekable();
    while let Some(first) = bars.next() {
        let (start, mut end, mut count) = (first.start, first.end, 1);
        // A visible gap stays visible; single bars stay single where there is room for them.
        while let Some(next) = bars.next_if(|next| {
            (next.start - end) * scale < FINEST && (next.end.max(end) - next.start.min(end)) * scale < 4.0
        }) {
            end = end.max(next.end);
            count += 1;
        }
        let name =
            if count == 1 { first.name.clone() } else { format!("{} and {} more", first.name, count - 1) };
        let _ = write!(
            content,
            "<rect class=\"{}\" x=\"{:.2}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{:.1}\" rx=\"1\"><title>{}: {} to {}</title></rect>",
            kind.class(),
            LEFT + start * scale,
            ((end - start) * scale - 0.3).max(0.3),
            ROW - 2.0,
            escape(&name),
            seconds(start),
            seconds(end)
        );
    }
}
