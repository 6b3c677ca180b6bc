//! `ckpt join`: a new instance takes its weights from the memory of a running one.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use ckpt_core::{Version, control::Token, metas::Metas};
use clap::Args;
use serde::Serialize;

use super::{
    instance::{Done, InstanceArgs, layout},
    metas_file,
};
use crate::{
    Context,
    job::{Rank, Reading},
    output::{Table, format_bytes},
};

/// Update new engines from the memory of a running instance, which goes on undisturbed
#[derive(Args)]
#[command(after_help = "\
Run it once per inference worker of the new instance, under torchrun, srun, mpirun or `ckpt launch`: it is a job of its own,
with its own ranks. The running instance (`ckpt update --save-metas-file F --sleep-time S`, or `ckpt serve`) is the sender;
its processes must live until the join is over. Over the transport tcp both jobs need the same secret: set the same
CKPT_TOKEN, or give this job the sender's with --sender-token-file. A sender on another host must have been started with
several hosts or with --bind.

Examples:
  ckpt launch --nproc-per-node 4 -- ckpt join --metas /shared/metas.json --inference-parallel-size 4
  ckpt launch --nproc-per-node 8 -- ckpt join --metas http://10.0.0.7:8080 --endpoint http://localhost:8000
  ckpt join --metas unix:/run/ckpt/rank-0.sock --inference-parallel-size 1 --json")]
pub(crate) struct JoinArgs {
    /// The sender's metas: a file, http://HOST:PORT of any of its `ckpt serve`, or unix:SOCKET; rank 0 reads them
    #[arg(long, value_name = "FILE|URL")]
    metas: String,
    /// File with the sender's secret, if it is not this job's
    #[arg(long, value_name = "FILE")]
    sender_token_file: Option<PathBuf>,
    #[command(flatten)]
    instance: InstanceArgs,
}

#[derive(Serialize)]
struct Summary {
    checkpoint: String,
    ranks: u32,
    sender_ranks: usize,
    transport: &'static str,
    p2p_transport: &'static str,
    device: &'static str,
    load_metas_s: f64,
    /// Of the slowest rank, for each update.
    update_s: Vec<f64>,
    bucket_bytes: u64,
    ring_bytes: u64,
    tensor_bytes: u64,
    tensors: u64,
    buckets: u64,
    gib_per_s: f64,
    /// Of the last update, on rank 0.
    stages: serde_json::Value,
}

pub(crate) async fn run(args: JoinArgs, context: &Context) -> anyhow::Result<ExitCode> {
    let secret = args.sender_token_file.as_deref().map(Token::from_file).transpose()?;
    join(&args.metas, secret, &args.instance, &[], context).await
}

/// Also what `ckpt update --load-metas-file` does.
pub(super) async fn join(
    source: &str,
    secret: Option<Token>,
    args: &InstanceArgs,
    ranks: &[u32],
    context: &Context,
) -> anyhow::Result<ExitCode> {
    let reading = Reading { needed: true, secret: secret.clone() };
    let mut rank = Rank::start_reading(&args.job, &context.registry, reading).await?;
    rank.server = rank.server.with_policy(args.policy.policy());
    let result = pull(source, secret, args, ranks, context, &mut rank).await;
    rank.end(result.is_ok()).await;
    result.map(|()| ExitCode::SUCCESS)
}

async fn pull(
    source: &str,
    secret: Option<Token>,
    args: &InstanceArgs,
    ranks: &[u32],
    context: &Context,
    rank: &mut Rank,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let metas: Option<Metas> = if rank.rank() == 0 {
        let token = secret.map_or_else(|| rank.job.session.secret(), Ok)?;
        Some(metas_file::load(source, &token).await?)
    } else {
        None
    };
    let metas = rank.server.share_metas(metas.as_ref()).await?;
    let layout = layout(&metas.manifest())?;
    let load_metas_s = started.elapsed().as_secs_f64();
    let mut done: Vec<Done> = Vec::new();
    for i in 0..args.repeat {
        done.push(args.update(rank, &layout, ranks, Version(args.weight_version + i)).await?);
    }
    if let (Some(last), 0) = (done.last(), rank.rank()) {
        let best = done.iter().map(|d| d.update_s).fold(f64::INFINITY, f64::min);
        let summary = Summary {
            checkpoint: args.checkpoint_name.clone(),
            ranks: if ranks.is_empty() { rank.world_size() } else { ranks.len() as u32 },
            sender_ranks: metas.ranks.len(),
            transport: rank.transport,
            p2p_transport: rank.server.reader().name(),
            device: rank.server.device().kind(),
            load_metas_s,
            update_s: done.iter().map(|d| d.update_s).collect(),
            bucket_bytes: last.bucket_bytes,
            ring_bytes: last.ring_bytes,
            tensor_bytes: last.tensor_bytes,
            tensors: last.tensors,
            buckets: last.buckets,
            gib_per_s: last.tensor_bytes as f64 / best / (1_u64 << 30) as f64,
            stages: last.stages.clone(),
        };
        print(&summary, last, context);
        context.output.object(&summary)?;
    }
    if let Some(time) = args.sleep_time {
        rank.serve(time).await?;
    }
    Ok(())
}

fn print(summary: &Summary, last: &Done, context: &Context) {
    let mut table = Table::new(&["what", "value"]);
    let updates: Vec<String> = summary.update_s.iter().map(|s| format!("{s:.3} s")).collect();
    let rows = [
        ("weights", format!("{}, {} tensors", format_bytes(summary.tensor_bytes), summary.tensors)),
        ("from", format!("{} ranks, read over {}", summary.sender_ranks, summary.p2p_transport)),
        ("to", format!("{} ranks over {} on {}", summary.ranks, summary.transport, summary.device)),
        ("load metas", format!("{:.3} s", summary.load_metas_s)),
        ("update", updates.join(", ")),
        (
            "transfer",
            format!(
                "{:.3} s in {} buckets of up to {}",
                last.transfer_s(),
                summary.buckets,
                format_bytes(summary.bucket_bytes)
            ),
        ),
        ("ring", format_bytes(summary.ring_bytes)),
        ("rate", format!("{:.2} GiB/s", summary.gib_per_s)),
    ];
    table.pairs(rows);
    context.output.table(&table);
}
