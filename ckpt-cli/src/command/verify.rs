//! `ckpt verify`: do engines hold what a checkpoint holds, or what each other hold?

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use ckpt_core::{
    Error, ErrorKind, Key,
    checkpoint::{CheckpointSource, DigestAlgorithm},
};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::http_get::{self, TrustArgs};
use crate::{Context, exit::Exit, output::Table};

const OPERATION: &str = "verify the engines";
/// Differences that are listed.
const SHOWN: usize = 20;

/// Compare what engines hold with a checkpoint, or with each other
#[derive(Args)]
#[command(after_help = "\
An engine is asked for GET /v1/tensors: `ckpt worker` answers it, and docs/worker-protocol.md says how any engine can. With
--checkpoint-path the tensors must be those of the checkpoint, byte for byte. Engines that fuse, slice or quantise their
parameters hold no such tensors: compare their replicas with each other, without --checkpoint-path.

Examples:
  ckpt verify --checkpoint-path /models/qwen3-8b unix:/run/engine-0.sock unix:/run/engine-1.sock
  ckpt verify http://10.0.0.7:8000 http://10.0.0.8:8000 --algorithm sum-64")]
pub(crate) struct VerifyArgs {
    /// A .safetensors file or a folder of them that every engine must hold
    #[arg(long, value_name = "PATH")]
    checkpoint_path: Option<PathBuf>,
    /// The digest that engines are asked for: xxh3-64, or sum-64, which torch can compute on its device
    #[arg(long, default_value = "xxh3-64", value_name = "NAME", value_parser = algorithm)]
    algorithm: DigestAlgorithm,
    #[command(flatten)]
    trust: TrustArgs,
    /// Engines: http(s)://HOST:PORT or unix:SOCKET
    #[arg(required = true, value_name = "ENGINE")]
    engines: Vec<String>,
}

fn algorithm(name: &str) -> Result<DigestAlgorithm, String> {
    let names = || DigestAlgorithm::ALL.map(DigestAlgorithm::name).join(", ");
    DigestAlgorithm::from_name(name)
        .ok_or_else(|| format!("there is no digest {name}; use one of {}", names()))
}

/// One tensor as an engine or a checkpoint has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    #[serde(skip_serializing, default)]
    name: String,
    dtype: String,
    shape: Vec<u64>,
    digest: String,
}

type Tensors = BTreeMap<String, Held>;

/// One place with weights.
struct Side {
    name: String,
    tensors: Tensors,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Difference {
    engine: String,
    tensor: String,
    what: &'static str,
}

#[derive(Serialize)]
struct Report {
    against: String,
    algorithm: &'static str,
    engines: usize,
    tensors: usize,
    differences: Vec<Difference>,
}

pub(crate) async fn run(args: VerifyArgs, context: &Context) -> anyhow::Result<ExitCode> {
    if args.checkpoint_path.is_none() && args.engines.len() < 2 {
        let text = "one engine alone has nothing to be compared with; name another, or --checkpoint-path";
        return Err(Error::new(ErrorKind::ConfigInvalid, OPERATION, text).into());
    }
    let mut sides = Vec::new();
    for engine in &args.engines {
        sides.push(ask(engine, args.algorithm, &args.trust).await?);
    }
    let reference = match args.checkpoint_path {
        Some(path) => {
            let name = path.display().to_string();
            let tensors = tokio::task::spawn_blocking(move || of_checkpoint(&path, args.algorithm)).await??;
            Side { name, tensors }
        }
        None => sides.remove(0),
    };
    let differences: Vec<Difference> = sides.iter().flat_map(|side| compare(&reference, side)).collect();
    let report = Report {
        against: reference.name,
        algorithm: args.algorithm.name(),
        engines: sides.len(),
        tensors: reference.tensors.len(),
        differences,
    };
    print(&report, context);
    match report.differences.first() {
        None => {
            context.output.object(&report)?;
            Ok(Exit::Success.into())
        }
        Some(first) => {
            let count = report.differences.len();
            let text = format!("{count} tensors differ from {}; the first {}", report.against, first.what);
            Err(Error::new(ErrorKind::Corrupt, OPERATION, text)
                .with(Key::Tensor, &first.tensor)
                .with(Key::Endpoint, &first.engine)
                .into())
        }
    }
}

async fn ask(engine: &str, algorithm: DigestAlgorithm, trust: &TrustArgs) -> anyhow::Result<Side> {
    let path = format!("/v1/tensors?algorithm={}", algorithm.name());
    let body = http_get::get(engine, &path, trust, OPERATION).await?;
    let wrong = |e: serde_json::Error| {
        let text = "it did not answer with a list of tensors and digests; see docs/worker-protocol.md";
        Error::new(ErrorKind::Unsupported, OPERATION, text).with(Key::Endpoint, engine).caused_by(e)
    };
    let all: Vec<Held> = serde_json::from_slice(&body).map_err(wrong)?;
    Ok(Side { name: engine.to_owned(), tensors: by_name(all) })
}

fn by_name(all: Vec<Held>) -> Tensors {
    all.into_iter().map(|held| (held.name.clone(), held)).collect()
}

fn of_checkpoint(path: &std::path::Path, algorithm: DigestAlgorithm) -> ckpt_core::Result<Tensors> {
    let source = CheckpointSource::open(path)?;
    let each = source.tensors().iter().enumerate().map(|(index, tensor)| {
        let digest = algorithm.digest(&source.read(index)?);
        Ok(Held {
            name: tensor.meta.name.to_string(),
            dtype: tensor.meta.dtype.safetensors_name().to_owned(),
            shape: tensor.meta.shape.to_vec(),
            digest: format!("{digest:016x}"),
        })
    });
    each.collect::<ckpt_core::Result<Vec<_>>>().map(by_name)
}

fn compare(reference: &Side, side: &Side) -> Vec<Difference> {
    let differs =
        |tensor: &str, what| Difference { engine: side.name.clone(), tensor: tensor.to_owned(), what };
    let mut all = Vec::new();
    for (name, expected) in &reference.tensors {
        match side.tensors.get(name) {
            None => all.push(differs(name, "is missing")),
            Some(held) if (&held.dtype, &held.shape) != (&expected.dtype, &expected.shape) => {
                all.push(differs(name, "has another dtype or shape"));
            }
            Some(held) if held.digest != expected.digest => all.push(differs(name, "has other bytes")),
            Some(_) => {}
        }
    }
    let extra = side.tensors.keys().filter(|name| !reference.tensors.contains_key(*name));
    all.extend(extra.map(|name| differs(name, "is not known there")));
    all
}

fn print(report: &Report, context: &Context) {
    let mut table = Table::new(&["engine", "tensor", "difference"]);
    for difference in report.differences.iter().take(SHOWN) {
        table.row([difference.engine.clone(), difference.tensor.clone(), difference.what.to_owned()]);
    }
    if report.differences.is_empty() {
        let Report { against, algorithm, engines, tensors, .. } = report;
        context
            .output
            .line(format!("{engines} engines hold the {tensors} tensors of {against} ({algorithm})"));
    } else {
        context.output.table(&table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(tensors: &[(&str, &str, u64)]) -> Side {
        let held = |(name, dtype, digest): &(&str, &str, u64)| Held {
            name: (*name).to_owned(),
            dtype: (*dtype).to_owned(),
            shape: vec![2],
            digest: format!("{digest:016x}"),
        };
        Side { name: "e".into(), tensors: by_name(tensors.iter().map(held).collect()) }
    }

    #[test]
    fn each_difference_is_told_once() {
        let reference = side(&[("a", "BF16", 1), ("b", "BF16", 2), ("c", "F32", 3)]);
        assert!(
            compare(&reference, &side(&[("a", "BF16", 1), ("b", "BF16", 2), ("c", "F32", 3)])).is_empty()
        );
        let found = compare(&reference, &side(&[("a", "BF16", 9), ("c", "F16", 3), ("d", "F32", 4)]));
        let found: Vec<_> = found.iter().map(|d| (&*d.tensor, d.what)).collect();
        assert_eq!(
            found,
            [
                ("a", "has other bytes"),
                ("b", "is missing"),
                ("c", "has another dtype or shape"),
                ("d", "is not known there")
            ]
        );
    }
}
