//! `ckpt join`: a new instance takes its weights from the memory of a running one.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use ckpt_core::{Error, ErrorKind, Key, Version, control::Token, metas::Metas};
use clap::Args;
use serde::Serialize;

use super::{
    http_get::TrustArgs,
    instance::{Done, InstanceArgs, Totals, layout, seconds},
    metas_file,
};
use crate::{
    Context,
    job::{Rank, Reading},
    output::{Table, format_bytes},
    recorder::Recorder,
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
  ckpt join --metas unix:/run/ckpt/rank-0.sock --inference-parallel-size 1 --json --trace join.json")]
pub(crate) struct JoinArgs {
    /// The sender's metas: a file, http(s)://HOST:PORT of any of its `ckpt serve`, or unix:SOCKET; rank 0 reads them
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
    #[serde(flatten)]
    totals: Totals,
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
    let work = async |rank: &mut Rank, recorder: &mut Recorder| {
        pull(source, secret, args, ranks, context, rank, recorder).await
    };
    args.run(reading, context, work).await
}

async fn pull(
    source: &str,
    secret: Option<Token>,
    args: &InstanceArgs,
    ranks: &[u32],
    context: &Context,
    rank: &mut Rank,
    recorder: &mut Recorder,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let token = secret.map_or_else(|| rank.job.session.secret(), Ok)?;
    let brought =
        if rank.rank() == 0 { Some(metas_file::load(source, &token, &args.trust).await?) } else { None };
    let metas = rank.server.share_metas(brought.as_ref()).await?;
    let layout = layout(&metas.manifest())?;
    let load_metas_s = started.elapsed().as_secs_f64();
    let mut done: Vec<Done> = Vec::new();
    for i in 0..args.repeat {
        done.push(args.update(rank, &layout, ranks, Version(args.weight_version + i)).await?);
        if metas.are_unchecked() {
            let found = if rank.rank() == 0 {
                compare(source, &token, &args.trust, &metas).await.err()
            } else {
                None
            };
            let found = serde_json::to_vec(&found.map(|error| error.flattened()))?;
            for part in rank.collect("compare metas", found.into()).await?.iter() {
                serde_json::from_slice::<Option<Error>>(part)?.map_or(Ok(()), Err)?;
            }
        }
    }
    if let (Some(totals), 0) = (Totals::new(done.iter()), rank.rank()) {
        let summary = Summary {
            checkpoint: args.checkpoint_name.clone(),
            ranks: if ranks.is_empty() { rank.world_size() } else { ranks.len() as u32 },
            sender_ranks: metas.ranks.len(),
            transport: rank.transport,
            p2p_transport: rank.server.reader().name(),
            device: rank.server.device().kind(),
            load_metas_s,
            totals,
        };
        print(&summary, &done, context);
        context.output.object(&summary)?;
    }
    if let Some(time) = args.sleep_time {
        recorder.write(rank.server.take_timelines(), None).await;
        rank.serve(time).await?;
    }
    Ok(())
}

/// Owners that do not notice readers may have registered other weights under them: then their metas differ now.
async fn compare(source: &str, token: &Token, trust: &TrustArgs, metas: &Metas) -> Result<(), Error> {
    let wrong = |kind, message: &str| Error::new(kind, "compare metas", message).with(Key::Endpoint, source);
    let later = metas_file::load(source, token, trust).await.map_err(|cause| {
        let message = "the sender's metas cannot be read again, so nobody knows whether its memory stayed the same \
                       during the join; join again";
        wrong(ErrorKind::Unavailable, message).caused_by(std::io::Error::other(format!("{cause:#}")))
    })?;
    match metas.moved_since(&later) {
        None => Ok(()),
        Some(owner) => {
            let message = "the sender registered other memory during the join: the engines may hold a mixture; join again";
            Err(wrong(ErrorKind::Corrupt, message).with(Key::Peer, owner))
        }
    }
}

fn print(summary: &Summary, done: &[Done], context: &Context) {
    let mut table = Table::new(&["what", "value"]);
    let updates: Vec<f64> = done.iter().map(|d| d.update_s).collect();
    let Totals { tensor_bytes, tensors, .. } = summary.totals;
    table.pairs([
        ("weights", format!("{}, {tensors} tensors", format_bytes(tensor_bytes))),
        ("from", format!("{} ranks, read over {}", summary.sender_ranks, summary.p2p_transport)),
        ("to", format!("{} ranks over {} on {}", summary.ranks, summary.transport, summary.device)),
        ("load metas", seconds(&[summary.load_metas_s])),
        ("update", seconds(&updates)),
    ]);
    table.pairs(summary.totals.rows());
    context.output.table(&table);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn json(address: u64) -> String {
        format!(
            r#"{{"3": {{"p2p_store_addr": "10.0.0.1:15428", "rdma_device": "", "memory_buffer_metas_list": [{{"ptr": {address},
            "size": 256, "metas": [{{"name": "w", "dtype": "torch.uint8", "shape": [256], "aligned_size": 256}}]}}]}}}}"#
        )
    }

    #[tokio::test]
    async fn an_owner_that_registers_other_memory_during_a_join_is_noticed_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metas.json");
        let (source, token) = (file.to_str().unwrap(), Token::random().unwrap());
        let trust = TrustArgs::default();
        std::fs::write(&file, json(4096)).unwrap();
        let metas = metas_file::load(source, &token, &trust).await.unwrap();
        assert!(metas.are_unchecked());
        compare(source, &token, &trust, &metas).await.unwrap();
        // Other memory, other tensors, nothing at all.
        for (other, kind) in [
            (json(8192), ErrorKind::Corrupt),
            (json(4096).replace("\"w\"", "\"v\""), ErrorKind::Corrupt),
            ("{}".to_owned(), ErrorKind::Corrupt),
            ("?".to_owned(), ErrorKind::Unavailable),
        ] {
            std::fs::write(&file, other).unwrap();
            let error = compare(source, &token, &trust, &metas).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains("join again"), "{error}");
        }
    }
}
