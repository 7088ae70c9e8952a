//! What all hosts share: time, events in order, tasks, randomness, the log.
//!
//! Invariant: no `RefCell` of the world is borrowed while a task is polled or dropped, because
//! either may come back here.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::task::Context;

use crate::host::{Host, HostId, Life, PowerCut};
use crate::log::{Event, Log};
use crate::net::Network;
use crate::options::Options;
use crate::rng::Rng;
use crate::tasks::{Kind, Owner, TaskFuture, TaskKey, Tasks};

pub(crate) type Action = Box<dyn FnOnce(&Rc<World>)>;

struct Scheduled {
    at: u64,
    sequence: u64,
    action: Action,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest: the heap gives out its maximum.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

/// Independent streams, so that a draw more in one does not move the others.
pub(crate) struct Streams {
    pub(crate) schedule: Rng,
    pub(crate) disk: Rng,
    pub(crate) net: Rng,
    /// What `Env::random` gives out.
    pub(crate) env: Rng,
}

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) options: Options,
    now_ns: Cell<u64>,
    /// Civil time that has passed besides.
    pub(crate) civil_us: Cell<u64>,
    sequence: Cell<u64>,
    events: RefCell<BinaryHeap<Scheduled>>,
    tasks: RefCell<Tasks>,
    pub(crate) streams: RefCell<Streams>,
    pub(crate) hosts: RefCell<Vec<Host>>,
    pub(crate) network: RefCell<Network>,
    pub(crate) log: RefCell<Log>,
    /// Power cuts that strike when the present poll is over.
    cuts: RefCell<Vec<(HostId, PowerCut)>>,
}

impl World {
    pub(crate) fn new(seed: u64, options: Options) -> Rc<Self> {
        Rc::new(Self {
            seed,
            now_ns: Cell::new(0),
            civil_us: Cell::new(0),
            sequence: Cell::new(0),
            events: RefCell::new(BinaryHeap::new()),
            tasks: RefCell::new(Tasks::new()),
            streams: RefCell::new(Streams {
                schedule: Rng::stream(seed, "schedule"),
                disk: Rng::stream(seed, "disk"),
                net: Rng::stream(seed, "net"),
                env: Rng::stream(seed, "env"),
            }),
            hosts: RefCell::new(Vec::new()),
            network: RefCell::new(Network::new(options.net.clone())),
            log: RefCell::new(Log::new()),
            cuts: RefCell::new(Vec::new()),
            options,
        })
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    pub(crate) fn record(&self, event: Event, a: u64, b: u64) {
        self.log.borrow_mut().record(self.now_ns(), event, a, b);
    }

    pub(crate) fn next_sequence(&self) -> u64 {
        let sequence = self.sequence.get();
        self.sequence.set(sequence + 1);
        sequence
    }

    /// Runs `action` at `at_ns`, or as soon as possible when that has passed.
    pub(crate) fn schedule(&self, at_ns: u64, action: impl FnOnce(&Rc<World>) + 'static) {
        self.events.borrow_mut().push(Scheduled {
            at: at_ns.max(self.now_ns()),
            sequence: self.next_sequence(),
            action: Box::new(action),
        });
    }

    pub(crate) fn schedule_after_us(
        &self,
        delay_us: u64,
        action: impl FnOnce(&Rc<World>) + 'static,
    ) {
        let at = self.now_ns().saturating_add(delay_us.saturating_mul(1000));
        self.schedule(at, action);
    }

    /// Adds a task. One of a dead life never runs.
    pub(crate) fn spawn(&self, owner: Owner, kind: Kind, future: TaskFuture) {
        if let Owner::Host(host, life) = owner
            && !self.is_alive(host, life)
        {
            return;
        }
        self.tasks.borrow_mut().add(owner, kind, future);
    }

    pub(crate) fn is_alive(&self, host: HostId, life: Life) -> bool {
        self.hosts.borrow()[host.index()].is_alive(life)
    }

    /// Does one thing: polls a ready task, or moves time to the next event and lets it happen.
    /// False when there is nothing left to do.
    pub(crate) fn step(self: &Rc<Self>) -> bool {
        self.strike_cuts();
        self.fire_due();
        self.admit_woken();
        let chosen = {
            let mut streams = self.streams.borrow_mut();
            self.tasks
                .borrow_mut()
                .choose(&self.options.schedule, &mut streams.schedule)
        };
        let Some(mut running) = chosen else {
            let next = self.events.borrow().peek().map(|event| event.at);
            let Some(at) = next else { return false };
            self.now_ns.set(at.max(self.now_ns()));
            self.fire_due();
            return true;
        };
        self.record(Event::Poll, running.key.number(), 0);
        let mut context = Context::from_waker(&running.waker);
        let is_done = running.future.as_mut().poll(&mut context).is_ready();
        self.now_ns.set(self.now_ns() + self.options.poll_ns);
        let dead = if is_done {
            // The slot is freed first: the future's own drop may spawn.
            let _absent = self.tasks.borrow_mut().remove(running.key);
            Some(running.future)
        } else {
            self.tasks
                .borrow_mut()
                .put_back(running.key, running.future)
        };
        drop(dead);
        true
    }

    /// Ends a life: its tasks are dropped wherever they stand, its disk keeps what survives, its
    /// open calls are lost.
    pub(crate) fn crash(self: &Rc<Self>, host: HostId, variant: u32) {
        let life = {
            let mut hosts = self.hosts.borrow_mut();
            let state = &mut hosts[host.index()];
            if !state.up {
                return;
            }
            state.up = false;
            state.paused = false;
            state.parked.clear();
            state.power_cut = None;
            state.life
        };
        self.record(Event::Crash, host.number(), u64::from(variant));
        let handlers = std::mem::take(&mut self.hosts.borrow_mut()[host.index()].handlers);
        let dead = self
            .tasks
            .borrow_mut()
            .remove_where(|owner| owner == Owner::Host(host, life));
        drop(dead);
        drop(handlers);
        self.lose_calls(host);
        let seed = self.streams.borrow_mut().disk.number();
        let mut survivors = crate::disk::Survivors::variant(seed, variant);
        self.hosts.borrow_mut()[host.index()]
            .volume
            .cut_power(&mut survivors);
    }

    /// Cuts a host's power as soon as the running task gives way.
    pub(crate) fn cut_soon(&self, host: HostId, cut: PowerCut) {
        self.cuts.borrow_mut().push((host, cut));
    }

    pub(crate) fn pause(&self, host: HostId, paused: bool) {
        let parked = {
            let mut hosts = self.hosts.borrow_mut();
            let state = &mut hosts[host.index()];
            state.paused = paused && state.up;
            if state.paused {
                Vec::new()
            } else {
                std::mem::take(&mut state.parked)
            }
        };
        self.record(Event::Pause, host.number(), u64::from(paused));
        let mut tasks = self.tasks.borrow_mut();
        for key in parked {
            tasks.make_ready(key);
        }
    }

    /// Drops every task and event: without this, tasks and world would keep each other alive.
    pub(crate) fn shut_down(&self) {
        for host in self.hosts.borrow_mut().iter_mut() {
            host.up = false;
        }
        loop {
            let handlers: Vec<_> = self
                .hosts
                .borrow_mut()
                .iter_mut()
                .map(|host| std::mem::take(&mut host.handlers))
                .collect();
            let events = std::mem::take(&mut *self.events.borrow_mut());
            let tasks = self.tasks.borrow_mut().remove_where(|_| true);
            if events.is_empty() && tasks.is_empty() {
                return;
            }
            drop((handlers, events, tasks));
        }
    }

    fn strike_cuts(self: &Rc<Self>) {
        let cuts = std::mem::take(&mut *self.cuts.borrow_mut());
        for (host, cut) in cuts {
            self.crash(host, cut.variant);
        }
    }

    fn fire_due(self: &Rc<Self>) {
        loop {
            let due = {
                let mut events = self.events.borrow_mut();
                match events.peek() {
                    Some(event) if event.at <= self.now_ns() => events.pop(),
                    _ => None,
                }
            };
            let Some(event) = due else { return };
            (event.action)(self);
        }
    }

    /// Lets woken tasks compete: those of paused hosts wait, those of background executors take
    /// their time to be scheduled.
    fn admit_woken(self: &Rc<Self>) {
        let mut tasks = self.tasks.borrow_mut();
        while let Some((key, owner, kind)) = tasks.next_woken() {
            if let Owner::Host(host, _) = owner {
                let mut hosts = self.hosts.borrow_mut();
                let state = &mut hosts[host.index()];
                if state.paused {
                    state.parked.push(key);
                    continue;
                }
                if let Kind::Job { starved } = kind {
                    let range = self.options.background_us.clone();
                    let mut delay_us = self.streams.borrow_mut().schedule.within(range);
                    if starved && state.starved {
                        delay_us += 50_000;
                    }
                    self.schedule_after_us(delay_us, move |world| world.admit_late(key, host));
                    continue;
                }
            }
            tasks.make_ready(key);
        }
    }

    fn admit_late(&self, key: TaskKey, host: HostId) {
        let mut hosts = self.hosts.borrow_mut();
        let state = &mut hosts[host.index()];
        if state.paused && self.tasks.borrow().owner(key).is_some() {
            state.parked.push(key);
        } else {
            self.tasks.borrow_mut().make_ready(key);
        }
    }
}
