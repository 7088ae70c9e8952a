//! Which resource is at its limit: threads of servers on this host, its cores and disks.
//!
//! Read from `/proc` before and after a stretch of load. Servers on other hosts are not seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

/// A resource that works for more than this share of the time limits what needs it.
const NEAR_LIMIT: f64 = 0.85;
/// Clock ticks a second, in which the kernel tells CPU time to everybody.
const TICKS_PER_S: f64 = 100.0;

/// A reading of all counters.
pub struct Reading {
    at: Instant,
    /// Seconds of work, by name of the resource.
    worked: BTreeMap<String, f64>,
}

/// What a resource did.
#[derive(Clone, Debug, PartialEq)]
pub struct Use {
    /// Its name.
    pub name: String,
    /// Share of the time that it worked, 0 to 1.
    pub share: f64,
}

impl Reading {
    /// Reads the counters now; `servers` are looked for on this host.
    pub fn now(servers: &[SocketAddr]) -> Self {
        let mut worked = BTreeMap::new();
        for process in listeners(servers) {
            threads(&process, &mut worked);
        }
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        cores(&text("/proc/stat"), &mut worked);
        disks(&text("/proc/diskstats"), &mut worked);
        Self {
            at: Instant::now(),
            worked,
        }
    }

    /// What each resource did since, the busiest first.
    pub fn until(&self, later: &Reading) -> Vec<Use> {
        let seconds = later.at.duration_since(self.at).as_secs_f64().max(1e-3);
        let mut uses: Vec<Use> = later
            .worked
            .iter()
            .map(|(name, worked)| {
                let before = self.worked.get(name).copied().unwrap_or(0.0);
                Use {
                    name: name.clone(),
                    share: (worked - before) / seconds,
                }
            })
            .collect();
        uses.sort_by(|one, other| other.share.total_cmp(&one.share));
        uses
    }
}

/// What limits, in words: the client when it is near its limit, else the busiest resource.
pub fn limiting(uses: &[Use], client_busy: f64) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    if client_busy > NEAR_LIMIT {
        return format!(
            "this client: its busiest thread works {}",
            percent(client_busy)
        );
    }
    let near: Vec<String> = uses
        .iter()
        .filter(|one| one.share > NEAR_LIMIT)
        .take(3)
        .map(|one| format!("{} {}", one.name, percent(one.share)))
        .collect();
    if !near.is_empty() {
        return near.join(", ");
    }
    match uses.first() {
        Some(busiest) => format!(
            "nothing seen on this host is at its limit (busiest: {} {}): waiting, or queues",
            busiest.name,
            percent(busiest.share)
        ),
        None => "nothing is known of this host".into(),
    }
}

/// Process ids that listen on these ports of this host.
fn listeners(servers: &[SocketAddr]) -> BTreeSet<String> {
    let ports: BTreeSet<u16> = servers.iter().map(SocketAddr::port).collect();
    let inodes: BTreeSet<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok())
        .flat_map(|table| listening(&table, &ports))
        .collect();
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let files = std::fs::read_dir(entry.path().join("fd"));
        let holds = files.into_iter().flatten().flatten().any(|file| {
            let target = std::fs::read_link(file.path()).unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            let inode = target
                .strip_prefix("socket:[")
                .and_then(|rest| rest.strip_suffix(']'));
            inode.is_some_and(|inode| inodes.contains(inode))
        });
        if holds {
            found.insert(name);
        }
    }
    found
}

/// Inodes of sockets that listen on one of `ports`, from a table of the kernel.
fn listening(table: &str, ports: &BTreeSet<u16>) -> Vec<String> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let port = fields.get(1)?.rsplit(':').next()?;
            let port = u16::from_str_radix(port, 16).ok()?;
            let listens = *fields.get(3)? == "0A" && ports.contains(&port);
            listens.then(|| fields.get(9).map(|inode| (*inode).to_owned()))?
        })
        .collect()
}

fn threads(process: &str, worked: &mut BTreeMap<String, f64>) {
    let directory = Path::new("/proc").join(process).join("task");
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some((name, seconds)) = thread(&stat) {
            let thread = entry.file_name().to_string_lossy().into_owned();
            worked.insert(format!("server thread {name} ({thread})"), seconds);
        }
    }
}

/// Name and CPU seconds of a thread.
fn thread(stat: &str) -> Option<(String, f64)> {
    let (head, rest) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    // User and system time are the 14th and 15th field, the name being the second.
    Some((name, (ticks(11)? + ticks(12)?) / TICKS_PER_S))
}

fn cores(stat: &str, worked: &mut BTreeMap<String, f64>) {
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        let Some(name) = fields.next().filter(|name| name.starts_with("cpu")) else {
            continue;
        };
        if name == "cpu" {
            continue;
        }
        let ticks: Vec<f64> = fields.filter_map(|field| field.parse().ok()).collect();
        // All but idle, waiting for disks, and what guests count twice.
        let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at));
        worked.insert(name.to_owned(), busy.sum::<f64>() / TICKS_PER_S);
    }
}

fn disks(table: &str, worked: &mut BTreeMap<String, f64>) {
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(name), Some(busy_ms)) = (fields.get(2), fields.get(12)) else {
            continue;
        };
        if let Ok(busy_ms) = busy_ms.parse::<f64>()
            && busy_ms > 0.0
        {
            worked.insert(format!("disk {name}"), busy_ms / 1e3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let table = "  sl  local_address rem_address   st\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n   \
                     1: 0100007F:1F90 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4712 1\n";
        assert_eq!(listening(table, &[8080].into()), ["4711"]);
        assert!(listening(table, &[8081].into()).is_empty());
        let stat = "12 (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 9 9 9";
        assert_eq!(thread(stat), Some(("a) b".into(), 2.0)));
        let mut worked = BTreeMap::new();
        cores("cpu 1 1 1 1\ncpu0 100 0 50 900 7 0 50 0 0 0\n", &mut worked);
        disks(" 252 0 vda 1 2 3 4 5 6 7 8 0 2500 99\n", &mut worked);
        assert_eq!(worked["cpu0"], 2.0);
        assert_eq!(worked["disk vda"], 2.5);
    }

    #[test]
    fn this_process_is_found_by_its_listener() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let found = listeners(&[listener.local_addr().unwrap()]);
        assert!(found.contains(&std::process::id().to_string()));
    }

    #[test]
    fn the_limit_is_named() {
        let one = |name: &str, share| Use {
            name: name.into(),
            share,
        };
        let uses = [
            one("server thread redis-server (7)", 0.98),
            one("cpu1", 0.6),
        ];
        assert_eq!(limiting(&uses, 0.5), "server thread redis-server (7) 98 %");
        assert!(limiting(&uses, 0.95).starts_with("this client"));
        assert!(limiting(&uses[1..], 0.5).contains("busiest: cpu1 60 %"));
    }
}
