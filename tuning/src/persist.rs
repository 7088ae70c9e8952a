//! The systemd unit that plans and applies again at every boot, before Torc starts.
//!
//! It plans anew rather than replaying an old plan: numbers of interrupts, names of devices and
//! defaults of the kernel may have changed since. Written only on request.

use crate::plan::Profile;

/// File name of the unit.
pub const UNIT: &str = "torc-tune.service";

/// The unit's text for a binary at `binary` that keeps its journal in `state`. It waits for the network:
/// a card has no interrupts to move before it is up.
pub fn unit(binary: &str, profile: Profile, state: &str) -> String {
    let (binary, state) = (quoted(binary), quoted(state));
    format!(
        "\
[Unit]
Description=Torc: layout of shards, interrupts and kernel settings
Wants=network-online.target
After=systemd-sysctl.service network-online.target irqbalance.service
Before=torc.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={binary} tune apply --profile {profile} --state {state} --confirm-within 0s
ExecStop={binary} tune rollback --state {state}
ProtectHome=yes
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
",
        profile = profile.name()
    )
}

/// A word of a command line as systemd reads it.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/-_.+".contains(letter);
    if word.chars().all(plain) {
        return word.to_owned();
    }
    let mut quoted = word.replace('\\', "\\\\").replace('"', "\\\"");
    quoted = quoted.replace('%', "%%").replace('$', "$$");
    format!("\"{quoted}\"")
}

#[cfg(test)]
mod tests {
    use super::{Profile, unit};

    #[test]
    fn the_unit_runs_when_the_cards_are_up_and_before_the_server() {
        let text = unit("/usr/bin/torc", Profile::Latency, "/var/lib/torc-tune");
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        assert!(line("After=").contains("network-online.target"));
        assert!(line("Wants=").contains("network-online.target"));
        assert!(line("Before=").contains("torc.service"));
    }

    #[test]
    fn odd_paths_stay_single_words() {
        let text = unit("/opt/my tools/torc", Profile::Latency, "/var/50%");
        assert!(text.contains("ExecStart=\"/opt/my tools/torc\" tune apply"));
        assert!(text.contains("--state \"/var/50%%\""));
    }

    #[test]
    fn the_unit_applies_at_start_and_undoes_at_stop() {
        let text = unit("/usr/bin/torc", Profile::Latency, "/var/lib/torc-tune");
        assert!(text.contains("ExecStart=/usr/bin/torc tune apply --profile latency"));
        assert!(text.contains("ExecStop=/usr/bin/torc tune rollback"));
    }
}
