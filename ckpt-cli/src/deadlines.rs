//! The time limits, as options.

use std::time::Duration;

use ckpt_core::deadlines::Deadlines;
use clap::Args;

/// Time limits
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Time limits")]
pub(crate) struct DeadlineArgs {
    /// For all ranks to come
    #[arg(long, default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    join_timeout: Duration,
    /// For the engine, its worker and the way to the other ranks to be ready; the whole update's, if that is less
    #[arg(long, default_value = "300", value_parser = seconds, value_name = "SECONDS")]
    ready_timeout: Duration,
    /// For one bucket
    #[arg(long, default_value = "30", value_parser = seconds, value_name = "SECONDS")]
    bucket_timeout: Duration,
    /// For a worker to drop its ring, and again for its post hook
    #[arg(long, default_value = "60", value_parser = seconds, value_name = "SECONDS")]
    release_timeout: Duration,
    /// For a whole update
    #[arg(long, default_value = "300", value_parser = seconds, value_name = "SECONDS")]
    timeout: Duration,
    /// Between two heartbeats of a rank; rank 0's counts for all
    #[arg(long, default_value = "1", value_parser = seconds, value_name = "SECONDS")]
    heartbeat: Duration,
    /// A rank that says nothing for so long is dead; rank 0's counts for all
    #[arg(long, default_value = "5", value_parser = seconds, value_name = "SECONDS")]
    dead_after: Duration,
}

impl DeadlineArgs {
    /// For hub, session and server.
    pub(crate) fn deadlines(&self) -> Deadlines {
        Deadlines {
            join: self.join_timeout,
            ready: self.ready_timeout.min(self.timeout),
            bucket: self.bucket_timeout,
            release: self.release_timeout,
            total: self.timeout,
            // Two must fit into the limit, or a single late one would be a death.
            heartbeat: self.heartbeat.min(self.dead_after / 2),
            dead_after: self.dead_after,
            ..Deadlines::default()
        }
    }
}

/// A time limit: more than nothing and at most a day.
fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("write seconds above 0 and at most 86400".to_owned()),
    }
}
