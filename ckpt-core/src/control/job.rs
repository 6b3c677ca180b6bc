//! Joining a job: the hub where this is rank 0, the token where nobody gave one, and the session.

use std::path::{Path, PathBuf};

use twox_hash::XxHash3_64;

use super::{
    server::{Hub, HubOptions},
    session::{Session, SessionConfig},
    token::{PublishedToken, Token, TokenSource},
};
use crate::{
    cluster::{ClusterEnv, TOKEN_VARIABLE},
    control::HubAddress,
    deadlines::Deadlines,
    error::{Error, ErrorKind, Result},
    tls::{self, JobTls},
};

/// What a process must know to join its job.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Its place.
    pub cluster: ClusterEnv,
    /// The job's secret; `None`: made up where all ranks are on one host, an error elsewhere.
    pub token: Option<Token>,
    /// A folder of this user with mode 0700, the same for all ranks of this host.
    pub runtime_dir: PathBuf,
    /// The time limits.
    pub deadlines: Deadlines,
    /// Whether what the ranks say to each other is encrypted ([`crate::tls`]), which all must agree on.
    pub tls: bool,
}

impl JobOptions {
    /// Takes the token from `token_file` if one is given, else from `CKPT_TOKEN`; `CKPT_TLS` says whether there is TLS.
    pub fn detect(
        variable: &dyn Fn(&str) -> Option<String>,
        token_file: Option<&Path>,
        runtime_dir: PathBuf,
        deadlines: Deadlines,
    ) -> Result<Self> {
        let cluster = ClusterEnv::detect(variable)?;
        let named = variable(TOKEN_VARIABLE).filter(|token| !token.is_empty());
        let token = match (token_file, named) {
            (Some(path), _) => Some(Token::from_file(path)?),
            (None, Some(token)) => Some(Token::new(token)?),
            (None, None) => None,
        };
        Ok(Self { cluster, token, runtime_dir, deadlines, tls: tls::is_wanted(variable)? })
    }
}

/// A joined job. On rank 0 the hub lives here: keep it until the last update is over.
#[derive(Debug)]
pub struct Job {
    /// This process's place.
    pub cluster: ClusterEnv,
    /// The connection to the hub.
    pub session: Session,
    hub: Option<Hub>,
    /// What a hub in the place of this one would want to know, were it killed.
    decisions: Option<PathBuf>,
    _token_file: Option<PublishedToken>,
}

impl Job {
    /// Starts the hub on rank 0 and joins it on every rank. Returns when the hub has welcomed this rank; the others may
    /// still be on their way ([`Session::barrier`] waits for them).
    pub async fn join(options: JobOptions) -> Result<Job> {
        let JobOptions { cluster, token, runtime_dir, deadlines, tls } = options;
        if tls {
            // Before anything is waited for: what cannot go well is told at once.
            token.as_ref().map_or_else(tls::check, |token| JobTls::new(token.reveal()).map(drop))?;
        }
        let mut address = cluster.hub.clone();
        let (mut hub, mut token_file, mut kept) = (None, None, None);
        let source = if cluster.rank == 0 {
            let (token, made_up) = match token {
                Some(token) => (token, false),
                None if cluster.is_single_host() && cluster.world_size > 1 => {
                    // A rank 0 that was killed has left its file; the ranks that live on, and their transports, know
                    // that secret.
                    let left = Token::from_file(&token_path(&runtime_dir, &cluster.job, &cluster.hub));
                    (left.or_else(|_| Token::random())?, true)
                }
                None if cluster.is_single_host() => (Token::random()?, false),
                None => return Err(no_token(&cluster)),
            };
            let options = HubOptions {
                address: address.clone(),
                job: cluster.job.clone(),
                token: token.clone(),
                world_size: cluster.world_size,
                deadlines,
                tls,
            };
            let decisions = decisions_path(&runtime_dir, &cluster.job, &cluster.hub);
            let listening = Hub::bind_keeping(options, Some(decisions.clone())).await?;
            kept = Some(decisions);
            if let Some(bound) = listening.address() {
                address.port = bound.port();
            }
            // After the bind: a file is only replaced by the job that owns the port.
            if made_up {
                let path = token_path(&runtime_dir, &cluster.job, &cluster.hub);
                token_file = Some(PublishedToken::new(path, token.clone())?);
            }
            hub = Some(listening);
            TokenSource::Known(token)
        } else {
            match token {
                Some(token) => TokenSource::Known(token),
                None if cluster.is_single_host() => {
                    TokenSource::File(token_path(&runtime_dir, &cluster.job, &cluster.hub))
                }
                None => return Err(no_token(&cluster)),
            }
        };
        let mut config =
            SessionConfig::new(address, &cluster.job, source, cluster.rank, cluster.world_size, deadlines)?;
        config.tls = tls;
        // Rank 0 may not reach itself by the name that others use, so it takes no detour.
        let session = match &hub {
            Some(hub) => Session::in_process(hub, config).await?,
            None => Session::connect(config).await?,
        };
        Ok(Job { cluster, session, hub, decisions: kept, _token_file: token_file })
    }

    /// The hub, on rank 0.
    pub fn hub(&self) -> Option<&Hub> {
        self.hub.as_ref()
    }

    /// Leaves in order; on rank 0 this ends the job for everybody.
    pub async fn leave(self) {
        self.session.close().await;
        if let Some(hub) = self.hub {
            hub.shutdown().await;
            if let Some(Err(error)) = self.decisions.map(std::fs::remove_file)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::debug!(%error, "the list of decisions stays");
            }
        }
    }
}

fn no_token(cluster: &ClusterEnv) -> Error {
    Error::new(
        ErrorKind::ConfigInvalid,
        "join the job",
        format!(
            "the {} ranks run on several hosts and have no token; set the same {TOKEN_VARIABLE} on all of them, or pass \
             --token-file",
            cluster.world_size
        ),
    )
}

/// Job names hold anything; a file's name must not.
fn token_path(runtime_dir: &Path, job: &str, hub: &HubAddress) -> PathBuf {
    runtime_dir.join(format!("token-{:016x}-{}", XxHash3_64::oneshot(job.as_bytes()), hub.port))
}

fn decisions_path(runtime_dir: &Path, job: &str, hub: &HubAddress) -> PathBuf {
    runtime_dir.join(format!("decisions-{:016x}-{}.json", XxHash3_64::oneshot(job.as_bytes()), hub.port))
}
