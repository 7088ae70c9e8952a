//! JSON in and out.
//!
//! Bodies are parsed by `simd-json`, in place, into a tape that [`Node`] walks; answers are written
//! by hand, because they are a handful of fixed shapes around a value that is copied once.
//!
//! Invariant: [`parse`] measures a body before it parses it, so nesting and memory are bounded
//! whatever the client sends.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Bytes, BytesMut};
use simd_json::prelude::{TypedScalarValue, ValueAsScalar, ValueIntoString};
use simd_json::tape;

use crate::limits::{JSON_DEPTH_MAX, JSON_MARKS_MAX};

/// Why a body is not what was expected. The text goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct JsonError(pub String);

impl JsonError {
    fn new(message: impl Into<String>) -> Self {
        JsonError(message.into())
    }
}

/// A field's value: bytes as a string or in base64. Points into the body's buffer when it can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// A run of the parsed buffer.
    Inside {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
    },
    /// Decoded from base64.
    Decoded(Vec<u8>),
}

impl Text {
    /// The bytes, sharing `body`, the buffer that was parsed.
    pub fn into_bytes(self, body: &Bytes) -> Bytes {
        match self {
            Text::Inside { start, end } => body.slice(start..end),
            Text::Decoded(bytes) => Bytes::from(bytes),
        }
    }

    /// Their number.
    pub fn byte_count(&self) -> usize {
        match self {
            Text::Inside { start, end } => end - start,
            Text::Decoded(bytes) => bytes.len(),
        }
    }
}

/// Parses a body and gives its root to `read`, together with what finds strings in the buffer
/// again. The buffer is changed (strings are unescaped in place) and returned, frozen.
///
/// # Errors
/// What `read` says, or that the body is no JSON or above the bounds.
pub fn parse<R>(
    mut body: BytesMut,
    read: impl FnOnce(Node<'_, '_>) -> Result<R, JsonError>,
) -> Result<(R, Bytes), JsonError> {
    measure(&body)?;
    let base = body.as_ptr() as usize;
    let tape = simd_json::to_tape(&mut body).map_err(|error| {
        JsonError::new(format!(
            "the body is not valid JSON at byte {}",
            error.index()
        ))
    })?;
    let answer = read(Node {
        value: tape.as_value(),
        base,
    })?;
    drop(tape);
    Ok((answer, body.freeze()))
}

/// Refuses bodies that nest deeper or have more parts than anything meaningful: the parser's memory
/// grows with both.
fn measure(body: &[u8]) -> Result<(), JsonError> {
    let (mut depth, mut marks, mut at) = (0usize, 0usize, 0);
    while let Some(&byte) = body.get(at) {
        at += 1;
        match byte {
            b'"' => {
                while let Some(end) = memchr::memchr2(b'"', b'\\', &body[at.min(body.len())..]) {
                    at += end + 1;
                    if body[at - 1] == b'"' {
                        break;
                    }
                    // The escaped character, which may be a quote.
                    at += 1;
                }
                // A string that does not end is the parser's to refuse.
            }
            b'[' | b'{' => {
                depth += 1;
                marks += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' | b':' => marks += 1,
            _ => {}
        }
        if depth > JSON_DEPTH_MAX {
            return Err(JsonError::new(format!(
                "the body nests deeper than {JSON_DEPTH_MAX} levels"
            )));
        }
        if marks > JSON_MARKS_MAX {
            return Err(JsonError::new(format!(
                "the body has more than {JSON_MARKS_MAX} parts"
            )));
        }
    }
    Ok(())
}

/// A value of a parsed body.
#[derive(Clone, Copy)]
pub struct Node<'tape, 'input> {
    value: tape::Value<'tape, 'input>,
    /// Address of the buffer's first byte, to tell where a string lies in it.
    base: usize,
}

impl<'tape, 'input> Node<'tape, 'input> {
    /// The object's members.
    ///
    /// # Errors
    /// When the value is no object.
    pub fn members(
        self,
        what: &str,
    ) -> Result<impl Iterator<Item = (&'input str, Node<'tape, 'input>)>, JsonError> {
        let object = self
            .value
            .as_object()
            .ok_or_else(|| JsonError::new(format!("{what} must be a JSON object")))?;
        let members: Vec<_> = object.iter().collect();
        let base = self.base;
        Ok(members
            .into_iter()
            .map(move |(name, value)| (name, Node { value, base })))
    }

    /// The array's elements.
    ///
    /// # Errors
    /// When the value is no array.
    pub fn elements(
        self,
        what: &str,
    ) -> Result<impl Iterator<Item = Node<'tape, 'input>>, JsonError> {
        let array = self
            .value
            .as_array()
            .ok_or_else(|| JsonError::new(format!("{what} must be an array")))?;
        let elements: Vec<_> = array.iter().collect();
        let base = self.base;
        Ok(elements.into_iter().map(move |value| Node { value, base }))
    }

    /// Whether the value is `null`.
    pub fn is_null(self) -> bool {
        self.value.is_null()
    }

    /// Whether the value is an object.
    pub fn is_object(self) -> bool {
        self.value.as_object().is_some()
    }

    /// The string.
    ///
    /// # Errors
    /// When the value is no string.
    pub fn string(self, what: &str) -> Result<&'input str, JsonError> {
        self.value
            .into_string()
            .ok_or_else(|| JsonError::new(format!("{what} must be a string")))
    }

    /// The whole number.
    ///
    /// # Errors
    /// When the value is no whole number or a negative one.
    pub fn unsigned(self, what: &str) -> Result<u64, JsonError> {
        self.value.as_u64().ok_or_else(|| {
            JsonError::new(format!(
                "{what} must be a whole number that is not negative"
            ))
        })
    }

    /// The truth value.
    ///
    /// # Errors
    /// When the value is neither `true` nor `false`.
    pub fn boolean(self, what: &str) -> Result<bool, JsonError> {
        self.value
            .as_bool()
            .ok_or_else(|| JsonError::new(format!("{what} must be true or false")))
    }

    /// The bytes of a string field, decoded when `encoding` says base64.
    ///
    /// # Errors
    /// When the value is no string or not valid base64.
    pub fn text(self, what: &str, encoding: Encoding) -> Result<Text, JsonError> {
        let string = self.string(what)?;
        match encoding {
            // Where an empty string points to is the parser's own affair.
            Encoding::Utf8 if string.is_empty() => Ok(Text::Inside { start: 0, end: 0 }),
            Encoding::Utf8 => {
                let start = string.as_ptr() as usize - self.base;
                Ok(Text::Inside {
                    start,
                    end: start + string.len(),
                })
            }
            Encoding::Base64 => STANDARD
                .decode(string)
                .map(Text::Decoded)
                .map_err(|error| JsonError::new(format!("{what} is not valid base64: {error}"))),
        }
    }
}

/// How bytes are written in a JSON string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Encoding {
    /// As they are.
    #[default]
    Utf8,
    /// RFC 4648, section 4, padded.
    Base64,
}

impl Encoding {
    /// Reads the `encoding` field.
    ///
    /// # Errors
    /// When the encoding is unknown.
    pub fn read(node: Node<'_, '_>) -> Result<Self, JsonError> {
        if node.is_null() {
            return Ok(Encoding::Utf8);
        }
        match node.string("encoding")? {
            "base64" => Ok(Encoding::Base64),
            "utf8" | "utf-8" => Ok(Encoding::Utf8),
            _ => Err(JsonError::new("encoding must be \"base64\" or \"utf8\"")),
        }
    }
}

/// Appends `"name":"…"`, and `,"encoding":"base64"` after it (under the name that `encoding` gives)
/// when the bytes are not UTF-8.
pub fn write_bytes_field(out: &mut Vec<u8>, name: &str, encoding: &str, bytes: &[u8]) {
    write_string(out, name);
    out.push(b':');
    match std::str::from_utf8(bytes) {
        Ok(text) => write_string(out, text),
        Err(_) => {
            out.push(b'"');
            let start = out.len();
            let len = base64::encoded_len(bytes.len(), true).expect("a value is far below 4 GiB");
            out.resize(start + len, 0);
            STANDARD
                .encode_slice(bytes, &mut out[start..])
                .expect("the buffer has the encoded length");
            out.extend_from_slice(b"\",");
            write_string(out, encoding);
            out.extend_from_slice(b":\"base64\"");
        }
    }
}

/// Appends a JSON string.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at]);
        copied = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
    out.push(b'"');
}

/// Appends a whole number.
pub fn write_number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Appends `true` or `false`.
pub fn write_bool(out: &mut Vec<u8>, value: bool) {
    out.extend_from_slice(if value { b"true" } else { b"false" });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(body: &[u8], encoding: Encoding) -> Result<Bytes, JsonError> {
        let (text, body) = parse(BytesMut::from(body), |root| {
            let (_, node) = root
                .members("the body")?
                .find(|(name, _)| *name == "value")
                .ok_or_else(|| JsonError::new("no value"))?;
            node.text("value", encoding)
        })?;
        Ok(text.into_bytes(&body))
    }

    #[test]
    fn a_string_is_found_in_the_buffer_it_came_in() {
        let bytes = value(
            br#"{"a":[1,{"b":2}],"value":"h\u00e9\n\"llo"}"#,
            Encoding::Utf8,
        );
        assert_eq!(&bytes.expect("good")[..], "h\u{e9}\n\"llo".as_bytes());
        let empty = value(br#"{"value":""}"#, Encoding::Utf8).expect("good");
        assert!(empty.is_empty());
    }

    #[test]
    fn base64_is_strict() {
        assert_eq!(
            value(br#"{"value":"/wA="}"#, Encoding::Base64).as_deref(),
            Ok(&[0xff, 0][..])
        );
        for bad in ["/wA", "/wB=", "_wA=", "/w A=", "x"] {
            let body = format!("{{\"value\":\"{bad}\"}}");
            assert!(value(body.as_bytes(), Encoding::Base64).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_truncation_and_flipped_bit_is_an_error_or_a_value_never_a_panic() {
        let body = br#"{"value":"h\u00e9\\\"","context":null,"n":[1,2.5,true]}"#;
        for len in 0..body.len() {
            assert!(value(&body[..len], Encoding::Utf8).is_err());
        }
        for bit in 0..body.len() * 8 {
            let mut changed = body.to_vec();
            changed[bit / 8] ^= 1 << (bit % 8);
            let found = value(&changed, Encoding::Utf8);
            assert!(found.is_err() || found.is_ok_and(|value| value.len() < body.len()));
        }
    }

    #[test]
    fn hostile_bodies_are_refused_before_they_are_parsed() {
        for body in [
            "[".repeat(1 << 20),
            "{\"a\":".repeat(1 << 16),
            format!("[{}1]", "1,".repeat(JSON_MARKS_MAX + 1)),
            "\"".repeat(1 << 16),
            "\\".repeat(1 << 16),
            "\"\\".to_string(),
        ] {
            assert!(parse(BytesMut::from(body.as_bytes()), |_| Ok(())).is_err());
        }
        let commas = format!("{{\"value\":\"{}\"}}", ",[{:".repeat(JSON_MARKS_MAX));
        assert!(value(commas.as_bytes(), Encoding::Utf8).is_ok());
    }

    #[test]
    fn strings_are_escaped_where_json_asks_for_it() {
        let mut out = Vec::new();
        write_string(&mut out, "a\"b\\c\n\r\t\u{1}\u{7f}é");
        assert_eq!(out, "\"a\\\"b\\\\c\\n\\r\\t\\u0001\u{7f}é\"".as_bytes());
        let back: String = serde_json::from_slice(&out).expect("valid JSON");
        assert_eq!(back, "a\"b\\c\n\r\t\u{1}\u{7f}é");
    }

    #[test]
    fn bytes_that_are_no_text_say_so() {
        let mut out = Vec::new();
        write_bytes_field(&mut out, "value", "encoding", &[0xff, 0]);
        assert_eq!(out, br#""value":"/wA=","encoding":"base64""#);
        out.clear();
        write_bytes_field(&mut out, "key", "encoding", b"k");
        assert_eq!(out, br#""key":"k""#);
    }
}
