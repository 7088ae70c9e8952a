//! Calls of this shard that wait for an answer, wherever it comes from.
//!
//! A call is a slot with a deadline. Whoever carries the request (the mesh, a peer link) holds a
//! [`PendingCall`] and completes it; the caller's future waits for the slot. Deadlines are swept
//! every [`SWEEP_INTERVAL`] and not armed one by one: almost no call reaches its deadline.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use torc_env::{Bytes, CallError, Instant};

/// How late a call may notice its deadline.
const SWEEP_INTERVAL: Duration = Duration::from_millis(2);

/// Names a call of this shard. Never reused while the shard runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallId {
    slot: usize,
    sequence: u64,
}

struct Waiting {
    sequence: u64,
    deadline: Instant,
    waker: Option<Waker>,
    answer: Option<Result<Bytes, CallError>>,
}

/// The calls of one shard.
#[derive(Default)]
pub(crate) struct Calls {
    waiting: RefCell<Slab<Waiting>>,
    next_sequence: Cell<u64>,
    next_sweep: Cell<Option<Instant>>,
}

impl Calls {
    /// Opens a call that ends with [`CallError::Lost`] at `deadline`.
    pub(crate) fn open(self: &Rc<Self>, now: Instant, deadline: Instant) -> (CallId, Answer) {
        let sequence = self.next_sequence.get();
        self.next_sequence.set(sequence + 1);
        let slot = self.waiting.borrow_mut().insert(Waiting {
            sequence,
            deadline,
            waker: None,
            answer: None,
        });
        if self.next_sweep.get().is_none() {
            self.next_sweep.set(Some(now + SWEEP_INTERVAL));
        }
        let id = CallId { slot, sequence };
        let answer = Answer {
            calls: Rc::clone(self),
            id,
        };
        (id, answer)
    }

    /// Answers a call. Nothing happens when its caller has gone or an answer is there already.
    pub(crate) fn complete(&self, id: CallId, answer: Result<Bytes, CallError>) {
        let mut waiting = self.waiting.borrow_mut();
        let Some(call) = waiting
            .get_mut(id.slot)
            .filter(|call| call.sequence == id.sequence && call.answer.is_none())
        else {
            return;
        };
        call.answer = Some(answer);
        let waker = call.waker.take();
        drop(waiting);
        waker.into_iter().for_each(Waker::wake);
    }

    /// When [`Calls::sweep`] should be called next, if any call waits.
    pub(crate) fn next_sweep(&self) -> Option<Instant> {
        self.next_sweep.get()
    }

    /// Ends calls whose deadline has passed.
    pub(crate) fn sweep(&self, now: Instant, woken: &mut Vec<Waker>) {
        if self.next_sweep.get().is_none_or(|at| now < at) {
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        for (_, call) in waiting.iter_mut() {
            if call.answer.is_none() && call.deadline <= now {
                call.answer = Some(Err(CallError::Lost));
                woken.extend(call.waker.take());
            }
        }
        let next = (!waiting.is_empty()).then(|| now + SWEEP_INTERVAL);
        self.next_sweep.set(next);
    }

    fn is_waiting(&self, id: CallId) -> bool {
        self.waiting
            .borrow()
            .get(id.slot)
            .is_some_and(|call| call.sequence == id.sequence && call.answer.is_none())
    }
}

/// The caller's side: completes with the answer.
pub(crate) struct Answer {
    calls: Rc<Calls>,
    id: CallId,
}

impl Future for Answer {
    type Output = Result<Bytes, CallError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut waiting = self.calls.waiting.borrow_mut();
        let call = &mut waiting[self.id.slot];
        match call.answer.take() {
            Some(answer) => Poll::Ready(answer),
            None => {
                call.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        drop(self.calls.waiting.borrow_mut().remove(self.id.slot));
    }
}

/// The carrier's side of a call: a peer link keeps it until the answer arrives. Dropped without an
/// answer, the call ends with [`CallError::Lost`].
#[must_use]
pub struct PendingCall {
    calls: Rc<Calls>,
    id: Option<CallId>,
}

impl PendingCall {
    pub(crate) fn new(calls: &Rc<Calls>, id: CallId) -> PendingCall {
        PendingCall {
            calls: Rc::clone(calls),
            id: Some(id),
        }
    }

    /// Answers the call.
    pub fn complete(mut self, answer: Result<Bytes, CallError>) {
        if let Some(id) = self.id.take() {
            self.calls.complete(id, answer);
        }
    }

    /// Whether somebody still waits: false after the deadline, or when the caller has gone. A link
    /// need not send a request that nobody waits for, and may forget one that it has sent.
    pub fn is_wanted(&self) -> bool {
        self.id.is_some_and(|id| self.calls.is_waiting(id))
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.calls.complete(id, Err(CallError::Lost));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(answer: &mut Answer) -> Poll<Result<Bytes, CallError>> {
        Pin::new(answer).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_call_ends_with_its_answer_or_its_deadline() {
        let calls = Rc::new(Calls::default());
        let (answered, mut first) = calls.open(Instant(0), Instant(1_000_000_000));
        let (_, mut second) = calls.open(Instant(0), Instant(1_000_000_000));
        assert!(poll(&mut first).is_pending());
        assert!(poll(&mut second).is_pending());
        calls.complete(answered, Ok(Bytes::from("yes")));
        let mut woken = Vec::new();
        calls.sweep(Instant(1_000_000_000), &mut woken);
        assert_eq!(woken.len(), 1);
        assert_eq!(poll(&mut first), Poll::Ready(Ok(Bytes::from("yes"))));
        assert_eq!(poll(&mut second), Poll::Ready(Err(CallError::Lost)));
    }

    #[test]
    fn an_answer_that_comes_too_late_does_not_reach_the_next_call() {
        let calls = Rc::new(Calls::default());
        let (old, caller) = calls.open(Instant(0), Instant(1));
        drop(caller);
        let (_, mut next) = calls.open(Instant(0), Instant(1));
        calls.complete(old, Ok(Bytes::new()));
        assert!(poll(&mut next).is_pending());
    }

    #[test]
    fn a_carrier_that_gives_up_loses_the_call() {
        let calls = Rc::new(Calls::default());
        let (id, mut caller) = calls.open(Instant(0), Instant(u64::MAX));
        let carrier = PendingCall::new(&calls, id);
        assert!(carrier.is_wanted());
        drop(carrier);
        assert_eq!(poll(&mut caller), Poll::Ready(Err(CallError::Lost)));
    }

    #[test]
    fn sweeping_stops_when_nothing_waits() {
        let calls = Rc::new(Calls::default());
        assert_eq!(calls.next_sweep(), None);
        let (_, caller) = calls.open(Instant(0), Instant(5));
        assert!(calls.next_sweep().is_some());
        drop(caller);
        calls.sweep(Instant(10_000_000), &mut Vec::new());
        assert_eq!(calls.next_sweep(), None);
    }
}
