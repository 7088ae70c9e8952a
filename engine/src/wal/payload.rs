//! The records inside a WAL frame, one behind the other.
//!
//! ```text
//!  0      1      5          9            13       21              29
//! +------+------+----------+------------+--------+---------------+-----+-------+
//! | kind | tree | key len  | value len  | stamp  | expires at ms | key | value |
//! +------+------+----------+------------+--------+---------------+-----+-------+
//! ```

use torc_env::{Token, TreeId};

use crate::codec::{Reader, Writer};
use crate::memtable::Packed;
use crate::record::{EntryRef, Kind};

/// Bytes of a record without its key and value.
pub(crate) const RECORD_HEADER_BYTES: usize = 29;

const KIND_VALUE: u8 = 1;
const KIND_TOMBSTONE: u8 = 2;

/// A record read from a frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Logged<'a> {
    pub(crate) tree: TreeId,
    pub(crate) kind: Kind,
    pub(crate) stamp: u64,
    pub(crate) expires_at_ms: u64,
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
}

impl<'a> Logged<'a> {
    /// The record as it is read elsewhere, with its place in the order of writing.
    pub(crate) fn entry(&self, seqno: u64) -> EntryRef<'a> {
        EntryRef {
            token: Token::of(self.tree, self.key),
            key: self.key,
            seqno,
            kind: self.kind,
            stamp: self.stamp,
            expires_at_ms: self.expires_at_ms,
            value: self.value,
        }
    }
}

/// Size of a record in a frame.
pub(crate) fn encoded_bytes(packed: &Packed) -> usize {
    RECORD_HEADER_BYTES + packed.key().len() + packed.value().len()
}

/// Writes a record to the beginning of `target`, which holds at least [`encoded_bytes`].
pub(crate) fn encode(target: &mut [u8], tree: TreeId, packed: &Packed) {
    let entry = packed.as_entry_ref();
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("held against its limit");
    Writer::new(target)
        .u8(match entry.kind {
            Kind::Value => KIND_VALUE,
            Kind::Tombstone => KIND_TOMBSTONE,
        })
        .u32(tree.0)
        .u32(len(entry.key))
        .u32(len(entry.value))
        .u64(entry.stamp)
        .u64(entry.expires_at_ms)
        .bytes(entry.key)
        .bytes(entry.value);
}

/// Reads the records of a payload; `None` when it does not hold exactly `count` well-formed ones.
pub(crate) fn decode(payload: &[u8], count: u32) -> Option<Vec<Logged<'_>>> {
    let mut fields = Reader::new(payload);
    let most = payload.len() / RECORD_HEADER_BYTES;
    let mut records = Vec::with_capacity(most.min(usize::try_from(count).ok()?));
    for _ in 0..count {
        records.push(decode_one(&mut fields)?);
    }
    fields.is_empty().then_some(records)
}

fn decode_one<'a>(fields: &mut Reader<'a>) -> Option<Logged<'a>> {
    let kind = match fields.u8()? {
        KIND_VALUE => Kind::Value,
        KIND_TOMBSTONE => Kind::Tombstone,
        _ => return None,
    };
    let tree = TreeId(fields.u32()?);
    let key_len = usize::try_from(fields.u32()?).ok()?;
    let value_len = usize::try_from(fields.u32()?).ok()?;
    Some(Logged {
        tree,
        kind,
        stamp: fields.u64()?,
        expires_at_ms: fields.u64()?,
        key: fields.bytes(key_len)?,
        value: fields.bytes(value_len)?,
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use torc_env::Token;

    use super::*;
    use crate::memtable::Arena;
    use crate::record::Record;

    fn payload() -> Vec<u8> {
        let mut arena = Arena::default();
        let mut payload = Vec::new();
        for (kind, value) in [(Kind::Value, &b"value"[..]), (Kind::Tombstone, b"")] {
            let record = Record {
                kind,
                stamp: 5,
                expires_at_ms: 6,
                value: Bytes::from_static(value),
            };
            let packed = arena.pack(&record.at(Token(1), b"key", 9));
            let at = payload.len();
            payload.resize(at + encoded_bytes(&packed), 0);
            encode(&mut payload[at..], TreeId(4), &packed);
        }
        payload
    }

    #[test]
    fn records_come_back_in_order() {
        let payload = payload();
        let records = decode(&payload, 2).unwrap();
        assert_eq!(
            (records[0].key, records[0].value),
            (&b"key"[..], &b"value"[..])
        );
        assert_eq!(
            (records[1].kind, records[1].tree),
            (Kind::Tombstone, TreeId(4))
        );
        assert_eq!((records[1].stamp, records[1].expires_at_ms), (5, 6));
    }

    #[test]
    fn a_payload_that_is_cut_or_miscounted_is_refused() {
        let payload = payload();
        for len in 0..payload.len() {
            assert_eq!(decode(&payload[..len], 2), None, "{len} bytes");
        }
        assert_eq!(decode(&payload, 1), None);
        assert_eq!(decode(&payload, 3), None);
        assert_eq!(decode(&payload, u32::MAX), None);
    }

    #[test]
    fn no_bytes_make_a_payload_panic() {
        torc_sim::fuzz::fuzz("payload", &[payload()], |input| {
            for count in [0, 1, 2, 1000, u32::MAX] {
                drop(decode(input, count));
            }
        });
    }
}
