//! The session token of `X-Torc-Session`: what a client has seen, carried by the client.
//!
//! A bounded list of (key hash → context), newest last, and a flag that says that older entries were
//! dropped. A read of a key in the list must cover the entry's context; a read of a key that may have
//! been dropped is raised to a quorum: never silently stale. Base64url, checksummed.
//!
//! Read-your-writes needs writes at a quorum or more, as the documentation says.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Buf, BufMut};
use torc_cluster::api::{Context, Level};
use torc_env::{Token, TreeId};

/// First byte of the token's content.
const VERSION: u8 = 1;
/// The most bytes of a token before base64; with it a request head stays below its limit.
const TOKEN_BYTES_MAX: usize = 6 << 10;
/// Bytes of an entry beside its context.
const ENTRY_BYTES: usize = 10;
/// Bytes of a token beside its entries: version, flag, checksum.
const FRAME_BYTES: usize = 6;

/// What a client has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Key hash and context, the one used longest ago first.
    entries: Vec<(u64, Context)>,
    /// Whether entries were dropped.
    overflowed: bool,
}

/// The token is malformed or tampered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session token is not one that this cluster gave out")]
pub struct SessionError;

/// What a session asks of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asks {
    /// Nothing: the session has not seen the key.
    Nothing,
    /// To cover this.
    AtLeast(Context),
    /// A quorum: the session may have seen the key and dropped it.
    Quorum,
}

impl Session {
    /// Reads a token; an empty one starts a session.
    ///
    /// # Errors
    /// When it is not what [`Session::to_token`] gave.
    pub fn from_token(token: &[u8]) -> Result<Session, SessionError> {
        if token.is_empty() {
            return Ok(Session::default());
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| SessionError)?;
        if bytes.len() < FRAME_BYTES {
            return Err(SessionError);
        }
        let (content, mut checksum) = bytes.split_at(bytes.len() - 4);
        if crc_fast::crc32_iscsi(content) != checksum.get_u32_le() {
            return Err(SessionError);
        }
        let mut rest = content;
        let (version, flags) = (rest.get_u8(), rest.get_u8());
        if version != VERSION {
            return Err(SessionError);
        }
        let mut entries = Vec::new();
        while !rest.is_empty() {
            if rest.len() < ENTRY_BYTES {
                return Err(SessionError);
            }
            let hash = rest.get_u64_le();
            let len = usize::from(rest.get_u16_le());
            if rest.len() < len {
                return Err(SessionError);
            }
            let (context, after) = rest.split_at(len);
            let context = Context::from_bytes(context).map_err(|_| SessionError)?;
            entries.push((hash, context));
            rest = after;
        }
        Ok(Session {
            entries,
            overflowed: flags & 1 != 0,
        })
    }

    /// What a read of this key must cover.
    pub fn asks(&self, keyspace: &[u8], key: &[u8]) -> Asks {
        let hash = hash(keyspace, key);
        match self.entries.iter().find(|(other, _)| *other == hash) {
            Some((_, context)) => Asks::AtLeast(context.clone()),
            None if self.overflowed => Asks::Quorum,
            None => Asks::Nothing,
        }
    }

    /// How a read of this key at level `r` is carried out: at which level, and what it must cover.
    pub fn read(&self, keyspace: &[u8], key: &[u8], r: Level) -> (Level, Option<Context>) {
        match self.asks(keyspace, key) {
            Asks::AtLeast(context) => (r, Some(context)),
            Asks::Quorum if matches!(r, Level::One | Level::Count(_)) => (Level::Quorum, None),
            Asks::Quorum | Asks::Nothing => (r, None),
        }
    }

    /// Notes what was read or written.
    pub fn note(&mut self, keyspace: &[u8], key: &[u8], context: &Context) {
        let hash = hash(keyspace, key);
        let mut joined = context.clone();
        if let Some(at) = self.entries.iter().position(|(other, _)| *other == hash) {
            joined.join(&self.entries.remove(at).1);
        }
        self.entries.push((hash, joined));
    }

    /// The token. Drops the entries used longest ago when there are too many.
    pub fn to_token(&self) -> String {
        let mut overflowed = self.overflowed;
        let mut parts = Vec::new();
        let mut total = FRAME_BYTES;
        for (hash, context) in self.entries.iter().rev() {
            let context = context.to_bytes();
            let Ok(len) = u16::try_from(context.len()) else {
                overflowed = true;
                continue;
            };
            if total + ENTRY_BYTES + context.len() > TOKEN_BYTES_MAX {
                overflowed = true;
                break;
            }
            total += ENTRY_BYTES + context.len();
            parts.push((*hash, len, context));
        }
        let mut bytes = Vec::with_capacity(total);
        bytes.put_u8(VERSION);
        bytes.put_u8(u8::from(overflowed));
        for (hash, len, context) in parts.iter().rev() {
            bytes.put_u64_le(*hash);
            bytes.put_u16_le(*len);
            bytes.put_slice(context);
        }
        let checksum = crc_fast::crc32_iscsi(&bytes);
        bytes.put_u32_le(checksum);
        URL_SAFE_NO_PAD.encode(bytes)
    }
}

/// A key's hash in a session: the keyspace's name counts, so that equal keys of two keyspaces differ.
fn hash(keyspace: &[u8], key: &[u8]) -> u64 {
    let keyspace = Token::of(TreeId(0), keyspace).0;
    let key = Token::of(TreeId(1), key).0;
    let both = keyspace.rotate_left(1) ^ key;
    u64::try_from(both >> 64).expect("half of 128 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        let mut session = Session::default();
        for key in [&b"a"[..], b"b"] {
            session.note(b"default", key, &Context::default());
        }
        session
    }

    /// A token of this content.
    fn token(content: &[u8]) -> String {
        let checksum = crc_fast::crc32_iscsi(content).to_le_bytes();
        URL_SAFE_NO_PAD.encode([content, &checksum].concat())
    }

    #[test]
    fn no_bytes_make_a_token_panic() {
        let content = |session: &Session| {
            let whole = URL_SAFE_NO_PAD.decode(session.to_token());
            let whole = whole.expect("a token is base64url");
            whole[..whole.len() - 4].to_vec()
        };
        let valid = [content(&session()), content(&Session::default())];
        crate::fuzz::parser("session token", &valid).fuzz(|bytes| {
            drop(Session::from_token(bytes));
            if let Ok(mut session) = Session::from_token(token(bytes).as_bytes()) {
                session.asks(b"default", b"a");
                session.note(b"default", b"a", &Context::default());
                assert!(Session::from_token(session.to_token().as_bytes()).is_ok());
            }
        });
    }
}
