//! RESP replies, and their bytes in both versions of the protocol.

use bytes::{BufMut, Bytes};

use crate::output::Output;

/// Which version a connection speaks; `HELLO` switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Version {
    /// RESP2, what every connection starts with.
    #[default]
    Two,
    /// RESP3: its own null, maps.
    Three,
}

/// One reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A short text of ours, such as `OK`.
    Status(&'static str),
    /// An error; the first word is its kind. Control characters are replaced when it is written.
    Error(String),
    /// A number.
    Integer(i64),
    /// Bytes.
    Bulk(Bytes),
    /// Nothing.
    Null,
    /// A list.
    Array(Vec<Reply>),
    /// Names and values; a flat list in RESP2.
    Map(Vec<(Reply, Reply)>),
}

impl Reply {
    /// `+OK`.
    pub const OK: Reply = Reply::Status("OK");

    /// A bulk of our own text.
    pub fn text(text: impl Into<String>) -> Reply {
        Reply::Bulk(Bytes::from(text.into()))
    }

    /// An error of kind `ERR`.
    pub fn error(message: impl std::fmt::Display) -> Reply {
        Reply::Error(format!("ERR {message}"))
    }

    /// Bytes of what it carries.
    pub fn bytes(&self) -> usize {
        match self {
            Reply::Status(_) | Reply::Integer(_) | Reply::Null => 0,
            Reply::Error(text) => text.len(),
            Reply::Bulk(bytes) => bytes.len(),
            Reply::Array(replies) => replies.iter().map(Reply::bytes).sum(),
            Reply::Map(pairs) => pairs.iter().map(|(a, b)| a.bytes() + b.bytes()).sum(),
        }
    }

    /// Appends the reply's bytes.
    pub fn write(&self, out: &mut Output, version: Version) {
        match self {
            Reply::Status(text) => line(out, b'+', text.as_bytes()),
            Reply::Error(text) => {
                // A line break in a message would be read as the next reply.
                let clean: Vec<u8> = text
                    .bytes()
                    .map(|byte| if byte < b' ' { b' ' } else { byte })
                    .collect();
                line(out, b'-', &clean);
            }
            Reply::Integer(number) => {
                line(out, b':', itoa::Buffer::new().format(*number).as_bytes());
            }
            Reply::Bulk(bytes) => {
                header(out, b'$', bytes.len());
                out.append(bytes.clone());
                out.buffer().put_slice(b"\r\n");
            }
            Reply::Null => out.buffer().put_slice(match version {
                Version::Two => b"$-1\r\n",
                Version::Three => b"_\r\n",
            }),
            Reply::Array(replies) => {
                header(out, b'*', replies.len());
                for reply in replies {
                    reply.write(out, version);
                }
            }
            Reply::Map(pairs) => {
                match version {
                    Version::Two => header(out, b'*', pairs.len() * 2),
                    Version::Three => header(out, b'%', pairs.len()),
                }
                for (name, value) in pairs {
                    name.write(out, version);
                    value.write(out, version);
                }
            }
        }
    }
}

fn header(out: &mut Output, mark: u8, len: usize) {
    line(out, mark, itoa::Buffer::new().format(len).as_bytes());
}

fn line(out: &mut Output, mark: u8, text: &[u8]) {
    let buffer = out.buffer();
    buffer.put_u8(mark);
    buffer.put_slice(text);
    buffer.put_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(reply: &Reply, version: Version) -> String {
        let mut out = Output::default();
        reply.write(&mut out, version);
        String::from_utf8(out.to_vec()).expect("ASCII")
    }

    #[test]
    fn replies_are_written_to_the_byte_in_both_versions() {
        let reply = Reply::Array(vec![
            Reply::OK,
            Reply::Integer(-2),
            Reply::Bulk(Bytes::from_static(b"ab")),
            Reply::Null,
            Reply::Map(vec![(Reply::text("proto"), Reply::Integer(3))]),
            Reply::error("no\r\n+OK"),
        ]);
        assert_eq!(
            bytes(&reply, Version::Two),
            "*6\r\n+OK\r\n:-2\r\n$2\r\nab\r\n$-1\r\n*2\r\n$5\r\nproto\r\n:3\r\n-ERR no  +OK\r\n"
        );
        assert_eq!(
            bytes(&reply, Version::Three),
            "*6\r\n+OK\r\n:-2\r\n$2\r\nab\r\n_\r\n%1\r\n$5\r\nproto\r\n:3\r\n-ERR no  +OK\r\n"
        );
    }
}
