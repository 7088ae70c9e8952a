//! Events of the kernel over an interval, from an instance of tracefs of our own: other tracing goes on
//! undisturbed, and nothing is mounted where others would see it.
//!
//! The instance keeps the first events that fit and drops the rest, so a trace is bounded and, when it
//! is not whole, says so. It is removed on drop; one left behind by a killed process is removed by the
//! next trace.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// Room for events of each CPU.
const BUFFER_KIB: u32 = 8192;
/// Names of our instances begin so; the process id follows.
const INSTANCE: &str = "torc-tune-";

/// A running trace.
#[derive(Debug)]
pub(crate) struct Trace {
    instance: PathBuf,
    /// Keeps the mount, where it is our own.
    _mount: Option<OwnedFd>,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event<'a> {
    /// Where it happened.
    pub cpu: u32,
    /// When, in microseconds of the trace's clock.
    pub at_us: u64,
    /// Its name, e.g. `sched_switch`.
    pub name: &'a str,
    /// What it says.
    pub fields: &'a str,
}

impl Trace {
    /// Starts to record these events, each as `group/name` or `group`. Those that this kernel lacks are
    /// left out, but one has to be there.
    pub fn start(events: &[&str]) -> io::Result<Self> {
        let (root, mount) = tracefs()?;
        let instances = root.join("instances");
        remove_stale(&instances);
        let instance = instances.join(format!("{INSTANCE}{}", std::process::id()));
        fs::create_dir(&instance)?;
        let trace = Self {
            instance,
            _mount: mount,
        };
        trace.set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        // Full means full: the oldest events, of both kinds of a pair, are the ones to keep.
        trace.set("options/overwrite", "0")?;
        let mut enabled = 0;
        for event in events {
            enabled += usize::from(trace.set(&format!("events/{event}/enable"), "1").is_ok());
        }
        if enabled == 0 {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "this kernel has none of the events",
            ));
        }
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.instance.join(file), value)
    }

    /// Stops and hands each event to `take`, in order of time. Returns how many did not fit.
    pub fn finish(self, mut take: impl FnMut(Event<'_>)) -> io::Result<u64> {
        self.set("tracing_on", "0")?;
        let mut lines = BufReader::new(File::open(self.instance.join("trace"))?);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line)? > 0 {
            if let Some(event) = parse(&String::from_utf8_lossy(&line)) {
                take(event);
            }
            line.clear();
        }
        let mut dropped = 0;
        for cpu in fs::read_dir(self.instance.join("per_cpu"))? {
            let stats = fs::read_to_string(cpu?.path().join("stats"))?;
            let count = stats
                .lines()
                .find_map(|line| line.strip_prefix("dropped events:"));
            dropped += count
                .and_then(|count| count.trim().parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(dropped)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // What remains is removed by the next trace.
        drop(fs::remove_dir(&self.instance));
    }
}

/// Where tracefs is; a mount without a place in the tree, which ends with its descriptor, where it is
/// nowhere.
fn tracefs() -> io::Result<(PathBuf, Option<OwnedFd>)> {
    for place in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
        if PathBuf::from(place).join("instances").exists() {
            return Ok((place.into(), None));
        }
    }
    let context = rustix::mount::fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let mount = rustix::mount::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    let root = format!("/proc/self/fd/{}", mount.as_raw_fd());
    Ok((root.into(), Some(mount)))
}

fn remove_stale(instances: &std::path::Path) {
    let Ok(entries) = fs::read_dir(instances) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(INSTANCE));
        if owner.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists()) {
            // Busy means that somebody reads it, and then it is not ours to remove.
            drop(fs::remove_dir(entry.path()));
        }
    }
}

/// `            fio-812     [001] d..2.  1234.567890: sched_switch: prev_comm=…`
fn parse(line: &str) -> Option<Event<'_>> {
    let (head, rest) = line.trim_end().split_once(": ")?;
    let (name, fields) = rest.split_once(':')?;
    let mut words = head.split_whitespace().rev();
    let (seconds, fraction) = words.next()?.split_once('.')?;
    let cpu = words.find_map(|word| word.strip_prefix('[')?.strip_suffix(']')?.parse().ok())?;
    let seconds: u64 = seconds.parse().ok()?;
    let microseconds: u64 = fraction.get(..6)?.parse().ok()?;
    Some(Event {
        cpu,
        at_us: seconds.checked_mul(1_000_000)?.checked_add(microseconds)?,
        name,
        fields: fields.trim_start(),
    })
}

/// The value of `key=` in the fields of an event, up to the next key.
pub(crate) fn field<'a>(fields: &'a str, key: &str) -> Option<&'a str> {
    let from = fields
        .match_indices(key)
        .find(|(at, _)| {
            fields[at + key.len()..].starts_with('=') && (*at == 0 || fields[..*at].ends_with(' '))
        })?
        .0
        + key.len()
        + 1;
    let value = &fields[from..];
    // Names of threads may hold blanks: the value ends before the word that is the next key.
    let end = value
        .match_indices('=')
        .next()
        .and_then(|(equals, _)| value[..equals].rfind(' '))
        .unwrap_or(value.len());
    Some(value[..end].trim_end_matches(" ==>").trim_end())
}

#[cfg(test)]
mod tests {
    use super::{Event, Trace, field, parse};

    #[test]
    fn lines_of_a_trace_are_read() {
        let line = "     torc-spin-1-812     [001] d..2.  1234.567890: sched_switch: prev_comm=torc spin prev_pid=812 prev_prio=120 prev_state=R ==> next_comm=kworker/1:0 next_pid=9 next_prio=120\n";
        let event = parse(line).unwrap();
        let Event {
            cpu, at_us, name, ..
        } = event;
        assert_eq!((cpu, at_us, name), (1, 1_234_567_890, "sched_switch"));
        assert_eq!(field(event.fields, "prev_comm"), Some("torc spin"));
        assert_eq!(field(event.fields, "prev_state"), Some("R"));
        assert_eq!(field(event.fields, "next_comm"), Some("kworker/1:0"));
        assert_eq!(field(event.fields, "next_prio"), Some("120"));
        assert_eq!(field(event.fields, "comm"), None);
        for line in ["# tracer: nop\n", "", "CPU:1 [LOST 7 EVENTS]\n"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn this_kernels_events_are_recorded_where_it_lets_us() {
        match Trace::start(&["sched/sched_switch", "nonsense/nothing"]) {
            Ok(trace) => {
                let instance = trace.instance.clone();
                std::thread::spawn(|| ()).join().unwrap();
                let mut switches = 0;
                trace
                    .finish(|event| switches += usize::from(event.name == "sched_switch"))
                    .unwrap();
                assert!(switches > 0, "starting a thread switches to it");
                assert!(!instance.exists());
            }
            Err(error) => println!("not available here: tracing: {error}"),
        }
    }
}
