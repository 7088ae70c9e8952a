//! The handshake of a client connection, on whichever shard accepted it.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::FutureExt;
use torc_client::wire::frame::{FRAME_BYTES_MAX, VERSION};
use torc_client::wire::handshake::{HELLO_BYTES, Hello, Status, Welcome};
use torc_env::{Env, ShardId};
use torc_runtime::{RealEnv, TcpStream};

/// A client must say hello within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Receives the client's hello. Returns it with what was received behind it; `None` when the client
/// leaves, dawdles or speaks another protocol.
pub async fn receive_hello(env: &RealEnv, stream: &TcpStream) -> Option<(Hello, BytesMut)> {
    let mut patience = pin!(env.sleep(HELLO_TIMEOUT));
    let mut input = BytesMut::with_capacity(HELLO_BYTES * 4);
    loop {
        let received = {
            let mut receiving = pin!(stream.recv(input));
            poll_fn(|cx| {
                if let Poll::Ready(received) = receiving.as_mut().poll_unpin(cx) {
                    return Poll::Ready(Some(received));
                }
                patience.as_mut().poll_unpin(cx).map(|()| None)
            })
            .await
        };
        let (received, buffer) = received?;
        input = buffer;
        if !received.is_ok_and(|bytes| bytes > 0) {
            return None;
        }
        match Hello::decode(&mut input) {
            Ok(Some(hello)) => return Some((hello, input)),
            Ok(None) => input.reserve(HELLO_BYTES),
            Err(error) => {
                tracing::debug!("a client of the binary port is dropped: {error}");
                return None;
            }
        }
    }
}

/// What this shard answers a hello.
pub fn welcome(env: &RealEnv, hello: &Hello, cluster: u128, epoch: u64, is_full: bool) -> Welcome {
    let status = match hello.common_version() {
        None => Status::Version,
        Some(_) if is_full => Status::Busy,
        Some(_) => Status::Ready,
    };
    Welcome {
        version: VERSION,
        status,
        node: env.node(),
        cluster,
        epoch,
        shard_count: env.shard_count(),
        shard: env.shard(),
        frame_bytes_max: u32::try_from(FRAME_BYTES_MAX).expect("a frame is far below 4 GiB"),
    }
}

/// The shard that should serve a client, given the one that accepted it. A shard that does not exist
/// (the client knows another node's count) is as good as none.
pub fn wanted_shard(env: &RealEnv, hello: &Hello) -> ShardId {
    match hello.shard {
        Some(shard) if shard.0 < env.shard_count() => shard,
        _ => env.shard(),
    }
}
