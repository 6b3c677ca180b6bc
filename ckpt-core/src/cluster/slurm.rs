//! Slurm's variables, as `srun` sets them for each task.

use super::{ClusterEnv, LOOPBACK, Launcher, Numbers, Variables, hub_after, invalid};
use crate::{control::HubAddress, error::Result};

/// Step numbers from here on mean "not a task of srun": the batch script, an interactive shell, an extern step.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;
/// Ports for jobs that name none: each job number has a pair (master, hub), 10,000 of them.
const FIRST_PORT: u32 = 20_000;
const PORT_PAIRS: u32 = 5_000;

/// Whether `srun` started this process. A batch script also has `SLURM_PROCID`, and is one process all the same.
pub(super) fn is_task(variables: &Variables<'_>) -> bool {
    let special = variables
        .get("SLURM_STEP_ID")
        .and_then(|id| id.parse::<u32>().ok())
        .is_some_and(|id| id >= FIRST_SPECIAL_STEP);
    variables.get("SLURM_PROCID").is_some() && !special
}

/// The job's number.
pub(super) fn job_id(variables: &Variables<'_>) -> Option<String> {
    variables.get("SLURM_JOB_ID").or_else(|| variables.get("SLURM_JOBID"))
}

pub(super) fn detect(variables: &Variables<'_>) -> Result<ClusterEnv> {
    let rank = variables.required("SLURM_PROCID", "SLURM_NTASKS")?;
    let world_size = match variables.named("SLURM_STEP_NUM_TASKS")? {
        // The step's own number: SLURM_NTASKS is the allocation's where srun was told another one.
        Some(step) => step,
        None => ("SLURM_NTASKS", variables.required("SLURM_NTASKS", "SLURM_PROCID")?),
    };
    let nodes = ["SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"]
        .into_iter()
        .find_map(|name| variables.number(name).transpose())
        .transpose()?;
    let local_world_size = if nodes == Some(1) { Some(world_size) } else { tasks_on_this_node(variables)? };
    let numbers = Numbers {
        launcher: Launcher::Slurm,
        rank: ("SLURM_PROCID", rank),
        world_size,
        local_rank: variables.named("SLURM_LOCALID")?,
        local_world_size,
    };
    let alone = world_size.1 == 1;
    let hub = match variables.hub()? {
        Some(hub) => hub,
        None => {
            let port = variables.master_port()?;
            match master_host(variables, nodes) {
                Some(host) => hub_after(&host, port.unwrap_or_else(|| master_port_of(variables))),
                None if alone => HubAddress::new(LOOPBACK, 0),
                None => {
                    return Err(invalid(
                        "neither MASTER_ADDR nor SLURM_STEP_NODELIST, SLURM_JOB_NODELIST or SLURM_LAUNCH_NODE_IPADDR \
                         is set; set MASTER_ADDR to rank 0's host",
                    ));
                }
            }
        }
    };
    let job = variables.job(&[job_id(variables)]);
    numbers.place(hub, job)
}

/// Rank 0 runs on the first node of the step. The node of `srun` itself comes last: it may be a login node.
fn master_host(variables: &Variables<'_>, nodes: Option<u32>) -> Option<String> {
    if let Some(host) = variables.get("MASTER_ADDR") {
        return Some(host);
    }
    if nodes == Some(1) {
        return Some(LOOPBACK.to_owned());
    }
    ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"]
        .into_iter()
        .find_map(|name| first_host(&variables.get(name)?))
        .or_else(|| variables.get("SLURM_LAUNCH_NODE_IPADDR"))
}

/// Every rank computes the same port from the job's number, and jobs beside each other differ.
fn master_port_of(variables: &Variables<'_>) -> u16 {
    let number = job_id(variables).and_then(|id| id.parse::<u32>().ok());
    let port = number.map(|id| FIRST_PORT + 2 * (id % PORT_PAIRS));
    // At most 29,998.
    port.and_then(|port| u16::try_from(port).ok()).unwrap_or(super::DEFAULT_MASTER_PORT)
}

/// The first host of a list like `gpu[03-05,9],login1`.
pub(super) fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list.chars();
    while let Some(c) = rest.next() {
        match c {
            ',' => break,
            '[' => {
                let mut skipping = false;
                loop {
                    match rest.next()? {
                        ']' => break,
                        ',' | '-' => skipping = true,
                        digit if !skipping => host.push(digit),
                        _ => {}
                    }
                }
            }
            c => host.push(c),
        }
    }
    (!host.is_empty()).then_some(host)
}

/// From a list like `4(x2),3` and this node's number.
fn tasks_on_this_node(variables: &Variables<'_>) -> Result<Option<(&'static str, u32)>> {
    const NAME: &str = "SLURM_STEP_TASKS_PER_NODE";
    let (Some(list), Some(node)) = (variables.get(NAME), variables.number("SLURM_NODEID")?) else {
        return Ok(None);
    };
    tasks_of_node(&list, node)
        .map(|tasks| Some((NAME, tasks)))
        .ok_or_else(|| invalid(format!("{NAME}={list:?} does not say how many tasks node {node} has")))
}

pub(super) fn tasks_of_node(list: &str, node: u32) -> Option<u32> {
    let mut first = 0_u32;
    for item in list.split(',') {
        let (tasks, repeated) = match item.split_once("(x") {
            Some((tasks, times)) => (tasks, times.strip_suffix(')')?.parse().ok()?),
            None => (item, 1),
        };
        first = first.checked_add(repeated)?;
        if node < first {
            return tasks.trim().parse().ok();
        }
    }
    None
}
