//! Tasks of one shard: five ready queues, one a scheduling class, and the loop that polls them.
//!
//! A tick polls tasks until nothing is ready or [`QUANTUM`] is over; the shard then looks after its
//! I/O and comes back. Within a class tasks run in the order in which they were woken; between
//! classes [`Shares`] decides. A task that was woken by another thread arrives through a
//! lock-free queue and a doorbell.
//!
//! The ready queues live in a thread-local, so that waking a task of this very thread is a push to
//! a `VecDeque` and not an atomic operation on something shared.

mod shares;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_task::{Builder, Runnable, Task};
use crossbeam_queue::SegQueue;
use slab::Slab;
use torc_env::{Class, Instant};

use crate::clock;
use crate::doorbell::Doorbell;
use crate::executor::shares::Shares;

/// How long tasks run before completions and queues are looked at again.
pub(crate) const QUANTUM: Duration = Duration::from_micros(40);

/// [`give_way`] reads the clock at every n-th call, so that it costs next to nothing per item.
const GIVE_WAY_STRIDE: u8 = 4;

/// What a queue needs to know about a task.
#[derive(Clone, Copy)]
pub(crate) struct TaskInfo {
    class: Class,
    /// Slot in [`Executor::tasks`].
    slot: usize,
}

type ReadyTask = Runnable<TaskInfo>;

/// The part of an executor that other threads see.
pub(crate) struct Foreign {
    executor: u64,
    /// Bounded by the number of tasks: a task is in at most one queue, once.
    woken: SegQueue<ReadyTask>,
    /// Wakes the shard.
    pub(crate) doorbell: Doorbell,
}

impl Foreign {
    /// The foreign half of an executor that does not run yet.
    pub(crate) fn new(doorbell: Doorbell) -> Foreign {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Foreign {
            executor: NEXT.fetch_add(1, Ordering::Relaxed),
            woken: SegQueue::new(),
            doorbell,
        }
    }

    /// Whether another thread has woken a task.
    pub(crate) fn has_woken(&self) -> bool {
        !self.woken.is_empty()
    }

    /// The scheduler of every task: called by wakers, on any thread.
    fn schedule(&self, task: ReadyTask) {
        let mut task = Some(task);
        // The thread-local is gone only when its thread ends, long after its executor.
        let local = LOCAL.try_with(|local| {
            if local.executor.get() == self.executor {
                local.push(task.take());
            }
        });
        debug_assert!(local.is_ok(), "a task was woken while its thread ended");
        if let Some(task) = task {
            self.woken.push(task);
            self.doorbell.ring();
        }
    }
}

/// The executor of the current thread; unused on threads that are no shard.
struct Local {
    /// [`Foreign::executor`] of this thread's executor; 0 when there is none.
    executor: Cell<u64>,
    ready: RefCell<[VecDeque<ReadyTask>; Class::ALL.len()]>,
    quantum_end: Cell<Instant>,
    calls_until_clock: Cell<u8>,
}

thread_local! {
    static LOCAL: Local = const {
        Local {
            executor: Cell::new(0),
            ready: RefCell::new([const { VecDeque::new() }; Class::ALL.len()]),
            quantum_end: Cell::new(Instant(u64::MAX)),
            calls_until_clock: Cell::new(GIVE_WAY_STRIDE),
        }
    };
}

impl Local {
    fn push(&self, task: Option<ReadyTask>) {
        if let Some(task) = task {
            let class = task.metadata().class;
            self.ready.borrow_mut()[class.index()].push_back(task);
        }
    }

    fn has_ready(&self) -> bool {
        self.ready.borrow().iter().any(|queue| !queue.is_empty())
    }

    fn pop(&self, shares: &mut Shares) -> Option<ReadyTask> {
        let mut ready = self.ready.borrow_mut();
        let class = shares.pick([0, 1, 2, 3, 4].map(|class: usize| !ready[class].is_empty()))?;
        ready[class.index()].pop_front()
    }

    fn quantum_is_over(&self) -> bool {
        let left = self.calls_until_clock.get() - 1;
        if left > 0 {
            self.calls_until_clock.set(left);
            return false;
        }
        self.calls_until_clock.set(GIVE_WAY_STRIDE);
        clock::now() >= self.quantum_end.get()
    }
}

/// The executor of one shard. Lives on the shard's thread.
pub(crate) struct Executor {
    foreign: Arc<Foreign>,
    shares: RefCell<Shares>,
    /// Every task that has not ended, so that a stop can cancel them.
    tasks: RefCell<Slab<Task<(), TaskInfo>>>,
    /// Tasks that asked to be woken when this tick's tasks have run.
    at_end_of_tick: RefCell<Vec<Waker>>,
    stopped: Cell<bool>,
}

impl Executor {
    /// Makes the calling thread the one that runs the tasks of `foreign`'s executor.
    pub(crate) fn new(foreign: Arc<Foreign>) -> Executor {
        LOCAL.with(|local| {
            assert_eq!(local.executor.get(), 0, "one executor a thread");
            local.executor.set(foreign.executor);
        });
        Executor {
            foreign,
            shares: RefCell::default(),
            tasks: RefCell::default(),
            at_end_of_tick: RefCell::default(),
            stopped: Cell::new(false),
        }
    }

    /// Starts a task. After a stop the future is dropped at once.
    pub(crate) fn spawn(&self, class: Class, future: impl Future<Output = ()> + 'static) {
        if self.stopped.get() {
            return;
        }
        let foreign = Arc::clone(&self.foreign);
        let mut tasks = self.tasks.borrow_mut();
        let entry = tasks.vacant_entry();
        let info = TaskInfo {
            class,
            slot: entry.key(),
        };
        let (runnable, task) = Builder::new()
            .metadata(info)
            .spawn_local(|_| future, move |task| foreign.schedule(task));
        entry.insert(task);
        drop(tasks);
        runnable.schedule();
    }

    /// Runs tasks until none is ready or the quantum is over, then those that wait for the end of
    /// the tick. Returns whether something is still ready.
    pub(crate) fn tick(&self) -> bool {
        self.run_quantum();
        let late = std::mem::take(&mut *self.at_end_of_tick.borrow_mut());
        if !late.is_empty() {
            late.into_iter().for_each(Waker::wake);
            self.run_quantum();
        }
        // Whoever asked for the end of a tick after `late` was taken gets the next one.
        LOCAL.with(Local::has_ready) || !self.at_end_of_tick.borrow().is_empty()
    }

    /// Whether a task is ready to run.
    pub(crate) fn has_ready(&self) -> bool {
        LOCAL.with(Local::has_ready) || self.foreign.has_woken()
    }

    /// Wakes `waker` when the tasks of this tick have run.
    pub(crate) fn wake_at_end_of_tick(&self, waker: Waker) {
        self.at_end_of_tick.borrow_mut().push(waker);
    }

    /// Drops every task's future and refuses new tasks.
    pub(crate) fn cancel_all(&self) {
        self.stopped.set(true);
        self.at_end_of_tick.borrow_mut().clear();
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        let mut outstanding = tasks.iter().filter(|(_, task)| !task.is_finished()).count();
        // Dropping the handle cancels the task: it is scheduled once more (if it is not already,
        // here or on the way from another thread), and that run drops its future.
        drop(tasks);
        while outstanding > 0 {
            let local = LOCAL.with(|local| local.pop(&mut self.shares.borrow_mut()));
            match local.or_else(|| self.foreign.woken.pop()) {
                Some(task) => {
                    task.run();
                    outstanding -= 1;
                }
                None => std::hint::spin_loop(),
            }
        }
    }

    fn run_quantum(&self) {
        while let Some(task) = self.foreign.woken.pop() {
            LOCAL.with(|local| local.push(Some(task)));
        }
        let mut before = clock::now();
        let end = before + QUANTUM;
        LOCAL.with(|local| {
            local.quantum_end.set(end);
            local.calls_until_clock.set(GIVE_WAY_STRIDE);
        });
        while let Some(task) = LOCAL.with(|local| local.pop(&mut self.shares.borrow_mut())) {
            let TaskInfo { class, slot } = *task.metadata();
            task.run();
            self.forget_if_finished(slot);
            let now = clock::now();
            self.shares
                .borrow_mut()
                .charge(class, clock::nanos(now - before));
            if now >= end {
                break;
            }
            before = now;
        }
    }

    fn forget_if_finished(&self, slot: usize) {
        let mut tasks = self.tasks.borrow_mut();
        if tasks.get(slot).is_some_and(Task::is_finished) {
            tasks.remove(slot).detach();
        }
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        self.cancel_all();
        LOCAL.with(|local| local.executor.set(0));
    }
}

/// Completes at once while the running task has quantum left; otherwise lets the others run first.
pub(crate) fn give_way() -> GiveWay {
    GiveWay { gave_way: false }
}

/// See [`give_way`].
pub(crate) struct GiveWay {
    gave_way: bool,
}

impl Future for GiveWay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.gave_way || !LOCAL.with(Local::quantum_is_over) {
            return Poll::Ready(());
        }
        self.gave_way = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    fn executor() -> Executor {
        Executor::new(Arc::new(Foreign::new(Doorbell::new().unwrap())))
    }

    /// Pending once, then ready; wakes itself.
    async fn yield_now() {
        let mut yielded = false;
        std::future::poll_fn(|cx| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    #[test]
    fn tasks_run_in_the_order_in_which_they_were_woken() {
        let executor = executor();
        let seen = Rc::new(RefCell::new(Vec::new()));
        for number in 0..3 {
            let seen = Rc::clone(&seen);
            executor.spawn(Class::Foreground, async move {
                seen.borrow_mut().push(number);
                yield_now().await;
                seen.borrow_mut().push(number + 10);
            });
        }
        while executor.tick() {}
        assert_eq!(*seen.borrow(), [0, 1, 2, 10, 11, 12]);
        assert!(
            executor.tasks.borrow().is_empty(),
            "ended tasks are forgotten"
        );
    }

    #[test]
    fn the_end_of_a_tick_comes_after_every_ready_task() {
        let executor = Rc::new(executor());
        let seen = Rc::new(RefCell::new(Vec::new()));
        let (late, also) = (Rc::clone(&executor), Rc::clone(&seen));
        executor.spawn(Class::Foreground, async move {
            let mut asked = false;
            std::future::poll_fn(|cx| {
                if std::mem::replace(&mut asked, true) {
                    return Poll::Ready(());
                }
                late.wake_at_end_of_tick(cx.waker().clone());
                Poll::Pending
            })
            .await;
            also.borrow_mut().push("late");
        });
        let also = Rc::clone(&seen);
        executor.spawn(
            Class::Foreground,
            async move { also.borrow_mut().push("early") },
        );
        assert!(!executor.tick());
        assert_eq!(*seen.borrow(), ["early", "late"]);
    }

    #[test]
    fn who_asks_for_the_end_of_the_tick_again_is_not_left_behind() {
        let executor = Rc::new(executor());
        let times = Rc::new(Cell::new(0));
        let (late, seen) = (Rc::clone(&executor), Rc::clone(&times));
        executor.spawn(Class::Foreground, async move {
            std::future::poll_fn(|cx| {
                if seen.get() == 3 {
                    return Poll::Ready(());
                }
                seen.set(seen.get() + 1);
                late.wake_at_end_of_tick(cx.waker().clone());
                Poll::Pending
            })
            .await;
        });
        // The shard sleeps when a tick leaves nothing ready.
        while executor.tick() {}
        assert_eq!(times.get(), 3);
        assert!(executor.tasks.borrow().is_empty());
    }

    #[test]
    fn a_wake_from_another_thread_arrives() {
        let executor = executor();
        let (waker, done) = (Rc::new(Cell::new(None)), Rc::new(Cell::new(false)));
        let (slot, flag) = (Rc::clone(&waker), Rc::clone(&done));
        executor.spawn(Class::Control, async move {
            let mut polled = false;
            std::future::poll_fn(|cx| {
                if std::mem::replace(&mut polled, true) {
                    return Poll::Ready(());
                }
                slot.set(Some(cx.waker().clone()));
                Poll::Pending
            })
            .await;
            flag.set(true);
        });
        assert!(!executor.tick());
        let waker = waker.take().unwrap();
        std::thread::spawn(move || waker.wake()).join().unwrap();
        assert!(executor.has_ready());
        executor.tick();
        assert!(done.get());
    }

    #[test]
    fn cancelling_drops_every_future_wherever_its_task_waits() {
        let executor = executor();
        let token = Rc::new(());
        for class in Class::ALL {
            let (held, also) = (Rc::clone(&token), Rc::clone(&token));
            executor.spawn(class, async move {
                let _held = held;
                std::future::pending::<()>().await;
            });
            executor.spawn(class, async move {
                let _held = also;
                loop {
                    yield_now().await;
                }
            });
        }
        executor.tick();
        assert_eq!(Rc::strong_count(&token), 11);
        executor.cancel_all();
        assert_eq!(Rc::strong_count(&token), 1);
        let refused = Rc::clone(&token);
        executor.spawn(Class::Control, async move { drop(refused) });
        assert_eq!(Rc::strong_count(&token), 1);
    }

    #[test]
    fn every_class_gets_its_turn_beside_a_busy_one() {
        let executor = executor();
        let polls = Rc::new(RefCell::new([0_u64; 5]));
        for class in Class::ALL {
            let polls = Rc::clone(&polls);
            executor.spawn(class, async move {
                loop {
                    polls.borrow_mut()[class.index()] += 1;
                    yield_now().await;
                }
            });
        }
        for _ in 0..200 {
            assert!(executor.tick());
        }
        assert!(polls.borrow().iter().all(|count| *count > 0), "{polls:?}");
    }
}
