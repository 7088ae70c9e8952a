//! The ring of one shard: operations go in, completions wake tasks.
//!
//! Every operation has a slot. The slot owns what the kernel may touch (buffers, paths, the file
//! itself) from submission to completion, so a future that is dropped midway leaves nothing
//! dangling: its slot becomes an orphan and is freed by its completion. A reactor that is dropped
//! with operations in flight leaks their slots for the same reason.
//!
//! With DEFER_TASKRUN the kernel finishes operations only when this thread enters it, so [`poll`]
//! enters when something was queued or the kernel says that work waits, and at no other time.
//! Submissions are queued in shared memory and go out with the next enter: one system call a tick.
//!
//! [`poll`]: Reactor::poll

pub(crate) mod op;
mod slot;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use slab::Slab;

use crate::executor::Foreign;
use crate::probe::{self, Features, ProbeError};
use crate::reactor::slot::{Completion, OnDrop, Resource, Slot, State};
use crate::sys;

/// Completion queue entries per submission queue entry: idle connections each have a receive in
/// flight, and a burst of them should not overflow.
const COMPLETIONS_PER_SUBMISSION: u32 = 8;

/// User data at and above this mark is no slot.
const NO_SLOT: u64 = 1 << 63;
/// A completion that nobody waits for: cancellations, wake-up messages from other shards.
const IGNORED: u64 = NO_SLOT;
/// The doorbell's eventfd was written.
const EVENT: u64 = NO_SLOT + 1;
/// A wake-up message could not be sent; the low bits are the index of the shard.
const WAKE_FAILED: u64 = NO_SLOT + (1 << 32);

/// The ring of one shard. Lives on the shard's thread.
pub(crate) struct Reactor {
    ring: IoUring,
    features: Features,
    slots: Slab<Slot>,
    /// Wakers of completed operations; the shard wakes them after it has let go of the reactor.
    woken: Vec<Waker>,
    /// Holds the eventfd that the ring polls.
    foreign: Arc<Foreign>,
    /// Shards that a failed message has left asleep.
    unwoken: Vec<usize>,
    /// Writes and syncs of files in flight: the kernel's workers may need this core meanwhile.
    disk_writes: usize,
}

impl Reactor {
    /// Opens a ring for the calling thread and publishes it to the other shards.
    pub(crate) fn new(entries: u32, foreign: Arc<Foreign>) -> Result<Reactor, ProbeError> {
        let completions = entries.saturating_mul(COMPLETIONS_PER_SUBMISSION);
        let (ring, features) = probe::open_ring(entries, completions)?;
        if !features.deferred_completions {
            tracing::warn!(
                "this kernel cannot defer completions (Linux 6.1 can): requests cost more"
            );
        }
        foreign.doorbell.set_ring_fd(Some(ring.as_raw_fd()));
        let mut reactor = Reactor {
            ring,
            features,
            slots: Slab::new(),
            woken: Vec::new(),
            foreign,
            unwoken: Vec::new(),
            disk_writes: 0,
        };
        reactor.watch_event();
        Ok(reactor)
    }

    /// What the kernel offers.
    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Lets the kernel's worker threads run on `cpus` and not only where the shard is pinned: a
    /// worker that shares the shard's core waits for the shard to sleep.
    pub(crate) fn set_worker_affinity(&self, cpus: &libc::cpu_set_t) -> io::Result<()> {
        self.ring.submitter().register_iowq_aff(cpus)
    }

    /// Whether a write or sync of a file is in flight.
    pub(crate) fn is_writing(&self) -> bool {
        self.disk_writes > 0
    }

    /// Whether a completion is there or can be had without waiting.
    pub(crate) fn has_completions(&mut self) -> bool {
        if self.ring.submission().taskrun() {
            return true;
        }
        !self.ring.completion().is_empty()
    }

    /// Submits what is queued and lets the kernel finish what it can, without waiting. No system
    /// call when there is nothing to do.
    pub(crate) fn poll(&mut self) {
        let queue = self.ring.submission();
        let needed = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if needed {
            self.tolerate(self.ring.submit());
        }
        self.reap();
    }

    /// Submits what is queued and waits for a completion, at most `timeout`.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) {
        if !self.woken.is_empty() || !self.ring.completion().is_empty() {
            return self.poll();
        }
        let waited = match timeout {
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let arguments = types::SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(1, &arguments)
            }
            None => self.ring.submit_and_wait(1),
        };
        self.tolerate(waited);
        self.reap();
    }

    /// The wakers of what completed since the last call, for the shard to wake.
    pub(crate) fn take_woken(&mut self, into: &mut Vec<Waker>) {
        into.append(&mut self.woken);
    }

    /// Takes the index of a shard whose wake-up message failed: it must be woken by eventfd.
    pub(crate) fn take_unwoken(&mut self) -> Option<usize> {
        self.unwoken.pop()
    }

    /// Queues a message to another shard's ring that ends its sleep. Returns false when messages do
    /// not work here.
    pub(crate) fn send_wake_up(&mut self, shard: usize, ring: RawFd) -> bool {
        if !self.features.ring_messages {
            return false;
        }
        let entry = opcode::MsgRingData::new(types::Fd(ring), 0, IGNORED, None)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS)
            .user_data(WAKE_FAILED + shard as u64);
        // SAFETY: the message carries no pointer.
        unsafe { self.push(&entry) };
        true
    }

    /// Queues the close of a descriptor that no operation uses. A worker of the kernel's does it: on this
    /// thread, freeing the blocks of a large file that was removed would hold the shard up for many
    /// milliseconds.
    pub(crate) fn close(&mut self, fd: OwnedFd) {
        let raw = types::Fd(fd.as_raw_fd());
        let slot = Slot {
            state: State::Orphan,
            resource: Resource::Closing(fd),
            fd: None,
            on_drop: OnDrop::Finish,
            disk_write: false,
        };
        let entry = opcode::Close::new(raw).build().flags(squeue::Flags::ASYNC);
        // SAFETY: the entry carries no pointer, and the slot owns the descriptor until it is closed.
        unsafe { self.start(slot, |_| entry) };
    }

    /// Cancels what can be cancelled and waits until the kernel has let go of every buffer, for at
    /// most `patience`. Returns whether it has.
    pub(crate) fn drain(&mut self, patience: Duration) -> bool {
        let entry = opcode::AsyncCancel2::new(types::CancelBuilder::any())
            .build()
            .user_data(IGNORED);
        // SAFETY: the entry carries no pointer.
        unsafe { self.push(&entry) };
        let until = std::time::Instant::now() + patience;
        self.poll();
        while !self.slots.is_empty() {
            // Whoever waited is gone.
            self.woken.clear();
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return false;
            }
            self.wait(Some(left));
        }
        true
    }

    /// Starts an operation: `build` describes it to the kernel, given what its slot owns.
    ///
    /// # Safety
    /// Every pointer in the entry must lead into memory that `resource` owns (or that lives for
    /// ever), and its descriptor must be `fd`'s or outlive the operation.
    unsafe fn start(
        &mut self,
        slot: Slot,
        build: impl FnOnce(&mut Resource) -> squeue::Entry,
    ) -> usize {
        self.disk_writes += usize::from(slot.disk_write);
        let key = self.slots.insert(slot);
        let entry = build(&mut self.slots[key].resource).user_data(key as u64);
        // SAFETY: the caller vouches for the entry; the slot lives until the completion.
        unsafe { self.push(&entry) };
        key
    }

    /// The outcome of an operation. Frees its slot when ready.
    fn poll_slot(&mut self, key: usize, waker: &Waker) -> Poll<Completion> {
        let slot = &mut self.slots[key];
        match &mut slot.state {
            State::InFlight(Some(last)) => {
                last.clone_from(waker);
                Poll::Pending
            }
            State::InFlight(none) => {
                *none = Some(waker.clone());
                Poll::Pending
            }
            State::Done { result, flags } => {
                let (result, flags) = (*result, *flags);
                let resource = self.slots.remove(key).resource;
                Poll::Ready(Completion {
                    result,
                    flags,
                    resource,
                })
            }
            State::Orphan => unreachable!("an orphan has no future that could poll it"),
        }
    }

    /// The future of an operation is dropped. Returns what can be dropped with it.
    fn abandon(&mut self, key: usize) -> Option<Slot> {
        let slot = &mut self.slots[key];
        if let State::Done { result, .. } = slot.state {
            let slot = self.slots.remove(key);
            close_returned_fd(&slot, result);
            return Some(slot);
        }
        slot.state = State::Orphan;
        if slot.on_drop.cancels() {
            let entry = opcode::AsyncCancel::new(key as u64)
                .build()
                .flags(squeue::Flags::SKIP_SUCCESS)
                .user_data(IGNORED);
            // SAFETY: the entry carries no pointer; the user data names a slot that is in use.
            unsafe { self.push(&entry) };
        }
        None
    }

    /// Moves completions into their slots.
    fn reap(&mut self) {
        let mut event = None;
        for entry in &mut self.ring.completion() {
            match usize::try_from(entry.user_data()) {
                Ok(key) if entry.user_data() < NO_SLOT => {
                    complete(
                        &mut self.slots,
                        &mut self.woken,
                        &mut self.disk_writes,
                        key,
                        &entry,
                    );
                }
                _ if entry.user_data() == EVENT => event = Some(entry.flags()),
                Ok(token) if entry.user_data() >= WAKE_FAILED => {
                    self.features.ring_messages = false;
                    self.unwoken
                        .extend(usize::try_from(token as u64 - WAKE_FAILED));
                }
                _ => {}
            }
        }
        if let Some(flags) = event {
            sys::eventfd_clear(self.foreign.doorbell.event());
            if !cqueue::more(flags) {
                self.watch_event();
            }
        }
    }

    /// Watches the doorbell's eventfd with a poll that stays armed.
    fn watch_event(&mut self) {
        let fd = types::Fd(self.foreign.doorbell.event().as_raw_fd());
        let events = u32::try_from(libc::POLLIN).expect("POLLIN is positive");
        let entry = opcode::PollAdd::new(fd, events)
            .multi(true)
            .build()
            .user_data(EVENT);
        // SAFETY: the entry carries no pointer; `self.foreign` keeps the eventfd open.
        unsafe { self.push(&entry) };
    }

    /// Queues an entry; submits when the queue is full.
    ///
    /// # Safety
    /// What the entry points to must stay valid until its completion.
    unsafe fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: upheld by the caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            self.tolerate(self.ring.submit());
            if self.ring.submission().is_full() {
                // The kernel takes nothing more before it gets rid of completions.
                self.reap();
            }
        }
    }

    /// Errors of entering the kernel are passing states (a signal, a timeout, a full completion
    /// queue that the next reap empties), or a fault of ours.
    fn tolerate(&self, entered: io::Result<usize>) {
        let Err(error) = entered else { return };
        match error.raw_os_error() {
            Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => {}
            _ => panic!("the shard's ring is broken: {error}"),
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.foreign.doorbell.set_ring_fd(None);
        // Closes that are still queued when nobody has drained the ring.
        self.tolerate(self.ring.submit());
        if !self.slots.is_empty() {
            // The kernel may still write into these buffers.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

/// Books one completion.
fn complete(
    slots: &mut Slab<Slot>,
    woken: &mut Vec<Waker>,
    disk_writes: &mut usize,
    key: usize,
    entry: &cqueue::Entry,
) {
    let slot = &mut slots[key];
    *disk_writes -= usize::from(slot.disk_write);
    let done = State::Done {
        result: entry.result(),
        flags: entry.flags(),
    };
    match std::mem::replace(&mut slot.state, done) {
        State::InFlight(waker) => woken.extend(waker),
        State::Orphan => release(slots.remove(key), entry.result()),
        State::Done { .. } => unreachable!("an operation completes once"),
    }
}

/// Lets go of what an operation that nobody waits for owned and returned.
fn release(slot: Slot, result: i32) {
    close_returned_fd(&slot, result);
    if let Resource::Closing(fd) = slot.resource
        && result != -libc::ECANCELED
    {
        // The kernel has closed it. A close that was cancelled, as the ring ends, happens as the slot is dropped.
        _ = fd.into_raw_fd();
    }
}

/// Closes the descriptor that an abandoned operation returned.
fn close_returned_fd(slot: &Slot, result: i32) {
    if slot.on_drop.returns_fd() && result >= 0 {
        // SAFETY: the kernel has just made this descriptor for an operation that nobody waits for.
        drop(unsafe { OwnedFd::from_raw_fd(result) });
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::pin::Pin;

    use bytes::BytesMut;
    use futures_util::future::poll_immediate;
    use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, SECTOR_BYTES};

    use crate::net::{ListenOptions, TcpListener, TcpStream};
    use crate::{Background, RealEnv, Runtime, RuntimeConfig};

    /// Fails when many descriptors are open whose target begins with one of `targets`. Others of this process are not
    /// counted: tests that run beside this one open and close theirs.
    fn assert_few_descriptors(targets: &[&str]) {
        let open = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .filter_map(|target| target.into_os_string().into_string().ok())
            .filter(|open| targets.iter().any(|target| open.starts_with(target)))
            .count();
        assert!(
            open < 400,
            "{open} descriptors are open: abandoned ones leak"
        );
    }

    /// Gives the ring time to complete what was abandoned; fails when slots stay behind.
    async fn expect_empty_slots(env: &RealEnv) {
        let until = env.now() + std::time::Duration::from_secs(30);
        while !env.core().reactor.borrow().slots.is_empty() {
            assert!(env.now() < until, "an abandoned operation keeps its slot");
            env.sleep(std::time::Duration::from_micros(100)).await;
        }
    }

    #[test]
    fn operations_abandoned_at_any_point_free_their_slots_and_harm_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let config = RuntimeConfig {
            background: Background::Shard,
            ..RuntimeConfig::new(dir.path())
        };
        Runtime::block_on(&config, |shard| async move {
            let env = shard.env().clone();
            let file = env
                .disk()
                .open(Path::new("file"), OpenMode::CreateNew)
                .await
                .unwrap();
            let mut content = AlignedBuf::zeroed(16 * SECTOR_BYTES);
            content.fill(3);
            file.write_at(0, content).await.0.unwrap();
            let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let listener = TcpListener::bind(&env, any, ListenOptions::default()).unwrap();
            let address = listener.local_addr().unwrap();
            let timeout = std::time::Duration::from_secs(30);
            for round in 0..500 {
                let client = TcpStream::connect(&env, address, timeout);
                let (client, server) = futures_util::join!(client, listener.accept());
                let (client, server) = (client.unwrap(), server.unwrap());
                let mut operations: Vec<Pin<Box<dyn Future<Output = ()>>>> = vec![
                    Box::pin(async {
                        drop(file.read_at(0, AlignedBuf::zeroed(SECTOR_BYTES)).await)
                    }),
                    Box::pin(async { drop(file.sync().await) }),
                    Box::pin(async {
                        drop(env.disk().open(Path::new("file"), OpenMode::Read).await)
                    }),
                    Box::pin(async { drop(listener.accept().await) }),
                    Box::pin(async { drop(server.recv(BytesMut::with_capacity(64)).await) }),
                    Box::pin(async { drop(client.send(vec!["a".into(), "b".into()]).await) }),
                ];
                for operation in &mut operations {
                    poll_immediate(operation).await;
                }
                // Drop before the submission, before the completion, or after it.
                for _ in 0..round % 5 {
                    crate::env::RealEnv::end_of_tick(&env).await;
                    env.sleep(std::time::Duration::from_micros(round % 7)).await;
                }
            }
            expect_empty_slots(&env).await;
            let (read, buffer) = file.read_at(0, AlignedBuf::zeroed(16 * SECTOR_BYTES)).await;
            assert_eq!(read.unwrap(), 16 * SECTOR_BYTES);
            assert!(buffer.iter().all(|byte| *byte == 3));
        })
        .unwrap();
        assert_few_descriptors(&[dir.path().to_str().unwrap(), "socket:"]);
    }

    #[test]
    fn files_are_closed_when_their_last_clone_goes() {
        let dir = tempfile::tempdir().unwrap();
        let config = RuntimeConfig {
            background: Background::Shard,
            ..RuntimeConfig::new(dir.path())
        };
        Runtime::block_on(&config, |shard| async move {
            let env = shard.env();
            let path = Path::new("file");
            drop(env.disk().open(path, OpenMode::CreateNew).await.unwrap());
            for _ in 0..5000 {
                drop(env.disk().open(path, OpenMode::Read).await.unwrap());
            }
        })
        .unwrap();
        assert_few_descriptors(&[dir.path().to_str().unwrap()]);
    }
}
