//! `ckpt doctor`: what this machine and this build can do, and what is missing.

mod engine;
mod limits;
mod network;
mod rdma;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use ckpt_core::transport::Probe;
use clap::Args;
use serde::Serialize;

use super::http_get::TrustArgs;
use crate::{Context, device_checks, exit::Exit, features, machine::Machine, output::Table};

/// Look for devices, transports, limits, ports and engines, and say what is missing and how to get it
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  ckpt doctor
  ckpt doctor --endpoint http://localhost:8000
  ckpt doctor --json | jq '.findings[] | select(.verdict != \"ok\")'
  ckpt doctor --record .

A transport or device that is not available is no error: most machines have few of them. The exit code is that of the worst
finding: 1 for an error, else 0; with --strict a warning counts as an error.")]
pub(crate) struct DoctorArgs {
    /// Also look at the engine that listens here, and at its mode; `--endpoint unix:PATH` for a socket
    #[arg(long, value_name = "URL")]
    endpoint: Vec<String>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Exit with 1 for warnings, too
    #[arg(long)]
    strict: bool,
    /// Save what the choice of an RDMA device looks at as DIR/rdma-tree.txt, to go with a report
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
}

/// What `--json` prints: `docs/schemas/doctor.json`.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    features: Vec<&'static str>,
    /// The worst of the findings.
    verdict: Verdict,
    /// No finding is an error.
    healthy: bool,
    devices: Vec<Backend>,
    transports: Vec<Backend>,
    rdma: rdma::RdmaReport,
    findings: Vec<Finding>,
    machine: Machine,
}

#[derive(Serialize)]
struct Backend {
    name: &'static str,
    available: bool,
    detail: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    area: &'static str,
    name: String,
    verdict: Verdict,
    detail: String,
    /// What to do about it, unless it is well.
    fix: Option<String>,
}

impl Finding {
    fn ok(area: &'static str, name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { area, name: name.into(), verdict: Verdict::Ok, detail: detail.into(), fix: None }
    }

    fn warning(
        area: &'static str,
        name: impl Into<String>,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        let fix = Some(fix.into());
        Self { area, name: name.into(), verdict: Verdict::Warning, detail: detail.into(), fix }
    }

    fn error(
        area: &'static str,
        name: impl Into<String>,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { verdict: Verdict::Error, ..Self::warning(area, name, detail, fix) }
    }
}

pub(crate) async fn run(args: DoctorArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let registry = &context.registry;
    let mut engines = Vec::new();
    for endpoint in &args.endpoint {
        engines.extend(engine::look(endpoint, &args.trust).await);
    }
    // Probes open native libraries, whose initialisers may take their time: not on the runtime's own threads.
    let report = tokio::task::block_in_place(|| {
        let devices = registry.devices().map(|d| backend(d.kind(), d.probe())).collect();
        let transports = registry.transports().map(|t| backend(t.name(), t.probe())).collect();
        let env = |name: &str| std::env::var(name).ok();
        let mut findings = limits::look();
        findings.extend(network::look(&env));
        findings.extend(device_checks().into_iter().map(|(name, good, detail)| match good {
            true => Finding::ok("device", name, detail),
            false => Finding::warning("device", name, detail, "docs/ascend.md says what it must be"),
        }));
        findings.append(&mut engines);
        let verdict = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok);
        Report {
            version: env!("CARGO_PKG_VERSION"),
            features: features(),
            verdict,
            healthy: verdict != Verdict::Error,
            devices,
            transports,
            rdma: rdma::look(Path::new("/sys"), &env),
            findings,
            machine: Machine::look(registry),
        }
    });
    if let Some(folder) = &args.record {
        let file = rdma::record(Path::new("/sys"), folder)?;
        context.output.line(format!("saved {}", file.display()));
    }
    print(&report, context);
    context.output.object(&report)?;
    let well = report.healthy && !(args.strict && report.verdict == Verdict::Warning);
    Ok(if well { Exit::Success } else { Exit::Failed }.into())
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
    output.line(report.machine.line());
    for (title, backends) in [("device", &report.devices), ("transport", &report.transports)] {
        let mut table = Table::new(&[title, "available", "detail"]);
        for backend in backends {
            table.row([backend.name, if backend.available { "yes" } else { "no" }, &backend.detail]);
        }
        output.line("");
        output.table(&table);
    }
    rdma::print(&report.rdma, output);
    let mut table = Table::new(&["area", "what", "verdict", "detail"]);
    for finding in &report.findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Error => "ERROR",
        };
        let fix = finding.fix.as_ref().map_or_else(String::new, |fix| format!("; {fix}"));
        table.row([finding.area, &finding.name, verdict, &format!("{}{fix}", finding.detail)]);
    }
    output.line("");
    output.table(&table);
}
