//! The load of `torc load`, spoken to etcd: the same keys, value size, mix and closed loop, over
//! etcd's native gRPC, with the same histograms, so that the two can stand in one table.
//!
//! `etcd_load --endpoints URL,URL,URL [--clients 64] [--keys 10000] [--value-bytes 1024]
//! [--reads 50] [--seconds 10] [--serializable]` prints one JSON object. Reads are linearizable
//! unless `--serializable`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// etcd's `PutRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// etcd's `RangeRequest`, for one key.
#[derive(Clone, PartialEq, prost::Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bool, tag = "7")]
    serializable: bool,
}

/// The fields of etcd's answers that are looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

#[derive(Clone)]
struct Settings {
    endpoints: Vec<String>,
    clients: usize,
    keys: u64,
    value_bytes: usize,
    reads_percent: u64,
    seconds: f64,
    serializable: bool,
}

impl Settings {
    fn from_args() -> Result<Self, String> {
        let mut settings = Settings {
            endpoints: Vec::new(),
            clients: 64,
            keys: 10_000,
            value_bytes: 1024,
            reads_percent: 50,
            seconds: 10.0,
            serializable: false,
        };
        let mut args = std::env::args().skip(1);
        while let Some(flag) = args.next() {
            if flag == "--serializable" {
                settings.serializable = true;
                continue;
            }
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let bad = |error: &dyn std::fmt::Display| format!("{flag} {value}: {error}");
            match flag.as_str() {
                "--endpoints" => settings.endpoints = value.split(',').map(str::to_owned).collect(),
                "--clients" => settings.clients = value.parse().map_err(|error| bad(&error))?,
                "--keys" => settings.keys = value.parse().map_err(|error| bad(&error))?,
                "--value-bytes" => {
                    settings.value_bytes = value.parse().map_err(|error| bad(&error))?;
                }
                "--reads" => settings.reads_percent = value.parse().map_err(|error| bad(&error))?,
                "--seconds" => settings.seconds = value.parse().map_err(|error| bad(&error))?,
                _ => return Err(format!("unknown flag {flag}")),
            }
        }
        if settings.endpoints.is_empty() {
            return Err("--endpoints URL[,URL…] is needed".into());
        }
        Ok(settings)
    }
}

struct Client {
    grpc: Grpc<Channel>,
}

type Failed = Box<dyn std::error::Error>;

impl Client {
    async fn connect(endpoint: &str) -> Result<Self, Failed> {
        let channel = Endpoint::from_shared(endpoint.to_owned())?
            .tcp_nodelay(true)
            .connect()
            .await?;
        Ok(Self {
            grpc: Grpc::new(channel),
        })
    }

    async fn put(&mut self, key: Vec<u8>, value: Vec<u8>) -> Result<(), Failed> {
        self.grpc.ready().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
        let codec: ProstCodec<PutRequest, PutResponse> = ProstCodec::default();
        self.grpc
            .unary(tonic::Request::new(PutRequest { key, value }), path, codec)
            .await?;
        Ok(())
    }

    async fn get(&mut self, key: Vec<u8>, serializable: bool) -> Result<Option<Vec<u8>>, Failed> {
        self.grpc.ready().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Range");
        let codec: ProstCodec<RangeRequest, RangeResponse> = ProstCodec::default();
        let request = tonic::Request::new(RangeRequest { key, serializable });
        let answer = self.grpc.unary(request, path, codec).await?.into_inner();
        Ok(answer.kvs.into_iter().next().map(|found| found.value))
    }
}

struct Random {
    state: u64,
}

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }
}

struct Results {
    histograms: BTreeMap<&'static str, Histogram<u64>>,
    errors: u64,
}

fn main() -> Result<(), Failed> {
    let settings = Settings::from_args()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    let (elapsed, results) = local.block_on(&runtime, run(&settings))?;
    print_json(elapsed, &results);
    Ok(())
}

async fn run(settings: &Settings) -> Result<(Duration, Results), Failed> {
    let empty = || Histogram::new_with_bounds(1, 3_600_000_000_000, 3);
    let results = Rc::new(RefCell::new(Results {
        histograms: BTreeMap::from([("read", empty()?), ("write", empty()?)]),
        errors: 0,
    }));
    let mut clients = Vec::new();
    for index in 0..settings.clients {
        clients.push(Client::connect(&settings.endpoints[index % settings.endpoints.len()]).await?);
    }
    let mut fills = Vec::new();
    let next = Rc::new(RefCell::new(0u64));
    for mut client in clients {
        let (settings, next) = (settings.clone(), next.clone());
        fills.push(tokio::task::spawn_local(async move {
            loop {
                let key = next.replace_with(|key| *key + 1);
                if key >= settings.keys {
                    return Ok::<_, String>(client);
                }
                let value = value_of(key, settings.value_bytes);
                client
                    .put(key_of(key), value)
                    .await
                    .map_err(|error| error.to_string())?;
            }
        }));
    }
    let mut clients = Vec::new();
    for fill in fills {
        clients.push(fill.await??);
    }
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(settings.seconds);
    let mut tasks = Vec::new();
    for (index, mut client) in clients.into_iter().enumerate() {
        let (settings, results) = (settings.clone(), results.clone());
        let seed =
            0x9e37_79b9_7f4a_7c15 ^ (u64::try_from(index)? + 1).wrapping_mul(0x2545_f491_4f6c_dd1d);
        tasks.push(tokio::task::spawn_local(async move {
            let mut random = Random { state: seed };
            while Instant::now() < end {
                let key = random.below(settings.keys);
                let read = random.below(100) < settings.reads_percent;
                let sent = Instant::now();
                let done = if read {
                    let found = client.get(key_of(key), settings.serializable).await;
                    found.is_ok_and(|value| {
                        value.is_some_and(|value| value.len() == settings.value_bytes)
                    })
                } else {
                    client
                        .put(key_of(key), value_of(key, settings.value_bytes))
                        .await
                        .is_ok()
                };
                let mut results = results.borrow_mut();
                if done {
                    let nanos = u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    let name = if read { "read" } else { "write" };
                    if let Some(histogram) = results.histograms.get_mut(name) {
                        histogram.saturating_record(nanos);
                    }
                } else {
                    results.errors += 1;
                }
            }
        }));
    }
    for task in tasks {
        task.await?;
    }
    let elapsed = begun.elapsed();
    let results = Rc::try_unwrap(results).map_err(|_| "a client still holds the results")?;
    Ok((elapsed, results.into_inner()))
}

fn key_of(index: u64) -> Vec<u8> {
    format!("key{index:012}").into_bytes()
}

/// Incompressible bytes, as `torc load` writes them.
fn value_of(index: u64, len: usize) -> Vec<u8> {
    let mut random = Random {
        state: index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
    };
    let mut value = Vec::with_capacity(len + 8);
    while value.len() < len {
        value.extend_from_slice(&random.below(u64::MAX).to_le_bytes());
    }
    value.truncate(len);
    value
}

fn print_json(elapsed: Duration, results: &Results) {
    let seconds = elapsed.as_secs_f64();
    let mut all = 0;
    let mut parts = Vec::new();
    for (name, histogram) in &results.histograms {
        all += histogram.len();
        let at = |percentile| micros(histogram.value_at_percentile(percentile));
        parts.push(format!(
            "\"{name}\":{{\"done\":{},\"latency_us_from_sent\":{{\"p50\":{},\"p99\":{},\"p99.9\":{}}}}}",
            histogram.len(),
            at(50.0),
            at(99.0),
            at(99.9)
        ));
    }
    println!(
        "{{\"seconds\":{seconds},\"operations_done\":{all},\"rate_per_s\":{},\"errors\":{},\"operations\":{{{}}}}}",
        rate(all, seconds),
        results.errors,
        parts.join(",")
    );
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts and latencies are far below 2^53"
)]
fn rate(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

fn micros(nanos: u64) -> f64 {
    rate(nanos, 1000.0)
}
