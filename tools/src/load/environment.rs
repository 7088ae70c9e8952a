//! What a result was measured on, so that it can be judged later.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use torc_tuning::host::Host;
use torc_tuning::kernel::Live;

use crate::failure::Failure;

/// Files that each thread has open beside its connections, and that the program has.
const FILES_OF_A_THREAD: u64 = 2;
const FILES_OF_THE_PROGRAM: u64 = 50;

/// The record: this host as `torc tune inspect` sees it, shortened to what moves latencies, and
/// what the servers said about themselves.
pub fn record(addresses: &[SocketAddr], servers: Option<&Value>) -> Value {
    let host = Host::read(&Live::machine(), "this machine");
    let host = match &host {
        Ok(host) => host_json(host),
        Err(error) => json!({"unavailable": error.to_string()}),
    };
    let text = |path: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        Some(text.trim().to_owned())
    };
    json!({
        "torc": env!("CARGO_PKG_VERSION"),
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "host": host,
        "memory": text("/proc/meminfo").and_then(|text| {
            Some(text.lines().next()?.trim_start_matches("MemTotal:").trim().to_owned())
        }),
        "load_average": text("/proc/loadavg"),
        "open_files_limit": limit_of_open_files(),
        "loopback": addresses.iter().any(|address| address.ip().is_loopback()),
        "servers": servers,
    })
}

fn limit_of_open_files() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Makes room for so many connections, of which this process has one end or both, as far as the hard limit of open
/// files allows.
///
/// # Errors
/// With the remedy, when it does not.
pub fn allow_connections(count: u32, ends: u64, threads: u32) -> Result<(), Failure> {
    let others = FILES_OF_A_THREAD * u64::from(threads) + FILES_OF_THE_PROGRAM;
    let wanted = u64::from(count) * ends + others;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    if let Some(maximum) = limit.maximum.filter(|maximum| *maximum < wanted) {
        return Err(Failure::usage(format!(
            "--connections {count}: this process may have {maximum} open files and needs {wanted}; \
             raise its hard limit (ulimit -Hn, LimitNOFILE) or use several --agents"
        )));
    }
    let raised = Rlimit {
        current: Some(wanted),
        ..limit
    };
    setrlimit(Resource::Nofile, raised).map_err(|error| {
        Failure::new(format!(
            "--connections {count}: the limit of open files: {error}"
        ))
    })
}

/// Makes room for as many connections as may come. Where that is refused, fewer can.
pub fn allow_all_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).ok();
}

/// Fails, with the remedy, when so many connections are more than this machine has local ports for. A
/// connection to an address takes one; connections to another address may have the same.
///
/// # Errors
/// As said.
pub fn local_ports_suffice(count: u32, addresses: &[SocketAddr]) -> Result<(), Failure> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let different: BTreeSet<&SocketAddr> = addresses.iter().collect();
    match range.ok().as_deref().and_then(local_ports) {
        Some(ports) => ports_suffice(count, different.len(), ports),
        None => Ok(()),
    }
}

/// How many ports there are from the first to the last.
fn local_ports(range: &str) -> Option<u64> {
    let mut ends = range.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(first)), Some(Ok(last))) = (ends.next(), ends.next()) else {
        return None;
    };
    Some((last + 1).saturating_sub(first))
}

fn ports_suffice(count: u32, addresses: usize, ports: u64) -> Result<(), Failure> {
    // Connections are spread evenly.
    let most = ports.saturating_mul(u64::try_from(addresses).unwrap_or(u64::MAX));
    if u64::from(count) <= most {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "--connections {count}: this machine has {ports} local ports for connections to each server address, \
         so {most} for the {addresses} that there are; widen net.ipv4.ip_local_port_range \
         (sysctl -w net.ipv4.ip_local_port_range='1024 65535'), give more addresses of the servers \
         (--address) or use several --agents"
    )))
}

/// The parts that move latencies; the whole of a big host would be longer than the result.
fn host_json(host: &Host) -> Value {
    let all = serde_json::to_value(host).unwrap_or_default();
    let pick = |path: &str| all.pointer(path).cloned().unwrap_or_default();
    json!({
        "kernel": host.kernel,
        "boot_arguments": pick("/boot_arguments"),
        "virtualisation": pick("/virtualisation"),
        "cpus": pick("/cpus"),
        "settings": pick("/settings"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_needed_for_each_connection_to_an_address() {
        let ports = local_ports("32768\t60999\n").unwrap();
        assert_eq!((ports, local_ports("")), (28_232, None));
        assert!(ports_suffice(28_232, 1, ports).is_ok());
        assert!(ports_suffice(56_464, 2, ports).is_ok());
        let words = ports_suffice(56_465, 2, ports).unwrap_err().to_string();
        assert!(
            words.contains("--connections 56465") && words.contains("56464 for the 2"),
            "{words}"
        );
        assert!(
            words.contains("ip_local_port_range") && words.contains("--agents"),
            "{words}"
        );
    }
}
