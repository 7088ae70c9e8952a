//! What is known of every key: the newest acknowledged write, and who is writing it now.
//!
//! One key has at most one write under way, so the order of its versions is known and a read can
//! be judged: it must return the newest version that was acknowledged before the read was sent, or
//! a newer one. Shared by all workers of a run. Memory is taken for keys that are touched.
//!
//! Each operation looks at the state of a key drawn at random, which is seldom in a cache: it is
//! kept small, and apart from what few operations need.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;

use super::value::Sequence;

/// Keys whose state is allocated together.
const CHUNK_KEYS: u64 = 4096;
/// Keys that can be inserted beyond those at the start.
const INSERTS_MAX: u64 = 256 << 20;

/// Something of each key, in chunks that are there once one of their keys is touched.
type Chunks<T> = Vec<OnceLock<Box<[T]>>>;
/// The version that the last acknowledged write of a key returned, for the next write's context.
type Context = Mutex<Option<Bytes>>;

/// The state of all keys of a run.
pub struct Ledger {
    states: Chunks<KeyState>,
    /// None of them is there where servers return no versions.
    contexts: Chunks<Context>,
    /// Keys at the start.
    base: u64,
    /// Keys by now: those below exist or are being inserted.
    count: AtomicU64,
    /// Inserts under way.
    inserting: AtomicU64,
    /// Of every `parts` keys, this run writes the one with remainder `part`: several machines
    /// share the keys.
    part: u64,
    parts: u64,
}

#[derive(Default)]
struct KeyState {
    /// Sequence of the newest acknowledged change, shifted by one; the lowest bit is set when it
    /// was a deletion. 0 before the first.
    acknowledged: AtomicU64,
    /// Deletions that were begun.
    deletions: AtomicU32,
    writing: AtomicBool,
    /// Whether the write under way is a deletion. Set before `deletions` is raised, cleared after
    /// `acknowledged` is.
    deleting: AtomicBool,
    /// Whether a deletion failed with an open outcome, so that the key may be gone.
    may_be_deleted: AtomicBool,
    /// How long after the time in its sequence the newest acknowledged change was acknowledged at the
    /// latest: see [`Within`]. Unknown while `acknowledged` is raised, so that it is never taken for that
    /// of another change.
    within: AtomicU8,
}

const _: () = assert!(size_of::<KeyState>() == 16, "see the head of this file");

/// A time in microseconds, rounded up by an eighth at most, in one byte.
struct Within;

impl Within {
    const UNKNOWN: u8 = u8::MAX;

    fn of(micros: u64) -> u8 {
        // Eight steps to a factor of two, from eight microseconds on.
        let power = micros.max(8).ilog2() - 3;
        let steps = micros.max(8).div_ceil(1 << power) - 8;
        u8::try_from(u64::from(power) * 8 + steps).unwrap_or(Self::UNKNOWN)
    }

    fn micros(code: u8) -> Option<u64> {
        let steps = u64::from(code);
        (code != Self::UNKNOWN).then(|| (8 + steps % 8) << (steps / 8))
    }
}

/// The newest acknowledged change of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Floor {
    /// Its sequence; 0 when nothing was acknowledged.
    pub sequence: Sequence,
    /// Whether it deleted the key, or a deletion may have.
    pub deleted: bool,
    /// Deletions that had begun.
    deletions: u32,
}

/// The right to write one key, until it is finished.
pub struct WriteTurn<'a> {
    ledger: &'a Ledger,
    /// Index of the key.
    pub key: u64,
    /// Whether it is another than was asked for, because that one was being written.
    pub moved: bool,
    inserts: bool,
    deletes: bool,
}

impl Ledger {
    /// A ledger for `base` keys of which nothing is known; see [`Ledger`] for the parts.
    ///
    /// # Panics
    /// When there is no key, or `part` is not below `parts`.
    pub fn new(base: u64, part: u64, parts: u64) -> Self {
        assert!(
            base > 0 && part < parts,
            "keys are needed, and a part of them"
        );
        let chunks = (base + INSERTS_MAX).div_ceil(CHUNK_KEYS);
        Self {
            states: (0..chunks).map(|_| OnceLock::new()).collect(),
            contexts: (0..chunks).map(|_| OnceLock::new()).collect(),
            base,
            count: AtomicU64::new(base),
            inserting: AtomicU64::new(0),
            part,
            parts,
        }
    }

    /// Keys that exist: those at the start, and all inserts but those under way.
    pub fn settled(&self) -> u64 {
        let inserting = self.inserting.load(Ordering::Relaxed);
        let count = self.count.load(Ordering::Relaxed);
        count.saturating_sub(inserting * self.parts).max(self.base)
    }

    /// The newest change known to be acknowledged.
    pub fn floor(&self, key: u64) -> Floor {
        let state = self.state(key);
        // In this order: a deletion that begins meanwhile is missed by the first, and then shows
        // when the answer is judged; one that ends meanwhile is missed by the second, and then is
        // in the third.
        let deletions = state.deletions.load(Ordering::Acquire);
        let deleting = state.deleting.load(Ordering::Acquire);
        let word = state.acknowledged.load(Ordering::Acquire);
        let may_be_deleted = state.may_be_deleted.load(Ordering::Acquire);
        Floor {
            sequence: Sequence(word >> 1),
            deleted: word & 1 == 1 || may_be_deleted || deleting,
            deletions,
        }
    }

    /// A change that was acknowledged before `civil_us`, if it is known of the newest one, for a reader
    /// who learns only from the answer which keys it has read.
    pub fn floor_at(&self, key: u64, civil_us: u64) -> Floor {
        let (chunk, at) = place(key);
        // A key that nobody here has touched takes no memory, and may be beyond all that can be.
        let Some(state) = self.states.get(chunk).and_then(OnceLock::get) else {
            return Floor::default();
        };
        let word = state[at].acknowledged.load(Ordering::Acquire);
        let within = Within::micros(state[at].within.load(Ordering::Acquire));
        let same = word == state[at].acknowledged.load(Ordering::Acquire);
        let sequence = Sequence(word >> 1);
        let known = same && within.is_some_and(|most| sequence.micros() + most <= civil_us);
        Floor {
            sequence: if known { sequence } else { Sequence(0) },
            ..Floor::default()
        }
    }

    /// Whether a read that was sent at `floor` and has its answer now may find nothing: the key was
    /// never written, or a deletion was begun that it may have seen.
    pub fn may_be_missing(&self, key: u64, floor: Floor) -> bool {
        let begun = self.state(key).deletions.load(Ordering::Acquire);
        floor.sequence == Sequence(0) || floor.deleted || begun != floor.deletions
    }

    /// Takes the turn to write `key`. `None` while it is being written.
    pub fn write_turn(&self, key: u64) -> Option<WriteTurn<'_>> {
        let free = !self.state(key).writing.swap(true, Ordering::AcqRel);
        // Not `then_some`: a turn that is dropped ends.
        free.then(|| WriteTurn {
            ledger: self,
            key,
            moved: false,
            inserts: false,
            deletes: false,
        })
    }

    /// Takes the turn to write `key`, or the next key upwards that this run writes and nobody is
    /// writing. `None` while every key is being written. `key` is one of those that exist.
    pub fn write_turn_from(&self, key: u64) -> Option<WriteTurn<'_>> {
        let upwards = key..self.settled();
        let mine = |key: &u64| self.parts == 1 || key % self.parts == self.part;
        upwards
            .chain(0..key)
            .filter(mine)
            .enumerate()
            .find_map(|(tried, key)| {
                let mut turn = self.write_turn(key)?;
                turn.moved = tried > 0;
                Some(turn)
            })
    }

    /// Takes the turn to write a key that does not exist yet. `None` when there is no more room.
    pub fn insert_turn(&self) -> Option<WriteTurn<'_>> {
        let room = self.base + INSERTS_MAX - self.parts;
        self.inserting.fetch_add(1, Ordering::Relaxed);
        let taken = self
            .count
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                (count < room).then_some(count + self.parts)
            });
        let Ok(count) = taken else {
            self.inserting.fetch_sub(1, Ordering::Relaxed);
            return None;
        };
        let key = count - count % self.parts + self.part;
        self.state(key).writing.store(true, Ordering::Release);
        Some(WriteTurn {
            ledger: self,
            key,
            moved: false,
            inserts: true,
            deletes: false,
        })
    }

    fn state(&self, key: u64) -> &KeyState {
        let (chunk, at) = place(key);
        &self.states[chunk].get_or_init(untouched)[at]
    }

    fn set_context(&self, key: u64, version: Bytes) {
        let (chunk, at) = place(key);
        *lock(&self.contexts[chunk].get_or_init(untouched)[at]) = Some(version);
    }

    fn forget_context(&self, key: u64) {
        let (chunk, at) = place(key);
        if let Some(contexts) = self.contexts[chunk].get() {
            *lock(&contexts[at]) = None;
        }
    }

    fn context(&self, key: u64) -> Option<Bytes> {
        let (chunk, at) = place(key);
        lock(&self.contexts[chunk].get()?[at]).clone()
    }
}

/// The chunk of a key, and its number there.
fn place(key: u64) -> (usize, usize) {
    let chunk = usize::try_from(key / CHUNK_KEYS).expect("a chunk fits the address space");
    let at = usize::try_from(key % CHUNK_KEYS).expect("below the size of a chunk");
    (chunk, at)
}

fn untouched<T: Default>() -> Box<[T]> {
    (0..CHUNK_KEYS).map(|_| T::default()).collect()
}

fn lock(context: &Context) -> MutexGuard<'_, Option<Bytes>> {
    context.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WriteTurn<'_> {
    /// The context for this write: the version of the last acknowledged one.
    pub fn context(&self) -> Option<Bytes> {
        self.ledger.context(self.key)
    }

    /// The change will be a deletion: from now on the key may be missing.
    pub fn begin_deletion(&mut self) {
        self.deletes = true;
        let state = self.ledger.state(self.key);
        state.deleting.store(true, Ordering::Release);
        state.deletions.fetch_add(1, Ordering::AcqRel);
    }

    /// The sequence of the change that comes after the newest acknowledged one, now.
    pub fn next_sequence(&self, now_us: u64) -> Sequence {
        self.ledger.floor(self.key).sequence.next(now_us)
    }

    /// The change with `sequence` was acknowledged by `civil_us` and answered `version`.
    pub fn acknowledged(
        self,
        sequence: Sequence,
        deleted: bool,
        version: Option<Bytes>,
        civil_us: u64,
    ) {
        if let Some(version) = version {
            self.ledger.set_context(self.key, version);
        }
        let state = self.ledger.state(self.key);
        let word = (sequence.0 << 1) | u64::from(deleted);
        // Nobody else changes it meanwhile.
        if word > state.acknowledged.load(Ordering::Relaxed) {
            state.within.store(Within::UNKNOWN, Ordering::Release);
            state.acknowledged.store(word, Ordering::Release);
            let within = Within::of(civil_us.saturating_sub(sequence.micros()));
            state.within.store(within, Ordering::Release);
        }
    }

    /// The write failed or is in doubt: what the key's context is now is unknown, so the next
    /// writer must ask. `may_delete` when it was a deletion that may have been done.
    pub fn failed(self, may_delete: bool) {
        self.ledger.forget_context(self.key);
        if may_delete {
            let state = self.ledger.state(self.key);
            state.may_be_deleted.store(true, Ordering::Release);
        }
    }
}

impl Drop for WriteTurn<'_> {
    fn drop(&mut self) {
        let state = self.ledger.state(self.key);
        if self.deletes {
            state.deleting.store(false, Ordering::Release);
        }
        state.writing.store(false, Ordering::Release);
        if self.inserts {
            self.ledger.inserting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_has_one_writer() {
        let ledger = Ledger::new(3, 0, 1);
        let first = ledger.write_turn(1).unwrap();
        assert!(ledger.write_turn(1).is_none());
        let second = ledger.write_turn_from(1).unwrap();
        let third = ledger.write_turn_from(1).unwrap();
        assert_eq!((first.key, second.key, third.key), (1, 2, 0));
        assert!(!first.moved && second.moved && third.moved);
        assert!(ledger.write_turn_from(1).is_none());
        drop(first);
        assert_eq!(ledger.write_turn_from(0).unwrap().key, 1);
    }

    #[test]
    fn an_acknowledged_write_is_remembered_with_its_version() {
        let ledger = Ledger::new(1, 0, 1);
        let turn = ledger.write_turn(0).unwrap();
        let sequence = turn.next_sequence(5);
        turn.acknowledged(sequence, false, Some(Bytes::from_static(b"v5")), 5);
        assert_eq!(ledger.floor(0).sequence, sequence);
        let turn = ledger.write_turn(0).unwrap();
        assert_eq!(turn.context().as_deref(), Some(&b"v5"[..]));
        turn.failed(false);
        let floor = ledger.floor(0);
        assert_eq!(floor.sequence, sequence, "a failure takes nothing back");
        let turn = ledger.write_turn(0).unwrap();
        assert!(turn.context().is_none());
        let next = turn.next_sequence(5);
        assert!(
            next > sequence,
            "the clock stood still, the sequence did not"
        );
        turn.acknowledged(next, true, None, 5);
        assert!(ledger.floor(0).deleted);
    }

    #[test]
    fn a_key_may_be_missing_from_the_beginning_of_a_deletion_on() {
        let ledger = Ledger::new(1, 0, 1);
        assert!(ledger.may_be_missing(0, ledger.floor(0)), "never written");
        let write = || {
            let turn = ledger.write_turn(0).unwrap();
            let sequence = turn.next_sequence(1);
            turn.acknowledged(sequence, false, None, 1);
        };
        write();
        let floor = ledger.floor(0);
        assert!(!ledger.may_be_missing(0, floor));
        let mut turn = ledger.write_turn(0).unwrap();
        turn.begin_deletion();
        assert!(
            ledger.may_be_missing(0, floor),
            "a read under way may see it"
        );
        assert!(
            ledger.may_be_missing(0, ledger.floor(0)),
            "and one that is sent meanwhile"
        );
        let sequence = turn.next_sequence(1);
        turn.acknowledged(sequence, true, None, 1);
        write();
        assert!(
            ledger.may_be_missing(0, floor),
            "its answer may be that old"
        );
        assert!(!ledger.may_be_missing(0, ledger.floor(0)), "written again");
    }

    #[test]
    fn a_change_is_known_for_one_that_was_acknowledged_before_a_moment_only_where_that_is_sure() {
        let ledger = Ledger::new(9, 0, 1);
        let turn = ledger.write_turn(0).unwrap();
        let sequence = turn.next_sequence(1_000_000);
        turn.acknowledged(sequence, false, None, 1_000_700);
        let at = |civil_us| ledger.floor_at(0, civil_us).sequence;
        assert_eq!(at(1_000_699), Sequence(0));
        assert_eq!(
            at(1_000_800),
            sequence,
            "a time is rounded up by an eighth at most"
        );
        for untouched in [8, 5_000, u64::MAX] {
            assert_eq!(ledger.floor_at(untouched, u64::MAX).sequence, Sequence(0));
        }
        assert!(ledger.states[1].get().is_none(), "looking takes no memory");
    }

    #[test]
    fn a_time_is_never_rounded_down_nor_up_by_more_than_an_eighth() {
        for micros in (0..100_000).chain((0..30).map(|bits| (1 << bits) + 1)) {
            let most = Within::micros(Within::of(micros)).unwrap();
            assert!(
                most >= micros && most <= 8 + micros + micros / 8,
                "{micros}: {most}"
            );
        }
        assert_eq!(Within::micros(Within::of(u64::MAX)), None);
    }

    #[test]
    fn inserted_keys_exist_once_they_are_acknowledged() {
        let ledger = Ledger::new(10, 0, 1);
        let turn = ledger.insert_turn().unwrap();
        assert_eq!((turn.key, ledger.settled()), (10, 10));
        let sequence = turn.next_sequence(1);
        turn.acknowledged(sequence, false, None, 1);
        assert_eq!(ledger.settled(), 11);
    }

    #[test]
    fn machines_write_different_keys() {
        let ledgers = [Ledger::new(10, 0, 2), Ledger::new(10, 1, 2)];
        let mut keys = Vec::new();
        for ledger in &ledgers {
            keys.push(ledger.write_turn_from(4).unwrap().key);
            keys.push(ledger.insert_turn().unwrap().key);
        }
        assert_eq!(keys, [4, 10, 5, 11]);
    }
}
