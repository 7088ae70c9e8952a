//! Where clients write down what they did, while they do it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::history::{DotSeen, History, Outcome, Read, Write, WriteId};

/// A history that is being written. Clones share it.
#[derive(Clone)]
pub(crate) struct Recorder(Rc<RefCell<Recording>>);

#[derive(Default)]
struct Recording {
    history: History,
    /// How often clients got each failure, by its text.
    failures: BTreeMap<String, usize>,
}

impl Recorder {
    /// Of a run about which this is known.
    pub(crate) fn new(known: History) -> Self {
        let recording = Recording {
            history: known,
            ..Recording::default()
        };
        Self(Rc::new(RefCell::new(recording)))
    }

    /// Notes a write before it is sent, and numbers it.
    pub(crate) fn begin(&self, write: Write) -> WriteId {
        let writes = &mut self.0.borrow_mut().history.writes;
        let number = u32::try_from(writes.len()).expect("fewer than 2^32 writes");
        writes.push(write);
        WriteId(number)
    }

    pub(crate) fn retried(&self, id: WriteId) {
        self.0.borrow_mut().history.writes[id.index()].is_retried = true;
    }

    pub(crate) fn end(&self, id: WriteId, now_ns: u64, outcome: Outcome) {
        let write = &mut self.0.borrow_mut().history.writes[id.index()];
        write.ended_ns = now_ns;
        write.outcome = outcome;
    }

    pub(crate) fn read(&self, read: Read) {
        self.0.borrow_mut().history.reads.push(read);
    }

    pub(crate) fn failure(&self, text: String) {
        *self.0.borrow_mut().failures.entry(text).or_default() += 1;
    }

    /// How often clients got each failure.
    pub(crate) fn failures(&self) -> BTreeMap<String, usize> {
        self.0.borrow().failures.clone()
    }

    pub(crate) fn dot(&self, seen: DotSeen) {
        let dots = &mut self.0.borrow_mut().history.dots;
        if !dots.contains(&seen) {
            dots.push(seen);
        }
    }

    /// The last look at the replicas begins.
    pub(crate) fn looked_at_last(&self, now_ns: u64) {
        self.0.borrow_mut().history.last_look_ns = now_ns;
    }

    pub(crate) fn finish(&self, finals: Vec<crate::history::Final>) -> History {
        let mut history = std::mem::take(&mut self.0.borrow_mut().history);
        history.finals = finals;
        history
    }
}
