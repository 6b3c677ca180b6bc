//! Streams, which are threads, and events.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    Answer, INVALID_HANDLE, NOT_COMPLETE, OK, PARAM_INVALID, Refusal, call, current, give,
    memory::{device_range, host_range},
    must_be_current, refuse,
    state::state,
};

pub(crate) struct Stream {
    pub(crate) device: i32,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// Tasks that are not over, also the one that runs.
    unfinished: usize,
    /// The first failure, which stays.
    failed: i32,
    end: bool,
}

enum Task {
    Copy { kind: i32, to: u64, from: u64, len: u64 },
    Record(Arc<Event>),
    Wait(Arc<Event>),
    Run(Box<dyn FnOnce() -> i32 + Send>),
}

pub(crate) struct Event {
    device: i32,
    /// `None` before it was recorded.
    state: Mutex<Option<Recorded>>,
    changed: Condvar,
    waiters: AtomicUsize,
    may_wait: bool,
}

#[derive(Clone, Copy)]
enum Recorded {
    Pending,
    /// With the stream's failure, or 0.
    Over(i32),
}

impl Event {
    fn state(&self) -> MutexGuard<'_, Option<Recorded>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, task: Task) {
        let mut queue = self.queue();
        queue.tasks.push_back(task);
        queue.unfinished += 1;
        self.changed.notify_all();
    }

    fn run(&self) {
        loop {
            let mut queue = self.queue();
            let task = loop {
                match queue.tasks.pop_front() {
                    Some(task) => break task,
                    None if queue.end => return,
                    None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            let failed = queue.failed;
            drop(queue);
            let code = self.perform(task, failed);
            let mut queue = self.queue();
            if queue.failed == OK {
                queue.failed = code;
            }
            queue.unfinished -= 1;
        }
    }

    /// After a failure only events do anything: they tell of it.
    fn perform(&self, task: Task, failed: i32) -> i32 {
        match task {
            Task::Record(event) => {
                *event.state() = Some(Recorded::Over(failed));
                event.changed.notify_all();
                OK
            }
            Task::Wait(event) => {
                let mut state = event.state();
                while matches!(*state, Some(Recorded::Pending)) {
                    state = event.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                drop(state);
                event.waiters.fetch_sub(1, Ordering::AcqRel);
                OK
            }
            _ if failed != OK => failed,
            Task::Copy { kind, to, from, len } => match self.copy(kind, to, from, len) {
                Ok(()) => OK,
                Err(Refusal { code, why }) => {
                    eprintln!("ascend emulator: a copy on a stream failed: {why}");
                    code
                }
            },
            Task::Run(run) => run(),
        }
    }

    /// Asks for the ranges only now: memory that was freed meanwhile is found out.
    fn copy(&self, kind: i32, to: u64, from: u64, len: u64) -> Answer {
        let on_device = |address| device_range(self.device, address, len).map(|(at, held)| (at, Some(held)));
        let on_host = |address| host_range(address, len).map(|at| (at, None));
        let (to, _to) = if kind == 1 || kind == 3 { on_device(to) } else { on_host(to) }?;
        let (from, _from) = if kind >= 2 { on_device(from) } else { on_host(from) }?;
        // SAFETY: both ranges are allocated: device memory is held mapped, and host memory that is freed under a copy is the
        // caller's mistake, which the check above mostly finds. They may be one and the same.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len as usize) };
        Ok(())
    }
}

fn stream_of(handle: usize) -> Answer<Arc<Stream>> {
    let found = state().streams.get(&handle).cloned();
    let Some(stream) = found else { return refuse(INVALID_HANDLE, format!("{handle:#x} is no stream")) };
    must_be_current(stream.device, "stream")?;
    Ok(stream)
}

fn event_of(handle: usize) -> Answer<Arc<Event>> {
    let found = state().events.get(&handle).cloned();
    let Some(event) = found else { return refuse(INVALID_HANDLE, format!("{handle:#x} is no event")) };
    must_be_current(event.device, "event")?;
    Ok(event)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtCreateStream(handle: *mut usize) -> i32 {
    call("aclrtCreateStream", || {
        let stream =
            Arc::new(Stream { device: current()?, queue: Mutex::default(), changed: Condvar::new() });
        let mut state = state();
        let number = state.new_handle();
        // SAFETY: the caller's pointer.
        unsafe { give(handle, number) }?;
        let for_thread = stream.clone();
        let name = format!("npu-stream-{number:x}");
        let spawned = std::thread::Builder::new().name(name).spawn(move || for_thread.run());
        if spawned.is_err() {
            return refuse(207_008, "the host has no more threads");
        }
        state.streams.insert(number, stream);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtDestroyStream(handle: usize) -> i32 {
    call("aclrtDestroyStream", || {
        let stream = stream_of(handle)?;
        let mut queue = stream.queue();
        // The thread that ran an event's record may be a step behind whoever saw the event.
        if !queue.tasks.is_empty() {
            return refuse(NOT_COMPLETE, format!("the stream has {} tasks left", queue.unfinished));
        }
        queue.end = true;
        stream.changed.notify_all();
        drop(queue);
        state().streams.remove(&handle);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtMemcpyAsync(to: u64, room: usize, from: u64, len: usize, kind: i32, stream: usize) -> i32 {
    call("aclrtMemcpyAsync", || {
        let stream = stream_of(stream)?;
        if len == 0 || len > room || !(0..=3).contains(&kind) {
            return refuse(PARAM_INVALID, format!("{len} bytes to a place of {room}, kind {kind}"));
        }
        let len = len as u64;
        match kind {
            1 | 3 => drop(device_range(stream.device, to, len)?),
            _ => drop(host_range(to, len)?),
        }
        match kind {
            2 | 3 => drop(device_range(stream.device, from, len)?),
            _ => drop(host_range(from, len)?),
        }
        stream.push(Task::Copy { kind, to, from, len });
        Ok(())
    })
}

unsafe fn create_event(handle: *mut usize, flags: u32) -> Answer {
    if flags == 0 || flags & !0xB != 0 {
        return refuse(PARAM_INVALID, format!("flags {flags:#x}"));
    }
    let event = Event {
        device: current()?,
        state: Mutex::new(None),
        changed: Condvar::new(),
        waiters: AtomicUsize::new(0),
        may_wait: flags & 1 != 0,
    };
    let mut state = state();
    let number = state.new_handle();
    // SAFETY: the caller's pointer.
    unsafe { give(handle, number) }?;
    state.events.insert(number, Arc::new(event));
    Ok(())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtCreateEventWithFlag(handle: *mut usize, flags: u32) -> i32 {
    // SAFETY: the caller's pointer.
    call("aclrtCreateEventWithFlag", || unsafe { create_event(handle, flags) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtCreateEventExWithFlag(handle: *mut usize, flags: u32) -> i32 {
    // SAFETY: the caller's pointer.
    call("aclrtCreateEventExWithFlag", || unsafe { create_event(handle, flags) })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtDestroyEvent(handle: usize) -> i32 {
    call("aclrtDestroyEvent", || {
        let event = event_of(handle)?;
        if event.waiters.load(Ordering::Acquire) > 0 {
            return refuse(NOT_COMPLETE, "a stream waits for the event");
        }
        state().events.remove(&handle);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtRecordEvent(event: usize, stream: usize) -> i32 {
    call("aclrtRecordEvent", || {
        let (event, stream) = (event_of(event)?, stream_of(stream)?);
        if matches!(*event.state(), Some(Recorded::Pending)) {
            return refuse(PARAM_INVALID, "the event was recorded and is not over");
        }
        *event.state() = Some(Recorded::Pending);
        stream.push(Task::Record(event));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aclrtQueryEventStatus(event: usize, status: *mut i32) -> i32 {
    call("aclrtQueryEventStatus", || {
        let recorded = *event_of(event)?.state();
        // SAFETY: the caller's pointer.
        let tell = |value| unsafe { give(status, value) };
        match recorded {
            Some(Recorded::Pending) => tell(0),
            None | Some(Recorded::Over(OK)) => tell(1),
            Some(Recorded::Over(code)) => refuse(code, "work before the event failed"),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn aclrtStreamWaitEvent(stream: usize, event: usize) -> i32 {
    call("aclrtStreamWaitEvent", || {
        let (stream, event) = (stream_of(stream)?, event_of(event)?);
        if !event.may_wait || event.state().is_none() {
            return refuse(
                PARAM_INVALID,
                "the event was not made for waits (ACL_EVENT_SYNC), or not recorded",
            );
        }
        event.waiters.fetch_add(1, Ordering::AcqRel);
        stream.push(Task::Wait(event));
        Ok(())
    })
}

/// For the emulated HCCL: appends work to a stream of the thread's device.
pub(crate) fn submit(stream: usize, run: impl FnOnce() -> i32 + Send + 'static) -> Answer {
    stream_of(stream)?.push(Task::Run(Box::new(run)));
    Ok(())
}
