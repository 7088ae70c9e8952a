//! After a fill: waits until the servers have written out and merged what they took, so that the
//! measurement does not pay for the fill.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::interrupt;
use super::limits::Reading;
use crate::endpoint::{Endpoint, Request};

/// How often is looked.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Looks in a row that must find rest.
const CALM_LOOKS: u32 = 2;
/// Longest wait.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// A disk that works less than this share of the time is calm.
const DISK_CALM: f64 = 0.05;

/// What can be looked at: Torc's own counters, or the disks of this host.
pub enum Watched {
    /// HTTP addresses of Torc's nodes.
    Torc(Vec<SocketAddr>),
    /// Nothing but this host's disks, since the servers run here.
    Disks,
    /// Nothing: the servers are elsewhere.
    Nothing,
}

/// Waits; tells how long it took, or that the wait was given up.
pub fn settle(watched: &Watched) -> String {
    let begun = Instant::now();
    let mut calm = 0;
    let mut before = look(watched);
    if before.is_none() {
        return "not waited for the servers to settle: nothing of them can be seen".into();
    }
    while begun.elapsed() < WAIT_MAX && !interrupt::came() {
        std::thread::sleep(LOOK_EVERY);
        let now = look(watched);
        calm = if rests(&before, &now) { calm + 1 } else { 0 };
        if calm == CALM_LOOKS {
            return format!("settled after {:.1} s", begun.elapsed().as_secs_f64());
        }
        before = now;
    }
    format!(
        "not settled after {:.0} s: measured all the same",
        begun.elapsed().as_secs_f64()
    )
}

enum Look {
    /// Work done so far, and work that is left.
    Counters(Vec<f64>, f64),
    Disks(Reading),
}

fn look(watched: &Watched) -> Option<Look> {
    match watched {
        Watched::Nothing => None,
        Watched::Disks => Some(Look::Disks(Reading::now(&[]))),
        Watched::Torc(addresses) => {
            let mut done = Vec::new();
            let mut left = 0.0;
            for address in addresses {
                let endpoint = Endpoint::new(&format!("http://{address}")).ok()?;
                let request = Request {
                    method: "GET",
                    path: "/metrics".into(),
                    ..Request::default()
                };
                let answer = endpoint.expect(request, &[]).ok()?;
                let (counters, debt) = counters(&String::from_utf8_lossy(&answer.body));
                done.extend(counters);
                left += debt;
            }
            Some(Look::Counters(done, left))
        }
    }
}

/// Flushes and compactions done, and the bytes that are still to be compacted.
fn counters(metrics: &str) -> (Vec<f64>, f64) {
    let mut done = Vec::new();
    let mut debt = 0.0;
    for line in metrics.lines() {
        let Some((name, value)) = line.split_once(' ') else {
            continue;
        };
        let value: f64 = value.parse().unwrap_or(0.0);
        match name {
            "torc_flushed_bytes_total"
            | "torc_flushes_total"
            | "torc_compactions_total"
            | "torc_compacted_bytes_total" => done.push(value),
            "torc_compaction_debt_bytes" => debt += value,
            _ => {}
        }
    }
    (done, debt)
}

fn rests(before: &Option<Look>, now: &Option<Look>) -> bool {
    match (before, now) {
        (Some(Look::Counters(before, _)), Some(Look::Counters(now, left))) => {
            before == now && *left <= 0.0
        }
        (Some(Look::Disks(before)), Some(Look::Disks(now))) => before
            .until(now)
            .iter()
            .filter(|one| one.name.starts_with("disk "))
            .all(|one| one.share < DISK_CALM),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_rests_when_nothing_was_done_and_nothing_is_left() {
        let look = |flushed: u32, debt: u32| {
            let text = format!(
                "# TYPE x counter\ntorc_flushed_bytes_total {flushed}\n\
                 torc_compaction_debt_bytes {debt}\n"
            );
            let (done, left) = counters(&text);
            Some(Look::Counters(done, left))
        };
        assert!(rests(&look(7, 0), &look(7, 0)));
        assert!(!rests(&look(6, 0), &look(7, 0)), "it flushed");
        assert!(!rests(&look(7, 9), &look(7, 9)), "it has debt");
        assert!(!rests(&look(7, 0), &None), "it does not answer");
    }
}
