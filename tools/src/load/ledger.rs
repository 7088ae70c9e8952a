//! What is known of every key: the newest acknowledged write, and who is writing it now.
//!
//! One key has at most one write under way, so the order of its versions is known and a read can
//! be judged: it must return the newest version that was acknowledged before the read was sent, or
//! a newer one. Shared by all workers of a run.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;

/// The state of all keys of a run.
pub struct Ledger {
    keys: Vec<KeyState>,
}

#[derive(Default)]
struct KeyState {
    /// Sequence number of the newest acknowledged write; 0 before the first.
    acknowledged: AtomicU64,
    writing: AtomicBool,
    /// The version that the last acknowledged write returned, for the next write's context.
    context: Mutex<Option<Bytes>>,
}

/// The right to write one key, until it is finished.
pub struct WriteTurn<'a> {
    ledger: &'a Ledger,
    /// Index of the key.
    pub key: u64,
}

impl Ledger {
    /// A ledger for `count` keys of which nothing is known.
    pub fn new(count: u64) -> Self {
        Self {
            keys: (0..count).map(|_| KeyState::default()).collect(),
        }
    }

    /// The newest sequence number known to be acknowledged; 0 when there is none.
    pub fn acknowledged(&self, key: u64) -> u64 {
        self.state(key).acknowledged.load(Ordering::Acquire)
    }

    /// Takes the turn to write `key`, or the next key upwards that nobody is writing. `None` when
    /// every key is being written.
    pub fn write_turn(&self, key: u64) -> Option<WriteTurn<'_>> {
        let count = u64::try_from(self.keys.len()).expect("a length fits 64 bits");
        (0..count).map(|step| (key + step) % count).find_map(|key| {
            let free = !self.state(key).writing.swap(true, Ordering::AcqRel);
            free.then(|| WriteTurn { ledger: self, key })
        })
    }

    fn state(&self, key: u64) -> &KeyState {
        &self.keys[usize::try_from(key).expect("a key index fits the address space")]
    }
}

impl WriteTurn<'_> {
    /// The context for this write: the version of the last acknowledged one.
    pub fn context(&self) -> Option<Bytes> {
        self.context_slot().clone()
    }

    /// The write with `sequence` was acknowledged and answered `version`.
    pub fn acknowledged(self, sequence: u64, version: Option<Bytes>) {
        *self.context_slot() = version;
        let state = self.ledger.state(self.key);
        state.acknowledged.fetch_max(sequence, Ordering::AcqRel);
    }

    /// The write failed or is in doubt: what the key's context is now is unknown, so the next
    /// writer must ask.
    pub fn failed(self) {
        *self.context_slot() = None;
    }

    fn context_slot(&self) -> std::sync::MutexGuard<'_, Option<Bytes>> {
        self.ledger
            .state(self.key)
            .context
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for WriteTurn<'_> {
    fn drop(&mut self) {
        self.ledger
            .state(self.key)
            .writing
            .store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_has_one_writer() {
        let ledger = Ledger::new(3);
        let first = ledger.write_turn(1).unwrap();
        let second = ledger.write_turn(1).unwrap();
        assert_eq!((first.key, second.key), (1, 2));
        let third = ledger.write_turn(1).unwrap();
        assert_eq!(third.key, 0);
        assert!(ledger.write_turn(1).is_none());
        drop(first);
        assert_eq!(ledger.write_turn(0).unwrap().key, 1);
    }

    #[test]
    fn an_acknowledged_write_is_remembered_with_its_version() {
        let ledger = Ledger::new(1);
        ledger
            .write_turn(0)
            .unwrap()
            .acknowledged(5, Some(Bytes::from_static(b"v5")));
        assert_eq!(ledger.acknowledged(0), 5);
        let turn = ledger.write_turn(0).unwrap();
        assert_eq!(turn.context().as_deref(), Some(&b"v5"[..]));
        turn.failed();
        assert_eq!(ledger.acknowledged(0), 5, "a failure takes nothing back");
        assert!(ledger.write_turn(0).unwrap().context().is_none());
    }
}
