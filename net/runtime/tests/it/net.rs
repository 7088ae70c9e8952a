//! Sockets over the loopback device.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};

use bytes::{Bytes, BytesMut};
use torc_env::{Class, Env, ShardId};
use torc_runtime::{ListenOptions, RealEnv, Runtime, RuntimeConfig, TcpListener, TcpStream, net};

use crate::support::{NEVER, config, on_shard, task, temporary};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Two ends of a connection, both on this shard.
async fn pair(env: &RealEnv) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(env, ANY_PORT, ListenOptions::default()).unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = task(env, Class::Foreground, async move {
        listener.accept().await.unwrap()
    });
    let connected = TcpStream::connect(env, address, NEVER).await.unwrap();
    (connected, accepted.await)
}

/// Receives until the other end has sent `count` bytes.
async fn receive(stream: &TcpStream, count: usize) -> BytesMut {
    let mut buffer = BytesMut::new();
    while buffer.len() < count {
        buffer.reserve(4096);
        let (received, back) = stream.recv(buffer).await;
        buffer = back;
        assert!(
            received.unwrap() > 0,
            "the end after {} bytes",
            buffer.len()
        );
    }
    buffer
}

#[test]
fn what_is_sent_arrives_in_order() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        assert_eq!(client.peer_addr().unwrap(), server.local_addr().unwrap());
        client.set_nodelay(true).unwrap();
        client.send(vec![Bytes::from("one")]).await.unwrap();
        let runs = ["two", "", "three"].map(Bytes::from).to_vec();
        client.send(runs).await.unwrap();
        client.send(Vec::new()).await.unwrap();
        let (sent, empty) = client.send_buffer(BytesMut::from("four")).await;
        sent.unwrap();
        assert!(empty.is_empty() && empty.capacity() >= 4);
        assert_eq!(receive(&server, 15).await, "onetwothreefour");
    });
}

#[test]
fn a_receive_appends_to_what_the_buffer_holds() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        client.send(vec![Bytes::from("tail")]).await.unwrap();
        let mut buffer = BytesMut::with_capacity(64);
        buffer.extend_from_slice(b"head ");
        let (received, buffer) = server.recv(buffer).await;
        assert_eq!(received.unwrap(), 4);
        assert_eq!(buffer, "head tail");
    });
}

#[test]
fn more_than_the_sockets_hold_gets_through_in_full() {
    on_shard(|shard| async move {
        const TOTAL: usize = 16 << 20;
        let (client, server) = pair(shard.env()).await;
        let sending = task(shard.env(), Class::Foreground, async move {
            // More runs than one system call takes, and far more than the socket buffers.
            let run = Bytes::from(vec![9; TOTAL / 4096]);
            client.send(vec![run; 2048]).await.unwrap();
            let half = BytesMut::from(&vec![9; TOTAL / 2][..]);
            client.send_buffer(half).await.0.unwrap();
        });
        let received = receive(&server, TOTAL).await;
        sending.await;
        assert!(received.len() == TOTAL && received.iter().all(|byte| *byte == 9));
    });
}

#[test]
fn the_end_of_a_stream_is_a_receive_of_nothing() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        client.shutdown(Shutdown::Write).unwrap();
        let (received, _) = server.recv(BytesMut::with_capacity(8)).await;
        assert_eq!(received.unwrap(), 0);
        drop(client);
        server.readable().await.unwrap();
    });
}

#[test]
fn an_idle_connection_waits_without_a_buffer() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        let idle = server.clone();
        let waiting = task(shard.env(), Class::Foreground, async move {
            idle.readable().await.unwrap();
            receive(&idle, 4).await
        });
        client.send(vec![Bytes::from("wake")]).await.unwrap();
        assert_eq!(waiting.await, "wake");
    });
}

#[test]
fn an_abandoned_receive_gives_the_stream_back() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        {
            let receive = std::pin::pin!(server.recv(BytesMut::with_capacity(64)));
            assert!(futures_util::poll!(receive).is_pending());
        }
        // The cancellation leaves with the tick; after a round trip of the other direction it has
        // reached the kernel.
        server.send(vec![Bytes::from("ping")]).await.unwrap();
        receive(&client, 4).await;
        client.send(vec![Bytes::from("pong")]).await.unwrap();
        assert_eq!(receive(&server, 4).await, "pong");
    });
}

#[test]
fn connecting_to_nobody_fails() {
    on_shard(|shard| async move {
        let env = shard.env();
        let listener = TcpListener::bind(env, ANY_PORT, ListenOptions::default()).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let refused = TcpStream::connect(env, address, NEVER).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn connecting_gives_up_at_its_timeout() {
    on_shard(|shard| async move {
        let env = shard.env();
        // A full backlog answers no further connection.
        let options = ListenOptions {
            backlog: 0,
            ..ListenOptions::default()
        };
        let listener = TcpListener::bind(env, ANY_PORT, options).unwrap();
        let address = listener.local_addr().unwrap();
        let mut waiting = Vec::new();
        let late = loop {
            let brief = std::time::Duration::from_millis(20);
            match TcpStream::connect(env, address, brief).await {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(late.kind(), ErrorKind::TimedOut);
    });
}

#[test]
fn shards_listen_at_one_port() {
    on_shard(|shard| async move {
        let env = shard.env();
        let options = ListenOptions {
            reuse_port: true,
            ..ListenOptions::default()
        };
        let first = net::listen(ANY_PORT, options).unwrap();
        let address = net::local_addr(&first).unwrap();
        let second = net::listen(address, options).unwrap();
        assert_eq!(net::local_addr(&second).unwrap(), address);
        let listeners = [first, second].map(|socket| TcpListener::adopt(env, socket));
        let _client = TcpStream::connect(env, address, NEVER).await.unwrap();
        let [first, second] = &listeners;
        let accepted =
            futures_util::future::select(Box::pin(first.accept()), Box::pin(second.accept()));
        accepted.await.factor_first().0.unwrap();
    });
}

#[test]
fn an_accepted_connection_can_move_to_another_shard() {
    let dir = temporary();
    let config = RuntimeConfig {
        shards: 2,
        ..config(&dir)
    };
    let runtime = Runtime::start(&config, |shard| async move {
        if shard.env().shard() != ShardId(0) {
            return;
        }
        let env = shard.env();
        let listener = TcpListener::bind(env, ANY_PORT, ListenOptions::default()).unwrap();
        let address = listener.local_addr().unwrap();
        let handle = shard.clone();
        env.spawn(Class::Foreground, async move {
            let socket = listener.accept_fd().await.unwrap();
            handle
                .run_on(ShardId(1), move |there| {
                    let stream = TcpStream::adopt(there.env(), socket);
                    let shard = there.env().shard();
                    there.env().spawn(Class::Foreground, async move {
                        let question = receive(&stream, 5).await;
                        let answer = format!("{shard} got ");
                        let runs = vec![Bytes::from(answer), question.freeze()];
                        stream.send(runs).await.unwrap();
                    });
                })
                .unwrap();
        });
        let client = TcpStream::connect(env, address, NEVER).await.unwrap();
        client.send(vec![Bytes::from("hello")]).await.unwrap();
        assert_eq!(receive(&client, 11).await, "1 got hello");
        shard.stop_all();
    });
    runtime.unwrap().wait();
}

#[test]
fn a_stream_gives_its_socket_back_when_nobody_else_uses_it() {
    on_shard(|shard| async move {
        let (client, server) = pair(shard.env()).await;
        let clone = server.clone();
        let server = server.into_fd().expect_err("a clone is alive");
        drop(clone);
        let socket = server.into_fd().expect("the only one");
        let server = TcpStream::adopt(shard.env(), socket);
        client.send(vec![Bytes::from("still here")]).await.unwrap();
        assert_eq!(receive(&server, 10).await, "still here");
    });
}
