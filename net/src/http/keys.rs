//! `/v1/keys/{key}`: one key, read, written, deleted.
//!
//! On the path: translates a request into `torc-cluster`'s terms and its answer into HTTP's. What a
//! level, a context or a condition means is decided there.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use torc_cluster::api::{
    Condition, Context, DeleteRequest, GetAnswer, GetRequest, PutRequest, TTL_SECONDS_MAX,
    VALUE_BYTES_MAX, WriteOptions, Written,
};

use crate::http::json::{self, Encoding, JsonError, Node, Text};
use crate::http::query::Query;
use crate::http::request::{Method, Request, is_octet_stream};
use crate::http::response::{ContentType, Problem, Response};
use crate::http::session::Session;
use crate::service::{Service, idempotency};

/// The longest `Idempotency-Key`, in bytes.
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// Answers a request for one key.
///
/// # Errors
/// What the client is told instead of a good answer.
pub async fn handle(
    service: Rc<Service>,
    request: Request,
    keyspace: Bytes,
    key: Bytes,
) -> Result<Response, Problem> {
    if let Some(name) = request.headers.repeated {
        return Err(Problem::bad_request(format!(
            "the header {name} stands twice"
        )));
    }
    match request.method {
        Method::Get | Method::Head => get(&service, &request, keyspace, key).await,
        Method::Put => put(&service, request, keyspace, key).await,
        Method::Delete => delete(&service, &request, keyspace, key).await,
        Method::Post | Method::Other => Err(Problem::method_not_allowed("GET, HEAD, PUT, DELETE")),
    }
}

async fn get(
    service: &Service,
    request: &Request,
    keyspace: Bytes,
    key: Bytes,
) -> Result<Response, Problem> {
    let query = Query::parse(&request.query)?;
    let r = query.level("r")?;
    // Checked although a read does not use it: what is given counts or is refused.
    query.level("w")?;
    query.boolean("sloppy")?;
    let deadline = service.deadline(query.timeout_ms()?);
    let mut session = session(request)?;
    let (r, at_least) = match &session {
        Some(session) => session.read(&keyspace, &key, r),
        None => (r, None),
    };
    let answer = service
        .node
        .get(GetRequest {
            keyspace: keyspace.clone(),
            key: key.clone(),
            r,
            at_least,
            deadline,
        })
        .await?;
    let token = session.as_mut().map(|session| {
        session.note(&keyspace, &key, &answer.context);
        session.to_token()
    });
    let raw = is_octet_stream_accepted(request.headers.accept.as_deref());
    let mut response = got(answer, raw);
    response.session = token;
    Ok(response)
}

/// The answer to a read.
fn got(answer: GetAnswer, raw: bool) -> Response {
    let version = answer.context.to_opaque();
    if answer.siblings.is_empty() {
        // A deleted key still has a version, on which the next write builds.
        let response = Response::from(Problem::no_such_key());
        return if answer.context.is_empty() {
            response
        } else {
            response.version(version)
        };
    }
    if raw && let [only] = &answer.siblings[..] {
        return Response::with_body(200, ContentType::Octets, only.value.clone()).version(version);
    }
    let status = if answer.siblings.len() == 1 { 200 } else { 300 };
    let mut body = Vec::with_capacity(got_bytes(&answer));
    body.push(b'{');
    write_got(&mut body, &answer, &version, "encoding");
    body.push(b'}');
    Response::json(status, body).version(version)
}

/// About how long a read's JSON becomes.
fn got_bytes(answer: &GetAnswer) -> usize {
    let values = answer.siblings.iter().map(|sibling| sibling.value.len());
    256 + 2 * values.sum::<usize>()
}

/// Appends `"value":…,"version":…` and, when there are several, `"siblings":[…]`. `encoding` names
/// the field that says that the first value is in base64.
pub(super) fn write_got(out: &mut Vec<u8>, answer: &GetAnswer, version: &str, encoding: &str) {
    if let Some(first) = answer.siblings.first() {
        json::write_bytes_field(out, "value", encoding, &first.value);
        out.push(b',');
    }
    write_version(out, &answer.context, version);
    if answer.siblings.len() < 2 {
        return;
    }
    out.extend_from_slice(b",\"siblings\":[");
    for (index, sibling) in answer.siblings.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.push(b'{');
        json::write_bytes_field(out, "value", "encoding", &sibling.value);
        out.push(b'}');
    }
    out.push(b']');
}

/// Appends `"version":{"context":…,"clock":{…}}`.
fn write_version(out: &mut Vec<u8>, context: &Context, opaque: &str) {
    out.extend_from_slice(b"\"version\":{\"context\":");
    json::write_string(out, opaque);
    out.extend_from_slice(b",\"clock\":{");
    for (index, (actor, counter)) in context.clock().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        json::write_string(out, &actor.to_string());
        out.push(b':');
        json::write_number(out, counter);
    }
    out.extend_from_slice(b"}}");
}

/// Appends `"version":…,"acks":{…}`.
pub(super) fn write_written(out: &mut Vec<u8>, written: &Written, version: &str) {
    write_version(out, &written.context, version);
    out.extend_from_slice(b",\"acks\":{\"replicas\":");
    json::write_number(out, u64::from(written.replicas));
    out.extend_from_slice(b",\"hints\":");
    json::write_number(out, u64::from(written.hints));
    out.push(b'}');
}

async fn put(
    service: &Service,
    mut request: Request,
    keyspace: Bytes,
    key: Bytes,
) -> Result<Response, Problem> {
    let query = Query::parse(&request.query)?;
    let body = std::mem::take(&mut request.body);
    let body = if request.is_raw() {
        PutBody {
            value: body.freeze(),
            context: None,
            ttl_seconds: query.ttl_seconds()?,
        }
    } else {
        let body = read_put_body(body)?;
        if query.ttl_seconds()?.is_some() {
            return Err(Problem::bad_request(
                "the query's ttl_seconds is for raw values; a JSON body has a field ttl_seconds",
            ));
        }
        body
    };
    if body.value.len() > VALUE_BYTES_MAX {
        return Err(Problem::new(
            413,
            "too_large",
            format!(
                "a value has at most {VALUE_BYTES_MAX} bytes, this one {}",
                body.value.len()
            ),
        ));
    }
    let ttl = body.ttl_seconds.unwrap_or(0).to_le_bytes();
    let identity: [&[u8]; 3] = [b"PUT", &body.value, &ttl];
    let write = write_options(service, &request, &query, body.context, &identity)?;
    let mut session = session(&request)?;
    let written = service
        .node
        .put(PutRequest {
            keyspace: keyspace.clone(),
            key: key.clone(),
            value: body.value,
            ttl_seconds: body.ttl_seconds,
            write,
        })
        .await?;
    let token = session.as_mut().map(|session| {
        session.note(&keyspace, &key, &written.context);
        session.to_token()
    });
    let version = written.context.to_opaque();
    let mut response = if wants_minimal(request.headers.prefer.as_deref()) {
        Response::empty(204)
    } else {
        let mut body = Vec::with_capacity(256);
        body.push(b'{');
        write_written(&mut body, &written, &version);
        body.push(b'}');
        Response::json(200, body)
    };
    response.session = token;
    Ok(response.version(version))
}

async fn delete(
    service: &Service,
    request: &Request,
    keyspace: Bytes,
    key: Bytes,
) -> Result<Response, Problem> {
    let query = Query::parse(&request.query)?;
    if !request.body.is_empty() {
        return Err(Problem::bad_request(
            "a DELETE has no body: it takes the context from X-Torc-Context",
        ));
    }
    let write = write_options(service, request, &query, None, &[b"DELETE"])?;
    let mut session = session(request)?;
    let written = service
        .node
        .delete(DeleteRequest {
            keyspace: keyspace.clone(),
            key: key.clone(),
            write,
        })
        .await?;
    let mut response = Response::empty(204).version(written.context.to_opaque());
    response.session = session.as_mut().map(|session| {
        session.note(&keyspace, &key, &written.context);
        session.to_token()
    });
    Ok(response)
}

/// What the query and the headers say about a write.
fn write_options(
    service: &Service,
    request: &Request,
    query: &Query,
    body_context: Option<Context>,
    identity: &[&[u8]],
) -> Result<WriteOptions, Problem> {
    let headers = &request.headers;
    query.level("r")?;
    let header_context = headers.context.as_deref().map(context_of).transpose()?;
    let if_match = headers.if_match.as_deref().map(unquoted).map(context_of);
    let if_match = if_match.transpose()?;
    let absent = match headers.if_none_match.as_deref() {
        None => false,
        Some(b"*") => true,
        Some(_) => return Err(Problem::bad_request("If-None-Match takes only *")),
    };
    let given = [
        body_context.is_some(),
        header_context.is_some(),
        if_match.is_some(),
        absent,
    ];
    if given.iter().filter(|given| **given).count() > 1 {
        return Err(Problem::bad_request(
            "the body's context, X-Torc-Context, If-Match and If-None-Match exclude each other",
        ));
    }
    let condition = match if_match {
        Some(context) => Condition::Match(context),
        None if absent => Condition::Absent,
        None => Condition::None,
    };
    Ok(WriteOptions {
        context: body_context.or(header_context),
        condition,
        w: query.level("w")?,
        sloppy: query.boolean("sloppy")?.unwrap_or(false),
        idempotency: match headers.idempotency_key.as_deref() {
            None => None,
            Some(id) if id.is_empty() || id.len() > IDEMPOTENCY_KEY_BYTES_MAX => {
                return Err(Problem::bad_request(format!(
                    "an Idempotency-Key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes"
                )));
            }
            Some(id) => Some(idempotency(id, identity)),
        },
        ..WriteOptions::until(service.deadline(query.timeout_ms()?))
    })
}

/// An opaque context.
///
/// # Errors
/// 400 when it is malformed or tampered with.
pub(super) fn context_of(opaque: &[u8]) -> Result<Context, Problem> {
    let context = std::str::from_utf8(opaque)
        .ok()
        .and_then(|text| Context::from_opaque(text).ok());
    context.ok_or_else(|| {
        Problem::new(
            400,
            "bad_token",
            "the context is not one that this cluster gave out",
        )
    })
}

/// `If-Match` takes its version bare or quoted.
fn unquoted(value: &[u8]) -> &[u8] {
    match value {
        [b'"', inner @ .., b'"'] => inner,
        bare => bare,
    }
}

pub(super) fn session(request: &Request) -> Result<Option<Session>, Problem> {
    let Some(token) = request.headers.session.as_deref() else {
        return Ok(None);
    };
    Session::from_token(token)
        .map(Some)
        .map_err(|error| Problem::new(400, "bad_token", error.to_string()))
}

/// Whether an `Accept` list asks for raw bytes before JSON.
fn is_octet_stream_accepted(accept: Option<&[u8]>) -> bool {
    let Some(accept) = accept else { return false };
    for media in accept.split(|byte| *byte == b',') {
        if is_octet_stream(Some(media)) {
            return true;
        }
        if media
            .trim_ascii()
            .to_ascii_lowercase()
            .starts_with(b"application/json")
        {
            return false;
        }
    }
    false
}

/// Whether a `Prefer` list holds `return=minimal`.
fn wants_minimal(prefer: Option<&[u8]>) -> bool {
    prefer.is_some_and(|prefer| {
        prefer
            .split(|byte| *byte == b',' || *byte == b';')
            .any(|part| part.trim_ascii().eq_ignore_ascii_case(b"return=minimal"))
    })
}

/// A PUT's JSON body.
#[derive(Debug)]
struct PutBody {
    value: Bytes,
    context: Option<Context>,
    ttl_seconds: Option<u64>,
}

fn read_put_body(body: BytesMut) -> Result<PutBody, Problem> {
    let (fields, body) = json::parse(body, Fields::read).map_err(|error| {
        Problem::bad_request(format!(
            "{error}: send {{\"value\": \"...\"}}, or the value itself with Content-Type: application/octet-stream"
        ))
    })?;
    Ok(PutBody {
        context: fields.context()?,
        ttl_seconds: fields.ttl_seconds,
        value: fields
            .value
            .ok_or_else(|| Problem::bad_request("the body has no value"))?
            .into_bytes(&body),
    })
}

/// The fields that say what to write, of a PUT's body or of a batch's operation. Others are refused: one that was
/// meant to change what is written would be missed in silence.
#[derive(Debug, Default)]
pub(super) struct Fields {
    pub(super) value: Option<Text>,
    pub(super) ttl_seconds: Option<u64>,
    context: Option<String>,
}

impl Fields {
    fn read(root: Node<'_, '_>) -> Result<Fields, JsonError> {
        let mut fields = Fields::default();
        let (mut value, mut encoding) = (None, Encoding::Utf8);
        for (name, node) in root.members("the body")? {
            match name {
                "value" => value = Some(node),
                "encoding" => encoding = Encoding::read(node)?,
                name => fields.note(name, node)?,
            }
        }
        fields.value = value.map(|node| node.text("value", encoding)).transpose()?;
        Ok(fields)
    }

    /// Takes a field other than value and encoding.
    pub(super) fn note(&mut self, name: &str, node: Node<'_, '_>) -> Result<(), JsonError> {
        match name {
            "ttl_seconds" if !node.is_null() => {
                let seconds = node.unsigned("ttl_seconds")?;
                if !(1..=TTL_SECONDS_MAX).contains(&seconds) {
                    return Err(JsonError(format!(
                        "ttl_seconds must be from 1 to {TTL_SECONDS_MAX}"
                    )));
                }
                self.ttl_seconds = Some(seconds);
            }
            // The object that an answer carries as `version`, or its opaque string.
            "context" if !node.is_null() => {
                let opaque = if node.is_object() {
                    let mut members = node.members("context")?;
                    let inner = members.find(|(name, _)| *name == "context");
                    let (_, inner) = inner.ok_or_else(|| {
                        JsonError("context is an object without a context in it".into())
                    })?;
                    inner
                } else {
                    node
                };
                self.context = Some(opaque.string("context")?.to_owned());
            }
            "ttl_seconds" | "context" => {}
            other => {
                return Err(JsonError(format!("the field {other:?} is not known here")));
            }
        }
        Ok(())
    }

    /// The context that was given.
    pub(super) fn context(&self) -> Result<Option<Context>, Problem> {
        let context = self
            .context
            .as_ref()
            .map(|opaque| context_of(opaque.as_bytes()));
        context.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(text: &str) -> Result<PutBody, Problem> {
        read_put_body(BytesMut::from(text.as_bytes()))
    }

    #[test]
    fn no_bytes_make_a_body_or_a_header_panic() {
        let context = Context::default().to_opaque();
        let valid = [
            r#"{"value":"a \u00e9 \ud83d\ude00","ttl_seconds":60,"context":null}"#.to_owned(),
            r#"{"value":"/wA=","encoding":"base64","context":null}"#.to_owned(),
            format!(r#"{{"value":"v","context":{{"context":"{context}","clock":{{"a":1e9}}}}}}"#),
            "application/json; q=0.5, application/octet-stream".to_owned(),
            "respond-async, return=minimal; x".to_owned(),
            format!("\"{context}\""),
        ];
        let valid = valid.map(String::into_bytes);
        crate::fuzz::parser("JSON body of a put", &valid).fuzz(|bytes| {
            drop(read_put_body(BytesMut::from(bytes)));
            is_octet_stream_accepted(Some(bytes));
            wants_minimal(Some(bytes));
            drop(context_of(unquoted(bytes)));
        });
    }

    #[test]
    fn a_body_that_is_no_json_is_told_what_would_be_right() {
        let message = body("hello").unwrap_err().message;
        assert!(message.contains("not valid JSON at byte 0"), "{message}");
        assert!(message.contains(r#"{"value": "..."}"#), "{message}");
        assert!(message.contains("application/octet-stream"), "{message}");
    }

    #[test]
    fn a_body_says_what_to_write() {
        let put = body(r#"{"ttl_seconds":60,"encoding":"base64","value":"/wA="}"#);
        let put = put.expect("good");
        assert_eq!(
            (&put.value[..], put.ttl_seconds),
            (&[0xff, 0][..], Some(60))
        );
        let put = body(r#"{"value":"","context":null,"ttl_seconds":null}"#).ok();
        assert!(put.is_some_and(|put| put.value.is_empty() && put.context.is_none()));
    }

    #[test]
    fn a_body_that_does_not_say_it_is_refused() {
        for text in [
            "",
            "null",
            "[]",
            "\"x\"",
            "{}",
            r#"{"value":null}"#,
            r#"{"value":1}"#,
            r#"{"value":"x","encoding":"hex"}"#,
            r#"{"value":"x","encoding":"base64"}"#,
            r#"{"value":"x","other":1}"#,
            r#"{"value":"x","ttl_seconds":0}"#,
            r#"{"value":"x","ttl_seconds":-1}"#,
            r#"{"value":"x","ttl_seconds":1.5}"#,
            r#"{"value":"x","ttl_seconds":"1"}"#,
            r#"{"value":"x","ttl_seconds":99999999999999999999}"#,
            r#"{"value":"x","context":1}"#,
            r#"{"value":"x","context":{}}"#,
            r#"{"value":"x","context":"nonsense"}"#,
            r#"{"value":"x","context":""}"#,
            r#"{"value":"x"} {}"#,
        ] {
            assert_eq!(
                body(text).err().map(|problem| problem.status),
                Some(400),
                "{text}"
            );
        }
    }

    #[test]
    fn preferences_are_found_in_their_lists() {
        assert!(wants_minimal(Some(b"respond-async, Return=Minimal")));
        assert!(!wants_minimal(Some(b"return=representation")));
        assert!(is_octet_stream_accepted(Some(
            b"text/plain, application/octet-stream;q=1"
        )));
        assert!(!is_octet_stream_accepted(Some(
            b"application/json, application/octet-stream"
        )));
        assert!(!is_octet_stream_accepted(Some(b"*/*")));
        assert_eq!(unquoted(b"\"abc\""), b"abc");
        assert_eq!(unquoted(b"abc"), b"abc");
    }
}
