//! Ctrl-C and SIGTERM: a measurement ends early, and what was measured until then is reported all the
//! same. A second one ends the program at once.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::output::note;
use crate::failure::Failure;

/// A signal that comes so soon after the first is the same one: `timeout` sends its own to the program
/// and then to the whole group.
const SAME_WITHIN: Duration = Duration::from_millis(500);

/// The signal that came first; 0 before. Signals are the process's, and so is this.
static CAUGHT: AtomicU8 = AtomicU8::new(0);

/// Catches the first signal from here on.
///
/// # Errors
/// The kernel's.
pub fn catch() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::spawn(move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            let since = first.get_or_insert_with(Instant::now).elapsed();
            if since > SAME_WITHIN {
                // It ends the program; where it cannot, the measurement's own end does.
                emulate_default_handler(signal).ok();
            }
            let number = u8::try_from(signal).unwrap_or(0);
            CAUGHT
                .compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed)
                .ok();
        }
    });
    Ok(())
}

fn signal() -> Option<u8> {
    let caught = CAUGHT.load(Ordering::Relaxed);
    (caught > 0).then_some(caught)
}

/// Whether a signal has come.
pub fn came() -> bool {
    signal().is_some()
}

/// Tells what is waited for, a while after a signal.
pub fn tell() {
    note("interrupted: waiting for answers that are outstanding (again ends it at once)");
}

/// Fails when a signal has come, before anything was measured that could be reported.
pub fn check() -> Result<(), Failure> {
    end(Ok(()))
}

/// What a command ends with: as it would, or with the exit status of the signal that cut it short.
/// A value that was wrong stays one.
pub fn end(ended: Result<(), Failure>) -> Result<(), Failure> {
    match signal() {
        Some(signal) => Err(ended
            .err()
            .unwrap_or_else(|| Failure::new("interrupted"))
            .interrupted(signal)),
        None => ended,
    }
}
