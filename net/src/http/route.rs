//! From a path to what it means.
//!
//! Invariant: paths are never normalised. `.`, `..`, `%2F` and `//` behind `/keys/` are bytes of a
//! key; a broken percent-encoding is a fault of the request, never a literal percent sign.

use bytes::{Bytes, BytesMut};
use torc_cluster::api::{KEY_BYTES_MAX, KEYSPACE_DEFAULT, KEYSPACE_NAME_BYTES_MAX};

use crate::http::response::Problem;

/// What a path means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/keys/{key}` and `/v1/keyspaces/{keyspace}/keys/{key}`.
    Key {
        /// Keyspace name.
        keyspace: Bytes,
        /// Key.
        key: Bytes,
    },
    /// `/v1/keys` and `/v1/keyspaces/{keyspace}/keys`.
    Keys {
        /// Keyspace name.
        keyspace: Bytes,
    },
    /// `/v1/batch` and `/v1/keyspaces/{keyspace}/batch`.
    Batch {
        /// Keyspace of operations that name none.
        keyspace: Bytes,
    },
    /// `/health`.
    Health,
    /// `/ready`.
    Ready,
    /// `/metrics`.
    Metrics,
    /// `/admin/…`.
    Admin(Admin),
    /// `/`.
    Page,
}

/// What a path below `/admin/` means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admin {
    /// `/admin/status`.
    Status,
    /// `/admin/ring`.
    Ring,
    /// `/admin/keyspaces`.
    Keyspaces,
    /// `/admin/keyspaces/{name}`.
    Keyspace(Bytes),
    /// `/admin/repair`.
    Repair,
    /// `/admin/compact`.
    Compact,
    /// `/admin/scrub`.
    Scrub,
    /// `/admin/damage`.
    Damage,
    /// `/admin/encryption`.
    Encryption,
    /// `/admin/encryption/reload`.
    EncryptionReload,
    /// `/admin/archive`.
    Archive,
    /// `/admin/snapshots`.
    Snapshots,
    /// `/admin/snapshots/{id}`.
    Snapshot(Bytes),
    /// `/admin/snapshots/{id}/{path}`: a file of it.
    SnapshotFile(Bytes, Bytes),
    /// `/admin/nodes/{name}/decommission`.
    Decommission(Bytes),
}

impl Route {
    /// The meaning of a path.
    ///
    /// # Errors
    /// 404 for a path that nothing serves, 400 for a broken encoding or a key or name out of range.
    pub fn of(path: &Bytes) -> Result<Route, Problem> {
        let text: &[u8] = path;
        if let Some(key) = text.strip_prefix(b"/v1/keys/") {
            return key_route(KEYSPACE_DEFAULT.clone(), path.slice_ref(key));
        }
        if let Some(rest) = text.strip_prefix(b"/v1/keyspaces/") {
            let end = memchr::memchr(b'/', rest).ok_or_else(Problem::no_route)?;
            let keyspace = keyspace_name(path.slice_ref(&rest[..end]))?;
            return match &rest[end..] {
                b"/keys" => Ok(Route::Keys { keyspace }),
                b"/batch" => Ok(Route::Batch { keyspace }),
                rest => match rest.strip_prefix(b"/keys/") {
                    Some(key) => key_route(keyspace, path.slice_ref(key)),
                    None => Err(Problem::no_route()),
                },
            };
        }
        if let Some(rest) = text.strip_prefix(b"/admin/nodes/") {
            let name = rest.strip_suffix(b"/decommission");
            let name = name.ok_or_else(Problem::no_route)?;
            let name = percent_decode(path.slice_ref(name))?;
            return Ok(Route::Admin(Admin::Decommission(name)));
        }
        if let Some(rest) = text.strip_prefix(b"/admin/snapshots/") {
            return Ok(Route::Admin(match memchr::memchr(b'/', rest) {
                None => Admin::Snapshot(path.slice_ref(rest)),
                Some(end) => Admin::SnapshotFile(
                    path.slice_ref(&rest[..end]),
                    path.slice_ref(&rest[end + 1..]),
                ),
            }));
        }
        if let Some(name) = text.strip_prefix(b"/admin/keyspaces/") {
            let name = keyspace_name(path.slice_ref(name))?;
            return Ok(Route::Admin(Admin::Keyspace(name)));
        }
        Ok(match text {
            b"/v1/keys" => Route::Keys {
                keyspace: KEYSPACE_DEFAULT.clone(),
            },
            b"/v1/batch" => Route::Batch {
                keyspace: KEYSPACE_DEFAULT.clone(),
            },
            b"/health" => Route::Health,
            b"/ready" => Route::Ready,
            b"/metrics" => Route::Metrics,
            b"/admin/status" => Route::Admin(Admin::Status),
            b"/admin/ring" => Route::Admin(Admin::Ring),
            b"/admin/keyspaces" => Route::Admin(Admin::Keyspaces),
            b"/admin/repair" => Route::Admin(Admin::Repair),
            b"/admin/compact" => Route::Admin(Admin::Compact),
            b"/admin/scrub" => Route::Admin(Admin::Scrub),
            b"/admin/damage" => Route::Admin(Admin::Damage),
            b"/admin/encryption" => Route::Admin(Admin::Encryption),
            b"/admin/encryption/reload" => Route::Admin(Admin::EncryptionReload),
            b"/admin/archive" => Route::Admin(Admin::Archive),
            b"/admin/snapshots" => Route::Admin(Admin::Snapshots),
            b"/" => Route::Page,
            _ => return Err(Problem::no_route()),
        })
    }
}

fn key_route(keyspace: Bytes, encoded: Bytes) -> Result<Route, Problem> {
    let key = percent_decode(encoded)?;
    check_key(&key)?;
    Ok(Route::Key { keyspace, key })
}

/// Refuses a key that is empty or too long.
///
/// # Errors
/// 400.
pub fn check_key(key: &[u8]) -> Result<(), Problem> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(Problem::bad_request(format!(
            "a key has 1 to {KEY_BYTES_MAX} bytes, this one {}",
            key.len()
        )));
    }
    Ok(())
}

fn keyspace_name(encoded: Bytes) -> Result<Bytes, Problem> {
    let name = percent_decode(encoded)?;
    check_keyspace(&name)?;
    Ok(name)
}

/// Refuses a keyspace name that is empty, too long or holds other than letters, digits, `_`, `-`
/// and `.`.
///
/// # Errors
/// 400.
pub fn check_keyspace(name: &[u8]) -> Result<(), Problem> {
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.".contains(byte);
    if name.is_empty() || name.len() > KEYSPACE_NAME_BYTES_MAX || !name.iter().all(good) {
        return Err(Problem::bad_request(format!(
            "a keyspace name has 1 to {KEYSPACE_NAME_BYTES_MAX} letters, digits, '_', '-' or '.'"
        )));
    }
    Ok(())
}

/// Decodes `%xx`. Shares the buffer when there is nothing to decode. `+` is a plus.
///
/// # Errors
/// 400 for a percent sign without two hexadecimal digits.
pub fn percent_decode(encoded: Bytes) -> Result<Bytes, Problem> {
    let Some(first) = memchr::memchr(b'%', &encoded) else {
        return Ok(encoded);
    };
    let mut decoded = BytesMut::with_capacity(encoded.len());
    decoded.extend_from_slice(&encoded[..first]);
    let mut rest = &encoded[first..];
    while let Some((&byte, after)) = rest.split_first() {
        if byte != b'%' {
            decoded.extend_from_slice(&[byte]);
            rest = after;
            continue;
        }
        let value = match after {
            [high, low, ..] => hex_digit(*high).zip(hex_digit(*low)),
            _ => None,
        };
        let Some((high, low)) = value else {
            return Err(Problem::bad_request(
                "a percent sign is not followed by two hexadecimal digits",
            ));
        };
        decoded.extend_from_slice(&[high << 4 | low]);
        rest = &after[2..];
    }
    Ok(decoded.freeze())
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &'static str) -> Result<Route, u16> {
        Route::of(&Bytes::from_static(path.as_bytes())).map_err(|problem| problem.status)
    }

    fn key(path: &'static str) -> Bytes {
        match route(path) {
            Ok(Route::Key { key, .. }) => key,
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn keys_are_bytes_and_paths_are_not_normalised() {
        assert_eq!(&key("/v1/keys/plain")[..], b"plain");
        assert_eq!(&key("/v1/keys/.")[..], b".");
        assert_eq!(&key("/v1/keys/..")[..], b"..");
        assert_eq!(&key("/v1/keys/a%2Fb")[..], b"a/b");
        assert_eq!(&key("/v1/keys/a/../b")[..], b"a/../b");
        assert_eq!(&key("/v1/keys//")[..], b"/");
        assert_eq!(&key("/v1/keys/a+b%20%00%ff")[..], b"a+b \0\xff");
        assert_eq!(
            route("/v1/keyspaces/users/keys/%2e"),
            Ok(Route::Key {
                keyspace: Bytes::from_static(b"users"),
                key: Bytes::from_static(b"."),
            })
        );
    }

    #[test]
    fn broken_encodings_and_lengths_are_the_clients_fault() {
        for path in [
            "/v1/keys/%",
            "/v1/keys/%1",
            "/v1/keys/a%g0",
            "/v1/keys/%0g",
            "/v1/keys/%%30",
            "/v1/keys/",
            "/v1/keyspaces//keys/a",
            "/v1/keyspaces/a%2Fb/keys/a",
            "/admin/keyspaces/",
        ] {
            assert_eq!(route(path), Err(400), "{path}");
        }
        let long = |len| Route::of(&Bytes::from(format!("/v1/keys/{}", "%41".repeat(len))));
        assert!(long(KEY_BYTES_MAX).is_ok());
        assert_eq!(long(KEY_BYTES_MAX + 1).map_err(|p| p.status), Err(400));
    }

    #[test]
    fn other_paths_are_known_to_the_letter_or_not_at_all() {
        assert_eq!(route("/health"), Ok(Route::Health));
        assert_eq!(route("/v1/keys").map(|_| ()), Ok(()));
        assert_eq!(
            route("/admin/keyspaces/a"),
            Ok(Route::Admin(Admin::Keyspace(Bytes::from_static(b"a"))))
        );
        assert_eq!(
            route("/admin/snapshots/1/shard-00/tables/2.table"),
            Ok(Route::Admin(Admin::SnapshotFile(
                Bytes::from_static(b"1"),
                Bytes::from_static(b"shard-00/tables/2.table"),
            )))
        );
        for path in [
            "",
            "*",
            "/v1",
            "/v2/keys/a",
            "/health/",
            "/Health",
            "/admin",
            "/admin/",
            "/v1/key/a",
            "/v1/keyspaces/a",
            "/v1/keyspaces/a/key/b",
        ] {
            assert_eq!(route(path), Err(404), "{path}");
        }
    }
}
