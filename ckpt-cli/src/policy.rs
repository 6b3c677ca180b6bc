//! What happens to engines when an update fails, and which bytes are proved: options of every command that updates.

use ckpt_core::{
    Error, ErrorKind, Key, Result,
    checkpoint::DigestAlgorithm,
    engine::PauseMode,
    server::{self, ParameterServer, Policy},
    sink::WeightSink,
    update::EngineCall,
};
use clap::{Args, ValueEnum};

/// Options on failures and proof
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Failures and proof")]
pub(crate) struct PolicyArgs {
    /// How engines are kept from generating while their weights change, where they can be: before the first bucket until
    /// all ranks have committed
    #[arg(long, value_enum, default_value_t = Pause::Keep, value_name = "HOW")]
    pause: Pause,
    /// What becomes of workers that a failed update has touched
    #[arg(long, value_enum, default_value_t = OnFailure::Mark, value_name = "WHAT")]
    on_failure: OnFailure,
    /// Keep the last committed version in host memory until the next one is committed; `--on-failure rollback` does
    #[arg(long)]
    keep_previous: bool,
    /// Which bytes are compared with the digests of their registration
    #[arg(long, value_enum, default_value_t = Verify::Pulls, value_name = "WHICH")]
    verify: Verify,
}

/// How an engine is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pause {
    /// Requests under way are kept and go on afterwards
    Keep,
    /// Requests under way are finished first
    Wait,
    /// Requests under way are ended
    Abort,
    /// It is not: answers may come from mixed weights
    Off,
}

/// What becomes of touched workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnFailure {
    /// Their rank is marked, and their engine stays paused until an update succeeds
    Mark,
    /// The last committed version is sent to them again
    Rollback,
    /// Their rank is marked, and their engine serves mixed weights
    Leave,
}

/// What is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Verify {
    /// Nothing; no digests are made
    None,
    /// What a rank has pulled from another's memory
    Pulls,
    /// That, and what workers of the native protocol are handed in host memory
    All,
}

impl Verify {
    /// What registrations make.
    pub(crate) fn digests(self) -> Option<DigestAlgorithm> {
        (self != Self::None).then(DigestAlgorithm::default)
    }

    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pulls => "pulls",
            Self::All => "all",
        }
    }

    /// Native workers are told what to find.
    pub(crate) fn checks_workers(self) -> bool {
        self == Self::All
    }
}

impl PolicyArgs {
    /// For the server.
    pub(crate) fn policy(self) -> Policy {
        Policy {
            pause: match self.pause {
                Pause::Keep => Some(PauseMode::Keep),
                Pause::Wait => Some(PauseMode::Wait),
                Pause::Abort => Some(PauseMode::Abort),
                Pause::Off => None,
            },
            on_failure: match self.on_failure {
                OnFailure::Mark => server::OnFailure::Mark,
                OnFailure::Rollback => server::OnFailure::Rollback,
                OnFailure::Leave => server::OnFailure::Leave,
            },
            keep_previous: self.keep_previous,
            check_pulls: self.verify != Verify::None,
        }
    }

    /// Which bytes are proved.
    pub(crate) fn verify(self) -> Verify {
        self.verify
    }
}

/// A rank's worker link and, on one rank of each engine, the engine's request.
pub(crate) type Link = (Option<Box<dyn WeightSink>>, Option<EngineCall>);

/// After `failure` of an update of `ranks`: goes back to the last version if that is wanted and some worker may be mixed.
/// All members come here with the same answer. The error to report is the failure, and how that went.
///
/// `engine_ranks` are those of this rank's engine. One whose worker or engine is gone only lends its memory.
pub(crate) async fn after_failure(
    server: &mut ParameterServer,
    failure: Error,
    ranks: Vec<u32>,
    engine_ranks: &[u32],
    link: impl FnOnce(&mut ParameterServer) -> Result<Link>,
) -> Error {
    let wanted = server.policy().on_failure == server::OnFailure::Rollback && server.may_be_mixed();
    let (true, Some(version)) = (wanted, server.kept_version()) else { return failure };
    let gone = is_gone(&failure, engine_ranks);
    let link = if gone { Ok((None, None)) } else { link(server) };
    let rolled_back = match link {
        Ok((sink, engine)) => server.rollback(ranks, sink, engine).await,
        Err(error) => Err(error),
    };
    match rolled_back {
        Ok(_) if gone => failure.followed_by(format!(
            "the other engines were put back to version {version}; restart this one and update it"
        )),
        Ok(_) => failure.followed_by(format!("all workers were put back to version {version}")),
        Err(error) => failure.followed_by(format!("going back to version {version} failed: {error}")),
    }
}

/// Whether the failure is that one of these ranks' worker or engine does not live any more.
fn is_gone(failure: &Error, engine_ranks: &[u32]) -> bool {
    let lost = matches!(failure.kind(), ErrorKind::PeerLost | ErrorKind::Timeout);
    let of_engine = failure.get(Key::Worker).or(failure.get(Key::Endpoint)).is_some();
    let rank = failure.get(Key::Rank).and_then(|rank| rank.parse().ok());
    lost && of_engine && rank.is_some_and(|rank: u32| engine_ranks.contains(&rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ranks_of_a_dead_engine_stay_behind() {
        let dead =
            |kind| Error::new(kind, "deliver a bucket", "it closed its link").with(Key::Worker, "GPU-1");
        let of_rank_3 = dead(ErrorKind::PeerLost).with(Key::Rank, 3);
        assert!(is_gone(&of_rank_3, &[2, 3]));
        assert!(!is_gone(&of_rank_3, &[0, 1]));
        assert!(!is_gone(&dead(ErrorKind::Backend).with(Key::Rank, 3), &[3]), "it raised and lives");
        let ps = Error::new(ErrorKind::PeerLost, "update", "rank 3 is gone").with(Key::Rank, 3);
        assert!(!is_gone(&ps, &[3]));
    }
}
