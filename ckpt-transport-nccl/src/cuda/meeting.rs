//! What the members of a group tell each other while it forms.

use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result,
    transport::{
        GroupSpec,
        tcp::{Heard, Messenger, Talk},
    },
};
use serde::{Deserialize, Serialize};

use crate::ipc::FailUnlessDone;

const OPERATION: &str = "join a group";

/// From one member to another. All speak in the same order, so that nobody is told what it does not expect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Word {
    /// Where the sender is, and why it has no NCCL if it has none.
    Here { host: u64, no_nccl: Option<Error> },
    /// A part's token, from its first member.
    Token(Bytes),
    /// A step is done; or why it cannot be done this way.
    Done(Option<Error>),
}

/// The members of one group, before they have it. One that gives up ends it for all.
pub(super) struct Meeting {
    talk: Talk,
    heard: Heard<Word>,
    /// By member: said and not yet listened to; `None` comes last, from one who has left.
    said: Vec<VecDeque<Option<Word>>>,
    deadline: Instant,
    unfinished: FailUnlessDone,
}

impl Meeting {
    pub(super) async fn join(messenger: &Messenger, spec: &GroupSpec, deadline: Instant) -> Result<Self> {
        let (talk, heard) = messenger.join(spec, &[], deadline).await?;
        let said = (0..spec.world_size).map(|_| VecDeque::new()).collect();
        let unfinished = FailUnlessDone::new(talk.clone());
        Ok(Self { talk, heard, said, deadline, unfinished })
    }

    /// The way to end it while it is in use.
    pub(super) fn talk(&self) -> Talk {
        self.talk.clone()
    }

    /// Leaves the others in peace: each has said its last word.
    pub(super) fn end(self) {
        self.unfinished.done();
    }

    pub(super) fn tell(&self, members: impl IntoIterator<Item = u32>, word: &Word) -> Result<()> {
        let mut others = members.into_iter().filter(|member| *member != self.talk.rank());
        others.try_for_each(|member| self.talk.send(member, word))
    }

    /// The next word of `member`.
    async fn hear(&mut self, member: u32) -> Result<Word> {
        loop {
            match self.said.get_mut(member as usize).and_then(VecDeque::pop_front) {
                Some(Some(word)) => return Ok(word),
                Some(None) => return Err(self.talk.lost(member).await),
                None => {}
            }
            let next = tokio::time::timeout_at(self.deadline.into(), self.heard.next()).await;
            let (from, word) = next.map_err(|_| {
                let message = format!("member {member} was not so far by the deadline");
                Error::new(ErrorKind::Timeout, OPERATION, message)
            })?;
            if let Some(said) = self.said.get_mut(from as usize) {
                said.push_back(word.transpose()?);
            }
        }
    }

    /// Tells all others `own`, and answers everybody's word in the order of members.
    pub(super) async fn all(&mut self, own: Word) -> Result<Vec<Word>> {
        let members = 0..self.talk.world_size();
        self.tell(members.clone(), &own)?;
        let mut words = Vec::new();
        for member in members {
            words.push(if member == self.talk.rank() { own.clone() } else { self.hear(member).await? });
        }
        Ok(words)
    }

    /// The same for the end of a step: the first reason why it cannot be done this way.
    pub(super) async fn done(&mut self, own: Option<Error>) -> Result<Option<Error>> {
        let own = own.map(|error| error.flattened());
        let words = self.all(Word::Done(own)).await?;
        let reasons = words.into_iter().map(|word| match word {
            Word::Done(reason) => Ok(reason),
            _ => Err(out_of_order()),
        });
        Ok(reasons.collect::<Result<Vec<_>>>()?.into_iter().flatten().next())
    }

    /// The token of a part whose members are `members`: the first one makes it and tells the others.
    pub(super) async fn token(
        &mut self,
        members: &[u32],
        make: impl Future<Output = Result<Bytes>>,
    ) -> Result<Bytes> {
        match members.first() {
            Some(first) if *first != self.talk.rank() => match self.hear(*first).await? {
                Word::Token(token) => Ok(token),
                _ => Err(out_of_order()),
            },
            _ => {
                let token = make.await?;
                self.tell(members.iter().copied(), &Word::Token(token.clone()))?;
                Ok(token)
            }
        }
    }
}

pub(super) fn out_of_order() -> Error {
    Error::new(
        ErrorKind::Corrupt,
        OPERATION,
        "a member spoke out of turn; run one version of ckpt on all ranks",
    )
}
