//! Progress bars on a terminal, nothing in pipes.

use std::{io::IsTerminal, sync::Arc};

use ckpt_core::checkpoint::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Bytes of a checkpoint on their way into memory.
#[derive(Debug)]
pub(crate) struct LoadBar(ProgressBar);

impl LoadBar {
    /// A bar of `total_bytes` on stderr; `None` if nobody would see it.
    pub(crate) fn start(label: &str, total_bytes: u64) -> Option<Arc<dyn Progress>> {
        if !std::io::stderr().is_terminal() {
            return None;
        }
        let bar = ProgressBar::new(total_bytes);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(label.to_owned());
        Some(Arc::new(Self(bar)))
    }
}

impl Progress for LoadBar {
    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for LoadBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
