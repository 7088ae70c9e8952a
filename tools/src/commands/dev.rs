//! `torc dev`: a whole cluster on loopback in one command.
//!
//! Each node is a child process, `torc server` with a configuration file of its own, so that what
//! runs here is what runs in production: killing one, stopping one or filling its disk is real.
//! This process only starts them, reports them, and stops them.

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use crate::config::{self, Config, ListenSection};
use crate::endpoint::{Endpoint, Request};
use crate::failure::Failure;

/// Distance between the port bases of two nodes.
const PORT_STRIDE: u16 = 100;
/// The most nodes that fit on one machine's loopback.
const NODES_MAX: u16 = 32;
/// How long the cluster may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long a node may take to drain before it is killed.
const DRAIN_WITHIN: Duration = Duration::from_secs(15);
/// How often children and readiness are looked at.
const POLL: Duration = Duration::from_millis(20);

/// What each node has of its own.
const OWN_KEYS: [&str; 6] = [
    "node.name",
    "node.data_dir",
    "listen.client",
    "listen.http",
    "listen.resp",
    "listen.internode",
];

/// `torc dev`
#[derive(Args, Debug)]
pub struct Dev {
    /// Number of nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(NODES_MAX)))]
    pub nodes: u16,
    /// Shards of each node
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub shards: u16,
    /// Keep the data in this directory; without it, a temporary one is removed at the end
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// First port of the first node; node i uses this + 100·i
    #[arg(long, default_value_t = 7400)]
    pub port_base: u16,
    /// Override a key of every node's configuration; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Run this command against the cluster and exit with its status; must come last
    #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "CMD")]
    pub run: Vec<String>,
}

impl Dev {
    /// The words of `--run`, without the `--` that other programs want before them.
    fn words(&self) -> &[String] {
        match self.run.split_first() {
            Some((first, rest)) if first == "--" => rest,
            _ => &self.run,
        }
    }
}

struct Node {
    name: String,
    listen: ListenSection,
    config: PathBuf,
    log: PathBuf,
    child: Child,
    exited: Option<ExitStatus>,
}

/// Starts the nodes, waits until they serve, reports them, and stays until Ctrl-C (or until the
/// command of `--run` ends). Leaves no process, and without `--dir` no file.
pub fn dev(args: &Dev) -> Result<ExitCode, Failure> {
    let started = Instant::now();
    if !args.run.is_empty() && args.words().is_empty() {
        return Err(Failure::usage("--run: the command is missing"));
    }
    refuse_shared(args, std::env::vars())?;
    let listens = plan_ports(args)?;
    let signals = Signals::catch()?;
    let temporary = match &args.dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("torc-dev-").tempdir()?),
    };
    let dir = match (&args.dir, &temporary) {
        (Some(dir), _) => dir.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of the two is always there"),
    };
    let configs = (0..listens.len())
        .map(|index| configure(args, &dir, index, &listens, std::env::vars()))
        .collect::<Result<Vec<_>, Failure>>()?;
    check_ports(&configs)?;
    let mut cluster = Cluster { nodes: Vec::new() };
    for config in &configs {
        cluster.nodes.push(start_node(&dir, config)?);
    }
    if !cluster.wait_ready(&signals)? {
        return Ok(ExitCode::from(130));
    }
    report(&cluster, &dir, args.dir.is_some(), started.elapsed());
    let code = if args.run.is_empty() {
        cluster.watch(&signals)?;
        ExitCode::SUCCESS
    } else {
        run_command(args.words(), &cluster, &signals)?
    };
    cluster.stop();
    Ok(code)
}

/// Refuses what would make the nodes collide: a key that each has of its own, set for all of them.
fn refuse_shared(
    args: &Dev,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<(), Failure> {
    if args.nodes == 1 {
        return Ok(());
    }
    let environment: Vec<_> = environment.collect();
    for key in OWN_KEYS {
        let variables = environment.iter().cloned();
        if let Some(origin) = config::origin_of(key, variables, &args.set) {
            return Err(Failure::usage(format!(
                "{origin}: all {} nodes would have the same {key}; do without it (--port-base and --dir say where \
                 nodes listen and keep their data), or run --nodes 1",
                args.nodes
            )));
        }
    }
    Ok(())
}

/// Where every node listens, unless its configuration says otherwise.
fn plan_ports(args: &Dev) -> Result<Vec<ListenSection>, Failure> {
    let last = u32::from(args.port_base) + u32::from(PORT_STRIDE) * u32::from(args.nodes - 1) + 80;
    if args.port_base == 0 || last > u32::from(u16::MAX) {
        return Err(Failure::new(format!(
            "--port-base {}: {} nodes need ports up to {last}; choose a base between 1 and {}",
            args.port_base,
            args.nodes,
            u32::from(u16::MAX) - (last - u32::from(args.port_base))
        )));
    }
    Ok((0..args.nodes)
        .map(|index| ListenSection::at_base(args.port_base + PORT_STRIDE * index))
        .collect())
}

/// Finds a busy port before anything starts.
fn check_ports(configs: &[Config]) -> Result<(), Failure> {
    for listen in configs.iter().map(|config| &config.listen) {
        for address in [listen.client, listen.internode, listen.resp, listen.http] {
            TcpListener::bind(address).map_err(|error| {
                Failure::new(format!(
                    "cannot listen on {address}: {error}; stop what uses it or choose another \
                     --port-base"
                ))
            })?;
        }
    }
    Ok(())
}

/// All that a node goes by, overrides included: its file says so too, and `torc server --config` with that file
/// runs the same node again.
fn configure(
    args: &Dev,
    dir: &Path,
    index: usize,
    all: &[ListenSection],
    environment: impl Iterator<Item = (String, String)>,
) -> Result<Config, Failure> {
    let name = format!("n{}", index + 1);
    let mut config = Config::default();
    config.node.data_dir = std::path::absolute(dir.join(&name).join("data"))?;
    config.node.name = name;
    config.node.rack = format!("rack{}", index + 1);
    config.listen = all[index].clone();
    config.cluster.name = "dev".into();
    config.cluster.seeds = all.iter().take(3).map(|listen| listen.internode).collect();
    config.shards.count = args.shards;
    // Several nodes share the cores here: pinning would stack them on the same ones.
    config.shards.pin = false;
    let failed = |error: &dyn std::error::Error| {
        Failure::new(format!("cannot form the configuration: {error}"))
    };
    let table = toml::Table::try_from(&config).map_err(|error| failed(&error))?;
    let loaded = config::overridden(table, environment, &args.set);
    Ok(loaded
        .map_err(|error| Failure::new(error.to_string()))?
        .config)
}

fn start_node(dir: &Path, config: &Config) -> Result<Node, Failure> {
    let name = config.node.name.clone();
    let home = dir.join(&name);
    std::fs::create_dir_all(&home)
        .map_err(|error| Failure::new(format!("cannot create {}: {error}", home.display())))?;
    let text = toml::to_string(config)
        .map_err(|error| Failure::new(format!("cannot write the configuration: {error}")))?;
    let path = home.join("torc.toml");
    std::fs::write(&path, text)
        .map_err(|error| Failure::new(format!("cannot write {}: {error}", path.display())))?;
    let log = home.join("torc.log");
    let out = File::options().create(true).append(true).open(&log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("server")
        .arg("--config")
        .arg(&path)
        .arg("--with-parent");
    // They are in the file.
    for (variable, _) in std::env::vars().filter(|(name, _)| config::is_key(name)) {
        command.env_remove(variable);
    }
    let child = command
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        // A process group of its own: Ctrl-C in the terminal reaches this process alone, which
        // then stops the nodes in order.
        .process_group(0)
        .spawn()
        .map_err(|error| Failure::new(format!("cannot start a node: {error}")))?;
    Ok(Node {
        name,
        listen: config.listen.clone(),
        config: path,
        log,
        child,
        exited: None,
    })
}

/// The nodes; dropping it stops whatever still runs, also on an error half-way.
struct Cluster {
    nodes: Vec<Node>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Cluster {
    /// Waits until every node answers `/ready` with 200. `false` when a signal came first.
    fn wait_ready(&mut self, signals: &Signals) -> Result<bool, Failure> {
        let begun = Instant::now();
        let mut waiting: Vec<usize> = (0..self.nodes.len()).collect();
        while !waiting.is_empty() {
            if signals.count() > 0 {
                return Ok(false);
            }
            for node in &mut self.nodes {
                if let Some(status) = node.child.try_wait()? {
                    node.exited = Some(status);
                    return Err(Failure::new(format!(
                        "{} ended before it was ready ({status}); the end of its log:\n{}",
                        node.name,
                        tail(&node.log)
                    )));
                }
            }
            waiting.retain(|index| !is_ready(&self.nodes[*index].listen));
            if begun.elapsed() > READY_WITHIN {
                let node = &self.nodes[waiting[0]];
                return Err(Failure::new(format!(
                    "{} is not ready after {} s; the end of its log:\n{}",
                    node.name,
                    READY_WITHIN.as_secs(),
                    tail(&node.log)
                )));
            }
            thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Stays until a signal, and says so when a node ends on its own. Fails when all did.
    fn watch(&mut self, signals: &Signals) -> Result<(), Failure> {
        while signals.count() == 0 {
            self.notice_exits();
            if self.nodes.iter().all(|node| node.exited.is_some()) {
                let first = &self.nodes[0];
                return Err(Failure::new(format!(
                    "every node has ended; the end of the log of {}:\n{}",
                    first.name,
                    tail(&first.log)
                )));
            }
            thread::sleep(POLL);
        }
        note("stopping");
        Ok(())
    }

    fn notice_exits(&mut self) {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("torc"));
        for node in &mut self.nodes {
            if node.exited.is_none()
                && let Ok(Some(status)) = node.child.try_wait()
            {
                node.exited = Some(status);
                note(&format!(
                    "{} ended ({status}); to start it again: {} server --config {}",
                    node.name,
                    program.display(),
                    node.config.display()
                ));
            }
        }
    }

    /// SIGTERM to all, SIGKILL to those that do not drain in time.
    fn stop(&mut self) {
        for node in self.nodes.iter().filter(|node| node.exited.is_none()) {
            if let Err(error) = terminate(&node.child) {
                note(&format!("{}: {error}", node.name));
            }
        }
        let begun = Instant::now();
        for node in self.nodes.iter_mut().filter(|node| node.exited.is_none()) {
            while begun.elapsed() < DRAIN_WITHIN && matches!(node.child.try_wait(), Ok(None)) {
                thread::sleep(POLL);
            }
            if matches!(node.child.try_wait(), Ok(None)) {
                note(&format!(
                    "{} does not stop within {} s: killed",
                    node.name,
                    DRAIN_WITHIN.as_secs()
                ));
                if let Err(error) = node.child.kill() {
                    note(&format!("{}: {error}", node.name));
                }
            }
            node.exited = node.child.wait().ok();
        }
        self.nodes.clear();
    }
}

fn terminate(child: &Child) -> std::io::Result<()> {
    let pid = rustix::process::Pid::from_child(child);
    Ok(rustix::process::kill_process(
        pid,
        rustix::process::Signal::TERM,
    )?)
}

fn is_ready(listen: &ListenSection) -> bool {
    let Ok(endpoint) = Endpoint::new(&format!("http://{}", listen.http)) else {
        return false;
    };
    let request = Request {
        method: "GET",
        path: "/ready".into(),
        ..Request::default()
    };
    endpoint
        .send(request)
        .is_ok_and(|answer| answer.status == 200)
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// Says something on standard error, if anybody listens: the nodes are looked after all the same.
fn note(text: &str) {
    writeln!(std::io::stderr(), "{text}").ok();
}

/// Says what runs where. Nobody has to read it to the end.
fn report(cluster: &Cluster, dir: &Path, kept: bool, took: Duration) {
    let count = match cluster.nodes.len() {
        1 => "1 node is".to_owned(),
        count => format!("{count} nodes are"),
    };
    let mut text = format!("{count} ready after {:.1} s\n", took.as_secs_f64());
    for node in &cluster.nodes {
        let listen = &node.listen;
        text.push_str(&format!(
            "{}  pid {}  http http://{}  binary {}  resp {}  internode {}\n    log {}  config {}\n",
            node.name,
            node.child.id(),
            listen.http,
            listen.client,
            listen.resp,
            listen.internode,
            node.log.display(),
            node.config.display()
        ));
    }
    let fate = if kept { "kept" } else { "removed at the end" };
    text.push_str(&format!("data {} ({fate})\n", dir.display()));
    text.push_str(
        "try: torc put greeting hello; torc get greeting; torc status    (Ctrl-C stops)\n",
    );
    let mut out = std::io::stdout();
    // A pipe may be waiting for this.
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .ok();
}

fn run_command(
    words: &[String],
    cluster: &Cluster,
    signals: &Signals,
) -> Result<ExitCode, Failure> {
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .env(
            "TORC_ENDPOINT",
            format!("http://{}", cluster.nodes[0].listen.http),
        )
        .spawn()
        .map_err(|error| Failure::new(format!("--run {}: {error}", words[0])))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(ExitCode::from(exit_of(status)));
        }
        // The command got the terminal's Ctrl-C as well; a second one ends it for certain.
        if signals.count() > 1 {
            child.kill()?;
        }
        thread::sleep(POLL);
    }
}

/// As a shell reports it: the exit code, or 128 + the signal.
fn exit_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// Counts SIGINT and SIGTERM instead of dying of them.
struct Signals {
    count: Arc<AtomicUsize>,
}

impl Signals {
    fn catch() -> Result<Self, Failure> {
        let count = Arc::new(AtomicUsize::new(0));
        let mut signals = signal_hook::iterator::Signals::new([
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
        ])?;
        let counter = count.clone();
        thread::spawn(move || {
            for _ in signals.forever() {
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        Ok(Self { count })
    }

    fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        dev: Dev,
    }

    fn parsed(words: &[&str]) -> Dev {
        Line::parse_from([&["dev"], words].concat()).dev
    }

    fn variables(names: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        let pairs = names
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()));
        pairs.collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn a_nodes_file_has_all_that_it_goes_by() {
        let args = parsed(&["--set", "durability.fsync=always"]);
        let listens = plan_ports(&args).unwrap();
        let environment = variables(&[("TORC_MEMORY_CACHE_MB", "7")]);
        let config = configure(&args, Path::new("/d"), 1, &listens, environment).unwrap();
        assert_eq!(config.node.name, "n2");
        assert_eq!(config.listen.http.port(), 7580);
        assert_eq!(config.durability.fsync, config::Fsync::Always);
        assert_eq!(config.memory.cache_mb, 7);
        let text = toml::to_string(&config).unwrap();
        let again = config::overridden(text.parse().unwrap(), std::iter::empty(), &[]);
        assert_eq!(again.unwrap().config, config);
    }

    #[test]
    fn what_each_node_has_of_its_own_is_not_set_for_all() {
        let refused = |words: &[&str], environment: &[(&str, &str)]| {
            let refused = refuse_shared(&parsed(words), variables(environment));
            refused.err().map(|failure| failure.to_string())
        };
        let variable = [("TORC_LISTEN_HTTP", "127.0.0.1:1")];
        let message = refused(&[], &variable).unwrap();
        assert!(message.contains("TORC_LISTEN_HTTP"), "{message}");
        let message = refused(&["--set", "node.name=x"], &[]).unwrap();
        assert!(message.contains("--set node.name=x"), "{message}");
        assert_eq!(refused(&["--nodes", "1"], &variable), None);
        assert_eq!(refused(&["--set", "durability.fsync=always"], &[]), None);
    }

    #[test]
    fn the_command_may_come_after_two_hyphens() {
        assert_eq!(
            parsed(&["--run", "sh", "-c", "x"]).words(),
            ["sh", "-c", "x"]
        );
        assert_eq!(
            parsed(&["--run", "--", "sh", "--", "x"]).words(),
            ["sh", "--", "x"]
        );
    }
}
