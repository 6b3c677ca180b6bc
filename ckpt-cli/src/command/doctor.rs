//! `ckpt doctor`: what this machine and this build can do, and what is missing.

mod rdma;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use ckpt_core::{device::runtime_dir, transport::Probe};
use clap::Args;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::{Context, device_checks, exit::Exit, features, output::Table, output::format_bytes};

/// Look for devices, transports and limits, and say what is missing
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  ckpt doctor
  ckpt doctor --json | jq '.transports[] | select(.available)'
  ckpt doctor --record .

A transport or device that is not available is no error. The exit code is 1 if a check under
`system` has failed.")]
pub(crate) struct DoctorArgs {
    /// Save what the choice of an RDMA device looks at as DIR/rdma-tree.txt, to go with a report
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    features: Vec<&'static str>,
    healthy: bool,
    devices: Vec<Backend>,
    transports: Vec<Backend>,
    rdma: rdma::RdmaReport,
    system: Vec<Check>,
}

#[derive(Serialize)]
struct Backend {
    name: &'static str,
    available: bool,
    detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Failed,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
}

pub(crate) async fn run(args: DoctorArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let registry = &context.registry;
    // Probes open native libraries, whose initialisers may take their time: not on the runtime's own threads.
    let report = tokio::task::block_in_place(|| {
        let devices = registry.devices().map(|d| backend(d.kind(), d.probe())).collect();
        let transports = registry.transports().map(|t| backend(t.name(), t.probe())).collect();
        let mut system = vec![kernel(), runtime_folder(), shared_memory(), memory_lock(), open_files()];
        system.extend(device_checks().into_iter().map(|(name, good, detail)| {
            let verdict = if good { Verdict::Ok } else { Verdict::Warning };
            Check { name, verdict, detail }
        }));
        let healthy = system.iter().all(|check| check.verdict != Verdict::Failed);
        Report {
            version: env!("CARGO_PKG_VERSION"),
            features: features(),
            healthy,
            devices,
            transports,
            rdma: rdma::look(Path::new("/sys"), &|name| std::env::var(name).ok()),
            system,
        }
    });
    if let Some(folder) = &args.record {
        let file = rdma::record(Path::new("/sys"), folder)?;
        context.output.line(format!("saved {}", file.display()));
    }
    print(&report, context);
    context.output.object(&report)?;
    Ok(if report.healthy { Exit::Success } else { Exit::Failed }.into())
}

fn backend(name: &'static str, probe: Probe) -> Backend {
    match probe {
        Probe::Available(detail) => Backend { name, available: true, detail },
        Probe::Unavailable(detail) => Backend { name, available: false, detail },
    }
}

fn print(report: &Report, context: &Context) {
    let output = &context.output;
    let built = if report.features.is_empty() { "none".to_owned() } else { report.features.join(", ") };
    output.line(format!("ckpt {}, features: {built}", report.version));
    for (title, backends) in [("device", &report.devices), ("transport", &report.transports)] {
        let mut table = Table::new(&[title, "available", "detail"]);
        for backend in backends {
            table.row([backend.name, if backend.available { "yes" } else { "no" }, &backend.detail]);
        }
        output.line("");
        output.table(&table);
    }
    rdma::print(&report.rdma, output);
    let mut table = Table::new(&["system", "verdict", "detail"]);
    for check in &report.system {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "FAILED",
        };
        table.row([check.name, verdict, &check.detail]);
    }
    output.line("");
    output.table(&table);
}

fn kernel() -> Check {
    let name = rustix::system::uname();
    let detail = format!(
        "{} {} {} on {}",
        name.sysname().to_string_lossy(),
        name.release().to_string_lossy(),
        name.machine().to_string_lossy(),
        name.nodename().to_string_lossy()
    );
    let verdict = if cfg!(target_os = "linux") { Verdict::Ok } else { Verdict::Warning };
    Check { name: "kernel", verdict, detail }
}

/// Sockets and shared-memory files go there; nothing works without it.
fn runtime_folder() -> Check {
    let (verdict, detail) = match runtime_dir() {
        Ok(path) => (Verdict::Ok, path.display().to_string()),
        Err(error) => (Verdict::Failed, error.to_string()),
    };
    Check { name: "runtime folder", verdict, detail }
}

/// Checkpoints that trainers leave in /dev/shm are registered in place; a container's default is 64 MiB.
fn shared_memory() -> Check {
    let name = "/dev/shm";
    let (verdict, detail) = match rustix::fs::statvfs(name) {
        Ok(stat) => {
            let total = stat.f_blocks.saturating_mul(stat.f_frsize);
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} of {} free", format_bytes(free), format_bytes(total));
            if total < 1 << 30 {
                let fix = "small: containers need --shm-size or --ipc=host to hold a checkpoint there";
                (Verdict::Warning, format!("{detail}; {fix}"))
            } else {
                (Verdict::Ok, detail)
            }
        }
        Err(error) => (Verdict::Warning, format!("cannot be read: {error}")),
    };
    Check { name, verdict, detail }
}

/// RDMA registration and pinning lock memory.
fn memory_lock() -> Check {
    let needed = Path::new("/sys/class/infiniband").exists();
    let (verdict, detail) = match getrlimit(Resource::Memlock).current {
        None => (Verdict::Ok, "unlimited".to_owned()),
        Some(limit) if needed => {
            let fix = "RDMA needs more: raise it with `ulimit -l unlimited` or docker's --ulimit memlock=-1";
            (Verdict::Warning, format!("{}; {fix}", format_bytes(limit)))
        }
        Some(limit) => (Verdict::Ok, format!("{} (only RDMA needs more)", format_bytes(limit))),
    };
    Check { name: "memlock", verdict, detail }
}

/// A rank holds a few connections to every other.
fn open_files() -> Check {
    let used = fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0);
    let (verdict, detail) = match getrlimit(Resource::Nofile).current {
        Some(limit) if limit < 1024 => {
            (Verdict::Warning, format!("{limit}; large jobs need more: raise it with `ulimit -n 65536`"))
        }
        Some(limit) => (Verdict::Ok, format!("{limit} allowed, {used} in use")),
        None => (Verdict::Ok, "unlimited".to_owned()),
    };
    Check { name: "open files", verdict, detail }
}
