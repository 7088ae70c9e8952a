//! A host's files in memory: what a capture holds, and the ground on which tests build kernels.
//!
//! Stored as plain `ustar`, so that `tar` opens it too. Links are kept as links: the way from a
//! network card to its interrupts leads through them.

use std::collections::BTreeMap;

use thiserror::Error;

use super::{Kernel, Refusal, sort_by_number};

const BLOCK: usize = 512;
/// Links followed before a path counts as circular; the kernel's own bound.
const LINKS_MAX: usize = 40;

/// One entry of a [`Tree`]; directories follow from the paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A file with its permission bits.
    File {
        /// Contents.
        bytes: Vec<u8>,
        /// Permission bits; a read-only `smp_affinity` is how the kernel marks managed interrupts.
        mode: u32,
    },
    /// A symbolic link.
    Link(String),
}

/// An archive that is no captured host.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TreeError {
    /// Ends inside a header or a file.
    #[error("the archive is cut off at byte {offset}")]
    CutOff {
        /// Where the missing block begins.
        offset: usize,
    },
    /// A header whose checksum or fields do not hold.
    #[error("the archive's header at byte {offset} is damaged: {what}")]
    Damaged {
        /// Where the header begins.
        offset: usize,
        /// Which field.
        what: &'static str,
    },
    /// A path or file that does not fit into a `ustar` header.
    #[error("{path} does not fit into an archive")]
    DoesNotFit {
        /// The path.
        path: String,
    },
}

/// A tree of files, by absolute path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Without any file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a file with mode 0644.
    pub fn file(&mut self, path: impl Into<String>, contents: impl AsRef<[u8]>) -> &mut Self {
        self.file_with_mode(path, contents, 0o644)
    }

    /// Adds or replaces a file.
    pub fn file_with_mode(
        &mut self,
        path: impl Into<String>,
        contents: impl AsRef<[u8]>,
        mode: u32,
    ) -> &mut Self {
        let bytes = contents.as_ref().to_vec();
        self.nodes.insert(path.into(), Node::File { bytes, mode });
        self
    }

    /// Adds or replaces a link.
    pub fn link(&mut self, path: impl Into<String>, target: impl Into<String>) -> &mut Self {
        self.nodes.insert(path.into(), Node::Link(target.into()));
        self
    }

    /// Takes a file, or everything below a directory, away.
    pub fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.nodes
            .retain(|name, _| name != path && !name.starts_with(&below));
    }

    /// All entries in order of their paths.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    fn follow(&self, path: &str) -> Option<String> {
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut real = String::new();
        let mut links = 0;
        while let Some(step) = rest.pop() {
            match step.as_str() {
                "" | "." => continue,
                ".." => {
                    real.truncate(real.rfind('/').unwrap_or(0));
                    continue;
                }
                name => {
                    let parent = real.len();
                    real.push('/');
                    real.push_str(name);
                    if let Some(Node::Link(target)) = self.nodes.get(&real) {
                        links += 1;
                        if links > LINKS_MAX {
                            return None;
                        }
                        real.truncate(if target.starts_with('/') { 0 } else { parent });
                        rest.extend(target.split('/').rev().map(str::to_owned));
                    }
                }
            }
        }
        Some(real)
    }

    fn find(&self, path: &str) -> Result<(&[u8], u32), Refusal> {
        let real = self.resolve(path)?;
        match self.nodes.get(&real) {
            Some(Node::File { bytes, mode }) => Ok((bytes, *mode)),
            Some(Node::Link(_)) => Err(Refusal::with_errno(path, libc::ELOOP)),
            None => Err(Refusal::with_errno(path, libc::EISDIR)),
        }
    }

    fn is_directory(&self, real: &str) -> bool {
        let below = format!("{real}/");
        self.nodes
            .range(below.clone()..)
            .next()
            .is_some_and(|(name, _)| name.starts_with(&below))
    }

    /// The tree as a `ustar` archive, owner and times zero: the same host gives the same bytes.
    pub fn to_archive(&self) -> Result<Vec<u8>, TreeError> {
        let mut archive = Vec::new();
        for (path, node) in &self.nodes {
            let (bytes, mode, kind, target): (&[u8], u32, u8, &str) = match node {
                Node::File { bytes, mode } => (bytes, *mode, b'0', ""),
                Node::Link(target) => (b"", 0o777, b'2', target),
            };
            let does_not_fit = || TreeError::DoesNotFit { path: path.clone() };
            let (prefix, name) =
                split_path(path.trim_start_matches('/')).ok_or_else(does_not_fit)?;
            if target.len() > 100 || bytes.len() > 0o7_777_777 {
                return Err(does_not_fit());
            }
            let mut header = [0_u8; BLOCK];
            put(&mut header, 0, name.as_bytes());
            put(&mut header, 100, format!("{mode:07o}").as_bytes());
            put(&mut header, 108, b"0000000");
            put(&mut header, 116, b"0000000");
            put(&mut header, 124, format!("{:011o}", bytes.len()).as_bytes());
            put(&mut header, 136, b"00000000000");
            header[156] = kind;
            put(&mut header, 157, target.as_bytes());
            put(&mut header, 257, b"ustar\x0000");
            put(&mut header, 345, prefix.as_bytes());
            let sum = format!("{:06o}\0 ", checksum(&header));
            put(&mut header, 148, sum.as_bytes());
            archive.extend_from_slice(&header);
            archive.extend_from_slice(bytes);
            archive.resize(archive.len().next_multiple_of(BLOCK), 0);
        }
        archive.resize(archive.len() + 2 * BLOCK, 0);
        Ok(archive)
    }

    /// Reads what [`to_archive`](Self::to_archive) wrote, or `tar` from an unpacked capture.
    pub fn from_archive(archive: &[u8]) -> Result<Self, TreeError> {
        let mut tree = Self::new();
        let mut offset = 0;
        loop {
            let cut_off = TreeError::CutOff { offset };
            let Some(header) = archive.get(offset..offset + BLOCK) else {
                return Err(cut_off);
            };
            if header.iter().all(|&byte| byte == 0) {
                return Ok(tree);
            }
            let damaged = |what| TreeError::Damaged { offset, what };
            let octal = |field: &[u8], what| {
                let text = std::str::from_utf8(field).map_err(|_| damaged(what))?;
                let text = text.trim_matches(['\0', ' ']);
                usize::from_str_radix(text, 8).map_err(|_| damaged(what))
            };
            let name = |field: &[u8], what| {
                let end = field
                    .iter()
                    .position(|&byte| byte == 0)
                    .unwrap_or(field.len());
                std::str::from_utf8(&field[..end])
                    .map(str::to_owned)
                    .map_err(|_| damaged(what))
            };
            if octal(&header[148..156], "checksum")? != checksum(header) as usize {
                return Err(damaged("checksum"));
            }
            let size = octal(&header[124..136], "size")?;
            let mode = octal(&header[100..108], "mode")?;
            let prefix = name(&header[345..500], "prefix")?;
            let last = name(&header[0..100], "name")?;
            let last = last.trim_start_matches("./").trim_end_matches('/');
            let path = match prefix.trim_start_matches("./") {
                "" => format!("/{last}"),
                prefix => format!("/{prefix}/{last}"),
            };
            let start = offset + BLOCK;
            let end = start.checked_add(size).ok_or_else(|| damaged("size"))?;
            let bytes = archive.get(start..end).ok_or(cut_off)?;
            match header[156] {
                b'0' | 0 => {
                    let mode = u32::try_from(mode & 0o777).map_err(|_| damaged("mode"))?;
                    tree.file_with_mode(path, bytes, mode);
                }
                b'2' => {
                    tree.link(path, name(&header[157..257], "link target")?);
                }
                _ => {}
            }
            offset = end.next_multiple_of(BLOCK);
        }
    }
}

fn put(header: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    header[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Sum of the header's bytes with the checksum's own field as blanks.
fn checksum(header: &[u8]) -> u32 {
    let bytes = header.iter().enumerate();
    bytes
        .map(|(at, &byte)| u32::from(if (148..156).contains(&at) { b' ' } else { byte }))
        .sum()
}

/// Cuts a path into prefix (at most 155 bytes) and name (at most 100), at a slash.
fn split_path(path: &str) -> Option<(&str, &str)> {
    if path.len() <= 100 {
        return Some(("", path));
    }
    path.match_indices('/')
        .map(|(at, _)| (&path[..at], &path[at + 1..]))
        .find(|(prefix, name)| prefix.len() <= 155 && name.len() <= 100)
}

impl Kernel for Tree {
    fn read(&self, path: &str) -> Result<Vec<u8>, Refusal> {
        self.find(path).map(|(bytes, _)| bytes.to_vec())
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Refusal> {
        let below = format!("{}/", self.resolve(path)?);
        let mut names: Vec<String> = Vec::new();
        for (name, _) in self.nodes.range(below.clone()..) {
            let Some(rest) = name.strip_prefix(&below) else {
                break;
            };
            let first = rest.split('/').next().unwrap_or(rest);
            if names.last().is_none_or(|last| last != first) {
                names.push(first.to_owned());
            }
        }
        sort_by_number(&mut names);
        names.dedup();
        Ok(names)
    }

    fn mode(&self, path: &str) -> Result<u32, Refusal> {
        self.find(path).map(|(_, mode)| mode)
    }

    fn resolve(&self, path: &str) -> Result<String, Refusal> {
        let absent = || Refusal::with_errno(path, libc::ENOENT);
        let real = self.follow(path).ok_or_else(absent)?;
        if self.nodes.contains_key(&real) || self.is_directory(&real) {
            Ok(real)
        } else {
            Err(absent())
        }
    }

    fn writable(&self, path: &str) -> Result<(), Refusal> {
        Err(Refusal::with_errno(path, libc::EROFS))
    }

    fn write(&self, path: &str, _: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::with_errno(path, libc::EROFS))
    }
}

#[cfg(test)]
mod tests {
    use super::{Kernel as _, Tree, TreeError};

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.file(
            "/sys/devices/pci0/0000:00:03.0/virtio2/net/eth0/mtu",
            "1500\n",
        )
        .file("/sys/devices/pci0/0000:00:03.0/msi_irqs/37", "msix\n")
        .file_with_mode("/proc/irq/37/smp_affinity", "3\n", 0o444)
        .file(format!("/{}/{}", "d".repeat(90), "f".repeat(90)), [0, 255])
        .link(
            "/sys/class/net/eth0",
            "../../devices/pci0/0000:00:03.0/virtio2/net/eth0",
        )
        .link(
            "/sys/devices/pci0/0000:00:03.0/virtio2/net/eth0/device",
            "../../../virtio2",
        );
        tree
    }

    #[test]
    fn links_and_parents_are_followed_as_the_kernel_does() {
        let tree = sample();
        assert_eq!(tree.number::<u32>("/sys/class/net/eth0/mtu"), Some(1500));
        let interrupts = tree.list("/sys/class/net/eth0/device/../msi_irqs").unwrap();
        assert_eq!(interrupts, ["37"]);
        assert!(
            tree.read("/sys/class/net/eth1/mtu")
                .unwrap_err()
                .is_absent()
        );
        let mut circular = Tree::new();
        circular.link("/a", "b").link("/b", "a");
        assert!(circular.read("/a").is_err());
    }

    #[test]
    fn an_archive_round_trips_with_modes_and_links() {
        let tree = sample();
        let archive = tree.to_archive().unwrap();
        assert_eq!(Tree::from_archive(&archive).unwrap(), tree);
    }

    #[test]
    fn a_cut_or_damaged_archive_is_refused() {
        let archive = sample().to_archive().unwrap();
        for length in (0..archive.len() - 1024).step_by(37) {
            assert!(Tree::from_archive(&archive[..length]).is_err(), "{length}");
        }
        // 154 and 155 only end the checksum's own digits.
        for at in (0..500).filter(|at| !(154..156).contains(at)) {
            let mut damaged = archive.clone();
            damaged[at] ^= 0x20;
            let outcome = Tree::from_archive(&damaged);
            assert!(outcome.is_err() || outcome != Ok(sample()), "byte {at}");
        }
        assert_eq!(
            Tree::from_archive(b""),
            Err(TreeError::CutOff { offset: 0 })
        );
    }
}
