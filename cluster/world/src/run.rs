//! One run: founding, load under faults, healing, convergence, judgement.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use torc_cluster::api::{GetRequest, Level, ScanRequest};
use torc_cluster::hlc::SKEW_MAX_DEFAULT;
use torc_env::Env;
use torc_sim::{HostId, Rng, Simulation, Stalled};

use crate::check::{Violation, check};
use crate::client::Client;
use crate::cluster::{Cluster, FLOORS_INTERVAL, NODE_CLASS, civil_ns};
use crate::config::Config;
use crate::history::{Final, History, KeyId, Outcome, Times, Value};
use crate::nemesis::{Fault, Nemesis, Planned, plan};
use crate::record::Recorder;
use crate::{story, value};

/// How long founding, or getting ready after all faults, may take.
const READY_MAX: Duration = Duration::from_secs(120);
/// How long replicas may differ after all faults: several rounds of hint replay and repair.
const CONVERGENCE_MAX: Duration = Duration::from_secs(300);
/// Longer than any message is late or any request lives.
pub(crate) const STRAGGLERS: Duration = Duration::from_secs(15);
/// What the stamps of a run add up to that follow each other faster than time: a microsecond each.
const STAMPS: Duration = Duration::from_millis(10);
/// Civil time that a run with idle hours begins with: what is deleted in it is purged by whole hours,
/// and the next one is near.
const BEFORE_THE_HOUR: Duration = Duration::from_secs(50 * 60);
/// Brings civil time beyond the hour, and repairs with it.
const OVER_THE_HOUR: Duration = Duration::from_secs(15 * 60);
/// Hints that count for nothing are given up: those for an absent host keep deletions from being purged.
const HINTS_AGE: Duration = Duration::from_secs(4 * 3600);
/// Makes each range due again, for a repair that follows a promise of the new hour.
const DUE_AGAIN: Duration = Duration::from_secs(12 * 60);
/// Until floors are as high as that repair allows: it must be over for as long as requests live, and then all are asked twice.
const FLOORS_RISE: Duration =
    Duration::from_secs(STRAGGLERS.as_secs() + 3 * FLOORS_INTERVAL.as_secs());
/// Enough for each range to be repaired, or for each store to be compacted.
const IDLE_WORK: Duration = Duration::from_secs(12);
/// Longest time of faults.
const FAULTS_MAX: Duration = Duration::from_secs(30);

/// What may be changed about a run besides its seed.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Keeps the text of every event, for [`Report::events`].
    pub keep_events: bool,
    /// Changes what the seed drew, for shrinking: run again without one kind of fault.
    pub edit: Option<fn(&mut Config)>,
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Everything that the seed drew.
    pub config: Config,
    /// Hash over every event; equal for every run of this seed by this build.
    pub hash: u128,
    /// Events.
    pub event_count: u64,
    /// Simulated time.
    pub simulated: Duration,
    /// Writes that were done, refused, in doubt.
    pub writes: [usize; 3],
    /// Reads that succeeded, and that failed.
    pub reads: [usize; 2],
    /// How often clients got each failure, by its text.
    pub failures: BTreeMap<String, usize>,
    /// What must not happen, and did.
    pub violations: Vec<Violation>,
    /// The stories of the keys that were violated.
    pub story: String,
    /// The text of every event, when it was kept.
    pub events: Vec<String>,
}

impl Report {
    /// Whether nothing was violated.
    pub fn is_good(&self) -> bool {
        self.violations.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([done, refused, doubt], [read, failed]) = (self.writes, self.reads);
        writeln!(f, "seed {}", self.seed)?;
        writeln!(f, "config {:#?}", self.config)?;
        writeln!(
            f,
            "{} events in {:?} of simulated time, hash {:032x}",
            self.event_count, self.simulated, self.hash
        )?;
        writeln!(
            f,
            "writes: {done} done, {refused} refused, {doubt} in doubt"
        )?;
        writeln!(f, "reads: {read} done, {failed} failed")?;
        for (failure, count) in &self.failures {
            writeln!(f, "{count:>5} x {failure}")?;
        }
        write!(f, "{}", self.story)?;
        let verdict = if self.is_good() { "good" } else { "BAD" };
        write!(f, "{verdict}: {} violations", self.violations.len())
    }
}

/// Runs the world of a seed to its end and judges it.
pub fn run(seed: u64, options: &Options) -> Report {
    let mut config = Config::draw(seed);
    if let Some(edit) = options.edit {
        edit(&mut config);
    }
    run_config(config, options)
}

/// Runs a world of this configuration to its end and judges it.
pub fn run_config(config: Config, options: &Options) -> Report {
    let simulation = Simulation::new(config.seed, config.sim.clone());
    if options.keep_events {
        simulation.keep_lines();
    }
    let recorder = Recorder::new(known(&config));
    let planned = plan(&config, length(&config));
    let world = World {
        cluster: Cluster::new(&simulation, &config),
        recorder: recorder.clone(),
        planned: planned.clone(),
        config: config.clone(),
    };
    let running = simulation.clone();
    // A panic of product code is a finding like any other; what it leaves behind is only dropped.
    let outcome = catch_unwind(AssertUnwindSafe(|| running.run(world.run())));
    let (mut violations, began_ns, finals) = match outcome {
        Ok(Ok(end)) => (end.violations, end.began_ns, end.finals),
        Ok(Err(Stalled)) => (
            vec![other("liveness", "the world stands still")],
            0,
            Vec::new(),
        ),
        Err(panic) => (vec![other("panic", &message(&*panic))], 0, Vec::new()),
    };
    let history = recorder.finish(finals);
    violations.extend(check(&history));
    let tell = |key| story::of_key(&history, key, began_ns, &planned);
    Report {
        seed: config.seed,
        hash: simulation.hash(),
        event_count: simulation.event_count(),
        simulated: Duration::from_nanos(simulation.now().0),
        writes: count_writes(&history),
        reads: count_reads(&history),
        failures: recorder.failures(),
        story: story::of_violations(&violations, tell),
        events: simulation.lines(),
        violations,
        config,
    }
}

/// What is known of a run before it begins.
fn known(config: &Config) -> History {
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    History {
        n: config.effective_n(),
        is_repaired: config.repair.automatic,
        is_ordered_by_time: config.conflict.orders_by_time(),
        loses_what_is_in_doubt: config.rot.is_some(),
        times: Times {
            clock_off_ns: nanos(config.clock_off_max()),
            stamp_ahead_ns: nanos(SKEW_MAX_DEFAULT + STAMPS),
            late_ns: nanos(STRAGGLERS),
        },
        ..History::default()
    }
}

/// About as long as the clients need.
fn length(config: &Config) -> Duration {
    let load = &config.load;
    let mean_ms = load.think_ms / 2 + 20;
    Duration::from_millis(u64::from(load.operations) * mean_ms)
        .clamp(Duration::from_secs(2), FAULTS_MAX)
}

fn other(checker: &'static str, what: &str) -> Violation {
    Violation {
        checker,
        key: None,
        what: what.to_owned(),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

fn count_writes(history: &History) -> [usize; 3] {
    let count = |matches: fn(&Outcome) -> bool| {
        let writes = history.writes.iter();
        writes.filter(|write| matches(&write.outcome)).count()
    };
    [
        count(Outcome::is_done),
        count(Outcome::is_refused),
        count(|outcome| matches!(outcome, Outcome::InDoubt(_))),
    ]
}

fn count_reads(history: &History) -> [usize; 2] {
    let done = history
        .reads
        .iter()
        .filter(|read| read.values.is_some())
        .count();
    [done, history.reads.len() - done]
}

struct World {
    cluster: Rc<Cluster>,
    recorder: Recorder,
    planned: Vec<Planned>,
    config: Config,
}

struct End {
    began_ns: u64,
    violations: Vec<Violation>,
    finals: Vec<Final>,
}

impl World {
    async fn run(self) -> End {
        let mut end = End {
            began_ns: 0,
            violations: Vec::new(),
            finals: Vec::new(),
        };
        if let Err(violation) = self.play(&mut end).await {
            end.violations.push(violation);
        }
        let troubles = self.cluster.troubles();
        end.violations
            .extend(troubles.iter().map(|trouble| other("start", trouble)));
        end
    }

    async fn play(&self, end: &mut End) -> Result<(), Violation> {
        if self.config.idle.is_some() {
            self.simulation().pass_civil_time(BEFORE_THE_HOUR);
        }
        for host in self.cluster.founders() {
            self.cluster.start(*host);
        }
        self.found().await?;
        end.began_ns = civil_ns(self.simulation());
        self.load().await;
        if self.config.idle.is_some() {
            self.idle().await;
        }
        self.heal().await?;
        self.converge(end).await
    }

    fn simulation(&self) -> &Simulation {
        self.cluster.simulation()
    }

    async fn found(&self) -> Result<(), Violation> {
        if self.cluster.keyspace() != torc_cluster::api::KEYSPACE_DEFAULT {
            let created = self.cluster.create_keyspace().await;
            created.map_err(|error| other("liveness", &format!("no keyspace: {error}")))?;
        }
        self.wait_until_ready("founding", self.cluster.founders())
            .await
    }

    async fn wait_until_ready(&self, when: &str, hosts: &[HostId]) -> Result<(), Violation> {
        let limit = self.simulation().now() + READY_MAX;
        loop {
            let missing = self.cluster.not_ready(hosts);
            if missing.is_empty() {
                return Ok(());
            }
            self.start_dead();
            if self.simulation().now() > limit {
                let missing = missing.join(", ");
                let what = format!("{READY_MAX:?} after {when} {missing}");
                return Err(other("liveness", &what));
            }
            self.simulation().sleep(Duration::from_millis(100)).await;
        }
    }

    /// Clients, the nemesis and the spy at the same time, until clients and nemesis are done.
    async fn load(&self) {
        let clients = (0..self.config.load.clients).map(|number| self.client(number).run());
        let work = futures_util::future::join(join_all(clients), self.break_things());
        let spy = std::pin::pin!(self.spy());
        futures_util::future::select(std::pin::pin!(work), spy).await;
    }

    fn client(&self, number: u16) -> Client {
        Client::new(number, &self.config, &self.cluster, &self.recorder)
    }

    async fn break_things(&self) {
        let mut nemesis = Nemesis::new(self.simulation(), &self.config);
        // Begins and ends in one order of time.
        let mut steps: Vec<(Duration, bool, usize)> = Vec::new();
        for (index, planned) in self.planned.iter().enumerate() {
            steps.push((planned.at, true, index));
            steps.push((planned.at + planned.lasts, false, index));
        }
        steps.sort();
        let began = self.simulation().now();
        for (at, begins, index) in steps {
            let now = self.simulation().now().since(began);
            self.simulation().sleep(at.saturating_sub(now)).await;
            let fault = &self.planned[index].fault;
            if begins {
                nemesis.begin(fault);
                match fault {
                    Fault::Compact { host } => self.cluster.compact(*host),
                    Fault::Join { host } => self.cluster.start_first(*host),
                    Fault::Reshard { host, comeback } => self.cluster.stop(*host, comeback),
                    Fault::Rekey { host, plain } => {
                        self.cluster.rekey(*host, *plain);
                        self.cluster.compact(*host);
                    }
                    _ => {}
                }
            } else {
                nemesis.end(fault);
                match fault {
                    Fault::Rekey { host, .. } => self.cluster.retire_keys(*host),
                    Fault::Reshard { host, comeback } => self.cluster.come_back(*host, comeback),
                    _ => {}
                }
                self.start_dead();
            }
        }
        nemesis.heal(self.absent());
    }

    fn absent(&self) -> Option<HostId> {
        self.config.idle.and_then(|idle| idle.absent)
    }

    fn start_dead(&self) {
        for host in self.cluster.hosts() {
            if !self.simulation().is_up(*host) {
                self.cluster.start(*host);
            }
        }
    }

    /// Looks into the stores now and then for dots: a dot that stands for two writes may be gone in
    /// the end.
    async fn spy(&self) {
        loop {
            self.simulation().sleep(Duration::from_millis(700)).await;
            for key in self.keys() {
                for seen in self.cluster.dots(key).await {
                    self.recorder.dot(seen);
                }
            }
        }
    }

    /// Most keys are deleted, and hours pass without clients and faults, except that one host may be cut
    /// off. Repairs run, purge floors rise, and what may be purged is.
    async fn idle(&self) {
        Nemesis::new(self.simulation(), &self.config).heal(self.absent());
        self.start_dead();
        self.client(self.config.load.clients).clean_up().await;
        self.simulation().sleep(STRAGGLERS).await;
        let first = match self.absent() {
            Some(_) => HINTS_AGE,
            None => OVER_THE_HOUR,
        };
        for passed in [first, DUE_AGAIN] {
            self.simulation().pass_civil_time(passed);
            self.simulation().sleep(IDLE_WORK).await;
        }
        self.simulation().sleep(FLOORS_RISE).await;
        for host in self.cluster.hosts() {
            self.cluster.compact(*host);
        }
        self.simulation().sleep(IDLE_WORK).await;
    }

    async fn heal(&self) -> Result<(), Violation> {
        Nemesis::new(self.simulation(), &self.config).heal(None);
        self.start_dead();
        // What is still under way arrives, or is given up.
        self.simulation().sleep(STRAGGLERS).await;
        self.wait_until_ready("healing", self.cluster.hosts()).await
    }

    async fn converge(&self, end: &mut End) -> Result<(), Violation> {
        let limit = self.simulation().now() + CONVERGENCE_MAX;
        let mut waiting: Vec<KeyId> = self.keys().collect();
        if !self.config.repair.automatic {
            waiting.clear();
        }
        while self.simulation().now() < limit {
            let mut different = Vec::new();
            for key in waiting {
                if !self.has_converged(key).await {
                    different.push(key);
                }
            }
            waiting = different;
            if waiting.is_empty() && self.cluster.hints() == 0 {
                break;
            }
            self.simulation().sleep(Duration::from_secs(1)).await;
        }
        let hints = self.cluster.hints();
        if hints > 0 {
            let what = format!("{hints} hints are not delivered {CONVERGENCE_MAX:?} after healing");
            return Err(other("liveness", &what));
        }
        self.recorder.looked_at_last(civil_ns(self.simulation()));
        let mut held = Vec::new();
        for key in self.keys() {
            for seen in self.cluster.dots(key).await {
                self.recorder.dot(seen);
            }
            let Some(replicas) = self.cluster.holdings(key).await else {
                let what = format!("the replicas of {key} cannot be read after healing");
                return Err(other("liveness", &what));
            };
            held.push((key, replicas));
        }
        let listed = self.list().await;
        for (key, replicas) in held {
            // Only now: it repairs.
            let read = self.last_read(key).await;
            end.finals.push(Final {
                key,
                replicas,
                read,
                listed: listed.as_ref().map(|keys| {
                    let found = keys.get(&key).cloned();
                    found.unwrap_or_default()
                }),
            });
        }
        Ok(())
    }

    async fn has_converged(&self, key: KeyId) -> bool {
        let holdings = self.cluster.holdings(key).await;
        holdings.is_some_and(|holdings| {
            let digests = holdings.windows(2);
            digests
                .into_iter()
                .all(|pair| pair[0].digest == pair[1].digest)
        })
    }

    /// A read of every replica, tried a few times.
    async fn last_read(&self, key: KeyId) -> Option<Vec<Value>> {
        let rng = &mut Rng::stream(self.config.seed, "last read");
        for _ in 0..10 {
            let (env, node) = self.cluster.any_node(rng)?;
            let request = GetRequest {
                keyspace: self.cluster.keyspace(),
                key: value::key(key),
                r: Level::All,
                at_least: None,
                deadline: env.now() + Duration::from_secs(5),
            };
            let answer = env.execute(NODE_CLASS, async move { node.get(request).await });
            if let Some(Ok(answer)) = answer.await {
                let values = answer.siblings.iter();
                let mut values: Vec<Value> = values
                    .map(|sibling| value::parse(key, &sibling.value))
                    .collect();
                values.sort();
                return Some(values);
            }
            self.simulation().sleep(Duration::from_millis(500)).await;
        }
        None
    }

    /// Every key with its values, by a scan in small pages over every replica, tried a few times.
    async fn list(&self) -> Option<BTreeMap<KeyId, Vec<Value>>> {
        let rng = &mut Rng::stream(self.config.seed, "last scan");
        for _ in 0..10 {
            if let Some(listed) = self.try_list(rng).await {
                return Some(listed);
            }
            self.simulation().sleep(Duration::from_millis(500)).await;
        }
        None
    }

    async fn try_list(&self, rng: &mut Rng) -> Option<BTreeMap<KeyId, Vec<Value>>> {
        let mut listed: BTreeMap<KeyId, Vec<Value>> = BTreeMap::new();
        let mut cursor = None;
        loop {
            let (env, node) = self.cluster.any_node(rng)?;
            let request = ScanRequest {
                keyspace: self.cluster.keyspace(),
                cursor,
                limit: u32::try_from(rng.within(1..=3)).unwrap_or(1),
                prefix: Bytes::new(),
                values: true,
                r: Level::All,
                deadline: env.now() + Duration::from_secs(20),
            };
            let page = env.execute(NODE_CLASS, async move { node.scan(request).await });
            let page = page.await?.ok()?;
            for entry in page.entries {
                let name = String::from_utf8_lossy(&entry.key).into_owned();
                let key = name
                    .strip_prefix('k')
                    .and_then(|number| number.parse().ok());
                let key = KeyId(key.unwrap_or(u16::MAX));
                let values = entry.siblings.iter();
                let values = values.map(|sibling| value::parse(key, &sibling.value));
                // A key that is listed twice shows its values twice.
                listed.entry(key).or_default().extend(values);
            }
            cursor = page.cursor;
            if cursor.is_none() {
                return Some(listed);
            }
        }
    }

    fn keys(&self) -> impl Iterator<Item = KeyId> + use<> {
        (0..self.config.load.keys).map(KeyId)
    }
}
