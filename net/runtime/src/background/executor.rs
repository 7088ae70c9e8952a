//! One glommio executor: a thread that runs the jobs of one class.
//!
//! glommio 0.9 has defects that this file works around: the first file that an executor opens must
//! not be empty (or it takes the device for one that polls, and its reads fail); only the default
//! task queue is used (wake-ups of latency queues get lost); the preemption timer stays far above
//! a millisecond (short ones park with runnable work); its default I/O memory would pin 30 MiB an
//! executor.

use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use glommio::timer::Timer;
use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};
use torc_env::{Disk, File, JobClass, OpenMode, SECTOR_BYTES};

use crate::background::glommio_disk::{GlommioDisk, system_error};
use crate::background::pace::Pace;
use crate::background::{Inbox, NET_INTERVAL, Start, Started};
use crate::sys;

/// Registered I/O memory of each of an executor's three rings.
const IO_MEMORY_BYTES: usize = 256 << 10;

/// How long jobs of one executor run before they let each other in.
const PREEMPT_INTERVAL: Duration = Duration::from_millis(5);

/// How often an executor with jobs looks around, woken or not. glommio goes to sleep with tasks that could run when its
/// preemption timer, or a wake-up of another thread that it has served already, fires just before it would run them. Whoever
/// waits for the job waits as long as the executor sleeps, and when a flush stands, all updates soon do.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Nice value of compaction: gives way to shards and flushes, and still gets through when every
/// core is busy (nice 19 gets almost nothing).
const COMPACTION_NICE: libc::c_int = 10;

/// Where and how an executor runs.
pub(super) struct Settings {
    pub(super) name: String,
    pub(super) class: JobClass,
    pub(super) data_dir: PathBuf,
    pub(super) cpus: Option<libc::cpu_set_t>,
    pub(super) pace: Option<Arc<Pace>>,
}

/// Starts an executor's thread; `inbox.start` tells how it went on. It does not wait: the shard that has
/// the first job serves meanwhile, and the start takes milliseconds at best.
pub(super) fn start(settings: Settings, inbox: Arc<Inbox>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(settings.name.clone())
        .spawn(move || {
            // Whatever ends this thread before it takes jobs: nobody may wait for it for ever.
            let _told = FailedUnlessStarted(&inbox.start);
            let executor = match prepare(&settings) {
                Ok(executor) => executor,
                Err(error) => return not_started(&error),
            };
            let run = AssertUnwindSafe(|| executor.run(serve(&settings, &inbox)));
            match catch_unwind(run) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => not_started(&error),
                Err(_) => {
                    // Its jobs will never answer, and the shards would wait for them for ever.
                    tracing::error!("a background job panicked");
                    std::process::abort();
                }
            }
        })
}

/// Says that a start has failed when it is dropped, if nobody said before how it went.
struct FailedUnlessStarted<'a>(&'a Start);

impl Drop for FailedUnlessStarted<'_> {
    fn drop(&mut self) {
        self.0.end(Started::No);
    }
}

/// Logs why an executor's jobs run on the shards.
pub(super) fn not_started(error: &io::Error) {
    tracing::warn!("no background executor, its jobs run on the shards: {error}");
}

/// Gives the thread its place and priority, and builds the executor.
fn prepare(settings: &Settings) -> io::Result<LocalExecutor> {
    if let Some(cpus) = &settings.cpus {
        sys::set_affinity(cpus)?;
    }
    match settings.class {
        JobClass::Flush => {}
        JobClass::Compaction => sys::set_nice(COMPACTION_NICE)?,
        JobClass::Scrub => sys::set_idle_policy()?,
    }
    LocalExecutorBuilder::new(Placement::Unbound)
        .name(&settings.name)
        .io_memory(IO_MEMORY_BYTES)
        .preempt_timer(PREEMPT_INTERVAL)
        .make()
        .map_err(system_error)
}

/// Takes jobs and runs them, all at once, until the runtime stops.
///
/// # Errors
/// When it takes none.
async fn serve(settings: &Settings, inbox: &Inbox) -> io::Result<()> {
    let disk = GlommioDisk::new(settings);
    over_a_net(warm(&disk, &settings.data_dir, &settings.name)).await?;
    inbox.start.end(Started::Yes);
    let mut running = FuturesUnordered::new();
    while !inbox.stopping.load(Ordering::Acquire) {
        inbox.turns.fetch_add(1, Ordering::Relaxed);
        while let Some(job) = inbox.jobs.pop() {
            running.push(job(disk.clone()));
        }
        let mut net = Timer::new(if running.is_empty() {
            NET_INTERVAL
        } else {
            LOOK_INTERVAL
        });
        poll_fn(|cx| {
            inbox.waker.register(cx.waker());
            if inbox.has_news() {
                return Poll::Ready(());
            }
            if let Poll::Ready(Some(())) = running.poll_next_unpin(cx) {
                return Poll::Ready(());
            }
            Future::poll(Pin::new(&mut net), cx).map(drop)
        })
        .await;
    }
    Ok(())
}

/// Lets the executor look around every [`NET_INTERVAL`] until `work` is done: a wake-up of its ring may get lost, and then
/// nothing else would wake it.
async fn over_a_net<F: Future>(work: F) -> F::Output {
    let mut work = pin!(work);
    loop {
        let net = Timer::new(NET_INTERVAL);
        match select(work.as_mut(), net).await {
            Either::Left((output, _)) => return output,
            Either::Right(_) => {}
        }
    }
}

/// Opens a file that is not empty, first of all on this executor.
async fn warm(disk: &GlommioDisk, data_dir: &Path, name: &str) -> io::Result<()> {
    let path = format!(".{name}.probe");
    std::fs::write(data_dir.join(&path), [0_u8; SECTOR_BYTES])?;
    let file = disk.open(Path::new(&path), OpenMode::Read).await?;
    let buffer = torc_env::AlignedBuf::zeroed(SECTOR_BYTES);
    let (read, _) = file.read_at(0, buffer).await;
    disk.remove(Path::new(&path)).await?;
    read.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    /// Longer than a start takes on any host.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn an_executor_looks_around_all_the_time_while_it_has_a_job() {
        const TURNS: u64 = 30;
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            name: "test".into(),
            class: JobClass::Flush,
            data_dir: dir.path().into(),
            cpus: None,
            pace: None,
        };
        let inbox = Arc::new(Inbox::default());
        inbox
            .jobs
            .push(Box::new(|_| Box::pin(std::future::pending())));
        let thread = start(settings, Arc::clone(&inbox)).unwrap();
        let turns = || inbox.turns.load(Ordering::Relaxed);
        let wait_for = |count: u64| {
            let begun = Instant::now();
            while turns() < count {
                assert!(begun.elapsed() < PATIENCE, "it does not turn");
                std::thread::sleep(LOOK_INTERVAL);
            }
            begun.elapsed()
        };
        wait_for(1);
        let took = wait_for(1 + TURNS);
        let seldom = NET_INTERVAL * u32::try_from(TURNS).unwrap();
        assert!(took < seldom / 2, "{took:?}");
        inbox.stopping.store(true, Ordering::Release);
        thread.join().unwrap();
    }

    #[test]
    fn a_start_goes_on_though_the_wake_up_that_it_waits_for_got_lost() {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let mut looks = 0;
            // Has what it waits for at the second look, and nobody tells it to look.
            let lost = poll_fn(move |_| {
                looks += 1;
                if looks < 2 {
                    Poll::Pending
                } else {
                    Poll::Ready(looks)
                }
            });
            let executor = LocalExecutorBuilder::new(Placement::Unbound)
                .io_memory(IO_MEMORY_BYTES)
                .make()
                .unwrap();
            done.send(executor.run(over_a_net(lost))).unwrap();
        });
        assert_eq!(is_done.recv_timeout(PATIENCE), Ok(2));
    }
}
