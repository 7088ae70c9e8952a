//! What a worker sees of the world: a clock, and connections by number.
//!
//! [`Sockets`] is the real one, on epoll. Tests put a modelled server with a clock of its own in
//! its place, so that what is measured can be held against theory.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use torc_tuning::cpuset::CpuSet;
use torc_tuning::{jitter, probe};

use super::pauses::Pauses;
use super::place::RealTime;

/// Nanoseconds since the run began.
pub type Nanos = u64;

/// A clock and connections. Slots number the connections, open or not.
pub trait World {
    /// The time.
    fn now(&mut self) -> Nanos;
    /// How long this thread was ready to run so far, and something else ran.
    fn delayed(&mut self) -> Nanos;
    /// How long a hypervisor had this thread's CPU so far, on average of those that it may use, in
    /// steps of a hundredth of a second. It may take long to find out.
    fn stolen(&mut self) -> Nanos;
    /// Begins to connect a slot that has no connection.
    fn open(&mut self, slot: usize, address: SocketAddr) -> io::Result<()>;
    /// Whether the connection of `slot` stands; `false` while it is being made.
    fn connected(&mut self, slot: usize) -> io::Result<bool>;
    /// Closes the connection of `slot`.
    fn close(&mut self, slot: usize);
    /// Sends `output` from the front, as far as the connection takes it. What is left is to be
    /// sent when the slot is ready again.
    fn send(&mut self, slot: usize, output: &mut BytesMut) -> io::Result<()>;
    /// Appends all that has come. An error when the connection is closed.
    fn receive(&mut self, slot: usize, input: &mut BytesMut) -> io::Result<()>;
    /// Waits until a slot has something, or until the time `until`, and not much longer. Fills
    /// `ready` with the slots, and notes what held up a thread that polled.
    fn wait(&mut self, until: Nanos, ready: &mut Vec<usize>, pauses: &mut Pauses)
    -> io::Result<()>;
}

/// Bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// Bounds of the stretch before an operation is due that is spent polling, since sleeping
/// overshoots: by some tens of microseconds on most machines, by hundreds in some virtual ones.
const STRETCH_NS: std::ops::Range<Nanos> = 20_000..500_000;
/// By how much that stretch grows when a sleep ends too late, and shrinks when it does not: where
/// the two are in balance, one sleep in a hundred ends too late.
const STRETCH_NS_GROWS: Nanos = 9_900;
const STRETCH_NS_SHRINKS: Nanos = 100;
/// A sleep that would be shorter is polled through: falling asleep and waking up take as long, and at rates whose
/// gaps are that short the hundredth of the sleeps that ends too late would be more than a thousandth of the operations.
const SLEEP_NS_MIN: Nanos = 50_000;
/// How often a thread that polls looks whether others wait for its CPU.
const LOOK_EVERY_NS: Nanos = 100_000_000;
/// One part in so many of its time that a thread waits for its CPU: from the first on it shares the CPU, below the second it
/// has it for itself.
const SHARED_FROM: Nanos = 50;
const ALONE_BELOW: Nanos = 200;
/// Why the kernel cannot assign an address.
const NO_LOCAL_PORT: &str = "no local port is left for a connection to it (net.ipv4.ip_local_port_range; those \
    of connections that were closed within the last minute are not free yet)";
/// Slots reported at a time. Few, so that what is due does not wait for many answers.
const EVENTS_MAX: usize = 32;

/// How a worker waits until an operation is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polls {
    /// It sleeps to the end: least CPU, some tens of microseconds of lag.
    Never,
    /// It sleeps, and polls the last stretch, unless others want its CPU: it would take from the servers
    /// what it measures, and be late all the same.
    LastStretch,
    /// It never sleeps. For a thread that has a CPU of its own: waking up takes its time, most of
    /// all in a virtual machine.
    Always,
}

// Sending and receiving go past the C library, which makes each a point where a thread may be
// cancelled: with 64 bytes a request that is one part in fifty of the client's time.

/// TCP connections on one epoll instance, and the monotonic clock.
pub struct Sockets {
    epoch: Instant,
    /// The same on the machine's monotonic clock.
    epoch_ns: Nanos,
    polls: Polls,
    /// How long before an operation is due a sleep ends, when it ends in time.
    stretch_ns: Nanos,
    company: Company,
    realtime: Option<RealTime>,
    epoll: OwnedFd,
    slots: Vec<Option<Socket>>,
    events: Vec<epoll::Event>,
    scratch: Vec<u8>,
    /// The scheduler's account of this thread; `None` where the kernel keeps none.
    account: Option<File>,
    /// CPUs that this thread may use.
    cpus: CpuSet,
}

struct Socket {
    stream: TcpStream,
    connected: bool,
    /// Whether epoll also reports when the socket takes bytes.
    watches_output: bool,
}

impl Sockets {
    /// A world of `slots` connections, none open, whose time 0 is `epoch`. A thread that has
    /// real-time priority gives what keeps it.
    pub fn new(
        slots: usize,
        epoch: Instant,
        polls: Polls,
        realtime: Option<RealTime>,
    ) -> io::Result<Self> {
        // The kernel rounds sleeps up by 50 us for ordinary threads; 1 ns is the least it takes.
        // Without it the figures are honest still, and the lag tells.
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)).ok();
        Ok(Self {
            epoch,
            epoch_ns: monotonic(epoch),
            polls,
            stretch_ns: STRETCH_NS.start,
            company: Company::default(),
            realtime,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: (0..slots).map(|_| None).collect(),
            events: Vec::with_capacity(EVENTS_MAX),
            scratch: vec![0; READ_BYTES],
            account: File::open("/proc/thread-self/schedstat").ok(),
            cpus: probe::allowed().unwrap_or_default(),
        })
    }

    /// Makes `epoch` time 0.
    pub fn restart(&mut self, epoch: Instant) {
        self.epoch = epoch;
        self.epoch_ns = monotonic(epoch);
        self.company.looked_at = 0;
    }

    /// Fills `ready` with the slots that have something, after so long at most.
    fn poll(&mut self, timeout: Nanos, ready: &mut Vec<usize>) -> io::Result<()> {
        ready.clear();
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(timeout % 1_000_000_000).unwrap_or(0),
        };
        self.events.clear();
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut self.events),
            Some(&timeout),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &self.events {
            let epoll::Event { data, .. } = *event;
            ready.push(usize::try_from(data.u64()).expect("a slot number"));
        }
        Ok(())
    }

    /// A sleep ended by so much too late.
    fn slept(&mut self, late: Nanos) {
        let stretch = if late > self.stretch_ns {
            self.stretch_ns + STRETCH_NS_GROWS
        } else {
            self.stretch_ns.saturating_sub(STRETCH_NS_SHRINKS)
        };
        self.stretch_ns = stretch.clamp(STRETCH_NS.start, STRETCH_NS.end);
    }

    /// Looks now and then whether others want this thread's CPU.
    fn look_around(&mut self, now: Nanos) {
        if self.polls == Polls::LastStretch && self.company.is_due(now) {
            let waited = self.delayed();
            self.company.note(now, waited);
        }
    }

    fn watch(&mut self, slot: usize, output: bool) -> io::Result<()> {
        let socket = open_socket(&mut self.slots, slot)?;
        if socket.watches_output != output {
            epoll::modify(&self.epoll, &socket.stream, data(slot), interest(output))?;
            socket.watches_output = output;
        }
        Ok(())
    }
}

/// Whether a thread shares its CPU with others, as far as is known.
#[derive(Default)]
struct Company {
    is_there: bool,
    looked_at: Nanos,
    /// How long the thread had waited for its CPU by then.
    waited: Nanos,
}

impl Company {
    fn is_due(&self, now: Nanos) -> bool {
        now.saturating_sub(self.looked_at) >= LOOK_EVERY_NS
    }

    /// At `now` the thread has waited for its CPU for so long in all.
    fn note(&mut self, now: Nanos, waited: Nanos) {
        let lost = waited.saturating_sub(self.waited);
        let time = now.saturating_sub(self.looked_at);
        let bound = if self.is_there {
            ALONE_BELOW
        } else {
            SHARED_FROM
        };
        self.is_there = lost >= time / bound;
        self.looked_at = now;
        self.waited = waited;
    }
}

/// A moment on the machine's monotonic clock.
fn monotonic(moment: Instant) -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = Duration::try_from(now).unwrap_or_default();
    let then = now.saturating_sub(moment.elapsed());
    Nanos::try_from(then.as_nanos()).unwrap_or(Nanos::MAX)
}

fn open_socket(slots: &mut [Option<Socket>], slot: usize) -> io::Result<&mut Socket> {
    slots[slot]
        .as_mut()
        .ok_or_else(|| io::ErrorKind::NotConnected.into())
}

fn data(slot: usize) -> epoll::EventData {
    epoll::EventData::new_u64(u64::try_from(slot).expect("a slot number fits 64 bits"))
}

fn interest(output: bool) -> epoll::EventFlags {
    let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    flags.set(epoll::EventFlags::OUT, output);
    flags
}

impl World for Sockets {
    fn now(&mut self) -> Nanos {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn delayed(&mut self) -> Nanos {
        let mut text = [0; 64];
        let read = self.account.as_ref().map(|file| file.read_at(&mut text, 0));
        let Some(Ok(length)) = read else {
            return 0;
        };
        // Time on a CPU, time waiting for one, slices.
        let text = std::str::from_utf8(&text[..length]).unwrap_or("");
        let waited = text.split_whitespace().nth(1);
        waited.and_then(|word| word.parse().ok()).unwrap_or(0)
    }

    fn stolen(&mut self) -> Nanos {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let own = jitter::stolen_us(&text).filter(|(cpu, _)| self.cpus.contains(*cpu));
        let sum: u64 = own.map(|(_, stolen_us)| stolen_us).sum();
        sum * 1000 / u64::try_from(self.cpus.len().max(1)).expect("a small number")
    }

    fn open(&mut self, slot: usize, address: SocketAddr) -> io::Result<()> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM.nonblocking().cloexec(),
            None,
        )?;
        socket.set_tcp_nodelay(true)?;
        // Closed by us, its port would be taken for a minute, and the next phase needs as many again. Nothing
        // that is under way then is waited for anyhow.
        socket.set_linger(Some(Duration::ZERO))?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                return Err(io::Error::new(error.kind(), NO_LOCAL_PORT));
            }
            Err(error) => return Err(error),
        }
        let stream = TcpStream::from(socket);
        epoll::add(&self.epoll, &stream, data(slot), interest(true))?;
        self.slots[slot] = Some(Socket {
            stream,
            connected: false,
            watches_output: true,
        });
        Ok(())
    }

    fn connected(&mut self, slot: usize) -> io::Result<bool> {
        let socket = open_socket(&mut self.slots, slot)?;
        if !socket.connected {
            if let Some(error) = socket.stream.take_error()? {
                return Err(error);
            }
            socket.connected = socket.stream.peer_addr().is_ok();
            if socket.connected {
                self.watch(slot, false)?;
                return Ok(true);
            }
        }
        Ok(open_socket(&mut self.slots, slot)?.connected)
    }

    fn close(&mut self, slot: usize) {
        // Closing the descriptor takes it out of the epoll set.
        self.slots[slot] = None;
    }

    fn send(&mut self, slot: usize, output: &mut BytesMut) -> io::Result<()> {
        while !output.is_empty() {
            let socket = open_socket(&mut self.slots, slot)?;
            match rustix::io::write(&socket.stream, output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                // Clearing keeps the whole buffer; advancing gives its front away.
                Ok(sent) if sent == output.len() => output.clear(),
                Ok(sent) => output.advance(sent),
                Err(Errno::AGAIN) => return self.watch(slot, true),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.slots[slot]
            .as_ref()
            .is_some_and(|one| one.watches_output)
        {
            self.watch(slot, false)?;
        }
        Ok(())
    }

    fn receive(&mut self, slot: usize, input: &mut BytesMut) -> io::Result<()> {
        loop {
            let socket = open_socket(&mut self.slots, slot)?;
            match rustix::io::read(&socket.stream, &mut self.scratch[..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    input.extend_from_slice(&self.scratch[..count]);
                    if count < READ_BYTES {
                        return Ok(());
                    }
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(
        &mut self,
        until: Nanos,
        ready: &mut Vec<usize>,
        pauses: &mut Pauses,
    ) -> io::Result<()> {
        let mut before = self.now();
        self.look_around(before);
        loop {
            if let Some(realtime) = &mut self.realtime {
                realtime.keep(self.epoch_ns + before);
            }
            let left = until.saturating_sub(before);
            let sleep = match self.polls {
                Polls::Never => left,
                Polls::LastStretch if self.company.is_there => left,
                Polls::LastStretch => match left.saturating_sub(self.stretch_ns) {
                    ..SLEEP_NS_MIN => 0,
                    sleep => sleep,
                },
                Polls::Always => 0,
            };
            self.poll(sleep, ready)?;
            let now = self.now();
            if let Some(realtime) = self.realtime.as_mut().filter(|_| sleep > 0) {
                realtime.slept(now - before);
            }
            if sleep == 0 {
                pauses.polled(now - before);
            } else if ready.is_empty() {
                self.slept(now.saturating_sub(before + sleep));
            }
            if !ready.is_empty() || now >= until {
                return Ok(());
            }
            before = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sockets(polls: Polls) -> Sockets {
        Sockets::new(1, Instant::now(), polls, None).unwrap()
    }

    #[test]
    fn the_stretch_that_is_polled_grows_with_late_sleeps_and_shrinks_slowly_without() {
        let mut sockets = sockets(Polls::LastStretch);
        // Of a hundred sleeps all but one are 100 us late, and that one a millisecond.
        for _ in 0..100 {
            sockets.slept(1_000_000);
            for _ in 1..100 {
                sockets.slept(100_000);
            }
        }
        let stretch = sockets.stretch_ns;
        assert!((100_000..120_000).contains(&stretch), "{stretch}");
        for _ in 0..100_000 {
            sockets.slept(1_000_000);
        }
        assert_eq!(sockets.stretch_ns, STRETCH_NS.end);
        for _ in 0..100_000 {
            sockets.slept(0);
        }
        assert_eq!(sockets.stretch_ns, STRETCH_NS.start);
    }

    #[test]
    fn a_thread_that_waits_for_its_cpu_stops_polling_until_it_has_it_for_itself() {
        let mut company = Company::default();
        let mut at = |now_ms: Nanos, waited_ms: Nanos| {
            company.note(now_ms * 1_000_000, waited_ms * 1_000_000);
            company.is_there
        };
        assert!(!at(1_000, 19), "less than a fiftieth");
        assert!(at(2_000, 39), "a fiftieth");
        assert!(at(3_000, 44), "less, and still not alone");
        assert!(!at(4_000, 48), "less than a two-hundredth");
        assert!(!at(5_000, 48));
    }

    #[test]
    fn what_the_hypervisor_takes_is_counted_for_the_own_cpus_alone() {
        let mut sockets = sockets(Polls::Never);
        assert!(!sockets.cpus.is_empty());
        let own = sockets.stolen();
        sockets.cpus = CpuSet::of(u32::MAX);
        assert_eq!(sockets.stolen(), 0, "there is no such CPU");
        sockets.cpus = probe::allowed().unwrap();
        assert!(sockets.stolen() >= own, "it only grows");
    }

    #[test]
    fn only_a_thread_that_polls_sees_pauses_and_none_wakes_early() {
        const LONG_NS: Nanos = 3_000_000;
        for polls in [Polls::Never, Polls::LastStretch, Polls::Always] {
            let mut sockets = sockets(polls);
            let (mut ready, mut pauses) = (vec![7], Pauses::default());
            let until = sockets.now() + LONG_NS;
            sockets.wait(until, &mut ready, &mut pauses).unwrap();
            assert!(sockets.now() >= until && ready.is_empty());
            let polled = pauses.polled_ns;
            match polls {
                Polls::Never => assert_eq!(polled, 0),
                // A sleep may end too late for any polling.
                Polls::LastStretch => {}
                Polls::Always => assert!(polled + 1_000 >= LONG_NS, "{polled}"),
            }
        }
    }
}
