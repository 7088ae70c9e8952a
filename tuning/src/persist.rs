//! The systemd unit that plans and applies again at every boot, before Torc starts.
//!
//! It plans anew rather than replaying an old plan: numbers of interrupts, names of devices and
//! defaults of the kernel may have changed since. Written only on request.

use crate::plan::Profile;

/// File name of the unit.
pub const UNIT: &str = "torc-tune.service";

/// The unit's text for a binary at `binary` that keeps its journal in `state`.
pub fn unit(binary: &str, profile: Profile, state: &str) -> String {
    format!(
        "\
[Unit]
Description=Torc: layout of shards, interrupts and kernel settings
Documentation=man:torc(1)
After=systemd-sysctl.service systemd-udev-settle.service network-pre.target irqbalance.service
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

#[cfg(test)]
mod tests {
    use super::{Profile, unit};

    #[test]
    fn the_unit_applies_at_start_and_undoes_at_stop() {
        let text = unit("/usr/bin/torc", Profile::Latency, "/var/lib/torc-tune");
        assert!(text.contains("ExecStart=/usr/bin/torc tune apply --profile latency"));
        assert!(text.contains("ExecStop=/usr/bin/torc tune rollback"));
        assert!(text.contains("Before=torc.service"));
    }
}
