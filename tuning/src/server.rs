//! What `torc server` takes from here: the CPUs of the plan, and serious findings to warn about.

use std::io;
use std::path::Path;

use crate::check::{Finding, Severity, check};
use crate::cpuset::CpuSet;
use crate::host::Host;
use crate::kernel::Live;
use crate::plan::{Plan, Profile};
use crate::probe;

/// Where the plan that was applied last lies, beside its journal.
pub const PLAN_FILE: &str = "plan.json";

/// Directory of journal and plan unless another is given.
pub const STATE_DIRECTORY: &str = "/var/lib/torc-tune";

/// The plan that was applied last, if it fits this host.
pub fn applied_plan(state: &Path, host: &Host) -> Option<Plan> {
    let text = std::fs::read_to_string(state.join(PLAN_FILE)).ok()?;
    let plan: Plan = serde_json::from_str(&text).ok()?;
    (plan.host == host.fingerprint()).then_some(plan)
}

/// Keeps the calling thread, and every thread that it starts from now on, on the CPUs that the plan
/// gives to shards: then one shard for each allowed core is one for each of them. Without a plan that
/// fits, the latency profile's layout is taken. Returns the CPUs.
///
/// # Errors
/// When this host cannot be read or the kernel refuses.
pub fn settle(state: &Path) -> io::Result<CpuSet> {
    let host = Host::read(&Live::machine(), "this machine").map_err(io::Error::other)?;
    let plan = applied_plan(state, &host).unwrap_or_else(|| Plan::of(&host, Profile::Latency));
    let cpus = plan.layout.shard_cpus().and(&host.usable());
    probe::pin_to(&cpus)?;
    Ok(cpus)
}

/// What [`check`] finds serious on this machine; nothing when it cannot be read.
pub fn serious() -> Vec<Finding> {
    let host = Host::read(&Live::machine(), "this machine");
    let findings = host.map(|host| check(&host)).unwrap_or_default();
    let mut findings = findings;
    findings.retain(|finding| finding.severity == Severity::Serious);
    findings
}

#[cfg(test)]
mod tests {
    use super::{applied_plan, settle};
    use crate::host::Host;
    use crate::kernel::Live;
    use crate::plan::{Plan, Profile};

    #[test]
    fn a_server_settles_on_the_cpus_of_the_plan() {
        let state = tempfile::tempdir().unwrap();
        let thread = std::thread::spawn(move || {
            let cpus = settle(state.path()).unwrap();
            let allowed = rustix::thread::sched_getaffinity(None).unwrap();
            let count = usize::try_from(allowed.count()).unwrap();
            assert_eq!(count, cpus.len());
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_plan_of_another_host_is_not_followed() {
        let state = tempfile::tempdir().unwrap();
        let host = Host::read(&Live::machine(), "this machine").unwrap();
        let mut plan = Plan::of(&host, Profile::Throughput);
        let write = |plan: &Plan| {
            std::fs::write(
                state.path().join(super::PLAN_FILE),
                serde_json::to_string(plan).unwrap(),
            )
            .unwrap();
        };
        write(&plan);
        assert_eq!(applied_plan(state.path(), &host).as_ref(), Some(&plan));
        plan.host = "another".into();
        write(&plan);
        assert_eq!(applied_plan(state.path(), &host), None);
    }
}
