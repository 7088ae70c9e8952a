//! Gives the space of removed files back piece by piece.
//!
//! A compaction removes hundreds of megabytes at once. Where the file system is mounted with `discard`, it then tells the disk
//! of all of it at its next commit, and reads and the log wait until the disk is done. Here a thread of the node's cuts such
//! files from their end instead, at a bounded rate ([`pace`]).
//!
//! Invariant: only a file without a name is cut, and only when nobody else has it open, of which the kernel knows. So
//! whoever reads a removed file reads on, another link keeps its content, and no crash leaves a file that is cut half: what
//! has no name, the file system gives back by itself, at the latest when it is mounted again.
//!
//! What is not given back yet counts as used.

mod pace;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sys;

pub(crate) use pace::PIECE_BYTES;

/// Files that wait, at most: each is open. Beyond them, space is given back at once.
const FILES_MAX: usize = 1024;

/// How long to wait for readers when all files that wait have some.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The removed files of a node.
pub(crate) struct Reclaim {
    /// Where the thread may run: everywhere, not only where the shard that needs it is pinned.
    cpus: Option<libc::cpu_set_t>,
    inbox: Mutex<Inbox>,
    news: Condvar,
    pending_bytes: AtomicU64,
}

/// What other threads leave for the one that cuts.
#[derive(Default)]
struct Inbox {
    files: Vec<Removed>,
    /// Files here and with the thread.
    count: usize,
    is_stopping: bool,
    thread: Option<JoinHandle<()>>,
}

impl Reclaim {
    /// Starts nothing yet.
    pub(crate) fn new() -> Reclaim {
        Reclaim {
            cpus: sys::affinity().ok(),
            inbox: Mutex::default(),
            news: Condvar::new(),
            pending_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes of removed files that are not given back yet.
    pub(crate) fn pending_bytes(&self) -> u64 {
        self.pending_bytes.load(Ordering::Relaxed)
    }

    /// Takes a file that was opened for writing and has lost a name since. If that was its last one, its space is given back by
    /// and by. Gives the file back if it is to be closed instead: it has another name, or too many wait.
    pub(crate) fn take(self: &Arc<Self>, fd: OwnedFd) -> Result<(), OwnedFd> {
        let Ok((bytes, false)) = sys::len_and_named(fd.as_fd()) else {
            return Err(fd);
        };
        let mut inbox = self.inbox();
        if inbox.is_stopping || inbox.count >= FILES_MAX || !self.has_thread(&mut inbox) {
            return Err(fd);
        }
        self.pending_bytes.fetch_add(bytes, Ordering::Relaxed);
        inbox.count += 1;
        inbox.files.push(Removed { fd, bytes });
        drop(inbox);
        self.news.notify_one();
        Ok(())
    }

    /// Ends the thread. What waits is given back at once, by the kernel.
    pub(crate) fn stop(&self) {
        let thread = {
            let mut inbox = self.inbox();
            inbox.is_stopping = true;
            inbox.thread.take()
        };
        self.news.notify_one();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that gives space back panicked");
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread if there is none. Whether there is one now.
    fn has_thread(self: &Arc<Self>, inbox: &mut Inbox) -> bool {
        if inbox.thread.is_some() {
            return true;
        }
        let reclaim = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("reclaim".into())
            .spawn(move || reclaim.run());
        match started {
            Ok(thread) => inbox.thread = Some(thread),
            Err(error) => tracing::warn!(%error, "removed files are given back whole"),
        }
        inbox.thread.is_some()
    }

    fn run(&self) {
        if let Some(cpus) = &self.cpus
            && let Err(error) = sys::set_affinity(cpus)
        {
            tracing::warn!(%error, "space is given back on a shard's core");
        }
        let mut files = VecDeque::new();
        let mut rest = Duration::ZERO;
        while self.receive(&mut files, rest) {
            rest = self.give_back_piece(&mut files);
        }
    }

    /// Waits for `rest`, and until there is a file. False when the thread is to end.
    fn receive(&self, files: &mut VecDeque<Removed>, rest: Duration) -> bool {
        let inbox = self.inbox();
        let (inbox, _) = self
            .news
            .wait_timeout_while(inbox, rest, |inbox| !inbox.is_stopping)
            .unwrap_or_else(PoisonError::into_inner);
        let has_nothing = |inbox: &mut Inbox| inbox.count == 0 && !inbox.is_stopping;
        let mut inbox = self
            .news
            .wait_while(inbox, has_nothing)
            .unwrap_or_else(PoisonError::into_inner);
        files.extend(inbox.files.drain(..));
        !inbox.is_stopping
    }

    /// Cuts a piece off the first file that nobody reads. Returns how long to rest.
    fn give_back_piece(&self, files: &mut VecDeque<Removed>) -> Duration {
        for _ in 0..files.len() {
            let Some(mut file) = files.pop_front() else {
                break;
            };
            let left = match file.cut() {
                Ok(Some(left)) => left,
                Ok(None) => {
                    files.push_back(file);
                    continue;
                }
                // On a file system without leases, say: it goes whole, when the last one closes it.
                Err(error) => {
                    tracing::debug!(%error, "a removed file is given back whole");
                    0
                }
            };
            let free_bytes = sys::space(file.fd.as_fd()).map_or(0, |space| space.free_bytes);
            let rest = pace::rest(self.pending_bytes(), free_bytes);
            self.pending_bytes
                .fetch_sub(file.bytes - left, Ordering::Relaxed);
            file.bytes = left;
            if left > 0 {
                files.push_front(file);
            } else {
                drop(file);
                self.inbox().count -= 1;
            }
            return rest;
        }
        LOOK_AGAIN
    }
}

/// A file without a name.
struct Removed {
    fd: OwnedFd,
    /// Its length.
    bytes: u64,
}

impl Removed {
    /// Cuts a piece off; nothing if somebody else has it open. Returns what is left. Without a name, it cannot be opened any more.
    fn cut(&self) -> io::Result<Option<u64>> {
        if sys::is_open_elsewhere(self.fd.as_fd())? {
            return Ok(None);
        }
        let left = self.bytes.saturating_sub(PIECE_BYTES);
        sys::truncate(self.fd.as_fd(), left)?;
        Ok(Some(left))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Instant;

    use super::*;

    /// A file without a name and, where it has one, a reader of it.
    fn removed(bytes: u64) -> (File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let reader = file.reopen().unwrap();
        (file.into_file(), reader)
    }

    fn len(file: &File) -> u64 {
        file.metadata().unwrap().len()
    }

    fn wait_until(is_so: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it never is");
            // Not in a loop without a pause: other tests of this process count on the kernel's workers.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_file_is_cut_once_nobody_else_has_it_open() {
        let reclaim = Arc::new(Reclaim::new());
        let (read, reader) = removed(3 * PIECE_BYTES);
        let (unread, _) = removed(2 * PIECE_BYTES + 1);
        // Another descriptor of the same open file.
        let watched = [&read, &unread].map(|file| file.try_clone().unwrap());
        reclaim.take(read.into()).unwrap();
        reclaim.take(unread.into()).unwrap();
        wait_until(|| len(&watched[1]) == 0 && reclaim.pending_bytes() == 3 * PIECE_BYTES);
        assert_eq!(len(&watched[0]), 3 * PIECE_BYTES);
        drop(reader);
        wait_until(|| reclaim.pending_bytes() == 0);
        assert_eq!(len(&watched[0]), 0);
        reclaim.stop();
    }

    #[test]
    fn a_file_with_another_name_is_left_alone() {
        let reclaim = Arc::new(Reclaim::new());
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(2 * PIECE_BYTES).unwrap();
        let fd = named.as_file().try_clone().unwrap();
        let refused = reclaim.take(fd.into()).unwrap_err();
        assert_eq!(len(&refused.into()), 2 * PIECE_BYTES);
        assert_eq!(reclaim.pending_bytes(), 0);
    }

    #[test]
    fn a_stop_waits_for_nothing_and_cuts_nothing() {
        let reclaim = Arc::new(Reclaim::new());
        let (file, reader) = removed(2 * PIECE_BYTES);
        reclaim.take(file.into()).unwrap();
        reclaim.stop();
        assert_eq!(len(&reader), 2 * PIECE_BYTES);
        let (late, _) = removed(2 * PIECE_BYTES);
        assert!(reclaim.take(late.into()).is_err());
    }
}
