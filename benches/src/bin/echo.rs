//! What a TCP request costs: an echo server on Torc's runtime, beside one on tokio (`--features
//! peers`). The load comes from a second runtime on another core.
//!
//! The number that counts is the CPU time that the server's thread spends for a request: on one machine the client
//! limits the throughput. `cargo run --release -p torc-benches --features peers --bin echo [seconds]`

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use hdrhistogram::Histogram;
use torc_benches::{EchoServer, Threads};
use torc_env::{Class, Env};
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

/// A server under test.
struct Server {
    name: &'static str,
    address: SocketAddr,
    threads: Threads,
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

fn torc() -> Server {
    let server = EchoServer::start();
    Server {
        name: "torc",
        address: server.address,
        threads: server.threads.clone(),
        _alive: Box::new(server),
    }
}

#[cfg(feature = "peers")]
fn tokio_server() -> Server {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let (sender, address) = std::sync::mpsc::channel();
    let (alive, end) = tokio::sync::oneshot::channel::<()>();
    let before = Threads::all();
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
            // It comes, as an error, when the other half is dropped.
            drop(end.await);
        });
    });
    Server {
        name: "tokio",
        address: address.recv().expect("the listener's address"),
        threads: before.started_since(),
        _alive: Box::new(alive),
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
    let config = RuntimeConfig {
        pin: true,
        first_core: 1,
        background: Background::Shard,
        ..RuntimeConfig::new(dir.path())
    };
    let client = Runtime::start(&config, move |shard| {
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
    let (cpu, requests) = (server.threads.cpu(), load.requests.load(Ordering::Relaxed));
    std::thread::sleep(duration);
    let elapsed = begin.elapsed();
    let cpu = server.threads.cpu() - cpu;
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
