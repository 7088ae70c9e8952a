//! What clients did and saw: the only thing that the checkers look at.
//!
//! Abstract on purpose: every write has a number, every value names the write that it came from, and
//! a context is known by the writes that were shown with it. So the checkers know nothing of dots,
//! contexts or messages, and cannot repeat the product's mistakes.

use std::fmt;

/// A write, in order of beginning. Every value in the world is unique and names its write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u32);

impl WriteId {
    /// Position in [`History::writes`].
    pub fn index(self) -> usize {
        usize::try_from(self.0).expect("a write's number fits")
    }
}

impl fmt::Display for WriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

/// A key of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u16);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "k{}", self.0)
    }
}

/// A live value as somebody saw it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// What this write wrote.
    Of(WriteId),
    /// Bytes that nobody wrote to this key.
    Foreign(String),
}

impl Value {
    /// The write, if it is one.
    pub fn write(&self) -> Option<WriteId> {
        match self {
            Value::Of(write) => Some(*write),
            Value::Foreign(_) => None,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Of(write) => write!(f, "{write}"),
            Value::Foreign(text) => write!(f, "foreign {text:?}"),
        }
    }
}

/// What a write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Writes its value.
    Put,
    /// Removes what it has seen.
    Delete,
}

/// How an operation ended for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Acknowledged.
    Done {
        /// Replicas that the answer counts.
        replicas: u8,
        /// Hints that the answer counts.
        hints: u8,
    },
    /// Refused: the answer says that nothing happened.
    Refused(String),
    /// It may have happened, may still, or never.
    InDoubt(String),
}

impl Outcome {
    /// Whether the client was promised that it happened.
    pub fn is_done(&self) -> bool {
        matches!(self, Outcome::Done { .. })
    }

    /// Replicas that hold it for sure.
    pub fn replicas(&self) -> u8 {
        match self {
            Outcome::Done { replicas, .. } => *replicas,
            Outcome::Refused(_) | Outcome::InDoubt(_) => 0,
        }
    }

    /// Whether the client was promised that it did not happen.
    pub fn is_refused(&self) -> bool {
        matches!(self, Outcome::Refused(_))
    }
}

/// A write and all that its client knew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Who issued it.
    pub client: u16,
    /// Its key.
    pub key: KeyId,
    /// What it does.
    pub kind: Kind,
    /// The writes that were shown with its context: it replaces these and all that they replaced.
    pub seen: Vec<WriteId>,
    /// Replicas that had to ack.
    pub w: u8,
    /// Whether hints count as acks.
    pub sloppy: bool,
    /// How long after it was done its value expires; `None` = never.
    pub lives_ns: Option<u64>,
    /// Whether it was sent more than once, by its name: it may have got a dot at each coordinator.
    pub is_retried: bool,
    /// When it was issued, in nanoseconds of true civil time since the beginning, as all times here.
    pub begun_ns: u64,
    /// When its answer came.
    pub ended_ns: u64,
    /// Its answer.
    pub outcome: Outcome,
}

/// A read and what it showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Who issued it.
    pub client: u16,
    /// Its key.
    pub key: KeyId,
    /// Replicas that had to answer.
    pub r: u8,
    /// What the answer had to cover, for a read within a session.
    pub at_least: Option<Vec<WriteId>>,
    /// When it was issued.
    pub begun_ns: u64,
    /// When its answer came.
    pub ended_ns: u64,
    /// The live values; `None` when it failed.
    pub values: Option<Vec<Value>>,
    /// When each of them expires, as the answer says it; `None` = never.
    pub expire_ns: Vec<Option<u64>>,
}

/// A version of a key by its identity in the product: the dot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DotId {
    /// The actor that minted it.
    pub actor: u128,
    /// Its counter.
    pub counter: u64,
}

/// A dot as it was found in a replica's store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DotSeen {
    /// Its key.
    pub key: KeyId,
    /// The dot.
    pub dot: DotId,
    /// What is stored under it; `None` for a tombstone.
    pub value: Option<Value>,
    /// When it expires; `None` = never.
    pub expires_ns: Option<u64>,
}

/// What a replica holds of a key in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The replica.
    pub node: String,
    /// Live values.
    pub values: Vec<Value>,
    /// Hash over the writes that it holds of the key, deletes included: what repair makes equal.
    pub digest: u128,
}

/// A key when all faults are healed and the cluster had its time to converge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Final {
    /// The key.
    pub key: KeyId,
    /// What each of its replicas holds.
    pub replicas: Vec<Holding>,
    /// What a read of all replicas shows; `None` when it failed.
    pub read: Option<Vec<Value>>,
    /// What a scan of the whole keyspace shows of it; `None` when it failed.
    pub listed: Option<Vec<Value>>,
}

/// What is known of the run's times. All zero: all clocks are right, and nothing is late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// How far any clock may be off.
    pub clock_off_ns: u64,
    /// How far a stamp may be ahead of the clock of the node that made it.
    pub stamp_ahead_ns: u64,
    /// How long after its client has given up a write may still happen.
    pub late_ns: u64,
}

/// A whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Copies of a key.
    pub n: u8,
    /// Whether ranges were repaired. If not, a replica may miss what no hint brought it.
    pub is_repaired: bool,
    /// Whether of concurrent writes the one with the highest stamp stays, and no other.
    pub is_ordered_by_time: bool,
    /// Whether a replica may lose what it holds: then what nobody acknowledged may go again.
    pub loses_what_is_in_doubt: bool,
    /// What is known of its times.
    pub times: Times,
    /// When the last look at the replicas began.
    pub last_look_ns: u64,
    /// Every write, in order of beginning.
    pub writes: Vec<Write>,
    /// Every read, in order of beginning.
    pub reads: Vec<Read>,
    /// Dots found in stores, during and after the run.
    pub dots: Vec<DotSeen>,
    /// Every key in the end.
    pub finals: Vec<Final>,
}

impl History {
    /// The write with this number.
    pub fn write(&self, id: WriteId) -> &Write {
        &self.writes[id.index()]
    }

    /// Every write with its number.
    pub fn numbered(&self) -> impl Iterator<Item = (WriteId, &Write)> {
        self.writes.iter().enumerate().map(|(index, write)| {
            let number = u32::try_from(index).expect("fewer than 2^32 writes");
            (WriteId(number), write)
        })
    }

    /// Until when a write may have happened, if it has.
    pub fn latest_ns(&self, write: &Write) -> u64 {
        // An attempt of one that was retried may have been given up before another was answered.
        if write.outcome.is_done() && !write.is_retried {
            write.ended_ns
        } else {
            write.ended_ns.saturating_add(self.times.late_ns)
        }
    }

    /// When the value of a write expires at the earliest, by the clock of the node that made it; `None` = never.
    pub fn expires_ns_min(&self, write: &Write) -> Option<u64> {
        let expires_ns = write.begun_ns + write.lives_ns?;
        Some(expires_ns.saturating_sub(self.times.clock_off_ns))
    }

    /// When it expires at the latest, likewise.
    pub fn expires_ns_max(&self, write: &Write) -> Option<u64> {
        let expires_ns = self.latest_ns(write).saturating_add(write.lives_ns?);
        Some(expires_ns.saturating_add(self.times.clock_off_ns))
    }

    /// Whether a write is so much later than another that its stamp is higher whatever the clocks were.
    pub fn is_stamped_above(&self, later: &Write, earlier: &Write) -> bool {
        let apart_ns = 2 * self.times.clock_off_ns + self.times.stamp_ahead_ns;
        self.latest_ns(earlier).saturating_add(apart_ns) < later.begun_ns
    }

    /// Whether a read at `r` meets one of `acks` replicas.
    pub fn is_strict(&self, r: u8, acks: u8) -> bool {
        u16::from(r) + u16::from(acks) > u16::from(self.n)
    }
}
