//! Opening the connections of a worker before its load begins.
//!
//! Only so many are under way at a time, and one is looked at when something has happened to it: the whole
//! takes a time that grows with their number and not with its square. Where the protocol has the server answer
//! before it is asked for anything, one is under way until it does: no backlog overflows then, and a server that
//! lets everybody in and has room for some alone is found out.

use std::collections::VecDeque;

use super::{CHECK_EVERY_NS, CLOSED, CONNECT_WITHIN_NS, NOT_ACCEPTED, Worker};
use crate::load::recorder::Status;
use crate::load::world::{Nanos, World};
use std::sync::atomic::Ordering;

/// Time in which all must stand, and so much more for each. Servers accept tens of thousands a second.
const ALL_WITHIN_NS: Nanos = 5_000_000_000;
const EACH_WITHIN_NS: Nanos = 2_000_000;
/// Before the kernel asks again for a connection that found no room, which is after a second, we do: after so long, or
/// so many times as long as the fastest took, and twice as long each time.
const PATIENCE_NS_MIN: Nanos = 50_000_000;
const PATIENCE_OF_FASTEST: Nanos = 4;
const PATIENCE_DOUBLINGS_MAX: usize = 5;
/// Why a connection that is accepted does not stand.
const NOT_GREETED: &str = "accepted and not greeted in time";
/// What may be done about connections that do not stand, by words of the reason.
const REMEDIES: [(&str, &str); 7] = [
    ("refused", "is a server running there?"),
    (
        NOT_ACCEPTED,
        "a server's queue for new connections is full (its backlog, net.core.somaxconn and \
         net.ipv4.tcp_max_syn_backlog there), or packets are dropped on the way (a firewall, its table of \
         connections)",
    ),
    (
        NOT_GREETED,
        "does the server speak this --protocol, and has it a thread to spare?",
    ),
    (
        CLOSED,
        "a server may have no room for more: its limit of connections (maxclients of Redis, -c of memcached) or \
         of open files",
    ),
    (
        "NOAUTH",
        "give --password-file, or the password in TORC_LOAD_PASSWORD",
    ),
    (
        "max number of clients",
        "raise its limit of connections (maxclients of Redis) or use fewer --connections",
    ),
    (
        "open files",
        "raise the hard limit of open files (ulimit -Hn, LimitNOFILE) or use several --agents",
    ),
];

/// How far connecting came.
pub struct Connected {
    /// Connections that stand.
    pub standing: usize,
    /// Why not all do, with what may be done about it.
    pub missing: Option<String>,
}

impl<W: World> Worker<'_, W> {
    /// Opens all connections and waits until each stands and the server has greeted. In a time that is bounded
    /// all do, or it tells why not.
    ///
    /// # Errors
    /// When the machine cannot wait for sockets.
    pub fn connect(&mut self) -> std::io::Result<Connected> {
        let begun = self.world.now();
        let count = self.slots.len();
        let each = EACH_WITHIN_NS * u64::try_from(count).expect("a small number");
        let limit = begun + ALL_WITHIN_NS + each;
        let mut unopened: VecDeque<usize> = (0..count).collect();
        let mut under_way: Vec<usize> = Vec::new();
        let mut standing = 0;
        let mut fastest = CONNECT_WITHIN_NS;
        let (mut ready, mut next_check) = (Vec::new(), begun);
        let mut why = None;
        let missing = loop {
            let now = self.world.now();
            if now >= next_check {
                next_check = now + CHECK_EVERY_NS;
                for number in std::mem::take(&mut under_way) {
                    let slot = &self.slots[number];
                    let (limit, why) = match slot.connected {
                        true => (CONNECT_WITHIN_NS, NOT_GREETED),
                        false => (patience(fastest, slot.attempts), NOT_ACCEPTED),
                    };
                    if now.saturating_sub(slot.since) > limit {
                        self.drop_connection(number, Status::InDoubt, why);
                        unopened.push_back(number);
                    } else {
                        under_way.push(number);
                    }
                }
            }
            // Those that have to wait before they are opened again are behind all others, in that order.
            while under_way.len() < self.settings.opening
                && let Some(number) = unopened.front().copied()
                && self.slots[number].since <= now
            {
                unopened.pop_front();
                self.reconnect(number, now);
                match self.slots[number].connection {
                    Some(_) => under_way.push(number),
                    None => unopened.push_back(number),
                }
            }
            why = self.why_broken.take().or(why);
            if standing == count || self.shared.stop.load(Ordering::Relaxed) {
                break None;
            }
            if now >= limit {
                let why = why.unwrap_or_else(|| "they take too long".into());
                break Some(with_remedy(&why));
            }
            let pauses = &mut self.recorder.health.pauses;
            self.world.wait(now + CHECK_EVERY_NS, &mut ready, pauses)?;
            for number in ready.drain(..) {
                let stood = self.stands(number);
                let accepted = self.slots[number].connected;
                self.receive(number);
                if !accepted && self.slots[number].connected {
                    let took = self.world.now().saturating_sub(self.slots[number].since);
                    fastest = fastest.min(took);
                }
                let stands = self.stands(number);
                standing += usize::from(stands);
                standing -= usize::from(stood);
                let broke = self.slots[number].connection.is_none();
                if let Some(place) = under_way.iter().position(|one| *one == number)
                    && (stands || broke)
                {
                    under_way.swap_remove(place);
                    unopened.extend(broke.then_some(number));
                } else if stood && broke {
                    unopened.push_back(number);
                }
            }
        };
        // The clock may be set back to 0 now.
        for slot in &mut self.slots {
            slot.since = 0;
        }
        self.free_since = 0;
        // What it took until all stood is no part of the run.
        self.recorder.clear();
        self.stolen = self.world.stolen();
        Ok(Connected { standing, missing })
    }

    fn stands(&self, number: usize) -> bool {
        let slot = &self.slots[number];
        let connection = slot.connection.as_ref();
        slot.connected && connection.is_some_and(|connection| connection.greeted())
    }
}

/// How long a connection may take that is tried for the so manieth time.
fn patience(fastest: Nanos, attempts: usize) -> Nanos {
    let doubled = 1 << attempts.saturating_sub(1).min(PATIENCE_DOUBLINGS_MAX);
    let patience = PATIENCE_NS_MIN.max(PATIENCE_OF_FASTEST * fastest) * doubled;
    patience.min(CONNECT_WITHIN_NS)
}

fn with_remedy(why: &str) -> String {
    let remedy = REMEDIES.iter().rev().find(|(words, _)| why.contains(words));
    remedy.map_or(why.to_owned(), |(_, remedy)| format!("{why}; {remedy}"))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::io;
    use std::net::SocketAddr;
    use std::rc::Rc;

    use bytes::BytesMut;

    use super::*;
    use crate::load::pauses::Pauses;
    use crate::load::virtual_world;

    const ACCEPT_NS: Nanos = 20_000;

    /// A server that takes so long to accept a connection, has room for so many that wait for it, and for so
    /// many in all.
    struct Door {
        accept_ns: Nanos,
        backlog: usize,
        room: usize,
        now: Nanos,
        /// Those that wait.
        queue: VecDeque<usize>,
        /// Those that stand for the client, and it does not know yet.
        made: VecDeque<usize>,
        /// What a connection is told.
        told: BTreeMap<usize, &'static [u8]>,
        calls: Rc<RefCell<usize>>,
    }

    impl World for Door {
        fn now(&mut self) -> Nanos {
            self.now
        }

        fn delayed(&mut self) -> Nanos {
            0
        }

        fn stolen(&mut self) -> Nanos {
            0
        }

        fn open(&mut self, slot: usize, _: SocketAddr) -> io::Result<()> {
            *self.calls.borrow_mut() += 1;
            if self.queue.len() < self.backlog {
                self.queue.push_back(slot);
                self.made.push_back(slot);
            }
            Ok(())
        }

        fn connected(&mut self, _: usize) -> io::Result<bool> {
            *self.calls.borrow_mut() += 1;
            Ok(true)
        }

        fn close(&mut self, slot: usize) {
            self.queue.retain(|one| *one != slot);
        }

        fn send(&mut self, _: usize, output: &mut BytesMut) -> io::Result<()> {
            output.clear();
            Ok(())
        }

        fn receive(&mut self, slot: usize, input: &mut BytesMut) -> io::Result<()> {
            input.extend_from_slice(self.told.remove(&slot).unwrap_or_default());
            Ok(())
        }

        fn wait(&mut self, until: Nanos, ready: &mut Vec<usize>, _: &mut Pauses) -> io::Result<()> {
            *self.calls.borrow_mut() += 1;
            ready.clear();
            ready.extend(self.made.drain(..self.made.len().min(32)));
            if !ready.is_empty() {
                return Ok(());
            }
            self.now = until.min(self.now + self.accept_ns);
            if let Some(slot) = self.queue.pop_front() {
                let words: &[u8] = match self.room {
                    0 => b"-ERR max number of clients reached\r\n",
                    _ => b"+PONG\r\n",
                };
                self.room = self.room.saturating_sub(1);
                self.told.insert(slot, words);
                ready.push(slot);
            } else {
                self.now = until;
            }
            Ok(())
        }
    }

    /// How far connecting comes, how long it takes, and how often the world is asked.
    fn connect(count: usize, backlog: usize, room: usize) -> (Connected, Nanos, usize) {
        let calls = Rc::new(RefCell::new(0));
        let door = Door {
            accept_ns: ACCEPT_NS,
            backlog,
            room,
            now: 0,
            queue: VecDeque::new(),
            made: VecDeque::new(),
            told: BTreeMap::new(),
            calls: calls.clone(),
        };
        let (connected, took) = virtual_world::connect(count, door);
        let calls = *calls.borrow();
        (connected, took, calls)
    }

    #[test]
    fn any_number_of_connections_stands_in_the_time_that_the_server_takes() {
        for count in [1, 100, 30_000] {
            let (connected, took, calls) = connect(count, 100, usize::MAX);
            assert_eq!((connected.standing, connected.missing), (count, None));
            let at_least = ACCEPT_NS * u64::try_from(count).unwrap();
            assert!(took <= at_least + CHECK_EVERY_NS, "{took} ns for {count}");
            assert!(calls <= 4 * count, "{calls} for {count}");
        }
    }

    #[test]
    fn what_a_short_backlog_drops_is_tried_again_soon() {
        let (connected, took, _) = connect(1_000, 20, usize::MAX);
        assert_eq!(connected.missing, None);
        assert!(took < 2_000_000_000, "{took}");
    }

    #[test]
    fn where_some_do_not_stand_it_says_why_and_what_helps() {
        let (connected, took, _) = connect(40, 128, 30);
        assert_eq!(connected.standing, 30);
        let words = connected.missing.unwrap();
        assert!(words.contains("max number of clients reached"), "{words}");
        assert!(words.contains("maxclients of Redis"), "{words}");
        assert!((ALL_WITHIN_NS..2 * ALL_WITHIN_NS).contains(&took), "{took}");
        let (connected, ..) = connect(40, 0, 30);
        assert_eq!(connected.standing, 0);
        let words = connected.missing.unwrap();
        assert!(
            words.contains("not accepted") && words.contains("somaxconn"),
            "{words}"
        );
    }
}
