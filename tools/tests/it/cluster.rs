//! Real nodes for the tests: processes that can be killed and started again.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// The program under test.
pub const TORC: &str = env!("CARGO_BIN_EXE_torc");

/// Longest wait for a node to serve, on a machine that is busy with other tests.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A directory on the real disk (not in memory: O_DIRECT must be what it is in production).
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("torc-it-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap()
}

/// A port base whose ports for `nodes` nodes are free now. Bases differ between the tests of this
/// process.
pub fn port_base(nodes: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 20_000 + u16::try_from(std::process::id() % 50).unwrap() * 200;
    for _ in 0..100 {
        let base = start + NEXT.fetch_add(1, Ordering::Relaxed) * 4 % 10_000;
        let mut ports =
            (0..nodes).flat_map(|node| [0, 1, 79, 80].map(|port| base + node * 100 + port));
        if ports.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return base;
        }
    }
    panic!("no free run of ports from {start}");
}

/// A cluster of `torc server` processes.
pub struct Cluster {
    /// Data, configurations and logs.
    pub dir: tempfile::TempDir,
    base: u16,
    nodes: Vec<Option<Child>>,
}

impl Cluster {
    /// Starts `nodes` nodes with `shards` shards each and the given extra configuration, and waits
    /// until all serve.
    pub fn start(nodes: u16, shards: u16, sets: &[&str]) -> Self {
        let mut cluster = Self::configure(nodes, shards, sets);
        for node in 0..cluster.nodes.len() {
            cluster.spawn(node);
        }
        cluster.wait_ready();
        cluster
    }

    /// What [`Cluster::start`] would start.
    pub fn configure(nodes: u16, shards: u16, sets: &[&str]) -> Self {
        let dir = scratch();
        let base = port_base(nodes);
        let seeds: Vec<String> = (0..nodes.min(3))
            .map(|node| format!("127.0.0.1:{}", base + node * 100 + 1))
            .collect();
        for node in 0..nodes {
            let home = dir.path().join(format!("n{}", node + 1));
            std::fs::create_dir(&home).unwrap();
            let port = base + node * 100;
            let mut text = format!(
                "[node]\nname = \"n{}\"\ndata_dir = {:?}\n[listen]\nclient = \"127.0.0.1:{port}\"\n\
                 http = \"127.0.0.1:{}\"\nresp = \"127.0.0.1:{}\"\ninternode = \
                 \"127.0.0.1:{}\"\n[cluster]\nname = \"test\"\nseeds = {seeds:?}\n[shards]\ncount \
                 = {shards}\npin = false\n",
                node + 1,
                home.join("data"),
                port + 80,
                port + 79,
                port + 1
            );
            for set in sets {
                let (section, rest) = set.split_once('.').unwrap();
                let (key, value) = rest.split_once('=').unwrap();
                let line = format!("{key} = {value}\n");
                let header = format!("[{section}]\n");
                match text.find(&header) {
                    Some(at) => text.insert_str(at + header.len(), &line),
                    None => text.push_str(&(header + &line)),
                }
            }
            std::fs::write(home.join("torc.toml"), text).unwrap();
        }
        Self {
            dir,
            base,
            nodes: (0..nodes).map(|_| None).collect(),
        }
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// HTTP endpoint of a node.
    pub fn endpoint(&self, node: usize) -> String {
        format!(
            "http://127.0.0.1:{}",
            self.base + u16::try_from(node).unwrap() * 100 + 80
        )
    }

    /// Where a node's binary protocol listens.
    pub fn client_address(&self, node: usize) -> SocketAddr {
        let port = self.base + u16::try_from(node).unwrap() * 100;
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    /// Starts a node over whatever its directory holds.
    pub fn spawn(&mut self, node: usize) {
        let home = self.home(node);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(home.join("torc.log"))
            .unwrap();
        let child = Command::new(TORC)
            .arg("server")
            .arg("--config")
            .arg(home.join("torc.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.nodes[node] = Some(child);
    }

    /// Process of a node that runs.
    pub fn pid(&self, node: usize) -> u32 {
        self.nodes[node].as_ref().expect("the node runs").id()
    }

    /// SIGKILL.
    pub fn kill(&mut self, node: usize) {
        let mut child = self.nodes[node].take().expect("the node runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits until every node that runs answers `/ready`.
    pub fn wait_ready(&mut self) {
        for node in 0..self.nodes.len() {
            let begun = Instant::now();
            while let Some(child) = &mut self.nodes[node] {
                if let Some(status) = child.try_wait().unwrap() {
                    panic!("node {node} ended ({status}):\n{}", self.log(node));
                }
                if http_status(&format!("{}/ready", self.endpoint(node))) == Some(200) {
                    break;
                }
                assert!(
                    begun.elapsed() < READY_WITHIN,
                    "node {node} is not ready:\n{}",
                    self.log(node)
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// `/metrics` of a node.
    pub fn metrics(&self, node: usize) -> String {
        let url = format!("{}/metrics", self.endpoint(node));
        let mut answer = ureq::get(&url).call().unwrap();
        answer.body_mut().read_to_string().unwrap()
    }

    /// What a node logged.
    pub fn log(&self, node: usize) -> String {
        std::fs::read_to_string(self.home(node).join("torc.log")).unwrap_or_default()
    }

    /// Where a node's configuration, log and data are.
    pub fn home(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("n{}", node + 1))
    }

    /// A client command against node 0, to be run or spawned.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(TORC);
        command.args(args).env("TORC_ENDPOINT", self.endpoint(0));
        command
    }

    /// Runs a client command against node 0 and returns what it printed; fails when it fails.
    pub fn torc(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(
            output.status.success(),
            "torc {}: {}\n{}\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        text(&output.stdout)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().flatten() {
            child.kill().ok();
            child.wait().ok();
        }
        if std::thread::panicking() {
            for node in 0..self.nodes.len() {
                let log = self.log(node);
                let lines: Vec<&str> = log.lines().collect();
                let tail = &lines[lines.len().saturating_sub(30)..];
                eprintln!(
                    "--- the end of the log of node {node}:\n{}",
                    tail.join("\n")
                );
            }
        }
    }
}

/// The status of a GET; `None` when nothing answers.
pub fn http_status(url: &str) -> Option<u16> {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .new_agent();
    agent
        .get(url)
        .call()
        .ok()
        .map(|answer| answer.status().as_u16())
}

/// Waits until something holds; fails with `what` when it takes longer than a busy machine may.
pub fn wait_until(what: impl Fn() -> String, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < READY_WITHIN, "{}", what());
        std::thread::yield_now();
    }
}

/// Output as text.
/// Serves each connection as `serve` does, until the tests end; returns the address.
pub fn serving(serve: impl Fn(TcpStream) + Clone + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, serve) = (stream.unwrap(), serve.clone());
            std::thread::spawn(move || serve(stream));
        }
    });
    address
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the program and returns what came out, whatever its status.
pub fn run(args: &[&str]) -> Output {
    Command::new(TORC)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}
