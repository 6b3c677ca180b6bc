//! The transport `hccl`: tokens, forming groups, and what earlier ends left behind.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use ckpt_core::{
    Error, ErrorKind, Result,
    device::DeviceBackend,
    transport::{
        Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
        TransportProvider, endings::Endings,
    },
};

use crate::{
    communicator::{self, HcclGroup, Member, Start},
    config::HcclConfig,
    device::{Acl, AclCell, Npu},
    library::{Hccl, HcclCell, RootInfo},
};

/// Finds and opens HCCL.
#[derive(Debug)]
pub struct HcclProvider {
    config: Result<HcclConfig>,
    acl: AclCell,
    hccl: HcclCell,
}

impl HcclProvider {
    /// A provider that looks where `config` says, on the runtime that the devices use.
    pub fn new(config: Result<HcclConfig>, acl: AclCell) -> Self {
        Self { config, acl, hccl: HcclCell::default() }
    }

    /// The ACL runtime first: HCCL cannot be opened without it.
    fn libraries(&self) -> Result<(Arc<Acl>, Arc<Hccl>, HcclConfig)> {
        let config = self.config.clone()?;
        let acl = self.acl.acl(&config)?;
        let hccl = self.hccl.hccl(&config, &acl)?;
        Ok((acl, hccl, config))
    }

    /// The same as [`TransportProvider::open`] with its own type.
    pub fn open_hccl(&self, device: &Arc<dyn DeviceBackend>) -> Result<HcclTransport> {
        if device.kind() != "ascend" {
            let message = format!(
                "HCCL moves NPU memory only; this rank's device is `{}`: use --device ascend",
                device.kind()
            );
            return Err(Error::new(ErrorKind::ConfigInvalid, "open HCCL", message));
        }
        let (acl, hccl, config) = self.libraries()?;
        let npu = acl.find(&device.info().uuid)?;
        Ok(HcclTransport { hccl, npu, device: device.clone(), config, endings: Arc::default() })
    }
}

impl TransportProvider for HcclProvider {
    fn name(&self) -> &'static str {
        "hccl"
    }

    fn probe(&self) -> Probe {
        let look = || -> Result<String> {
            let (acl, hccl, _) = self.libraries()?;
            match acl.device_count()? {
                0 => Err(Error::new(ErrorKind::Unavailable, "open HCCL", "no NPU is visible")),
                count => Ok(format!("HCCL ({}), {}, {count} NPU(s)", hccl.path().display(), acl.describe())),
            }
        };
        match look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        Ok(Arc::new(self.open_hccl(&config.device)?))
    }
}

/// HCCL on one NPU.
#[derive(Debug)]
pub struct HcclTransport {
    hccl: Arc<Hccl>,
    npu: Arc<Npu>,
    device: Arc<dyn DeviceBackend>,
    config: HcclConfig,
    endings: Arc<Endings>,
}

impl HcclTransport {
    /// [`Collective::join`] with its own type, which also gathers, waits for all, and forms subgroups.
    pub async fn join_group(&self, group: GroupSpec, deadline: Instant) -> Result<HcclGroup> {
        let root = decode_token(&group.token)?;
        if group.rank >= group.world_size {
            let message = format!("rank {} is not in a group of {}", group.rank, group.world_size);
            return Err(Error::new(ErrorKind::Internal, "join an HCCL group", message));
        }
        self.endings.settle(deadline).await?;
        let member = Member {
            hccl: self.hccl.clone(),
            npu: self.npu.clone(),
            device: self.device.clone(),
            config: self.config.clone(),
            endings: self.endings.clone(),
            rank: group.rank,
            world_size: group.world_size,
        };
        communicator::join(member, Start::Root(root), deadline).await
    }
}

impl Transport for HcclTransport {
    fn name(&self) -> &'static str {
        "hccl"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: true,
            one_sided: false,
            one_sided_write: false,
            across_processes: true,
            across_hosts: true,
            encrypts: false,
            devices: &["ascend"],
        }
    }

    fn collective(&self) -> Option<&dyn Collective> {
        Some(self)
    }

    fn one_sided(&self) -> Option<&dyn OneSided> {
        None
    }
}

#[async_trait]
impl Collective for HcclTransport {
    async fn create_token(&self) -> Result<Bytes> {
        const OPERATION: &str = "make an HCCL root info";
        let (hccl, npu) = (self.hccl.clone(), self.npu.clone());
        // HCCL opens a listening socket here, and may look around the network before.
        let made = tokio::task::spawn_blocking(move || {
            let _bound = npu.bind()?;
            let mut info = Box::new(RootInfo([0; 4108]));
            // SAFETY: writes 4108 bytes.
            let code = unsafe { (hccl.functions.root_info)(&mut *info) };
            hccl.check(OPERATION, "HcclGetRootInfo", code)?;
            Ok(encode_token(&info))
        });
        match tokio::time::timeout(Duration::from_secs(30), made).await {
            Ok(Ok(token)) => token,
            Ok(Err(join)) => Err(Error::new(ErrorKind::Internal, OPERATION, join.to_string())),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                OPERATION,
                "HCCL has not answered for 30 s; check HCCL_IF_IP and HCCL_SOCKET_IFNAME",
            )),
        }
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        Ok(self.join_group(group, deadline).await?.into_communicator())
    }
}

const TOKEN_MAGIC: &[u8; 4] = b"hccl";

fn encode_token(info: &RootInfo) -> Bytes {
    [&TOKEN_MAGIC[..], &info.0].concat().into()
}

fn decode_token(token: &[u8]) -> Result<Box<RootInfo>> {
    let info = token.strip_prefix(TOKEN_MAGIC).and_then(|rest| <[u8; 4108]>::try_from(rest).ok());
    info.map(|info| Box::new(RootInfo(info))).ok_or_else(|| {
        let message = format!("the token ({} bytes) is not one of HCCL's", token.len());
        Error::new(ErrorKind::Corrupt, "join an HCCL group", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_a_fixed_form_and_others_are_refused() {
        let token = encode_token(&RootInfo([7; 4108]));
        assert_eq!((&token[..4], token.len()), (&b"hccl"[..], 4112));
        assert_eq!(decode_token(&token).unwrap().0, [7; 4108]);
        for foreign in [&token[..4111], b"nccl", b""] {
            assert_eq!(decode_token(foreign).map(|_| ()).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
