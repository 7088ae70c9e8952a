//! Measuring: `irqproof`, `disk`, `jitter`.

use std::collections::BTreeMap;
use std::path::Path;

use torc_tuning::cpuset::CpuSet;
use torc_tuning::disk::{self, DiskOptions, Subject};
use torc_tuning::irqproof::{self, Arrivals, Landed, Watch};
use torc_tuning::jitter::{self, JitterOptions};
use torc_tuning::kernel::Live;
use torc_tuning::plan::{Plan, Profile};
use torc_tuning::render;
use torc_tuning::server::applied_plan;

use super::{DiskArgs, IrqproofArgs, JitterArgs, host};
use crate::endpoint::{Endpoint, Request};
use crate::failure::Failure;

/// Counter of the server: labels are the shard and the CPU on which packets arrived.
const SOCKET_ARRIVALS: &str = "torc_socket_arrivals_total{";

pub(super) fn words(error: &dyn std::error::Error) -> Failure {
    Failure::new(error.to_string())
}

pub(super) fn irqproof(state: &Path, args: &IrqproofArgs) -> Result<(), Failure> {
    let kernel = Live::machine();
    let before = host::read(None)?;
    let sockets = args.endpoint.as_deref().map(sockets);
    let watch = Watch::start();
    std::thread::sleep(args.duration);
    let completions = watch.and_then(|watch| watch.finish(&kernel));
    let after = host::read(None)?;
    let plan = match args.profile {
        Some(profile) => Plan::of(&after, profile.into()),
        None => applied_plan(state, &after).unwrap_or_else(|| Plan::of(&after, Profile::Latency)),
    };
    let landed = Landed {
        completions: completions.map_err(|error| format!("requests cannot be traced: {error}")),
        sockets: match sockets {
            _ if plan.profile == Profile::Shared => {
                Err("a shared host's plan leaves the network alone".into())
            }
            None => Err("only the server can tell: name it with --endpoint".into()),
            Some(before) => before.and_then(|before| {
                sockets_since(args.endpoint.as_deref().unwrap_or_default(), &before)
            }),
        },
    };
    let outcome = irqproof::prove(&before, &after, &plan.layout, &landed);
    if args.json {
        host::print_json(&outcome)?;
    } else {
        let heading = format!(
            "plan {} for {}, counted for {:?}\n",
            plan.id,
            plan.profile.name(),
            args.duration
        );
        host::show(&(heading + &render::irqproof(&outcome)))?;
    }
    if outcome.has_strays() {
        let mover = if after.irqbalance.running {
            "; irqbalance runs and is the likely mover"
        } else {
            ""
        };
        return Err(Failure::new(format!(
            "something did not land where the layout wants it{mover}"
        )));
    }
    Ok(())
}

pub(super) fn disk(args: &DiskArgs) -> Result<(), Failure> {
    let subject = match (&args.file, &args.dir) {
        (Some(file), _) => Subject::File(file.clone()),
        (None, directory) => Subject::Directory {
            path: directory.clone().unwrap_or_default(),
            file_bytes: args.file_mib << 20,
        },
    };
    let options = DiskOptions {
        subject,
        pass: args.pass,
        works: args.work.iter().map(|work| (*work).into()).collect(),
        depths: args.depths.clone(),
    };
    let seconds = options.pass.as_secs_f64() * 2.25 * options.rows().len() as f64;
    eprintln!("{} rows, about {seconds:.0} s", options.rows().len());
    let properties =
        disk::measure(&options, |what| eprintln!("  {what}")).map_err(|error| words(&error))?;
    if args.json {
        host::print_json(&properties)?;
    } else {
        host::show(&render::disk(&properties))?;
    }
    let Some(path) = &args.output else {
        return Ok(());
    };
    if !properties.is_stable() && !args.keep_unstable {
        return Err(Failure::new(
            "not stable, so no properties file was written (--keep-unstable writes it)",
        ));
    }
    let text = properties.to_toml().map_err(|error| words(&error))?;
    host::write(path, text)?;
    eprintln!(
        "{0} is written; `[disk] properties = \"{0}\"` makes torc server follow it",
        path.display()
    );
    Ok(())
}

pub(super) fn jitter(args: &JitterArgs) -> Result<(), Failure> {
    let cpus = match &args.cpus {
        Some(list) => CpuSet::parse_list(list).map_err(|error| words(&error))?,
        None => host::read(None)?.usable(),
    };
    let options = JitterOptions {
        cpus: cpus.iter().collect(),
        duration: args.duration,
        realtime: args.realtime,
        trace: !args.no_trace,
    };
    let outcome = jitter::measure(&options).map_err(|error| words(&error))?;
    if args.json {
        return host::print_json(&outcome);
    }
    host::show(&render::jitter(&outcome))
}

/// Arrivals of each shard's sockets by CPU since the server started, as it publishes them.
fn sockets(endpoint: &str) -> Result<BTreeMap<usize, Arrivals>, String> {
    let answer = Endpoint::new(endpoint)
        .and_then(|endpoint| {
            endpoint.send(Request {
                method: "GET",
                path: "/metrics".into(),
                ..Request::default()
            })
        })
        .map_err(|error| error.to_string())?;
    let arrivals = parse_arrivals(&String::from_utf8_lossy(&answer.body));
    if arrivals.is_empty() {
        return Err("the server has counted none yet: no client of it is on a network".into());
    }
    Ok(arrivals)
}

fn parse_arrivals(metrics: &str) -> BTreeMap<usize, Arrivals> {
    let mut shards: BTreeMap<usize, Arrivals> = BTreeMap::new();
    for line in metrics.lines() {
        let Some((labels, count)) = line
            .strip_prefix(SOCKET_ARRIVALS)
            .and_then(|rest| rest.split_once("} "))
        else {
            continue;
        };
        let label = |name: &str| {
            let mut labels = labels.split(',');
            let quoted = labels.find_map(|label| label.strip_prefix(name)?.strip_prefix('='))?;
            quoted.trim_matches('"').parse::<u32>().ok()
        };
        let shard = label("shard").and_then(|shard| usize::try_from(shard).ok());
        if let (Some(shard), Some(cpu), Ok(count)) = (shard, label("cpu"), count.trim().parse()) {
            shards.entry(shard).or_default().insert(cpu, count);
        }
    }
    shards
}

/// What has arrived since.
fn sockets_since(
    endpoint: &str,
    before: &BTreeMap<usize, Arrivals>,
) -> Result<BTreeMap<usize, Arrivals>, String> {
    let mut after = sockets(endpoint)?;
    for (shard, arrivals) in &mut after {
        for (cpu, count) in arrivals {
            let was = before.get(shard).and_then(|arrivals| arrivals.get(cpu));
            *count = count.saturating_sub(was.copied().unwrap_or(0));
        }
    }
    Ok(after)
}

#[cfg(test)]
mod tests {
    use super::parse_arrivals;

    #[test]
    fn arrivals_of_sockets_are_read_from_the_servers_metrics() {
        let text = "# TYPE torc_socket_arrivals_total counter\n\
            torc_socket_arrivals_total{shard=\"0\",cpu=\"3\"} 12\n\
            torc_socket_arrivals_total{shard=\"1\",cpu=\"3\"} 1\n\
            torc_connections 3\n";
        let arrivals = parse_arrivals(text);
        assert_eq!(arrivals[&0][&3], 12);
        assert_eq!(arrivals[&1][&3], 1);
        assert_eq!(arrivals.len(), 2);
    }
}
