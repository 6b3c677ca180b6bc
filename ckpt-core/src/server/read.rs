//! Bytes of other ranks' memory for whoever wants them outside of an update.

use std::{sync::Arc, time::Instant};

use super::ParameterServer;
use crate::{
    device::{BufferSlice, Event},
    error::{Error, ErrorKind, Key, Result},
    transport::{ReadOp, RemoteRegion},
    types::Rank,
    update::pull::regions_of,
};

const OPERATION: &str = "read a rank's memory";

impl ParameterServer {
    /// Starts to read from `owner`, a rank of the metas that were gathered or loaded last: for each piece the bytes from an
    /// address in the owner's memory on, as those metas give it. They are here once the event is done. As in an update,
    /// the owner's code does not notice, and a read fails if the owner has let go of the memory.
    pub fn read(&self, owner: Rank, pieces: Vec<(u64, BufferSlice)>, deadline: Instant) -> Result<Event> {
        let fail = |kind, message: &str| Error::new(kind, OPERATION, message).with(Key::Peer, owner);
        let known = self
            .latest
            .as_ref()
            .ok_or_else(|| fail(ErrorKind::ConfigInvalid, "there are no metas: gather or load them first"))?;
        let metas = known.metas.ranks.get(&owner).ok_or_else(|| {
            fail(ErrorKind::ConfigInvalid, "the metas name no such rank that holds anything")
        })?;
        let one_sided = self.reader.one_sided().ok_or_else(|| {
            let message = format!("transport `{}` cannot read other ranks' memory", self.reader.name());
            fail(ErrorKind::Unsupported, &message)
        })?;
        let regions: Vec<Arc<RemoteRegion>> =
            regions_of(metas, self.reader.name())?.into_iter().map(Arc::new).collect();
        let place = |(address, into): (u64, BufferSlice)| {
            let holds = |region: &&Arc<RemoteRegion>| {
                let offset = address.checked_sub(region.address);
                let end = offset.and_then(|offset| offset.checked_add(into.len_bytes()));
                end.is_some_and(|end| end <= region.len_bytes)
            };
            let region = regions.iter().find(holds).cloned().ok_or_else(|| {
                let message = format!("{} bytes at {address:#x} are not in its checkpoint", into.len_bytes());
                fail(ErrorKind::ConfigInvalid, &message)
            })?;
            Ok(ReadOp { offset: address - region.address, region, into })
        };
        one_sided.post_read(pieces.into_iter().map(place).collect::<Result<_>>()?, deadline)
    }
}
