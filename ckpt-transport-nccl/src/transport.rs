//! The transport `nccl`: tokens, forming groups, and what earlier aborts left behind.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use ckpt_core::{
    Error, ErrorKind, Result,
    device::{DeviceBackend, RawStream},
    transport::{
        Capability, Collective, Communicator, GroupSpec, OneSided, Probe, Transport, TransportConfig,
        TransportProvider, endings::Endings,
    },
};

use crate::{
    communicator,
    config::NcclConfig,
    device::{Context, Driver, DriverCell},
    library::{Nccl, UniqueId, version_text},
};

/// Finds and opens NCCL.
#[derive(Debug)]
pub struct NcclProvider {
    driver: DriverCell,
    config: Result<NcclConfig>,
    nccl: OnceLock<Result<Arc<Nccl>>>,
}

impl NcclProvider {
    /// A provider with the settings of the environment, on the driver that the CUDA devices use.
    pub fn new(driver: DriverCell) -> Self {
        Self { driver, config: NcclConfig::from_env(), nccl: OnceLock::new() }
    }

    /// The same with `config`.
    pub fn with_config(driver: DriverCell, config: NcclConfig) -> Self {
        Self { driver, config: Ok(config), nccl: OnceLock::new() }
    }

    #[cfg(test)]
    pub(crate) fn with_libraries(driver: DriverCell, nccl: Arc<Nccl>, config: NcclConfig) -> Self {
        Self { driver, config: Ok(config), nccl: OnceLock::from(Ok(nccl)) }
    }

    fn nccl(&self) -> Result<Arc<Nccl>> {
        let config = self.config.clone()?;
        self.nccl.get_or_init(|| Nccl::load(&config)).clone()
    }
}

impl TransportProvider for NcclProvider {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn probe(&self) -> Probe {
        let look = || -> Result<String> {
            let nccl = self.nccl()?;
            let driver = self.driver.driver()?;
            if driver.device_count()? == 0 {
                return Err(Error::new(ErrorKind::Unavailable, "open NCCL", "no CUDA device is visible"));
            }
            let (version, path) = (nccl.version_text(), nccl.path().display());
            Ok(format!("NCCL {version} ({path}), CUDA {} driver", driver.version_text()))
        };
        match look() {
            Ok(found) => Probe::Available(found),
            Err(error) => Probe::Unavailable(error.to_string()),
        }
    }

    fn open(&self, config: &TransportConfig) -> Result<Arc<dyn Transport>> {
        if config.device.kind() != "cuda" {
            return Err(Error::new(
                ErrorKind::ConfigInvalid,
                "open NCCL",
                format!(
                    "NCCL moves CUDA memory only; this rank's device is `{}`: use --device cuda",
                    config.device.kind()
                ),
            ));
        }
        Ok(Arc::new(NcclTransport {
            nccl: self.nccl()?,
            driver: self.driver.driver()?,
            device: config.device.clone(),
            config: self.config.clone()?,
            aborts: Arc::default(),
        }))
    }
}

/// NCCL on one CUDA device.
#[derive(Debug)]
pub struct NcclTransport {
    nccl: Arc<Nccl>,
    driver: Arc<Driver>,
    device: Arc<dyn DeviceBackend>,
    config: NcclConfig,
    aborts: Arc<Endings>,
}

impl Transport for NcclTransport {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn capability(&self) -> Capability {
        Capability {
            collective: true,
            one_sided: false,
            one_sided_write: false,
            across_processes: true,
            across_hosts: true,
            encrypts: false,
            devices: &["cuda"],
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
impl Collective for NcclTransport {
    async fn create_token(&self) -> Result<Bytes> {
        let nccl = self.nccl.clone();
        // NCCL opens a listening socket here, and may look around the network before.
        let made = tokio::task::spawn_blocking(move || {
            let mut id = UniqueId([0; 128]);
            // SAFETY: writes 128 bytes.
            nccl.check("make an NCCL unique id", 0, unsafe { (nccl.functions.unique_id)(&mut id) })?;
            Ok(encode_token(nccl.version, &id))
        });
        match tokio::time::timeout(Duration::from_secs(30), made).await {
            Ok(Ok(token)) => token,
            Ok(Err(join)) => Err(Error::new(ErrorKind::Internal, "make an NCCL unique id", join.to_string())),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                "make an NCCL unique id",
                "NCCL has not answered for 30 s; check NCCL_SOCKET_IFNAME",
            )),
        }
    }

    async fn join(&self, group: GroupSpec, deadline: Instant) -> Result<Communicator> {
        let id = decode_token(&group.token, self.nccl.version)?;
        if group.rank >= group.world_size || group.world_size > i32::MAX as u32 {
            return Err(Error::new(
                ErrorKind::Internal,
                "join an NCCL group",
                format!("rank {} is not in a group of {}", group.rank, group.world_size),
            ));
        }
        self.aborts.settle(deadline).await?;
        let stream = self.device.stream("nccl warm-up")?;
        let RawStream::Cuda(raw) = stream.raw() else {
            return Err(Error::new(
                ErrorKind::Internal,
                "join an NCCL group",
                "the device's streams are not CUDA's",
            ));
        };
        let context = Context::of_stream(self.driver.clone(), raw)?;
        let member = communicator::Member {
            nccl: self.nccl.clone(),
            context,
            device: self.device.clone(),
            config: self.config.clone(),
            aborts: self.aborts.clone(),
            id,
            rank: group.rank,
            world_size: group.world_size,
        };
        communicator::join(member, stream, deadline).await
    }
}

const TOKEN_MAGIC: &[u8; 4] = b"nccl";

/// Magic, NCCL's version, the unique id: members with different versions are told so instead of hanging.
fn encode_token(version: i32, id: &UniqueId) -> Bytes {
    let mut token = BytesMut::with_capacity(136);
    token.put_slice(TOKEN_MAGIC);
    token.put_i32_le(version);
    token.put_slice(&id.0);
    token.freeze()
}

fn decode_token(token: &[u8], own_version: i32) -> Result<UniqueId> {
    let refuse = |kind, message: String| Err(Error::new(kind, "join an NCCL group", message));
    let Some((version, id)) = token
        .strip_prefix(TOKEN_MAGIC)
        .and_then(|rest| rest.split_first_chunk::<4>())
        .and_then(|(version, id)| Some((i32::from_le_bytes(*version), <[u8; 128]>::try_from(id).ok()?)))
    else {
        return refuse(ErrorKind::Corrupt, format!("the token ({} bytes) is not one of NCCL's", token.len()));
    };
    if version != own_version {
        return refuse(
            ErrorKind::ConfigInvalid,
            format!(
                "rank 0 of the group has NCCL {}, this rank {}; install one version everywhere or set CKPT_NCCL_LIBRARY",
                version_text(version),
                version_text(own_version)
            ),
        );
    }
    Ok(UniqueId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_a_fixed_form() {
        let token = encode_token(22809, &UniqueId([7; 128]));
        assert_eq!(&token[..8], b"nccl\x19\x59\x00\x00");
        assert_eq!(&token[8..], [7; 128]);
        assert_eq!(decode_token(&token, 22809).unwrap().0, [7; 128]);
    }

    #[test]
    fn a_foreign_token_and_another_version_are_told_apart() {
        let refused = |token: &[u8], version| decode_token(token, version).map(|id| id.0).unwrap_err();
        assert_eq!(refused(b"tcp!", 22809).kind(), ErrorKind::Corrupt);
        assert_eq!(
            refused(&encode_token(22809, &UniqueId([0; 128]))[..135], 22809).kind(),
            ErrorKind::Corrupt
        );
        let error = refused(&encode_token(22809, &UniqueId([0; 128])), 21805);
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        assert!(error.to_string().contains("2.28.9") && error.to_string().contains("2.18.5"), "{error}");
    }
}
