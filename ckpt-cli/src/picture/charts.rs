//! Bandwidth over time and histograms.

use std::fmt::Write as _;

use super::{Kind, WIDTH, escape, seconds, svg, time_axis};

const LEFT: f64 = 70.0;
const HEIGHT: f64 = 150.0;
/// Points of a curve.
const BINS: usize = 240;
const BARS: usize = 24;

/// A curve: what was moved from when to when, in seconds and bytes.
#[derive(Clone, Debug)]
pub(crate) struct Rate {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) moved: Vec<(f64, f64, f64)>,
}

/// Bandwidth over time, in GB/s.
pub(crate) fn bandwidth(rates: &[Rate]) -> String {
    let span =
        rates.iter().flat_map(|rate| &rate.moved).map(|(_, end, _)| *end).fold(0.0, f64::max).max(1e-9);
    let curves: Vec<Vec<f64>> = rates.iter().map(|rate| bins(&rate.moved, span)).collect();
    let top = curves.iter().flatten().copied().fold(0.0, f64::max).max(1e-9);
    let mut content = format!("<g>{}</g>", time_axis(LEFT, HEIGHT, span));
    for part in [0.0, 0.5, 1.0] {
        let y = HEIGHT - part * (HEIGHT - 20.0);
        let _ = write!(
            content,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{WIDTH}\" y2=\"{y:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            rate_text(part * top)
        );
    }
    for (place, (rate, curve)) in rates.iter().zip(&curves).enumerate() {
        let mut path = format!("M{LEFT} {HEIGHT}");
        for (bin, value) in curve.iter().enumerate() {
            let y = HEIGHT - value / top * (HEIGHT - 20.0);
            let x = |bin: usize| LEFT + bin as f64 / BINS as f64 * (WIDTH - LEFT);
            let _ = write!(path, " L{:.1} {y:.1} L{:.1} {y:.1}", x(bin), x(bin + 1));
        }
        let _ = write!(path, " L{WIDTH} {HEIGHT} Z");
        let class = rate.kind.class();
        let x = LEFT + 8.0 + place as f64 * 220.0;
        let _ = write!(
            content,
            "<path class=\"area {class}\" d=\"{path}\"/><rect class=\"{class}\" x=\"{x:.1}\" y=\"2\" width=\"10\" \
             height=\"10\" rx=\"2\"/><text x=\"{:.1}\" y=\"11\">{}</text>",
            x + 14.0,
            escape(&rate.name)
        );
    }
    svg(HEIGHT + 20.0, "bandwidth over time", &content)
}

fn rate_text(gb_per_s: f64) -> String {
    match gb_per_s {
        0.0 => "0 GB/s".to_owned(),
        v if v < 0.1 => format!("{:.2} MB/s", v * 1e3),
        v if v < 10.0 => format!("{v:.2} GB/s"),
        v => format!("{v:.0} GB/s"),
    }
}

/// GB/s in each of [`BINS`] parts of the time.
fn bins(moved: &[(f64, f64, f64)], span: f64) -> Vec<f64> {
    let mut bytes = vec![0.0; BINS];
    let width = span / BINS as f64;
    for (start, end, amount) in moved {
        // Something that took no time was still moved.
        let end = end.max(start + width * 1e-3);
        let first = ((start / width) as usize).min(BINS - 1);
        let last = ((end / width) as usize).min(BINS - 1);
        for (bin, sum) in bytes.iter_mut().enumerate().take(last + 1).skip(first) {
            let (from, to) = (bin as f64 * width, (bin + 1) as f64 * width);
            *sum += amount * (to.min(end) - from.max(*start)).max(0.0) / (end - start);
        }
    }
    bytes.into_iter().map(|bytes| bytes / width / 1e9).collect()
}

/// How often which time was taken.
pub(crate) fn histogram(label: &str, times: &[f64]) -> String {
    let low = times.iter().copied().fold(f64::INFINITY, f64::min);
    let high = times.iter().copied().fold(0.0, f64::max);
    let (low, high) = if times.is_empty() { (0.0, 1.0) } else { (low, high.max(low + 1e-9)) };
    let mut counts = [0_usize; BARS];
    for time in times {
        let place = ((time - low) / (high - low) * BARS as f64) as usize;
        counts[place.min(BARS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let percentile =
        |p: usize| sorted.get((sorted.len() * p / 100).min(sorted.len().max(1) - 1)).copied().unwrap_or(0.0);
    let mut content = format!(
        "<text x=\"{LEFT}\" y=\"11\">{}: {} in all, p50 {}, p99 {}, most {}</text>",
        escape(label),
        times.len(),
        seconds(percentile(50)),
        seconds(percentile(99)),
        seconds(if times.is_empty() { 0.0 } else { high })
    );
    let width = (WIDTH - LEFT) / BARS as f64;
    for (place, count) in counts.iter().enumerate() {
        let height = *count as f64 / most as f64 * (HEIGHT - 34.0);
        let x = LEFT + place as f64 * width;
        let (from, to) = (
            low + (high - low) * place as f64 / BARS as f64,
            low + (high - low) * (place + 1) as f64 / BARS as f64,
        );
        let _ = write!(
            content,
            "<rect class=\"reload\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{count} from {} to {}</title></rect>",
            HEIGHT - height,
            width - 2.0,
            seconds(from),
            seconds(to)
        );
    }
    for part in 0..=4_u32 {
        let x = LEFT + f64::from(part) / 4.0 * (WIDTH - LEFT);
        let anchor = ["start", "middle", "middle", "middle", "end"][part as usize];
        let _ = write!(
            content,
            "<text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            HEIGHT + 14.0,
            seconds(low + (high - low) * f64::from(part) / 4.0)
        );
    }
    let _ = write!(
        content,
        "<text class=\"tick\" x=\"{:.1}\" y=\"30\" text-anchor=\"end\">{most}</text>\
         <line class=\"grid\" x1=\"{LEFT}\" y1=\"{HEIGHT}\" x2=\"{WIDTH}\" y2=\"{HEIGHT}\"/>",
        LEFT - 6.0
    );
    svg(HEIGHT + 20.0, label, &content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_moved_is_what_is_drawn() {
        let moved = [(0.0, 0.5, 3e9), (0.25, 1.0, 1e9), (0.7, 0.7, 5e8)];
        let drawn: f64 = bins(&moved, 1.0).iter().map(|rate| rate * 1e9 / BINS as f64).sum();
        assert!((drawn / 4.5e9 - 1.0).abs() < 1e-6, "{drawn}");
    }
}
