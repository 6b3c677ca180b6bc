//! `ckpt completions` and `ckpt man`: what a shell and `man` know about the commands.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use ckpt_core::{Error, ErrorKind, Key};
use clap::{Args, Command};
use clap_complete::Shell;
use serde::Serialize;

use crate::Context;

/// Print the completions of a shell
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt completions bash > ~/.local/share/bash-completion/completions/ckpt
  ckpt completions zsh > ~/.zfunc/_ckpt
  ckpt completions fish > ~/.config/fish/completions/ckpt.fish")]
pub(crate) struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) async fn run(args: CompletionsArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command_line(), "ckpt", &mut script);
    if !context.output.is_json() {
        // A reader that went away is no error.
        let _ = std::io::stdout().write_all(&script);
    }
    context.output.object(&serde_json::json!({ "script": String::from_utf8_lossy(&script) }))?;
    Ok(ExitCode::SUCCESS)
}

/// Write the manual pages into a folder
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt man ~/.local/share/man/man1
  ckpt man . && man ./ckpt-update.1")]
pub(crate) struct ManArgs {
    /// The folder; it is made if it is not there
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

#[derive(Serialize)]
struct Written {
    pages: Vec<String>,
}

pub(crate) async fn run_man(args: ManArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let fail = |error: std::io::Error| {
        let message = "the folder cannot be written; choose another";
        Error::new(ErrorKind::ConfigInvalid, "write manual pages", message)
            .with(Key::Path, args.folder.display())
            .caused_by(error)
    };
    std::fs::create_dir_all(&args.folder).map_err(fail)?;
    let mut line = crate::command_line();
    line.build();
    let mut pages = Vec::new();
    write(&line, "ckpt", &args.folder, &mut pages).map_err(fail)?;
    context.output.line(format!("wrote {} pages to {}", pages.len(), args.folder.display()));
    context.output.object(&Written { pages })?;
    Ok(ExitCode::SUCCESS)
}

/// The page of a command, and those of its own commands.
fn write(command: &Command, name: &str, folder: &Path, pages: &mut Vec<String>) -> std::io::Result<()> {
    let shown = |command: &&Command| !command.is_hide_set() && command.get_name() != "help";
    // clap keeps names as `'static`; a manual page is made once.
    let titled: &'static str = Box::leak(name.to_owned().into_boxed_str());
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(titled)).render(&mut page)?;
    std::fs::write(folder.join(format!("{name}.1")), page)?;
    pages.push(format!("{name}.1"));
    command
        .get_subcommands()
        .filter(shown)
        .try_for_each(|sub| write(sub, &format!("{name}-{}", sub.get_name()), folder, pages))
}
