//! What a TCP request costs: an echo server on Torc's runtime, beside one on tokio (`--features
//! peers`). The load comes from a second runtime on another core.
//!
//! The number that counts is the server thread's CPU time a request: on one machine the client
//! limits the throughput. `cargo run --release -p torc-benches --features peers --bin echo [seconds]`

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use hdrhistogram::Histogram;
use torc_env::{Class, Env, ShardId};
use torc_runtime::{Background, Runtime, RuntimeConfig, TcpStream};

/// A kind of load.
#[derive(Clone, Copy)]
struct Shape {
    connections: usize,
    bytes: usize,
    /// Requests that a connection sends before it waits for their answers.
    outstanding: usize,
}

const SHAPES: [Shape; 5] = [
    shape(64, 128, 1),
    shape(64, 1024, 1),
    shape(64, 128, 16),
    shape(1, 1024, 1),
    shape(1, 1024, 16),
];

const fn shape(connections: usize, bytes: usize, outstanding: usize) -> Shape {
    Shape {
        connections,
        bytes,
        outstanding,
    }
}

/// A server under test: its address, and its thread's CPU time so far.
struct Server {
    name: &'static str,
    address: SocketAddr,
    cpu: Box<dyn Fn() -> Duration>,
    /// Ends the server when dropped.
    _alive: Box<dyn std::any::Any>,
}

fn main() {
    let seconds = std::env::args()
        .nth(1)
        .map_or(2.0, |text| text.parse().expect("seconds"));
    let duration = Duration::from_secs_f64(seconds);
    println!(
        "{:<22} {:<8} {:>10} {:>12} {:>9} {:>9}",
        "load", "server", "req/s", "CPU us/req", "p50 us", "p99 us"
    );
    for shape in SHAPES {
        for round in 0..2 {
            for server in servers() {
                let measured = measure(&server, shape, duration);
                let load = format!(
                    "{} x {} B x {}",
                    shape.connections, shape.bytes, shape.outstanding
                );
                println!("{load:<22} {:<8} {measured}   (run {round})", server.name);
            }
        }
    }
}

fn servers() -> Vec<Server> {
    vec![
        torc(),
        #[cfg(feature = "peers")]
        tokio_server(),
    ]
}

fn config(dir: &tempfile::TempDir, first_core: usize) -> RuntimeConfig {
    RuntimeConfig {
        pin: true,
        first_core,
        background: Background::Shard,
        ..RuntimeConfig::new(dir.path())
    }
}

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let nanos = stat.split(' ').next().expect("a first field");
    Duration::from_nanos(nanos.parse().expect("nanoseconds"))
}

fn torc() -> Server {
    let dir = tempfile::tempdir().expect("a directory");
    let (sender, address) = std::sync::mpsc::channel();
    let runtime = Runtime::start(&config(&dir, 0), move |shard| {
        let sender = sender.clone();
        async move { torc_benches::echo(shard, sender).await }
    })
    .expect("the runtime starts");
    let asked = runtime.handle();
    Server {
        name: "torc",
        address: address.recv().expect("the listener's address"),
        cpu: Box::new(move || {
            let (sender, cpu) = std::sync::mpsc::channel();
            asked
                .run_on(ShardId(0), move |_| {
                    sender.send(thread_cpu()).expect("somebody waits");
                })
                .expect("the shard takes messages");
            cpu.recv().expect("the shard answers")
        }),
        _alive: Box::new((runtime, dir)),
    }
}

#[cfg(feature = "peers")]
fn tokio_server() -> Server {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (sender, address) = std::sync::mpsc::channel();
    let (asking, mut asked) = tokio::sync::mpsc::channel::<std::sync::mpsc::Sender<Duration>>(1);
    std::thread::spawn(move || {
        let core = core_affinity::get_core_ids().expect("cores")[0];
        core_affinity::set_for_current(core);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .expect("the runtime starts");
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
                .await
                .expect("a listener");
            let bound = listener.local_addr().expect("an address");
            sender.send(bound).expect("somebody waits");
            tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    stream.set_nodelay(true).expect("a TCP socket");
                    tokio::spawn(async move {
                        let mut buffer = vec![0; 32 << 10];
                        loop {
                            match stream.read(&mut buffer).await {
                                Ok(count) if count > 0 => {
                                    if stream.write_all(&buffer[..count]).await.is_err() {
                                        return;
                                    }
                                }
                                _ => return,
                            }
                        }
                    });
                }
            });
            while let Some(answer) = asked.recv().await {
                answer.send(thread_cpu()).expect("somebody waits");
            }
        });
    });
    Server {
        name: "tokio",
        address: address.recv().expect("the listener's address"),
        cpu: Box::new({
            let asking = asking.clone();
            move || {
                let (sender, cpu) = std::sync::mpsc::channel();
                asking.blocking_send(sender).expect("the server listens");
                cpu.recv().expect("the server answers")
            }
        }),
        _alive: Box::new(asking),
    }
}

/// What one run found; prints as the columns behind the names.
struct Measured {
    per_second: f64,
    cpu_us: f64,
    latency_ns: Histogram<u64>,
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let micros = |quantile| Duration::from_nanos(self.latency_ns.value_at_quantile(quantile));
        write!(
            f,
            "{:>10.0} {:>12.2} {:>9.0} {:>9.0}",
            self.per_second,
            self.cpu_us,
            micros(0.5).as_secs_f64() * 1e6,
            micros(0.99).as_secs_f64() * 1e6,
        )
    }
}

/// Counts requests over all connections, and tells them when to end.
#[derive(Default)]
struct Load {
    requests: AtomicU64,
    over: AtomicBool,
}

fn measure(server: &Server, shape: Shape, duration: Duration) -> Measured {
    let dir = tempfile::tempdir().expect("a directory");
    let load = Arc::new(Load::default());
    let (histograms, results) = std::sync::mpsc::channel();
    let (address, shared) = (server.address, Arc::clone(&load));
    let client = Runtime::start(&config(&dir, 1), move |shard| {
        let (load, histograms) = (Arc::clone(&shared), histograms.clone());
        async move {
            for _ in 0..shape.connections {
                let (load, histograms) = (Arc::clone(&load), histograms.clone());
                let env = shard.env().clone();
                shard.env().spawn(Class::Foreground, async move {
                    let latency = connection(&env, address, shape, &load).await;
                    histograms.send(latency).expect("somebody waits");
                });
            }
        }
    })
    .expect("the runtime starts");
    std::thread::sleep(Duration::from_millis(300));
    let begin = std::time::Instant::now();
    let (cpu, requests) = ((server.cpu)(), load.requests.load(Ordering::Relaxed));
    std::thread::sleep(duration);
    let elapsed = begin.elapsed();
    let cpu = (server.cpu)() - cpu;
    let requests = load.requests.load(Ordering::Relaxed) - requests;
    load.over.store(true, Ordering::Relaxed);
    let mut latency_ns = Histogram::new(3).expect("a histogram");
    for histogram in results.iter().take(shape.connections) {
        latency_ns.add(histogram).expect("histograms of one kind");
    }
    client.stop();
    let requests = requests.max(1) as f64;
    Measured {
        per_second: requests / elapsed.as_secs_f64(),
        cpu_us: cpu.as_secs_f64() * 1e6 / requests,
        latency_ns,
    }
}

/// One connection: sends a batch, waits for all of its answers, and again.
async fn connection(
    env: &torc_runtime::RealEnv,
    address: SocketAddr,
    shape: Shape,
    load: &Load,
) -> Histogram<u64> {
    let timeout = Duration::from_secs(10);
    let stream = TcpStream::connect(env, address, timeout)
        .await
        .expect("a connection");
    stream.set_nodelay(true).expect("a TCP socket");
    let mut latency = Histogram::new(3).expect("a histogram");
    let batch = shape.bytes * shape.outstanding;
    let mut output = BytesMut::with_capacity(batch);
    let mut input = BytesMut::with_capacity(batch.max(4096));
    while !load.over.load(Ordering::Relaxed) {
        let begin = env.now();
        output.resize(batch, b'x');
        let (sent, back) = stream.send_buffer(output).await;
        sent.expect("the server listens");
        output = back;
        input.clear();
        while input.len() < batch {
            let (received, back) = stream.recv(input).await;
            assert!(received.expect("the server answers") > 0, "an early end");
            input = back;
        }
        let took = u64::try_from((env.now() - begin).as_nanos()).expect("a short time");
        latency.record(took).expect("a latency");
        load.requests
            .fetch_add(shape.outstanding as u64, Ordering::Relaxed);
    }
    latency
}
