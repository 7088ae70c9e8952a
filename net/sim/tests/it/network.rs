use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Address, Bytes, CallError, Class, Env, NodeId, ShardId};
use torc_sim::{HostId, NetOptions, Options, SimEnv, Simulation};

const S0: ShardId = ShardId(0);

/// Two hosts; the second echoes after `work`, and counts what it handled.
struct Pair {
    simulation: Simulation,
    a: HostId,
    b: HostId,
    handled: Rc<Cell<u32>>,
}

impl Pair {
    fn new(seed: u64, net: NetOptions, work: Duration) -> Self {
        let options = Options {
            net,
            ..Options::default()
        };
        let simulation = Simulation::new(seed, options);
        let (a, b) = (simulation.add_host(1), simulation.add_host(2));
        let handled = Rc::new(Cell::new(0));
        let pair = Self {
            simulation,
            a,
            b,
            handled,
        };
        pair.serve(work);
        pair
    }

    fn serve(&self, work: Duration) {
        for shard in [0, 1].map(ShardId) {
            let handled = self.handled.clone();
            let env = self.simulation.env(self.b, shard);
            let handler =
                move |_origin, request: Bytes| -> futures_util::future::LocalBoxFuture<_> {
                    let (handled, env) = (handled.clone(), env.clone());
                    Box::pin(async move {
                        handled.set(handled.get() + 1);
                        env.sleep(work).await;
                        request
                    })
                };
            self.simulation.serve(self.b, shard, Rc::new(handler));
        }
    }

    fn call_to(&self, to: Address) -> Result<Bytes, CallError> {
        self.call_in(Class::Foreground, to)
    }

    fn call_in(&self, class: Class, to: Address) -> Result<Bytes, CallError> {
        let call = async move |env: SimEnv| {
            let deadline = env.now() + Duration::from_secs(1);
            let request = Bytes::from_static(b"ping");
            env.call(to, class, request, deadline).await
        };
        self.simulation.run_on(self.a, S0, call).unwrap()
    }

    fn call(&self) -> Result<Bytes, CallError> {
        self.call_to(self.simulation.address(self.b, S0))
    }

    /// Lets everything that is under way arrive.
    fn settle(&self) {
        while self.simulation.step() {}
    }
}

#[test]
fn a_call_is_answered_by_its_handler() {
    let pair = Pair::new(1, NetOptions::default(), Duration::ZERO);
    assert_eq!(pair.call().unwrap(), "ping");
    let mut unknown = pair.simulation.address(pair.b, ShardId(9));
    unknown.node = NodeId::default();
    assert_eq!(pair.call_to(unknown).unwrap(), "ping");
}

#[test]
fn a_call_to_another_node_than_expected_is_not_handled() {
    let pair = Pair::new(1, NetOptions::default(), Duration::ZERO);
    let mut wrong = pair.simulation.address(pair.b, S0);
    wrong.node = NodeId(7);
    assert_eq!(pair.call_to(wrong), Err(CallError::WrongNode));
    assert_eq!(pair.handled.get(), 0);
}

#[test]
fn a_lost_request_or_answer_is_in_doubt() {
    let net = NetOptions {
        loss: 0.5,
        ..NetOptions::default()
    };
    let pair = Pair::new(1, net, Duration::ZERO);
    let answered = (0..100).filter(|_| pair.call().is_ok()).count();
    assert!((10..40).contains(&answered), "{answered} of 100");
    let handled = pair.handled.get() as usize;
    assert!(handled > answered && handled < 100, "{handled}");
}

#[test]
fn a_request_may_be_handled_after_its_deadline() {
    let net = NetOptions {
        late: 1.0,
        ..NetOptions::default()
    };
    let pair = Pair::new(3, net, Duration::ZERO);
    assert_eq!(pair.call(), Err(CallError::Lost));
    assert_eq!(pair.handled.get(), 0);
    pair.settle();
    assert_eq!(pair.handled.get(), 1);
}

#[test]
fn duplicates_come_only_when_asked_for_and_never_of_what_clients_ask() {
    for (duplicate, class, expected) in [
        (0.0, Class::Replication, 1),
        (1.0, Class::Replication, 2),
        (1.0, Class::Foreground, 1),
    ] {
        let net = NetOptions {
            duplicate,
            ..NetOptions::default()
        };
        let pair = Pair::new(3, net, Duration::ZERO);
        let to = pair.simulation.address(pair.b, S0);
        assert!(pair.call_in(class, to).is_ok());
        pair.settle();
        assert_eq!(pair.handled.get(), expected);
    }
}

#[test]
fn a_partition_loses_calls_until_it_is_noticed_and_refuses_them_then() {
    let pair = Pair::new(3, NetOptions::default(), Duration::ZERO);
    pair.simulation.set_blocked(pair.b, pair.a, true);
    assert_eq!(pair.call(), Err(CallError::Lost));
    assert_eq!(pair.handled.get(), 1, "only answers are cut off");
    pair.settle();
    assert_eq!(pair.call(), Err(CallError::Unreachable));
    assert_eq!(pair.handled.get(), 1);
    pair.simulation.set_blocked(pair.b, pair.a, false);
    assert!(pair.call().is_ok());
}

#[test]
fn a_broken_connection_loses_open_calls_at_once() {
    let pair = Pair::new(3, NetOptions::default(), Duration::from_millis(100));
    let start = pair.simulation.now();
    let (breaker, a, b) = (pair.simulation.clone(), pair.a, pair.b);
    pair.simulation.spawn(async move {
        breaker.sleep(Duration::from_millis(50)).await;
        breaker.break_link(a, b);
    });
    assert_eq!(pair.call(), Err(CallError::Lost));
    assert!(pair.simulation.now() - start < Duration::from_millis(60));
}

#[test]
fn a_dead_host_is_unreachable_and_its_open_calls_are_lost() {
    let pair = Pair::new(3, NetOptions::default(), Duration::from_millis(100));
    let (killer, b) = (pair.simulation.clone(), pair.b);
    pair.simulation.spawn(async move {
        killer.sleep(Duration::from_millis(50)).await;
        killer.crash(b, 0);
    });
    assert_eq!(pair.call(), Err(CallError::Lost));
    assert_eq!(pair.call(), Err(CallError::Unreachable));
    pair.simulation.restart(pair.b, 2);
    assert_eq!(
        pair.call(),
        Err(CallError::Unreachable),
        "nothing serves yet"
    );
    pair.serve(Duration::ZERO);
    assert!(pair.call().is_ok());
}

#[test]
fn messages_overtake_each_other() {
    let pair = Pair::new(5, NetOptions::default(), Duration::ZERO);
    let order = Rc::new(RefCell::new(Vec::new()));
    let to = pair.simulation.address(pair.b, S0);
    let seen = order.clone();
    let run = pair.simulation.run_on(pair.a, S0, async move |env| {
        let deadline = env.now() + Duration::from_secs(1);
        let calls = (0..20u8).map(|number| {
            let request = Bytes::copy_from_slice(&[number]);
            let call = env.call(to, Class::Foreground, request, deadline);
            let seen = seen.clone();
            async move {
                let answer = call.await.unwrap();
                seen.borrow_mut().push(answer[0]);
            }
        });
        futures_util::future::join_all(calls).await;
    });
    run.unwrap();
    assert_ne!(*order.borrow(), (0..20).collect::<Vec<_>>());
    assert_eq!(order.borrow().len(), 20);
}

#[test]
fn shards_of_one_host_call_each_other_without_the_network() {
    let net = NetOptions {
        loss: 1.0,
        ..NetOptions::default()
    };
    let pair = Pair::new(5, net, Duration::ZERO);
    let to = pair.simulation.address(pair.b, ShardId(1));
    let answer = pair.simulation.run_on(pair.b, S0, async move |env| {
        let deadline = env.now() + Duration::from_secs(1);
        env.call(to, Class::Foreground, Bytes::new(), deadline)
            .await
    });
    assert_eq!(answer, Some(Ok(Bytes::new())));
}
