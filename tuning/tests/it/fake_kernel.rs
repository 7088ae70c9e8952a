//! A kernel, not a directory: files that refuse, clamp, ignore, answer in brackets, and change behind
//! one's back.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use torc_tuning::cpuset::CpuSet;
use torc_tuning::host::Choice;
use torc_tuning::kernel::{Kernel, Refusal, Tree};

/// How one file answers a write, besides what its name implies.
#[derive(Clone, Debug)]
pub enum Temper {
    /// This error number.
    Refuse(i32),
    /// Says yes and keeps what it has.
    Ignore,
    /// Keeps a number within these bounds.
    Clamp(u64, u64),
    /// Keeps another value than it was given.
    Twist(&'static str),
}

/// A kernel over a tree of files.
pub struct FakeKernel {
    tree: RefCell<Tree>,
    tempers: RefCell<BTreeMap<String, Temper>>,
    /// Writes that still succeed; afterwards the process is dead to the kernel.
    pub lives: Cell<Option<usize>>,
    /// After that many writes from now, this file gets this value.
    pub intruder: RefCell<Option<(usize, String, String)>>,
    /// Writes seen.
    pub writes: Cell<usize>,
}

impl FakeKernel {
    pub fn over(tree: Tree) -> Self {
        Self {
            tree: RefCell::new(tree),
            tempers: RefCell::default(),
            lives: Cell::new(None),
            intruder: RefCell::default(),
            writes: Cell::new(0),
        }
    }

    pub fn temper(&self, path: &str, temper: Temper) {
        let real = self.resolve(path).unwrap();
        self.tempers.borrow_mut().insert(real, temper);
    }

    pub fn set(&self, path: &str, contents: &str) {
        let real = self.resolve(path).unwrap();
        let mode = self.mode(path).unwrap();
        self.tree.borrow_mut().file_with_mode(real, contents, mode);
    }

    pub fn edit(&self, edit: impl FnOnce(&mut Tree)) {
        edit(&mut self.tree.borrow_mut());
    }

    pub fn snapshot(&self) -> Tree {
        self.tree.borrow().clone()
    }

    /// What the kernel makes of a written text.
    fn accept(&self, path: &str, before: &str, text: &str) -> Result<String, i32> {
        if path.ends_with("/scheduler") || path.ends_with("/enabled") {
            let choice = Choice::parse(before).unwrap();
            if !choice.offers(text) {
                return Err(libc_errno::EINVAL);
            }
            let words = choice.options.iter().map(|option| {
                if option == text {
                    format!("[{option}]")
                } else {
                    option.clone()
                }
            });
            return Ok(words.collect::<Vec<_>>().join(" ") + "\n");
        }
        let online = self.text("/sys/devices/system/cpu/online").unwrap();
        let online = CpuSet::parse_list(&online).unwrap();
        if path.ends_with("smp_affinity_list") {
            let cpus = CpuSet::parse_list(text).map_err(|_| libc_errno::EINVAL)?;
            // A mask without any online CPU is refused.
            if cpus.and(&online).is_empty() {
                return Err(libc_errno::EINVAL);
            }
            return Ok(format!("{cpus}\n"));
        }
        if path.ends_with("_cpus") || path.ends_with("cpumask") {
            let cpus = CpuSet::parse_mask(text).map_err(|_| libc_errno::EINVAL)?;
            // Printed with leading zeros, as wide as the machine.
            let words = online.iter().next_back().unwrap_or(0) / 32 + 1;
            let mask = (0..words).rev().map(|word| {
                let bits = cpus
                    .iter()
                    .filter(|cpu| cpu / 32 == word)
                    .fold(0_u32, |bits, cpu| bits | 1 << (cpu % 32));
                format!("{bits:08x}")
            });
            return Ok(mask.collect::<Vec<_>>().join(",") + "\n");
        }
        if before.trim().parse::<i64>().is_ok() {
            let number: i64 = text.trim().parse().map_err(|_| libc_errno::EINVAL)?;
            return Ok(format!("{number}\n"));
        }
        Ok(format!("{}\n", text.trim()))
    }

    fn side_effects(&self, path: &str) {
        if let Some(queue) = path.strip_suffix("/scheduler") {
            // Changing the scheduler resets the queue's depth and the throttle.
            for (name, value) in [("nr_requests", "256\n"), ("wbt_lat_usec", "2000\n")] {
                let file = format!("{queue}/{name}");
                if self.resolve(&file).is_ok() {
                    self.set(&file, value);
                }
            }
        }
        if let Some(directory) = path.strip_suffix("/smp_affinity_list") {
            let text = self.text(path).unwrap();
            let first = CpuSet::parse_list(&text).unwrap().first().unwrap();
            self.set(
                &format!("{directory}/effective_affinity_list"),
                &format!("{first}\n"),
            );
        }
    }
}

mod libc_errno {
    pub const EPERM: i32 = 1;
    pub const EIO: i32 = 5;
    pub const EACCES: i32 = 13;
    pub const EINVAL: i32 = 22;
}
pub use libc_errno::{EIO, EPERM};

impl Kernel for FakeKernel {
    fn read(&self, path: &str) -> Result<Vec<u8>, Refusal> {
        self.tree.borrow().read(path)
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Refusal> {
        self.tree.borrow().list(path)
    }

    fn mode(&self, path: &str) -> Result<u32, Refusal> {
        self.tree.borrow().mode(path)
    }

    fn resolve(&self, path: &str) -> Result<String, Refusal> {
        self.tree.borrow().resolve(path)
    }

    fn writable(&self, path: &str) -> Result<(), Refusal> {
        if self.mode(path)? & 0o222 == 0 {
            return Err(Refusal::with_errno(path, libc_errno::EACCES));
        }
        Ok(())
    }

    fn write(&self, path: &str, bytes: &[u8]) -> Result<(), Refusal> {
        self.writable(path)?;
        let refuse = |errno| Refusal::with_errno(path, errno);
        if let Some(lives) = self.lives.get() {
            self.lives.set(Some(
                lives
                    .checked_sub(1)
                    .ok_or_else(|| refuse(libc_errno::EPERM))?,
            ));
        }
        self.writes.set(self.writes.get() + 1);
        let real = self.resolve(path)?;
        let before = String::from_utf8(self.read(path)?).unwrap();
        let text = std::str::from_utf8(bytes).unwrap().trim().to_owned();
        let temper = self.tempers.borrow().get(&real).cloned();
        let text = match temper {
            Some(Temper::Refuse(errno)) => return Err(refuse(errno)),
            Some(Temper::Ignore) => before.clone(),
            Some(Temper::Clamp(low, high)) => {
                text.parse::<u64>().unwrap().clamp(low, high).to_string()
            }
            Some(Temper::Twist(value)) => value.to_owned(),
            None => text,
        };
        let mut after = before.clone();
        if text != before {
            after = self.accept(&real, &before, &text).map_err(refuse)?;
        }
        self.set(path, &after);
        if after != before {
            self.side_effects(&real);
        }
        let intrusion = self.intruder.borrow_mut().take();
        if let Some((left, victim, value)) = intrusion {
            if left == 0 {
                self.set(&victim, &value);
            } else {
                *self.intruder.borrow_mut() = Some((left - 1, victim, value));
            }
        }
        Ok(())
    }
}
