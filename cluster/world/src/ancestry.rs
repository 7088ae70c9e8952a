//! Which writes replaced which: the closure over what each had seen.

use crate::history::{History, Kind, Value, WriteId};

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

/// The ancestors of every write of a history, and what deletes have removed.
pub struct Ancestry {
    ancestors: Vec<WriteSet>,
    /// What any delete that may have happened had seen.
    deleted: WriteSet,
}

impl Ancestry {
    /// Follows what each write had seen. A write can only have seen earlier ones.
    pub fn of(history: &History) -> Self {
        let mut ancestors: Vec<WriteSet> = Vec::with_capacity(history.writes.len());
        let mut deleted = WriteSet::default();
        for (id, write) in history.numbered() {
            let mut set = WriteSet::default();
            for seen in &write.seen {
                assert!(*seen < id, "{id} has seen {seen}, which had not begun");
                set.insert(*seen);
                set.extend(&ancestors[seen.index()]);
            }
            if write.kind == Kind::Delete && !write.outcome.is_refused() {
                deleted.extend(&set);
            }
            ancestors.push(set);
        }
        Self { ancestors, deleted }
    }

    /// What the write replaced, directly or through what it had seen.
    pub fn of_write(&self, write: WriteId) -> &WriteSet {
        &self.ancestors[write.index()]
    }

    /// These values and all that they replaced.
    pub fn closure<'a>(&self, values: impl IntoIterator<Item = &'a Value>) -> WriteSet {
        self.closure_of(values.into_iter().filter_map(Value::write))
    }

    /// These writes and all that they replaced.
    pub fn closure_of(&self, writes: impl IntoIterator<Item = WriteId>) -> WriteSet {
        let mut set = WriteSet::default();
        for write in writes {
            set.insert(write);
            set.extend(self.of_write(write));
        }
        set
    }

    /// Whether a delete that may have happened replaced the write. A delete leaves no value that
    /// would show it, so whoever misses such a write has to let it pass.
    pub fn may_be_deleted(&self, write: WriteId) -> bool {
        self.deleted.contains(write)
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
        let closure = ancestry.closure(&[Value::Of(w(2))]);
        assert!([0, 1, 2].into_iter().all(|id| closure.contains(w(id))));
        assert!(!closure.contains(w(3)));
    }

    #[test]
    fn only_deletes_that_may_have_happened_excuse_an_absence() {
        let deleted = |story| Ancestry::of(&tell(story)).may_be_deleted(w(0));
        assert!(!deleted("put"));
        assert!(!deleted("put \n delete sees 0 refused"));
        assert!(!deleted("put \n put sees 0"));
        assert!(deleted("put \n delete sees 0 doubt"));
    }

    #[test]
    fn sets_grow_over_words() {
        let mut set = WriteSet::default();
        set.insert(w(200));
        let mut other = WriteSet::default();
        other.insert(w(3));
        other.extend(&set);
        assert!(other.contains(w(200)) && other.contains(w(3)) && !other.contains(w(4)));
    }
}
