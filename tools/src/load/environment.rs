//! What a result was measured on, so that it can be judged later.

use std::net::SocketAddr;

use serde_json::{Value, json};
use torc_tuning::host::Host;
use torc_tuning::kernel::Live;

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
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
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
