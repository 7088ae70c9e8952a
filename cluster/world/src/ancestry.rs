//! Which writes replaced which: the closure over what each had seen. And what may have become of a write
//! that somebody does not see.

use crate::history::{History, Kind, Value, Write, WriteId};

const WORD_BITS: usize = 64;

/// A set of writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteSet(Vec<u64>);

impl WriteSet {
    /// Adds a write.
    pub fn insert(&mut self, write: WriteId) {
        let (word, bit) = place(write);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= bit;
    }

    /// Whether the write is in it.
    pub fn contains(&self, write: WriteId) -> bool {
        let (word, bit) = place(write);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }

    /// Its writes, in order.
    pub fn iter(&self) -> impl Iterator<Item = WriteId> + '_ {
        let writes = 0..u32::try_from(self.0.len() * WORD_BITS).expect("fewer than 2^32 writes");
        writes.map(WriteId).filter(|write| self.contains(*write))
    }

    /// Adds all of another set.
    pub fn extend(&mut self, other: &WriteSet) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine |= theirs;
        }
    }
}

fn place(write: WriteId) -> (usize, u64) {
    (write.index() / WORD_BITS, 1 << (write.index() % WORD_BITS))
}

/// The ancestors of every write of a history, and what may be gone without a trace.
pub struct Ancestry {
    ancestors: Vec<WriteSet>,
    /// Where writes are ordered by time: what may have lost against each write, its ancestors or not.
    beaten: Option<Vec<WriteSet>>,
    /// From when on there need be no value of each write, nor of another in its place: a delete replaced it, or
    /// what replaced it has expired, or it has itself.
    gone_from_ns: Vec<u64>,
}

/// What somebody sees of a key at some time.
pub struct Shown<'a> {
    ancestry: &'a Ancestry,
    /// What is shown, and all whose place it may have taken.
    taken: WriteSet,
    at_ns: u64,
    /// What is shown took the place of all else: nothing is missing because something else has hidden it.
    is_all: bool,
}

impl Shown<'_> {
    /// Whether the write is shown, or may be missing for a reason: a delete or an expired value leaves nothing
    /// that would show it, so whoever misses what they may have replaced has to let it pass.
    pub fn accounts_for(&self, write: WriteId) -> bool {
        let is_gone = || self.ancestry.gone_from_ns[write.index()] <= self.at_ns;
        self.taken.contains(write) || (!self.is_all && is_gone())
    }
}

impl Ancestry {
    /// Follows what each write had seen. A write can only have seen earlier ones.
    pub fn of(history: &History) -> Self {
        let ancestors = ancestors(history);
        let mut ancestry = Self {
            beaten: history
                .is_ordered_by_time
                .then(|| beaten(history, &ancestors)),
            gone_from_ns: vec![u64::MAX; ancestors.len()],
            ancestors,
        };
        for (id, write) in history.numbered() {
            if let Some(from_ns) = gone_from_ns(history, write) {
                ancestry.go(id, write.kind, from_ns);
            }
        }
        ancestry
    }

    /// From this time on nothing need be left of what a write took the place of, nor of a value that it wrote.
    fn go(&mut self, id: WriteId, kind: Kind, from_ns: u64) {
        let own = (kind == Kind::Put).then_some(id);
        let gone: Vec<WriteId> = self.place_of(id).iter().chain(own).collect();
        for write in gone {
            let known_ns = &mut self.gone_from_ns[write.index()];
            *known_ns = from_ns.min(*known_ns);
        }
    }

    /// What the write took the place of, if it has.
    fn place_of(&self, write: WriteId) -> &WriteSet {
        let sets = self.beaten.as_ref().unwrap_or(&self.ancestors);
        &sets[write.index()]
    }

    /// What the write replaced, directly or through what it had seen.
    pub fn of_write(&self, write: WriteId) -> &WriteSet {
        &self.ancestors[write.index()]
    }

    /// What somebody sees who is shown these values at this time.
    pub fn shown(&self, values: &[Value], at_ns: u64) -> Shown<'_> {
        let mut taken = WriteSet::default();
        for write in values.iter().filter_map(Value::write) {
            taken.insert(write);
            taken.extend(self.place_of(write));
        }
        Shown {
            ancestry: self,
            is_all: self.beaten.is_some() && taken != WriteSet::default(),
            taken,
            at_ns,
        }
    }
}

/// Follows what each write had seen.
fn ancestors(history: &History) -> Vec<WriteSet> {
    let mut ancestors: Vec<WriteSet> = Vec::with_capacity(history.writes.len());
    for (id, write) in history.numbered() {
        let mut set = WriteSet::default();
        for seen in &write.seen {
            assert!(*seen < id, "{id} has seen {seen}, which had not begun");
            // One that was sent twice may have a stamp that was not shown, and is higher than what followed.
            if !(history.is_ordered_by_time && history.write(*seen).is_retried) {
                set.insert(*seen);
            }
            set.extend(&ancestors[seen.index()]);
        }
        ancestors.push(set);
    }
    ancestors
}

/// For each write those that lost if it won: it has not been seen by them, and is not stamped below them for sure.
fn beaten(history: &History, ancestors: &[WriteSet]) -> Vec<WriteSet> {
    let beaten_by = |(winner, won): (WriteId, &Write)| {
        let mut set = WriteSet::default();
        for (other, lost) in history.numbered() {
            let is_above =
                ancestors[other.index()].contains(winner) || history.is_stamped_above(lost, won);
            if lost.key == won.key && other != winner && !is_above {
                set.insert(other);
            }
        }
        set
    };
    history.numbered().map(beaten_by).collect()
}

/// From when on a write, if it happened, leaves no value; `None` = never.
fn gone_from_ns(history: &History, write: &Write) -> Option<u64> {
    if write.outcome.is_refused() {
        return None;
    }
    match write.kind {
        Kind::Delete => Some(0),
        // A reader's clock may be off too.
        Kind::Put => {
            let expires_ns = history.expires_ns_min(write)?;
            Some(expires_ns.saturating_sub(history.times.clock_off_ns))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::{tell, w};

    #[test]
    fn ancestors_are_followed_through_every_write() {
        let ancestry = Ancestry::of(&tell("put \n put sees 0 \n put sees 1 \n put"));
        assert!(ancestry.of_write(w(2)).contains(w(0)));
        assert!(!ancestry.of_write(w(3)).contains(w(0)));
        let shown = ancestry.shown(&[Value::Of(w(2))], 0);
        assert!([0, 1, 2].into_iter().all(|id| shown.accounts_for(w(id))));
        assert!(!shown.accounts_for(w(3)));
    }

    #[test]
    fn only_deletes_that_may_have_happened_excuse_an_absence() {
        let deleted = |story| Ancestry::of(&tell(story)).shown(&[], 0).accounts_for(w(0));
        assert!(!deleted("put"));
        assert!(!deleted("put \n delete sees 0 refused"));
        assert!(!deleted("put \n put sees 0"));
        assert!(deleted("put \n delete sees 0 doubt"));
    }

    #[test]
    fn what_expires_excuses_an_absence_once_its_time_has_come() {
        let history = tell("put \n put sees 0 lives 100 \n put");
        let ancestry = Ancestry::of(&history);
        let from_ns = history.writes[1].begun_ns + 100;
        for (at_ns, is_gone) in [(from_ns - 1, false), (from_ns, true)] {
            let shown = ancestry.shown(&[], at_ns);
            assert_eq!(shown.accounts_for(w(0)), is_gone);
            assert_eq!(shown.accounts_for(w(1)), is_gone);
            assert!(!shown.accounts_for(w(2)), "it lives for ever");
        }
        let mut history = history;
        history.times.clock_off_ns = 7;
        let ancestry = Ancestry::of(&history);
        let gone_at = |at_ns| ancestry.shown(&[], at_ns).accounts_for(w(1));
        assert!(
            !gone_at(from_ns - 15) && gone_at(from_ns - 14),
            "two clocks"
        );
    }

    #[test]
    fn where_writes_are_ordered_by_time_one_takes_the_place_of_all_but_its_followers() {
        let history = tell("lww \n put \n & put \n & put sees 0 \n & delete doubt");
        let ancestry = Ancestry::of(&history);
        let shown = |values: &[Value]| {
            let shown = ancestry.shown(values, 0);
            [0, 1, 2].map(|id| shown.accounts_for(w(id)))
        };
        assert_eq!(shown(&[Value::Of(w(0))]), [true, true, false]);
        assert_eq!(shown(&[Value::Of(w(1))]), [true, true, true]);
        assert_eq!(shown(&[]), [true, true, true], "the delete may have won");
    }

    #[test]
    fn a_write_that_is_much_later_wins_whatever_the_clocks_are() {
        let mut history = tell("lww \n put \n put");
        let places = |history: &History| {
            Ancestry::of(history)
                .shown(&[Value::Of(w(0))], 0)
                .accounts_for(w(1))
        };
        assert!(!places(&history));
        history.times.clock_off_ns = 10;
        assert!(places(&history), "the first one's clock may be ahead");
        history.writes[1].begun_ns += 100;
        assert!(!places(&history));
        history.writes[0].is_retried = true;
        history.times.late_ns = 1_000;
        assert!(places(&history), "its last attempt may be late");
    }

    #[test]
    fn sets_grow_over_words() {
        let mut set = WriteSet::default();
        set.insert(w(200));
        let mut other = WriteSet::default();
        other.insert(w(3));
        other.extend(&set);
        assert!(other.contains(w(200)) && other.contains(w(3)) && !other.contains(w(4)));
        assert!(other.iter().eq([w(3), w(200)]));
    }
}
