//! What several benchmarks need: an echo server on the bare runtime, and the CPU time of threads.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use bytes::BytesMut;
use torc_env::{Class, Env};
use torc_runtime::{Background, ListenOptions, Runtime, RuntimeConfig, ShardHandle, TcpListener};

/// A server on the bare runtime that echoes every connection: one shard, pinned to the first core. Ends
/// when dropped.
pub struct EchoServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its threads.
    pub threads: Threads,
    _runtime: Runtime,
    _dir: tempfile::TempDir,
}

impl EchoServer {
    /// Starts one, at a port of its own.
    ///
    /// # Panics
    /// When the runtime does not start here.
    pub fn start() -> EchoServer {
        let before = Threads::all();
        let dir = tempfile::tempdir().expect("a directory");
        let config = RuntimeConfig {
            pin: true,
            background: Background::Shard,
            ..RuntimeConfig::new(dir.path())
        };
        let (sender, address) = mpsc::channel();
        let runtime = Runtime::start(&config, move |shard| {
            let sender = sender.clone();
            async move { echo(shard, sender).await }
        });
        let runtime = runtime.expect("the runtime starts");
        EchoServer {
            address: address.recv().expect("the listener's address"),
            threads: before.started_since(),
            _runtime: runtime,
            _dir: dir,
        }
    }
}

async fn echo(shard: ShardHandle, address: mpsc::Sender<SocketAddr>) {
    let env = shard.env();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = TcpListener::bind(env, any, ListenOptions::default()).expect("a listener");
    let bound = listener.local_addr().expect("an address");
    address.send(bound).expect("somebody waits");
    while let Ok(stream) = listener.accept().await {
        stream.set_nodelay(true).expect("a TCP socket");
        env.spawn(Class::Foreground, async move {
            let mut buffer = BytesMut::with_capacity(32 << 10);
            loop {
                let (received, filled) = stream.recv(buffer).await;
                if !received.is_ok_and(|count| count > 0) {
                    return;
                }
                let (sent, empty) = stream.send_buffer(filled).await;
                if sent.is_err() {
                    return;
                }
                buffer = empty;
            }
        });
    }
}

/// Some threads of this process.
#[derive(Clone)]
pub struct Threads(BTreeSet<String>);

impl Threads {
    /// All that live now.
    pub fn all() -> Threads {
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
        let names = tasks.map(|task| task.expect("a task").file_name());
        Threads(names.filter_map(|name| name.into_string().ok()).collect())
    }

    /// Those that have come since `self` was taken.
    #[must_use]
    pub fn started_since(&self) -> Threads {
        let now = Threads::all();
        Threads(now.0.difference(&self.0).cloned().collect())
    }

    /// CPU time of those that live still.
    pub fn cpu(&self) -> Duration {
        self.0.iter().map(|id| cpu_of(id)).sum()
    }
}

/// CPU time of the thread `id`; zero when it has ended.
fn cpu_of(id: &str) -> Duration {
    let stat = Path::new("/proc/self/task").join(id).join("schedstat");
    let stat = std::fs::read_to_string(stat).unwrap_or_default();
    let nanos = stat.split(' ').next().and_then(|text| text.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}
