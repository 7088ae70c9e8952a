//! What the store adds to a request: a cached GET of 1 KB (r=1, on the owning shard) over the binary
//! protocol, beside an echo of 1 KB on the bare runtime.
//!
//! Both servers are measured by the same blocking client on another core, on one connection with 1
//! and with 16 requests outstanding, in turns. The number that counts is the CPU time that all
//! threads of the server spend for a request.
//! `cargo run --release -p torc-benches --bin cached_get [seconds] [runs]`

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use torc_benches::{EchoServer, Threads};
use torc_client::wire::frame::{self, FRAME_BYTES_MAX};
use torc_client::wire::handshake::{Hello, Status, Welcome};
use torc_client::wire::message::{
    ArchivedAnswer, ArchivedOutcome, Get, Level, Operation, Request, Single, answer, encode_request,
};
use torc_client::{Client, Options};
use torc_net::config::ServerConfig;
use torc_net::server::Server;

const VALUE: [u8; 1024] = [b'v'; 1024];
const KEY: &[u8] = b"the one key";
const OUTSTANDING: [usize; 2] = [1, 16];
const PATIENCE: Duration = Duration::from_secs(10);

/// A server, and the threads that came with it.
struct Subject {
    name: &'static str,
    threads: Threads,
    connection: TcpStream,
    /// One request, and the length of its answer.
    request: BytesMut,
    answer_bytes: usize,
    /// Ends the server when dropped.
    _alive: Box<dyn std::any::Any>,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next();
    let seconds = seconds.map_or(2.0, |text| text.parse().expect("seconds"));
    let duration = Duration::from_secs_f64(seconds);
    let runs = arguments.next();
    let runs: usize = runs.map_or(5, |text| text.parse().expect("a number of runs, from 1"));
    let cores = core_affinity::get_core_ids().expect("cores");
    core_affinity::set_for_current(*cores.last().expect("a core"));

    let mut subjects = [echo(), store()];
    println!(
        "{:<12} {:<5} {:>10} {:>11} {:>13}",
        "outstanding", "", "req/s", "CPU us/req", "spread"
    );
    for outstanding in OUTSTANDING {
        let mut runs_of = [Runs::default(), Runs::default()];
        for _ in 0..runs {
            for (subject, runs) in subjects.iter_mut().zip(&mut runs_of) {
                subject.measure(outstanding, duration, runs);
            }
        }
        let most = runs_of.iter().map(|runs| summary(&runs.cpu_us)[2]);
        let most = most.fold(0.0, f64::max);
        for (subject, runs) in subjects.iter().zip(&runs_of) {
            let [low, median, high] = summary(&runs.cpu_us);
            let spread = format!("{low:.2}-{high:.2}");
            let [_, rate, _] = summary(&runs.rate);
            let bar = (0..30).filter(|cell| f64::from(*cell) < median / most * 30.0);
            let bar: String = bar.map(|_| '#').collect();
            println!(
                "{outstanding:<12} {:<5} {rate:>10.0} {median:>11.2} {spread:>13}  {bar}",
                subject.name
            );
        }
        let [echo, get] = &runs_of;
        let ratios: Vec<f64> = get
            .cpu_us
            .iter()
            .zip(&echo.cpu_us)
            .map(|(get, echo)| get / echo)
            .collect();
        let [low, median, high] = summary(&ratios);
        println!("{outstanding:<12} get/echo, pair by pair: {median:.2} ({low:.2}-{high:.2})");
    }
}

/// What the runs of one subject found.
#[derive(Default)]
struct Runs {
    rate: Vec<f64>,
    cpu_us: Vec<f64>,
}

/// Least, median, most.
fn summary(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [
        sorted[0],
        sorted[sorted.len() / 2],
        sorted[sorted.len() - 1],
    ]
}

fn echo() -> Subject {
    let server = EchoServer::start();
    Subject {
        name: "echo",
        connection: connect(server.address),
        request: BytesMut::from(&VALUE[..]),
        answer_bytes: VALUE.len(),
        threads: server.threads.clone(),
        _alive: Box::new(server),
    }
}

fn store() -> Subject {
    let before = Threads::all();
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = ServerConfig::standalone(dir.path());
    config.shards.pin = true;
    let server = Server::start(config).expect("the node starts");
    let address = server.addresses().client;
    let mut client = Client::new(address, Options::default());
    let begin = Instant::now();
    while let Err(error) = client.put(KEY, &VALUE) {
        assert!(
            begin.elapsed() < PATIENCE,
            "the node does not serve: {error}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut request = BytesMut::new();
    let get = Request {
        timeout_ms: 5000,
        keyspace: b"default",
        operation: Operation::Single(Single::Get(Get {
            key: KEY,
            r: Level::One,
        })),
    };
    encode_request(&mut request, 1, &get);
    let mut connection = connect(address);
    shake_hands(&mut connection);
    Subject {
        name: "get",
        threads: before.started_since(),
        answer_bytes: first_answer(&mut connection, &request),
        connection,
        request,
        _alive: Box::new((server, dir)),
    }
}

fn connect(address: SocketAddr) -> TcpStream {
    let connection = TcpStream::connect(address).expect("a connection");
    connection.set_nodelay(true).expect("a TCP socket");
    let patience = Some(PATIENCE);
    connection.set_read_timeout(patience).expect("a TCP socket");
    connection
}

fn shake_hands(connection: &mut TcpStream) {
    let mut bytes = BytesMut::new();
    Hello::new(None).encode(&mut bytes);
    connection.write_all(&bytes).expect("the node listens");
    bytes.clear();
    loop {
        if let Some(welcome) = Welcome::decode(&mut bytes).expect("a welcome") {
            assert_eq!(welcome.status, Status::Ready);
            return;
        }
        receive(connection, &mut bytes);
    }
}

/// The length of the answer to `request`, which must hold the value.
fn first_answer(connection: &mut TcpStream, request: &[u8]) -> usize {
    connection.write_all(request).expect("the node listens");
    let mut input = BytesMut::new();
    loop {
        let received = input.len();
        if let Some(answered) = frame::decode(&mut input, FRAME_BYTES_MAX).expect("a frame") {
            match answer(&answered.payload).expect("an answer") {
                ArchivedAnswer::Single(ArchivedOutcome::Got(got)) => {
                    assert_eq!(&*got.siblings[0].value, &VALUE[..])
                }
                _ => panic!("the node does not answer the GET with a value"),
            }
            return received;
        }
        receive(connection, &mut input);
    }
}

fn receive(connection: &mut TcpStream, input: &mut BytesMut) {
    let mut buffer = [0; 4096];
    let count = connection.read(&mut buffer).expect("the node answers");
    assert!(count > 0, "the node hangs up");
    input.extend_from_slice(&buffer[..count]);
}

impl Subject {
    /// Sends `outstanding` requests at once, waits for all answers, and again.
    fn measure(&mut self, outstanding: usize, duration: Duration, runs: &mut Runs) {
        let output = self.request.repeat(outstanding);
        let mut input = vec![0; self.answer_bytes * outstanding];
        let mut round = || {
            self.connection.write_all(&output).expect("it listens");
            self.connection.read_exact(&mut input).expect("it answers");
        };
        (0..100).for_each(|_| round());
        let (begin, cpu) = (Instant::now(), self.threads.cpu());
        let mut requests = 0;
        while begin.elapsed() < duration {
            round();
            requests += outstanding;
        }
        let requests = requests as f64;
        let cpu = self.threads.cpu() - cpu;
        runs.rate.push(requests / begin.elapsed().as_secs_f64());
        runs.cpu_us.push(cpu.as_secs_f64() * 1e6 / requests);
    }
}
