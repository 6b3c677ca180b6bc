//! Between machines and hub: which action is which message, and which message is which event.

use crate::{
    control::{ToHub, ToRank},
    error::{Error, ErrorKind, Key},
    types::Rank,
    update::{Action, Event},
};

pub(crate) fn to_hub(action: &Action) -> Option<ToHub> {
    Some(match action {
        Action::SendReady { epoch, plan_digest } => ToHub::Ready { epoch: *epoch, plan_digest: *plan_digest },
        Action::SendOpened { epoch } => ToHub::Opened { epoch: *epoch },
        Action::SendLoaded { epoch } => ToHub::Loaded { epoch: *epoch },
        Action::SendFinished { epoch, failure } => {
            ToHub::Finished { epoch: *epoch, failure: failure.clone() }
        }
        Action::SendFailed { epoch, cause } => ToHub::Failed { epoch: *epoch, cause: cause.clone() },
        _ => return None,
    })
}

/// `None` for what is not the update's: session, gathers and what is remembered.
pub(crate) fn to_event(message: ToRank) -> Option<Event> {
    Some(match message {
        ToRank::Begin { epoch, members, communicator } => Event::Begun { epoch, members, communicator },
        ToRank::Go { epoch } => Event::Go { epoch },
        ToRank::AllOpened { epoch } => Event::AllOpened { epoch },
        ToRank::Committed { epoch } => Event::Committed { epoch },
        ToRank::Closed { epoch, failure } => Event::Closed { epoch, failure },
        ToRank::Abort { epoch, cause } => Event::HubAborted { epoch, cause },
        ToRank::Welcome { .. }
        | ToRank::Refused { .. }
        | ToRank::Alive
        | ToRank::Gathered { .. }
        | ToRank::GatherFailed { .. }
        | ToRank::Weights(_)
        | ToRank::Returned { .. } => return None,
    })
}

/// What a rank's worker says when it fails.
pub(crate) fn worker_error(rank: Rank) -> Error {
    Error::new(ErrorKind::Backend, "update", "the worker raised ValueError: shapes differ")
        .with(Key::Rank, rank)
        .with(Key::Worker, format!("HOST-sim-{rank}"))
}

/// What a transport says when its link breaks; `peer` if it can tell.
pub(crate) fn link_error(rank: Rank, peer: Rank) -> Error {
    Error::new(ErrorKind::PeerLost, "broadcast", "the link to a peer broke")
        .with(Key::Rank, rank)
        .with(Key::Peer, peer)
}

pub(crate) fn session_error(what: &str) -> Error {
    Error::new(ErrorKind::PeerLost, "session", what)
}

pub(crate) fn engine_error(rank: Rank) -> Error {
    Error::new(ErrorKind::Backend, "update engine", "the engine answered 500 Internal Server Error")
        .with(Key::Rank, rank)
        .with(Key::Endpoint, "http://localhost:19730")
}
