//! The file in which an operator gives the master keys.
//!
//! ```text
//! # since 2026-01
//! 8f3c…          64 hexadecimal digits
//! # since 2026-07; new files get this one
//! 41d0…
//! ```
//!
//! Instead of a key the last line may say `plain`: new files are then written in the clear, and the keys
//! are for reading what is sealed already.

use std::collections::BTreeMap;

use super::{Keys, MASTER_KEY_BYTES, key_id};

/// Why a key file cannot be used. Tells nothing of what the file holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// A line that is no key.
    #[error(
        "line {line}: a key is 64 hexadecimal digits on a line of its own (`openssl rand -hex 32`)"
    )]
    NotAKey {
        /// Counted from 1.
        line: usize,
    },
    /// The same key twice: which one is the newest?
    #[error("line {line} repeats the key of another line")]
    Twice {
        /// Counted from 1.
        line: usize,
    },
    /// `plain` before the end.
    #[error("line {line}: `plain` stands on the last line only")]
    PlainBeforeEnd {
        /// Counted from 1.
        line: usize,
    },
    /// No line with a key.
    #[error("there is no key in it")]
    Empty,
}

pub(super) fn parse(text: &str) -> Result<Keys, KeyFileError> {
    let mut secrets = BTreeMap::new();
    let mut active = None;
    let mut plain_at = None;
    for (index, line) in text.lines().enumerate() {
        let (line, at) = (line.trim(), index + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(line) = plain_at {
            return Err(KeyFileError::PlainBeforeEnd { line });
        }
        if line == "plain" {
            plain_at = Some(at);
            active = None;
            continue;
        }
        let secret = secret(line).ok_or(KeyFileError::NotAKey { line: at })?;
        let id = key_id(&secret);
        if secrets.insert(id, secret).is_some() {
            return Err(KeyFileError::Twice { line: at });
        }
        active = Some(id);
    }
    if secrets.is_empty() {
        return Err(KeyFileError::Empty);
    }
    Ok(Keys::new(secrets, active))
}

fn secret(digits: &str) -> Option<[u8; MASTER_KEY_BYTES]> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * MASTER_KEY_BYTES {
        return None;
    }
    let mut secret = [0; MASTER_KEY_BYTES];
    for (byte, pair) in secret.iter_mut().zip(digits.chunks_exact(2)) {
        let nibble = |digit: u8| {
            let value = char::from(digit).to_digit(16)?;
            u8::try_from(value).ok()
        };
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(byte: u8) -> String {
        format!("{byte:02X}").repeat(MASTER_KEY_BYTES)
    }

    #[test]
    fn the_last_line_is_the_newest_key() {
        let text = format!("# old\n{}\n\n  {}  \n# end\n", line(1), line(2));
        let keys = Keys::parse(&text).unwrap();
        assert_eq!(keys.ids().len(), 2);
        assert_eq!(keys.active(), Some(key_id(&[2; MASTER_KEY_BYTES])));
        let plain = Keys::parse(&format!("{text}plain\n")).unwrap();
        assert_eq!((plain.ids(), plain.active()), (keys.ids(), None));
    }

    #[test]
    fn a_bad_line_is_named_and_not_told() {
        let cases = [
            (String::new(), KeyFileError::Empty),
            ("plain".to_owned(), KeyFileError::Empty),
            (
                format!("{}\nabc", line(1)),
                KeyFileError::NotAKey { line: 2 },
            ),
            (line(1) + "0", KeyFileError::NotAKey { line: 1 }),
            ("é".repeat(32), KeyFileError::NotAKey { line: 1 }),
            (
                format!("{0}\n{0}", line(1)),
                KeyFileError::Twice { line: 2 },
            ),
            (
                format!("plain\n{}", line(1)),
                KeyFileError::PlainBeforeEnd { line: 1 },
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(Keys::parse(&text).unwrap_err(), expected);
        }
    }

    #[test]
    fn keys_are_not_printed() {
        let keys = Keys::parse(&line(0xAB)).unwrap();
        let printed = format!("{keys:?}").to_lowercase();
        assert!(!printed.contains("abab"), "{printed}");
    }

    #[test]
    fn a_key_keeps_its_name() {
        let keys = Keys::parse(&line(1)).unwrap();
        assert_eq!(keys.active().unwrap().to_string(), "0610674d1b18b75e");
    }
}
