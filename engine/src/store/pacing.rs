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
use super::memory::fillable;
use crate::compaction::Outlook;
use crate::error::WriteError;
use crate::jobs::Pace;
use crate::le::len64;
use crate::pacing::{
    Due, ONE, Price, Queue, Rate, allowance, flush_speed, line, merge_speed, moving_speed, mul_div,
    price, price_of_room, slowdown, time_of,
};

/// Time between two looks at a running job: what it does in between is what it may do at once.
const LOOK: Duration = Duration::from_millis(5);
/// Shorter waits add up until they are worth a timer.
const WAIT_MIN: Duration = Duration::from_millis(1);

/// What updates may bring at once without a wait: this part of the memory of memtables. A frame's clients come together, and half
/// of what [`fillable`] leaves takes them all in.
const BURST_PART: usize = 32;

/// A kind of job, or of what one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Flush,
    /// Merging, which is owed.
    Compaction,
    /// Taking values out of blobs, writing tables again where they are, and merging for scans: nothing that level 0 waits for.
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
    /// When the flush that runs had been given all records.
    all_given_at: Cell<Option<Instant>>,
    /// Time from then on until the memtable was let go of, of the last flushes.
    ending: Cell<Duration>,
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
    /// For memtables of so many bytes.
    pub(super) fn new(memtable_bytes: usize) -> Pacing {
        Pacing {
            queue: Queue::new(len64(memtable_bytes / BURST_PART)),
            ..Pacing::default()
        }
    }

    /// `None` for what nothing is priced by.
    fn jobs(&self, kind: Kind) -> Option<&Jobs> {
        match kind {
            Kind::Flush => Some(&self.flush),
            Kind::Compaction => Some(&self.compaction),
            Kind::Moving => None,
        }
    }

    /// How far the running job of this kind has come, in bytes. A flush runs until its memtable is let go of.
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

    /// How much longer the flush that runs, or that begins, takes to make its files durable and let go of the memtable,
    /// once it has all records.
    fn ending(&self, now: Instant) -> Duration {
        let since = self
            .all_given_at
            .get()
            .map_or(Duration::ZERO, |at| now - at);
        self.ending.get().saturating_sub(since)
    }

    /// The flush that runs has been given all records.
    fn all_given(&self, now: Instant) {
        if self.all_given_at.get().is_none() {
            self.all_given_at.set(Some(now));
        }
    }

    /// The flush that ran has ended.
    fn end_flush(&self) -> Option<Instant> {
        self.set_running(Kind::Flush, None);
        self.all_given_at.take()
    }

    /// A memtable of `sealed_bytes` has become tables of `table_bytes`.
    fn note_flush(&self, now: Instant, sealed_bytes: u64, table_bytes: u64) {
        if let Some(all_given_at) = self.end_flush() {
            let weighted = self.ending.get() * 3 + (now - all_given_at);
            self.ending.set(weighted / 4);
        }
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
        // Nobody looks again until a flush has let go of its memtable.
        if paces.iter().any(|(kind, _)| *kind == Kind::Flush) {
            self.pacing.all_given(self.env.now());
            self.reprice();
        }
        // What a flush has done counts until its memtable is let go of.
        for (kind, _) in paces.iter().filter(|(kind, _)| *kind != Kind::Flush) {
            self.pacing.set_running(*kind, None);
        }
        output
    }

    /// A flush has failed: nothing of it counts.
    pub(super) fn flush_failed(&self) {
        self.pacing.end_flush();
        self.reprice();
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
        let now = self.env.now();
        let price = self.memory_price(now).max(self.compaction_price());
        pacing.queue.set_price(now, price);
        pacing.changed.ring();
    }

    /// Updates may just fill what room there is until the memtables that wait are flushed.
    fn memory_price(&self, now: Instant) -> Price {
        let pacing = &self.pacing;
        let memory = self.memory.borrow();
        let waiting = len64(memory.sealed_bytes());
        let Some(rate) = pacing.flush.speed.borrow().per_s().filter(|_| waiting > 0) else {
            return Price::default();
        };
        let done = pacing.done(Kind::Flush);
        let oldest = memory.oldest_sealed();
        let oldest = oldest.map_or(0, |slot| len64(slot.memtable.memory_bytes()));
        if done >= oldest {
            pacing.all_given(now);
        }
        let time = time_of(waiting.saturating_sub(done), rate) + pacing.ending(now);
        let used = memory.memtable_bytes() + memory.pending_bytes();
        let room = fillable(self.options.memtable_bytes).saturating_sub(used);
        price_of_room(time, len64(room), rate)
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
        if self.may_wait_for_room() {
            self.count(|counts| counts.delayed += 1);
            self.room(self.env.now() + patience).await;
        }
        let queue = &self.pacing.queue;
        if queue.is_free() || mutation::on("never_wait") {
            return Ok(queue.untaken());
        }
        let now = self.env.now();
        let Some(due) = queue.take(now, patience) else {
            self.count(|counts| counts.refused_overload += 1);
            return Err(WriteError::Overloaded {
                what: "updates come faster than they can be flushed and merged",
            });
        };
        if due.turn(now) - now >= WAIT_MIN {
            self.count(|counts| counts.delayed += 1);
            self.wait_for(&due).await;
        }
        Ok(due)
    }

    /// Waits until the turn has come that was taken: when it was to come, or earlier if updates become cheaper.
    async fn wait_for(&self, due: &Due<'_>) {
        loop {
            let turn = due.turn(self.env.now());
            let timer = pin!(self.env.sleep_until(turn));
            let cheaper = pin!(due.cheaper());
            if let Either::Left(_) = select(timer, cheaper).await {
                return;
            }
        }
    }

    /// Whether values are refused now, but not for long.
    pub(super) fn may_wait_for_room(&self) -> bool {
        self.is_full() && !self.health.disk_full.get() && !self.is_stopping()
    }

    /// Waits until values are not refused, or until `deadline`.
    pub(super) async fn room(&self, deadline: Instant) {
        let timer = pin!(self.env.sleep_until(deadline));
        let has_room = || (!self.is_full() || self.is_stopping()).then_some(());
        let room = pin!(self.pacing.changed.until(has_room));
        select(room, timer).await;
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
        taken.expect("nobody waits as long").turn(now)
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
        let price = price(ONE, Some(1_000_000));
        let queue = &store.0.pacing.queue;
        queue.set_price(env.now(), price);
        // What may come in one burst has come.
        let burst = queue.take(env.now(), Duration::ZERO).unwrap();
        burst.settle(len64(store.0.options.memtable_bytes / BURST_PART));
        store
    }

    #[test]
    fn what_a_flush_takes_behind_its_job_is_known_however_short_the_job_was() {
        torc_sim::run(1, |env| async move {
            let (store, _) = Store::open(env.clone(), Options::new("shard-00"))
                .await
                .unwrap();
            put(&store, b"one").await.unwrap();
            let pacing = &store.0.pacing;
            assert_eq!(pacing.ending.get(), Duration::ZERO);
            let ended = || {
                let slot = store.0.memory.borrow().oldest_sealed();
                let done = pacing.done(Kind::Flush);
                slot.is_some_and(|slot| done >= len64(slot.memtable.memory_bytes()))
            };
            let flush = pin!(store.flush());
            let looks = pin!(async {
                while !(ended() && pacing.all_given_at.get().is_some()) {
                    env.sleep(Duration::from_micros(1)).await;
                }
            });
            // The manifest's edit is still to come then.
            assert!(matches!(select(flush, looks).await, Either::Right(_)));
            store.flush().await.unwrap();
            assert!(pacing.ending.get() > Duration::ZERO);
        });
    }

    #[test]
    fn compaction_goes_by_what_flushes_write_and_not_by_what_memtables_hold() {
        torc_sim::run(1, |env| async move {
            let options = Options {
                memtable_bytes: 1 << 20,
                ..Options::new("shard-00")
            };
            let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
            let flush_bytes = || {
                let tables = store.0.tables.borrow();
                tables.settings(&options, TREE).unwrap().flush_bytes
            };
            assert_eq!(flush_bytes(), 512 << 10);
            for number in 0..400_u32 {
                put(&store, &number.to_be_bytes()).await.unwrap();
            }
            store.flush().await.unwrap();
            // They are one byte, again and again.
            assert_eq!(flush_bytes(), 64 << 10);
        });
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
