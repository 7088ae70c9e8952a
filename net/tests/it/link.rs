//! Links between nodes on real sockets: who is answered, who is refused, and what a caller is told.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use tempfile::TempDir;
use torc_env::{Address, CallError, Class, Env, NodeId, ShardId};
use torc_net::link::incoming::{self, receive_intro};
use torc_net::link::{Host, Links};
use torc_net::signal::Flag;
use torc_runtime::{
    Background, ListenOptions, RealEnv, Runtime, RuntimeConfig, ShardHandle, TcpListener,
    TcpStream, net,
};

const CALLER: NodeId = NodeId(1);
const SERVER: NodeId = NodeId(2);

fn runtime_config(node: NodeId) -> (TempDir, RuntimeConfig) {
    let dir = tempfile::tempdir().unwrap();
    let config = RuntimeConfig {
        node,
        background: Background::Shard,
        ..RuntimeConfig::new(dir.path())
    };
    (dir, config)
}

/// How a peer behaves.
#[derive(Clone, Copy, Default)]
struct Peer {
    cluster: u128,
    removes_the_caller: bool,
    /// Closes the connection at the first request.
    hangs_up: bool,
}

/// A node that answers each request with itself, twice.
struct Server {
    runtime: Option<Runtime>,
    address: SocketAddr,
    _dir: TempDir,
}

impl Server {
    fn start(peer: Peer) -> Server {
        let (dir, config) = runtime_config(SERVER);
        let socket = net::listen((Ipv4Addr::LOCALHOST, 0).into(), ListenOptions::default());
        let socket = std::sync::Arc::new(socket.unwrap());
        let address = net::local_addr(&socket).unwrap();
        let runtime = Runtime::start(&config, move |handle: ShardHandle| {
            let socket = socket.try_clone().unwrap();
            async move {
                let env = handle.env().clone();
                let listener = TcpListener::adopt(&env, socket);
                loop {
                    let stream = listener.accept().await.unwrap();
                    env.spawn(Class::Replication, accept(env.clone(), stream, peer));
                }
            }
        });
        Server {
            runtime: Some(runtime.unwrap()),
            address,
            _dir: dir,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.stop();
        }
    }
}

async fn accept(env: RealEnv, stream: TcpStream, peer: Peer) {
    let Some((intro, input)) = receive_intro(&env, &stream).await else {
        return;
    };
    let hang_up = Rc::new(Flag::default());
    let stop = Rc::clone(&hang_up);
    let host = Host {
        env,
        cluster: Box::new(move || peer.cluster),
        is_removed: Box::new(move |_| peer.removes_the_caller),
        serve: Box::new(move |origin, request| {
            assert_eq!(origin.node, CALLER);
            if peer.hangs_up {
                hang_up.raise();
                return std::future::pending().boxed_local();
            }
            let answer = [&request[..], &request[..]].concat();
            async move { Bytes::from(answer) }.boxed_local()
        }),
    };
    incoming::serve(Rc::new(host), stream, intro, input, stop).await;
}

/// Runs `calls` on a node whose links are real.
fn as_caller<T: Send + 'static>(
    cluster: u128,
    calls: impl AsyncFn(RealEnv) -> T + Clone + Send + 'static,
) -> T {
    let (_dir, config) = runtime_config(CALLER);
    Runtime::block_on(&config, move |handle: ShardHandle| {
        let calls = calls.clone();
        async move {
            let env = handle.env().clone();
            let host = Host {
                env: env.clone(),
                cluster: Box::new(move || cluster),
                is_removed: Box::new(|_| false),
                serve: Box::new(|_, _| async { Bytes::new() }.boxed_local()),
            };
            handle.set_remote(Rc::new(Links::new(Rc::new(host))));
            calls(env).await
        }
    })
    .unwrap()
}

async fn call(
    env: &RealEnv,
    node: NodeId,
    host: SocketAddr,
    request: Bytes,
) -> Result<Bytes, CallError> {
    let address = Address {
        node,
        host,
        shard: ShardId(0),
    };
    let deadline = env.now() + Duration::from_secs(20);
    env.call(address, Class::Foreground, request, deadline)
        .await
}

#[test]
fn many_calls_at_once_are_each_answered() {
    let server = Server::start(Peer::default());
    let address = server.address;
    as_caller(0, async move |env: RealEnv| {
        let calls = (0..500_usize).map(|index| {
            let env = env.clone();
            // Some larger than a socket's buffer, some empty.
            let len = if index % 100 == 0 { 300_000 } else { index };
            async move {
                let request = Bytes::from(vec![7; len]);
                let answer = call(&env, SERVER, address, request).await.unwrap();
                assert_eq!(answer.len(), 2 * len);
            }
        });
        futures_util::future::join_all(calls).await;
    });
}

#[test]
fn a_first_contact_takes_whichever_node_answers() {
    let server = Server::start(Peer::default());
    let address = server.address;
    let answer = as_caller(0, async move |env: RealEnv| {
        call(&env, NodeId::default(), address, Bytes::from("x")).await
    });
    assert_eq!(answer, Ok(Bytes::from("xx")));
}

#[test]
fn another_node_at_the_address_is_not_asked() {
    let server = Server::start(Peer::default());
    let address = server.address;
    let answers = as_caller(0, async move |env: RealEnv| {
        let first = call(&env, NodeId(99), address, Bytes::from("x")).await;
        // Before the next connect is due.
        (
            first,
            call(&env, NodeId(99), address, Bytes::from("x")).await,
        )
    });
    assert_eq!(
        answers,
        (Err(CallError::WrongNode), Err(CallError::WrongNode))
    );
}

#[test]
fn nodes_of_two_clusters_and_removed_nodes_exchange_nothing() {
    for peer in [
        Peer {
            cluster: 6,
            ..Peer::default()
        },
        Peer {
            removes_the_caller: true,
            ..Peer::default()
        },
    ] {
        let server = Server::start(peer);
        let address = server.address;
        let answer = as_caller(5, async move |env: RealEnv| {
            call(&env, SERVER, address, Bytes::from("x")).await
        });
        assert_eq!(answer, Err(CallError::Unreachable));
    }
}

#[test]
fn what_was_sent_before_the_connection_broke_is_in_doubt() {
    let server = Server::start(Peer {
        hangs_up: true,
        ..Peer::default()
    });
    let address = server.address;
    let answer = as_caller(0, async move |env: RealEnv| {
        call(&env, SERVER, address, Bytes::from("x")).await
    });
    assert_eq!(answer, Err(CallError::Lost));
}

#[test]
fn a_node_that_is_away_is_unreachable_at_once_and_found_again_later() {
    let (done, found) = mpsc::channel();
    let (there, server_is_there) = mpsc::channel::<()>();
    // A port that nothing listens on until later.
    let socket = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    drop(socket);
    let caller = std::thread::spawn(move || {
        let server_is_there = std::sync::Arc::new(std::sync::Mutex::new(server_is_there));
        as_caller(0, async move |env: RealEnv| {
            let away = call(&env, SERVER, address, Bytes::from("x")).await;
            done.send(away).unwrap();
            server_is_there.lock().unwrap().recv().unwrap();
            loop {
                match call(&env, SERVER, address, Bytes::from("x")).await {
                    Err(CallError::Unreachable) => env.sleep(Duration::from_millis(10)).await,
                    other => return other,
                }
            }
        })
    });
    assert_eq!(found.recv().unwrap(), Err(CallError::Unreachable));
    let (_dir, config) = runtime_config(SERVER);
    let runtime = Runtime::start(&config, move |handle: ShardHandle| async move {
        let env = handle.env().clone();
        let listener = TcpListener::bind(&env, address, ListenOptions::default()).unwrap();
        loop {
            let stream = listener.accept().await.unwrap();
            env.spawn(
                Class::Replication,
                accept(env.clone(), stream, Peer::default()),
            );
        }
    })
    .unwrap();
    there.send(()).unwrap();
    assert_eq!(caller.join().unwrap(), Ok(Bytes::from("xx")));
    runtime.stop();
}
