//! Launcher, hub and ports.

use std::net::{TcpListener, ToSocketAddrs};

use ckpt_core::cluster::ClusterEnv;

use super::Finding;

const AREA: &str = "network";
/// torchrun's; the hub takes the one after it.
const MASTER_PORT: u16 = 29_500;

pub(super) fn look(env: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    let mut findings = vec![loopback()];
    let cluster = match ClusterEnv::detect(env) {
        Ok(cluster) => cluster,
        Err(error) => {
            findings.push(Finding::error(
                AREA,
                "launcher",
                error.to_string(),
                "start the ranks with torchrun, srun, mpirun or `ckpt launch`",
            ));
            return findings;
        }
    };
    let detail = format!("{}: rank {} of {}", cluster.launcher, cluster.rank, cluster.world_size);
    findings.push(Finding::ok(AREA, "launcher", detail));
    let single = cluster.hub.port == 0;
    let (host, port) = match single {
        true => ("127.0.0.1".to_owned(), MASTER_PORT + 1),
        false => (cluster.hub.host.clone(), cluster.hub.port),
    };
    match (host.as_str(), port).to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(address)) => findings.push(Finding::ok(AREA, "hub address", address.to_string())),
        _ => {
            let fix = "set MASTER_ADDR to an address that every host can reach";
            findings.push(Finding::error(AREA, "hub address", format!("{host} is no known name"), fix));
        }
    }
    // Only rank 0 listens there.
    if cluster.rank == 0 {
        findings.push(port_finding(port, single));
    }
    if !cluster.is_single_host() && env("CKPT_TOKEN").is_none_or(|token| token.is_empty()) {
        let fix = "set CKPT_TOKEN to the same secret on every host, or use --token-file";
        findings.push(Finding::warning(AREA, "secret", "CKPT_TOKEN is not set", fix));
    }
    findings
}

fn loopback() -> Finding {
    match TcpListener::bind(("127.0.0.1", 0)) {
        Ok(_) => Finding::ok(AREA, "loopback", "works"),
        Err(error) => {
            Finding::error(AREA, "loopback", error.to_string(), "bring the interface up: ip link set lo up")
        }
    }
}

/// Whether the hub could listen; where no job is described, the port that torchrun's default leads to.
fn port_finding(port: u16, single: bool) -> Finding {
    let name = format!("port {port}");
    match TcpListener::bind(("0.0.0.0", port)) {
        Ok(_) => Finding::ok(AREA, name, "free for the hub"),
        Err(error) => {
            let fix = "another job is there, or you may not listen: choose another MASTER_PORT";
            let detail = format!("cannot be listened on: {error}");
            match single {
                true => Finding::warning(AREA, name, detail, fix),
                false => Finding::error(AREA, name, detail, fix),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::doctor::Verdict;

    fn of(variables: &[(&str, &str)]) -> Vec<Finding> {
        look(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn a_job_without_an_address_or_a_secret_is_told() {
        let job = [("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
        let named = |host| [&job[..], &[("MASTER_ADDR", host), ("MASTER_PORT", "29400")]].concat();
        let findings = of(&named("no-such-host.invalid"));
        let worst = findings.iter().max_by_key(|finding| finding.verdict).unwrap();
        assert_eq!((worst.verdict, worst.name.as_str()), (Verdict::Error, "hub address"));
        let findings = of(&named("198.51.100.7"));
        assert!(findings.iter().any(|f| f.name == "secret" && f.verdict == Verdict::Warning), "{findings:?}");
        assert!(of(&[("RANK", "5"), ("WORLD_SIZE", "2")]).iter().any(|f| f.verdict == Verdict::Error));
    }

    #[test]
    fn a_taken_port_is_told() {
        let taken = TcpListener::bind(("0.0.0.0", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_eq!(port_finding(port, false).verdict, Verdict::Error);
        assert_eq!(port_finding(port, true).verdict, Verdict::Warning);
    }
}
