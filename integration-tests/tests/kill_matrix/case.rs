//! One cell of the matrix.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use integration_tests::{Finished, Job, LONG, Process, Program, Ranks, names};
use rustix::process::Signal;
use tokio::task::JoinError;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ckpt-under-test");
const RELAY: &str = env!("CARGO_BIN_EXE_relay-under-test");
const RANKS: u32 = 3;
/// What the project promises, with a heartbeat of 1 s and death after 5 s.
const SOON: Duration = Duration::from_secs(10);
const OPTIONS: &[&str] = &["--log-level", "debug", "--join-timeout", "8", "--ready-timeout", "6"];
const CHECKPOINT_MIB: u64 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    Rank0,
    OtherRank,
    Worker,
    /// The engine's HTTP server; its worker lives.
    EngineServer,
    /// A rank of the job whose memory another job reads.
    Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The first ranks have joined, the last one has not come.
    Join,
    /// They wait for the last one's metas.
    Gather,
    /// The workers have mapped the ring; no bucket was handed out.
    Before,
    MidBucket,
    /// Committed; the workers drop the ring.
    Release,
    PostHook,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Strike {
    Kill,
    Stop,
}

impl Strike {
    fn signal(self) -> Signal {
        match self {
            Strike::Kill => Signal::KILL,
            Strike::Stop => Signal::STOP,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    pub victim: Victim,
    pub stage: Stage,
    pub strike: Strike,
}

/// How it went.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    case: Case,
    took: Option<Duration>,
    said: String,
    next: String,
    good: bool,
}

impl Row {
    pub fn is_good(&self) -> bool {
        self.good
    }

    pub fn panicked(case: Case, panic: JoinError) -> Self {
        let text = match panic.try_into_panic() {
            Ok(payload) => payload.downcast_ref::<String>().cloned().unwrap_or_default(),
            Err(error) => error.to_string(),
        };
        println!("{case:?}: {text}");
        let said = text.lines().next().unwrap_or_default().to_owned();
        Self { case, took: None, said, next: "-".into(), good: false }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { victim, stage, strike } = self.case;
        let victim = match victim {
            Victim::Rank0 => "rank 0",
            Victim::OtherRank => "another rank",
            Victim::Worker => "worker",
            Victim::EngineServer => "engine's HTTP server",
            Victim::Source => "P2P source",
        };
        let stage = match stage {
            Stage::Join => "join",
            Stage::Gather => "gather",
            Stage::Before => "before",
            Stage::MidBucket => "mid-bucket",
            Stage::Release => "release",
            Stage::PostHook => "post-hook",
        };
        let took = self.took.map_or("-".to_owned(), |took| format!("{:.1} s", took.as_secs_f64()));
        let mark = if self.good { "" } else { " **BAD**" };
        let Self { said, next, .. } = self;
        write!(
            f,
            "| {victim} | {stage} | SIG{} | {took} | {said} | {next}{mark} |",
            format!("{strike:?}").to_uppercase()
        )
    }
}

impl Case {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Case> {
        use {Stage::*, Strike::*, Victim::*};
        let victims = [Rank0, OtherRank, Worker, EngineServer, Source];
        let stages = [Join, Gather, Before, MidBucket, Release, PostHook];
        victims.into_iter().flat_map(move |victim| {
            let each = stages.into_iter().flat_map(|stage| [Kill, Stop].map(|strike| (stage, strike)));
            each.map(move |(stage, strike)| Case { victim, stage, strike })
        })
    }

    pub async fn run(self) -> Row {
        match self.victim {
            Victim::Source => self.strike_source().await,
            _ => self.strike_job().await,
        }
    }

    /// The rank that is to blame.
    fn culprit(self) -> u32 {
        if self.victim == Victim::Rank0 { 0 } else { 1 }
    }

    /// What holds the workers where the strike is to fall.
    fn hold(self) -> Option<&'static str> {
        match self.stage {
            Stage::Join | Stage::Gather => None,
            Stage::Before => Some("open"),
            Stage::MidBucket => Some("bucket"),
            Stage::Release => Some("release"),
            Stage::PostHook => Some("post-hook"),
        }
    }

    async fn strike_job(self) -> Row {
        let job = Job::new(PROGRAM, RANKS, CHECKPOINT_MIB);
        let hold: Vec<&str> = self.hold().map_or(Vec::new(), |at| vec!["--hold-at", at, "--fault-once"]);
        let mut workers = Vec::new();
        let mut relay = None;
        for rank in 0..RANKS {
            if self.victim == Victim::EngineServer && rank == self.culprit() {
                workers.push(job.worker_at(rank, &job.path("hidden.sock"), &hold).await);
                relay = Some(self.relay(&job).await);
            } else {
                workers.push(job.worker(rank, &hold).await);
            }
        }

        let mut ranks = self.reach(&job, &mut workers, OPTIONS).await;
        let mut begun = Instant::now();
        let struck = match self.victim {
            Victim::Worker => None,
            Victim::EngineServer => relay.take(),
            _ => Some(ranks.take(self.culprit())),
        };
        struck.as_ref().unwrap_or(&workers[self.culprit() as usize]).signal(self.strike.signal());
        if self.hold().is_none() && struck_later(self.victim) {
            // Now the last rank comes, and the update meets what was struck.
            job.start(&mut ranks, RANKS - 1, OPTIONS);
            ranks.get(RANKS - 1).stderr_line("gathering").await;
            begun = Instant::now();
        }
        let ended = ranks.finish(LONG).await;
        let took = begun.elapsed();
        let (said, named) = self.said(&ended, |line| {
            let hub = self.victim == Victim::Rank0 && line.contains("rank 0");
            names(line, self.culprit()) || hub
        });

        // A new process takes the place of what was killed; a worker or a server that was stopped goes on.
        match (self.victim, self.strike) {
            (Victim::Worker, Strike::Kill) => workers[1] = job.worker(1, &[]).await,
            (Victim::EngineServer, Strike::Kill) => {
                drop(struck);
                relay = Some(self.relay(&job).await);
            }
            (Victim::Worker, Strike::Stop) => workers[1].signal(Signal::CONT),
            (Victim::EngineServer, Strike::Stop) => {
                relay = struck;
                relay.as_ref().unwrap().signal(Signal::CONT);
            }
            _ => drop(struck),
        }
        // One that was woken has still to leave the failed update.
        for rank in 0..RANKS {
            job.until_free(rank).await;
        }
        let next = next_update(&job, RANKS, job.update(&[])).await;
        drop(relay);
        let good = named && took < SOON && next == "ok";
        Row { case: self, took: Some(took), said, next, good }
    }

    /// Starts the ranks and waits until they are at this case's stage.
    async fn reach(self, job: &Job, workers: &mut [Process], options: &[&str]) -> Ranks {
        let mut ranks = job.absent();
        let last = if self.hold().is_some() { RANKS } else { RANKS - 1 };
        for rank in 0..last {
            job.start(&mut ranks, rank, options);
        }
        for (_, process) in ranks.present() {
            process.stderr_line(self.waits_in()).await;
        }
        if let Some(at) = self.hold() {
            for worker in workers {
                worker.stderr_line(&format!("held at {at}")).await;
            }
        }
        ranks
    }

    /// What a rank has logged that waits for the last one.
    fn waits_in(self) -> &'static str {
        if self.stage == Stage::Join { "joined the job" } else { "gathering" }
    }

    /// Puts a server of its own in front of rank 1's engine.
    async fn relay(self, job: &Job) -> Process {
        // The one before may have left its file.
        let _ = std::fs::remove_file(job.socket(self.culprit()));
        let mut relay =
            Program::new(RELAY).arg(job.socket(self.culprit())).arg(job.path("hidden.sock")).spawn();
        relay.stdout_line("relays").await;
        relay
    }

    /// A short form of the errors, and whether each of them names the culprit.
    fn said(self, ended: &[(u32, Finished)], names: impl Fn(&str) -> bool) -> (String, bool) {
        let mut named = !ended.is_empty();
        let mut said = Vec::new();
        for (rank, finished) in ended {
            let ok = finished.status.success();
            let line = if ok { "ok" } else { finished.error_line().trim_start_matches("error: ") };
            named &= !ok && names(line);
            if !ok && !names(line) {
                println!("{self:?}: rank {rank} does not name the culprit: {}", finished.stderr);
            }
            let short: String = line.chars().take(150).collect::<String>().replace('|', "/");
            if !said.contains(&short) {
                said.push(short);
            }
        }
        (said.join("; "), named)
    }

    async fn strike_source(self) -> Row {
        const OWNER: u32 = 1;
        const JOINERS: u32 = 2;
        // Both have the same checkpoint; the joiner only to compare with.
        let (sender, joiner) =
            (Job::new(PROGRAM, 2, CHECKPOINT_MIB), Job::new(PROGRAM, JOINERS, CHECKPOINT_MIB));
        let _served = sender.workers(&[]).await;
        let token = sender.path("token");
        ckpt_core::control::Token::random().unwrap().write_to(&token).unwrap();
        let mut owners = serve(&sender, &token).await;

        let hold: Vec<&str> = self.hold().map_or(Vec::new(), |at| vec!["--hold-at", at, "--fault-once"]);
        let mut workers = joiner.workers(&hold).await;
        let options = join_options(&sender, &token);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let owner = owners.take(OWNER);
        // Bytes of a test move in no time: an owner that is to be hit before they have is held still from the start.
        let early = self.stage <= Stage::MidBucket;
        if early {
            owner.signal(Signal::STOP);
        }
        let mut ranks = joiner.absent();
        let last = if self.hold().is_some() { JOINERS } else { JOINERS - 1 };
        for rank in 0..last {
            joiner.start(&mut ranks, rank, &options);
        }
        match self.hold() {
            // No bucket comes before its bytes: the reads are under way.
            Some("bucket") => drop(ranks.get(0).stderr_line("pulling").await),
            Some(at) => {
                for worker in &mut workers {
                    worker.stderr_line(&format!("held at {at}")).await;
                }
            }
            None => drop(ranks.get(0).stderr_line(self.waits_in()).await),
        }
        owner.signal(self.strike.signal());
        for rank in last..JOINERS {
            joiner.start(&mut ranks, rank, &options);
        }
        let begun = Instant::now();
        let ended = ranks.finish(LONG).await;
        let took = begun.elapsed();
        let (said, named) = if early {
            self.said(&ended, |line| line.contains("the sender's rank 1"))
        } else {
            // All bytes are here: nobody needs it any more.
            let well = ended.iter().all(|(_, finished)| finished.status.success());
            ("ok: the bytes are here already".to_owned(), well)
        };
        owner.signal(Signal::KILL);
        drop((owner, owners));

        let _owners = serve(&sender, &token).await;
        let mut ranks = joiner.absent();
        for rank in 0..JOINERS {
            joiner.start(&mut ranks, rank, &options);
        }
        let next = next_update(&joiner, JOINERS, ranks).await;
        let good = named && took < SOON && next == "ok";
        Row { case: self, took: Some(took), said, next, good }
    }
}

/// Whether nobody notices before the update needs it.
fn struck_later(victim: Victim) -> bool {
    matches!(victim, Victim::Worker | Victim::EngineServer)
}

/// A job whose memory others may read.
async fn serve(sender: &Job, token: &std::path::Path) -> Ranks {
    let metas = sender.path("metas.json");
    let _ = std::fs::remove_file(&metas);
    let mut owners = sender.update(&[
        "--save-metas-file",
        metas.to_str().unwrap(),
        "--token-file",
        token.to_str().unwrap(),
        "--p2p-transport",
        "tcp",
        "--sleep-time",
        "600",
    ]);
    owners.get(0).stdout_line("update_s_by_method").await;
    owners
}

fn join_options(sender: &Job, token: &std::path::Path) -> Vec<String> {
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    [
        "join",
        "--metas",
        &text(sender.path("metas.json")),
        "--token-file",
        &text(token.to_owned()),
        "--p2p-transport",
        "tcp",
        "--log-level",
        "debug",
        "--join-timeout",
        "8",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// `ok`, or what went wrong.
async fn next_update(job: &Job, ranks: u32, running: Ranks) -> String {
    for (rank, finished) in running.finish(LONG).await {
        if !finished.status.success() {
            println!("the next update failed on rank {rank}: {}", finished.stderr);
            return format!("rank {rank}: {}", finished.error_line().replace('|', "/"));
        }
    }
    for rank in 0..ranks {
        job.assert_holds(rank).await;
    }
    "ok".into()
}
