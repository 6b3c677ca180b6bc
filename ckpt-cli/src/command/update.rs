//! `ckpt update`: one rank of an update of running engines.

use std::{path::PathBuf, process::ExitCode, str::FromStr, time::Instant};

use ckpt_core::{
    Error, ErrorKind, Version,
    checkpoint::{CheckpointSource, LoadOptions, Pool, load},
};
use clap::{Args, ValueEnum};
use serde::Serialize;

pub(crate) use super::instance::WorkerProtocol;
use super::{
    instance::{Done, InstanceArgs, Totals, layout, seconds},
    join, metas_file,
};
use crate::{
    Context,
    job::{Rank, Reading},
    output::{Table, format_bytes},
    progress::Bar,
    recorder::Recorder,
};

/// Load a checkpoint and put it into running engines: run one process per inference worker
#[derive(Args)]
#[command(after_help = "\
Run it once per inference worker, under torchrun, srun, mpirun or `ckpt launch`; every rank reads its share of the files.
With `--update-method p2p` the ranks of --ranks (all without it) pull what the others hold, and these go on undisturbed.

Examples:
  ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path /models/qwen3-8b --endpoint http://localhost:8000
  torchrun --nproc-per-node 8 --no-python ckpt update --checkpoint-path /models/qwen3-8b --inference-parallel-size 4
  ckpt update --checkpoint-path model.safetensors --engine http --endpoint http://localhost:8000/reload \\
      --http-template '{\"endpoints\": \"{{endpoints}}\"}'
  ckpt launch --nproc-per-node 2 -- ckpt update --checkpoint-path DIR --uds /run/engine-{rank}.sock --worker-protocol native \\
      --inference-parallel-size 1
  ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path DIR --trace trace.json     # trace-0.json to trace-7.json
  ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path DIR --update-method p2p --ranks 4-7 \\
      --inference-parallel-size 4
  CKPT_TOKEN=... ckpt launch --nproc-per-node 8 -- ckpt update --checkpoint-path DIR --save-metas-file metas.json \\
      --sleep-time 3600     # and meanwhile, elsewhere: ckpt join --metas metas.json")]
pub(crate) struct UpdateArgs {
    /// A .safetensors file or a folder of them
    #[arg(long, value_name = "PATH", required_unless_present = "load_metas_file")]
    checkpoint_path: Option<PathBuf>,
    /// How the weights reach the ranks
    #[arg(long, value_enum, default_value_t = Method::Broadcast)]
    update_method: Method,
    /// Ranks that a P2P update updates, `4-7` or `0,2,4-7`; without it all
    #[arg(long, value_name = "RANKS")]
    ranks: Option<Ranks>,
    /// Rank 0 writes here who holds what, for others that join
    #[arg(long, value_name = "FILE")]
    save_metas_file: Option<PathBuf>,
    /// Take the weights from the memory of the instance that wrote this file, as `ckpt join` does
    #[arg(long, value_name = "FILE", conflicts_with_all = ["checkpoint_path", "save_metas_file"])]
    load_metas_file: Option<String>,
    /// Accepted for checkpoint-engine's sake; use --transport
    #[arg(long, num_args = 0..=1, default_missing_value = "", value_name = "NAME")]
    custom_dist: Option<String>,
    #[command(flatten)]
    instance: InstanceArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Every rank sends its share to all
    Broadcast,
    /// Some ranks pull from the others' memory
    P2p,
    /// A broadcast, then P2P
    All,
}

/// A list of ranks, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ranks(pub(super) Vec<u32>);

/// Above any job; keeps a slip of the finger from filling the memory.
const MAX_RANK: u32 = 1 << 20;

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| match text.trim().parse::<u32>() {
            Ok(rank) if rank <= MAX_RANK => Ok(rank),
            _ => Err(format!("{text:?} is not a rank; write ranks like 4-7 or 0,2,4-7")),
        };
        let mut ranks = Vec::new();
        for item in text.split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(format!("{item:?} ends before it starts"));
            }
            ranks.extend(first..=last);
        }
        ranks.sort_unstable();
        ranks.dedup();
        Ok(Self(ranks))
    }
}

#[derive(Serialize)]
struct Summary {
    checkpoint: String,
    ranks: u32,
    transport: &'static str,
    device: &'static str,
    load_s: f64,
    gather_metas_s: f64,
    /// Of the slowest rank, for each update of each method.
    update_s_by_method: std::collections::BTreeMap<&'static str, Vec<f64>>,
    #[serde(flatten)]
    totals: Totals,
}

pub(crate) async fn run(args: UpdateArgs, context: &Context) -> anyhow::Result<ExitCode> {
    if let Some(name) = &args.custom_dist {
        tracing::warn!(name, "--custom-dist does nothing here: --transport says how bytes reach other ranks");
    }
    let pulls = args.update_method != Method::Broadcast;
    let ranks = args.ranks.clone().unwrap_or_default().0;
    if let Some(file) = &args.load_metas_file {
        return join::join(file, None, &args.instance, &ranks, context).await;
    }
    if !ranks.is_empty() && !pulls {
        return Err(wrong("a broadcast updates all ranks; use --update-method p2p with --ranks").into());
    }
    let reading = Reading { needed: pulls, secret: None };
    let work =
        async |rank: &mut Rank, recorder: &mut Recorder| update(&args, ranks, context, rank, recorder).await;
    args.instance.run(reading, context, work).await
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "update weights", message)
}

async fn update(
    args: &UpdateArgs,
    ranks: Vec<u32>,
    context: &Context,
    rank: &mut Rank,
    recorder: &mut Recorder,
) -> anyhow::Result<()> {
    if let Some(high) = ranks.last().filter(|high| **high >= rank.world_size()) {
        return Err(wrong(format!("--ranks names rank {high} of a job of {}", rank.world_size())).into());
    }
    let instance = &args.instance;
    let started = Instant::now();
    let registered = {
        let path = args.checkpoint_path.clone().ok_or_else(|| wrong("--checkpoint-path is missing"))?;
        let name = instance.checkpoint_name.clone();
        let (number, world_size) = (rank.rank(), rank.world_size());
        let device = rank.server.device().clone();
        let digests = instance.policy.verify().digests();
        tokio::task::spawn_blocking(move || {
            let source = CheckpointSource::open(&path)?;
            let range = source.split(world_size)?.swap_remove(number as usize);
            let bytes = source.tensors()[range.clone()].iter().map(|t| t.meta.len_bytes()).sum();
            let mut options = LoadOptions::new(name);
            options.digests = digests;
            options.progress = Bar::load(&format!("rank {number}: register"), bytes);
            load(&source, range, &Pool::new(device), &options)
        })
        .await??
    };
    let load_s = started.elapsed().as_secs_f64();
    rank.server.register(&instance.checkpoint_name, registered)?;
    let started = Instant::now();
    let waiting = Bar::wait(&format!("rank {}: gather metas", rank.rank()));
    let manifest = rank.server.gather_metas(&instance.checkpoint_name).await?;
    drop(waiting);
    let layout = layout(&manifest)?;
    let gather_metas_s = started.elapsed().as_secs_f64();
    if let (Some(path), Some(metas), 0) = (&args.save_metas_file, rank.server.metas(), rank.rank()) {
        metas_file::save(path, metas).await?;
    }

    let all_ranks: Vec<u32> = (0..rank.world_size()).collect();
    let pulling = if ranks.is_empty() { all_ranks } else { ranks };
    let broadcast: (&str, &[u32]) = ("broadcast", &[]);
    let p2p: (&str, &[u32]) = ("p2p", &pulling);
    let methods = match args.update_method {
        Method::Broadcast => vec![broadcast],
        Method::P2p => vec![p2p],
        Method::All => vec![broadcast, p2p],
    };
    let mut version = instance.weight_version;
    let mut done: Vec<(&str, Done)> = Vec::new();
    for (method, ranks) in methods {
        for _ in 0..instance.repeat {
            if let Some((_, before)) = done.last_mut() {
                // Only the last one's are shown; those of thousands would add up.
                before.stages = serde_json::Value::Null;
            }
            done.push((method, instance.update(rank, &layout, ranks, Version(version)).await?));
            version += 1;
        }
    }
    if rank.rank() == 0 {
        report(args, context, rank, load_s, gather_metas_s, &done)?;
    }
    if let Some(time) = instance.sleep_time {
        recorder.write(rank.server.take_timelines(), None).await;
        rank.serve(time).await?;
    }
    Ok(())
}

fn report(
    args: &UpdateArgs,
    context: &Context,
    rank: &Rank,
    load_s: f64,
    gather_metas_s: f64,
    done: &[(&'static str, Done)],
) -> anyhow::Result<()> {
    let Some(totals) = Totals::new(done.iter().map(|(_, done)| done)) else { return Ok(()) };
    let mut update_s_by_method = std::collections::BTreeMap::<_, Vec<f64>>::new();
    for (method, one) in done {
        update_s_by_method.entry(*method).or_default().push(one.update_s);
    }
    let summary = Summary {
        checkpoint: args.instance.checkpoint_name.clone(),
        ranks: rank.world_size(),
        transport: rank.transport,
        device: rank.server.device().kind(),
        load_s,
        gather_metas_s,
        update_s_by_method,
        totals,
    };
    print(&summary, context);
    context.output.object(&summary)
}

fn print(summary: &Summary, context: &Context) {
    let mut table = Table::new(&["what", "value"]);
    let updates: Vec<String> =
        summary.update_s_by_method.iter().map(|(method, all)| format!("{method} {}", seconds(all))).collect();
    let Totals { tensor_bytes, tensors, .. } = summary.totals;
    let weights = format!("{} ({}, {tensors} tensors)", summary.checkpoint, format_bytes(tensor_bytes));
    table.pairs([
        ("checkpoint", weights),
        ("ranks", format!("{} over {} on {}", summary.ranks, summary.transport, summary.device)),
        ("load", seconds(&[summary.load_s])),
        ("gather metas", seconds(&[summary.gather_metas_s])),
        ("update", updates.join("; ")),
    ]);
    table.pairs(summary.totals.rows());
    context.output.table(&table);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_ranks() {
        let parse = |text: &str| text.parse::<Ranks>().map(|r| r.0);
        assert_eq!(parse("4-7").unwrap(), [4, 5, 6, 7]);
        assert_eq!(parse("6, 0,2-3,3").unwrap(), [0, 2, 3, 6]);
        for bad in ["", "4-", "-4", "7-4", "x", "1,,2", "0-4294967295", "1-2-3"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
