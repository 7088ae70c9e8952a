//! Work that leaves the shard: compaction, scrub, backup, and big flushes.
//!
//! Jobs run on glommio executors, one thread for each class and every four shards, so that the
//! kernel shares the cores out between jobs and shards. Executors start with their first job, which
//! waits until that is over; its shard does not. An executor that cannot start (its rings need locked
//! memory) leaves its jobs to the shards.
//!
//! A job's output comes back by waking a task of the shard from another thread; the shard looks
//! every [`NET_INTERVAL`] besides, and nudges the executor when it does, because glommio is known
//! to lose wake-ups.

mod executor;
mod glommio_disk;
mod pace;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_queue::{ArrayQueue, SegQueue};
use futures_util::future::{Either, select};
use futures_util::task::AtomicWaker;
use torc_env::{Class, Env, Job, JobClass};

use crate::background::glommio_disk::GlommioDisk;
use crate::background::pace::Pace;
use crate::config::{Background as Kind, RuntimeConfig};
use crate::env::RealEnv;
use crate::sys;

/// Shards that share an executor.
const SHARDS_PER_EXECUTOR: usize = 4;

/// How often both sides look without having been woken.
pub(crate) const NET_INTERVAL: Duration = Duration::from_millis(100);

/// An executor that does not move for this long is reported.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// Job classes with an executor of their own.
const CLASSES: [JobClass; 3] = [JobClass::Flush, JobClass::Compaction, JobClass::Scrub];

/// A job with its way home, begun on the executor's thread.
type Begin = Box<dyn FnOnce(GlommioDisk) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Whether an executor takes jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Started {
    Yes,
    /// It never will.
    No,
}

/// The start of an executor, and the jobs' tasks that wait for its end.
#[derive(Default)]
struct Start {
    outcome: OnceLock<Started>,
    waiting: Mutex<Vec<Waker>>,
}

impl Start {
    /// Says how it went, and wakes who waits. What is said later changes nothing.
    fn end(&self, outcome: Started) {
        self.outcome.get_or_init(|| outcome);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let woken = std::mem::take(&mut *waiting);
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
    }

    /// How it went, once it is over.
    async fn over(&self) -> Started {
        poll_fn(|cx| {
            if self.outcome.get().is_none() {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    waiting.push(cx.waker().clone());
                }
            }
            // Once more: it may have been over after the first look and before the lock.
            self.outcome
                .get()
                .map_or(Poll::Pending, |outcome| Poll::Ready(*outcome))
        })
        .await
    }
}

/// Jobs for an executor. Bounded by what the shards have in flight.
#[derive(Default)]
struct Inbox {
    jobs: SegQueue<Begin>,
    waker: AtomicWaker,
    stopping: AtomicBool,
    /// Turns of the executor's loop.
    turns: AtomicU64,
    start: Start,
}

impl Inbox {
    fn has_news(&self) -> bool {
        !self.jobs.is_empty() || self.stopping.load(Ordering::Acquire)
    }
}

/// The background executors of a node.
pub(crate) struct Background {
    kind: Kind,
    data_dir: std::path::PathBuf,
    /// Where executors may run: everywhere, not only where the shard that needs one is pinned.
    cpus: Option<libc::cpu_set_t>,
    /// How fast they may use the disk, where its rates are known.
    pace: Option<Arc<Pace>>,
    /// By group of shards and class; `None` when it has no thread.
    inboxes: Vec<[OnceLock<Option<Arc<Inbox>>>; CLASSES.len()]>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Background {
    /// Starts nothing yet.
    pub(crate) fn new(config: &RuntimeConfig) -> Background {
        let groups = usize::from(config.shards).div_ceil(SHARDS_PER_EXECUTOR);
        Background {
            kind: config.background,
            data_dir: config.data_dir.clone(),
            cpus: sys::affinity().ok(),
            pace: config.disk_rates.map(|rates| Arc::new(Pace::new(rates))),
            inboxes: std::iter::repeat_with(Default::default)
                .take(groups)
                .collect(),
            threads: Mutex::default(),
        }
    }

    /// How long jobs have waited in all, so as to leave time of the disk to the shards.
    pub(crate) fn waited(&self) -> Duration {
        let pace = self.pace.as_ref();
        pace.map_or(Duration::ZERO, |pace| pace.waited_in_all())
    }

    /// Ends the executors. Jobs in flight are dropped.
    pub(crate) fn stop(&self) {
        for inbox in self
            .inboxes
            .iter()
            .flatten()
            .filter_map(OnceLock::get)
            .flatten()
        {
            inbox.stopping.store(true, Ordering::Release);
            inbox.waker.wake();
        }
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a background executor panicked");
            }
        }
    }

    /// The executor for a class of jobs of a shard, which may still be starting.
    fn inbox(&self, shard: usize, class: JobClass) -> Option<&Arc<Inbox>> {
        let slot = CLASSES
            .iter()
            .position(|known| *known == class)
            .expect("every class is listed");
        let group = shard / SHARDS_PER_EXECUTOR;
        self.inboxes[group][slot]
            .get_or_init(|| self.start_executor(group, class))
            .as_ref()
    }

    fn start_executor(&self, group: usize, class: JobClass) -> Option<Arc<Inbox>> {
        let inbox = Arc::new(Inbox::default());
        let settings = executor::Settings {
            name: format!("{class:?}-{group}").to_lowercase(),
            class,
            data_dir: self.data_dir.clone(),
            cpus: self.cpus,
            pace: self.pace.clone(),
        };
        match executor::start(settings, Arc::clone(&inbox)) {
            Ok(thread) => {
                let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
                threads.push(thread);
                Some(inbox)
            }
            Err(error) => {
                executor::not_started(&error);
                None
            }
        }
    }
}

/// Where a job leaves its output.
struct Outcome<T> {
    output: ArrayQueue<T>,
    waker: AtomicWaker,
}

impl<T> Outcome<T> {
    fn new() -> Arc<Outcome<T>> {
        Arc::new(Outcome {
            output: ArrayQueue::new(1),
            waker: AtomicWaker::new(),
        })
    }

    fn put(&self, output: T) {
        assert!(self.output.push(output).is_ok(), "a job ends once");
        self.waker.wake();
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<T> {
        self.waker.register(cx.waker());
        match self.output.pop() {
            Some(output) => Poll::Ready(output),
            None => Poll::Pending,
        }
    }
}

/// See [`Env::background`].
pub(crate) async fn run<J: Job>(env: RealEnv, class: JobClass, job: J) -> J::Output {
    let outcome = Outcome::new();
    let home = Arc::clone(&outcome);
    let core = env.core();
    let background = &core.shared.background;
    let elsewhere = background.kind == Kind::Glommio && core.root.direct;
    let inbox = elsewhere
        .then(|| background.inbox(usize::from(core.shard.0), class))
        .flatten();
    let inbox = match inbox {
        Some(inbox) => (inbox.start.over().await == Started::Yes).then_some(inbox),
        None => None,
    };
    let Some(inbox) = inbox else {
        let disk = env.disk().clone();
        env.spawn(Class::Flush, async move { home.put(job.run(disk).await) });
        return poll_fn(|cx| outcome.poll(cx)).await;
    };
    inbox.jobs.push(Box::new(move |disk| {
        Box::pin(async move { home.put(job.run(disk).await) })
    }));
    inbox.waker.wake();
    let mut watchdog = Watchdog::default();
    loop {
        let done = poll_fn(|cx| outcome.poll(cx));
        let net = pin!(env.sleep(NET_INTERVAL));
        match select(done, net).await {
            Either::Left((output, _)) => return output,
            Either::Right(((), _)) => inbox.waker.wake(),
        }
        if watchdog.is_stuck(inbox.turns.load(Ordering::Relaxed)) {
            tracing::error!(
                ?class,
                "a background executor has not moved for {STUCK_AFTER:?}"
            );
        }
    }
}

/// Notices an executor whose loop stands still: a job that computes without giving way, or a
/// wake-up that glommio lost for good.
#[derive(Default)]
struct Watchdog {
    turns: u64,
    unchanged: u32,
}

impl Watchdog {
    /// Call it every [`NET_INTERVAL`]. True once for each time that the executor gets stuck.
    fn is_stuck(&mut self, turns: u64) -> bool {
        if turns != self.turns {
            *self = Watchdog {
                turns,
                unchanged: 0,
            };
            return false;
        }
        self.unchanged = self.unchanged.saturating_add(1);
        NET_INTERVAL * self.unchanged == STUCK_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_executor_is_reported_once_until_it_moves() {
        let mut watchdog = Watchdog::default();
        let mut reports =
            |turns: u64, looks| (0..looks).filter(|_| watchdog.is_stuck(turns)).count();
        assert_eq!(reports(0, 500), 1);
        assert_eq!(reports(1, 50), 0);
        assert_eq!(reports(1, 500), 1);
    }
}
