//! TCP on a shard's ring.
//!
//! Buffers are owned: a receive takes the buffer and gives it back, a send takes the bytes.
//! Dropping the future of a receive or send cancels it; what a cancelled one has moved already is
//! lost, so cancel only to give a connection up. The net crate batches: one send a connection and
//! tick, see [`RealEnv::end_of_tick`].
//!
//! A socket belongs to a shard from [`TcpListener::adopt`] or [`TcpStream::adopt`] on; before
//! that it is an [`OwnedFd`] that may travel to another one.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use torc_env::Env;

use crate::env::RealEnv;
use crate::reactor::op;
use crate::shard::Core;

/// How a listening socket is made.
#[derive(Clone, Copy, Debug)]
pub struct ListenOptions {
    /// Let the sockets of several shards listen at one address; the kernel spreads the connections.
    pub reuse_port: bool,
    /// Connections that wait to be accepted at most.
    pub backlog: i32,
}

impl Default for ListenOptions {
    fn default() -> Self {
        ListenOptions {
            reuse_port: false,
            backlog: 4096,
        }
    }
}

/// Opens a listening socket; port 0 chooses a free one. Belongs to no shard yet. To let every
/// shard listen at a port that the kernel chose, open the first at port 0 and the others at
/// [`local_addr`] of the first, all with [`ListenOptions::reuse_port`].
pub fn listen(address: SocketAddr, options: ListenOptions) -> io::Result<OwnedFd> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.cloexec(),
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(options.reuse_port)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(options.backlog)?;
    Ok(socket.into())
}

/// The address that a socket is bound to.
pub fn local_addr(socket: &OwnedFd) -> io::Result<SocketAddr> {
    inet(SockRef::from(socket).local_addr()?)
}

fn inet(address: SockAddr) -> io::Result<SocketAddr> {
    address
        .as_socket()
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// A listening socket of a shard.
pub struct TcpListener {
    core: Rc<Core>,
    fd: Rc<OwnedFd>,
}

impl TcpListener {
    /// Opens a listening socket on this shard.
    pub fn bind(
        env: &RealEnv,
        address: SocketAddr,
        options: ListenOptions,
    ) -> io::Result<TcpListener> {
        Ok(TcpListener::adopt(env, listen(address, options)?))
    }

    /// Lets this shard accept from a socket that [`listen`] made.
    pub fn adopt(env: &RealEnv, socket: OwnedFd) -> TcpListener {
        TcpListener {
            core: Rc::clone(env.core()),
            fd: Rc::new(socket),
        }
    }

    /// The address that the listener is bound to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(&self.fd)
    }

    /// Accepts a connection for this shard.
    pub async fn accept(&self) -> io::Result<TcpStream> {
        let socket = self.accept_fd().await?;
        Ok(TcpStream::of(Rc::clone(&self.core), Rc::new(socket)))
    }

    /// Accepts a connection that may still go to another shard.
    pub async fn accept_fd(&self) -> io::Result<OwnedFd> {
        op::accept(&self.core, &self.fd).await
    }
}

/// A TCP connection of a shard. Clones share it, so that one task can receive while another sends;
/// it is closed when the last one is dropped. At most one receive and one send at a time.
#[derive(Clone)]
pub struct TcpStream {
    open: Rc<Open>,
}

struct Open {
    core: Rc<Core>,
    fd: Rc<OwnedFd>,
    /// The last receive left nothing behind, so the next one has to wait.
    drained: Cell<bool>,
    receiving: Cell<bool>,
    sending: Cell<bool>,
    /// Receives so far.
    receives: Cell<u32>,
}

/// One receive in so many is asked on which CPU its packets arrived: a system call that is felt nowhere.
const ARRIVALS_SAMPLED: u32 = 64;

/// Beyond any CPU's number.
const CPU_MAX: usize = 1 << 16;

/// Asserts that a direction of a stream is used by one future at a time.
struct Turn<'a>(&'a Cell<bool>);

impl<'a> Turn<'a> {
    fn take(busy: &'a Cell<bool>) -> Turn<'a> {
        assert!(!busy.replace(true), "one receive and one send at a time");
        Turn(busy)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl TcpStream {
    /// Connects to `address` within `timeout` ([`io::ErrorKind::TimedOut`] after that).
    pub async fn connect(
        env: &RealEnv,
        address: SocketAddr,
        timeout: Duration,
    ) -> io::Result<TcpStream> {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.cloexec(),
            Some(Protocol::TCP),
        )?;
        let stream = TcpStream::adopt(env, socket.into());
        let open = Rc::clone(&stream.open);
        let connecting = pin!(op::connect(&open.core, &open.fd, address.into()));
        match select(connecting, pin!(env.sleep(timeout))).await {
            Either::Left((connected, _)) => connected.map(|()| stream),
            Either::Right(((), _)) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Makes a connected socket a stream of this shard.
    pub fn adopt(env: &RealEnv, socket: OwnedFd) -> TcpStream {
        TcpStream::of(Rc::clone(env.core()), Rc::new(socket))
    }

    fn of(core: Rc<Core>, fd: Rc<OwnedFd>) -> TcpStream {
        TcpStream {
            open: Rc::new(Open {
                core,
                fd,
                drained: Cell::new(false),
                receiving: Cell::new(false),
                sending: Cell::new(false),
                receives: Cell::new(0),
            }),
        }
    }

    /// Notes, now and then, on which CPU the kernel handled this connection's packets.
    fn note_arrival(&self) {
        let receives = self.open.receives.get();
        self.open.receives.set(receives.wrapping_add(1));
        if receives.is_multiple_of(ARRIVALS_SAMPLED)
            && let Ok(cpu) = SockRef::from(&*self.open.fd).cpu_affinity()
            // The kernel's -1 is "none yet".
            && cpu < CPU_MAX
        {
            *self.open.core.arrivals.borrow_mut().entry(cpu).or_insert(0) += 1;
        }
    }

    /// Receives into the spare capacity of `buf`, behind its content, and returns how many bytes
    /// came; 0 at the end of the stream. The content is not touched.
    ///
    /// # Panics
    /// When `buf` has no spare capacity.
    pub async fn recv(&self, buf: BytesMut) -> (io::Result<usize>, BytesMut) {
        assert!(buf.capacity() > buf.len(), "room to receive into");
        let open = &*self.open;
        let _turn = Turn::take(&open.receiving);
        let received = op::recv(&open.core, &open.fd, buf, open.drained.get()).await;
        open.drained.set(!received.more);
        if matches!(received.result, Ok(1..)) {
            self.note_arrival();
        }
        (received.result, received.buf)
    }

    /// Completes when there is something to receive, or the stream has ended. An idle connection
    /// waits here and holds no buffer.
    pub async fn readable(&self) -> io::Result<()> {
        let open = &*self.open;
        let _turn = Turn::take(&open.receiving);
        op::readable(&open.core, &open.fd).await?;
        open.drained.set(false);
        Ok(())
    }

    /// Sends all of `runs`, in order, without copying them together; one system call's worth of
    /// work up to 1024 runs. After an error any part of them may have been sent.
    pub async fn send(&self, mut runs: Vec<Bytes>) -> io::Result<()> {
        let open = &*self.open;
        let _turn = Turn::take(&open.sending);
        runs.retain(|run| !run.is_empty());
        while !runs.is_empty() {
            let sent = if runs.len() == 1 {
                op::send(&open.core, &open.fd, runs[0].clone()).await
            } else {
                let (sent, back) = op::send_vectored(&open.core, &open.fd, runs).await;
                runs = back;
                sent
            };
            op::advance(&mut runs, progress(sent)?);
        }
        Ok(())
    }

    /// Sends all of `buf` and gives it back emptied, with its capacity: the cheapest way for many
    /// small responses that were encoded one after the other. After an error any part may have
    /// been sent.
    pub async fn send_buffer(&self, mut buf: BytesMut) -> (io::Result<()>, BytesMut) {
        let open = &*self.open;
        let _turn = Turn::take(&open.sending);
        let mut at = 0;
        while at < buf.len() {
            let (sent, back) = op::send_buffer(&open.core, &open.fd, buf, at).await;
            buf = back;
            match progress(sent) {
                Ok(count) => at += count,
                Err(error) => {
                    buf.clear();
                    return (Err(error), buf);
                }
            }
        }
        buf.clear();
        (Ok(()), buf)
    }

    /// Ends one or both directions. A receive in flight then sees the end of the stream.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        SockRef::from(&*self.open.fd).shutdown(how)
    }

    /// Whether small sends leave at once (true) or wait to be merged.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        SockRef::from(&*self.open.fd).set_tcp_nodelay(nodelay)
    }

    /// Lets the kernel notice a peer that has vanished: after `idle` without traffic it asks every
    /// `interval`.
    pub fn set_keepalive(&self, idle: Duration, interval: Duration) -> io::Result<()> {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(idle)
            .with_interval(interval);
        SockRef::from(&*self.open.fd).set_tcp_keepalive(&keepalive)
    }

    /// This end's address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(&self.open.fd)
    }

    /// The other end's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        inet(SockRef::from(&*self.open.fd).peer_addr()?)
    }

    /// Takes the socket out, to hand it to another shard. Gives the stream back while clones of it
    /// or operations are alive.
    pub fn into_fd(self) -> Result<OwnedFd, TcpStream> {
        match Rc::try_unwrap(self.open) {
            Ok(Open { fd, core, .. }) => Rc::try_unwrap(fd).map_err(|fd| TcpStream::of(core, fd)),
            Err(open) => Err(TcpStream { open }),
        }
    }
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpStream({})", self.open.fd.as_raw_fd())
    }
}

/// What a send moved; an interrupted one moved nothing, a send of nothing is an error.
fn progress(sent: io::Result<usize>) -> io::Result<usize> {
    match sent {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        other => other,
    }
}
