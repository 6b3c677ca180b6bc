//! `ckpt bench`: measurements that anybody can repeat.

mod update;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::Context;

/// Measure updates on this machine
#[derive(Args)]
#[command(after_help = "\
Examples:
  ckpt bench update --device host --shape qwen:256 --ranks 2
  ckpt bench update --device cuda --shape qwen3-8b --ranks 2 --iterations 4 --trace trace.json")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Update(Box<update::BenchUpdateArgs>),
    /// One rank of `ckpt bench update`
    #[command(hide = true)]
    UpdateRank(Box<update::RankArgs>),
}

pub(crate) async fn run(args: BenchArgs, context: &Context) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Update(args) => update::run(*args, context).await,
        What::UpdateRank(args) => update::run_rank(*args, context).await,
    }
}
