//! The watch on the disk's free space.
//!
//! Below the reserve, values are refused; deletions, flushes and the log go on within it. The
//! state leaves by itself when space returns.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use torc_env::{Disk, Env};

use super::Inner;

/// How often the disk is asked.
const PERIOD: Duration = Duration::from_secs(1);

impl<E: Env> Inner<E> {
    /// The watching task, until the store stops.
    pub(super) async fn run_space_watch(self: Rc<Self>) {
        while !self.is_stopping() {
            self.look_at_space().await;
            let timer = std::pin::pin!(self.env.sleep(PERIOD));
            let stopping = std::pin::pin!(self.stopped.until(|| self.is_stopping().then_some(())));
            select(timer, stopping).await;
        }
    }

    /// Compares the free space with the reserve. A quarter more is needed to leave the state than
    /// to enter it, so that it does not flap.
    pub(super) async fn look_at_space(&self) {
        let Ok(space) = self.env.disk().space().await else {
            return;
        };
        let reserve = self.options.reserve_bytes;
        let is_full = self.health.disk_full.get();
        let line = if is_full {
            reserve + reserve / 4
        } else {
            reserve
        };
        let is_short = space.free_bytes < line;
        if is_short != is_full {
            tracing::warn!(
                free_bytes = space.free_bytes,
                reserve_bytes = reserve,
                refusing = is_short,
                "free space crosses the reserve"
            );
            self.health.disk_full.set(is_short);
        }
        self.health.free_bytes.set(space.free_bytes);
    }

    /// Takes a failed operation's word that the disk is full, until the watch says otherwise.
    pub(super) fn note_disk_error(&self, error: &io::Error) {
        if error.kind() == io::ErrorKind::StorageFull {
            self.health.disk_full.set(true);
        }
    }
}
