//! TLS between the ranks of a job, as processes: what somebody on the wire sees, and what sides that differ are told.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{net::SocketAddr, path::Path, time::Instant};

use integration_tests::{Finished, Job, LONG, Program, Recorder, http_get};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const TOKEN: &str = "a-token-of-this-test-which-nobody-can-guess";

fn job(world_size: u32, tls: bool) -> Job {
    let job = Job::new(PROGRAM, world_size, 8).with_env("CKPT_TOKEN", TOKEN);
    job.with_env("CKPT_TLS", if tls { "1" } else { "0" })
}

/// Bytes that the checkpoint has and nothing else: the end of its last tensor's file.
fn weights(job: &Job) -> Vec<u8> {
    let file = job.source().paths().last().unwrap();
    let bytes = std::fs::read(file).unwrap();
    bytes[bytes.len() - 48..].to_vec()
}

#[tokio::test]
async fn who_reads_the_way_to_the_hub_learns_the_token_only_without_tls() {
    for tls in [true, false] {
        let job = job(2, tls);
        let _workers = job.workers(&[]).await;
        let mut ranks = job.absent();
        let recorder = Recorder::before(ranks.hub()).await;
        job.start(&mut ranks, 0, &["--transport", "tcp"]);
        job.start_through(&mut ranks, 1, &["--transport", "tcp"], recorder.address());
        for (_, ended) in ranks.finish(LONG).await {
            ended.expect_code(0);
        }
        job.assert_holds(0).await;
        job.assert_holds(1).await;
        assert!(recorder.len_bytes() > 1000, "nothing went past the reader");
        assert_eq!(recorder.saw(TOKEN.as_bytes()), !tls);
    }
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

/// Where the one owner in these metas listens.
fn owner(metas: &str) -> SocketAddr {
    let (_, rest) = metas.split_once(&hex("127.0.0.1:")).unwrap();
    let digits = rest.as_bytes().chunks(2).map_while(|hex| match hex {
        [b'3', digit @ b'0'..=b'9'] => Some(u16::from(digit - b'0')),
        _ => None,
    });
    // What follows the address may begin with such a byte, too.
    let port = digits.take(5).fold(0, |port, digit| port * 10 + digit);
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// One process that joins from metas in which all addresses are those of the recorder.
async fn pull(job: &Job, metas: &Path, recorder: &Recorder, owner: SocketAddr, tls: bool) -> Finished {
    // What only the transport understands is written in hexadecimal digits; both ports have five digits.
    let (from, to) = (hex(&owner.to_string()), hex(&recorder.address().to_string()));
    assert_eq!(from.len(), to.len());
    let text = std::fs::read_to_string(metas).unwrap().replace(&from, &to);
    let changed = job.path("metas-through-recorder.json");
    std::fs::write(&changed, text).unwrap();
    let joining = Program::new(PROGRAM)
        .args(["join", "--json", "--device", "host", "--worker-protocol", "native"])
        .args(["--inference-parallel-size", "1", "--bucket-mib", "1", "--p2p-transport", "tcp"])
        .args(["--metas".as_ref(), changed.as_os_str()])
        .args(["--uds".as_ref(), job.path("joined-{rank}.sock").as_os_str()])
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .env("CKPT_TOKEN", TOKEN)
        .env("CKPT_TLS", if tls { "yes" } else { "" });
    joining.spawn().finish(LONG).await
}

#[tokio::test]
async fn who_reads_the_way_between_ranks_learns_weights_only_without_tls() {
    for tls in [true, false] {
        let job = job(1, tls);
        let metas = job.path("metas.json");
        let _workers = job.workers(&[]).await;
        let options =
            ["--save-metas-file", metas.to_str().unwrap(), "--sleep-time", "600", "--transport", "tcp"];
        let mut owners = job.update(&options);
        owners.get(0).stdout_line("update_s_by_method").await;
        let text = std::fs::read_to_string(&metas).unwrap();
        let owner = owner(&text);
        let recorder = Recorder::before(owner).await;

        let engine = job.worker_at(0, &job.path("joined-0.sock"), &[]).await;
        pull(&job, &metas, &recorder, owner, tls).await.expect_code(0);
        let state =
            http_get(&format!("unix:{}", job.path("joined-0.sock").display()), "/v1/state").await.json();
        assert_eq!(state[0]["updates"], 1, "{state}");
        assert!(recorder.len_bytes() > 7 << 20, "{} bytes went past the reader", recorder.len_bytes());
        assert_eq!(recorder.saw(&weights(&job)), !tls);
        assert!(!recorder.saw(TOKEN.as_bytes()), "this transport never shows the token");

        // One who does not fit is told so, and does no harm.
        let line = pull(&job, &metas, &recorder, owner, !tls).await.expect_code(2).error_line().to_owned();
        let expected = if tls { "the peer wants TLS" } else { "the peer does not speak TLS" };
        assert!(line.contains(expected), "{line}");
        pull(&job, &metas, &recorder, owner, tls).await.expect_code(0);
        drop(engine);
    }
}

#[tokio::test]
async fn ranks_that_do_not_agree_are_told_in_one_line() {
    let job = Job::new(PROGRAM, 2, 1).with_env("CKPT_TOKEN", TOKEN);
    for (at_zero, at_one, expected) in [
        (&["--tls"][..], &[][..], "the hub wants TLS and this rank does not"),
        (&[][..], &["--tls"][..], "rank 1 wants TLS and the hub does not speak it"),
    ] {
        let mut ranks = job.absent();
        let started = Instant::now();
        job.start(&mut ranks, 0, &[at_zero, &["--join-timeout", "20"]].concat());
        job.start(&mut ranks, 1, at_one);
        let line = ranks.take(1).finish(LONG).await.expect_code(2).error_line().to_owned();
        assert!(line.contains(expected), "{line}");
        assert!(started.elapsed() < LONG / 2);
    }
}

#[tokio::test]
async fn a_token_that_could_be_guessed_is_refused_and_one_made_up_here_is_not() {
    let job = Job::new(PROGRAM, 1, 1).with_env("CKPT_TOKEN", "hunter2");
    let ended = job.update(&["--tls"]).take(0).finish(LONG).await.expect_code(2);
    assert!(ended.error_line().contains("the token has 7 bytes"), "{}", ended.stderr);

    let job = Job::new(PROGRAM, 2, 2);
    let _workers = job.workers(&[]).await;
    for (rank, ended) in job.update(&["--tls", "--transport", "tcp"]).finish(LONG).await {
        let ended = ended.expect_code(0);
        assert!(!ended.stderr.contains("clear text"), "rank {rank}: {}", ended.stderr);
        job.assert_holds(rank).await;
    }
}

/// Graviola's debug builds deny an instruction set where a variable says so.
#[cfg(all(debug_assertions, target_arch = "x86_64"))]
#[tokio::test]
async fn a_processor_that_cannot_is_an_error_and_plain_http_still_works() {
    let job = Job::new(PROGRAM, 1, 1).with_env("GRAVIOLA_CPU_DISABLE_adx", "1").with_env("CKPT_TOKEN", TOKEN);
    let ended = job.update(&["--tls"]).take(0).finish(LONG).await.expect_code(3);
    assert!(ended.error_line().contains("this processor lacks an instruction set"), "{}", ended.stderr);
    let ended = job.update(&["--endpoint", "https://127.0.0.1:1"]).take(0).finish(LONG).await.expect_code(3);
    assert!(ended.error_line().contains("this processor lacks an instruction set"), "{}", ended.stderr);
    let _workers = job.workers(&[]).await;
    job.update(&[]).take(0).finish(LONG).await.expect_code(0);
    job.assert_holds(0).await;
}
