//! The bookkeeping of one send queue, without a device: which requests wait, which fly, which are to be signalled.
//!
//! A reliable queue completes its requests in order, so one signalled completion retires all before it. A request that
//! fails completes with an error even if it was not signalled, and everything behind it is flushed.

use std::collections::VecDeque;

use smallvec::SmallVec;

/// Requests of one queue pair.
#[derive(Debug)]
pub(crate) struct SendQueue<T> {
    depth: usize,
    /// Those that fly, oldest first, and behind them those that wait.
    requests: VecDeque<T>,
    flying: usize,
    /// The number of the oldest request; they rise by one.
    first: u64,
    unsignalled: usize,
    closed: bool,
}

/// What a completion with an error did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failed<T> {
    /// Completed before it.
    pub(crate) done: SmallVec<[T; 1]>,
    /// The request that failed; `None` if it is not known, as for a completion that came late.
    pub(crate) culprit: Option<T>,
}

impl<T> SendQueue<T> {
    /// At most `depth` requests fly. `first` is the first request's number: no two queues of a process share numbers,
    /// so that a completion of an earlier queue pair is never taken for one of this.
    pub(crate) fn new(depth: usize, first: u64) -> Self {
        Self { depth, requests: VecDeque::new(), flying: 0, first, unsignalled: 0, closed: false }
    }

    /// Puts a request behind the others; gives it back if the queue is closed.
    pub(crate) fn push(&mut self, request: T) -> Result<(), T> {
        if self.closed {
            return Err(request);
        }
        self.requests.push_back(request);
        Ok(())
    }

    /// The next request to post, its number and whether to signal it, if there is one and a slot is free.
    pub(crate) fn start(&mut self) -> Option<(&T, u64, bool)> {
        if self.closed || self.flying >= self.depth {
            return None;
        }
        let request = self.requests.get(self.flying)?;
        let number = self.first + self.flying as u64;
        self.flying += 1;
        // The last one must be signalled, or nobody would learn of it; and some on the way, or slots never come free.
        let last = self.flying == self.requests.len();
        let signalled = last || self.unsignalled + 1 >= self.depth.div_ceil(4);
        self.unsignalled = if signalled { 0 } else { self.unsignalled + 1 };
        Some((request, number, signalled))
    }

    /// A request has completed: it and all before it.
    pub(crate) fn complete(&mut self, number: u64) -> SmallVec<[T; 1]> {
        if !self.flies(number) {
            return SmallVec::new();
        }
        let count = (number - self.first) as usize + 1;
        self.first += count as u64;
        self.flying -= count;
        (0..count).filter_map(|_| self.requests.pop_front()).collect()
    }

    /// A request has failed. Nothing is posted afterwards; the others come back as completions with errors.
    pub(crate) fn fail(&mut self, number: u64) -> Failed<T> {
        self.closed = true;
        let mut done = self.complete(number);
        let culprit = done.pop();
        Failed { done, culprit }
    }

    /// Posts no more, and gives back what has not been posted.
    pub(crate) fn close(&mut self) -> Vec<T> {
        self.closed = true;
        self.requests.drain(self.flying..).collect()
    }

    /// Whether no request is on the device.
    pub(crate) fn is_idle(&self) -> bool {
        self.flying == 0
    }

    /// Gives up what flies: only after the queue pair was destroyed.
    pub(crate) fn abandon(&mut self) -> Vec<T> {
        self.requests.drain(..std::mem::take(&mut self.flying)).collect()
    }

    fn flies(&self, number: u64) -> bool {
        (self.first..self.first + self.flying as u64).contains(&number)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smallvec::smallvec;

    use super::*;

    #[test]
    fn completions_of_another_queue_are_ignored() {
        let mut queue = SendQueue::new(4, 100);
        queue.push('a').unwrap();
        assert!(queue.start().is_some());
        assert!(queue.complete(7).is_empty() && queue.complete(101).is_empty());
        assert_eq!(queue.complete(100)[..], ['a']);
        assert!(queue.complete(100).is_empty(), "twice");
    }

    #[test]
    fn a_completion_that_is_handled_late_changes_nothing() {
        let mut queue = SendQueue::new(4, 0);
        for request in 0..6 {
            queue.push(request).unwrap();
        }
        while queue.start().is_some() {}
        assert_eq!(queue.complete(2)[..], [0, 1, 2], "it retires all before it");
        assert!(queue.complete(1).is_empty(), "an earlier one comes late");
        assert_eq!(queue.fail(0), Failed { done: SmallVec::new(), culprit: None }, "even as an error");
        assert!(queue.start().is_none(), "but then nothing is posted any more");
        assert_eq!(queue.complete(3)[..], [3]);
        assert_eq!(queue.close(), [4, 5]);
    }

    #[test]
    fn a_failure_names_its_request_and_flushes_the_rest() {
        let mut queue = SendQueue::new(4, 0);
        for request in 0..6 {
            queue.push(request).unwrap();
        }
        while queue.start().is_some() {}
        assert_eq!(queue.fail(1), Failed { done: smallvec![0], culprit: Some(1) });
        assert!(queue.start().is_none() && queue.push(9) == Err(9));
        assert_eq!(queue.close(), [4, 5]);
        assert_eq!(queue.fail(2).culprit, Some(2));
        assert_eq!(queue.fail(2).culprit, None);
        assert!(!queue.is_idle());
        assert_eq!(queue.abandon(), [3]);
        assert!(queue.is_idle());
    }

    /// A device that takes at most `depth` requests, completes them in order, and tells only of signalled ones.
    fn device(depth: usize, requests: usize, steps: &[bool]) -> (Vec<usize>, usize) {
        let mut queue = SendQueue::new(depth, 1 << 32);
        let (mut on_device, mut back, mut most) = (VecDeque::new(), Vec::new(), 0);
        let (mut pushed, mut step) = (0, steps.iter().copied().cycle());
        while back.len() < requests {
            // In turns chosen by `steps`: a new request and as many posts as there are slots, or one completion.
            let complete = step.next().unwrap_or(true) && pushed > back.len() || pushed == requests;
            if !complete {
                queue.push(pushed).unwrap();
                pushed += 1;
            }
            while let Some((_, number, signalled)) = queue.start() {
                on_device.push_back((number, signalled));
            }
            most = most.max(on_device.len());
            if complete && let Some(last) = on_device.iter().position(|(_, signalled)| *signalled) {
                let number = on_device.drain(..=last).next_back().map(|(number, _)| number);
                back.extend(queue.complete(number.unwrap()));
            }
            assert!(
                on_device.is_empty() || on_device.iter().any(|(_, signalled)| *signalled),
                "nobody will tell"
            );
        }
        (back, most)
    }

    proptest! {
        #[test]
        fn every_request_comes_back_once_and_no_slot_is_overrun(
            depth in 2usize..20, requests in 1usize..100, steps in prop::collection::vec(any::<bool>(), 1..30),
        ) {
            let (back, most) = device(depth, requests, &steps);
            prop_assert_eq!(back, (0..requests).collect::<Vec<_>>());
            prop_assert!(most <= depth);
        }
    }
}
