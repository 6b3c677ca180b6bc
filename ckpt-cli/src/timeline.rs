//! Updates as timelines: a process for each rank, a thread for each stage.

use std::{
    collections::BTreeSet,
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use ckpt_core::{
    Error,
    update::trace::{Stage, Timeline},
};
use serde_json::{Value, json};

use crate::chrome::ChromeTrace;

/// The thread of whole attempts, above the stages.
const ATTEMPT: u32 = 0;
const FAILURE: &str = "failure";

/// One stage of one bucket, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) stage: Stage,
    pub(crate) bucket: Option<u32>,
    pub(crate) start_us: u64,
    pub(crate) end_us: u64,
    /// A failure cut it short otherwise.
    pub(crate) complete: bool,
}

/// Timelines of ranks in the making.
#[derive(Debug, Default)]
pub(crate) struct Timelines {
    chrome: ChromeTrace,
    named: BTreeSet<(u32, u32)>,
}

impl Timelines {
    /// Names a rank.
    pub(crate) fn rank(&mut self, rank: u32, name: &str) {
        self.chrome.process(rank, name);
    }

    /// Adds a stage of a rank.
    pub(crate) fn piece(&mut self, rank: u32, piece: Piece) {
        let stage = stage_name(piece.stage);
        let name = piece.bucket.map_or_else(|| stage.clone(), |bucket| format!("{stage} {bucket}"));
        let place = self.thread(rank, lane(piece.stage), &stage);
        let args = (!piece.complete).then(|| json!({ "cut_short": true }));
        self.chrome.span(place, &name, &stage, (piece.start_us, piece.end_us - piece.start_us), args);
    }

    /// Adds all of an attempt, at the time of its rank's clock: ranks whose clocks agree lie right beside each other.
    pub(crate) fn attempt(&mut self, rank: u32, of: &Timeline) {
        let began_us = since_1970(of.began);
        let place = self.thread(rank, ATTEMPT, "update");
        let name = format!("{} version {}", of.checkpoint, of.version);
        let args = json!({ "epoch": of.epoch.map(|epoch| epoch.0), "failed": of.failure.is_some() });
        self.chrome.span(place, &name, "update", (began_us, microseconds(of.took)), Some(args));
        for span in &of.spans {
            self.piece(
                rank,
                Piece {
                    stage: span.stage,
                    bucket: span.bucket,
                    start_us: began_us + microseconds(span.start),
                    end_us: began_us + microseconds(span.end),
                    complete: span.complete,
                },
            );
        }
        if let Some((at, error)) = &of.failure {
            self.failure(rank, began_us + microseconds(*at), error);
        }
    }

    /// Marks a failure.
    pub(crate) fn failure(&mut self, rank: u32, at_us: u64, error: &Error) {
        let context: serde_json::Map<String, Value> =
            error.context().map(|(key, value)| (key.as_str().to_owned(), value.into())).collect();
        let args = json!({
            "error": error.to_string(), "kind": error.kind(), "operation": error.operation(),
            "message": error.message(), "context": context,
        });
        let place = self.thread(rank, ATTEMPT, "update");
        self.chrome.mark(place, "failed", FAILURE, at_us, args);
    }

    /// All of it, for chrome://tracing and Perfetto.
    pub(crate) fn into_chrome(self) -> ChromeTrace {
        self.chrome
    }

    /// The same as bytes.
    pub(crate) fn into_bytes(self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.chrome.write_to(&mut bytes)?;
        Ok(bytes)
    }

    fn thread(&mut self, rank: u32, number: u32, name: &str) -> (u32, u32) {
        if self.named.insert((rank, number)) {
            self.chrome.thread((rank, number), name);
        }
        (rank, number)
    }
}

/// As in reports.
pub(crate) fn stage_name(stage: Stage) -> String {
    let name = serde_json::to_value(stage).ok();
    name.as_ref().and_then(Value::as_str).unwrap_or("stage").to_owned()
}

/// Microseconds since 1970.
pub(crate) fn since_1970(time: SystemTime) -> u64 {
    microseconds(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn lane(stage: Stage) -> u32 {
    ATTEMPT + 1 + stage as u32
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
