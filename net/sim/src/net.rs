//! The simulated network: calls between hosts over links that delay, lose and break, and calls
//! between the shards of a host over its mesh.
//!
//! What a failed call says is true: `Unreachable`, `Overloaded` and `WrongNode` mean that no
//! handler ever sees the request, `Lost` that one may, even after the caller's deadline.

use std::collections::BTreeMap;
use std::rc::Rc;

use torc_env::{Address, Bytes, CallError, Class, Instant, NodeId, Origin, ShardId};
use xxhash_rust::xxh3::xxh3_64;

use crate::host::{HostId, Life};
use crate::log::Event;
use crate::oneshot;
use crate::options::NetOptions;
use crate::tasks::{Kind, Owner};
use crate::timer::Sleep;
use crate::world::World;

type Answer = Result<Bytes, CallError>;

/// A call that waits for its answer.
struct Open {
    from: HostId,
    to: HostId,
    to_shard: ShardId,
    sender: oneshot::Sender<Answer>,
}

/// Links and the calls that are open on them.
pub(crate) struct Network {
    pub(crate) options: NetOptions,
    /// Directed pairs between which nothing passes, with the time (ns) from which the sender knows.
    blocked: BTreeMap<(HostId, HostId), u64>,
    open: BTreeMap<u64, Open>,
}

impl Network {
    pub(crate) fn new(options: NetOptions) -> Self {
        Self {
            options,
            blocked: BTreeMap::new(),
            open: BTreeMap::new(),
        }
    }

    fn is_blocked(&self, from: HostId, to: HostId) -> bool {
        self.blocked.contains_key(&(from, to))
    }

    /// Whether `from` has noticed that its link to `to` is dead, in either direction.
    fn is_known_dead(&self, from: HostId, to: HostId, now_ns: u64) -> bool {
        [(from, to), (to, from)]
            .iter()
            .any(|link| self.blocked.get(link).is_some_and(|known| *known <= now_ns))
    }
}

/// A request on its way.
#[derive(Clone)]
struct Request {
    call: u64,
    origin: Origin,
    from: HostId,
    to: HostId,
    life: Life,
    shard: ShardId,
    class: Class,
    payload: Bytes,
}

/// How a call begins.
enum Start {
    Refused { error: CallError, after_us: u64 },
    Sent(oneshot::Receiver<Answer>),
}

impl World {
    /// Lets messages from one host to another pass, or not.
    pub(crate) fn set_blocked(self: &Rc<Self>, from: HostId, to: HostId, blocked: bool) {
        self.record(
            Event::Link,
            from.number() << 16 | to.number(),
            u64::from(blocked),
        );
        let mut network = self.network.borrow_mut();
        if !blocked {
            network.blocked.remove(&(from, to));
            return;
        }
        let detect = network.options.detect_us.clone();
        let after_us = self.streams.borrow_mut().net.within(detect);
        let known_ns = self.now_ns().saturating_add(after_us.saturating_mul(1000));
        network.blocked.insert((from, to), known_ns);
        drop(network);
        self.schedule(known_ns, move |world| {
            if world.network.borrow().is_blocked(from, to) {
                world.break_link(from, to);
            }
        });
    }

    /// Breaks the connections between two hosts: every open call on them is lost. New calls may
    /// pass at once.
    pub(crate) fn break_link(&self, a: HostId, b: HostId) {
        self.record(Event::Link, a.number() << 16 | b.number(), 2);
        self.fail_open(|open| (open.from, open.to) == (a, b) || (open.from, open.to) == (b, a));
    }

    /// A host died: callers lose what it had not answered, its own calls are forgotten.
    pub(crate) fn lose_calls(&self, host: HostId) {
        self.fail_open(|open| open.from == host || open.to == host);
    }

    fn fail_open(&self, matches: impl Fn(&Open) -> bool) {
        let failed: Vec<Open> = {
            let mut network = self.network.borrow_mut();
            let open = std::mem::take(&mut network.open);
            let (failed, kept): (BTreeMap<_, _>, BTreeMap<_, _>) =
                open.into_iter().partition(|(_, open)| matches(open));
            network.open = kept;
            failed.into_values().collect()
        };
        for open in failed {
            open.sender.send(Err(CallError::Lost));
        }
    }

    pub(crate) async fn call(
        self: Rc<Self>,
        from: (HostId, Life, ShardId),
        to: Address,
        class: Class,
        payload: Bytes,
        deadline: Instant,
    ) -> Answer {
        let call = self.next_sequence();
        match self.start_call(call, from, to, class, payload, deadline) {
            Start::Refused { error, after_us } => {
                let at = self.now_ns().saturating_add(after_us.saturating_mul(1000));
                Sleep::until(self.clone(), at.min(deadline.0)).await;
                Err(error)
            }
            Start::Sent(receiver) => {
                let closing = CloseCall {
                    world: self.clone(),
                    call,
                };
                let expired = Sleep::until(self.clone(), deadline.0);
                let answer = futures_util::future::select(receiver, expired).await;
                drop(closing);
                match answer {
                    futures_util::future::Either::Left((Some(answer), _)) => answer,
                    _ => Err(CallError::Lost),
                }
            }
        }
    }

    fn start_call(
        self: &Rc<Self>,
        call: u64,
        (from, from_life, from_shard): (HostId, Life, ShardId),
        to: Address,
        class: Class,
        payload: Bytes,
        deadline: Instant,
    ) -> Start {
        let refused = |error, after_us| Start::Refused { error, after_us };
        if !self.is_alive(from, from_life) || deadline.0 <= self.now_ns() {
            return refused(CallError::Unreachable, 0);
        }
        let node = self.node(from);
        let local = to.node == node;
        let rtt_us = {
            let network = self.network.borrow();
            let delay = network.options.delay_us.clone();
            self.streams.borrow_mut().net.within(delay)
        };
        let target = if local {
            Some(from)
        } else {
            HostId::at(to.host)
        };
        let Some(target) = target.filter(|target| target.index() < self.hosts.borrow().len())
        else {
            return refused(CallError::Unreachable, rtt_us);
        };
        let (is_up, life, shards, target_node) = {
            let hosts = self.hosts.borrow();
            let host = &hosts[target.index()];
            (host.up, host.life, host.shards, host.node)
        };
        if !local {
            let network = self.network.borrow();
            if !is_up || network.is_known_dead(from, target, self.now_ns()) {
                return refused(CallError::Unreachable, rtt_us);
            }
            if to.node != NodeId::default() && to.node != target_node {
                return refused(CallError::WrongNode, rtt_us);
            }
        }
        let shard = if to.shard.0 < shards {
            to.shard
        } else {
            ShardId(0)
        };
        if !local && self.draw(|net| net.overload) {
            return refused(CallError::Overloaded, 0);
        }
        if local && self.mesh_is_full(from, shard) {
            return refused(CallError::Overloaded, 0);
        }
        let (sender, receiver) = oneshot::channel();
        self.network.borrow_mut().open.insert(
            call,
            Open {
                from,
                to: target,
                to_shard: shard,
                sender,
            },
        );
        self.record(Event::Send, call, xxh3_64(&payload));
        let request = Request {
            call,
            origin: Origin {
                node,
                shard: from_shard,
            },
            from,
            to: target,
            life,
            shard,
            class,
            payload,
        };
        self.carry(request, local);
        Start::Sent(receiver)
    }

    /// Sets a request under way, or loses it.
    fn carry(self: &Rc<Self>, request: Request, local: bool) {
        if local {
            let delay_us = self.mesh_delay_us();
            self.schedule_after_us(delay_us, move |world| world.deliver(request));
            return;
        }
        if self.draw(|net| net.loss) {
            return;
        }
        if request.class != Class::Foreground && self.draw(|net| net.duplicate) {
            let again = request.clone();
            let delay_us = self.delay_us();
            self.schedule_after_us(delay_us, move |world| world.deliver(again));
        }
        let delay_us = self.delay_us();
        self.schedule_after_us(delay_us, move |world| world.deliver(request));
    }

    /// Hands a request to its handler, unless the link or the process is gone.
    fn deliver(self: &Rc<Self>, request: Request) {
        let handler = {
            let hosts = self.hosts.borrow();
            let host = &hosts[request.to.index()];
            if !host.is_alive(request.life)
                || self.network.borrow().is_blocked(request.from, request.to)
            {
                return;
            }
            host.handlers[usize::from(request.shard.0)].clone()
        };
        self.record(Event::Deliver, request.call, 0);
        let Some(handler) = handler else {
            // Nothing serves there yet: the connection is refused before the request is sent.
            return self.answer(request.call, Err(CallError::Unreachable));
        };
        let answering = handler(request.origin, request.payload);
        let world = self.clone();
        let (call, from, to) = (request.call, request.from, request.to);
        let task = async move {
            let answer = answering.await;
            world.carry_answer(call, (to, from), answer);
        };
        self.spawn(
            Owner::Host(request.to, request.life),
            Kind::Shard(request.class),
            Box::pin(task),
        );
    }

    fn carry_answer(self: &Rc<Self>, call: u64, (from, to): (HostId, HostId), answer: Bytes) {
        let local = from == to;
        if !local && self.draw(|net| net.loss) {
            return;
        }
        let delay_us = if local {
            self.mesh_delay_us()
        } else {
            self.delay_us()
        };
        self.record(Event::Send, call, xxh3_64(&answer));
        self.schedule_after_us(delay_us, move |world| {
            if !world.network.borrow().is_blocked(from, to) {
                world.answer(call, Ok(answer));
            }
        });
    }

    fn answer(&self, call: u64, answer: Answer) {
        let open = self.network.borrow_mut().open.remove(&call);
        if let Some(open) = open {
            self.record(Event::Answer, call, u64::from(answer.is_ok()));
            open.sender.send(answer);
        }
    }

    fn mesh_is_full(&self, host: HostId, shard: ShardId) -> bool {
        let network = self.network.borrow();
        let most = network.options.mesh_calls_max;
        network.open.len() >= most
            && network
                .open
                .values()
                .filter(|open| open.from == host && open.to == host && open.to_shard == shard)
                .count()
                >= most
    }

    fn draw(&self, knob: impl Fn(&NetOptions) -> f64) -> bool {
        let p = knob(&self.network.borrow().options);
        self.streams.borrow_mut().net.chance(p)
    }

    fn delay_us(&self) -> u64 {
        let network = self.network.borrow();
        let rng = &mut self.streams.borrow_mut().net;
        let range = if rng.chance(network.options.late) {
            network.options.late_us.clone()
        } else {
            network.options.delay_us.clone()
        };
        rng.within(range)
    }

    fn mesh_delay_us(&self) -> u64 {
        let range = self.network.borrow().options.mesh_us.clone();
        self.streams.borrow_mut().net.within(range)
    }

    fn node(&self, host: HostId) -> NodeId {
        self.hosts.borrow()[host.index()].node
    }
}

/// Forgets the call when its caller stops waiting.
struct CloseCall {
    world: Rc<World>,
    call: u64,
}

impl Drop for CloseCall {
    fn drop(&mut self) {
        let open = self.world.network.borrow_mut().open.remove(&self.call);
        drop(open);
    }
}
