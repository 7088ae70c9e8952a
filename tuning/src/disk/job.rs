//! One pass: requests kept in flight on one ring until the time is over.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use serde::{Deserialize, Serialize};

use super::{DiskError, LARGE, PAGE};
use crate::stats::Random;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// 4 KiB reads anywhere.
    RandomRead,
    /// 1 MiB reads in order.
    SequentialRead,
    /// 1 MiB writes in order.
    SequentialWrite,
    /// 4 KiB writes in order, each durable before the next.
    DurableWrite,
    /// 4 KiB anywhere, seven reads for three writes.
    Mixed,
}

impl Work {
    /// All of them: those that write come last, as they leave a device busy.
    pub const ALL: [Self; 5] = [
        Self::RandomRead,
        Self::SequentialRead,
        Self::Mixed,
        Self::DurableWrite,
        Self::SequentialWrite,
    ];

    /// Name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Work::RandomRead => "random reads of 4 KiB",
            Work::SequentialRead => "sequential reads of 1 MiB",
            Work::SequentialWrite => "sequential writes of 1 MiB",
            Work::DurableWrite => "durable writes of 4 KiB",
            Work::Mixed => "7 reads for 3 writes of 4 KiB",
        }
    }

    /// Bytes of a request.
    pub fn bytes(self) -> u64 {
        match self {
            Work::SequentialRead | Work::SequentialWrite => LARGE,
            Work::RandomRead | Work::DurableWrite | Work::Mixed => PAGE,
        }
    }
}

/// What a pass gave.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Requests that were answered.
    pub requests: u64,
    /// How long it took.
    pub seconds: f64,
    /// Processor time of this thread ÷ time.
    pub busy: f64,
    /// Time from submission to completion of each request.
    pub latencies_ns: Vec<u64>,
}

impl Pass {
    /// Requests a second.
    pub fn per_second(&self) -> f64 {
        self.requests as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}

/// Buffers for direct I/O, of small pages: as those of the background jobs that move most of the data,
/// and of other tools. A huge page needs fewer descriptors and would look like a faster disk. Touched by
/// the kernel only, once they are filled.
struct Buffers {
    first: *mut libc::c_void,
    each: usize,
    bytes: usize,
}

impl Buffers {
    fn new(count: usize, each: usize) -> io::Result<Self> {
        let bytes = count * each;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let first =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)? };
        let buffers = Self { first, each, bytes };
        // SAFETY: the range is the mapping just made; the advice changes none of its contents.
        let advised = unsafe { madvise(first, bytes, Advice::LinuxNoHugepage) };
        // Refused where the kernel has no huge pages, and then there is nothing to avoid.
        advised.ok();
        // SAFETY: the mapping is `bytes` long, writable, and nobody else knows of it yet.
        let contents = unsafe { std::slice::from_raw_parts_mut(first.cast::<u8>(), bytes) };
        let mut random = Random::new(1);
        for word in contents.chunks_mut(8) {
            let bits = random.bits().to_le_bytes();
            word.copy_from_slice(&bits[..word.len()]);
        }
        Ok(buffers)
    }

    fn pointer(&self, index: usize) -> *mut u8 {
        self.first.cast::<u8>().wrapping_add(index * self.each)
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and `run` drops it only when no request is in flight.
        let unmapped = unsafe { munmap(self.first, self.bytes) };
        // Refused only for what is no mapping.
        unmapped.ok();
    }
}

struct Slot {
    begun: Instant,
}

/// Offsets and directions of the requests.
struct Requests {
    work: Work,
    random: Random,
    blocks: usize,
    next: usize,
}

impl Requests {
    /// Offset, and whether it writes.
    fn draw(&mut self) -> (u64, bool) {
        let anywhere = matches!(self.work, Work::RandomRead | Work::Mixed);
        let block = if anywhere {
            self.random.below(self.blocks)
        } else {
            self.next = (self.next + 1) % self.blocks;
            self.next
        };
        let writes = match self.work {
            Work::RandomRead | Work::SequentialRead => false,
            Work::SequentialWrite | Work::DurableWrite => true,
            Work::Mixed => self.random.below(10) < 3,
        };
        (block as u64 * self.work.bytes(), writes)
    }
}

pub(super) fn run(
    file: &File,
    file_bytes: u64,
    (work, depth): (Work, u32),
    duration: Duration,
    seed: u64,
) -> Result<Pass, DiskError> {
    let mut ring = IoUring::new(depth.next_power_of_two()).map_err(DiskError::Ring)?;
    let slots_count = usize::try_from(depth).unwrap_or(1);
    let each = usize::try_from(work.bytes()).unwrap_or(0);
    let buffers = Buffers::new(slots_count, each).map_err(DiskError::Request)?;
    let mut requests = Requests {
        work,
        random: Random::new(seed),
        blocks: usize::try_from(file_bytes / work.bytes())
            .unwrap_or(1)
            .max(1),
        next: 0,
    };
    let fd = types::Fd(file.as_raw_fd());
    let processor = processor_time();
    let begun = Instant::now();
    let mut slots: Vec<Slot> = (0..slots_count).map(|_| Slot { begun }).collect();
    let mut in_flight = 0;
    let mut failure = None;
    for (slot, state) in slots.iter_mut().enumerate() {
        state.begun = Instant::now();
        let entry = entry(fd, buffers.pointer(slot), work, requests.draw(), slot);
        match push(&mut ring, &entry) {
            Ok(()) => in_flight += 1,
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let mut pass = Pass {
        requests: 0,
        seconds: 0.0,
        busy: 0.0,
        latencies_ns: Vec::new(),
    };
    // Whatever happens, every request is waited for: the kernel writes into the buffers until then.
    while in_flight > 0 {
        let Some(completion) = ring.completion().next() else {
            match ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => failure = failure.or(Some(error)),
                Ok(_) => {}
            }
            continue;
        };
        let now = Instant::now();
        in_flight -= 1;
        let slot = usize::try_from(completion.user_data()).unwrap_or(0);
        let result = completion.result();
        if usize::try_from(result).unwrap_or(0) != each {
            let errno = if result < 0 { -result } else { libc::EIO };
            failure = failure.or(Some(io::Error::from_raw_os_error(errno)));
            continue;
        }
        let latency = now - slots[slot].begun;
        pass.requests += 1;
        pass.latencies_ns
            .push(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        if failure.is_none() && now - begun < duration {
            slots[slot].begun = now;
            let entry = entry(fd, buffers.pointer(slot), work, requests.draw(), slot);
            // At once, so that the device never has less to do than the depth says.
            match push(&mut ring, &entry) {
                Ok(()) => in_flight += 1,
                Err(error) => failure = failure.or(Some(error)),
            }
            // One that the kernel does not take now goes with the next wait.
            match ring.submit() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    failure = failure.or(Some(error));
                }
                _ => {}
            }
        }
    }
    if let Some(error) = failure {
        return Err(DiskError::Request(error));
    }
    let spent = begun.elapsed();
    pass.seconds = spent.as_secs_f64();
    pass.busy = (processor_time() - processor).as_secs_f64() / pass.seconds.max(f64::MIN_POSITIVE);
    Ok(pass)
}

fn entry(
    fd: types::Fd,
    buffer: *mut u8,
    work: Work,
    (offset, writes): (u64, bool),
    slot: usize,
) -> squeue::Entry {
    let length = u32::try_from(work.bytes()).unwrap_or(0);
    let entry = if writes {
        opcode::Write::new(fd, buffer, length)
            .offset(offset)
            .build()
    } else {
        opcode::Read::new(fd, buffer, length).offset(offset).build()
    };
    entry.user_data(slot as u64)
}

fn push(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    // SAFETY: the entry names an open file and a buffer of a slot that has no other request in
    // flight; both outlive the ring's last completion, since `run` leaves its loop only when every
    // pushed request has completed.
    let pushed = unsafe { ring.submission().push(entry) };
    pushed.map_err(|_| io::Error::other("the submission queue is full"))
}

/// Processor time of the calling thread.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
