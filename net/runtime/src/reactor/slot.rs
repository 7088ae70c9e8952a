//! What an operation in flight owns.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Waker;

use bytes::{Bytes, BytesMut};
use socket2::SockAddr;
use torc_env::AlignedBuf;

/// Memory that the kernel may read or write until the operation completes. Moving a value of this
/// type does not move the memory behind it.
pub(super) enum Resource {
    /// Nothing besides the file.
    Nothing,
    /// A sector-aligned buffer of a disk operation.
    Aligned(AlignedBuf),
    /// A receive goes behind the content of this buffer.
    Input(BytesMut),
    /// One run of bytes to send.
    Output(Bytes),
    /// The content of a buffer that goes back to its owner.
    OutputBuffer(BytesMut),
    /// Several runs of bytes to send.
    Vectored(Box<Vectored>),
    /// One path.
    Path(CString),
    /// Two paths.
    Paths(CString, CString),
    /// The address of a peer.
    Address(Box<SockAddr>),
    /// A descriptor that is being closed.
    Closing(OwnedFd),
}

/// A list of byte runs and the structures by which sendmsg finds them.
pub(super) struct Vectored {
    /// The runs; the vectors point into them.
    pub(super) runs: Vec<Bytes>,
    pub(super) vectors: Vec<libc::iovec>,
    pub(super) header: libc::msghdr,
}

/// How an operation ended.
pub(super) struct Completion {
    /// The kernel's result: a count or descriptor, or a negative errno.
    pub(super) result: i32,
    /// Flags of the completion queue entry.
    pub(super) flags: u32,
    /// What the operation owned.
    pub(super) resource: Resource,
}

/// What happens to an operation whose future is dropped before it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnDrop {
    /// It runs to its end (the disk).
    Finish,
    /// It is cancelled (sockets, where it might wait for ever).
    Cancel,
    /// It runs to its end, and the descriptor that it returns is closed.
    Close,
    /// It is cancelled; a descriptor that it returns all the same is closed.
    CancelOrClose,
}

impl OnDrop {
    pub(super) fn cancels(self) -> bool {
        matches!(self, OnDrop::Cancel | OnDrop::CancelOrClose)
    }

    pub(super) fn returns_fd(self) -> bool {
        matches!(self, OnDrop::Close | OnDrop::CancelOrClose)
    }
}

/// Progress of an operation.
pub(super) enum State {
    /// With the kernel; the waker of whoever polled last.
    InFlight(Option<Waker>),
    /// Completed, not yet picked up.
    Done { result: i32, flags: u32 },
    /// With the kernel, and nobody waits any more.
    Orphan,
}

/// One operation.
pub(super) struct Slot {
    pub(super) state: State,
    pub(super) resource: Resource,
    /// Keeps the descriptor from being closed (and its number from being reused) meanwhile.
    #[expect(
        dead_code,
        reason = "owned for as long as the slot lives, never looked at"
    )]
    pub(super) fd: Option<Rc<OwnedFd>>,
    pub(super) on_drop: OnDrop,
    /// Counted in `Reactor::disk_writes`.
    pub(super) disk_write: bool,
}
