//! A whole node: start, addresses, stop. What `torc server` runs.
//!
//! Order of a start: take the data directory and count the boot, bind every port, start the shards,
//! open every store, accept. Nothing is acknowledged before all of that has succeeded, and each
//! failure says what to do about it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use torc_cluster::topology::Description;
use torc_env::{Class, Env, NodeId, ShardId};
use torc_runtime::{
    ListenOptions, Runtime, RuntimeConfig, ShardHandle, StartError, TcpListener, net,
};

use crate::archive::{self, AttachError};
use crate::boot::identity::Identity;
use crate::boot::{self, Boot, BootError};
use crate::config::ServerConfig;
use crate::gather::on_every_shard;
use crate::redistribute;
use crate::service::Service;
use crate::shard::{self, Plan, Port, ShardError};
use crate::snapshot;

/// Pause of an accept loop after an error, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a port that is in use is waited for at a start.
const LISTEN_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two tries.
const LISTEN_PAUSE: Duration = Duration::from_millis(5);
/// How long a stop takes at most; the shards' own patience is shorter.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a server listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Binary client protocol.
    pub client: SocketAddr,
    /// HTTP.
    pub http: SocketAddr,
    /// RESP.
    pub resp: SocketAddr,
    /// Other nodes.
    pub internode: SocketAddr,
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The data directory.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A port.
    #[error(
        "cannot listen on {address} ({what}): {source}; stop what uses it, or set listen.{what} to \
         another address"
    )]
    Listen {
        /// The key in `[listen]`.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Other nodes could not reach this one.
    #[error(
        "listen.internode = {address} is no address that other nodes can use, and none of \
         cluster.seeds is this host: set listen.internode to one of this host's addresses"
    )]
    Unreachable {
        /// The configured address.
        address: SocketAddr,
    },
    /// The host.
    #[error(transparent)]
    Runtime(#[from] StartError),
    /// The log archive.
    #[error(transparent)]
    Archive(#[from] AttachError),
    /// The data cannot be divided among another number of shards.
    #[error("cannot redistribute the data over the configured shards, it is as it was: {reason}")]
    Redistribute {
        /// Why.
        reason: String,
    },
    /// A shard.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A shard's thread ended before it said why.
    #[error("a shard ended while it started; the log says more")]
    ShardEnded,
}

/// A running node.
pub struct Server {
    runtime: Runtime,
    addresses: Addresses,
    node: NodeId,
    /// Shards whose main task runs.
    alive: Arc<AtomicUsize>,
    shards: u16,
    /// Keeps the data directory locked.
    _boot: Boot,
}

struct Listeners {
    client: OwnedFd,
    http: OwnedFd,
    resp: OwnedFd,
    internode: OwnedFd,
}

impl Server {
    /// Starts a node. On return it listens; it serves once it is in the ring (`/ready`).
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn start(config: ServerConfig) -> Result<Server, ServerError> {
        let shards = config.shard_count();
        let mut boot = boot::boot(
            &config.node.data_dir,
            &config.node.name,
            &config.cluster.name,
            shards,
        )?;
        let (listeners, addresses) = bind(&config)?;
        archive::attach(&config.node.data_dir, config.archive.as_ref())?;
        redistribute::settle(&config, &mut boot, shards)?;
        warn_off_loopback(&addresses);
        let description = describe(&config, &addresses, shards)?;
        let runtime_config = RuntimeConfig {
            shards,
            pin: config.shards.pin,
            spin: config.shards.spin,
            node: boot.identity.node,
            background: config.shards.background,
            disk_rates: config.disk_rates,
            ..RuntimeConfig::new(&config.node.data_dir)
        };
        let data_dir = config.node.data_dir.clone();
        let snapshot_since_ms = snapshot::collect(&data_dir).map_err(|source| BootError::Io {
            action: "clear the snapshots in",
            path: data_dir.clone(),
            source,
        })?;
        if boot.has_lost_vote {
            tracing::error!(
                "node/topology.vote is missing: this node may have forgotten how it voted, so it votes on no topology; \
                 restore that file, or replace this node"
            );
        }
        let plan = Arc::new(Plan {
            snapshot_since_ms,
            identity: Identity {
                abstains: boot.identity.abstains || boot.has_lost_vote,
                ..boot.identity.clone()
            },
            config,
            description,
        });
        let alive = Arc::new(AtomicUsize::new(0));
        let (started, starts) = mpsc::channel();
        let (counter, planned) = (Arc::clone(&alive), plan);
        let runtime = Runtime::start(&runtime_config, move |handle: ShardHandle| {
            let (plan, started) = (Arc::clone(&planned), started.clone());
            let alive = Alive::new(&counter);
            async move {
                match shard::assemble(handle, &plan).await {
                    Ok(running) => {
                        // The receiver waits until every shard has spoken.
                        drop(started.send(Ok(())));
                        // Not held while the shard runs: a hung-up channel tells of its end.
                        drop(started);
                        std::future::pending::<()>().await;
                        drop(running);
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
                drop(alive);
            }
        })?;
        for _ in 0..shards {
            starts.recv().map_err(|_| ServerError::ShardEnded)??;
        }
        boot.serves(&data_dir)?;
        let accepted = runtime.run_on(ShardId(0), move |handle| accept(handle, listeners));
        if accepted.is_err() {
            return Err(ServerError::ShardEnded);
        }
        tracing::info!(
            node = %boot.identity.node,
            boot = boot.identity.boot,
            shards,
            http = %addresses.http,
            client = %addresses.client,
            resp = %addresses.resp,
            internode = %addresses.internode,
            "listening"
        );
        Ok(Server {
            runtime,
            addresses,
            node: boot.identity.node,
            alive,
            shards,
            _boot: boot,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The node's identity.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Whether every shard still runs. A shard ends early only by a defect or a failed device; the
    /// process should then end as well.
    pub fn is_running(&self) -> bool {
        self.alive.load(Ordering::Acquire) == usize::from(self.shards)
    }

    /// Drains and stops: no new connections, running requests are answered, stores are closed.
    /// Returns whether all of that happened in time.
    pub fn stop(self) -> bool {
        let (done, drained) = mpsc::channel();
        let ordered = self.runtime.run_on(ShardId(0), move |handle| {
            let handle = handle.clone();
            handle.env().clone().spawn(Class::Control, async move {
                // Links and stores stay until the clients of every shard are gone: their requests
                // need both.
                on_every_shard(&handle, shard::drain).await;
                on_every_shard(&handle, shard::close).await;
                if done.send(()).is_err() {
                    tracing::warn!("drained, but nobody waits for it any more");
                }
            });
        });
        let in_time = ordered.is_ok() && drained.recv_timeout(STOP_TIMEOUT).is_ok();
        if !in_time {
            tracing::warn!("the node did not drain in time");
        }
        self.runtime.stop();
        in_time
    }
}

/// Counts a shard while its main task lives.
struct Alive(Arc<AtomicUsize>);

impl Alive {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Binds every port before anything else is touched, so that a second start fails whole.
fn bind(config: &ServerConfig) -> Result<(Listeners, Addresses), ServerError> {
    let open = |what, address| {
        let failed = |source| ServerError::Listen {
            what,
            address,
            source,
        };
        let socket = listen(address).map_err(failed)?;
        let address = net::local_addr(&socket).map_err(failed)?;
        Ok::<_, ServerError>((socket, address))
    };
    let (client, client_address) = open("client", config.listen.client)?;
    let (http, http_address) = open("http", config.listen.http)?;
    let (resp, resp_address) = open("resp", config.listen.resp)?;
    let (internode, internode_address) = open("internode", config.listen.internode)?;
    let listeners = Listeners {
        client,
        http,
        resp,
        internode,
    };
    let addresses = Addresses {
        client: client_address,
        http: http_address,
        resp: resp_address,
        internode: internode_address,
    };
    Ok((listeners, addresses))
}

/// Listens at `address`. The kernel takes a killed process's io_uring down after the process has been
/// reaped, and the ring keeps its sockets until then: a node that is started again at once finds its
/// own ports in use for some milliseconds, and waits for them.
fn listen(address: SocketAddr) -> io::Result<OwnedFd> {
    let patience_ends = Instant::now() + LISTEN_PATIENCE;
    loop {
        match net::listen(address, ListenOptions::default()) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < patience_ends =>
            {
                std::thread::sleep(LISTEN_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn warn_off_loopback(addresses: &Addresses) {
    for (what, address) in [
        ("client", addresses.client),
        ("http", addresses.http),
        ("resp", addresses.resp),
        ("internode", addresses.internode),
    ] {
        if !address.ip().is_loopback() {
            tracing::warn!(
                "listen.{what} = {address} is reachable from other hosts, without TLS or access \
                 control: whoever reaches it can read and change everything"
            );
        }
    }
}

/// What this node says about itself. A wildcard address becomes one that others can use.
fn describe(
    config: &ServerConfig,
    addresses: &Addresses,
    shards: u16,
) -> Result<Description, ServerError> {
    let internode = addresses.internode;
    let own_ip = if !internode.ip().is_unspecified() {
        internode.ip()
    } else if config.cluster.seeds.is_empty() {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        let mut seeds = config.cluster.seeds.iter();
        let own = seeds.find(|seed| seed.port() == internode.port() && is_local(seed.ip()));
        own.ok_or(ServerError::Unreachable { address: internode })?
            .ip()
    };
    let usable = |address: SocketAddr| {
        if address.ip().is_unspecified() {
            SocketAddr::new(own_ip, address.port())
        } else {
            address
        }
    };
    Ok(Description {
        name: config.node.name.clone(),
        internode: usable(internode),
        http: usable(addresses.http),
        client: usable(addresses.client),
        resp: usable(addresses.resp),
        datacenter: config.node.datacenter.clone(),
        zone: config.node.zone.clone(),
        rack: config.node.rack.clone(),
        shards,
        vnodes: config.cluster.vnodes,
    })
}

/// Whether an address is one of this host's: only those can be bound.
fn is_local(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// Accepts on shard 0 and deals the sockets out: every shard gets its part of the connections, however
/// the kernel would have woken them.
fn accept(handle: &ShardHandle, listeners: Listeners) {
    let Some(service) = Service::current() else {
        return;
    };
    for (port, socket) in [
        (Port::Client, listeners.client),
        (Port::Http, listeners.http),
        (Port::Resp, listeners.resp),
        (Port::Internode, listeners.internode),
    ] {
        let listener = TcpListener::adopt(handle.env(), socket);
        let service = Rc::clone(&service);
        let class = match port {
            Port::Internode => Class::Control,
            Port::Client | Port::Http | Port::Resp => Class::Foreground,
        };
        handle
            .env()
            .spawn(class, accept_at(listener, port, service));
    }
}

async fn accept_at(listener: TcpListener, port: Port, service: Rc<Service>) {
    let shards = service.env.shard_count();
    let mut next = 0;
    // Links stay open while clients are drained, and may be opened anew.
    let stop = match port {
        Port::Internode => Rc::clone(&service.stop_links),
        Port::Client | Port::Http | Port::Resp => Rc::clone(&service.stop),
    };
    loop {
        let accepted = {
            let accepting = Box::pin(listener.accept_fd());
            let stopping = Box::pin(stop.wait());
            match futures_util::future::select(stopping, accepting).await {
                futures_util::future::Either::Left(_) => return,
                futures_util::future::Either::Right((accepted, _)) => accepted,
            }
        };
        let socket = match accepted {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(?port, "cannot accept a connection: {error}");
                service.env.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let shard = ShardId(next);
        next = (next + 1) % shards;
        let dealt = service.handle.run_on(shard, move |_| {
            if let Some(service) = Service::current() {
                shard::adopt(&service, port, socket);
            }
        });
        if dealt.is_err() {
            tracing::warn!(%shard, "a shard takes no more connections; one is dropped");
        }
    }
}
