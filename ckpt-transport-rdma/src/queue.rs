//! The bookkeeping of one send queue, without a device: which requests wait, which fly, which are to be signalled.
//!
//! A reliable queue completes its requests in order, so one signalled completion retires all before it. A request that
//! fails completes with an error even if it was not signalled, and everything behind it is flushed.

use std::collections::VecDeque;

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
        // The last one must be signalled, or nobody would learn of it: also the last for which there is a slot, as none may
        // follow. And some on the way, or slots never come free.
        let last = self.flying == self.requests.len() || self.flying == self.depth;
        let signalled = last || self.unsignalled + 1 >= self.depth.div_ceil(4);
        self.unsignalled = if signalled { 0 } else { self.unsignalled + 1 };
        Some((request, number, signalled))
    }

    /// A request has completed: it and all before it, of which `done` is told.
    pub(crate) fn complete(&mut self, number: u64, done: impl FnMut(T)) {
        if self.flies(number) {
            let count = (number - self.first) as usize + 1;
            self.retire(count, done);
        }
    }

    /// A request has failed; `done` is told of those before it. Answers the culprit, unless it is not known, as for a
    /// completion that came late. Nothing is posted afterwards; the others come back as completions with errors.
    pub(crate) fn fail(&mut self, number: u64, done: impl FnMut(T)) -> Option<T> {
        self.closed = true;
        if !self.flies(number) {
            return None;
        }
        let before = (number - self.first) as usize;
        self.retire(before, done);
        let mut culprit = None;
        self.retire(1, |request| culprit = Some(request));
        culprit
    }

    fn retire(&mut self, count: usize, mut done: impl FnMut(T)) {
        self.first += count as u64;
        self.flying -= count;
        for _ in 0..count {
            if let Some(request) = self.requests.pop_front() {
                done(request);
            }
        }
    }

    /// Posts no more, and gives back what has not been posted.
    pub(crate) fn close(&mut self) -> impl Iterator<Item = T> {
        self.closed = true;
        self.requests.drain(self.flying..)
    }

    /// The request that was started last.
    pub(crate) fn newest(&self) -> Option<&T> {
        self.requests.get(self.flying.checked_sub(1)?)
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

    use super::*;

    fn complete<T>(queue: &mut SendQueue<T>, number: u64) -> Vec<T> {
        let mut done = Vec::new();
        queue.complete(number, |request| done.push(request));
        done
    }

    /// What completed before, and the culprit.
    fn fail<T>(queue: &mut SendQueue<T>, number: u64) -> (Vec<T>, Option<T>) {
        let mut done = Vec::new();
        let culprit = queue.fail(number, |request| done.push(request));
        (done, culprit)
    }

    #[test]
    fn completions_of_another_queue_are_ignored() {
        let mut queue = SendQueue::new(4, 100);
        queue.push('a').unwrap();
        assert!(queue.start().is_some());
        assert!(complete(&mut queue, 7).is_empty() && complete(&mut queue, 101).is_empty());
        assert_eq!(complete(&mut queue, 100), ['a']);
        assert!(complete(&mut queue, 100).is_empty(), "twice");
    }

    #[test]
    fn a_completion_that_is_handled_late_changes_nothing() {
        let mut queue = SendQueue::new(4, 0);
        for request in 0..6 {
            queue.push(request).unwrap();
        }
        while queue.start().is_some() {}
        assert_eq!(complete(&mut queue, 2), [0, 1, 2], "it retires all before it");
        assert!(complete(&mut queue, 1).is_empty(), "an earlier one comes late");
        assert_eq!(fail(&mut queue, 0), (vec![], None), "even as an error");
        assert!(queue.start().is_none(), "but then nothing is posted any more");
        assert_eq!(complete(&mut queue, 3), [3]);
        assert_eq!(queue.close().collect::<Vec<_>>(), [4, 5]);
    }

    #[test]
    fn a_failure_names_its_request_and_flushes_the_rest() {
        let mut queue = SendQueue::new(4, 0);
        for request in 0..6 {
            queue.push(request).unwrap();
        }
        while queue.start().is_some() {}
        assert_eq!(fail(&mut queue, 1), (vec![0], Some(1)));
        assert!(queue.start().is_none() && queue.push(9) == Err(9));
        assert_eq!(queue.close().collect::<Vec<_>>(), [4, 5]);
        assert_eq!(fail(&mut queue, 2).1, Some(2));
        assert_eq!(fail(&mut queue, 2).1, None);
        assert!(!queue.is_idle());
        assert_eq!(queue.abandon(), [3]);
        assert!(queue.is_idle());
    }

    #[test]
    fn a_request_that_is_not_taken_says_nothing_of_those_before_it() {
        let mut queue = SendQueue::new(4, 0);
        for request in 0..6 {
            queue.push(request).unwrap();
        }
        assert_eq!(queue.newest(), None);
        while queue.start().is_some_and(|(_, number, _)| number < 2) {}
        assert_eq!(queue.close().collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!(queue.newest(), Some(&2), "which was not taken");
        assert_eq!(fail(&mut queue, 1), (vec![0], Some(1)));
        // Posted again.
        assert_eq!(fail(&mut queue, 2), (vec![], Some(2)));
        assert!(queue.is_idle());
        assert_eq!(queue.newest(), None);
    }

    /// A device that takes at most `depth` requests, completes them in order, and tells only of signalled ones.
    fn device(depth: usize, requests: usize, steps: &[bool]) -> (Vec<usize>, usize) {
        let mut queue = SendQueue::new(depth, 1 << 32);
        let (mut on_device, mut back, mut most) = (VecDeque::new(), Vec::new(), 0);
        let (mut pushed, mut step) = (0, steps.iter().copied().cycle());
        while back.len() < requests {
            // In turns chosen by `steps`: a new request and as many posts as there are slots, or one completion.
            let completes = step.next().unwrap_or(true) && pushed > back.len() || pushed == requests;
            if !completes {
                queue.push(pushed).unwrap();
                pushed += 1;
            }
            while let Some((_, number, signalled)) = queue.start() {
                on_device.push_back((number, signalled));
            }
            most = most.max(on_device.len());
            if completes && let Some(last) = on_device.iter().position(|(_, signalled)| *signalled) {
                let number = on_device.drain(..=last).next_back().map(|(number, _)| number);
                back.extend(complete(&mut queue, number.unwrap()));
            }
            assert!(on_device.back().is_none_or(|(_, signalled)| *signalled), "nobody will tell");
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
