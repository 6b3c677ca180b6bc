//! The rules that keep an update right, by name, so that a test can take each one away and see a law break.

/// One wait or check of the update machine or of the hub. `docs/mutation.md` says which law breaks without it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// A ring range is written only after the local worker acked what was there.
    WriteAfterAck,
}
