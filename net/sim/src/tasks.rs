//! Tasks, and which of those that are ready runs next.
//!
//! The choice comes from the seed: every order that a real executor could produce, and many that
//! it would produce once in a year.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Wake, Waker};

use crossbeam_queue::SegQueue;
use torc_env::Class;

use crate::host::{HostId, Life};
use crate::options::Schedule;
use crate::rng::Rng;

pub(crate) type TaskFuture = Pin<Box<dyn Future<Output = ()>>>;

/// A task's place and the generation of its tenant there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskKey {
    index: u32,
    generation: u32,
}

impl TaskKey {
    pub(crate) fn number(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }
}

/// Who a task belongs to: the harness, or one life of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Harness,
    Host(HostId, Life),
}

/// What a task competes as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Shard(Class),
    /// A background job. `starved` ones wait before every step.
    Job {
        starved: bool,
    },
    Harness,
}

const LANES: usize = Class::ALL.len() + 2;

impl Kind {
    fn lane(self) -> usize {
        match self {
            Kind::Shard(class) => class.index(),
            Kind::Job { .. } => Class::ALL.len(),
            Kind::Harness => Class::ALL.len() + 1,
        }
    }
}

/// Queues its task when woken. Wakers are `Send`, hence the queue without locks; only one thread
/// ever uses it.
struct TaskWaker {
    key: TaskKey,
    queued: AtomicBool,
    woken: Arc<SegQueue<TaskKey>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.woken.push(self.key);
        }
    }
}

struct Task {
    /// Absent while it is being polled.
    future: Option<TaskFuture>,
    owner: Owner,
    kind: Kind,
    waker: Arc<TaskWaker>,
}

struct Slot {
    generation: u32,
    task: Option<Task>,
}

/// Every task of the world.
pub(crate) struct Tasks {
    slots: Vec<Slot>,
    free: Vec<u32>,
    ready: [Vec<TaskKey>; LANES],
    ready_count: usize,
    woken: Arc<SegQueue<TaskKey>>,
}

/// A task taken out to be polled.
pub(crate) struct Running {
    pub(crate) key: TaskKey,
    pub(crate) future: TaskFuture,
    pub(crate) waker: Waker,
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            ready: Default::default(),
            ready_count: 0,
            woken: Arc::new(SegQueue::new()),
        }
    }

    /// Adds a task; it is woken at once.
    pub(crate) fn add(&mut self, owner: Owner, kind: Kind, future: TaskFuture) -> TaskKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                task: None,
            });
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 tasks")
        });
        let slot = &mut self.slots[index as usize];
        let key = TaskKey {
            index,
            generation: slot.generation,
        };
        slot.task = Some(Task {
            future: Some(future),
            owner,
            kind,
            waker: Arc::new(TaskWaker {
                key,
                queued: AtomicBool::new(true),
                woken: self.woken.clone(),
            }),
        });
        self.woken.push(key);
        key
    }

    /// The next task that was woken and still lives, with its owner and kind.
    pub(crate) fn next_woken(&mut self) -> Option<(TaskKey, Owner, Kind)> {
        while let Some(key) = self.woken.pop() {
            if let Some(task) = self.get(key) {
                return Some((key, task.owner, task.kind));
            }
        }
        None
    }

    /// Lets a woken task compete for the next poll.
    pub(crate) fn make_ready(&mut self, key: TaskKey) {
        if let Some(task) = self.get(key) {
            let lane = task.kind.lane();
            self.ready[lane].push(key);
            self.ready_count += 1;
        }
    }

    /// Chooses a ready task and takes it out. The caller gives it back with
    /// [`Tasks::put_back`] or [`Tasks::remove`].
    pub(crate) fn choose(&mut self, schedule: &Schedule, rng: &mut Rng) -> Option<Running> {
        while self.ready_count > 0 {
            let lane = self.choose_lane(schedule, rng);
            let queue = &mut self.ready[lane];
            let key = queue.swap_remove(rng.index(queue.len()));
            self.ready_count -= 1;
            if let Some(task) = self.get_mut(key)
                && let Some(future) = task.future.take()
            {
                // From here on a wake queues the task again.
                task.waker.queued.store(false, Ordering::Relaxed);
                let waker = Waker::from(task.waker.clone());
                return Some(Running { key, future, waker });
            }
        }
        None
    }

    pub(crate) fn owner(&self, key: TaskKey) -> Option<Owner> {
        self.get(key).map(|task| task.owner)
    }

    /// Returns a pending task. Gives the future back when the task was removed meanwhile: the
    /// caller drops it outside of any borrow.
    pub(crate) fn put_back(&mut self, key: TaskKey, future: TaskFuture) -> Option<TaskFuture> {
        match self.get_mut(key) {
            Some(task) => {
                task.future = Some(future);
                None
            }
            None => Some(future),
        }
    }

    /// Forgets a task. Gives back its future, which the caller drops outside of any borrow.
    pub(crate) fn remove(&mut self, key: TaskKey) -> Option<TaskFuture> {
        let slot = &mut self.slots[key.index as usize];
        if slot.generation != key.generation {
            return None;
        }
        let task = slot.task.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(key.index);
        task.future
    }

    /// Forgets every task for which `matches` holds, and gives back their futures.
    pub(crate) fn remove_where(&mut self, matches: impl Fn(Owner) -> bool) -> Vec<TaskFuture> {
        let mut keys = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            if slot.task.as_ref().is_some_and(|task| matches(task.owner)) {
                keys.push(TaskKey {
                    index: u32::try_from(index).expect("fewer than 2^32 tasks"),
                    generation: slot.generation,
                });
            }
        }
        keys.into_iter()
            .filter_map(|key| self.remove(key))
            .collect()
    }

    fn choose_lane(&self, schedule: &Schedule, rng: &mut Rng) -> usize {
        let weight = |lane: usize, queue: &Vec<TaskKey>| -> u64 {
            if queue.is_empty() {
                return 0;
            }
            match schedule {
                Schedule::Random => u64::try_from(queue.len()).unwrap_or(u64::MAX),
                Schedule::Weighted(weights) => {
                    weights.get(lane).copied().map_or(8, u64::from).max(1)
                }
            }
        };
        let lanes = self.ready.iter().enumerate();
        let total: u64 = lanes.clone().map(|(lane, queue)| weight(lane, queue)).sum();
        let mut drawn = rng.below(total);
        for (lane, queue) in lanes {
            let weight = weight(lane, queue);
            if drawn < weight {
                return lane;
            }
            drawn -= weight;
        }
        unreachable!("the draw is below the sum of the weights")
    }

    fn get(&self, key: TaskKey) -> Option<&Task> {
        let slot = self.slots.get(key.index as usize)?;
        if slot.generation == key.generation {
            slot.task.as_ref()
        } else {
            None
        }
    }

    fn get_mut(&mut self, key: TaskKey) -> Option<&mut Task> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation == key.generation {
            slot.task.as_mut()
        } else {
            None
        }
    }
}
