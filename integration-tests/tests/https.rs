//! HTTPS: `ckpt serve` with a certificate, and clients that verify it; engines at `https://`.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use integration_tests::{Certificates, FakeEngine, Finished, Job, LONG, Process, Program, Script};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const TOKEN: &str = "a-token-of-this-test-which-nobody-can-guess";

/// `ckpt serve` with a certificate, and where it listens.
async fn serve(job: &Job, files: &Certificates) -> (Process, String) {
    let mut server = Program::new(PROGRAM)
        .args(["serve", "--device", "host", "--listen", "127.0.0.1:0"])
        .args([
            "--tls-cert".as_ref(),
            files.certificate.as_os_str(),
            "--tls-key".as_ref(),
            files.key.as_os_str(),
        ])
        .env("CKPT_RUNTIME_DIR", job.runtime_dir())
        .env("CKPT_TOKEN", TOKEN)
        .spawn();
    let line = server.stdout_line("listens on https://").await;
    let address = line.rsplit(' ').next().unwrap().to_owned();
    (server, address)
}

/// A connection that has shaken hands, for one who speaks HTTP as he likes.
async fn secure(host: &str, ca: &Path) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls_graviola::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(host).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

async fn doctor(address: &str, options: &[&std::ffi::OsStr]) -> Finished {
    Program::new(PROGRAM)
        .args(["doctor", "--json", "--endpoint", address])
        .args(options)
        .spawn()
        .finish(LONG)
        .await
}

fn engine_finding(ended: &Finished) -> String {
    let report = ended.json();
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .filter(|finding| finding["area"] == "engine")
        .map(|finding| finding["detail"].to_string())
        .collect()
}

#[tokio::test]
async fn clients_verify_a_server_and_one_that_goes_slowly_is_cut_off() {
    let job = Job::new(PROGRAM, 1, 2);
    let files = Certificates::make(job.path("").as_path());
    let others = job.path("others");
    std::fs::create_dir(&others).unwrap();
    let others = Certificates::make(&others);
    let (_server, address) = serve(&job, &files).await;

    // What has asked is known by the answer: there are no metas yet.
    let join = |source: String, ca: Option<&Path>| {
        let mut program = Program::new(PROGRAM)
            .args(["join", "--device", "host", "--worker-protocol", "native", "--metas", &source])
            .env("CKPT_RUNTIME_DIR", job.runtime_dir())
            .env("CKPT_TOKEN", TOKEN);
        if let Some(ca) = ca {
            program = program.arg("--tls-ca").arg(ca);
        }
        async move { program.spawn().finish(LONG).await }
    };
    let ended = join(address.clone(), Some(&files.ca)).await.expect_code(2);
    assert!(ended.error_line().contains("they name no rank that holds anything"), "{}", ended.stderr);
    for ca in [Some(others.ca.as_path()), None] {
        let ended = join(address.clone(), ca).await.expect_code(2);
        let line = ended.error_line();
        assert!(line.contains("--tls-ca") || line.contains("CKPT_TLS_CA"), "{line}");
    }
    let ended = join(address.replace("https", "http"), None).await.expect_code(1);
    assert!(ended.error_line().contains("this port speaks HTTPS"), "{}", ended.stderr);

    // The rest of a handshake never comes; or nothing does.
    let host = address.strip_prefix("https://").unwrap();
    for words in [&b"\x16\x03\x01\x02\x00"[..], b""] {
        let mut stream = TcpStream::connect(host).await.unwrap();
        stream.write_all(words).await.unwrap();
        let started = Instant::now();
        let ended = tokio::time::timeout(LONG, stream.read_to_end(&mut Vec::new())).await;
        ended.expect("it was not cut off").ok();
        assert!(started.elapsed() > Duration::from_secs(4), "it was cut off for another reason");
    }
    let ended = doctor(&address, &["--tls-ca".as_ref(), files.ca.as_os_str()]).await;
    assert!(!engine_finding(&ended).contains("cannot be reached"), "{}", ended.stdout);
    let ended = doctor(&address, &[]).await;
    assert!(engine_finding(&ended).contains("--tls-ca"), "{}", ended.stdout);
}

#[tokio::test]
async fn a_head_that_trickles_inside_tls_is_cut_off() {
    let job = Job::new(PROGRAM, 1, 1);
    let files = Certificates::make(job.path("").as_path());
    let (_server, address) = serve(&job, &files).await;
    let mut stream = secure(address.strip_prefix("https://").unwrap(), &files.ca).await;
    let started = Instant::now();
    stream.write_all(b"GET /v1/metas HTTP/1.1\r\nhost: ps\r\n").await.unwrap();
    // Each header comes in time for one that counts from the last byte.
    let (mut reader, mut writer) = tokio::io::split(stream);
    let trickle = async {
        let mut each = tokio::time::interval(Duration::from_millis(500));
        loop {
            each.tick().await;
            if writer.write_all(b"x-more: 1\r\n").await.is_err() || writer.flush().await.is_err() {
                // The connection is closed; the other half says so as well.
                std::future::pending::<()>().await;
            }
        }
    };
    let mut answer = Vec::new();
    tokio::select! {
        () = trickle => {}
        // However it ends: with an answer or without, with a farewell of TLS or a reset.
        _ = reader.read_to_end(&mut answer) => {}
        () = tokio::time::sleep(LONG) => panic!("it was not cut off"),
    }
    assert!(started.elapsed() > Duration::from_secs(4), "it was cut off for another reason: {answer:?}");
    assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn an_engine_at_https_is_told_and_an_unknown_one_is_not_waited_for() {
    let job = Job::new(PROGRAM, 1, 1);
    let files = Certificates::make(job.path("").as_path());
    let engine = FakeEngine::start_tls(Script::Answer(500, "no room for weights"), &files).await;
    let (endpoint, ca) = (engine.endpoint(), files.ca.to_str().unwrap());
    let options = ["--engine", "vllm", "--endpoint", &endpoint, "--tls-ca", ca];
    let ended = job.update(&options).take(0).finish(LONG).await.expect_code(1);
    let line = ended.error_line();
    assert!(line.contains("answered 500") && line.contains("no room for weights"), "{line}");
    // By the variable, which a launcher hands on.
    let ended =
        job.update_in(&[("CKPT_TLS_CA", ca)], &options[..4]).take(0).finish(LONG).await.expect_code(1);
    assert!(ended.error_line().contains("answered 500"), "{}", ended.stderr);

    let started = Instant::now();
    let ended = job.update(&options[..4]).take(0).finish(LONG).await.expect_code(2);
    let line = ended.error_line();
    assert!(line.contains("--tls-ca"), "{line}");
    assert!(started.elapsed() < LONG / 2, "{:?}", started.elapsed());
}

#[tokio::test]
async fn files_that_are_no_certificates_are_told() {
    let job = Job::new(PROGRAM, 1, 1);
    let files = Certificates::make(job.path("").as_path());
    let other = job.path("other");
    std::fs::create_dir(&other).unwrap();
    let other = Certificates::make(&other);
    let missing = job.path("missing.pem");
    for (certificate, key, expected) in [
        (&missing, &files.key, "cannot be read"),
        (&files.key, &files.key, "no certificates in PEM"),
        (&files.certificate, &files.certificate, "no private key in PEM"),
        (&files.certificate, &other.key, "do not go together"),
    ] {
        let program = Program::new(PROGRAM)
            .args(["serve", "--json", "--device", "host", "--listen", "127.0.0.1:0"])
            .args(["--tls-cert".as_ref(), certificate.as_os_str(), "--tls-key".as_ref(), key.as_os_str()])
            .env("CKPT_RUNTIME_DIR", job.runtime_dir());
        let ended = program.spawn().finish(LONG).await.expect_code(2);
        assert!(ended.error_line().contains(expected), "{}", ended.stderr);
        assert_eq!(ended.json()["error"]["kind"], json!("ConfigInvalid"), "{}", ended.stdout);
    }
}
