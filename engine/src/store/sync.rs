//! The task that syncs the log when the policy does not sync every frame.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use torc_env::{Env, File};

use super::Inner;
use super::writer::{failed, in_doubt};
use crate::error::WriteError;
use crate::options::Fsync;

impl<E: Env> Inner<E> {
    /// The sync task of the weaker policies: syncs at every interval in which something was
    /// written, and when somebody asks.
    pub(super) async fn run_syncs(self: Rc<Self>) {
        let interval = match self.options.fsync {
            Fsync::Interval(interval) => Some(interval.max(Duration::from_millis(1))),
            Fsync::Always | Fsync::Group | Fsync::Never => None,
        };
        loop {
            self.sync_due(interval).await;
            if self.is_stopping() {
                return;
            }
            let through = self.health.written.get();
            let file = self.supply.borrow().active_file();
            let Some(file) = file.filter(|_| through > self.health.synced.get()) else {
                continue;
            };
            match file.sync().await {
                Ok(()) => self.note_synced(through),
                Err(error) => {
                    self.poison_with(&failed("sync", &error));
                    return;
                }
            }
        }
    }

    async fn sync_due(&self, interval: Option<Duration>) {
        let asked = pin!(self.sync.until(|| {
            let is_wanted = self.health.sync_wanted.get() > self.health.synced.get();
            let can = self.health.written.get() >= self.health.sync_wanted.get();
            (self.is_stopping() || is_wanted && can).then_some(())
        }));
        match interval {
            None => asked.await,
            Some(interval) => {
                select(asked, pin!(self.env.sleep(interval))).await;
            }
        }
    }

    /// Completes when all frames up to `sequence` are durable.
    pub(super) async fn synced_through(&self, sequence: u64) -> Result<(), WriteError> {
        let wanted = self.health.sync_wanted.get().max(sequence);
        self.health.sync_wanted.set(wanted);
        self.sync.ring();
        self.sync
            .until(|| {
                if self.health.synced.get() >= sequence {
                    return Some(Ok(()));
                }
                self.poison().map(|cause| Err(in_doubt(cause)))
            })
            .await
    }
}
