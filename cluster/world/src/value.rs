//! Keys and values of the workload: every value is unique, names its write, and shows any damage.

use bytes::Bytes;

use crate::history::{KeyId, Value, WriteId};

/// The bytes of a key.
pub fn key(key: KeyId) -> Bytes {
    Bytes::from(key.to_string())
}

/// The value that a write writes: its name, filled up to `length` bytes.
pub fn of(key: KeyId, write: WriteId, length: u64) -> Bytes {
    let mut text = format!("{write}@{key}:").into_bytes();
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    while text.len() < length {
        text.push(filler(write, text.len()));
    }
    Bytes::from(text)
}

/// The write that a value of `key` comes from.
pub fn parse(key: KeyId, bytes: &[u8]) -> Value {
    let name = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
    let write = name
        .split_once(&format!("@{key}:"))
        .and_then(|(write, _)| write.strip_prefix('w'))
        .and_then(|number| number.parse().ok())
        .map(WriteId);
    match write {
        Some(write) if of(key, write, u64::try_from(bytes.len()).unwrap_or(0)) == bytes => {
            Value::Of(write)
        }
        _ => Value::Foreign(name),
    }
}

fn filler(write: WriteId, at: usize) -> u8 {
    let sum = write.index().wrapping_mul(31).wrapping_add(at);
    b'a' + u8::try_from(sum % 26).expect("below 26")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_names_its_write_and_shows_damage() {
        let value = of(KeyId(3), WriteId(17), 100);
        assert_eq!(value.len(), 100);
        assert_eq!(parse(KeyId(3), &value), Value::Of(WriteId(17)));
        assert_eq!(
            parse(KeyId(3), &of(KeyId(3), WriteId(2), 1)),
            Value::Of(WriteId(2))
        );
        assert!(parse(KeyId(4), &value).write().is_none(), "another key");
        for at in 0..value.len() {
            let mut damaged = value.to_vec();
            damaged[at] ^= 1;
            assert_ne!(parse(KeyId(3), &damaged), Value::Of(WriteId(17)));
        }
        assert!(parse(KeyId(3), b"").write().is_none());
    }
}
