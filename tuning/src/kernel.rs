//! What the tool sees of a kernel: small files that it reads, lists and writes.
//!
//! Everything above works on this trait, so that one code serves the machine itself ([`Live`]), a
//! captured host ([`Tree`]) and, in tests, a kernel that refuses, clamps and forgets. What the kernel
//! only tells through system calls appears as files too, under [`CALLS`]: then it is captured,
//! planned, journalled and rolled back like the rest.

mod live;
mod tree;

use std::io;

use thiserror::Error;

pub use live::Live;
pub use tree::{Node, Tree, TreeError};

/// Directory of the files that stand for system calls: `ethtool/<nic>/rx-usecs`,
/// `io_uring/features`, …
pub const CALLS: &str = "/torc";

/// A file that could not be read, listed or written.
#[derive(Debug, Error)]
#[error("{path}: {error}")]
pub struct Refusal {
    /// The file, as the kernel names it.
    pub path: String,
    /// The kernel's answer.
    pub error: io::Error,
}

impl Refusal {
    /// Refusal of `path` with error number `errno`.
    pub fn with_errno(path: &str, errno: i32) -> Self {
        Self {
            path: path.to_owned(),
            error: io::Error::from_raw_os_error(errno),
        }
    }

    /// Whether the file is not there, as opposed to there and closed.
    pub fn is_absent(&self) -> bool {
        self.error.kind() == io::ErrorKind::NotFound
    }
}

/// The files of a kernel. Paths are absolute, as on the machine itself.
pub trait Kernel {
    /// Whole contents.
    fn read(&self, path: &str) -> Result<Vec<u8>, Refusal>;

    /// Names in a directory, numbers in numeric order.
    fn list(&self, path: &str) -> Result<Vec<String>, Refusal>;

    /// Permission bits of a file.
    fn mode(&self, path: &str) -> Result<u32, Refusal>;

    /// The path that is left when every symbolic link is followed.
    fn resolve(&self, path: &str) -> Result<String, Refusal>;

    /// Whether a write would be let in, found out without writing.
    fn writable(&self, path: &str) -> Result<(), Refusal>;

    /// Hands `bytes` to the file in one write. Success only says that the kernel did not refuse.
    fn write(&self, path: &str, bytes: &[u8]) -> Result<(), Refusal>;

    /// Contents as trimmed text; `None` when it is absent, unreadable or no text.
    fn text(&self, path: &str) -> Option<String> {
        let bytes = self.read(path).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        Some(text.trim().to_owned())
    }

    /// Contents as a number.
    fn number<N: std::str::FromStr>(&self, path: &str) -> Option<N>
    where
        Self: Sized,
    {
        self.text(path)?.parse().ok()
    }
}

/// Sorts names so that `rx-10` follows `rx-9`.
pub(crate) fn sort_by_number(names: &mut [String]) {
    names.sort_by_cached_key(|name| {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (stem, number) = name.split_at(name.len() - digits);
        (
            stem.to_owned(),
            number.parse::<u64>().unwrap_or(0),
            name.len(),
        )
    });
}
