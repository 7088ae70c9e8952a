//! One shard of the real world: store, cluster half, links and connections, put together.
//!
//! This is the only place where engine, cluster and runtime meet in production; the simulator has
//! another one.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use torc_client::wire::handshake::{Hello, Status};
use torc_cluster::membership::MembershipConfig;
use torc_cluster::node::{Node, NodeConfig};
use torc_cluster::topology::Description;
use torc_cluster::version::BootIdentity;
use torc_engine::{Options, Store};
use torc_env::{Class, Env, NodeId, Origin, ShardId};
use torc_runtime::{ShardHandle, TcpStream};

use crate::archive;
use crate::binary::Binary;
use crate::binary::handshake::{receive_hello, wanted_shard, welcome};
use crate::boot::identity::Identity;
use crate::config::ServerConfig;
use crate::connection;
use crate::http::Http;
use crate::http::response::{Problem, Response};
use crate::link::handshake::Intro;
use crate::link::incoming::{self, receive_intro, serving_shard};
use crate::link::{Host, Links};
use crate::metrics::{ShardMetrics, Wire};
use crate::output::Output;
use crate::resp::Resp;
use crate::service::{Registered, Seat, Service};
use crate::signal::Flag;

/// How long a stopping shard waits for its clients before it drops them.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
const DRAIN_INTERVAL: Duration = Duration::from_millis(5);

/// Which protocol a socket was accepted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Binary clients.
    Client,
    /// HTTP.
    Http,
    /// RESP.
    Resp,
    /// Other nodes.
    Internode,
}

/// What all shards of a node are put together from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the node was told.
    pub config: ServerConfig,
    /// Who it is.
    pub identity: Identity,
    /// What it says about itself to the cluster.
    pub description: Description,
    /// When the oldest snapshot in the data directory was taken, in milliseconds since 1970.
    pub snapshot_since_ms: Option<u64>,
}

/// Why a shard does not start.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// Its store does not open.
    #[error("shard {shard}: {source}{}", remedy(source))]
    Store {
        /// The shard.
        shard: ShardId,
        /// Why.
        source: torc_engine::OpenError,
    },
    /// Its half of the cluster does not start.
    #[error("shard {shard}: {source}")]
    Cluster {
        /// The shard.
        shard: ShardId,
        /// Why.
        source: torc_cluster::node::StartError,
    },
}

/// What of the configuration to look at.
fn remedy(error: &torc_engine::OpenError) -> &'static str {
    match error {
        torc_engine::OpenError::Key { .. } => {
            "; the configuration says where keys are: encryption.key_file or encryption.key_command"
        }
        _ => "",
    }
}

/// What a shard's main task holds while the shard runs.
pub struct Running {
    /// The shard's service.
    pub service: Rc<Service>,
    _registered: Registered,
}

/// Puts a shard together. On return it answers calls of the node's other shards and of other nodes,
/// and takes connections.
///
/// # Errors
/// When its data cannot be opened.
pub async fn assemble(handle: ShardHandle, plan: &Plan) -> Result<Running, ShardError> {
    let env = handle.env().clone();
    let shard = env.shard();
    let config = &plan.config;
    let options = Options {
        fsync: config.fsync,
        keys: config.keys.clone(),
        memtable_bytes: config.memory.memtable_bytes,
        cache_bytes: config.memory.cache_bytes,
        separate_from: config.storage.separate_from,
        archive: archive::options(
            config.archive.as_ref(),
            &plan.identity,
            plan.identity.layout(),
            shard,
        ),
        // The topology says how.
        strategy: None,
        file_id_first: plan.identity.layout().file_id_first(shard),
        was_here: plan.identity.has_served,
        ..Options::new(plan.identity.layout().dir(shard))
    };
    let opened = Store::open(env.clone(), options).await;
    let (store, recovery) = opened.map_err(|source| ShardError::Store { shard, source })?;
    tracing::info!(
        %shard,
        tables = recovery.tables,
        records = recovery.records,
        clean = recovery.clean,
        "store open"
    );
    let boot = BootIdentity {
        node: plan.identity.node,
        boot: plan.identity.boot,
        random: plan.identity.random,
    };
    if recovery.amnesia {
        tracing::warn!(
            %shard,
            "acknowledged writes may be missing from this shard's log; it asks its replicas first"
        );
    }
    if !recovery.losses.is_empty() {
        tracing::warn!(
            %shard,
            parts = recovery.losses.len(),
            "damage has cost this shard data; it asks its replicas for that first"
        );
    }
    let mut membership = MembershipConfig {
        cluster_name: config.cluster.name.clone(),
        seeds: config.cluster.seeds.clone(),
        own: plan.description.clone(),
        generation: plan.identity.boot,
        abstains: plan.identity.abstains,
        gossip: Default::default(),
        detector: Default::default(),
    };
    membership.gossip.interval = config.cluster.gossip_interval;
    let mut node_config = NodeConfig::new(boot, membership);
    node_config.amnesia = recovery.amnesia;
    node_config.snapshot_since_ms = plan.snapshot_since_ms;
    node_config.repair.target = config.cluster.repair_interval;
    node_config.client_bytes_max = config.memory.client_bytes;
    if !config.cluster.hints {
        node_config.hints.bytes_max = 0;
    }
    let node = Node::start(env.clone(), node_config, store.clone())
        .await
        .map_err(|source| ShardError::Cluster { shard, source })?;
    let server = node.clone();
    handle.serve(move |origin, request| server.serve(origin, request));
    let service = Rc::new(Service {
        env,
        handle: handle.clone(),
        node,
        store,
        config: Rc::new(config.clone()),
        identity: plan.identity.clone(),
        metrics: ShardMetrics::default(),
        stop: Rc::new(Flag::default()),
        stop_links: Rc::new(Flag::default()),
        snapshot_turn: Default::default(),
        connections: Default::default(),
        connections_ever: Default::default(),
    });
    handle.set_remote(Rc::new(Links::new(link_host(&service))));
    let registered = service.register();
    archive::keep_topology(&service);
    Ok(Running {
        service,
        _registered: registered,
    })
}

/// What links know about this node.
fn link_host(service: &Rc<Service>) -> Rc<Host> {
    let (cluster, removed, server) = (
        service.node.clone(),
        service.node.clone(),
        service.node.clone(),
    );
    Rc::new(Host {
        env: service.env.clone(),
        cluster: Box::new(move || {
            let view = cluster.membership().view();
            view.map_or(0, |view| view.topology.cluster.0)
        }),
        is_removed: Box::new(move |node: NodeId| {
            let view = removed.membership().view();
            view.is_some_and(|view| view.topology.is_removed(node))
        }),
        serve: Box::new(move |origin: Origin, request: Bytes| {
            server.serve(origin, request).boxed_local()
        }),
    })
}

/// Takes over a socket that was accepted at `port`, on the shard of the calling thread. Reads what
/// says which shard should serve it, if its protocol says that, and hands it on if that is another.
pub fn adopt(service: &Rc<Service>, port: Port, socket: OwnedFd) {
    let stream = TcpStream::adopt(&service.env, socket);
    let env = service.env.clone();
    let service = Rc::clone(service);
    env.spawn(Class::Foreground, async move {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("a connection without TCP_NODELAY: {error}");
        }
        match port {
            Port::Http => serve_http(service, stream).await,
            Port::Resp => serve_resp(service, stream).await,
            Port::Client => greet_client(service, stream).await,
            Port::Internode => greet_peer(service, stream).await,
        }
    });
}

async fn serve_http(service: Rc<Service>, stream: TcpStream) {
    let Some(_seat) = seat(&service, Wire::Http) else {
        let mut out = Output::default();
        Response::from(full()).write(&mut out, true, false);
        return last_words(out, &stream).await;
    };
    let stop = Rc::clone(&service.stop);
    let env = service.env.clone();
    let held = Rc::clone(service.node.held());
    connection::serve(env, stream, BytesMut::new(), Http::new(service), stop, held).await;
}

async fn serve_resp(service: Rc<Service>, stream: TcpStream) {
    let Some(_seat) = seat(&service, Wire::Resp) else {
        let mut out = Output::default();
        out.buffer()
            .put_slice(b"-ERR max number of clients reached\r\n");
        return last_words(out, &stream).await;
    };
    let shards = u64::from(service.env.shard_count());
    let id = service.connections_ever.get() * shards + u64::from(service.env.shard().0);
    let stop = Rc::clone(&service.stop);
    let env = service.env.clone();
    let held = Rc::clone(service.node.held());
    connection::serve(
        env,
        stream,
        BytesMut::new(),
        Resp::new(service, id),
        stop,
        held,
    )
    .await;
}

async fn greet_client(service: Rc<Service>, stream: TcpStream) {
    let Some((hello, input)) = receive_hello(&service.env, &stream).await else {
        return;
    };
    let shard = wanted_shard(&service.env, &hello);
    if shard == service.env.shard() {
        return serve_client(service, stream, hello, input).await;
    }
    hand_over(&service, shard, stream, move |service, stream| {
        serve_client(service, stream, hello, input).boxed_local()
    });
}

async fn serve_client(service: Rc<Service>, stream: TcpStream, hello: Hello, input: BytesMut) {
    let seat = seat(&service, Wire::Binary);
    let view = service.view();
    let welcome = welcome(
        &service.env,
        &hello,
        view.as_ref().map_or(0, |view| view.topology.cluster.0),
        view.as_ref().map_or(0, |view| view.topology.epoch.0),
        seat.is_none(),
    );
    let mut out = BytesMut::new();
    welcome.encode(&mut out);
    let (sent, _) = stream.send_buffer(out).await;
    if sent.is_err() || welcome.status != Status::Ready {
        return;
    }
    let stop = Rc::clone(&service.stop);
    let env = service.env.clone();
    let held = Rc::clone(service.node.held());
    connection::serve(env, stream, input, Binary::new(service), stop, held).await;
    drop(seat);
}

async fn greet_peer(service: Rc<Service>, stream: TcpStream) {
    let Some((intro, input)) = receive_intro(&service.env, &stream).await else {
        return;
    };
    let shard = serving_shard(&service.env, &intro);
    if shard == service.env.shard() {
        return serve_peer(service, stream, intro, input).await;
    }
    hand_over(&service, shard, stream, move |service, stream| {
        serve_peer(service, stream, intro, input).boxed_local()
    });
}

async fn serve_peer(service: Rc<Service>, stream: TcpStream, intro: Intro, input: BytesMut) {
    let host = link_host(&service);
    let stop = Rc::clone(&service.stop_links);
    incoming::serve(host, stream, intro, input, stop).await;
}

/// Moves a connection to another shard, where `serve` goes on with it.
fn hand_over(
    service: &Service,
    shard: ShardId,
    stream: TcpStream,
    serve: impl FnOnce(Rc<Service>, TcpStream) -> futures_util::future::LocalBoxFuture<'static, ()>
    + Send
    + 'static,
) {
    let Ok(socket) = stream.into_fd() else {
        tracing::error!("a connection is still in use and cannot change its shard");
        return;
    };
    let left = service.handle.run_on(shard, move |there| {
        let Some(service) = Service::current() else {
            return;
        };
        let stream = TcpStream::adopt(there.env(), socket);
        there.env().spawn(Class::Foreground, serve(service, stream));
    });
    if left.is_err() {
        tracing::warn!(%shard, "a shard takes no more connections; one is dropped");
    }
}

fn seat(service: &Rc<Service>, wire: Wire) -> Option<Seat> {
    let seat = service.admit()?;
    service.metrics.accepted(wire);
    Some(seat)
}

fn full() -> Problem {
    Problem::overloaded("this node has as many connections as it takes")
}

async fn last_words(mut out: Output, stream: &TcpStream) {
    // Whether the client hears it is its own affair.
    let sent: io::Result<_> = out.take().send(stream).await;
    if let Err(error) = sent {
        tracing::debug!("a refused client has gone: {error}");
    }
}

/// Ends a shard's clients, then its links, then its store. What was acknowledged is durable as far as
/// the fsync policy promises before this, and wholly after it.
pub async fn drain(service: Rc<Service>) {
    service.stop.raise();
    let until = service.env.now() + DRAIN_PATIENCE;
    while service.connections.get() > 0 && service.env.now() < until {
        service.env.sleep(DRAIN_INTERVAL).await;
    }
    if service.connections.get() > 0 {
        tracing::warn!(
            shard = %service.env.shard(),
            connections = service.connections.get(),
            "clients are still connected and are dropped"
        );
    }
}

/// Ends a drained shard's links and closes its store.
pub async fn close(service: Rc<Service>) {
    service.stop_links.raise();
    service.node.end_minting();
    archive::finish(&service).await;
    if let Err(error) = service.node.leave_clock_mark().await {
        tracing::warn!(
            shard = %service.env.shard(),
            "the next start waits for stamps that were only reserved: {error}"
        );
    }
    if let Err(error) = service.store.close().await {
        tracing::error!(shard = %service.env.shard(), "the store did not close cleanly: {error}");
    }
}
