//! The book: its commands run, and the messages that it explains are those of the program.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use integration_tests::Program;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Every page with its text.
fn pages() -> Vec<(String, String)> {
    let folder = fs::read_dir(root().join("docs")).unwrap();
    let files =
        folder.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|e| e == "md"));
    let mut pages: Vec<(String, String)> = files
        .map(|path| {
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read_to_string(path).unwrap())
        })
        .collect();
    pages.sort();
    pages
}

/// The code blocks that are marked to be run, as one script.
fn script(page: &str) -> String {
    let mut script = String::new();
    let mut running = false;
    for line in page.lines() {
        match line {
            "```sh run" => running = true,
            "```" => running = false,
            line if running => script += &format!("{line}\n"),
            _ => {}
        }
    }
    script
}

#[tokio::test]
async fn marked_commands_run() {
    let mut ran = 0;
    for (name, page) in pages() {
        let script = script(&page);
        if script.is_empty() {
            continue;
        }
        // Short: UNIX sockets lie in it.
        let folder = tempfile::Builder::new().prefix("ck").tempdir().unwrap();
        let programs = folder.path().join("bin");
        fs::create_dir(&programs).unwrap();
        symlink(env!("CARGO_BIN_EXE_ckpt-under-test"), programs.join("ckpt")).unwrap();
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        let shell = Program::new("bash").args(["-eu", "-c"]);
        let shell = shell.arg(format!("cd {}\n{script}", folder.path().display()));
        let finished =
            shell.env("PATH", path).env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await;
        println!("{name}:\n{}", finished.stdout);
        finished.expect_code(0);
        ran += 1;
    }
    assert!(ran >= 3, "the pages have lost their marked blocks");
}

#[test]
fn explained_messages_are_those_of_the_program() {
    let mut sources = String::new();
    let mut folders = ["ckpt-core/src", "ckpt-cli/src", "ckpt-transport-rdma/src", "ckpt-transport-nccl/src"]
        .map(|folder| root().join(folder))
        .to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => sources += &fs::read_to_string(path).unwrap(),
            }
        }
    }
    // A message that goes over several lines of source.
    let lines = sources.lines().map(str::trim_start).map(|line| line.strip_suffix('\\').unwrap_or(line));
    let sources: String = lines.collect();
    let page = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let messages: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).collect();
    assert!(messages.len() >= 15);
    for message in messages {
        assert!(sources.contains(message), "no source says `{message}`");
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    for (name, page) in pages() {
        for link in page.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap();
            if !file.is_empty() && !file.contains("://") {
                assert!(root().join("docs").join(file).exists(), "{name} links to {link}");
            }
        }
    }
}
