//! The thread that registers and unregisters memory, in order: registering may take long where pages are pinned.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::Duration,
};

use ckpt_core::{Error, ErrorKind, Result, device::Buffer};
use tokio::sync::oneshot;

use crate::engine::Engine;

/// How soon registrations of memory that is gone are given back.
const SWEEP_TIME: Duration = Duration::from_secs(1);

/// What the keeper is asked to do.
pub(crate) enum Command {
    /// Lets peers read `buffer`.
    Serve { buffer: Arc<dyn Buffer>, reply: oneshot::Sender<Result<()>> },
    /// Ends one `Serve` of the memory at this address.
    Withdraw { address: u64 },
    /// Makes `buffer` fit to read into. It stays so while it lives.
    Destination { buffer: Arc<dyn Buffer>, reply: Sender<Result<()>> },
}

/// Starts the keeper. It ends when all senders are gone.
pub(crate) fn start(engine: Arc<Engine>) -> Result<Sender<Command>> {
    let (commands, receiver) = channel();
    let keeper = Keeper { engine, served: HashMap::new(), destinations: HashMap::new() };
    std::thread::Builder::new()
        .name("mooncake-keep".to_owned())
        .spawn(move || keeper.run(&receiver))
        .map_err(|e| {
            Error::new(ErrorKind::ResourceExhausted, "start Mooncake", "the system has no more threads")
                .caused_by(e)
        })?;
    Ok(commands)
}

struct Served {
    buffer: Arc<dyn Buffer>,
    count: usize,
}

struct Keeper {
    engine: Arc<Engine>,
    served: HashMap<u64, Served>,
    /// Memory that is only read into. Not kept alive: rings must go when their update ends.
    destinations: HashMap<u64, (Weak<dyn Buffer>, u64)>,
}

impl Keeper {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let next = if self.destinations.is_empty() {
                commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                commands.recv_timeout(SWEEP_TIME)
            };
            match next {
                Ok(Command::Serve { buffer, reply }) => {
                    let (address, outcome) = (buffer.address(), self.serve(buffer));
                    let good = outcome.is_ok();
                    if reply.send(outcome).is_err() && good {
                        // Whoever asked is gone.
                        self.withdraw(address);
                    }
                }
                Ok(Command::Withdraw { address }) => self.withdraw(address),
                Ok(Command::Destination { buffer, reply }) => {
                    // A reader that gave up needs no answer.
                    let _ = reply.send(self.destination(&buffer));
                }
                Err(RecvTimeoutError::Timeout) => self.sweep(),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        for address in self.served.keys().chain(self.destinations.keys()) {
            self.engine.unregister(*address);
        }
    }

    fn serve(&mut self, buffer: Arc<dyn Buffer>) -> Result<()> {
        let (address, len_bytes) = (buffer.address(), buffer.len_bytes());
        if len_bytes == 0 {
            return Ok(());
        }
        if let Some(served) = self.served.get_mut(&address)
            && served.buffer.len_bytes() == len_bytes
        {
            served.count += 1;
            return Ok(());
        }
        self.sweep();
        if self.destinations.remove(&address).is_some() {
            self.engine.unregister(address);
        }
        // SAFETY: `served` keeps the buffer until it is unregistered.
        unsafe { self.engine.register(address, len_bytes, true) }?;
        self.served.insert(address, Served { buffer, count: 1 });
        Ok(())
    }

    fn withdraw(&mut self, address: u64) {
        let Some(served) = self.served.get_mut(&address) else { return };
        served.count -= 1;
        if served.count == 0 {
            self.engine.unregister(address);
            // The memory may go only now.
            self.served.remove(&address);
        }
    }

    fn destination(&mut self, buffer: &Arc<dyn Buffer>) -> Result<()> {
        let (address, len_bytes) = (buffer.address(), buffer.len_bytes());
        let inside = |start: u64, len: u64| start <= address && address + len_bytes <= start + len;
        self.sweep();
        let known = self.served.iter().any(|(start, served)| inside(*start, served.buffer.len_bytes()))
            || self.destinations.iter().any(|(start, (_, len))| inside(*start, *len));
        if known || len_bytes == 0 {
            return Ok(());
        }
        // SAFETY: the reads into it keep the buffer alive. Once it is gone nobody reads into it, and an RDMA
        // registration outlives its mapping without harm until `sweep`.
        unsafe { self.engine.register(address, len_bytes, false) }?;
        self.destinations.insert(address, (Arc::downgrade(buffer), len_bytes));
        Ok(())
    }

    fn sweep(&mut self) {
        self.destinations.retain(|address, (buffer, _)| {
            let alive = buffer.strong_count() > 0;
            if !alive {
                self.engine.unregister(*address);
            }
            alive
        });
    }
}
