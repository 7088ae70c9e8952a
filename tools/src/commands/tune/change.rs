//! Changing this machine: `apply`, `confirm`, `verify`, `rollback`, `persist`, and the guard.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use torc_tuning::apply::{self, ApplyError, ApplyOptions, Recovered};
use torc_tuning::change::Change;
use torc_tuning::journal::JournalError;
use torc_tuning::kernel::Live;
use torc_tuning::persist as unit;
use torc_tuning::plan::Plan;
use torc_tuning::server::PLAN_FILE;

use super::{ApplyArgs, GuardArgs, PersistArgs, VerifyArgs, host};
use crate::failure::Failure;

/// How long the guard tries for the lock that another command holds.
const GUARD_PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

pub(super) fn need_root() -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new(
        "this needs root's rights; nothing was changed",
    ))
}

fn failed(error: &ApplyError) -> Failure {
    Failure::new(error.to_string())
}

pub(super) fn apply(state: &Path, args: &ApplyArgs) -> Result<(), Failure> {
    need_root()?;
    let host = host::read(None)?;
    let plan: Plan = match &args.plan {
        None => Plan::of(&host, args.profile.into()),
        Some(path) => {
            let place = path.display();
            let text = std::fs::read_to_string(path)
                .map_err(|error| Failure::new(format!("{place}: {error}")))?;
            serde_json::from_str(&text)
                .map_err(|error| Failure::new(format!("{place} is no plan: {error}")))?
        }
    };
    if plan.host != host.fingerprint() {
        return Err(Failure::new(
            "the plan is for another host, or this one's devices changed; nothing was changed",
        ));
    }
    let writes = carry_out(state, &plan.id, &plan.changes, args.confirm_within)?;
    let text =
        serde_json::to_string_pretty(&plan).map_err(|error| Failure::new(error.to_string()))?;
    host::write(&state.join(PLAN_FILE), text)?;
    for advice in &plan.boot {
        println!(
            "boot argument, not set: {} ({})",
            advice.argument, advice.reason
        );
    }
    match (writes, args.confirm_within.as_secs()) {
        (0, _) => println!(
            "nothing to change: the host is as plan {} wants it",
            plan.id
        ),
        (_, 0) => println!("{writes} changes are in force until the next boot"),
        (_, seconds) => println!(
            "{writes} changes are in force; run `torc tune confirm` within {seconds} s or they are undone"
        ),
    }
    Ok(())
}

/// Starts the guard, then writes.
pub(super) fn carry_out(
    state: &Path,
    plan: &str,
    changes: &[Change],
    confirm_within: Duration,
) -> Result<usize, Failure> {
    std::fs::create_dir_all(state)
        .map_err(|error| Failure::new(format!("{}: {error}", state.display())))?;
    let now_s = now_s();
    let seconds = confirm_within.as_secs();
    let confirm_before_s = (seconds > 0).then(|| now_s + seconds);
    // Before the first write: whatever happens to this process, someone undoes. It looks just after the
    // time is over.
    start_guard(state, if seconds > 0 { seconds + 1 } else { 5 })?;
    let options = ApplyOptions {
        plan: plan.to_owned(),
        confirm_before_s,
        now_s,
    };
    apply::apply(&Live::machine(), state, changes, &options).map_err(|error| failed(&error))
}

fn start_guard(state: &Path, seconds: u64) -> Result<(), Failure> {
    let binary = std::env::current_exe()?;
    let mut command = Command::new(binary);
    command
        .args(["tune", "guard", "--after", &seconds.to_string(), "--state"])
        .arg(state)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map(drop).map_err(|error| {
        Failure::new(format!(
            "cannot start the guard, so nothing was changed: {error}"
        ))
    })
}

/// Waits in a session of its own, so that the end of a terminal or connection does not end it.
pub(super) fn guard(state: &Path, args: &GuardArgs) -> Result<(), Failure> {
    // Refused when it leads a group already; it is then alone anyway.
    rustix::process::setsid().ok();
    std::thread::sleep(Duration::from_secs(args.after));
    let begun = Instant::now();
    loop {
        match apply::recover(&Live::machine(), state, now_s()) {
            Ok(_) => return Ok(()),
            Err(ApplyError::Journal(JournalError::Busy { .. }))
                if begun.elapsed() < GUARD_PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return Err(failed(&error)),
        }
    }
}

pub(super) fn confirm(state: &Path) -> Result<(), Failure> {
    need_root()?;
    apply::confirm(&Live::machine(), state, now_s()).map_err(|error| failed(&error))?;
    println!("kept until the next boot; `torc tune persist` makes it so at every boot");
    Ok(())
}

pub(super) fn rollback(state: &Path) -> Result<(), Failure> {
    need_root()?;
    let files =
        apply::rollback(&Live::machine(), state, now_s()).map_err(|error| failed(&error))?;
    println!("{files} files say what they said before");
    Ok(())
}

pub(super) fn verify(state: &Path, args: &VerifyArgs) -> Result<(), Failure> {
    let kernel = Live::machine();
    if rustix::process::geteuid().is_root()
        && let Recovered::Undone(reason) =
            apply::recover(&kernel, state, now_s()).map_err(|error| failed(&error))?
    {
        return Err(Failure::new(format!("the changes were undone: {reason}")));
    }
    let changes = apply::in_force(state).map_err(|error| failed(&error))?;
    loop {
        let drifts = apply::verify(&kernel, &changes);
        for drift in &drifts {
            let now = drift.now.as_deref().unwrap_or("nothing: it is gone");
            println!("{}: wanted {}, shows {now}", drift.knob, drift.want);
        }
        if !drifts.is_empty() {
            let mover = host::read(None)?.irqbalance.running;
            let hint = if mover {
                "; irqbalance runs and is the likely cause"
            } else {
                ""
            };
            return Err(Failure::new(format!(
                "{} of {} changes no longer hold{hint}",
                drifts.len(),
                changes.len()
            )));
        }
        println!("all {} changes hold", changes.len());
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(args.interval);
    }
}

pub(super) fn persist(state: &Path, args: &PersistArgs) -> Result<(), Failure> {
    let binary = std::env::current_exe()?;
    let text = unit::unit(
        &binary.display().to_string(),
        args.profile.into(),
        &state.display().to_string(),
    );
    let Some(directory) = &args.unit_dir else {
        print!("{text}");
        return Ok(());
    };
    let path = directory.join(unit::UNIT);
    host::write(&path, text)?;
    println!(
        "{} is written; `systemctl enable {}` makes it run at every boot",
        path.display(),
        unit::UNIT
    );
    Ok(())
}
