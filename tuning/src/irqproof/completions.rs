//! On which CPU the requests of each CPU were completed, from the kernel's own events.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::Arrivals;
use crate::kernel::Kernel;
use crate::trace::{Event, Trace};

const EVENTS: [&str; 2] = ["block/block_rq_issue", "block/block_rq_complete"];

/// Completions by device and issuing CPU, then by completing CPU.
pub type Completions = BTreeMap<(String, u32), Arrivals>;

/// Requests are being watched.
#[derive(Debug)]
pub struct Watch(Trace);

impl Watch {
    /// Starts; takes root's rights.
    ///
    /// # Errors
    /// When the kernel does not let itself be traced.
    pub fn start() -> io::Result<Self> {
        Trace::start(&EVENTS).map(Self)
    }

    /// Ends and counts. A busy disk may fill the buffer: then the first requests of the interval
    /// are what is counted.
    ///
    /// # Errors
    /// When the trace cannot be read.
    pub fn finish(self, kernel: &impl Kernel) -> io::Result<Completions> {
        let mut names: HashMap<String, String> = HashMap::new();
        for block in kernel.list("/sys/block").unwrap_or_default() {
            if let Some(number) = kernel.text(&format!("/sys/block/{block}/dev")) {
                names.insert(number.replace(':', ","), block);
            }
        }
        let mut matcher = Matcher::default();
        self.0.finish(|event| matcher.take(event))?;
        let counted = matcher.counted.into_iter();
        Ok(counted
            .filter_map(|((device, cpu), counts)| {
                Some(((names.get(&device)?.clone(), cpu), counts))
            })
            .collect())
    }
}

/// Brings issue and completion of one request together.
#[derive(Default)]
struct Matcher {
    issued: HashMap<(String, u64), u32>,
    counted: Completions,
}

impl Matcher {
    fn take(&mut self, event: Event<'_>) {
        let Some(request) = request(event.fields) else {
            return;
        };
        if event.name == "block_rq_issue" {
            self.issued.insert(request, event.cpu);
        } else if let Some(issuer) = self.issued.remove(&request) {
            let counts = self.counted.entry((request.0, issuer)).or_default();
            *counts.entry(event.cpu).or_default() += 1;
        }
    }
}

/// Device and sector of `254,0 WS 4096 () 12345 + 8 none,0,0 [fio]`.
fn request(fields: &str) -> Option<(String, u64)> {
    let device = fields.split_whitespace().next()?;
    let (_, behind) = fields.split_once(") ")?;
    let sector = behind.split_whitespace().next()?.parse().ok()?;
    Some((device.to_owned(), sector))
}

#[cfg(test)]
mod tests {
    use super::{Matcher, Watch};
    use crate::kernel::Live;
    use crate::trace::Event;

    #[test]
    fn a_completion_is_booked_to_the_cpu_that_issued_it() {
        let mut matcher = Matcher::default();
        for (cpu, name, fields) in [
            (
                3,
                "block_rq_issue",
                "259,0 RS 4096 () 800 + 8 none,0,0 [torc]",
            ),
            (
                4,
                "block_rq_issue",
                "259,0 WS 4096 () 900 + 8 none,0,0 [torc]",
            ),
            (3, "block_rq_complete", "259,0 RS () 800 + 8 none,0,0 [0]"),
            (5, "block_rq_complete", "259,0 WS () 900 + 8 [0]"),
            (5, "block_rq_complete", "259,0 WS () 901 + 8 [0]"),
            (5, "block_rq_complete", "nonsense"),
        ] {
            matcher.take(Event {
                cpu,
                at_us: 0,
                name,
                fields,
            });
        }
        let counted: Vec<_> = matcher
            .counted
            .iter()
            .map(|((_, issuer), counts)| (*issuer, counts[&if *issuer == 3 { 3 } else { 5 }]))
            .collect();
        assert_eq!(counted, [(3, 1), (4, 1)]);
    }

    #[test]
    fn this_machines_requests_are_watched_where_the_kernel_lets_us() {
        let watch = match Watch::start() {
            Ok(watch) => watch,
            Err(error) => return println!("not available here: tracing of requests: {error}"),
        };
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = std::fs::File::create(directory.path().join("x")).unwrap();
        std::io::Write::write_all(&mut &file, &[7; 65_536]).unwrap();
        file.sync_all().unwrap();
        let completions = watch.finish(&Live::machine()).unwrap();
        if let Some(device) = crate::disk::device_of(directory.path()) {
            assert!(
                completions.keys().any(|(name, _)| *name == device),
                "{device}: {completions:?}"
            );
        }
    }
}
