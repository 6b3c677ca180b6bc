//! Which rank this process is, as torchrun, Open MPI or Slurm say it through environment variables.
//!
//! The first of these that is there decides: torchrun's `RANK`, Open MPI's `OMPI_COMM_WORLD_RANK`, Slurm's
//! `SLURM_PROCID`; without any, the process is alone. So torchrun inside `srun`, and `mpirun` inside a Slurm batch
//! script, mean what the inner launcher says.

mod slurm;

use std::fmt;

use serde::Serialize;

use crate::{
    control::HubAddress,
    error::{Error, ErrorKind, Result},
    types::Rank,
};

/// Overrides where the hub listens, `host:port`.
pub const HUB_ADDRESS_VARIABLE: &str = "CKPT_HUB_ADDRESS";
/// Names the job.
pub const JOB_VARIABLE: &str = "CKPT_JOB";
/// The job's secret.
pub const TOKEN_VARIABLE: &str = "CKPT_TOKEN";

/// Torch's default, for launchers that give no port.
const DEFAULT_MASTER_PORT: u16 = 29500;
const LOOPBACK: &str = "127.0.0.1";

/// Who started the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Launcher {
    /// torchrun, `ckpt launch`, or anything else that sets `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// Nobody: one process alone.
    Single,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "torchrun variables",
            Launcher::OpenMpi => "Open MPI",
            Launcher::Slurm => "Slurm",
            Launcher::Single => "a single process",
        })
    }
}

/// This process's place in its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterEnv {
    /// Whose variables were used.
    pub launcher: Launcher,
    /// This process.
    pub rank: Rank,
    /// Processes of the job.
    pub world_size: u32,
    /// This process among those on its host. Without a variable that says so it is `rank` modulo
    /// `local_world_size`, or `rank` if that is unknown too.
    pub local_rank: u32,
    /// Processes of the job on this host, if known.
    pub local_world_size: Option<u32>,
    /// Where rank 0's hub listens: `MASTER_ADDR` and `MASTER_PORT + 1` unless [`HUB_ADDRESS_VARIABLE`] says otherwise.
    /// Port 0 for a single process.
    pub hub: HubAddress,
    /// The job's name, the same on all ranks.
    pub job: String,
}

impl ClusterEnv {
    /// From this process's environment.
    pub fn from_process() -> Result<Self> {
        Self::detect(&|name| std::env::var(name).ok())
    }

    /// From any environment. An empty variable counts as unset. Every error names the variable to change.
    pub fn detect(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let variables = Variables(variable);
        if variables.get("RANK").is_some() || variables.get("WORLD_SIZE").is_some() {
            torchrun(&variables)
        } else if variables.get("OMPI_COMM_WORLD_RANK").is_some()
            || variables.get("OMPI_COMM_WORLD_SIZE").is_some()
        {
            open_mpi(&variables)
        } else if slurm::is_task(&variables) {
            slurm::detect(&variables)
        } else {
            single(&variables)
        }
    }

    /// Whether all ranks run on this host, as far as the variables tell.
    pub fn is_single_host(&self) -> bool {
        self.world_size == 1 || self.hub.is_loopback() || self.local_world_size == Some(self.world_size)
    }
}

/// The four numbers that every launcher gives, before they were checked.
struct Numbers {
    launcher: Launcher,
    rank: (&'static str, u32),
    world_size: (&'static str, u32),
    local_rank: Option<(&'static str, u32)>,
    local_world_size: Option<(&'static str, u32)>,
}

impl Numbers {
    fn place(self, hub: HubAddress, job: String) -> Result<ClusterEnv> {
        let (rank_name, rank) = self.rank;
        let (world_name, world_size) = self.world_size;
        if world_size == 0 {
            return Err(invalid(format!("{world_name} is 0; a job has at least one rank")));
        }
        if rank >= world_size {
            return Err(invalid(format!("{rank_name}={rank} is not below {world_name}={world_size}")));
        }
        if let Some((name, local)) = self.local_world_size {
            if local == 0 || local > world_size {
                return Err(invalid(format!("{name}={local} does not fit {world_name}={world_size}")));
            }
            if let Some((local_name, local_rank)) = self.local_rank
                && local_rank >= local
            {
                return Err(invalid(format!("{local_name}={local_rank} is not below {name}={local}")));
            }
        }
        if let Some((name, local_rank)) = self.local_rank
            && local_rank > rank
        {
            return Err(invalid(format!(
                "{name}={local_rank} is above {rank_name}={rank}; one of them is wrong"
            )));
        }
        let local_world_size = self.local_world_size.map(|(_, size)| size);
        let derived = || local_world_size.map_or(rank, |size| rank % size);
        Ok(ClusterEnv {
            launcher: self.launcher,
            rank,
            world_size,
            local_rank: self.local_rank.map_or_else(derived, |(_, local_rank)| local_rank),
            local_world_size,
            hub,
            job,
        })
    }
}

fn torchrun(variables: &Variables<'_>) -> Result<ClusterEnv> {
    let numbers = Numbers {
        launcher: Launcher::Torchrun,
        rank: ("RANK", variables.required("RANK", "WORLD_SIZE")?),
        world_size: ("WORLD_SIZE", variables.required("WORLD_SIZE", "RANK")?),
        local_rank: variables.named("LOCAL_RANK")?,
        local_world_size: variables.named("LOCAL_WORLD_SIZE")?,
    };
    let alone = numbers.world_size.1 == 1;
    let hub = match variables.hub()? {
        Some(hub) => hub,
        None => match (variables.get("MASTER_ADDR"), variables.master_port()?) {
            (Some(host), Some(port)) => hub_after(&host, port),
            _ if alone => HubAddress::new(LOOPBACK, 0),
            (None, _) => return Err(missing("MASTER_ADDR", "RANK and WORLD_SIZE are", "rank 0's host")),
            (Some(_), None) => {
                return Err(missing(
                    "MASTER_PORT",
                    "MASTER_ADDR is",
                    "a free port below 65535 on rank 0's host",
                ));
            }
        },
    };
    // torchrun calls a run without a name "none".
    let run = variables.get("TORCHELASTIC_RUN_ID").filter(|id| id != "none");
    let job = variables.job(&[run, slurm::job_id(variables)]);
    numbers.place(hub, job)
}

fn open_mpi(variables: &Variables<'_>) -> Result<ClusterEnv> {
    let numbers = Numbers {
        launcher: Launcher::OpenMpi,
        rank: ("OMPI_COMM_WORLD_RANK", variables.required("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?),
        world_size: (
            "OMPI_COMM_WORLD_SIZE",
            variables.required("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")?,
        ),
        local_rank: variables.named("OMPI_COMM_WORLD_LOCAL_RANK")?,
        local_world_size: variables.named("OMPI_COMM_WORLD_LOCAL_SIZE")?,
    };
    let world_size = numbers.world_size.1;
    let one_host = numbers.local_world_size.is_some_and(|(_, local)| local == world_size);
    let hub = match variables.hub()? {
        Some(hub) => hub,
        None => {
            let port = variables.master_port()?;
            match variables.get("MASTER_ADDR") {
                Some(host) => hub_after(&host, port.unwrap_or(DEFAULT_MASTER_PORT)),
                None if world_size == 1 => HubAddress::new(LOOPBACK, 0),
                None if one_host => hub_after(LOOPBACK, port.unwrap_or(DEFAULT_MASTER_PORT)),
                None => {
                    return Err(invalid(
                        "Open MPI does not say where rank 0 runs; pass mpirun -x MASTER_ADDR=<rank 0's host> \
                         -x MASTER_PORT=<a free port there>",
                    ));
                }
            }
        }
    };
    // Unique per `mpirun`, the same on all of its ranks.
    let job = variables.job(&[slurm::job_id(variables), variables.get("PMIX_NAMESPACE")]);
    numbers.place(hub, job)
}

fn single(variables: &Variables<'_>) -> Result<ClusterEnv> {
    for name in ["LOCAL_RANK", "LOCAL_WORLD_SIZE"] {
        if variables.get(name).is_some() {
            return Err(missing(
                "RANK and WORLD_SIZE",
                &format!("{name} is"),
                "this process's place in the job",
            ));
        }
    }
    let numbers = Numbers {
        launcher: Launcher::Single,
        rank: ("RANK", 0),
        world_size: ("WORLD_SIZE", 1),
        local_rank: None,
        local_world_size: Some(("LOCAL_WORLD_SIZE", 1)),
    };
    let hub = variables.hub()?.unwrap_or_else(|| HubAddress::new(LOOPBACK, 0));
    numbers.place(hub, variables.job(&[]))
}

/// An environment, with this module's way of complaining.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<u32>> {
        let Some(text) = self.get(name) else { return Ok(None) };
        let number = text.parse().map_err(|_| invalid(format!("{name}={text:?} is not a whole number")))?;
        Ok(Some(number))
    }

    fn named(&self, name: &'static str) -> Result<Option<(&'static str, u32)>> {
        Ok(self.number(name)?.map(|number| (name, number)))
    }

    fn required(&self, name: &str, other: &str) -> Result<u32> {
        self.number(name)?.ok_or_else(|| {
            invalid(format!("{other} is set and {name} is not; set both, or neither for a single process"))
        })
    }

    fn hub(&self) -> Result<Option<HubAddress>> {
        self.get(HUB_ADDRESS_VARIABLE)
            .map(|text| {
                text.parse().map_err(|_| {
                    invalid(format!("{HUB_ADDRESS_VARIABLE}={text:?} is not host:port of rank 0's host"))
                })
            })
            .transpose()
    }

    fn master_port(&self) -> Result<Option<u16>> {
        let Some(text) = self.get("MASTER_PORT") else { return Ok(None) };
        match text.parse() {
            // The hub takes the next port.
            Ok(port @ 1..=65534) => Ok(Some(port)),
            _ => Err(invalid(format!("MASTER_PORT={text:?} is not a port from 1 to 65534"))),
        }
    }

    fn job(&self, candidates: &[Option<String>]) -> String {
        let named = self.get(JOB_VARIABLE);
        let found = named.or_else(|| candidates.iter().flatten().next().cloned());
        found.unwrap_or_else(|| "default".to_owned())
    }
}

fn hub_after(host: &str, master_port: u16) -> HubAddress {
    // `master_port` was checked to be below the last port.
    HubAddress::new(host, master_port.saturating_add(1))
}

fn missing(name: &str, set: &str, what: &str) -> Error {
    invalid(format!("{set} set and {name} is not; set it to {what}"))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::ConfigInvalid, "find this rank's place in the job", message)
}

#[cfg(test)]
mod tests;
