//! From a RESP command's arguments to what it asks for: a pure function, one arm a command.
//!
//! What does not map onto a replicated key-value store (counters, lists, transactions, flushing) is
//! refused by name instead of being half right.

use bytes::Bytes;
use torc_cluster::api::{KEY_BYTES_MAX, TTL_SECONDS_MAX, VALUE_BYTES_MAX};

use crate::limits::CLIENT_NAME_BYTES_MAX;
use crate::resp::reply::{Reply, Version};

/// What a connection is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Answered from what is at hand.
    Local(Local),
    /// `GET`.
    Get(Bytes),
    /// `SET` and its relatives.
    Set(Set),
    /// `GETDEL`.
    GetDel(Bytes),
    /// `STRLEN`.
    Strlen(Bytes),
    /// `TYPE`.
    Type(Bytes),
    /// `DEL` and `UNLINK`.
    Del(Vec<Bytes>),
    /// `EXISTS`.
    Exists(Vec<Bytes>),
    /// `MGET`.
    MGet(Vec<Bytes>),
    /// `MSET`.
    MSet(Vec<(Bytes, Bytes)>),
    /// `EXPIRE` and its relatives.
    Expire {
        /// Key.
        key: Bytes,
        /// When.
        ttl: Ttl,
    },
    /// `PERSIST`.
    Persist(Bytes),
    /// `TTL` and `PTTL`.
    Ttl {
        /// Key.
        key: Bytes,
        /// In milliseconds rather than seconds.
        millis: bool,
    },
}

/// What is answered without the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Local {
    /// A reply that needs nothing.
    Say(Reply),
    /// `HELLO`.
    Hello {
        /// The version asked for.
        version: Option<Version>,
        /// A client name.
        name: Option<Bytes>,
    },
    /// `CLIENT SETNAME`.
    SetName(Bytes),
    /// `CLIENT GETNAME`.
    GetName,
    /// `CLIENT ID`.
    Id,
    /// `INFO`.
    Info,
    /// `RESET`.
    Reset,
    /// `QUIT`.
    Quit,
}

/// A write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Key.
    pub key: Bytes,
    /// Value.
    pub value: Bytes,
    /// Time to live.
    pub ttl: Ttl,
    /// What must hold.
    pub only: Only,
    /// Whether the old value is the reply.
    pub get: bool,
    /// Whether the reply is 1 or 0 (`SETNX`).
    pub counted: bool,
}

/// When a value expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ttl {
    /// As the keyspace says.
    Default,
    /// As it was.
    Keep,
    /// After so many milliseconds.
    Millis(u64),
    /// At this civil time in milliseconds.
    At(u64),
    /// At once: the key is deleted.
    Past,
}

/// What must hold for a `SET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Nothing.
    Always,
    /// `NX`: there is no value.
    Absent,
    /// `XX`: there is a value.
    Present,
}

/// Reads a command. `arguments` has its name first and is not empty.
///
/// # Errors
/// The reply that says what is wrong.
pub fn read(arguments: &[Bytes]) -> Result<Command, Reply> {
    let name = arguments[0].to_ascii_uppercase();
    let rest = &arguments[1..];
    let wrong_count = || wrong_count(&name);
    let one_key = || match rest {
        [one] => key(one),
        _ => Err(wrong_count()),
    };
    let some_keys = || match rest {
        [] => Err(wrong_count()),
        some => some.iter().map(key).collect::<Result<Vec<_>, _>>(),
    };
    Ok(match &name[..] {
        b"GET" => Command::Get(one_key()?),
        b"SET" => set(rest)?,
        b"SETNX" => match rest {
            [k, value] => Command::Set(Set {
                only: Only::Absent,
                counted: true,
                ..plain_set(k, value, Ttl::Default)?
            }),
            _ => return Err(wrong_count()),
        },
        b"SETEX" | b"PSETEX" => match rest {
            [k, time, value] => {
                let unit_ms = if name[0] == b'P' { 1 } else { 1000 };
                Command::Set(plain_set(k, value, positive_ttl(time, unit_ms)?)?)
            }
            _ => return Err(wrong_count()),
        },
        b"GETSET" => match rest {
            [k, value] => Command::Set(Set {
                get: true,
                ..plain_set(k, value, Ttl::Default)?
            }),
            _ => return Err(wrong_count()),
        },
        b"GETDEL" => Command::GetDel(one_key()?),
        b"STRLEN" => Command::Strlen(one_key()?),
        b"TYPE" => Command::Type(one_key()?),
        b"DEL" | b"UNLINK" => Command::Del(some_keys()?),
        b"EXISTS" => Command::Exists(some_keys()?),
        b"MGET" => Command::MGet(some_keys()?),
        b"MSET" => {
            if rest.is_empty() || !rest.len().is_multiple_of(2) {
                return Err(wrong_count());
            }
            let pairs = rest.chunks_exact(2);
            let pairs = pairs.map(|pair| Ok((key(&pair[0])?, value(&pair[1])?)));
            Command::MSet(pairs.collect::<Result<_, Reply>>()?)
        }
        b"EXPIRE" | b"PEXPIRE" | b"EXPIREAT" | b"PEXPIREAT" => match rest {
            [k, time] => Command::Expire {
                key: key(k)?,
                ttl: expiry(time, &name)?,
            },
            [_, _, _, ..] => return Err(Reply::error("options of EXPIRE are not supported")),
            _ => return Err(wrong_count()),
        },
        b"PERSIST" => Command::Persist(one_key()?),
        b"TTL" | b"PTTL" => Command::Ttl {
            key: one_key()?,
            millis: name[0] == b'P',
        },
        _ => Command::Local(local(&name, rest)?),
    })
}

fn local(name: &[u8], rest: &[Bytes]) -> Result<Local, Reply> {
    Ok(match name {
        b"PING" => match rest {
            [] => Local::Say(Reply::Status("PONG")),
            [text] => Local::Say(Reply::Bulk(text.clone())),
            _ => return Err(wrong_count(name)),
        },
        b"ECHO" => match rest {
            [text] => Local::Say(Reply::Bulk(text.clone())),
            _ => return Err(wrong_count(name)),
        },
        b"HELLO" => hello(rest)?,
        b"AUTH" => {
            return Err(Reply::error(
                "AUTH called without any password configured: this node has no passwords",
            ));
        }
        b"SELECT" => match rest {
            [index] if &index[..] == b"0" => Local::Say(Reply::OK),
            [_] => return Err(Reply::error("DB index is out of range: there is only 0")),
            _ => return Err(wrong_count(name)),
        },
        b"CLIENT" => client(rest)?,
        b"COMMAND" => match rest.first().map(|sub| sub.to_ascii_uppercase()).as_deref() {
            Some(b"COUNT") => Local::Say(Reply::Integer(NAMES.len() as i64)),
            Some(b"DOCS") => Local::Say(Reply::Map(Vec::new())),
            _ => Local::Say(Reply::Array(Vec::new())),
        },
        b"CONFIG" => config(rest)?,
        b"INFO" => Local::Info,
        b"RESET" => Local::Reset,
        b"QUIT" => Local::Quit,
        b"DBSIZE" => {
            return Err(Reply::error(
                "DBSIZE is not supported: no replica knows the number of keys; scan over HTTP",
            ));
        }
        b"FLUSHDB" | b"FLUSHALL" => {
            return Err(Reply::error(
                "flushing is not supported: drop the keyspace with `torc keyspace drop`",
            ));
        }
        b"INCR" | b"DECR" | b"INCRBY" | b"DECRBY" | b"INCRBYFLOAT" | b"APPEND" | b"MULTI"
        | b"EXEC" | b"WATCH" | b"EVAL" => {
            return Err(Reply::error(format!(
                "{} is not supported: replicas may accept writes at the same time, so it would \
                 not be atomic",
                String::from_utf8_lossy(name)
            )));
        }
        _ => {
            return Err(Reply::error(format!(
                "unknown command '{}'",
                String::from_utf8_lossy(&name[..name.len().min(64)])
            )));
        }
    })
}

/// What `COMMAND COUNT` counts.
const NAMES: [&str; 33] = [
    "AUTH",
    "CLIENT",
    "COMMAND",
    "CONFIG",
    "DEL",
    "ECHO",
    "EXISTS",
    "EXPIRE",
    "EXPIREAT",
    "GET",
    "GETDEL",
    "GETSET",
    "HELLO",
    "INFO",
    "MGET",
    "MSET",
    "PERSIST",
    "PEXPIRE",
    "PEXPIREAT",
    "PING",
    "PSETEX",
    "PTTL",
    "QUIT",
    "RESET",
    "SELECT",
    "SET",
    "SETEX",
    "SETNX",
    "STRLEN",
    "TTL",
    "TYPE",
    "UNLINK",
    "DBSIZE",
];

fn wrong_count(name: &[u8]) -> Reply {
    Reply::error(format!(
        "wrong number of arguments for '{}' command",
        String::from_utf8_lossy(name).to_ascii_lowercase()
    ))
}

fn hello(rest: &[Bytes]) -> Result<Local, Reply> {
    let version = match rest.first().map(|version| &version[..]) {
        None => None,
        Some(b"2") => Some(Version::Two),
        Some(b"3") => Some(Version::Three),
        Some(_) => {
            return Err(Reply::Error("NOPROTO unsupported protocol version".into()));
        }
    };
    let mut name = None;
    let mut options = rest.iter().skip(1);
    while let Some(option) = options.next() {
        match &option.to_ascii_uppercase()[..] {
            b"SETNAME" => {
                name = Some(client_name(options.next().ok_or_else(syntax)?)?);
            }
            b"AUTH" => {
                return Err(Reply::error(
                    "AUTH called without any password configured: this node has no passwords",
                ));
            }
            _ => return Err(syntax()),
        }
    }
    Ok(Local::Hello { version, name })
}

/// A name for the connection, apart from the request, which it would keep in memory.
fn client_name(name: &Bytes) -> Result<Bytes, Reply> {
    if name.len() > CLIENT_NAME_BYTES_MAX || !name.iter().all(u8::is_ascii_graphic) {
        return Err(Reply::error(format!(
            "Client names cannot contain spaces, newlines or special characters, and have at most \
             {CLIENT_NAME_BYTES_MAX} bytes"
        )));
    }
    Ok(Bytes::copy_from_slice(name))
}

fn client(rest: &[Bytes]) -> Result<Local, Reply> {
    let Some(sub) = rest.first() else {
        return Err(wrong_count(b"CLIENT"));
    };
    Ok(match (&sub.to_ascii_uppercase()[..], &rest[1..]) {
        (b"SETNAME", [name]) => Local::SetName(client_name(name)?),
        (b"GETNAME", []) => Local::GetName,
        (b"ID", []) => Local::Id,
        // What client libraries announce about themselves; nothing depends on it.
        (b"SETINFO" | b"NO-EVICT" | b"NO-TOUCH", [..]) => Local::Say(Reply::OK),
        (b"REPLY", [mode]) if mode.eq_ignore_ascii_case(b"ON") => Local::Say(Reply::OK),
        (b"TRACKING", [mode]) if mode.eq_ignore_ascii_case(b"OFF") => Local::Say(Reply::OK),
        (b"REPLY", [..]) => {
            return Err(Reply::error(
                "CLIENT REPLY OFF and SKIP are not supported: every command is answered",
            ));
        }
        (b"TRACKING", [..]) => {
            return Err(Reply::error(
                "CLIENT TRACKING is not supported: nobody is told when a key changes",
            ));
        }
        _ => return Err(Reply::error("unknown CLIENT subcommand")),
    })
}

fn config(rest: &[Bytes]) -> Result<Local, Reply> {
    let Some(sub) = rest.first() else {
        return Err(wrong_count(b"CONFIG"));
    };
    if !sub.eq_ignore_ascii_case(b"GET") {
        return Err(Reply::error(
            "settings are changed in the configuration file",
        ));
    }
    // What redis-benchmark asks before it starts; there is nothing to save and no append-only file.
    let known = |name: &Bytes| {
        let value = match &name.to_ascii_lowercase()[..] {
            b"save" => "",
            b"appendonly" => "no",
            b"databases" => "1",
            b"maxmemory" => "0",
            _ => return None,
        };
        Some((Reply::Bulk(name.clone()), Reply::text(value)))
    };
    Ok(Local::Say(Reply::Map(
        rest[1..].iter().filter_map(known).collect(),
    )))
}

fn set(rest: &[Bytes]) -> Result<Command, Reply> {
    let [k, v, options @ ..] = rest else {
        return Err(wrong_count(b"SET"));
    };
    let mut set = plain_set(k, v, Ttl::Default)?;
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let option = option.to_ascii_uppercase();
        match &option[..] {
            b"NX" if set.only == Only::Always => set.only = Only::Absent,
            b"XX" if set.only == Only::Always => set.only = Only::Present,
            b"GET" => set.get = true,
            b"KEEPTTL" if set.ttl == Ttl::Default => set.ttl = Ttl::Keep,
            b"EX" | b"PX" | b"EXAT" | b"PXAT" if set.ttl == Ttl::Default => {
                let time = options.next().ok_or_else(syntax)?;
                let unit_ms = if option[0] == b'P' { 1 } else { 1000 };
                set.ttl = match (positive_ttl(time, unit_ms)?, option.len()) {
                    (Ttl::Millis(at), 4) => Ttl::At(at),
                    (ttl, _) => ttl,
                };
            }
            _ => return Err(syntax()),
        }
    }
    Ok(Command::Set(set))
}

fn plain_set(k: &Bytes, v: &Bytes, ttl: Ttl) -> Result<Set, Reply> {
    Ok(Set {
        key: key(k)?,
        value: value(v)?,
        ttl,
        only: Only::Always,
        get: false,
        counted: false,
    })
}

fn syntax() -> Reply {
    Reply::error("syntax error")
}

fn key(bytes: &Bytes) -> Result<Bytes, Reply> {
    if bytes.is_empty() || bytes.len() > KEY_BYTES_MAX {
        return Err(Reply::error(format!(
            "a key has 1 to {KEY_BYTES_MAX} bytes"
        )));
    }
    Ok(bytes.clone())
}

fn value(bytes: &Bytes) -> Result<Bytes, Reply> {
    if bytes.len() > VALUE_BYTES_MAX {
        return Err(Reply::error(format!(
            "a value has at most {VALUE_BYTES_MAX} bytes"
        )));
    }
    Ok(bytes.clone())
}

fn integer(bytes: &[u8]) -> Result<i64, Reply> {
    let number = std::str::from_utf8(bytes).ok().and_then(|t| t.parse().ok());
    number.ok_or_else(|| Reply::error("value is not an integer or out of range"))
}

/// A time to live that must be above zero. The upper bound leaves room for civil times as well.
fn positive_ttl(time: &[u8], unit_ms: u64) -> Result<Ttl, Reply> {
    let time = u64::try_from(integer(time)?).ok().filter(|time| *time > 0);
    time.and_then(|time| time.checked_mul(unit_ms))
        .filter(|millis| *millis <= TTL_SECONDS_MAX * 1000)
        .map(Ttl::Millis)
        .ok_or_else(|| Reply::error("invalid expire time"))
}

/// The time of `EXPIRE` and its relatives, which may lie in the past.
fn expiry(time: &[u8], name: &[u8]) -> Result<Ttl, Reply> {
    if integer(time)? <= 0 {
        return Ok(Ttl::Past);
    }
    let unit_ms = if name[0] == b'P' { 1 } else { 1000 };
    Ok(match positive_ttl(time, unit_ms)? {
        Ttl::Millis(at) if name.ends_with(b"AT") => Ttl::At(at),
        ttl => ttl,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(text: &str) -> Result<Command, Reply> {
        let arguments: Vec<Bytes> = text
            .split(' ')
            .map(|word| Bytes::copy_from_slice(word.as_bytes()))
            .collect();
        read(&arguments)
    }

    fn set_of(text: &str) -> Set {
        match command(text) {
            Ok(Command::Set(set)) => set,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn the_options_of_set_come_in_any_order_and_case() {
        let set = set_of("set k v ex 10 nx get");
        assert_eq!(
            (set.ttl, set.only, set.get),
            (Ttl::Millis(10_000), Only::Absent, true)
        );
        let set = set_of("SET k v XX PX 5");
        assert_eq!(
            (set.ttl, set.only, set.get),
            (Ttl::Millis(5), Only::Present, false)
        );
        assert_eq!(set_of("SET k v KEEPTTL").ttl, Ttl::Keep);
        assert_eq!(set_of("SET k v EXAT 5").ttl, Ttl::At(5000));
        assert_eq!(set_of("PSETEX k 7 v").ttl, Ttl::Millis(7));
        assert!(set_of("SETNX k v").counted);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for text in [
            "SET k",
            "SET k v NX XX",
            "SET k v EX 1 PX 1",
            "SET k v EX",
            "SET k v EX 0",
            "SET k v EX -1",
            "SET k v EX x",
            "SET k v KEEPTTL EX 1",
            "SET k v WHAT",
            "SETEX k 0 v",
            "GET",
            "GET a b",
            "MSET a",
            "MSET a b c",
            "DEL",
            "EXPIRE k x",
            "SET k v EX 99999999999999999",
            "SELECT 1",
            "HELLO 4",
            "FLUSHALL",
            "INCR k",
            "NOPE",
            "CONFIG SET a b",
            "AUTH x",
            "DBSIZE",
        ] {
            assert!(command(text).is_err(), "{text}");
        }
        assert!(read(&[Bytes::from_static(b"GET"), Bytes::new()]).is_err());
        let long = Bytes::from(vec![b'k'; KEY_BYTES_MAX + 1]);
        assert!(read(&[Bytes::from_static(b"GET"), long]).is_err());
    }

    #[test]
    fn an_expiry_in_the_past_deletes() {
        for text in ["EXPIRE k 0", "PEXPIRE k -5", "EXPIREAT k -1"] {
            assert!(
                matches!(command(text), Ok(Command::Expire { ttl: Ttl::Past, .. })),
                "{text}"
            );
        }
        assert!(matches!(
            command("PEXPIREAT k 5"),
            Ok(Command::Expire {
                ttl: Ttl::At(5),
                ..
            })
        ));
    }

    #[test]
    fn what_load_tools_ask_before_they_start_is_answered() {
        for text in [
            "COMMAND DOCS",
            "COMMAND",
            "CONFIG GET save",
            "CONFIG GET appendonly",
            "HELLO 3",
            "CLIENT SETINFO LIB-NAME x",
            "CLIENT SETNAME x",
            "PING",
            "INFO server",
            "SELECT 0",
        ] {
            assert!(matches!(command(text), Ok(Command::Local(_))), "{text}");
        }
    }
}
