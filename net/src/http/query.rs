//! The query of a request: names and values, checked one by one.
//!
//! Invariant: a parameter that is given counts or is refused. A blank one, one out of range, and one
//! that stands twice are faults of the request; parameters that the route does not know are ignored.

use bytes::Bytes;
use torc_cluster::api::{Level, TTL_SECONDS_MAX};

use crate::http::response::Problem;
use crate::http::route::percent_decode;
use crate::limits::{TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX};

/// A parsed query.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// In the order in which they came; names are unique.
    parameters: Vec<(Bytes, Bytes)>,
}

impl Query {
    /// Parses what stands behind the `?`. `+` is a plus.
    ///
    /// # Errors
    /// 400 for a broken percent-encoding or a repeated name.
    pub fn parse(query: &Bytes) -> Result<Self, Problem> {
        let mut parameters: Vec<(Bytes, Bytes)> = Vec::new();
        for part in query.split(|byte| *byte == b'&') {
            if part.is_empty() {
                continue;
            }
            let end = memchr::memchr(b'=', part).unwrap_or(part.len());
            let name = percent_decode(query.slice_ref(&part[..end]))?;
            let value = part.get(end + 1..).unwrap_or_default();
            let value = percent_decode(query.slice_ref(value))?;
            if parameters.iter().any(|(other, _)| *other == name) {
                return Err(Problem::bad_request(format!(
                    "the parameter {} stands twice",
                    String::from_utf8_lossy(&name)
                )));
            }
            parameters.push((name, value));
        }
        Ok(Self { parameters })
    }

    /// The bytes of a parameter, which may be blank.
    pub fn bytes(&self, name: &str) -> Option<&Bytes> {
        let mut parameters = self.parameters.iter();
        parameters
            .find(|(other, _)| &other[..] == name.as_bytes())
            .map(|(_, value)| value)
    }

    /// The text of a parameter, which may be blank.
    fn text(&self, name: &str) -> Result<Option<&str>, Problem> {
        let Some(value) = self.bytes(name) else {
            return Ok(None);
        };
        match std::str::from_utf8(value) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(Problem::bad_request(format!("{name} is not text"))),
        }
    }

    /// A whole number of `first..=last`.
    ///
    /// # Errors
    /// 400 when it is anything else.
    pub fn number(&self, name: &str, first: u64, last: u64) -> Result<Option<u64>, Problem> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        // `str::parse` would take a sign as well.
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = digits.then(|| text.parse().ok()).flatten();
        match number.filter(|number| (first..=last).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Problem::bad_request(format!(
                "{name} must be a whole number from {first} to {last}"
            ))),
        }
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// 400 when it is anything else.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, Problem> {
        match self.text(name)? {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(_) => Err(Problem::bad_request(format!(
                "{name} must be true or false"
            ))),
        }
    }

    /// `r` or `w`; quorum when it is not given. A number above the keyspace's N is refused where N
    /// is known.
    ///
    /// # Errors
    /// 400 when it is anything else.
    pub fn level(&self, name: &str) -> Result<Level, Problem> {
        match self.text(name)? {
            None => Ok(Level::Quorum),
            Some(text) => level(name, text),
        }
    }

    /// `timeout_ms`.
    ///
    /// # Errors
    /// 400 when it is out of range.
    pub fn timeout_ms(&self) -> Result<u64, Problem> {
        let timeout_ms = self.number("timeout_ms", 1, TIMEOUT_MS_MAX)?;
        Ok(timeout_ms.unwrap_or(TIMEOUT_MS_DEFAULT))
    }

    /// `ttl_seconds`.
    ///
    /// # Errors
    /// 400 when it is out of range.
    pub fn ttl_seconds(&self) -> Result<Option<u64>, Problem> {
        self.number("ttl_seconds", 1, TTL_SECONDS_MAX)
    }
}

/// A level by name or number.
///
/// # Errors
/// 400 when it is anything else.
pub fn level(name: &str, text: &str) -> Result<Level, Problem> {
    Ok(match text {
        "one" => Level::One,
        "quorum" => Level::Quorum,
        "all" => Level::All,
        "local_quorum" => Level::LocalQuorum,
        "each_quorum" => Level::EachQuorum,
        text => {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let count: Option<u8> = digits.then(|| text.parse().ok()).flatten();
            match count.filter(|count| *count > 0) {
                Some(count) => Level::Count(count),
                None => {
                    return Err(Problem::bad_request(format!(
                        "{name} must be a number of replicas, one, quorum, all, local_quorum or \
                         each_quorum"
                    )));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &'static str) -> Query {
        Query::parse(&Bytes::from_static(text.as_bytes())).expect("a good query")
    }

    #[test]
    fn values_are_decoded_and_plus_is_a_plus() {
        let query = query("prefix=a%2Fb+c&&cursor=x=y&flag");
        assert_eq!(query.bytes("prefix").map(|b| &b[..]), Some(&b"a/b+c"[..]));
        assert_eq!(query.bytes("cursor").map(|b| &b[..]), Some(&b"x=y"[..]));
        assert_eq!(query.bytes("flag").map(|b| b.len()), Some(0));
        assert_eq!(query.bytes("other"), None);
    }

    #[test]
    fn what_is_given_counts_or_is_refused() {
        for text in [
            "r=", "r", "r=0", "r=+1", "r=256", "r=Quorum", "r=1.0", "r=%ff", "r= 1",
        ] {
            assert!(query(text).level("r").is_err(), "{text}");
        }
        for text in [
            "timeout_ms=",
            "timeout_ms=0",
            "timeout_ms=60001",
            "timeout_ms=-1",
            "timeout_ms=1e3",
        ] {
            assert!(query(text).timeout_ms().is_err(), "{text}");
        }
        for text in ["sloppy=", "sloppy=1", "sloppy=True"] {
            assert!(query(text).boolean("sloppy").is_err(), "{text}");
        }
        assert!(Query::parse(&Bytes::from_static(b"r=1&r=1")).is_err());
        assert!(Query::parse(&Bytes::from_static(b"r=%1")).is_err());
    }

    #[test]
    fn what_is_not_given_has_its_default() {
        let none = query("");
        assert_eq!(none.level("w"), Ok(Level::Quorum));
        assert_eq!(none.timeout_ms(), Ok(5000));
        assert_eq!(none.boolean("sloppy"), Ok(None));
        assert_eq!(query("r=2").level("r"), Ok(Level::Count(2)));
        assert_eq!(query("r=each_quorum").level("r"), Ok(Level::EachQuorum));
        assert_eq!(query("timeout_ms=60000").timeout_ms(), Ok(60000));
    }
}
