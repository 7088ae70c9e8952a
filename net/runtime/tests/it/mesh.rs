//! Calls between the shards of a node.

use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Address, Bytes, CallError, Class, Env, Instant, NodeId, ShardId};
use torc_runtime::{PendingCall, RealEnv, RemoteCaller, Runtime, RuntimeConfig, ShardHandle};

use crate::support::{NEVER, config, on_shard, temporary};

const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

fn to(env: &RealEnv, shard: u16) -> Address {
    Address {
        node: env.node(),
        host: NOWHERE,
        shard: ShardId(shard),
    }
}

async fn ask(env: &RealEnv, shard: u16, request: &str) -> Result<Bytes, CallError> {
    let request = Bytes::copy_from_slice(request.as_bytes());
    let deadline = env.now() + NEVER;
    env.call(to(env, shard), Class::Foreground, request, deadline)
        .await
}

/// Answers every request with its own shard, the asking one, and the request.
fn serve(shard: &ShardHandle) {
    let me = shard.env().shard();
    shard.serve(move |origin, request| async move {
        let text = String::from_utf8_lossy(&request).into_owned();
        Bytes::from(format!("{me} to {}: {text}", origin.shard))
    });
}

/// Runs `main` on shard 0 of several; the others only serve.
fn on_shards<M>(shards: u16, main: fn(ShardHandle) -> M)
where
    M: Future<Output = ()> + 'static,
{
    let dir = temporary();
    let config = RuntimeConfig {
        shards,
        ..config(&dir)
    };
    let runtime = Runtime::start(&config, move |shard| async move {
        serve(&shard);
        if shard.env().shard() == ShardId(0) {
            main(shard.clone()).await;
            shard.stop_all();
        }
    });
    runtime.unwrap().wait();
}

/// Asks until the other shard has come so far that it serves.
async fn wait_until_served(env: &RealEnv, shard: u16) {
    while ask(env, shard, "ready?").await == Err(CallError::Unreachable) {
        env.sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn every_shard_answers_every_other_and_itself() {
    on_shards(4, |shard| async move {
        let env = shard.env();
        assert_eq!(env.shard_count(), 4);
        for other in 0..4 {
            wait_until_served(env, other).await;
            let answer = ask(env, other, "hello").await.unwrap();
            assert_eq!(answer, format!("{other} to 0: hello"));
        }
    });
}

#[test]
fn a_shard_that_does_not_exist_is_answered_by_shard_zero() {
    on_shards(2, |shard| async move {
        let answer = ask(shard.env(), 77, "who?").await.unwrap();
        assert_eq!(answer, "0 to 0: who?");
    });
}

#[test]
fn many_calls_at_once_each_get_their_answer_or_are_refused_early() {
    on_shards(2, |shard| async move {
        let env = shard.env();
        wait_until_served(env, 1).await;
        for _ in 0..20 {
            let calls = (0..3000).map(|number| async move {
                match ask(env, 1, &number.to_string()).await {
                    Ok(answer) => {
                        assert_eq!(answer, format!("1 to 0: {number}"));
                        true
                    }
                    Err(error) => {
                        assert_eq!(error, CallError::Overloaded);
                        false
                    }
                }
            });
            let answers = futures_util::future::join_all(calls).await;
            let answered = answers.into_iter().filter(|answered| *answered).count();
            assert!(answered >= 2048, "the lane's credits: {answered}");
        }
    });
}

#[test]
fn a_call_without_an_answer_is_lost_at_its_deadline() {
    on_shards(2, |shard| async move {
        let env = shard.env();
        wait_until_served(env, 1).await;
        shard.serve(|_, _| std::future::pending());
        let deadline = env.now() + Duration::from_millis(5);
        let request = Bytes::from("never answered");
        let lost = env.call(to(env, 0), Class::Control, request, deadline);
        assert_eq!(lost.await, Err(CallError::Lost));
        assert!(env.now() >= deadline);
    });
}

#[test]
fn a_request_that_comes_after_its_deadline_is_not_handled() {
    on_shards(2, |shard| async move {
        let env = shard.env();
        wait_until_served(env, 1).await;
        shard.serve(|_, _| async { panic!("handled after its deadline") });
        let request = Bytes::from("too late");
        let lost = env.call(to(env, 0), Class::Control, request, Instant(0));
        assert_eq!(lost.await, Err(CallError::Lost));
    });
}

#[test]
fn a_shard_that_serves_nothing_is_unreachable() {
    on_shard(|shard| async move {
        assert_eq!(
            ask(shard.env(), 0, "anybody?").await,
            Err(CallError::Unreachable)
        );
    });
}

/// Completes every call with what it was asked for, and drops those for shard 9.
struct Echo;

impl RemoteCaller for Echo {
    fn start(&self, to: Address, _: Class, request: Bytes, _: Instant, call: PendingCall) {
        assert!(call.is_wanted());
        if to.shard != ShardId(9) {
            call.complete(Ok(request));
        }
    }
}

#[test]
fn calls_to_other_nodes_go_through_the_plugged_in_caller() {
    on_shard(|shard| async move {
        let env = shard.env();
        let remote = |shard| Address {
            node: NodeId(99),
            ..to(env, shard)
        };
        let ask = |shard| {
            let request = Bytes::from("far away");
            let deadline = env.now() + NEVER;
            env.call(remote(shard), Class::Replication, request, deadline)
        };
        assert_eq!(ask(0).await, Err(CallError::Unreachable));
        shard.set_remote(Rc::new(Echo));
        assert_eq!(ask(0).await, Ok(Bytes::from("far away")));
        assert_eq!(ask(9).await, Err(CallError::Lost));
    });
}

#[test]
fn messages_reach_the_shard_that_they_are_for() {
    on_shards(3, |shard| async move {
        let env = shard.env();
        let (sender, receiver) = std::sync::mpsc::channel();
        for target in [2, 0, 1] {
            let sender = sender.clone();
            shard
                .run_on(ShardId(target), move |there| {
                    sender.send((target, there.env().shard())).unwrap();
                })
                .unwrap();
        }
        assert!(shard.run_on(ShardId(3), |_| ()).is_err());
        let mut seen = Vec::new();
        while seen.len() < 3 {
            seen.extend(receiver.try_recv());
            env.sleep(Duration::from_micros(100)).await;
        }
        assert!(
            seen.iter()
                .all(|(target, shard)| ShardId(*target) == *shard)
        );
    });
}
