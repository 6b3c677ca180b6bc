//! The `ckpt` command line as a library: the binary, the integration tests and anyone who wants the same registry.
//!
//! Conventions of every command:
//! - results go to stdout, logs to stderr; with `--json` the last line of stdout is one JSON object;
//! - a failure is one line, `error: ...`, and with `--json` also `{"error":{"kind","operation","message","context"}}`;
//! - exit codes are those of [`Exit`].

#[cfg(feature = "hccl")]
mod ascend_worker;
mod chrome;
mod command;
#[cfg(feature = "nccl")]
mod cuda_worker;
mod deadlines;
mod exit;
mod failure;
mod job;
mod leave;
mod listen;
mod logging;
mod machine;
mod output;
mod picture;
mod policy;
mod progress;
mod recorder;
mod signals;
mod timeline;
mod trace_file;
mod trace_folder;

use std::{
    ffi::OsString,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use ckpt_core::{
    device::host::HostProvider,
    transport::{Registry, local::LocalProvider, tcp::TcpProvider},
};
use clap::Parser;
use command::worker::device::{HostWorker, WorkerDevice};
pub use exit::Exit;
pub use output::{Output, Table, format_bytes};

/// Everything that this build can use, in the order in which `auto` tries it. The only place with feature switches.
///
/// Devices: cuda, ascend, host. Transports: cuda, cuda-ipc, nccl, hccl, rdma, mooncake, local, tcp, ucx. Accelerators
/// come before the host, native transports before portable ones; `local` refuses ranks in other processes, so `tcp` is the
/// last resort that always works. `ucx` stands behind it: its library is on many machines that nobody has set up for it,
/// so it is used where it is asked for.
pub fn registry() -> Registry {
    registry_in(&|name| std::env::var(name).ok())
}

/// The same with other environment variables for the transports.
#[allow(unused_variables, reason = "only native backends have variables, and a build may have none")]
pub(crate) fn registry_in(env: &dyn Fn(&str) -> Option<String>) -> Registry {
    let mut registry = Registry::default();
    #[cfg(feature = "nccl")]
    ckpt_transport_nccl::register(&mut registry);
    #[cfg(feature = "hccl")]
    ckpt_transport_hccl::register(&mut registry, env);
    #[cfg(feature = "rdma")]
    {
        use ckpt_transport_rdma::{RdmaConfig, RdmaProvider};
        registry.add_transport(RdmaProvider::new(RdmaConfig::from_env(env)));
    }
    #[cfg(feature = "mooncake")]
    {
        use ckpt_transport_mooncake::{MooncakeConfig, MooncakeProvider};
        registry.add_transport(MooncakeProvider::new(MooncakeConfig::from_env(env)));
    }
    registry.add_device(HostProvider);
    registry.add_transport(LocalProvider::default());
    registry.add_transport(TcpProvider);
    #[cfg(feature = "ucx")]
    {
        use ckpt_transport_rdma::{RdmaConfig, UcxProvider};
        registry.add_transport(UcxProvider::new(RdmaConfig::from_env(env)));
    }
    registry
}

/// The devices that `ckpt worker` can run on, in the order in which `auto` tries them.
pub(crate) fn worker_devices() -> Vec<Box<dyn WorkerDevice>> {
    vec![
        #[cfg(feature = "nccl")]
        Box::<cuda_worker::CudaWorker>::default(),
        #[cfg(feature = "hccl")]
        Box::new(ascend_worker::AscendWorker::new(&|name| std::env::var(name).ok())),
        Box::new(HostWorker),
    ]
}

/// What `ckpt doctor` says about the surroundings of devices: a name, whether it is as it must be, and the details.
pub(crate) fn device_checks() -> Vec<(&'static str, bool, String)> {
    #[allow(unused_mut, reason = "a build may have no such device")]
    let mut checks = Vec::new();
    #[cfg(feature = "hccl")]
    checks.extend(
        ckpt_transport_hccl::check::look(&|name| std::env::var(name).ok())
            .into_iter()
            .map(|finding| (finding.name, finding.good, finding.detail)),
    );
    checks
}

/// The cargo features that this build has.
pub(crate) fn features() -> Vec<&'static str> {
    [
        ("nccl", cfg!(feature = "nccl")),
        ("hccl", cfg!(feature = "hccl")),
        ("mooncake", cfg!(feature = "mooncake")),
        ("rdma", cfg!(feature = "rdma")),
        ("ucx", cfg!(feature = "ucx")),
        ("tls", cfg!(feature = "tls")),
    ]
    .into_iter()
    .filter_map(|(name, on)| on.then_some(name))
    .collect()
}

/// What every command gets besides its arguments.
pub(crate) struct Context {
    /// What can be used.
    pub(crate) registry: Registry,
    /// Where results go.
    pub(crate) output: Output,
}

/// The heading of the options that every command has.
pub(crate) const GLOBAL: &str = "Output";

#[derive(Parser)]
#[command(
    name = "ckpt",
    version,
    about = "Puts new weights into running LLM inference engines",
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = exit::HELP
)]
struct Cli {
    /// Print one JSON object as the last line of stdout, and errors as one too
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    #[command(flatten)]
    logging: logging::LoggingArgs,
    #[command(subcommand)]
    command: command::Command,
}

/// The command line as clap knows it, for completions and manual pages.
pub(crate) fn command_line() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// The whole program: what the `ckpt` binary does with the process's own arguments.
pub fn main() -> ExitCode {
    failure::install_panic_hook();
    let code = run(std::env::args_os());
    leave::skip_library_destructors();
    code
}

/// Runs one command line, program name first, to its end.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // clap did not get far enough to say whether `--json` was given; what follows `--` is not ours.
            let mut own = args.iter().take_while(|arg| *arg != "--");
            return failure::report_usage(error, &Output::new(own.any(|arg| arg == "--json")));
        }
    };
    let output = Output::new(cli.json);
    // A panic is a bug in this program; even then the caller gets an exit code and, with `--json`, an object.
    match catch_unwind(AssertUnwindSafe(|| execute(cli, output))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => failure::report(&error, &output),
        Err(_) => failure::report_bug(&output),
    }
}

fn execute(cli: Cli, output: Output) -> anyhow::Result<ExitCode> {
    logging::init(&cli.logging)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("ckpt")
        .build()
        .context("start the async runtime")?;
    let context = Context { registry: registry(), output };
    let result = runtime.block_on(cli.command.run(&context));
    // A thread stuck in the operating system must not keep a finished program alive.
    runtime.shutdown_timeout(Duration::from_secs(2));
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed_and_every_command_has_examples() {
        let mut cli = Cli::command();
        cli.build();
        cli.clone().debug_assert();
        for command in cli.get_subcommands().filter(|c| c.get_name() != "help") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:"), "`ckpt {} --help` has no examples", command.get_name());
            assert!(help.contains("ckpt "), "`ckpt {} --help` has no examples", command.get_name());
            assert!(command.get_about().is_some(), "`ckpt {}` has no description", command.get_name());
        }
    }

    /// The commands in the code blocks of the book and the README, as words. What a shell would make of them is cut off.
    fn documented(page: &str) -> Vec<Vec<String>> {
        let mut commands = Vec::new();
        let blocks = page.split("\n```sh").skip(1).filter_map(|rest| rest.split("\n```").next());
        for line in
            blocks.flat_map(|block| block.replace("\\\n", " ").lines().map(str::to_owned).collect::<Vec<_>>())
        {
            let mut words: Vec<String> = Vec::new();
            let mut rest = line.as_str();
            // Words, single quotes kept together.
            while let Some(start) = rest.find(|c: char| !c.is_whitespace()) {
                rest = &rest[start..];
                let quoted = rest.strip_prefix('\'');
                let end = match quoted {
                    Some(inside) => inside.find('\'').unwrap_or(inside.len()),
                    None => rest.find(char::is_whitespace).unwrap_or(rest.len()),
                };
                let word = quoted.unwrap_or(rest)[..end].to_owned();
                rest = &rest[(end + if quoted.is_some() { 2 } else { 0 }).min(rest.len())..];
                if ["|", ">", "&", "#", "&&"].contains(&word.as_str()) {
                    break;
                }
                words.push(word);
            }
            // `ckpt launch -- ckpt update` is two.
            for part in words.split(|word| word == "--") {
                let Some(at) = part.iter().position(|word| word == "ckpt") else { continue };
                let before = &part[..at];
                let wrapped =
                    before.iter().any(|word| ["torchrun", "srun", "mpirun"].contains(&word.as_str()));
                if wrapped || before.iter().all(|word| word.contains('=')) {
                    commands.push(part[at..].to_vec());
                }
            }
        }
        commands
    }

    #[test]
    fn documented_commands_are_commands() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let pages = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        let pages = pages.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
        let mut count = 0;
        for page in pages.chain([root.join("README.md")]) {
            let text = std::fs::read_to_string(&page).unwrap().replace("\n```\n", "\n```sh\n");
            for mut words in documented(&text) {
                if words.get(1).is_some_and(|word| word == "launch") {
                    words.extend(["--".to_owned(), "true".to_owned()]);
                }
                if let Err(error) = Cli::try_parse_from(&words) {
                    let fine = [clap::error::ErrorKind::DisplayHelp, clap::error::ErrorKind::DisplayVersion];
                    assert!(
                        fine.contains(&error.kind()),
                        "{}: `{}`: {error}",
                        page.display(),
                        words.join(" ")
                    );
                }
                count += 1;
            }
        }
        assert!(count > 30, "only {count} commands were found");
    }

    #[test]
    fn native_transports_come_first_and_names_are_unique() {
        let registry = registry();
        let names: Vec<_> = registry.transports().map(|t| t.name()).collect();
        let order = ["cuda", "cuda-ipc", "nccl", "hccl", "rdma", "mooncake", "local", "tcp", "ucx"];
        let expected: Vec<_> = order.into_iter().filter(|name| names.contains(name)).collect();
        assert_eq!(names, expected);
        let devices: Vec<_> = registry.devices().map(|d| d.kind()).collect();
        let expected: Vec<_> =
            ["cuda", "ascend", "host"].into_iter().filter(|kind| devices.contains(kind)).collect();
        assert_eq!(devices, expected);
    }
}
