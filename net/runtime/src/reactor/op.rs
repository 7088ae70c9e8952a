//! The operations that the runtime uses, and the future of one in flight.
//!
//! Each constructor pairs an entry with the slot that owns what the entry points to; this is the
//! only place where pointers are handed to the kernel. An operation is queued when its future is
//! first polled, and leaves with the tick.

use std::ffi::CString;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use io_uring::{cqueue, opcode, squeue, types};
use socket2::SockAddr;
use torc_env::AlignedBuf;

use crate::reactor::slot::{Completion, OnDrop, Resource, Slot, State, Vectored};
use crate::shard::Core;
use crate::sys;

/// The kernel's bound on the runs of one vectored send.
const RUNS_MAX: usize = 1024;

/// The kernel moves at most this much in one operation; larger buffers go in several.
const TRANSFER_BYTES_MAX: usize = 1 << 30;

/// `IORING_RECVSEND_POLL_FIRST`: wait for data before the first attempt.
const POLL_FIRST: u16 = 1;

/// An operation in flight.
struct Op {
    core: Rc<Core>,
    /// `None` once the outcome has been taken.
    key: Option<usize>,
}

impl Op {
    /// Queues an operation.
    ///
    /// # Safety
    /// As for `Reactor::start`.
    unsafe fn start(
        core: &Rc<Core>,
        slot: Slot,
        build: impl FnOnce(&mut Resource) -> squeue::Entry,
    ) -> Op {
        // SAFETY: upheld by the caller.
        let key = unsafe { core.reactor.borrow_mut().start(slot, build) };
        Op {
            core: Rc::clone(core),
            key: Some(key),
        }
    }
}

impl Future for Op {
    type Output = Completion;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let key = self.key.expect("an operation is not polled after its end");
        let outcome = self.core.reactor.borrow_mut().poll_slot(key, cx.waker());
        if outcome.is_ready() {
            self.key = None;
        }
        outcome
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let slot = self.core.reactor.borrow_mut().abandon(key);
            drop(slot);
        }
    }
}

fn slot(resource: Resource, fd: Option<&Rc<OwnedFd>>, on_drop: OnDrop) -> Slot {
    Slot {
        state: State::InFlight(None),
        resource,
        fd: fd.cloned(),
        on_drop,
        disk_write: false,
    }
}

fn writing(slot: Slot) -> Slot {
    Slot {
        disk_write: true,
        ..slot
    }
}

/// The count that an operation returned, or its error.
fn count(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// The descriptor that an operation returned, or its error.
fn descriptor(result: i32) -> io::Result<OwnedFd> {
    count(result)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes.min(TRANSFER_BYTES_MAX)).expect("the bound fits")
}

fn target(fd: &Rc<OwnedFd>) -> types::Fd {
    types::Fd(fd.as_raw_fd())
}

/// Reads once, at `offset + at`, into `buf[at..]`.
pub(crate) async fn read(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    offset: u64,
    buf: AlignedBuf,
    at: usize,
) -> (io::Result<usize>, AlignedBuf) {
    let slot = slot(Resource::Aligned(buf), Some(fd), OnDrop::Finish);
    // SAFETY: the entry points into the slot's buffer, to its end and no further.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            let Resource::Aligned(buf) = resource else {
                unreachable!("the slot owns an aligned buffer")
            };
            let rest = &mut buf[at..];
            opcode::Read::new(target(fd), rest.as_mut_ptr(), length(rest.len()))
                .offset(offset + at as u64)
                .build()
        })
    };
    let done = op.await;
    let Resource::Aligned(buf) = done.resource else {
        unreachable!("the slot owned an aligned buffer")
    };
    (count(done.result), buf)
}

/// Writes once, `buf[at..]` at `offset + at`.
pub(crate) async fn write(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    offset: u64,
    buf: AlignedBuf,
    at: usize,
) -> (io::Result<usize>, AlignedBuf) {
    let slot = writing(slot(Resource::Aligned(buf), Some(fd), OnDrop::Finish));
    // SAFETY: the entry points into the slot's buffer, to its end and no further.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            let Resource::Aligned(buf) = resource else {
                unreachable!("the slot owns an aligned buffer")
            };
            let rest = &buf[at..];
            opcode::Write::new(target(fd), rest.as_ptr(), length(rest.len()))
                .offset(offset + at as u64)
                .build()
        })
    };
    let done = op.await;
    let Resource::Aligned(buf) = done.resource else {
        unreachable!("the slot owned an aligned buffer")
    };
    (count(done.result), buf)
}

/// Makes a file durable; with `data_only`, without what reading it back does not need.
pub(crate) async fn sync(core: &Rc<Core>, fd: &Rc<OwnedFd>, data_only: bool) -> io::Result<()> {
    let flags = if data_only {
        types::FsyncFlags::DATASYNC
    } else {
        types::FsyncFlags::empty()
    };
    let slot = writing(slot(Resource::Nothing, Some(fd), OnDrop::Finish));
    // SAFETY: the entry carries no pointer.
    let op = unsafe {
        Op::start(core, slot, |_| {
            opcode::Fsync::new(target(fd)).flags(flags).build()
        })
    };
    count(op.await.result).map(drop)
}

/// Reserves `len` bytes from the start of a file.
pub(crate) async fn allocate(core: &Rc<Core>, fd: &Rc<OwnedFd>, len: u64) -> io::Result<()> {
    let slot = writing(slot(Resource::Nothing, Some(fd), OnDrop::Finish));
    // SAFETY: the entry carries no pointer.
    let op = unsafe {
        Op::start(core, slot, |_| {
            opcode::Fallocate::new(target(fd), len).build()
        })
    };
    count(op.await.result).map(drop)
}

/// Cuts or extends a file. Blocks on kernels whose ring cannot.
pub(crate) async fn truncate(core: &Rc<Core>, fd: &Rc<OwnedFd>, len: u64) -> io::Result<()> {
    use std::os::fd::AsFd;
    if !core.reactor.borrow().features().truncate {
        return sys::truncate(fd.as_fd(), len);
    }
    let slot = writing(slot(Resource::Nothing, Some(fd), OnDrop::Finish));
    // SAFETY: the entry carries no pointer.
    let op = unsafe {
        Op::start(core, slot, |_| {
            opcode::Ftruncate::new(target(fd), len).build()
        })
    };
    count(op.await.result).map(drop)
}

fn path_of(resource: &Resource) -> &CString {
    match resource {
        Resource::Path(path) => path,
        _ => unreachable!("the slot owns a path"),
    }
}

/// Opens a path below a directory.
pub(crate) async fn open(
    core: &Rc<Core>,
    dir: &Rc<OwnedFd>,
    path: &Path,
    flags: i32,
    mode: libc::mode_t,
) -> io::Result<OwnedFd> {
    let slot = slot(Resource::Path(sys::c_path(path)?), Some(dir), OnDrop::Close);
    // SAFETY: the entry points to the slot's path.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            opcode::OpenAt::new(target(dir), path_of(resource).as_ptr())
                .flags(flags | libc::O_CLOEXEC)
                .mode(mode)
                .build()
        })
    };
    descriptor(op.await.result)
}

/// Removes a file below a directory.
pub(crate) async fn unlink(core: &Rc<Core>, dir: &Rc<OwnedFd>, path: &Path) -> io::Result<()> {
    let slot = slot(
        Resource::Path(sys::c_path(path)?),
        Some(dir),
        OnDrop::Finish,
    );
    // SAFETY: the entry points to the slot's path.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            opcode::UnlinkAt::new(target(dir), path_of(resource).as_ptr()).build()
        })
    };
    count(op.await.result).map(drop)
}

/// Removes an empty directory below a directory.
pub(crate) async fn remove_dir(core: &Rc<Core>, dir: &Rc<OwnedFd>, path: &Path) -> io::Result<()> {
    let slot = slot(
        Resource::Path(sys::c_path(path)?),
        Some(dir),
        OnDrop::Finish,
    );
    // SAFETY: the entry points to the slot's path.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            opcode::UnlinkAt::new(target(dir), path_of(resource).as_ptr())
                .flags(libc::AT_REMOVEDIR)
                .build()
        })
    };
    count(op.await.result).map(drop)
}

/// Makes a directory below a directory.
pub(crate) async fn make_dir(core: &Rc<Core>, dir: &Rc<OwnedFd>, path: &Path) -> io::Result<()> {
    let slot = slot(
        Resource::Path(sys::c_path(path)?),
        Some(dir),
        OnDrop::Finish,
    );
    // SAFETY: the entry points to the slot's path.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            opcode::MkDirAt::new(target(dir), path_of(resource).as_ptr())
                .mode(0o755)
                .build()
        })
    };
    count(op.await.result).map(drop)
}

/// Renames a file below a directory.
pub(crate) async fn rename(
    core: &Rc<Core>,
    dir: &Rc<OwnedFd>,
    from: &Path,
    to: &Path,
) -> io::Result<()> {
    let dir_fd = target(dir);
    let rename = |from, to| opcode::RenameAt::new(dir_fd, from, dir_fd, to).build();
    // SAFETY: the entry points to the two paths.
    unsafe { on_two_paths(core, dir, from, to, rename) }.await
}

/// Gives a file below a directory another name.
pub(crate) async fn link(
    core: &Rc<Core>,
    dir: &Rc<OwnedFd>,
    from: &Path,
    to: &Path,
) -> io::Result<()> {
    let dir_fd = target(dir);
    let link = |from, to| opcode::LinkAt::new(dir_fd, from, dir_fd, to).build();
    // SAFETY: the entry points to the two paths.
    unsafe { on_two_paths(core, dir, from, to, link) }.await
}

/// Does something with two paths below a directory.
///
/// # Safety
/// The entry that `build` makes points to the paths that it is given and to nothing else, and names no
/// descriptor but that of `dir`.
async unsafe fn on_two_paths(
    core: &Rc<Core>,
    dir: &Rc<OwnedFd>,
    from: &Path,
    to: &Path,
    build: impl FnOnce(*const libc::c_char, *const libc::c_char) -> squeue::Entry,
) -> io::Result<()> {
    let paths = Resource::Paths(sys::c_path(from)?, sys::c_path(to)?);
    // SAFETY: the paths are the slot's; the caller vouches for the rest.
    let op = unsafe {
        Op::start(core, slot(paths, Some(dir), OnDrop::Finish), |resource| {
            let Resource::Paths(from, to) = resource else {
                unreachable!("the slot owns two paths")
            };
            build(from.as_ptr(), to.as_ptr())
        })
    };
    count(op.await.result).map(drop)
}

/// Accepts one connection.
pub(crate) async fn accept(core: &Rc<Core>, listener: &Rc<OwnedFd>) -> io::Result<OwnedFd> {
    let slot = slot(Resource::Nothing, Some(listener), OnDrop::CancelOrClose);
    // SAFETY: null pointers ask for no address.
    let op = unsafe {
        Op::start(core, slot, |_| {
            opcode::Accept::new(target(listener), std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build()
        })
    };
    descriptor(op.await.result)
}

/// Connects a socket.
pub(crate) async fn connect(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    address: SockAddr,
) -> io::Result<()> {
    let address = Resource::Address(Box::new(address));
    // SAFETY: the entry points to the slot's boxed address.
    let op = unsafe {
        Op::start(core, slot(address, Some(fd), OnDrop::Cancel), |resource| {
            let Resource::Address(address) = resource else {
                unreachable!("the slot owns an address")
            };
            opcode::Connect::new(target(fd), address.as_ptr().cast(), address.len()).build()
        })
    };
    count(op.await.result).map(drop)
}

/// What a receive returned.
pub(crate) struct Received {
    /// Bytes appended to the buffer; 0 at the end of the stream.
    pub(crate) result: io::Result<usize>,
    /// The buffer.
    pub(crate) buf: BytesMut,
    /// Whether the socket held still more when the receive completed.
    pub(crate) more: bool,
}

/// Receives once into the spare capacity of `buf`. With `poll_first` the kernel does not look for
/// data that is unlikely to be there yet.
pub(crate) async fn recv(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    buf: BytesMut,
    poll_first: bool,
) -> Received {
    let slot = slot(Resource::Input(buf), Some(fd), OnDrop::Cancel);
    // SAFETY: the entry points to the spare capacity of the slot's buffer, to its end.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            let Resource::Input(buf) = resource else {
                unreachable!("the slot owns an input buffer")
            };
            let spare = buf.spare_capacity_mut();
            opcode::Recv::new(target(fd), spare.as_mut_ptr().cast(), length(spare.len()))
                .ioprio(if poll_first { POLL_FIRST } else { 0 })
                .build()
        })
    };
    let done = op.await;
    let Resource::Input(mut buf) = done.resource else {
        unreachable!("the slot owned an input buffer")
    };
    let result = count(done.result);
    if let Ok(received) = result {
        // SAFETY: the kernel has written `received` bytes to the start of the spare capacity.
        unsafe { buf.set_len(buf.len() + received) };
    }
    Received {
        result,
        buf,
        more: cqueue::sock_nonempty(done.flags),
    }
}

/// Completes when the socket has something to receive (or has ended); holds no buffer meanwhile.
pub(crate) async fn readable(core: &Rc<Core>, fd: &Rc<OwnedFd>) -> io::Result<()> {
    let events = u32::try_from(libc::POLLIN | libc::POLLRDHUP).expect("poll events are positive");
    let slot = slot(Resource::Nothing, Some(fd), OnDrop::Cancel);
    // SAFETY: the entry carries no pointer.
    let op = unsafe {
        Op::start(core, slot, |_| {
            opcode::PollAdd::new(target(fd), events).build()
        })
    };
    count(op.await.result).map(drop)
}

/// MSG_WAITALL lets the kernel go on after a short send by itself; a peer that is gone is an error
/// and not a signal.
const SEND_FLAGS: i32 = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;

/// Sends the content of `buf` from `at` on, once.
pub(crate) async fn send_buffer(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    buf: BytesMut,
    at: usize,
) -> (io::Result<usize>, BytesMut) {
    let slot = slot(Resource::OutputBuffer(buf), Some(fd), OnDrop::Cancel);
    // SAFETY: the entry points into the content of the slot's buffer, to its end.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            let Resource::OutputBuffer(buf) = resource else {
                unreachable!("the slot owns an output buffer")
            };
            let rest = &buf[at..];
            opcode::Send::new(target(fd), rest.as_ptr(), length(rest.len()))
                .flags(SEND_FLAGS)
                .build()
        })
    };
    let done = op.await;
    let Resource::OutputBuffer(buf) = done.resource else {
        unreachable!("the slot owned an output buffer")
    };
    (count(done.result), buf)
}

/// Sends one run of bytes, once.
pub(crate) async fn send(core: &Rc<Core>, fd: &Rc<OwnedFd>, run: Bytes) -> io::Result<usize> {
    let slot = slot(Resource::Output(run), Some(fd), OnDrop::Cancel);
    // SAFETY: the entry points to the bytes that the slot owns.
    let op = unsafe {
        Op::start(core, slot, |resource| {
            let Resource::Output(run) = resource else {
                unreachable!("the slot owns the bytes")
            };
            opcode::Send::new(target(fd), run.as_ptr(), length(run.len()))
                .flags(SEND_FLAGS)
                .build()
        })
    };
    count(op.await.result)
}

/// Sends up to [`RUNS_MAX`] runs of bytes, once, and hands them back.
pub(crate) async fn send_vectored(
    core: &Rc<Core>,
    fd: &Rc<OwnedFd>,
    runs: Vec<Bytes>,
) -> (io::Result<usize>, Vec<Bytes>) {
    let vectored = Resource::Vectored(Box::new(Vectored::new(runs)));
    // SAFETY: the entry points to the header in the slot's box, which points to vectors and runs
    // that the box owns.
    let op = unsafe {
        Op::start(core, slot(vectored, Some(fd), OnDrop::Cancel), |resource| {
            let Resource::Vectored(vectored) = resource else {
                unreachable!("the slot owns the runs")
            };
            opcode::SendMsg::new(target(fd), vectored.point())
                .flags(SEND_FLAGS.cast_unsigned())
                .build()
        })
    };
    let done = op.await;
    let Resource::Vectored(vectored) = done.resource else {
        unreachable!("the slot owned the runs")
    };
    (count(done.result), vectored.runs)
}

impl Vectored {
    fn new(runs: Vec<Bytes>) -> Vectored {
        // SAFETY: a msghdr of zeroes is valid: null pointers with zero lengths.
        let header = unsafe { std::mem::zeroed() };
        Vectored {
            runs,
            vectors: Vec::new(),
            header,
        }
    }

    /// Lets the vectors point to the runs and the header to the vectors. Valid while `self` is
    /// neither moved nor changed.
    fn point(&mut self) -> *const libc::msghdr {
        self.vectors = self
            .runs
            .iter()
            .take(RUNS_MAX)
            .map(|run| libc::iovec {
                iov_base: run.as_ptr().cast_mut().cast(),
                iov_len: run.len(),
            })
            .collect();
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len();
        &raw const self.header
    }
}

/// Removes the first `sent` bytes from a list of runs.
pub(crate) fn advance(runs: &mut Vec<Bytes>, mut sent: usize) {
    let mut whole = 0;
    while whole < runs.len() && runs[whole].len() <= sent {
        sent -= runs[whole].len();
        whole += 1;
    }
    runs.drain(..whole);
    if sent > 0 {
        runs[0].advance(sent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advancing_drops_whole_runs_and_cuts_the_next() {
        let mut runs: Vec<Bytes> = ["ab", "", "cde", "f"].map(Bytes::from).into();
        advance(&mut runs, 3);
        assert_eq!(runs, ["de", "f"]);
        advance(&mut runs, 3);
        assert!(runs.is_empty());
    }
}
