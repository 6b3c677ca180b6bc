//! Nodes with their devices and NICs, and what flows over their links.

use std::fmt::Write as _;

use super::{WIDTH, svg};
use crate::output::format_bytes;

/// What one link carries, and the part of the time that it is busy.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flow {
    pub(crate) bytes: u64,
    pub(crate) busy: f64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Device {
    pub(crate) number: u32,
    pub(crate) h2d: Flow,
    pub(crate) into: Flow,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Node {
    pub(crate) devices: Vec<Device>,
    pub(crate) out: Vec<Flow>,
    pub(crate) into: Vec<Flow>,
}

/// More nodes are told, not drawn.
const NODES: usize = 4;
const NODE_HEIGHT: f64 = 118.0;

fn sum(flows: &[Flow]) -> (u64, f64) {
    (flows.iter().map(|f| f.bytes).sum(), flows.iter().map(|f| f.busy).fold(0.0, f64::max))
}

/// Width of a line by how busy its link is.
fn width(busy: f64) -> f64 {
    1.0 + 6.0 * busy.clamp(0.0, 1.0)
}

/// One row a node: host memory, devices with their load from it, the link between them, and the network on the right.
pub(crate) fn draw(nodes: &[Node]) -> String {
    let mut content = String::new();
    for (row, node) in nodes.iter().take(NODES).enumerate() {
        let y = row as f64 * (NODE_HEIGHT + 14.0) + 8.0;
        let _ = write!(
            content,
            "<rect class=\"box\" x=\"0\" y=\"{y:.1}\" width=\"800\" height=\"{NODE_HEIGHT}\" rx=\"6\"/>\
             <text class=\"tick\" x=\"8\" y=\"{:.1}\">node {row}, host memory</text>",
            y + 15.0
        );
        let step = 780.0 / node.devices.len().max(1) as f64;
        for (place, device) in node.devices.iter().enumerate() {
            let x = 10.0 + place as f64 * step;
            let middle = x + step / 2.0 - 4.0;
            let _ = write!(
                content,
                "<line class=\"flow load\" x1=\"{middle:.1}\" y1=\"{:.1}\" x2=\"{middle:.1}\" y2=\"{:.1}\" stroke-width=\"{:.1}\"/>\
                 <rect class=\"box\" x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"34\" rx=\"4\"><title>H2D {} ({:.0}% busy), from others {} ({:.0}% busy)</title></rect>\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                y + 20.0,
                y + 50.0,
                width(device.h2d.busy) * f64::from(u8::from(device.h2d.bytes > 0)),
                y + 50.0,
                (step - 8.0).max(4.0),
                format_bytes(device.h2d.bytes),
                device.h2d.busy * 100.0,
                format_bytes(device.into.bytes),
                device.into.busy * 100.0,
                y + 71.0,
                device.number
            );
            if device.into.bytes > 0 {
                let _ = write!(
                    content,
                    "<line class=\"flow\" x1=\"{middle:.1}\" y1=\"{:.1}\" x2=\"{middle:.1}\" y2=\"{:.1}\" stroke-width=\"{:.1}\"/>",
                    y + 84.0,
                    y + 98.0,
                    width(device.into.busy)
                );
            }
        }
        let most = node.devices.iter().map(|d| d.h2d.bytes).max().unwrap_or(0);
        let into = node.devices.iter().map(|d| d.into.bytes).max().unwrap_or(0);
        let _ = write!(
            content,
            "<line class=\"flow\" x1=\"10\" y1=\"{0:.1}\" x2=\"790\" y2=\"{0:.1}\" stroke-width=\"2\"/>\
             <text class=\"tick\" x=\"10\" y=\"{1:.1}\">at most {2} from the host and {3} from other devices into each</text>",
            y + 98.0,
            y + 112.0,
            format_bytes(most),
            format_bytes(into)
        );
        for (place, (label, flows)) in [("out", &node.out), ("in", &node.into)].into_iter().enumerate() {
            let (bytes, busy) = sum(flows);
            if bytes == 0 {
                continue;
            }
            let at = y + 34.0 + place as f64 * 44.0;
            let _ = write!(
                content,
                "<line class=\"flow\" x1=\"800\" y1=\"{at:.1}\" x2=\"{WIDTH}\" y2=\"{at:.1}\" stroke-width=\"{:.1}\"/>\
                 <text x=\"808\" y=\"{:.1}\">{label}: {}</text><text class=\"tick\" x=\"808\" y=\"{:.1}\">{} NICs, {:.0}% busy</text>",
                width(busy),
                at - 6.0,
                format_bytes(bytes),
                at + 14.0,
                flows.len(),
                busy * 100.0
            );
        }
    }
    let mut height = nodes.len().min(NODES) as f64 * (NODE_HEIGHT + 14.0) + 10.0;
    if nodes.len() > NODES {
        let _ = write!(
            content,
            "<text x=\"8\" y=\"{:.1}\">and {} more nodes</text>",
            height + 8.0,
            nodes.len() - NODES
        );
        height += 16.0;
    }
    svg(height, "nodes, devices and what flows over their links", &content)
}
