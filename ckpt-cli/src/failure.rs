//! One line for a person, one object for a program, one exit code: how every failure ends.

use std::{collections::BTreeMap, io::Write, process::ExitCode};

use ckpt_core::{Error, ErrorKind};
use clap::error::ErrorKind as ClapKind;
use serde::Serialize;

use crate::{exit::Exit, output::Output};

#[derive(Serialize)]
struct Failure<'a> {
    kind: ErrorKind,
    operation: &'a str,
    message: String,
    context: BTreeMap<&'static str, &'a str>,
}

/// Reports the error that a command returned.
pub(crate) fn report(error: &anyhow::Error, output: &Output) -> ExitCode {
    let ours = error.chain().find_map(|cause| cause.downcast_ref::<Error>());
    let text = chain(error);
    let failure = match ours {
        Some(error) => Failure {
            kind: error.kind(),
            operation: error.operation(),
            message: text.clone(),
            context: error.context().map(|(key, value)| (key.as_str(), value)).collect(),
        },
        None => Failure {
            kind: ErrorKind::Backend,
            operation: "",
            message: text.clone(),
            context: BTreeMap::new(),
        },
    };
    emit(&failure, &text, output);
    Exit::from(failure.kind).into()
}

/// Reports a command line that does not parse; help and version are not errors.
pub(crate) fn report_usage(error: clap::Error, output: &Output) -> ExitCode {
    if matches!(error.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) {
        let _ = error.print();
        return Exit::Success.into();
    }
    if error.kind() == ClapKind::DisplayHelpOnMissingArgumentOrSubcommand && !output.is_json() {
        let _ = error.print();
        return Exit::Usage.into();
    }
    let text = usage_line(&error.to_string());
    let failure = Failure {
        kind: ErrorKind::ConfigInvalid,
        operation: "read the command line",
        message: text.clone(),
        context: BTreeMap::new(),
    };
    emit(&failure, &text, output);
    Exit::Usage.into()
}

/// After a panic; the hook has printed the line.
pub(crate) fn report_bug(output: &Output) -> ExitCode {
    let failure = Failure {
        kind: ErrorKind::Internal,
        operation: "",
        message: "this is a bug in ckpt; stderr says where".to_owned(),
        context: BTreeMap::new(),
    };
    let _ = output.object(&serde_json::json!({ "error": failure }));
    Exit::Bug.into()
}

/// Makes a panic one line that asks for a report. `RUST_BACKTRACE` still gives the whole story.
pub(crate) fn install_panic_hook() {
    let full = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            full(info);
        }
        let why = info.payload_as_str().unwrap_or("no message");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        print_error(&format!("{why}{place}; this is a bug in ckpt, please report it with your command line"));
    }));
}

fn emit(failure: &Failure<'_>, text: &str, output: &Output) {
    print_error(text);
    let _ = output.object(&serde_json::json!({ "error": failure }));
}

/// A closed stderr must not turn a failure into a panic.
fn print_error(text: &str) {
    let _ = writeln!(std::io::stderr(), "error: {}", one_line(text));
}

/// Workers report whole tracebacks; the JSON form keeps their lines.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" | ")
}

/// The error and its causes, without those that the error's own text repeats.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// clap's paragraphs as one line: the complaint, the tip, where help is.
fn usage_line(text: &str) -> String {
    let mut line = String::new();
    let mut usage = None;
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        if let Some(synopsis) = part.strip_prefix("Usage: ") {
            usage = Some(synopsis);
            break;
        } else if part.starts_with("For more information") {
            break;
        } else if let Some(tip) = part.strip_prefix("tip: ") {
            line = format!("{line}; {tip}");
        } else if line.is_empty() {
            line = part.strip_prefix("error: ").unwrap_or(part).to_owned();
        } else {
            line = format!("{line} {part}");
        }
    }
    let command = usage.map_or("ckpt", |synopsis| {
        synopsis.find(['[', '<', '-']).map_or(synopsis, |end| &synopsis[..end]).trim_end()
    });
    format!("{line}; see `{command} --help`")
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use ckpt_core::Key;

    use super::*;

    #[test]
    fn causes_are_told_once_and_tracebacks_become_one_line() {
        let error = Error::new(ErrorKind::PeerLost, "update", "worker died").with(Key::Rank, 3);
        let error =
            anyhow::Error::from(error.caused_by(std::io::Error::other("broken pipe"))).context("demo");
        assert_eq!(chain(&error), "demo: update: worker died [rank=3]: broken pipe");
        assert_eq!(
            one_line("Traceback:\n  File x\n\nValueError: y\n"),
            "Traceback: | File x | ValueError: y"
        );
    }

    #[test]
    fn an_error_under_context_keeps_its_kind() {
        let error = Err::<(), _>(Error::new(ErrorKind::Timeout, "join", "nobody came")).context("start");
        let error = error.unwrap_err();
        assert!(error.chain().find_map(|cause| cause.downcast_ref::<Error>()).is_some());
    }

    #[test]
    fn usage_errors_are_one_line_with_the_fix() {
        let text = "error: unexpected argument '--jsn' found\n\n  tip: a similar argument exists: '--json'\n\n\
                    Usage: ckpt doctor --json\n\nFor more information, try '--help'.\n";
        assert_eq!(
            usage_line(text),
            "unexpected argument '--jsn' found; a similar argument exists: '--json'; see `ckpt doctor --help`"
        );
    }
}
