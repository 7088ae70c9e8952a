//! What a worker sees of the world: a clock, and connections by number.
//!
//! [`Sockets`] is the real one, on epoll. Tests put a modelled server with a clock of its own in
//! its place, so that what is measured can be held against theory.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use bytes::{Buf, BytesMut};
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

/// Nanoseconds since the run began.
pub type Nanos = u64;

/// A clock and connections. Slots number the connections, open or not.
pub trait World {
    /// The time.
    fn now(&mut self) -> Nanos;
    /// How long this thread was ready to run so far, and something else ran.
    fn delayed(&mut self) -> Nanos;
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
    /// `ready` with the slots.
    fn wait(&mut self, until: Nanos, ready: &mut Vec<usize>) -> io::Result<()>;
}

/// Bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// Sleeping overshoots by some tens of microseconds; the last stretch is spent polling.
const SPIN_NS: Nanos = 60_000;
/// Slots reported at a time. Few, so that what is due does not wait for many answers.
const EVENTS_MAX: usize = 32;

// Sending and receiving go past the C library, which makes each a point where a thread may be
// cancelled: with 64 bytes a request that is one part in fifty of the client's time.

/// TCP connections on one epoll instance, and the monotonic clock.
pub struct Sockets {
    epoch: Instant,
    spin_ns: Nanos,
    epoll: OwnedFd,
    slots: Vec<Option<Socket>>,
    events: Vec<epoll::Event>,
    scratch: Vec<u8>,
    /// The scheduler's account of this thread; `None` where the kernel keeps none.
    account: Option<File>,
}

struct Socket {
    stream: TcpStream,
    connected: bool,
    /// Whether epoll also reports when the socket takes bytes.
    watches_output: bool,
}

impl Sockets {
    /// A world of `slots` connections, none open, whose time 0 is `epoch`. Without `spin` the
    /// worker sleeps to the end: less CPU, some tens of microseconds of lag.
    pub fn new(slots: usize, epoch: Instant, spin: bool) -> io::Result<Self> {
        // The kernel rounds sleeps up by 50 us for ordinary threads; 1 ns is the least it takes.
        // Without it the figures are honest still, and the lag tells.
        rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1)).ok();
        Ok(Self {
            epoch,
            spin_ns: if spin { SPIN_NS } else { 0 },
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: (0..slots).map(|_| None).collect(),
            events: Vec::with_capacity(EVENTS_MAX),
            scratch: vec![0; READ_BYTES],
            account: File::open("/proc/thread-self/schedstat").ok(),
        })
    }

    /// Makes `epoch` time 0.
    pub fn restart(&mut self, epoch: Instant) {
        self.epoch = epoch;
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

    fn open(&mut self, slot: usize, address: SocketAddr) -> io::Result<()> {
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM.nonblocking().cloexec(),
            None,
        )?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&address.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
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

    fn wait(&mut self, until: Nanos, ready: &mut Vec<usize>) -> io::Result<()> {
        ready.clear();
        let left = until
            .saturating_sub(self.now())
            .saturating_sub(self.spin_ns);
        let timeout = Timespec {
            tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(left % 1_000_000_000).unwrap_or(0),
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
}
