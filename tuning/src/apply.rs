//! Carrying out changes: all of them or none, and back again byte for byte.
//!
//! Order: every file is read, compared with what the plan saw, and asked whether it would let a write
//! in; then all of that is in the journal, durably; only then is the first byte written. Each write is
//! read back, since a kernel may accept a value and keep another. The first write that does not
//! hold undoes all. A process killed anywhere leaves a journal from which [`recover`] undoes the rest.

use std::path::Path;

use thiserror::Error;

use crate::change::{Change, Syntax, Target};
use crate::host::InterruptNumbers;
use crate::journal::{JOURNAL_SCHEMA, Journal, JournalError, Lock, Record, Saved};
use crate::kernel::{Kernel, Refusal};
use crate::plan::Plan;
use crate::server::PLAN_FILE;

/// Why changes were not made, or could not be undone.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// Nothing was written: a file refuses writes.
    #[error("nothing was changed: {knob} cannot be written ({refusal})")]
    Closed {
        /// Which knob.
        knob: String,
        /// The kernel's answer.
        refusal: Refusal,
    },
    /// Nothing was written: a file or interrupt is gone.
    #[error("nothing was changed: {knob} is no longer there; plan again")]
    Gone {
        /// Which knob.
        knob: String,
    },
    /// Nothing was written: the host is no longer as planned for.
    #[error("nothing was changed: {knob} says {now:?}, the plan saw {planned:?}; plan again")]
    Stale {
        /// Which knob.
        knob: String,
        /// Value now.
        now: String,
        /// Value when planned.
        planned: String,
    },
    /// A write did not hold; everything is as it was.
    #[error("everything is as it was: {knob} did not take {want:?} ({why})")]
    NotTaken {
        /// Which knob.
        knob: String,
        /// What was written.
        want: String,
        /// The kernel's answer, or what it shows instead.
        why: String,
    },
    /// Some bytes could not be restored; the journal stays open and any later command tries again.
    #[error("could not restore {}; the journal {journal} keeps what stood there", list(.left))]
    NotRestored {
        /// What is not as it was, with the reason.
        left: Vec<String>,
        /// The journal.
        journal: String,
    },
    /// An earlier transaction waits for its confirmation.
    #[error(
        "an earlier apply waits to be confirmed: run `torc tune confirm` or `torc tune rollback` first"
    )]
    Unconfirmed,
    /// There is no transaction to confirm or to undo.
    #[error("no changes of `torc tune` are in force{}", undone(.last_undone))]
    NoneInForce {
        /// Why the newest ones were undone, if there were any.
        last_undone: Option<String>,
    },
    /// The changes could not be recorded, so none was made, or all were undone.
    #[error("everything is as it was: {0}")]
    Unrecorded(JournalError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

fn undone(reason: &Option<String>) -> String {
    let words = |reason| format!(": the last ones were undone, as {reason}");
    reason.as_ref().map_or_else(String::new, words)
}

fn list(left: &[String]) -> String {
    left.join(", ")
}

/// What [`apply`] is told besides the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Name of the plan.
    pub plan: String,
    /// Seconds since 1970 at which the changes go away unless confirmed.
    pub confirm_before_s: Option<u64>,
    /// Now, in seconds since 1970.
    pub now_s: u64,
}

/// What [`recover`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// Nothing to do.
    Nothing,
    /// Changes were undone, for this reason.
    Undone(&'static str),
}

/// Makes all changes, or none. Returns how many writes it took.
pub fn apply(
    kernel: &impl Kernel,
    directory: &Path,
    changes: &[Change],
    options: &ApplyOptions,
) -> Result<usize, ApplyError> {
    let _lock = Lock::take(directory)?;
    recover_locked(kernel, directory, options.now_s)?;
    if let Some(earlier) = Journal::newest(directory)?
        && !earlier.is_confirmed()
    {
        return Err(ApplyError::Unconfirmed);
    }
    let saved = look(kernel, changes)?;
    if verify(kernel, changes).is_empty() {
        return Ok(0);
    }
    let mut journal = Journal::begin(
        directory,
        Record::Begun {
            schema: JOURNAL_SCHEMA,
            plan: options.plan.clone(),
            boot: boot(kernel),
            changes: changes.to_vec(),
            saved,
        },
    )
    .map_err(ApplyError::Unrecorded)?;
    let writes = match write_all(kernel, changes) {
        Ok(writes) => writes,
        Err((change, why)) => {
            undo(kernel, &mut journal, "a write did not hold")?;
            return Err(ApplyError::NotTaken {
                knob: change.knob.clone(),
                want: change.want.clone(),
                why,
            });
        }
    };
    let mut recorded = journal.append(Record::Applied {
        confirm_before_s: options.confirm_before_s,
    });
    if recorded.is_ok() && options.confirm_before_s.is_none() {
        recorded = journal.append(Record::Confirmed);
    }
    if let Err(error) = recorded {
        restore_all(kernel, &journal)?;
        // Refused as well, most likely. Then the next command finds an unfinished journal and restores
        // once more.
        drop(journal.append(Record::RolledBack {
            reason: error.to_string(),
        }));
        return Err(ApplyError::Unrecorded(error));
    }
    Ok(writes)
}

/// Reads everything that will be touched and finds out, without writing, whether it can be.
fn look(kernel: &impl Kernel, changes: &[Change]) -> Result<Vec<Saved>, ApplyError> {
    let numbers = InterruptNumbers::read(kernel);
    let mut saved: Vec<Saved> = Vec::new();
    for change in changes {
        let gone = || ApplyError::Gone {
            knob: change.knob.clone(),
        };
        let closed = |refusal| ApplyError::Closed {
            knob: change.knob.clone(),
            refusal,
        };
        let path = change.target.path(&numbers).ok_or_else(gone)?;
        let before = kernel.read(&path).map_err(closed)?;
        kernel.writable(&path).map_err(closed)?;
        let now = change.syntax.value(&before);
        let planned = change.syntax.value(change.now.as_bytes());
        if now != planned && !change.is_met_by(&before) {
            return Err(ApplyError::Stale {
                knob: change.knob.clone(),
                now,
                planned,
            });
        }
        for disturbed in &change.disturbs {
            // A file that this kernel lacks cannot be disturbed.
            let target = Target::File(disturbed.path.clone());
            if saved.iter().any(|saved| saved.target == target) {
                continue;
            }
            if let Ok(before) = kernel.read(&disturbed.path) {
                saved.push(Saved::disturbed(disturbed, before));
            }
        }
        saved.retain(|saved| saved.target != change.target);
        saved.push(Saved {
            target: change.target.clone(),
            before,
            syntax: change.syntax,
        });
    }
    Ok(saved)
}

type NotHeld<'a> = (&'a Change, String);

/// Writes what does not say it yet. Returns how many writes it took.
fn write_all<'a>(kernel: &impl Kernel, changes: &'a [Change]) -> Result<usize, NotHeld<'a>> {
    let numbers = InterruptNumbers::read(kernel);
    let mut writes = 0;
    for change in changes {
        if holds(kernel, &numbers, change).is_ok() {
            continue;
        }
        let Some(path) = change.target.path(&numbers) else {
            return Err((change, "it is gone".into()));
        };
        let written = kernel.write(&path, change.want.as_bytes());
        written.map_err(|refusal| (change, refusal.error.to_string()))?;
        holds(kernel, &numbers, change)?;
        writes += 1;
    }
    // A later write may have pushed an earlier one over.
    let numbers = InterruptNumbers::read(kernel);
    changes
        .iter()
        .try_for_each(|change| holds(kernel, &numbers, change))?;
    Ok(writes)
}

fn holds<'a>(
    kernel: &impl Kernel,
    numbers: &InterruptNumbers,
    change: &'a Change,
) -> Result<(), NotHeld<'a>> {
    let path = change.target.path(numbers);
    let path = path.ok_or_else(|| (change, "it is gone".to_owned()))?;
    let contents = kernel
        .read(&path)
        .map_err(|refusal| (change, refusal.to_string()))?;
    if change.is_met_by(&contents) {
        Ok(())
    } else {
        let shown = change.syntax.value(&contents);
        Err((change, format!("the kernel shows {shown:?} instead")))
    }
}

fn boot(kernel: &impl Kernel) -> String {
    let id = kernel.text("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_else(|| "unknown".into())
}

/// Restores every byte and records it.
fn undo(kernel: &impl Kernel, journal: &mut Journal, reason: &str) -> Result<(), ApplyError> {
    restore_all(kernel, journal)?;
    journal.append(Record::RolledBack {
        reason: reason.to_owned(),
    })?;
    forget_plan(journal);
    Ok(())
}

/// Restores every byte, last write first. Files that are gone took their setting with them.
fn restore_all(kernel: &impl Kernel, journal: &Journal) -> Result<(), ApplyError> {
    let saved = journal.begun().1.to_vec();
    let numbers = InterruptNumbers::read(kernel);
    let mut left = Vec::new();
    // Twice, as restoring one file may disturb another that was restored before it.
    for _ in 0..2 {
        left = saved
            .iter()
            .rev()
            .filter_map(|saved| restore(kernel, &numbers, saved).err())
            .collect();
    }
    for saved in &saved {
        let Some(path) = saved.target.path(&numbers) else {
            continue;
        };
        let differs = kernel.read(&path).is_ok_and(|now| now != saved.before);
        if differs && !left.iter().any(|line: &String| line.starts_with(&path)) {
            left.push(format!("{path}: it shows another value"));
        }
    }
    if !left.is_empty() {
        return Err(ApplyError::NotRestored {
            left,
            journal: journal.path().display().to_string(),
        });
    }
    Ok(())
}

/// The server follows the plan that lies beside the journal, so that goes with its changes. A plan that
/// another transaction left stays.
fn forget_plan(journal: &Journal) {
    let path = journal.path().with_file_name(PLAN_FILE);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let plan = serde_json::from_str::<Plan>(&text);
    if plan.is_ok_and(|plan| plan.id == journal.plan()) {
        // Left behind, it is a layout without its settings: slower, not wrong.
        drop(std::fs::remove_file(path));
    }
}

fn restore(kernel: &impl Kernel, numbers: &InterruptNumbers, saved: &Saved) -> Result<(), String> {
    let Some(path) = saved.target.path(numbers) else {
        return Ok(());
    };
    let now = match kernel.read(&path) {
        Err(refusal) if refusal.is_absent() => return Ok(()),
        now => now.map_err(|refusal| refusal.to_string())?,
    };
    if now == saved.before {
        return Ok(());
    }
    let bytes = match saved.syntax {
        Syntax::Bracketed => saved.syntax.value(&saved.before).into_bytes(),
        _ => saved.before.clone(),
    };
    kernel
        .write(&path, &bytes)
        .map_err(|refusal| refusal.to_string())
}

/// Undoes what a killed process left half done, and what nobody confirmed in time. Every command that
/// writes does this first; so does the guard that `apply` leaves behind.
pub fn recover(
    kernel: &impl Kernel,
    directory: &Path,
    now_s: u64,
) -> Result<Recovered, ApplyError> {
    let _lock = Lock::take(directory)?;
    recover_locked(kernel, directory, now_s)
}

fn recover_locked(
    kernel: &impl Kernel,
    directory: &Path,
    now_s: u64,
) -> Result<Recovered, ApplyError> {
    let Some(mut journal) = Journal::newest(directory)? else {
        return Ok(Recovered::Nothing);
    };
    if journal.boot() != boot(kernel) {
        let reason = "the host was restarted, which undid it";
        journal.append(Record::RolledBack {
            reason: reason.into(),
        })?;
        return Ok(Recovered::Undone(reason));
    }
    let late = !journal.is_confirmed()
        && journal
            .confirm_before_s()
            .is_some_and(|before| now_s >= before);
    let reason = if !journal.is_applied() {
        "it was interrupted"
    } else if late {
        "nobody confirmed it in time"
    } else {
        return Ok(Recovered::Nothing);
    };
    undo(kernel, &mut journal, reason)?;
    Ok(Recovered::Undone(reason))
}

/// Keeps the newest changes for good (until the next boot).
pub fn confirm(kernel: &impl Kernel, directory: &Path, now_s: u64) -> Result<(), ApplyError> {
    let _lock = Lock::take(directory)?;
    recover_locked(kernel, directory, now_s)?;
    let mut journal = newest(directory)?;
    if !journal.is_confirmed() {
        journal.append(Record::Confirmed)?;
    }
    Ok(())
}

/// Undoes the newest changes. Returns how many files were saved in their journal.
pub fn rollback(kernel: &impl Kernel, directory: &Path, now_s: u64) -> Result<usize, ApplyError> {
    let _lock = Lock::take(directory)?;
    if let Recovered::Undone(_) = recover_locked(kernel, directory, now_s)? {
        return Ok(0);
    }
    let mut journal = newest(directory)?;
    let files = journal.begun().1.len();
    undo(kernel, &mut journal, "somebody asked for it")?;
    Ok(files)
}

/// A change that no longer holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Drift {
    /// Which knob.
    pub knob: String,
    /// What was wished.
    pub want: String,
    /// What the kernel shows; `None` when the file or interrupt is gone.
    pub now: Option<String>,
}

/// Compares the kernel with changes that were made.
pub fn verify(kernel: &impl Kernel, changes: &[Change]) -> Vec<Drift> {
    let numbers = InterruptNumbers::read(kernel);
    let drift = |change: &Change| {
        let path = change.target.path(&numbers);
        let contents = path.and_then(|path| kernel.read(&path).ok());
        if contents
            .as_ref()
            .is_some_and(|contents| change.is_met_by(contents))
        {
            return None;
        }
        Some(Drift {
            knob: change.knob.clone(),
            want: change.want.clone(),
            now: contents.map(|contents| change.syntax.value(&contents)),
        })
    };
    changes.iter().filter_map(drift).collect()
}

fn newest(directory: &Path) -> Result<Journal, ApplyError> {
    match Journal::newest(directory)? {
        Some(journal) => Ok(journal),
        None => Err(ApplyError::NoneInForce {
            last_undone: Journal::last_undone(directory)?,
        }),
    }
}

/// The changes in force: those of the newest transaction.
pub fn in_force(directory: &Path) -> Result<Vec<Change>, ApplyError> {
    let journal = newest(directory)?;
    Ok(journal.begun().0.to_vec())
}
