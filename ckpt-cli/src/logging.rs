//! Logs on stderr.

use std::io::IsTerminal;

use ckpt_core::{Error, ErrorKind, Result};
use clap::{Args, ValueEnum};
use tracing_subscriber::{EnvFilter, fmt};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct LoggingArgs {
    /// Form of the log on stderr: for people, or one JSON object a line
    #[arg(long, global = true, help_heading = crate::GLOBAL, value_enum, default_value = "text", env = "CKPT_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// What to log: error, warn, info, debug, trace, or a filter such as ckpt_core=debug [default: RUST_LOG, else info]
    #[arg(long, global = true, help_heading = crate::GLOBAL, value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
}

/// Starts logging. A second call in the same process (tests that call `run` twice) keeps the first setting.
pub(crate) fn init(args: &LoggingArgs) -> Result<()> {
    let (source, text) = match (&args.log_level, std::env::var("RUST_LOG")) {
        (Some(level), _) => ("--log-level", level.clone()),
        (None, Ok(filter)) if !filter.is_empty() => ("RUST_LOG", filter),
        _ => ("", "info".to_owned()),
    };
    let filter = EnvFilter::try_new(&text).map_err(|error| {
        let message = format!("{source} is `{text}`, which is no level or filter ({error}); try `debug`");
        Error::new(ErrorKind::ConfigInvalid, "set up logging", message)
    })?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = match args.log_format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
