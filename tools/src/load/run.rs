//! `torc load run`, `fill` and `verify`: the phases of one measurement, and what every other mode
//! builds on.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use torc_measure::keys::Keys;
use torc_measure::mix::Operation;

use super::agents::{Agents, Order, Work};
use super::environment;
use super::interrupt;
use super::ledger::Ledger;
use super::options::{Model, Options, Warmup};
use super::outcome::{self, Interval, Outcome, Setup, Verification};
use super::output::{self, Hlog};
use super::phase::{self, Begin, Flow, Measured, Observe, Pace, Phase};
use super::protocol::{Levels, Protocol, ProtocolName};
use super::recorder::Recorder;
use super::settle::{self, Watched};
use super::source::Source;
use super::targets::Targets;
use super::trace::Trace;
use super::view::View;
use super::worker::{Judging, Shared};
use crate::endpoint::Endpoint;
use crate::failure::Failure;

/// How long a server may take to accept, when it is looked for.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// Intervals without any success after which a fill or a check is given up: it will have none.
const FRUITLESS_INTERVALS_MAX: u64 = 10;
/// Length of an interval.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Intervals that must stand still for a warm-up to be over.
const STEADY_INTERVALS: usize = 4;
/// How far rate and median may lie apart in them.
const STEADY_SPREAD: f64 = 0.1;

/// A prepared measurement of one system: its servers, and what is known of its keys.
pub struct Bench {
    options: Options,
    shared: Shared,
    seed: u64,
    /// What the servers said about themselves.
    servers: Option<Value>,
    part: Part,
    /// Measurements so far.
    runs: u64,
    /// Machines that make the load in place of this one.
    agents: Option<Agents>,
}

/// A result with its histograms.
pub struct Run {
    /// The figures.
    pub outcome: Outcome,
    /// What they were made from.
    pub recorder: Recorder,
    /// The interval log.
    pub hlog: Hlog,
    /// Why keys were left out that had to be done.
    pub gave_up: Option<String>,
}

impl Run {
    /// Reads every key, if that was asked for, and adds what was found.
    pub fn check_all(&mut self, bench: &mut Bench) -> Result<(), Failure> {
        if bench.options.check_all && !self.outcome.interrupted {
            let check = bench.verify(false)?;
            self.recorder.verdicts.merge(&check.recorder.verdicts);
            self.outcome.verification = Verification::of(&self.recorder.verdicts);
            self.gave_up = check.gave_up;
        }
        Ok(())
    }

    /// Fails when keys were left out that had to be done.
    pub fn complete(self) -> Result<Self, Failure> {
        match self.gave_up {
            Some(words) => Err(Failure::new(words)),
            None => Ok(self),
        }
    }
}

/// Part of the keys that is written here, for several machines: `(part, parts)`.
pub type Part = (u64, u64);

impl Bench {
    /// Finds the servers and prepares everything; sends no load yet.
    pub fn new(options: &Options, part: Part) -> Result<Self, Failure> {
        options.check()?;
        output::ready(options.json.as_deref(), options.out.as_deref())?;
        if options.agents.is_empty() {
            environment::allow_connections(options.connections, 1, options.threads)?;
        }
        let mut servers = None;
        let addresses = if options.address.is_empty() {
            let status = Endpoint::new(&options.endpoint)?.get_json("/admin/status")?;
            let addresses = learn(options, &status)?;
            servers = Some(status);
            addresses
        } else {
            options.address.clone()
        };
        if options.agents.is_empty() {
            environment::local_ports_suffice(options.connections, &addresses)?;
            somebody_listens(&addresses)?;
            keyspace_is_there(options, &addresses)?;
        }
        let levels = Levels {
            keyspace: options.keyspace.clone(),
            r: options.r.clone(),
            w: options.w.clone(),
            timeout_ms: options.timeout_ms,
            login: options.login()?,
        };
        let protocol = Protocol::named(options.protocol, levels)
            .map_err(|error| Failure::usage(format!("--r, --w: {}", error.0)))?;
        options.check_mix(&protocol)?;
        let seed = options.seed.unwrap_or_else(new_seed);
        let targets = targets_of(options, servers.as_ref(), &addresses);
        let workload = options.workload();
        let shared = Shared {
            protocol,
            addresses,
            targets,
            ledger: Ledger::new(options.keys, part.0, part.1),
            source: Source::Trace,
            value_sizes: options.value_bytes.clone(),
            scan_sizes: workload.scan_keys,
            batch_keys: usize::try_from(options.batch_keys).expect("a small number"),
            ttl_seconds: options.ttl,
            timeout_ns: u64::from(options.timeout_ms) * 1_000_000,
            judging: Judging {
                must_exist: false,
                strict: options.strict(),
                may_evict: options.may_evict,
                share: options.verify_share,
            },
            civil_us: civil_us(),
            stop: AtomicBool::new(false),
        };
        Ok(Self {
            options: options.clone(),
            shared,
            seed,
            servers,
            part,
            runs: 0,
            agents: match &options.agents[..] {
                [] => None,
                addresses => {
                    // The endpoint may come from this machine's environment.
                    let endpoint = ["--endpoint".to_owned(), options.endpoint.clone()];
                    Some(Agents::connect(
                        addresses,
                        &[&options.words[..], &endpoint].concat(),
                    )?)
                }
            },
        })
    }

    /// The options that it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// An open loop at this rate from here on.
    pub fn set_rate(&mut self, rate: f64) {
        self.options.model = Model::Open;
        self.options.rate = Some(rate);
    }

    /// Addresses of the servers.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.shared.addresses
    }

    /// Writes every key once; [`Run::gave_up`] when it did not succeed.
    pub fn fill(&mut self) -> Result<Run, Failure> {
        self.each(Operation::Write)
    }

    /// Reads every key once, likewise; with `must_exist`, a missing one is a loss.
    pub fn verify(&mut self, must_exist: bool) -> Result<Run, Failure> {
        self.shared.judging.must_exist = must_exist;
        let run = self.each(Operation::Read);
        self.shared.judging.must_exist = false;
        run
    }

    fn each(&mut self, operation: Operation) -> Result<Run, Failure> {
        let keys = self.options.keys;
        self.set_each(operation);
        let phase = self.phase(Pace::Closed, self.options.give_up);
        let mut run = self.measure(&phase, operation.name())?;
        let done = run.recorder.series(operation).done();
        if done < keys {
            let left = format!(
                "after {:.0} s with {done} of {keys} keys done",
                run.outcome.seconds
            );
            let error = run.recorder.errors.first();
            run.gave_up = Some(match (run.outcome.interrupted, error) {
                (true, _) => format!("interrupted {left}"),
                (false, Some(error)) => format!("gave up {left}: {error}"),
                (false, None) => format!("gave up {left}: no error was reported"),
            });
        }
        Ok(run)
    }

    /// Every key, or those of this machine's part.
    fn set_each(&mut self, operation: Operation) {
        let (first, step) = self.part;
        self.shared.source = Source::each(operation, first, self.shared.ledger.settled(), step);
    }

    /// Waits until the servers have written out what they took; tells how it went.
    pub fn settle(&self) -> String {
        let http = self
            .servers
            .as_ref()
            .map(|status| addresses_of(status, "http"));
        let local = self
            .shared
            .addresses
            .iter()
            .all(|address| address.ip().is_loopback());
        settle::settle(&match http {
            Some(addresses) => Watched::Torc(addresses),
            None if local => Watched::Disks,
            None => Watched::Nothing,
        })
    }

    /// As an agent: runs what a coordinator orders once it says so; returns its length in seconds.
    pub fn obey(
        &mut self,
        order: &Order,
        begin: Begin<'_>,
        observe: Observe<'_>,
    ) -> Result<f64, Failure> {
        let parts = self.part.1;
        match order.work {
            Work::Fill => self.set_each(Operation::Write),
            Work::Verify { must_exist } => {
                self.shared.judging.must_exist = must_exist;
                self.set_each(Operation::Read);
            }
            Work::Mix => {
                self.shared.judging.must_exist = false;
                self.mix();
            }
        }
        if let Some(rate) = order.rate {
            self.options.rate = Some(rate / parts as f64);
        }
        let pace = match (order.work, order.rate) {
            (Work::Mix, Some(_)) => self.pace(),
            _ => Pace::Closed,
        };
        let mut phase = self.phase(pace, Duration::from_millis(order.length_ms));
        // Agents must not draw the same.
        phase.seed = order.seed.wrapping_add(self.part.0 << 16);
        self.stamp();
        Ok(self.run_here(&phase, begin, observe)?.seconds)
    }

    /// Warms up as the options say.
    pub fn warm_up(&mut self) -> Result<(), Failure> {
        let (length, auto) = match self.options.warmup {
            Warmup::For(length) => (length, false),
            Warmup::Auto => (self.options.duration, true),
        };
        if length.is_zero() {
            return Ok(());
        }
        self.mix();
        let mut phase = self.phase(self.pace(), length);
        phase.seed ^= 1 << 32;
        let mut intervals: Vec<(f64, f64)> = Vec::new();
        self.stamp();
        let mut observe = |_: u64, recorder: &Recorder| {
            let mut all = super::recorder::histogram(3);
            for operation in Operation::ALL {
                super::recorder::add(&mut all, &recorder.series(operation).total().intended);
            }
            intervals.push((recorder.done() as f64, all.value_at_quantile(0.5) as f64));
            if auto && steady(&intervals) {
                Flow::Stop
            } else {
                Flow::Continue
            }
        };
        self.run_phase(&phase, &mut observe)?;
        interrupt::check()
    }

    /// Measures the mix, as long and as fast as the options say.
    pub fn run(&mut self) -> Result<Run, Failure> {
        self.mix();
        let mut phase = self.phase(self.pace(), self.options.duration);
        // Repeats must not all have the same arrivals.
        self.runs += 1;
        phase.seed ^= (self.runs + 1) << 32;
        self.measure(&phase, "run")
    }

    /// Replays a trace to its end. What then still waits for a connection is made late, unless it
    /// finds none within the deadline of a request.
    pub fn replay(&mut self, trace: Arc<Trace>) -> Result<Run, Failure> {
        self.shared.source = Source::Trace;
        let length = trace.length() + Duration::from_nanos(self.shared.timeout_ns);
        let phase = self.phase(Pace::Trace(trace), length);
        self.measure(&phase, "replay")
    }

    fn mix(&mut self) {
        let workload = self.options.workload();
        self.shared.source = Source::Mix {
            keys: Keys::new(workload.distribution, self.options.keys, self.options.churn),
            mix: workload.mix,
        };
    }

    fn pace(&self) -> Pace {
        let options = &self.options;
        let rate = options.offered().unwrap_or(0.0);
        match options.model {
            Model::Closed => Pace::Closed,
            Model::Open => Pace::Open(rate, options.arrivals),
            Model::Sessions => Pace::Sessions(
                rate,
                options.arrivals,
                options.session_operations,
                options.think,
            ),
        }
    }

    fn phase(&self, pace: Pace, length: Duration) -> Phase {
        let count = |number: u32| usize::try_from(number).expect("a small number");
        Phase {
            threads: count(self.options.threads),
            connections: count(self.options.connections),
            pipeline: count(self.options.pipeline),
            pace,
            seed: self.seed,
            length,
            interval: INTERVAL,
            spin: !self.options.no_spin,
            place: self.options.place(),
            operations: match &self.shared.source {
                Source::Mix { mix, .. } => mix.operations().collect(),
                Source::Each { operation, .. } => vec![*operation],
                Source::Trace => vec![Operation::Read, Operation::Write],
            },
        }
    }

    fn stamp(&mut self) {
        self.shared.civil_us = civil_us();
    }

    fn run_phase(&mut self, phase: &Phase, observe: Observe<'_>) -> Result<Measured, Failure> {
        let Some(agents) = &mut self.agents else {
            return self.run_here(phase, &|| Some(Instant::now()), observe);
        };
        let must_exist = self.shared.judging.must_exist;
        let order = Order {
            work: match &self.shared.source {
                Source::Each { operation, .. } if operation.writes() => Work::Fill,
                Source::Each { .. } => Work::Verify { must_exist },
                Source::Mix { .. } => Work::Mix,
                Source::Trace => {
                    return Err(Failure::new(
                        "a trace is replayed from one machine, not by agents",
                    ));
                }
            },
            rate: match &phase.pace {
                Pace::Open(rate, _) | Pace::Sessions(rate, ..) => Some(*rate),
                Pace::Closed | Pace::Trace(_) => None,
            },
            length_ms: u64::try_from(phase.length.as_millis()).unwrap_or(u64::MAX),
            seed: phase.seed,
        };
        agents.run(&order, observe)
    }

    fn run_here(
        &self,
        phase: &Phase,
        begin: Begin<'_>,
        observe: Observe<'_>,
    ) -> Result<Measured, Failure> {
        phase::run(phase, &self.shared, begin, observe)
            .map_err(|error| Failure::new(format!("the load could not be made: {error}")))
    }

    fn measure(&mut self, phase: &Phase, what: &str) -> Result<Run, Failure> {
        self.stamp();
        let began_ms = self.shared.civil_us / 1000;
        let open = !matches!(phase.pace, Pace::Closed);
        let setup = Setup {
            began_ms,
            offered_per_s: match &phase.pace {
                Pace::Closed => None,
                Pace::Open(rate, _) | Pace::Sessions(rate, ..) => Some(*rate),
                Pace::Trace(trace) => Some(trace.requests as f64 / trace.length().as_secs_f64()),
            },
            ..self.setup(what, open)
        };
        let mut intervals: Vec<Interval> = Vec::new();
        let mut hlog = Hlog::new(began_ms);
        let mut view = View::new(self.options.live, &setup, phase.length);
        let insists = self.shared.source.insists();
        let mut done = 0;
        let mut observe = |at: u64, recorder: &Recorder| {
            let at_s = at as f64 * phase.interval.as_secs_f64();
            let interval = outcome::interval(at_s, phase.interval.as_secs_f64(), recorder);
            view.show(&interval, recorder);
            intervals.push(interval);
            hlog.add(at_s, phase.interval.as_secs_f64(), recorder);
            done += recorder.done();
            if insists && done == 0 && at + 1 >= FRUITLESS_INTERVALS_MAX {
                Flow::Stop
            } else {
                Flow::Continue
            }
        };
        let measured = self.run_phase(phase, &mut observe)?;
        let environment = environment::record(&self.shared.addresses, self.servers.as_ref());
        let (seconds, recorder) = (measured.seconds, measured.total);
        hlog.end(seconds);
        for interval in &mut intervals {
            interval.end(seconds);
        }
        let mut outcome = Outcome::new(setup, seconds, &recorder, intervals, environment);
        outcome.interrupted = interrupt::came();
        Ok(Run {
            outcome,
            recorder,
            hlog,
            gave_up: None,
        })
    }

    fn setup(&self, what: &str, open: bool) -> Setup {
        let options = &self.options;
        let addresses: Vec<String> = self
            .shared
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect();
        let target = format!("{} to {}", options.protocol.name(), addresses.join(", "));
        let mut connections = format!("{} connections x {}", options.connections, options.pipeline);
        if let Some(cpus) = &options.cpus {
            connections = format!("CPUs {cpus}, {connections}");
        }
        if options.realtime {
            connections = format!("real time, {connections}");
        }
        if let Some(agents) = &self.agents {
            connections = format!(
                "{} (beginning within {:.0} us) of {connections}",
                match options.agents.len() {
                    1 => "1 agent".into(),
                    many => format!("{many} agents"),
                },
                agents.skew_us
            );
        }
        let workload = options.workload();
        let mix = match &self.shared.source {
            Source::Mix { mix, .. } => format!(
                "{mix} of {} keys, {}{}",
                options.keys,
                workload.distribution,
                if options.churn > 0.0 {
                    format!(", churn {} a minute", options.churn)
                } else {
                    String::new()
                }
            ),
            Source::Each { operation, .. } => {
                format!(
                    "{what}: {} of each of {} keys",
                    operation.name(),
                    options.keys
                )
            }
            Source::Trace => what.to_owned(),
        };
        let sizes = match &self.shared.source {
            Source::Trace => "values of the trace's sizes".into(),
            _ => format!("{} bytes", options.value_bytes),
        };
        Setup {
            name: options.name.clone().unwrap_or_else(|| target.clone()),
            target,
            model: match (open, &self.shared.source, options.model) {
                (false, ..) => format!("closed loop (service time), {connections} outstanding"),
                (true, Source::Trace, _) => {
                    format!("open loop as traced, {connections} outstanding")
                }
                (true, _, Model::Sessions) => format!(
                    "sessions of {} operations, {}/s in all, {}, {connections} outstanding",
                    options.session_operations,
                    per_second(options.offered().unwrap_or(0.0)),
                    arrivals(options)
                ),
                _ => format!(
                    "open loop at {}/s, {}, {connections} outstanding",
                    per_second(options.offered().unwrap_or(0.0)),
                    arrivals(options)
                ),
            },
            workload: format!(
                "{mix}, {sizes}, r {}, w {}",
                options.r.as_deref().unwrap_or("quorum"),
                options.w.as_deref().unwrap_or("quorum")
            ),
            seed: self.seed,
            targets: self.shared.targets.names.clone(),
            ..Setup::default()
        }
    }
}

/// A rate for people.
fn per_second(rate: f64) -> String {
    let digits = if rate < 100.0 { 2 } else { 0 };
    format!("{rate:.digits$}")
}

fn arrivals(options: &Options) -> String {
    use super::schedule::Gaps;
    match options.arrivals {
        Gaps::Poisson => "Poisson".into(),
        Gaps::Uniform => "uniform".into(),
        Gaps::Burst(count) => format!("bursts of {count}"),
    }
}

/// A seed that nobody chose, short enough to be typed.
pub fn new_seed() -> u64 {
    civil_us() % 1_000_000_007
}

/// Civil time in microseconds.
pub fn civil_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}

/// Whether the last intervals differ little in rate and median.
fn steady(intervals: &[(f64, f64)]) -> bool {
    let Some(last) = intervals
        .len()
        .checked_sub(STEADY_INTERVALS)
        .map(|from| &intervals[from..])
    else {
        return false;
    };
    let spread = |figure: fn(&(f64, f64)) -> f64| {
        let low = last.iter().map(figure).fold(f64::INFINITY, f64::min);
        let high = last.iter().map(figure).fold(0.0, f64::max);
        high - low <= STEADY_SPREAD * high
    };
    spread(|one| one.0) && spread(|one| one.1)
}

/// The listeners of every node that is up, from one node's status.
fn learn(options: &Options, status: &Value) -> Result<Vec<SocketAddr>, Failure> {
    let field = match options.protocol {
        ProtocolName::Http => "http",
        ProtocolName::Resp => "resp",
        ProtocolName::Binary => "client",
        ProtocolName::Memcached | ProtocolName::Etcd => {
            return Err(Failure::new(format!(
                "Torc does not speak {}; give --address HOST:PORT",
                options.protocol.name()
            )));
        }
    };
    let addresses = addresses_of(status, field);
    if addresses.is_empty() {
        return Err(Failure::new(format!(
            "{}: its status names no {field} address; give --address HOST:PORT",
            options.endpoint
        )));
    }
    Ok(addresses)
}

fn addresses_of(status: &Value, field: &str) -> Vec<SocketAddr> {
    let nodes = status.get("nodes").and_then(Value::as_array);
    nodes
        .into_iter()
        .flatten()
        .filter_map(|node| node.get(field)?.as_str()?.parse().ok())
        .collect()
}

/// Fails when no address can be connected to; one that cannot is told.
fn somebody_listens(addresses: &[SocketAddr]) -> Result<(), Failure> {
    let tried: Vec<_> = addresses
        .iter()
        .map(|address| {
            TcpStream::connect_timeout(address, CONNECT_WITHIN).map_err(|error| (address, error))
        })
        .collect();
    let found = tried.iter().any(Result::is_ok);
    let mut refused = tried.into_iter().filter_map(Result::err);
    match refused.next() {
        Some((address, error)) if !found => Err(Failure::new(format!(
            "{address}: {error}; is a server running there?"
        ))),
        first => {
            for (address, error) in first.into_iter().chain(refused) {
                output::note(&format!(
                    "{address}: {error}; it gets no load until it listens"
                ));
            }
            Ok(())
        }
    }
}

/// Fails when the keyspace is not among those that a node lists over HTTP. Without this each operation would be refused,
/// and that only tells once the time for the fill is over. A node that lists none lets everything pass.
fn keyspace_is_there(options: &Options, addresses: &[SocketAddr]) -> Result<(), Failure> {
    let Some(name) = options.keyspace.as_deref() else {
        return Ok(());
    };
    let url = match (addresses.first(), options.protocol) {
        _ if options.address.is_empty() => options.endpoint.clone(),
        (Some(address), ProtocolName::Http) => format!("http://{address}"),
        _ => return Ok(()),
    };
    let listed = Endpoint::new(&url)?.get_json("/admin/keyspaces").ok();
    let keyspaces = listed
        .as_ref()
        .and_then(|listed| listed["keyspaces"].as_array());
    let Some(keyspaces) = keyspaces else {
        return Ok(());
    };
    let mut names = keyspaces
        .iter()
        .filter_map(|keyspace| keyspace["name"].as_str());
    match names.any(|there| there == name) {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "--keyspace {name}: {url} has no such keyspace; `torc keyspace list` names those that it has"
        ))),
    }
}

/// The shards of a Torc cluster, or the servers of anything else.
fn targets_of(options: &Options, servers: Option<&Value>, addresses: &[SocketAddr]) -> Targets {
    let client = servers.and_then(|status| addresses_of(status, "client").first().copied());
    let keyspace = options.keyspace.as_deref().unwrap_or("default");
    client
        .and_then(|client| Targets::shards(client, keyspace))
        .unwrap_or_else(|| Targets::servers(addresses))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_up_is_over_when_rate_and_median_stand_still() {
        let ramp: Vec<(f64, f64)> = (1..10).map(|at| (f64::from(at) * 100.0, 50.0)).collect();
        assert!(!steady(&ramp));
        let mut rest = ramp.clone();
        rest.extend([(900.0, 50.0), (910.0, 51.0), (905.0, 50.0), (890.0, 52.0)]);
        assert!(steady(&rest));
        assert!(!steady(&rest[rest.len() - 3..]), "too few to tell");
        let slow = [(900.0, 50.0), (900.0, 60.0), (900.0, 70.0), (900.0, 80.0)];
        assert!(!steady(&slow), "the median still moves");
    }
}
