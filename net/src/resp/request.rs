//! From bytes to RESP commands.
//!
//! A command is an array of bulk strings, or one inline line of words (what a person types into
//! `telnet`). Both come out as a list of arguments that share the receive buffer.
//!
//! Invariants: what was looked at once is not looked at again however slowly it arrives; memory is
//! bounded by the limits of [`crate::limits`].

use bytes::{Bytes, BytesMut};

use crate::input::reserve;
use crate::limits::{RESP_ARGUMENTS_MAX, RESP_COMMAND_BYTES_MAX, RESP_INLINE_BYTES_MAX};

/// Why bytes are no command. Where the next one starts is unknown, so the connection is closed after
/// the error is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RespError {
    /// The number of arguments is no number or out of range.
    #[error("Protocol error: invalid multibulk length")]
    ArrayLength,
    /// An argument does not start with `$`.
    #[error("Protocol error: expected '$', got another byte")]
    ExpectedBulk,
    /// An argument's length is no number or out of range.
    #[error("Protocol error: invalid bulk length")]
    BulkLength,
    /// An argument does not end where its length says.
    #[error("Protocol error: expected CRLF after a bulk string")]
    BulkEnd,
    /// A line is too long.
    #[error("Protocol error: too big inline request")]
    LineTooLong,
    /// An inline command opens a quote and does not close it.
    #[error("Protocol error: unbalanced quotes in request")]
    Quotes,
}

/// Takes commands off a connection's input.
#[derive(Debug, Default)]
pub struct Parser {
    /// Bytes of the input that are understood; the command under way starts at 0.
    position: usize,
    /// Bytes after `position` that were searched for a line's end.
    searched: usize,
    /// Arguments that are still to come; `None` before the array's header.
    missing: Option<usize>,
    /// Length of the argument under way, when its header was read.
    bulk: Option<usize>,
    /// Where the arguments so far lie in the input.
    arguments: Vec<(usize, usize)>,
    /// Their length together.
    argument_bytes: usize,
}

impl Parser {
    /// Takes the next command off the front of `input`; `None` when more bytes are needed. A command
    /// may be empty (an empty line or array): the caller ignores it.
    ///
    /// # Errors
    /// See [`RespError`]; the parser is of no use after that.
    pub fn advance(&mut self, input: &mut BytesMut) -> Result<Option<Vec<Bytes>>, RespError> {
        if self.missing.is_none() {
            match input.get(self.position) {
                None => return Ok(None),
                Some(b'*') => {}
                Some(_) => return self.inline(input),
            }
            let Some(line) = self.line(input)? else {
                return Ok(None);
            };
            let count = number(&input[line.0 + 1..line.1]).ok_or(RespError::ArrayLength)?;
            // A negative count is a null array: no command.
            let count = usize::try_from(count.max(0)).map_err(|_| RespError::ArrayLength)?;
            if count > RESP_ARGUMENTS_MAX {
                return Err(RespError::ArrayLength);
            }
            self.missing = Some(count);
        }
        while self.missing.is_some_and(|missing| missing > 0) {
            if self.bulk.is_none() {
                match input.get(self.position) {
                    None => return Ok(None),
                    Some(b'$') => {}
                    Some(_) => return Err(RespError::ExpectedBulk),
                }
                let Some(line) = self.line(input)? else {
                    return Ok(None);
                };
                let len = number(&input[line.0 + 1..line.1]).ok_or(RespError::BulkLength)?;
                let len = usize::try_from(len).map_err(|_| RespError::BulkLength)?;
                if len > RESP_COMMAND_BYTES_MAX - self.argument_bytes {
                    return Err(RespError::BulkLength);
                }
                self.bulk = Some(len);
            }
            let len = self.bulk.unwrap_or(0);
            let end = self.position + len;
            match input.get(end..end + 2) {
                Some(b"\r\n") => {}
                Some(_) => return Err(RespError::BulkEnd),
                None => {
                    reserve(input, end + 2);
                    return Ok(None);
                }
            }
            self.arguments.push((self.position, end));
            self.argument_bytes += len;
            self.position = end + 2;
            self.bulk = None;
            self.missing = self.missing.map(|missing| missing - 1);
        }
        Ok(Some(self.take(input)))
    }

    /// Whether a command is partly received (and so on the clock).
    pub fn in_request(&self, input: &BytesMut) -> bool {
        !input.is_empty()
    }

    /// The line at `position`, without its end; moves `position` behind it.
    fn line(&mut self, input: &[u8]) -> Result<Option<(usize, usize)>, RespError> {
        let from = self.position + self.searched;
        let Some(at) = memchr::memchr(b'\n', &input[from..]) else {
            self.searched = input.len() - self.position;
            if self.searched > RESP_INLINE_BYTES_MAX {
                return Err(RespError::LineTooLong);
            }
            return Ok(None);
        };
        let (start, mut end) = (self.position, from + at);
        if end - start > RESP_INLINE_BYTES_MAX {
            return Err(RespError::LineTooLong);
        }
        self.position = end + 1;
        self.searched = 0;
        if end > start && input[end - 1] == b'\r' {
            end -= 1;
        }
        Ok(Some((start, end)))
    }

    fn inline(&mut self, input: &mut BytesMut) -> Result<Option<Vec<Bytes>>, RespError> {
        let Some(line) = self.line(input)? else {
            return Ok(None);
        };
        let words = words(&input[line.0..line.1])?;
        self.take(input);
        Ok(Some(words))
    }

    /// The command's arguments; resets the parser for the next one.
    fn take(&mut self, input: &mut BytesMut) -> Vec<Bytes> {
        let bytes = input.split_to(self.position).freeze();
        let arguments = self.arguments.drain(..);
        let arguments = arguments.map(|(start, end)| bytes.slice(start..end));
        let arguments = arguments.collect();
        self.position = 0;
        self.missing = None;
        self.argument_bytes = 0;
        arguments
    }
}

/// A decimal number with an optional minus sign.
fn number(digits: &[u8]) -> Option<i64> {
    let unsigned = digits.strip_prefix(b"-").unwrap_or(digits);
    if unsigned.is_empty() || !unsigned.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Splits an inline command into words. Double quotes take escapes (`\n`, `\xff`), single quotes
/// only `\'`.
fn words(line: &[u8]) -> Result<Vec<Bytes>, RespError> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        let Some(&first) = rest.first() else {
            return Ok(words);
        };
        let mut word = Vec::new();
        match first {
            b'"' | b'\'' => {
                rest = quoted(&rest[1..], first, &mut word)?;
                if rest.first().is_some_and(|byte| !byte.is_ascii_whitespace()) {
                    return Err(RespError::Quotes);
                }
            }
            _ => {
                let end = rest.iter().position(u8::is_ascii_whitespace);
                let end = end.unwrap_or(rest.len());
                word.extend_from_slice(&rest[..end]);
                rest = &rest[end..];
            }
        }
        words.push(Bytes::from(word));
    }
}

fn quoted<'a>(mut rest: &'a [u8], quote: u8, word: &mut Vec<u8>) -> Result<&'a [u8], RespError> {
    loop {
        match *rest {
            [] => return Err(RespError::Quotes),
            [byte, ..] if byte == quote => return Ok(&rest[1..]),
            [b'\\', b'\'', ..] if quote == b'\'' => {
                word.push(b'\'');
                rest = &rest[2..];
            }
            [b'\\', b'x', high, low, ..]
                if quote == b'"' && high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                let digits = [high, low];
                let text = std::str::from_utf8(&digits).map_err(|_| RespError::Quotes)?;
                word.push(u8::from_str_radix(text, 16).map_err(|_| RespError::Quotes)?);
                rest = &rest[4..];
            }
            [b'\\', escaped, ..] if quote == b'"' => {
                word.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => other,
                });
                rest = &rest[2..];
            }
            [byte, ..] => {
                word.push(byte);
                rest = &rest[1..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::command;

    fn feed(bytes: &[u8], step: usize) -> Result<Vec<Vec<Bytes>>, RespError> {
        let mut parser = Parser::default();
        let mut input = BytesMut::new();
        let mut commands = Vec::new();
        for part in bytes.chunks(step) {
            input.extend_from_slice(part);
            while let Some(command) = parser.advance(&mut input)? {
                commands.push(command);
            }
        }
        Ok(commands)
    }

    #[test]
    fn commands_come_out_however_they_are_cut() {
        let bytes = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n*1\r\n$4\r\nPING\r\n\
            *0\r\n*-1\r\nGET  k\r\n\r\nSET k \"a \\x41\\n\\\"\" 'it\\'s'\n*1\r\n$0\r\n\r\n";
        for step in [1, 2, 5, 30, bytes.len()] {
            let commands = feed(bytes, step).expect("good");
            let expected: Vec<Vec<&[u8]>> = vec![
                vec![b"SET", b"k", b"a\r\nb"],
                vec![b"PING"],
                vec![],
                vec![],
                vec![b"GET", b"k"],
                vec![],
                vec![b"SET", b"k", b"a A\n\"", b"it's"],
                vec![b""],
            ];
            assert_eq!(commands, expected, "in parts of {step}");
        }
    }

    #[test]
    fn every_truncation_waits() {
        let bytes = b"*2\r\n$3\r\nGET\r\n$10\r\n0123456789\r\n";
        for len in 0..bytes.len() {
            assert_eq!(feed(&bytes[..len], usize::MAX), Ok(vec![]), "{len} bytes");
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_any_memory_is_taken() {
        for (bytes, error) in [
            ("*99999999\r\n", RespError::ArrayLength),
            ("*9999999999999999999999\r\n", RespError::ArrayLength),
            ("*x\r\n", RespError::ArrayLength),
            ("*\r\n", RespError::ArrayLength),
            ("*1\r\n$-1\r\n", RespError::BulkLength),
            ("*1\r\n$536870912\r\n", RespError::BulkLength),
            ("*1\r\n$+1\r\n", RespError::BulkLength),
            ("*1\r\n:1\r\n", RespError::ExpectedBulk),
            ("*1\r\n$1\r\nabc", RespError::BulkEnd),
            ("SET \"k\r\n", RespError::Quotes),
            ("SET \"k\"x\r\n", RespError::Quotes),
        ] {
            assert_eq!(feed(bytes.as_bytes(), usize::MAX), Err(error), "{bytes:?}");
        }
        let long = vec![b'a'; RESP_INLINE_BYTES_MAX + 2];
        assert_eq!(feed(&long, 1000), Err(RespError::LineTooLong));
        let half = RESP_COMMAND_BYTES_MAX / 2 + 1;
        let mut two = format!("*2\r\n${half}\r\n").into_bytes();
        two.resize(two.len() + half, b'x');
        two.extend_from_slice(format!("\r\n${half}\r\n").as_bytes());
        assert_eq!(feed(&two, usize::MAX), Err(RespError::BulkLength));
    }

    #[test]
    fn no_bytes_make_a_command_panic() {
        let inline = "SET k \"a \\x41\\n\" 'it\\'s' EX 10 NX GET\r\nGETEX k\n";
        let commands: [&[&str]; 8] = [
            &["SET", "key", "value", "PXAT", "1700000000000", "XX", "GET"],
            &["MSET", "a", "1", "b", "2"],
            &["PEXPIRE", "key", "1000"],
            &["EXPIREAT", "key", "-1"],
            &["SETEX", "key", "10", "value"],
            &["HELLO", "3", "SETNAME", "me"],
            &["CLIENT", "SETINFO", "LIB-NAME", "x"],
            &["CONFIG", "GET", "*"],
        ];
        let bulk = |words: &[&str]| {
            let mut text = format!("*{}\r\n", words.len());
            for word in words {
                text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
            }
            text.into_bytes()
        };
        let mut valid: Vec<Vec<u8>> = commands.into_iter().map(bulk).collect();
        valid.push(inline.as_bytes().to_vec());
        crate::fuzz::parser("RESP command", &valid).fuzz(|bytes| {
            for step in [3, bytes.len().max(1)] {
                let (mut parser, mut input) = (Parser::default(), BytesMut::new());
                for part in bytes.chunks(step) {
                    input.extend_from_slice(part);
                    loop {
                        match parser.advance(&mut input) {
                            Ok(Some(arguments)) if arguments.is_empty() => {}
                            Ok(Some(arguments)) => drop(command::read(&arguments)),
                            Ok(None) => break,
                            Err(_) => return,
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn no_flipped_bit_makes_the_parser_panic() {
        let bytes = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\nab\r\n\r\nGET \"k\"\r\n";
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            let found = feed(&changed, 7);
            assert!(found.is_err() || found.is_ok_and(|commands| commands.len() <= 10));
        }
    }
}
