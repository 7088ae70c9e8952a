//! One wish for one file: what it is to say, how that file spells values, why, and at what risk.

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::host::{Choice, InterruptNumbers};

/// How a file spells its value. Two spellings of one value are the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Syntax {
    /// A word or line.
    Word,
    /// A decimal number.
    Number,
    /// All choices, the one in force in brackets; written without them.
    Bracketed,
    /// A mask of CPUs.
    Mask,
    /// A list of CPUs.
    List,
}

impl Syntax {
    /// The value that `contents` spell, in one canonical form.
    pub fn value(self, contents: &[u8]) -> String {
        let text = String::from_utf8_lossy(contents);
        let text = text.trim();
        let canonical = match self {
            Syntax::Word => None,
            Syntax::Number => text.parse::<i64>().ok().map(|number| number.to_string()),
            Syntax::Bracketed => Choice::parse(text).map(|choice| choice.current),
            Syntax::Mask => CpuSet::parse_mask(text).ok().map(|cpus| cpus.to_mask()),
            Syntax::List => CpuSet::parse_list(text).ok().map(|cpus| cpus.to_string()),
        };
        canonical.unwrap_or_else(|| text.to_owned())
    }
}

/// Which file. Interrupts are named, since their numbers change with a reload of the driver.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// A path.
    File(String),
    /// `smp_affinity_list` of the interrupt with this name.
    Interrupt(String),
}

impl Target {
    /// The path now; `None` when the interrupt is gone.
    pub fn path(&self, numbers: &InterruptNumbers) -> Option<String> {
        match self {
            Target::File(path) => Some(path.clone()),
            Target::Interrupt(name) => {
                let number = numbers.get(name)?;
                Some(format!("/proc/irq/{number}/smp_affinity_list"))
            }
        }
    }
}

/// What a change may cost beyond its purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Risk {
    /// Nothing notable.
    Low,
    /// Power or processor time.
    Power,
    /// Other programs of the host feel it.
    Others,
}

/// A file that another file's write changes along with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disturbed {
    /// Path.
    pub path: String,
    /// Its spelling.
    pub syntax: Syntax,
}

/// A planned write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Name for people, stable over boots: `irq virtio2-input.0`, `nvme0n1 scheduler`.
    pub knob: String,
    /// Where.
    pub target: Target,
    /// How the file spells values.
    pub syntax: Syntax,
    /// Value at the time of planning.
    pub now: String,
    /// Value wished.
    pub want: String,
    /// For numbers that drivers round: the highest that is as good as the wish.
    pub at_most: Option<u64>,
    /// Files that this write changes along.
    pub disturbs: Vec<Disturbed>,
    /// Why.
    pub reason: String,
    /// What it may cost.
    pub risk: Risk,
}

impl Change {
    /// Whether these contents fulfil the wish.
    pub fn is_met_by(&self, contents: &[u8]) -> bool {
        let value = self.syntax.value(contents);
        let rounded = match (self.at_most, value.parse::<u64>()) {
            (Some(most), Ok(number)) => number <= most,
            _ => false,
        };
        rounded || value == self.syntax.value(self.want.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::Syntax;

    #[test]
    fn values_are_compared_as_the_kernel_means_them() {
        let value = |syntax: Syntax, text: &str| syntax.value(text.as_bytes());
        assert_eq!(
            value(Syntax::Bracketed, "none [mq-deadline] kyber\n"),
            "mq-deadline"
        );
        assert_eq!(value(Syntax::Bracketed, "none"), "none");
        assert_eq!(value(Syntax::Mask, "00000000,0000000f\n"), "f");
        assert_eq!(value(Syntax::List, "0,1,2\n"), "0-2");
        assert_eq!(value(Syntax::Number, "007\n"), "7");
        assert_eq!(value(Syntax::Word, " a b \n"), "a b");
    }
}
