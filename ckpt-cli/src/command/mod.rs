//! The commands. A new one is a file here, a `mod` line and a line in the list below.

mod bench;
mod completions;
mod demo;
mod doctor;
mod http_get;
mod instance;
mod join;
mod launch;
mod metas_file;
mod plan;
mod serve;
mod shape;
mod update;
mod verify;
pub(crate) mod worker;

use std::process::ExitCode;

use clap::Subcommand;

use crate::Context;

/// Makes the enum that clap parses and the dispatch: `Variant(module::Args) => run` runs `module::run(args, context)`.
/// The documentation of `Args` is the command's description.
macro_rules! commands {
    ($($variant:ident($module:ident::$args:ident) => $run:ident,)*) => {
        #[derive(Subcommand)]
        pub(crate) enum Command { $($variant(Box<$module::$args>),)* }

        impl Command {
            pub(crate) async fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
                match self { $(Command::$variant(args) => $module::$run(*args, context).await,)* }
            }
        }
    };
}

commands! {
    Demo(demo::DemoArgs) => run,
    Update(update::UpdateArgs) => run,
    Join(join::JoinArgs) => run,
    Serve(serve::ServeArgs) => run,
    Bench(bench::BenchArgs) => run,
    Plan(plan::PlanArgs) => run,
    Doctor(doctor::DoctorArgs) => run,
    Launch(launch::LaunchArgs) => run,
    Worker(worker::WorkerArgs) => run,
    Verify(verify::VerifyArgs) => run,
    Completions(completions::CompletionsArgs) => run,
    Man(completions::ManArgs) => run_man,
}
