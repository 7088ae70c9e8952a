//! Files of the machine itself, or of a directory that looks like one.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::{CALLS, Kernel, Refusal, sort_by_number};
use crate::calls;

/// The kernel of this machine, or a directory below which `sys` and `proc` are (`--root DIR`). Only
/// the machine itself is written to and asked by system call.
#[derive(Clone, Debug)]
pub struct Live {
    root: Option<PathBuf>,
}

impl Live {
    /// The machine itself.
    pub fn machine() -> Self {
        Self { root: None }
    }

    /// A directory with the files of some machine, read only.
    pub fn below(root: &Path) -> Self {
        Self {
            root: Some(root.to_owned()),
        }
    }

    fn place(&self, path: &str) -> PathBuf {
        match &self.root {
            None => PathBuf::from(path),
            Some(root) => root.join(path.trim_start_matches('/')),
        }
    }

    fn is_call(&self, path: &str) -> bool {
        self.root.is_none() && path.starts_with(CALLS)
    }
}

fn refuse(path: &str) -> impl FnOnce(std::io::Error) -> Refusal {
    let path = path.to_owned();
    move |error| Refusal { path, error }
}

impl Kernel for Live {
    fn read(&self, path: &str) -> Result<Vec<u8>, Refusal> {
        if self.is_call(path) {
            return calls::read(path).map_err(refuse(path));
        }
        fs::read(self.place(path)).map_err(refuse(path))
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Refusal> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.place(path)).map_err(refuse(path))? {
            let name = entry.map_err(refuse(path))?.file_name();
            names.extend(name.into_string());
        }
        sort_by_number(&mut names);
        Ok(names)
    }

    fn mode(&self, path: &str) -> Result<u32, Refusal> {
        if self.is_call(path) {
            return Ok(0o644);
        }
        let metadata = fs::metadata(self.place(path)).map_err(refuse(path))?;
        Ok(metadata.permissions().mode() & 0o777)
    }

    fn resolve(&self, path: &str) -> Result<String, Refusal> {
        let real = fs::canonicalize(self.place(path)).map_err(refuse(path))?;
        let inside = match &self.root {
            None => Some(real),
            Some(root) => fs::canonicalize(root).ok().and_then(|root| {
                real.strip_prefix(root)
                    .ok()
                    .map(|rest| Path::new("/").join(rest))
            }),
        };
        // A link of a captured host that leads out of its directory is a missing file of that host.
        inside
            .and_then(|path| path.into_os_string().into_string().ok())
            .ok_or_else(|| Refusal::with_errno(path, libc::ENOENT))
    }

    fn writable(&self, path: &str) -> Result<(), Refusal> {
        if self.root.is_some() {
            return Err(Refusal::with_errno(path, libc::EROFS));
        }
        if self.is_call(path) {
            return calls::writable(path).map_err(refuse(path));
        }
        OpenOptions::new()
            .write(true)
            .open(path)
            .map(drop)
            .map_err(refuse(path))
    }

    fn write(&self, path: &str, bytes: &[u8]) -> Result<(), Refusal> {
        if self.root.is_some() {
            return Err(Refusal::with_errno(path, libc::EROFS));
        }
        if self.is_call(path) {
            return calls::write(path, bytes).map_err(refuse(path));
        }
        let mut file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(refuse(path))?;
        file.write_all(bytes).map_err(refuse(path))
    }
}

#[cfg(test)]
mod tests {
    use super::{Kernel as _, Live};

    #[test]
    fn a_directory_is_read_and_never_written() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("proc")).unwrap();
        std::fs::write(dir.path().join("proc/x"), "7\n").unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
        let kernel = Live::below(dir.path());
        assert_eq!(kernel.number::<u32>("/proc/x"), Some(7));
        assert!(kernel.write("/proc/x", b"8").is_err());
        assert_eq!(kernel.number::<u32>("/proc/x"), Some(7));
        assert!(kernel.resolve("/out").is_err(), "a link out of the root");
    }

    #[test]
    fn names_with_numbers_come_in_numeric_order() {
        let mut names: Vec<String> = ["rx-10", "rx-9", "tx-0", "10", "9"].map(Into::into).into();
        super::sort_by_number(&mut names);
        assert_eq!(names, ["9", "10", "rx-9", "rx-10", "tx-0"]);
    }
}
