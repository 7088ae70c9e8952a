//! `torc load selftest`: what this client can measure here, found against a server that does nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use torc_tuning::probe;

use super::environment;
use super::null_server::NullServer;
use super::options::{Model, Options, Warmup};
use super::outcome::Outcome;
use super::place::Place;
use super::protocol::ProtocolName;
use super::run::{Bench, Run};
use crate::failure::Failure;

/// What was found.
pub struct Selftest {
    /// Closed loop, as fast as it goes.
    pub closed: Outcome,
    /// Open loop at half of that rate.
    pub half: Outcome,
    /// The lag that a client without a fault of its own has at that rate, p99.9, in microseconds.
    pub faultless_us: f64,
    /// What an operation takes of a thread at that rate, in microseconds.
    pub each_us: f64,
    /// One reading of the clock, in nanoseconds.
    pub clock_ns: f64,
    /// How much longer than asked a sleep of 100 us took, median, in microseconds.
    pub sleep_late_us: f64,
}

/// Runs it with the connections, threads and pipeline of `options`.
pub fn run(options: &Options) -> Result<Selftest, Failure> {
    environment::allow_connections(options.connections, 2, options.threads)?;
    let server = NullServer::bind("127.0.0.1:0".parse().expect("a valid address"))?;
    let address = server.address()?;
    let stop = AtomicBool::new(false);
    let measured = std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            keep_to_one_cpu(&options.place());
            server.serve(&stop)
        });
        let options = Options {
            address: vec![address],
            protocol: ProtocolName::Resp,
            model: Model::Closed,
            rate: None,
            no_fill: true,
            // Reads find nothing, and nothing was really written.
            may_evict: true,
            warmup: Warmup::For(Duration::from_millis(500)),
            ..options.clone()
        };
        let measured = measure(&options);
        stop.store(true, Ordering::Relaxed);
        let served = serving
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("panicked")));
        served.map_err(Failure::from).and(measured)
    });
    let (closed, half) = measured?;
    let (busy, wall) = half
        .recorder
        .health
        .threads
        .values()
        .fold((0, 0), |sum, one| {
            (sum.0 + one.busy_ns, sum.1 + one.wall_ns)
        });
    let threads = half.recorder.health.threads.len().max(1);
    let rate = half.outcome.rate_per_s / threads as f64;
    let each_ns = busy as f64 / wall.max(1) as f64 * 1e9 / rate.max(1.0);
    let pauses = &half.recorder.health.pauses;
    Ok(Selftest {
        closed,
        faultless_us: pauses.queue_at(0.999, rate.max(1.0), each_ns) as f64 / 1e3,
        each_us: each_ns / 1e3,
        half: half.outcome,
        clock_ns: clock_ns(),
        sleep_late_us: sleep_late_us(),
    })
}

/// Keeps the server to the last CPU that the client's threads leave. Else the kernel moves it,
/// whenever it wakes, to the CPU of the worker that woke it, and they take turns there.
fn keep_to_one_cpu(client: &Place) {
    if let Some(last) = client.others().iter().next_back() {
        // Where it is refused the figures are lower, and as true.
        probe::pin(last).ok();
    }
}

fn measure(options: &Options) -> Result<(Outcome, Run), Failure> {
    let mut bench = Bench::new(options, (0, 1))?;
    bench.warm_up()?;
    let closed = bench.run()?.outcome;
    bench.set_rate((closed.rate_per_s / 2.0).max(1.0));
    bench.warm_up()?;
    let half = bench.run()?;
    Ok((closed, half))
}

fn clock_ns() -> f64 {
    const READINGS: u32 = 100_000;
    let begun = Instant::now();
    let mut last = begun;
    for _ in 0..READINGS {
        last = std::hint::black_box(Instant::now());
    }
    last.duration_since(begun).as_nanos() as f64 / f64::from(READINGS)
}

fn sleep_late_us() -> f64 {
    let asked = Duration::from_micros(100);
    let mut late: Vec<f64> = (0..200)
        .map(|_| {
            let begun = Instant::now();
            std::thread::sleep(asked);
            begun.elapsed().saturating_sub(asked).as_nanos() as f64 / 1e3
        })
        .collect();
    late.sort_by(f64::total_cmp);
    late[late.len() / 2]
}

/// The findings for people.
pub fn text(found: &Selftest) -> String {
    let lag = |name: &str| {
        let lag = &found.half.client.scheduling_lag_us;
        lag.get(name).copied().unwrap_or(0.0)
    };
    let latency = |outcome: &Outcome, name: &str| {
        let found = outcome.operations.keys();
        found
            .filter_map(|operation| outcome.latency_us(operation, name))
            .fold(0.0, f64::max)
    };
    let pauses = &found.half.client.pauses_us;
    let alone = match (pauses.get("p99"), pauses.get("p99.9"), pauses.get("max")) {
        (Some(p99), Some(p999), Some(max)) => {
            format!("alone adds p99 {p99:.1} us, p99.9 {p999:.1} us, max {max:.1} us of it")
        }
        _ => "what it adds alone is unknown, since no thread polled".into(),
    };
    let busy = |outcome: &Outcome| 100.0 * outcome.client.busiest();
    format!(
        "clock      {:.0} ns a reading; a sleep of 100 us is {:.0} us late (median)\n\
         ceiling    {:.0}/s closed loop, busiest thread {:.0} %, service time p50 {:.1} us\n\
         half       {:.0}/s open loop, busiest thread {:.0} %, latency p50 {:.1} us, p99 {:.1} us\n\
         lag        p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, max {:.1} us at that rate\n\
         expected   p99.9 {:.1} us of a client without a fault of its own: operations that come at random and take \
         {:.1} us each wait behind each other and behind the machine's pauses\n\
         machine    {alone}; the client was without a CPU for {}\n\
         so         rates up to {:.0}/s can be measured with these connections and threads, and \
         latencies above {:.0} us told to a tenth\n",
        found.clock_ns,
        found.sleep_late_us,
        found.closed.rate_per_s,
        busy(&found.closed),
        latency(&found.closed, "p50"),
        found.half.rate_per_s,
        busy(&found.half),
        latency(&found.half, "p50"),
        latency(&found.half, "p99"),
        lag("p50"),
        lag("p99"),
        lag("p99.9"),
        lag("max"),
        found.faultless_us,
        found.each_us,
        found.half.client.without_a_cpu(),
        found.half.rate_per_s,
        10.0 * lag("p99.9"),
    )
}
