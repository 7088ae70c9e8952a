//! Operations that wait for the turn to write their key, aside from all that need not.
//!
//! One key has one writer at a time. An operation whose key is being written may not hold up what is
//! due after it on other keys, and may not be overtaken on its own: while one waits, what follows on
//! its key waits behind it.

use std::collections::{BTreeMap, VecDeque};

use super::Task;

/// Tasks that wait, by key in order of their turns; under no key those that take any.
#[derive(Default)]
pub struct Waiting {
    queues: BTreeMap<Option<u64>, VecDeque<Task>>,
    /// Queues whose first may have its turn now.
    awake: VecDeque<Option<u64>>,
    count: usize,
}

impl Waiting {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether a task on this key would overtake one.
    pub fn holds(&self, key: Option<u64>) -> bool {
        self.count > 0 && key.is_some() && self.queues.contains_key(&key)
    }

    /// Puts a task behind all that wait for its key.
    pub fn push(&mut self, task: Task) {
        self.count += 1;
        self.queues.entry(task.key).or_default().push_back(task);
    }

    /// Puts a task back that had been taken, and whose turn has not come.
    pub fn put_back(&mut self, task: Task) {
        self.count += 1;
        self.queues.entry(task.key).or_default().push_front(task);
    }

    /// A write of `key` has ended: whoever waits for it, or for any, may have its turn.
    pub fn wake(&mut self, key: u64) {
        if self.count > 0 {
            self.awake.push_back(Some(key));
            self.awake.push_back(None);
        }
    }

    /// The turns of others have moved on.
    pub fn wake_all(&mut self) {
        self.awake.clear();
        self.awake.extend(self.queues.keys());
    }

    /// A task that may have its turn now.
    pub fn take_awake(&mut self) -> Option<Task> {
        while let Some(key) = self.awake.pop_front() {
            if let Some(task) = self.take_of(key) {
                return Some(task);
            }
        }
        None
    }

    /// Any task.
    pub fn take(&mut self) -> Option<Task> {
        let key = *self.queues.keys().next()?;
        self.take_of(key)
    }

    fn take_of(&mut self, key: Option<u64>) -> Option<Task> {
        let queue = self.queues.get_mut(&key)?;
        let task = queue.pop_front()?;
        if queue.is_empty() {
            self.queues.remove(&key);
        }
        self.count -= 1;
        Some(task)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::schedule::Due;
    use torc_measure::mix::Operation;

    fn task(key: Option<u64>, at: u64) -> Task {
        Task {
            operation: Operation::Write,
            key,
            row: None,
            due: Due { at, left: 0 },
            waited: false,
        }
    }

    #[test]
    fn tasks_of_a_key_keep_their_order_and_others_pass() {
        let mut waiting = Waiting::default();
        for (key, at) in [(Some(7), 1), (Some(7), 2), (None, 3), (Some(9), 4)] {
            waiting.push(task(key, at));
        }
        assert!(waiting.holds(Some(7)) && !waiting.holds(Some(8)) && !waiting.holds(None));
        assert!(waiting.take_awake().is_none(), "nothing has ended");
        waiting.wake(7);
        let first = waiting.take_awake().unwrap();
        assert_eq!(first.due.at, 1);
        waiting.put_back(first);
        assert_eq!(waiting.take_awake().unwrap().due.at, 3, "any key will do");
        assert!(waiting.take_awake().is_none());
        waiting.wake_all();
        let order = [1, 4].map(|_| waiting.take_awake().unwrap().due.at);
        assert_eq!(order, [1, 4]);
        assert_eq!((waiting.len(), waiting.take().unwrap().due.at), (1, 2));
        assert!(waiting.take().is_none() && !waiting.holds(Some(7)));
    }
}
