//! Joining a job from an environment: who starts the hub, and where the token comes from.

use std::{fs, path::Path};

use ckpt_core::{
    ErrorKind,
    control::{Job, JobOptions, Token},
    deadlines::Deadlines,
};
use futures_util::future::join_all;
use tokio::net::TcpSocket;

use crate::support::*;

type Variables = Vec<(&'static str, String)>;

fn variables(rank: u32, world_size: u32, host: &str, port: u16) -> Variables {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", world_size.to_string()),
        ("MASTER_ADDR", host.to_owned()),
        ("MASTER_PORT", port.to_string()),
    ]
}

fn options(
    variables: &Variables,
    file: Option<&Path>,
    dir: &Path,
    deadlines: Deadlines,
) -> ckpt_core::Result<JobOptions> {
    let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    JobOptions::detect(&get, file, dir.to_owned(), deadlines)
}

/// A master port whose successor nobody else gets; the sockets keep it.
fn master_port() -> (u16, TcpSocket) {
    loop {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let hub = socket.local_addr().unwrap().port();
        if hub > 1 {
            return (hub - 1, socket);
        }
    }
}

#[tokio::test]
async fn ranks_on_one_host_need_no_token_even_beside_an_old_file() {
    let dir = tempfile::tempdir().unwrap();
    let (port, _reserved) = master_port();
    for round in 0..3 {
        let join = |rank: u32| {
            let variables = variables(rank, 3, "127.0.0.1", port);
            let options = options(&variables, None, dir.path(), patient()).unwrap();
            async move {
                if rank == 0 {
                    // The others come first and find no file, or that of the last round.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Job::join(options).await.unwrap()
            }
        };
        let jobs = join_all((0..3).map(join)).await;
        assert_eq!(jobs.iter().filter(|job| job.hub().is_some()).count(), 1);
        let sessions: Vec<_> = jobs.iter().map(|job| job.session.clone()).collect();
        assert_healthy(&sessions, "all").await;
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        drop(sessions);
        for job in jobs.into_iter().rev() {
            job.leave().await;
        }
        assert!(!file.exists(), "rank 0 takes its token along");
        // As after a kill -9: the next round starts beside this.
        Token::new(format!("stale-{round}")).unwrap().write_to(&file).unwrap();
    }
}

#[tokio::test]
async fn a_given_token_is_used_and_several_hosts_need_one() {
    let dir = tempfile::tempdir().unwrap();
    let far = variables(1, 2, "192.0.2.1", 29500);
    let error = Job::join(options(&far, None, dir.path(), patient()).unwrap()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    let text = error.to_string();
    assert!(
        text.contains("CKPT_TOKEN") && text.contains("--token-file") && text.contains("several hosts"),
        "{text}"
    );

    let (port, _reserved) = master_port();
    let file = dir.path().join("secret");
    token().write_to(&file).unwrap();
    let with_file = options(&variables(0, 2, "127.0.0.1", port), Some(&file), dir.path(), patient()).unwrap();
    let mut named = variables(1, 2, "127.0.0.1", port);
    named.push(("CKPT_TOKEN", "the job's secret".into()));
    let with_variable = options(&named, None, dir.path(), patient()).unwrap();
    let (zero, one) = tokio::join!(Job::join(with_file), Job::join(with_variable));
    let (zero, one) = (zero.unwrap(), one.unwrap());
    assert_healthy(&[zero.session.clone(), one.session.clone()], "both").await;
    // Nothing was made up.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let error = options(&far, Some(&dir.path().join("none")), dir.path(), patient()).unwrap_err();
    assert!(error.to_string().contains("none"));
}

#[tokio::test]
async fn a_single_process_is_a_job_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let jobs =
        join_all((0..2).map(|_| Job::join(options(&vec![], None, dir.path(), patient()).unwrap()))).await;
    for job in jobs {
        let job = job.unwrap();
        assert_eq!((job.cluster.rank, job.cluster.world_size), (0, 1));
        assert_healthy(std::slice::from_ref(&job.session), "alone").await;
        job.leave().await;
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
