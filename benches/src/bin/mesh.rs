//! What a message between two cores costs: calls over Torc's mesh, beside bare queues.
//!
//! A bare queue shows what the hardware allows to two threads that do nothing but spin; a call
//! over the mesh includes the task that handles it, its answer, its deadline and its credit.
//! `cargo run --release -p torc-benches --bin mesh [rounds]`

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use futures_util::stream::{FuturesUnordered, StreamExt};
use hdrhistogram::Histogram;
use torc_env::{Address, Bytes, Class, Env, ShardId};
use torc_runtime::{Background, Runtime, RuntimeConfig, ShardHandle};

/// Requests in flight in the throughput test of the mesh.
const OUTSTANDING: usize = 256;

fn main() {
    let rounds: u64 = std::env::args()
        .nth(1)
        .map_or(200_000, |text| text.parse().expect("a number of rounds"));
    println!(
        "{:<34} {:>9} {:>9} {:>12}",
        "between two threads", "p50 us", "p99 us", "M messages/s"
    );
    // The runtime first: this thread is pinned by what follows.
    mesh(
        "torc mesh call, spinning",
        Duration::from_micros(200),
        rounds,
    );
    mesh("torc mesh call, sleeping", Duration::ZERO, rounds / 10);
    bare_rtrb(rounds);
    bare_array_queue(rounds);
    std_mpsc(rounds);
}

fn row(name: &str, latency_ns: &Histogram<u64>, messages: u64, took: Duration) {
    let micros =
        |quantile| Duration::from_nanos(latency_ns.value_at_quantile(quantile)).as_secs_f64() * 1e6;
    println!(
        "{name:<34} {:>9.2} {:>9.2} {:>12.2}",
        micros(0.5),
        micros(0.99),
        messages as f64 / took.as_secs_f64() / 1e6
    );
}

/// Runs `work` on a thread of its own, on the second core.
fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::spawn(move || {
        pin(1);
        work()
    })
}

/// Pins the calling thread to one of the cores that the process started with (a thread inherits
/// the pin of its parent, so they are looked up once).
fn pin(core: usize) {
    static CORES: OnceLock<Vec<core_affinity::CoreId>> = OnceLock::new();
    let cores = CORES.get_or_init(|| core_affinity::get_core_ids().expect("cores"));
    core_affinity::set_for_current(cores[core % cores.len()]);
}

/// Round trips one after the other, then a stream one way.
fn compare(
    name: &str,
    rounds: u64,
    mut round_trip: impl FnMut(u64) -> u64,
    stream: impl FnOnce(u64) -> Duration,
) {
    let mut latency = Histogram::<u64>::new(3).expect("a histogram");
    for round in 0..rounds {
        let begin = Instant::now();
        assert_eq!(round_trip(round), round);
        let took = u64::try_from(begin.elapsed().as_nanos()).expect("a short time");
        latency.record(took).expect("a latency");
    }
    let messages = rounds * 20;
    row(name, &latency, messages, stream(messages));
}

/// Calls `attempt` until it succeeds.
fn spin<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        std::hint::spin_loop();
    }
}

fn bare_rtrb(rounds: u64) {
    pin(0);
    let (mut there, mut arrives) = rtrb::RingBuffer::<u64>::new(1024);
    let (mut back, mut returns) = rtrb::RingBuffer::<u64>::new(1024);
    let echo = beside(move || {
        for _ in 0..rounds {
            let message = spin(|| arrives.pop().ok());
            back.push(message).expect("room for one");
        }
    });
    let stream = |messages: u64| {
        let (mut producer, mut consumer) = rtrb::RingBuffer::<u64>::new(1024);
        let begin = Instant::now();
        let sink = beside(move || {
            for _ in 0..messages {
                spin(|| consumer.pop().ok());
            }
        });
        for message in 0..messages {
            spin(|| producer.push(message).ok());
        }
        sink.join().expect("the sink ends");
        begin.elapsed()
    };
    let round_trip = |round| {
        there.push(round).expect("room for one");
        spin(|| returns.pop().ok())
    };
    compare("rtrb, both spin", rounds, round_trip, stream);
    echo.join().expect("the echo ends");
}

fn bare_array_queue(rounds: u64) {
    pin(0);
    let there = Arc::new(ArrayQueue::<u64>::new(1024));
    let back = Arc::new(ArrayQueue::<u64>::new(1024));
    let (arrives, returns) = (Arc::clone(&there), Arc::clone(&back));
    let echo = beside(move || {
        for _ in 0..rounds {
            let message = spin(|| arrives.pop());
            back.push(message).expect("room for one");
        }
    });
    let stream = |messages: u64| {
        let queue = Arc::new(ArrayQueue::<u64>::new(1024));
        let out = Arc::clone(&queue);
        let begin = Instant::now();
        let sink = beside(move || {
            for _ in 0..messages {
                spin(|| out.pop());
            }
        });
        for message in 0..messages {
            spin(|| queue.push(message).ok());
        }
        sink.join().expect("the sink ends");
        begin.elapsed()
    };
    let round_trip = |round| {
        there.push(round).expect("room for one");
        spin(|| returns.pop())
    };
    compare(
        "crossbeam ArrayQueue, both spin",
        rounds,
        round_trip,
        stream,
    );
    echo.join().expect("the echo ends");
}

fn std_mpsc(rounds: u64) {
    pin(0);
    let (there, arrives) = mpsc::sync_channel::<u64>(1024);
    let (back, returns) = mpsc::sync_channel::<u64>(1024);
    let echo = beside(move || {
        for message in arrives {
            back.send(message).expect("somebody waits");
        }
    });
    let stream = |messages: u64| {
        let (sender, receiver) = mpsc::sync_channel::<u64>(1024);
        let begin = Instant::now();
        let sink = beside(move || receiver.iter().count());
        for message in 0..messages {
            sender.send(message).expect("somebody waits");
        }
        drop(sender);
        sink.join().expect("the sink ends");
        begin.elapsed()
    };
    let round_trip = |round| {
        there.send(round).expect("somebody waits");
        returns.recv().expect("an answer")
    };
    compare("std mpsc, blocking", rounds / 10, round_trip, stream);
    drop(there);
    echo.join().expect("the echo ends");
}

fn mesh(name: &'static str, spin: Duration, rounds: u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let config = RuntimeConfig {
        shards: 2,
        pin: true,
        spin,
        background: Background::Shard,
        ..RuntimeConfig::new(dir.path())
    };
    let runtime = Runtime::start(&config, move |shard| async move {
        shard.serve(|_, request| std::future::ready(request));
        if shard.env().shard() == ShardId(0) {
            measure(&shard, name, rounds).await;
            shard.stop_all();
        }
    });
    runtime.expect("the runtime starts").wait();
}

async fn measure(shard: &ShardHandle, name: &str, rounds: u64) {
    let env = shard.env();
    let to = Address {
        node: env.node(),
        host: SocketAddr::from(([127, 0, 0, 1], 0)),
        shard: ShardId(1),
    };
    let payload = Bytes::from_static(&[7; 128]);
    let call = || {
        let deadline = env.now() + Duration::from_secs(10);
        env.call(to, Class::Foreground, payload.clone(), deadline)
    };
    while call().await.is_err() {
        env.sleep(Duration::from_millis(1)).await;
    }
    let mut latency = Histogram::<u64>::new(3).expect("a histogram");
    for _ in 0..rounds {
        let begin = env.now();
        call().await.expect("an answer");
        let took = u64::try_from((env.now() - begin).as_nanos()).expect("a short time");
        latency.record(took).expect("a latency");
    }
    let calls = rounds * 5;
    let begin = env.now();
    let mut started = 0;
    let mut flying = FuturesUnordered::new();
    while started < calls || !flying.is_empty() {
        while started < calls && flying.len() < OUTSTANDING {
            flying.push(call());
            started += 1;
        }
        flying
            .next()
            .await
            .expect("calls in flight")
            .expect("an answer");
    }
    row(name, &latency, calls, env.now() - begin);
}
