//! Keeps updates and the background in step ([`crate::pacing`] has the arithmetic).
//!
//! While a job runs, a look every few milliseconds says how far it may go and what updates cost. Updates
//! wait for their turn before they are decided, and are refused when that would take longer than
//! [`Options::wait_max`](crate::Options::wait_max).
//!
//! Invariant: no job waits for an update, and nothing that a job or its end needs is held by one that waits.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use torc_env::{Env, Instant, mutation};

use super::Inner;
use crate::compaction::Outlook;
use crate::error::WriteError;
use crate::jobs::Pace;
use crate::le::len64;
use crate::pacing::{
    Due, ONE, Price, Queue, Rate, allowance, flush_speed, line, merge_speed, moving_speed, mul_div,
    price, slowdown,
};

/// Time between two looks at a running job: what it does in between is what it may do at once.
const LOOK: Duration = Duration::from_millis(5);
/// Shorter waits add up until they are worth a timer.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// A kind of job, or of what one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Flush,
    /// Merging, which is owed.
    Compaction,
    /// Taking values out of blobs, and writing tables again where they are: nothing that level 0 waits for.
    Moving,
}

/// What is known about a kind of job.
#[derive(Default)]
struct Jobs {
    running: RefCell<Option<Arc<Pace>>>,
    /// How fast they go when nothing holds them.
    speed: RefCell<Rate>,
}

/// What pacing goes by.
#[derive(Default)]
pub(super) struct Pacing {
    queue: Queue,
    outlook: Cell<Outlook>,
    flush: Jobs,
    compaction: Jobs,
    /// Bytes of memtables sealed, by the time that they took to fill.
    sealed: RefCell<Rate>,
    /// Bytes of tables that were made of them.
    flushed: RefCell<Rate>,
    flushed_at: Cell<Option<Instant>>,
    /// Blobs are worn faster than they are emptied.
    has_dead_in_excess: Cell<bool>,
    /// Somebody waits until everything up to this frame is flushed.
    flush_wanted: Cell<u64>,
    /// How many wait for a full compaction.
    compaction_wanted: Cell<usize>,
    /// There may be room for updates that was not there before.
    changed: crate::signal::Signal,
}

impl Pacing {
    /// `None` for what nothing is priced by.
    fn jobs(&self, kind: Kind) -> Option<&Jobs> {
        match kind {
            Kind::Flush => Some(&self.flush),
            Kind::Compaction => Some(&self.compaction),
            Kind::Moving => None,
        }
    }

    /// How far the running job of this kind has come, in bytes.
    fn done(&self, kind: Kind) -> u64 {
        let running = self.jobs(kind).map(|jobs| jobs.running.borrow());
        running.map_or(0, |running| running.as_ref().map_or(0, |pace| pace.done()))
    }

    fn set_running(&self, kind: Kind, pace: Option<&Arc<Pace>>) {
        if let Some(jobs) = self.jobs(kind) {
            jobs.running.replace(pace.cloned());
        }
    }

    /// Bytes of updates a second, at most: no memtable has become full since the last one was flushed.
    fn updated_per_s(&self, now: Instant, memtable_bytes: u64) -> u64 {
        let Some(flushed_at) = self.flushed_at.get() else {
            return 0;
        };
        let since = Rate::of(memtable_bytes, now - flushed_at).per_s();
        let before = self.sealed.borrow().per_s();
        before.unwrap_or(0).min(since.unwrap_or(u64::MAX))
    }

    /// Has whoever waits for room look again.
    pub(super) fn ring(&self) {
        self.changed.ring();
    }

    /// A flush up to this frame is in a hurry.
    pub(super) fn want_flush(&self, through: u64) {
        self.flush_wanted.set(self.flush_wanted.get().max(through));
    }

    /// Compactions are in a hurry until what is returned is dropped.
    pub(super) fn want_compaction(&self) -> impl Drop + '_ {
        struct Wanted<'a>(&'a Cell<usize>);
        impl Drop for Wanted<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() - 1);
            }
        }
        self.compaction_wanted.set(self.compaction_wanted.get() + 1);
        Wanted(&self.compaction_wanted)
    }

    /// A memtable of `sealed_bytes` has become tables of `table_bytes`.
    fn note_flush(&self, now: Instant, sealed_bytes: u64, table_bytes: u64) {
        if let Some(before) = self.flushed_at.replace(Some(now)) {
            self.sealed.borrow_mut().add(sealed_bytes, now - before);
            self.flushed.borrow_mut().add(table_bytes, now - before);
        }
    }
}

impl<E: Env> Inner<E> {
    /// Waits for a job, and says meanwhile how far it may go by each pace that it keeps.
    pub(super) async fn guide<T>(
        &self,
        paces: &[(Kind, Arc<Pace>)],
        job: impl Future<Output = T>,
    ) -> T {
        for (kind, pace) in paces {
            self.pacing.set_running(*kind, Some(pace));
            pace.allow(0);
        }
        let mut job = pin!(job);
        let mut looked_at = self.env.now();
        let mut elapsed = LOOK;
        let output = loop {
            let before: Vec<Option<u64>> = paces
                .iter()
                .map(|(kind, pace)| self.allow(*kind, pace, elapsed))
                .collect();
            self.reprice();
            let timer = pin!(self.env.sleep(LOOK));
            let ended = match select(job.as_mut(), timer).await {
                Either::Left((output, _)) => Some(output),
                Either::Right(_) => None,
            };
            let now = self.env.now();
            elapsed = now - looked_at;
            looked_at = now;
            for ((kind, pace), before) in paces.iter().zip(before) {
                if let (Some(jobs), Some(before)) = (self.pacing.jobs(*kind), before) {
                    let done = pace.done().saturating_sub(before);
                    jobs.speed.borrow_mut().add(done, elapsed);
                }
            }
            if let Some(output) = ended {
                break output;
            }
        };
        for (kind, _) in paces {
            self.pacing.set_running(*kind, None);
        }
        output
    }

    /// Lets a job go on, `elapsed` after the last time. Returns how far it has come when nothing holds it from now on.
    fn allow(&self, kind: Kind, pace: &Pace, elapsed: Duration) -> Option<u64> {
        let speed = self.speed(kind);
        let done = pace.done();
        pace.allow(allowance(pace.allowed(), done, speed, elapsed));
        speed.is_none().then_some(done)
    }

    /// Bytes a second at which a job is to go; `None`: as fast as it can.
    fn speed(&self, kind: Kind) -> Option<u64> {
        if self.is_stopping() {
            return None;
        }
        let pacing = &self.pacing;
        match kind {
            Kind::Flush => {
                let memory = self.memory.borrow();
                let is_wanted = pacing.flush_wanted.get() > self.manifest.state().flushed.sequence;
                let budget = self.options.memtable_bytes;
                let is_urgent =
                    memory.sealed_count() > 1 || memory.memtable_bytes() > budget - budget / 4;
                let need = pacing.sealed.borrow().per_s();
                need.filter(|_| !is_wanted && !is_urgent).map(flush_speed)
            }
            Kind::Compaction => {
                let outlook = pacing.outlook.get();
                let flushed = pacing.flushed.borrow().per_s()?;
                let need = mul_div(flushed, outlook.per_flushed, ONE);
                let owed = outlook.owed_bytes.saturating_sub(pacing.done(kind));
                let is_wanted = pacing.compaction_wanted.get() > 0;
                merge_speed(need, owed, outlook.full_bytes).filter(|_| !is_wanted)
            }
            Kind::Moving => {
                let memtable = len64(self.options.memtable_bytes / 2);
                let need = pacing.updated_per_s(self.env.now(), memtable);
                let is_short = self.health.disk_full.get() || pacing.has_dead_in_excess.get();
                let is_wanted = pacing.compaction_wanted.get() > 0;
                let is_urgent = is_short || is_wanted || self.behind() > 0;
                (!is_urgent).then(|| moving_speed(need))
            }
        }
    }

    /// Notes that a memtable has become tables of `table_bytes`.
    pub(super) fn note_flush(&self, sealed_bytes: usize, table_bytes: u64) {
        let now = self.env.now();
        self.pacing
            .note_flush(now, len64(sealed_bytes), table_bytes);
        self.look_ahead();
    }

    /// Tables have changed.
    pub(super) fn look_ahead(&self) {
        let tables = self.tables.borrow();
        self.pacing.outlook.set(tables.outlook(&self.options));
        let has_excess = tables.has_dead_in_excess(&self.options);
        self.pacing.has_dead_in_excess.set(has_excess);
        drop(tables);
        self.reprice();
    }

    /// Says what updates cost from now on.
    fn reprice(&self) {
        let pacing = &self.pacing;
        let price = self.memory_price().max(self.compaction_price());
        pacing.queue.set_price(price);
        pacing.changed.ring();
    }

    /// Updates may just fill what room there is until the memtables that wait are flushed.
    fn memory_price(&self) -> Price {
        let memory = self.memory.borrow();
        let waiting = len64(memory.sealed_bytes());
        let waiting = waiting.saturating_sub(self.pacing.done(Kind::Flush));
        let budget = self.options.memtable_bytes - self.options.memtable_bytes / 16;
        let room = len64(budget.saturating_sub(memory.memtable_bytes()));
        let slowdown = slowdown(waiting, 0, waiting.saturating_add(room));
        price(slowdown, self.pacing.flush.speed.borrow().per_s())
    }

    /// By how much slower than merges follow updates may come: as fast half way between the line and the most runs on
    /// level 0. None up to the line.
    fn behind(&self) -> u64 {
        let outlook = self.pacing.outlook.get();
        let owed = outlook.owed_bytes;
        let owed = owed.saturating_sub(self.pacing.done(Kind::Compaction));
        let line = line(outlook.full_bytes);
        let bound = outlook
            .bound_bytes
            .saturating_add(line - outlook.full_bytes);
        let by_bytes = slowdown(owed, line, bound);
        // The last line for trees whose bytes say little: young ones, and many small ones.
        let runs = len64(self.tables.borrow().level0_runs());
        let runs_max = len64(self.options.level0_runs_max);
        let by_runs = slowdown(runs, runs_max - runs_max / 4, runs_max);
        by_bytes.max(by_runs)
    }

    fn compaction_price(&self) -> Price {
        let pacing = &self.pacing;
        let outlook = pacing.outlook.get();
        let merged = pacing.compaction.speed.borrow().per_s();
        // In bytes of updates.
        let share = pacing.flushed.borrow().share_of(&pacing.sealed.borrow());
        let owed_each = mul_div(share, outlook.per_flushed, ONE).max(1);
        let followed = merged.map(|merged| mul_div(merged, ONE, owed_each));
        price(self.behind(), followed)
    }

    /// Waits until an update's turn has come. What it has taken is to be settled once its size is known.
    ///
    /// # Errors
    /// When it would wait too long.
    pub(super) async fn admitted(&self) -> Result<Due<'_>, WriteError> {
        let patience = self.options.wait_max;
        if self.is_full() && !self.health.disk_full.get() {
            let timer = pin!(self.env.sleep(patience));
            let has_room = || (!self.is_full() || self.is_stopping()).then_some(());
            let room = pin!(self.pacing.changed.until(has_room));
            self.count(|counts| counts.delayed += 1);
            select(room, timer).await;
        }
        let queue = &self.pacing.queue;
        if queue.is_free() || mutation::on("never_wait") {
            return Ok(queue.untaken());
        }
        let now = self.env.now();
        let Some((turn, due)) = queue.take(now, patience) else {
            self.count(|counts| counts.refused_overload += 1);
            return Err(WriteError::Overloaded {
                what: "updates come faster than they can be flushed and merged",
            });
        };
        if turn - now >= WAIT_MIN {
            self.count(|counts| counts.delayed += 1);
            self.env.sleep_until(turn).await;
        }
        Ok(due)
    }

    /// Whether values are refused until something was flushed or merged.
    fn is_full(&self) -> bool {
        self.memory.borrow().memtable_bytes() > self.options.memtable_bytes
            || self.tables.borrow().level0_runs() >= self.options.level0_runs_max
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use torc_env::{Disk, OpenMode, Token, TreeId};
    use torc_sim::SimEnv;

    use super::*;
    use crate::options::Options;
    use crate::record::Record;
    use crate::store::{Decision, Store};

    const TREE: TreeId = TreeId(1);

    async fn put(store: &Store<SimEnv>, key: &[u8]) -> Result<(), WriteError> {
        let record = Record {
            kind: crate::record::Kind::Value,
            stamp: 1,
            expires_at_ms: 0,
            value: Bytes::from_static(&[7; 1000]),
        };
        let decide = |_: Option<&Record>| Decision::Write(record, ());
        let (_, ticket) = store
            .update(TREE, Token::of(TREE, key), key, decide)
            .await?;
        ticket.wait().await
    }

    /// When the next update's turn would come.
    fn next_turn(store: &Store<SimEnv>, now: Instant) -> Instant {
        let taken = store.0.pacing.queue.take(now, Duration::from_secs(60));
        taken.expect("nobody waits as long").0
    }

    /// A store in which updates cost time, with a record of each of two keys in a table.
    async fn busy(env: &SimEnv) -> Store<SimEnv> {
        let options = Options {
            cache_bytes: 0,
            ..Options::new("shard-00")
        };
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        put(&store, b"one").await.unwrap();
        put(&store, b"two").await.unwrap();
        store.flush().await.unwrap();
        env.sleep(Duration::from_secs(1)).await;
        // A byte a microsecond: a millisecond an update, about.
        store.0.pacing.queue.set_price(price(ONE, Some(1_000_000)));
        store
    }

    #[test]
    fn an_update_that_is_given_up_gives_its_time_back() {
        torc_sim::run(1, |env| async move {
            let store = busy(&env).await;
            store.hold(Duration::from_secs(1)).await.unwrap();
            {
                let update = pin!(put(&store, b"one"));
                let timer = pin!(env.sleep(Duration::from_micros(10)));
                assert!(matches!(select(update, timer).await, Either::Right(_)));
                assert!(next_turn(&store, env.now()) > env.now(), "it has its turn");
            }
            assert_eq!(next_turn(&store, env.now()), env.now());
        });
    }

    #[test]
    fn an_update_that_cannot_read_gives_its_time_back() {
        torc_sim::run(1, |env| async move {
            let store = busy(&env).await;
            let dir = &store.0.tables_dir;
            let entries = env.disk().list(dir).await.unwrap();
            let path = dir.join(&entries[0].name);
            let file = env.disk().open(&path, OpenMode::WriteDurable).await;
            let rubbish = torc_env::AlignedBuf::zeroed(torc_env::SECTOR_BYTES);
            let (written, _) = torc_env::File::write_at(&file.unwrap(), 0, rubbish).await;
            written.unwrap();
            let error = put(&store, b"one").await.unwrap_err();
            assert!(matches!(error, WriteError::Read(_)), "{error}");
            assert_eq!(next_turn(&store, env.now()), env.now());
        });
    }
}
