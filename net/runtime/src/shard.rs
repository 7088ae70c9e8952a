//! One shard: its loop, and everything that the loop drives.
//!
//! A turn of the loop takes what others have left (woken tasks, messages of other shards, control
//! messages), fires timers, runs tasks for a quantum, rings the doorbells of the shards that it
//! wrote to, and enters the kernel once: to submit everything that the tick queued, to collect
//! completions, and to sleep if nothing is ready.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use torc_env::{Bytes, CallError, Class, Instant, NodeId, ShardId};

use crate::background::Background;
use crate::calls::{CallId, Calls};
use crate::clock;
use crate::env::{RealEnv, RemoteCaller};
use crate::executor::{Executor, Foreign};
use crate::handle::ShardHandle;
use crate::mesh::{Inbox, Mesh, Reply, Request};
use crate::random::Random;
use crate::reactor::Reactor;
use crate::reclaim::Reclaim;
use crate::spin::Spin;
use crate::timer::Timers;

/// How long a stopping shard waits for the kernel to finish its operations.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// A spinning shard reads the clock at every n-th look.
const SPINS_PER_CLOCK: u32 = 32;

/// A message to a shard: something to do there.
pub(crate) type Control = Box<dyn FnOnce(&ShardHandle) + Send>;

/// Control messages that wait for a shard at most.
pub(crate) const CONTROL_MESSAGES_MAX: usize = 1024;

/// What all threads know of one shard.
pub(crate) struct ShardEnds {
    /// Wakes its tasks.
    pub(crate) foreign: Arc<Foreign>,
    /// Things to do there.
    pub(crate) control: ArrayQueue<Control>,
}

/// What all shards of a runtime share.
pub(crate) struct Shared {
    /// By shard index.
    pub(crate) shards: Vec<ShardEnds>,
    /// Set once; every shard then ends.
    pub(crate) stopping: AtomicBool,
    /// Runs background jobs.
    pub(crate) background: Background,
    /// Gives the space of removed files back.
    pub(crate) reclaim: Arc<Reclaim>,
}

impl Shared {
    /// Lets every shard end.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for shard in &self.shards {
            shard.foreign.doorbell.signal();
        }
    }

    /// Leaves a message for a shard; gives it back when the shard does not exist or has too many.
    pub(crate) fn send(&self, to: ShardId, message: Control) -> Result<(), Control> {
        let Some(shard) = self.shards.get(usize::from(to.0)) else {
            return Err(message);
        };
        shard.control.push(message)?;
        shard.foreign.doorbell.ring();
        Ok(())
    }
}

/// The node's data directory.
pub(crate) struct Root {
    pub(crate) fd: Rc<OwnedFd>,
    pub(crate) path: PathBuf,
    /// Whether its file system takes O_DIRECT.
    pub(crate) direct: bool,
}

/// Handles a request from a shard of this node: spawns a task that answers it.
pub(crate) type Handler = Rc<dyn Fn(ShardId, Class, Bytes, ReplyTo)>;

/// Everything of one shard. Lives on its thread.
pub(crate) struct Core {
    pub(crate) executor: Executor,
    pub(crate) reactor: RefCell<Reactor>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) calls: Rc<Calls>,
    pub(crate) mesh: Mesh,
    pub(crate) random: Random,
    pub(crate) node: NodeId,
    pub(crate) shard: ShardId,
    pub(crate) shared: Arc<Shared>,
    pub(crate) root: Root,
    pub(crate) handler: RefCell<Option<Handler>>,
    pub(crate) remote: RefCell<Option<Rc<dyn RemoteCaller>>>,
    pub(crate) spin: Spin,
    /// By CPU: receives, of those that were looked at, whose packets the kernel handled there.
    pub(crate) arrivals: RefCell<BTreeMap<usize, u64>>,
}

impl Core {
    fn ends(&self) -> &ShardEnds {
        &self.shared.shards[usize::from(self.shard.0)]
    }

    /// Gives a request of a shard of this node (itself included) to the registered handler.
    pub(crate) fn handle(self: &Rc<Self>, from: ShardId, request: Request) {
        let reply = ReplyTo {
            core: Rc::clone(self),
            to: from,
            call: Some(request.call),
        };
        if request.deadline <= clock::now() {
            // Nobody waits; the reply only returns the credit.
            return;
        }
        let handler = self.handler.borrow().clone();
        match handler {
            Some(handler) => handler(from, request.class, request.payload, reply),
            None => reply.send(Err(CallError::Unreachable)),
        }
    }

    /// Whether another thread has left something for this shard.
    fn has_input(&self) -> bool {
        self.mesh.has_incoming()
            || self.executor.has_ready()
            || !self.ends().control.is_empty()
            || self.is_stopping()
    }

    fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Acquire)
    }

    /// When the shard must be awake again at the latest.
    fn next_deadline(&self) -> Option<Instant> {
        let timer = self.timers.borrow().next();
        let sweep = self.calls.next_sweep();
        timer.into_iter().chain(sweep).min()
    }

    /// Rings the doorbells of the shards that this tick wrote to.
    fn ring_doorbells(&self) {
        let mut reactor = self.reactor.borrow_mut();
        self.mesh.ring_doorbells(|index, foreign| {
            let sent = foreign
                .doorbell
                .ring_fd()
                .is_some_and(|ring| reactor.send_wake_up(index, ring));
            if !sent {
                foreign.doorbell.signal();
            }
        });
    }

    /// Waits for work: looks for it for a while if so configured, then sleeps.
    fn idle(&self) {
        let now = clock::now();
        let spin = self.spin.budget(now);
        if !spin.is_zero() && self.spin_for_work(now + spin) {
            return;
        }
        let doorbell = &self.ends().foreign.doorbell;
        doorbell.announce_sleep();
        if self.has_input() {
            doorbell.awake();
            return self.reactor.borrow_mut().poll();
        }
        let timeout = self.next_deadline().map(|at| at - clock::now());
        self.reactor.borrow_mut().wait(timeout);
        doorbell.awake();
    }

    /// Looks for work until there is some (true) or the time for it is over.
    fn spin_for_work(&self, until: Instant) -> bool {
        let mut reactor = self.reactor.borrow_mut();
        reactor.poll();
        if reactor.is_writing() {
            return false;
        }
        let until = self.next_deadline().map_or(until, |at| at.min(until));
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if reactor.has_completions() {
                    reactor.poll();
                    return true;
                }
                if self.has_input() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if clock::now() >= until {
                return false;
            }
        }
    }
}

/// Runs a shard until its runtime stops.
pub(crate) fn run(env: &RealEnv) {
    let core = env.core();
    let handle = ShardHandle::new(env.clone());
    let mut woken = Vec::new();
    let mut inbox = Inbox::default();
    while !core.is_stopping() {
        while let Some(message) = core.ends().control.pop() {
            message(&handle);
        }
        core.mesh.take(&mut inbox);
        for reply in inbox.replies.drain(..) {
            core.calls.complete(reply.call, reply.answer);
        }
        for (from, request) in inbox.requests.drain(..) {
            core.handle(from, request);
        }
        let now = clock::now();
        core.timers.borrow_mut().fire(now, &mut woken);
        core.calls.sweep(now, &mut woken);
        woken.drain(..).for_each(Waker::wake);

        let ready = core.executor.tick();

        core.ring_doorbells();
        if ready {
            core.reactor.borrow_mut().poll();
        } else {
            core.idle();
        }
        let mut reactor = core.reactor.borrow_mut();
        reactor.take_woken(&mut woken);
        while let Some(shard) = reactor.take_unwoken() {
            core.mesh.signal(shard);
        }
        drop(reactor);
        woken.drain(..).for_each(Waker::wake);
    }
}

/// Ends a shard: drops its tasks and waits until the kernel has let go of their buffers.
pub(crate) fn end(env: &RealEnv) {
    let core = env.core();
    core.executor.cancel_all();
    drop(core.handler.borrow_mut().take());
    drop(core.remote.borrow_mut().take());
    while core.ends().control.pop().is_some() {}
    if !core.reactor.borrow_mut().drain(DRAIN_PATIENCE) {
        tracing::warn!(
            shard = core.shard.0,
            "the kernel still holds buffers of this shard; they leak"
        );
    }
}

/// Where the answer to a request of this node goes. Dropped without an answer, the call is lost.
pub(crate) struct ReplyTo {
    core: Rc<Core>,
    to: ShardId,
    call: Option<CallId>,
}

impl ReplyTo {
    /// Sends the answer.
    pub(crate) fn send(mut self, answer: Result<Bytes, CallError>) {
        self.finish(answer);
    }

    fn finish(&mut self, answer: Result<Bytes, CallError>) {
        let Some(call) = self.call.take() else { return };
        if self.to == self.core.shard {
            self.core.calls.complete(call, answer);
        } else {
            self.core.mesh.reply(self.to, Reply { call, answer });
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        self.finish(Err(CallError::Lost));
    }
}
