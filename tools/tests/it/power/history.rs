//! What writers did before a power cut, and what may be found after it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use torc_client::{Client, ClientError, Options};

/// Keys of each writer.
const KEYS: usize = 300;

/// One writer, with keys of its own, which writes one after the other. The number of a write makes its
/// value, so that a value says which write it is of.
pub struct Writer {
    index: u64,
    rng: Xoshiro256PlusPlus,
    next_number: u64,
    /// What each key held before the writes below: the number of the write; `None` for no value.
    before: Vec<Option<u64>>,
    writes: Vec<Write>,
    /// What ended its writing, for people.
    pub ended: String,
}

/// A write that was sent.
struct Write {
    key: usize,
    /// `None` deletes.
    number: Option<u64>,
    /// When it was sent, counted in events of all writers.
    sent_at: u64,
    /// When it was acknowledged.
    acked_at: Option<u64>,
}

/// What a writer finds again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Survivors {
    /// Writes that were sent.
    pub sent: usize,
    /// Writes that were acknowledged: the first so many.
    pub acked: usize,
    /// The first so many writes at least are there.
    pub kept: usize,
    /// When the last of them was sent.
    pub last_sent_at: Option<u64>,
    /// When the first that is not there was acknowledged.
    pub lost_acked_at: Option<u64>,
}

impl Writer {
    pub fn new(index: u64) -> Self {
        Self {
            index,
            rng: Xoshiro256PlusPlus::seed_from_u64(index),
            next_number: 0,
            before: vec![None; KEYS],
            writes: Vec::new(),
            ended: String::new(),
        }
    }

    /// Writes until the node is gone or `stop` is set.
    pub fn write(&mut self, address: SocketAddr, events: &AtomicU64, stop: &AtomicBool) {
        let mut client = client(address);
        while !stop.load(Ordering::Relaxed) {
            let write = self.draw(events.fetch_add(1, Ordering::SeqCst));
            let key = self.key(write.key);
            let done = loop {
                let done = match write.number {
                    Some(number) => client.put(&key, &self.value(write.key, number)),
                    None => client.delete(&key),
                };
                match done {
                    // Refused for now, and not carried out.
                    Err(ClientError::Failed(failure))
                        if !failure.in_doubt && !stop.load(Ordering::Relaxed) => {}
                    other => break other,
                }
            };
            let acked_at = events.fetch_add(1, Ordering::SeqCst);
            self.writes.push(Write {
                acked_at: done.is_ok().then_some(acked_at),
                ..write
            });
            if let Err(error) = done {
                self.ended = error.to_string();
                return;
            }
        }
    }

    fn draw(&mut self, sent_at: u64) -> Write {
        let drawn = self.rng.next_u64();
        self.next_number += 1;
        Write {
            key: usize::try_from(drawn >> 32).unwrap() % KEYS,
            number: (!drawn.is_multiple_of(20)).then_some(self.next_number),
            sent_at,
            acked_at: None,
        }
    }

    fn key(&self, key: usize) -> Vec<u8> {
        format!("writer-{}/key-{key}", self.index).into_bytes()
    }

    /// The value of a write: its number, then bytes that follow from it. One in 50 is large.
    fn value(&self, key: usize, number: u64) -> Vec<u8> {
        let seed = (self.index << 48) ^ (number << 12) ^ u64::try_from(key).unwrap();
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let bytes_max = if rng.next_u64().is_multiple_of(50) {
            200_000
        } else {
            2_000
        };
        let mut value = vec![0; usize::try_from(rng.next_u64() % bytes_max).unwrap()];
        rng.fill_bytes(&mut value);
        [&number.to_le_bytes()[..], &value].concat()
    }

    /// Reads all keys and says which writes they are of. What it finds is where the next round starts.
    ///
    /// # Panics
    /// When a value is there that was never written, or the keys together show what was at no time.
    pub fn check(&mut self, address: SocketAddr) -> Survivors {
        let mut client = client(address);
        let found: Vec<Option<u64>> = (0..KEYS)
            .map(|key| {
                let name = String::from_utf8(self.key(key)).unwrap();
                let got = client.get(name.as_bytes()).unwrap();
                assert!(got.siblings.len() <= 1, "{name} has siblings");
                let value = got.value()?;
                let number = u64::from_le_bytes(value[..8].try_into().unwrap());
                assert!(
                    *value == self.value(key, number),
                    "{name} holds a value that was never written: {} bytes, number {number}",
                    value.len()
                );
                Some(number)
            })
            .collect();
        let survivors = survivors(&self.before, &self.writes, &found);
        let Some(survivors) = survivors else {
            panic!(
                "writer {}: no prefix of its {} writes leaves what was found: {}",
                self.index,
                self.writes.len(),
                self.differences(&found)
            );
        };
        self.before = found;
        self.writes.clear();
        survivors
    }

    /// The keys that do not hold what the last acknowledged write left, for people.
    fn differences(&self, found: &[Option<u64>]) -> String {
        let mut expected = self.before.clone();
        for write in self.writes.iter().filter(|write| write.acked_at.is_some()) {
            expected[write.key] = write.number;
        }
        let differing = (0..KEYS).filter(|key| expected[*key] != found[*key]);
        let lines = differing.map(|key| {
            let (expected, found) = (expected[key], found[key]);
            format!("key {key}: expected {expected:?}, found {found:?}")
        });
        lines.collect::<Vec<_>>().join("; ")
    }
}

/// Which first writes leave what was `found`, given what was there `before`. `None` when none do.
fn survivors(before: &[Option<u64>], writes: &[Write], found: &[Option<u64>]) -> Option<Survivors> {
    let mut state = before.to_vec();
    let mut differing = (0..KEYS).filter(|key| state[*key] != found[*key]).count();
    // More than one prefix fits where a write changes nothing, as a delete of what is not there.
    let (mut shortest, mut longest) = (None, None);
    for kept in 0..=writes.len() {
        if differing == 0 {
            shortest = shortest.or(Some(kept));
            longest = Some(kept);
        }
        if let Some(write) = writes.get(kept) {
            let key = write.key;
            differing -= usize::from(state[key] != found[key]);
            state[key] = write.number;
            differing += usize::from(state[key] != found[key]);
        }
    }
    let (shortest, longest) = (shortest?, longest?);
    Some(Survivors {
        sent: writes.len(),
        acked: writes
            .iter()
            .take_while(|write| write.acked_at.is_some())
            .count(),
        kept: longest,
        last_sent_at: shortest.checked_sub(1).map(|last| writes[last].sent_at),
        lost_acked_at: writes.get(longest).and_then(|first| first.acked_at),
    })
}

pub fn client(address: SocketAddr) -> Client {
    let options = Options {
        timeout: Duration::from_secs(10),
        ..Options::default()
    };
    Client::new(address, options)
}

#[test]
fn only_what_some_prefix_of_the_writes_leaves_passes() {
    let write = |key, number, at| Write {
        key,
        number,
        sent_at: at,
        acked_at: (at < 30).then_some(at + 1),
    };
    let before = vec![None; KEYS];
    let writes = [
        write(0, Some(1), 0),
        write(1, Some(2), 10),
        write(0, None, 20),
        write(1, Some(4), 30),
    ];
    let with = |first, second| {
        let mut found = before.clone();
        (found[0], found[1]) = (first, second);
        survivors(&before, &writes, &found)
    };
    let kept = |first, second| with(first, second).map(|survivors| survivors.kept);
    assert_eq!(kept(None, None), Some(0));
    assert_eq!(kept(Some(1), None), Some(1));
    assert_eq!(kept(Some(1), Some(2)), Some(2));
    assert_eq!(kept(None, Some(4)), Some(4));
    // The second write without the first, the fourth without the third, and one that never was.
    assert_eq!(kept(Some(1), Some(4)), None);
    assert_eq!(kept(Some(7), None), None);
    let all = with(None, Some(2)).unwrap();
    assert_eq!((all.sent, all.acked, all.kept), (4, 3, 3));
    assert_eq!((all.last_sent_at, all.lost_acked_at), (Some(20), None));
    assert_eq!(with(Some(1), None).unwrap().lost_acked_at, Some(11));
}
