//! `/v1/batch`: many operations in one request, an answer for each, not atomic.
//!
//! `{"operations": [{"op": "get"|"put"|"delete", "key": "k" | {"key": …, "encoding": "base64"}, …}]}`
//! → `{"results": [{"status": 200, …}, …]}` in the same order. A put takes `value`, `encoding`,
//! `context` and `ttl_seconds`, a delete `context`; a result holds what the single operation would
//! have answered, and its status. A session's token counts for each operation.

use std::rc::Rc;

use bytes::Bytes;
use torc_cluster::api::{
    BATCH_OPERATIONS_MAX, BatchRequest, DeleteRequest, GetRequest, Level, Operation, Outcome,
    PutRequest, VALUE_BYTES_MAX, WriteOptions,
};
use torc_env::Instant;

use crate::http::json::{self, Encoding, JsonError, Node, Text};
use crate::http::keys::{Fields, session, write_got, write_written};
use crate::http::query::Query;
use crate::http::request::{Method, Request};
use crate::http::response::{Problem, Response};
use crate::http::route::check_key;
use crate::http::session::Session;
use crate::service::Service;

/// Answers a batch.
///
/// # Errors
/// What the client is told when the batch as a whole is refused.
pub async fn handle(
    service: Rc<Service>,
    mut request: Request,
    keyspace: Bytes,
) -> Result<Response, Problem> {
    if request.method != Method::Post {
        return Err(Problem::method_not_allowed("POST"));
    }
    if let Some(name) = request.headers.of_one_key() {
        return Err(Problem::bad_request(format!(
            "{name} is for a single key: a batch's operations have contexts of their own, and no conditions"
        )));
    }
    let mut session = session(&request)?;
    let query = Query::parse(&request.query)?;
    let common = Common {
        keyspace,
        r: query.level("r")?,
        w: query.level("w")?,
        sloppy: query.boolean("sloppy")?.unwrap_or(false),
        deadline: service.deadline(query.timeout_ms()?),
    };
    let body = std::mem::take(&mut request.body);
    let (parsed, body) = json::parse(body, read_operations)
        .map_err(|error| Problem::bad_request(error.to_string()))?;
    let operations = parsed
        .into_iter()
        .enumerate()
        .map(|(index, parsed)| {
            parsed
                .into_operation(&common, session.as_ref(), &body)
                .map_err(|mut problem| {
                    problem.message = format!("operation {index}: {}", problem.message);
                    problem
                })
        })
        .collect::<Result<Vec<_>, Problem>>()?;
    let keys: Vec<Bytes> = match &session {
        Some(_) => operations.iter().map(|of| of.key().clone()).collect(),
        None => Vec::new(),
    };
    let outcomes = service.node.batch(BatchRequest { operations }).await?;
    let mut response = Response::json(200, results(&outcomes));
    response.session = session.as_mut().map(|session| {
        for (key, outcome) in keys.iter().zip(&outcomes) {
            match outcome {
                Outcome::Got(Ok(got)) => session.note(&common.keyspace, key, &got.context),
                Outcome::Written(Ok(written)) => {
                    session.note(&common.keyspace, key, &written.context);
                }
                Outcome::Got(Err(_)) | Outcome::Written(Err(_)) => {}
            }
        }
        session.to_token()
    });
    Ok(response)
}

/// What holds for every operation of a batch.
struct Common {
    keyspace: Bytes,
    r: Level,
    w: Level,
    sloppy: bool,
    deadline: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Get,
    Put,
    Delete,
}

/// One operation, its strings still in the body.
struct ParsedOperation {
    kind: Kind,
    key: Text,
    fields: Fields,
}

fn read_operations(root: Node<'_, '_>) -> Result<Vec<ParsedOperation>, JsonError> {
    let mut operations = None;
    for (name, node) in root.members("the body")? {
        if name == "operations" {
            operations = Some(node);
        }
    }
    let operations = operations.ok_or_else(|| JsonError("the body has no operations".into()))?;
    let mut parsed = Vec::new();
    for node in operations.elements("operations")? {
        if parsed.len() == BATCH_OPERATIONS_MAX {
            return Err(JsonError(format!(
                "a batch has at most {BATCH_OPERATIONS_MAX} operations"
            )));
        }
        parsed.push(read_operation(node)?);
    }
    Ok(parsed)
}

fn read_operation(node: Node<'_, '_>) -> Result<ParsedOperation, JsonError> {
    let (mut kind, mut key, mut value) = (None, None, None);
    let mut encoding = Encoding::Utf8;
    let mut fields = Fields::default();
    for (name, node) in node.members("an operation")? {
        match name {
            "op" => {
                kind = Some(match node.string("op")? {
                    "get" => Kind::Get,
                    "put" => Kind::Put,
                    "delete" => Kind::Delete,
                    _ => return Err(JsonError("op must be get, put or delete".into())),
                });
            }
            "key" => key = Some(read_key(node)?),
            "value" => value = Some(node),
            "encoding" => encoding = Encoding::read(node)?,
            name => fields.note(name, node)?,
        }
    }
    fields.value = value.map(|node| node.text("value", encoding)).transpose()?;
    let missing = |what| JsonError(format!("an operation has no {what}"));
    Ok(ParsedOperation {
        kind: kind.ok_or_else(|| missing("op"))?,
        key: key.ok_or_else(|| missing("key"))?,
        fields,
    })
}

/// A key: a string, or the object that a scan gives for a key that is no text.
fn read_key(node: Node<'_, '_>) -> Result<Text, JsonError> {
    if !node.is_object() {
        return node.text("key", Encoding::Utf8);
    }
    let (mut key, mut encoding) = (None, Encoding::Utf8);
    for (name, node) in node.members("key")? {
        match name {
            "key" => key = Some(node),
            "encoding" => encoding = Encoding::read(node)?,
            _ => {}
        }
    }
    let key = key.ok_or_else(|| JsonError("key is an object without a key in it".into()))?;
    key.text("key", encoding)
}

impl ParsedOperation {
    fn into_operation(
        self,
        common: &Common,
        session: Option<&Session>,
        body: &Bytes,
    ) -> Result<Operation, Problem> {
        let keyspace = common.keyspace.clone();
        let key = self.key.into_bytes(body);
        check_key(&key)?;
        let write = WriteOptions {
            context: self.fields.context()?,
            w: common.w,
            sloppy: common.sloppy,
            ..WriteOptions::until(common.deadline)
        };
        Ok(match self.kind {
            Kind::Get => {
                let (r, at_least) = match session {
                    Some(session) => session.read(&keyspace, &key, common.r),
                    None => (common.r, None),
                };
                Operation::Get(GetRequest {
                    keyspace,
                    key,
                    r,
                    at_least,
                    deadline: common.deadline,
                })
            }
            Kind::Put => {
                let value = self.fields.value;
                let value = value.ok_or_else(|| Problem::bad_request("a put has no value"))?;
                if value.byte_count() > VALUE_BYTES_MAX {
                    return Err(Problem::new(
                        413,
                        "too_large",
                        format!("a value has at most {VALUE_BYTES_MAX} bytes"),
                    ));
                }
                Operation::Put(PutRequest {
                    keyspace,
                    key,
                    value: value.into_bytes(body),
                    ttl_seconds: self.fields.ttl_seconds,
                    write,
                })
            }
            Kind::Delete => Operation::Delete(DeleteRequest {
                keyspace,
                key,
                write,
            }),
        })
    }
}

fn results(outcomes: &[Outcome]) -> Vec<u8> {
    let mut body = Vec::with_capacity(32 + 128 * outcomes.len());
    body.extend_from_slice(b"{\"results\":[");
    for (index, outcome) in outcomes.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        body.extend_from_slice(b"{\"status\":");
        match outcome {
            Outcome::Got(Ok(answer)) => {
                let status = match answer.siblings.len() {
                    0 => 404,
                    1 => 200,
                    _ => 300,
                };
                json::write_number(&mut body, status);
                body.push(b',');
                if answer.siblings.is_empty() {
                    body.extend_from_slice(b"\"error\":");
                    Problem::no_such_key().write_object(&mut body);
                    body.push(b',');
                }
                write_got(&mut body, answer, &answer.context.to_opaque(), "encoding");
            }
            Outcome::Written(Ok(written)) => {
                json::write_number(&mut body, 200);
                body.push(b',');
                write_written(&mut body, written, &written.context.to_opaque());
            }
            Outcome::Got(Err(failure)) | Outcome::Written(Err(failure)) => {
                json::write_number(&mut body, u64::from(failure.code.http_status()));
                body.extend_from_slice(b",\"error\":");
                Problem::from(failure.clone()).write_object(&mut body);
            }
        }
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    body
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use torc_cluster::api::{Context, Failure, FailureCode, GetAnswer, Written};

    use super::*;

    fn operations(text: impl AsRef<[u8]>) -> Result<Vec<Operation>, u16> {
        let common = Common {
            keyspace: Bytes::from_static(b"default"),
            r: Level::Quorum,
            w: Level::Quorum,
            sloppy: false,
            deadline: Instant(1),
        };
        let body = BytesMut::from(text.as_ref());
        let (parsed, body) = json::parse(body, read_operations).map_err(|_| 400u16)?;
        parsed
            .into_iter()
            .map(|parsed| {
                parsed
                    .into_operation(&common, None, &body)
                    .map_err(|p| p.status)
            })
            .collect()
    }

    #[test]
    fn operations_come_out_in_order() {
        let found = operations(
            r#"{"operations":[{"op":"get","key":"a"},
                {"key":{"key":"/w==","encoding":"base64"},"op":"put","value":"v","ttl_seconds":5},
                {"op":"delete","key":"c","context":null}]}"#,
        )
        .expect("good");
        assert!(matches!(&found[0], Operation::Get(get) if &get.key[..] == b"a"));
        assert!(matches!(&found[1], Operation::Put(put)
            if put.key[..] == [0xff] && &put.value[..] == b"v" && put.ttl_seconds == Some(5)));
        assert!(matches!(&found[2], Operation::Delete(delete) if &delete.key[..] == b"c"));
    }

    #[test]
    fn one_bad_operation_refuses_the_batch_before_anything_is_done() {
        for text in [
            "{}",
            "[]",
            r#"{"operations":{}}"#,
            r#"{"operations":[1]}"#,
            r#"{"operations":[{"op":"get"}]}"#,
            r#"{"operations":[{"key":"a"}]}"#,
            r#"{"operations":[{"op":"get","key":""}]}"#,
            r#"{"operations":[{"op":"get","key":1}]}"#,
            r#"{"operations":[{"op":"put","key":"a"}]}"#,
            r#"{"operations":[{"op":"get","key":"a"},{"op":"incr","key":"a"}]}"#,
            r#"{"operations":[{"op":"put","key":"a","value":"v","context":"x"}]}"#,
        ] {
            assert_eq!(operations(text).err(), Some(400), "{text}");
        }
        let many = r#"{"op":"get","key":"a"},"#.repeat(BATCH_OPERATIONS_MAX + 1);
        let many = format!("{{\"operations\":[{}]}}", many.trim_end_matches(','));
        assert_eq!(operations(&many).err(), Some(400));
    }

    #[test]
    fn no_bytes_make_a_batch_panic() {
        let valid = [
            r#"{"operations":[{"op":"get","key":"a"},{"op":"delete","key":"c","context":null}]}"#,
            r#"{"operations":[{"op":"put","key":{"key":"/w==","encoding":"base64"},"value":"v\n",
                "encoding":"utf8","ttl_seconds":5,"context":{"context":"x"}}],"more":[[[true]]]}"#,
        ];
        let valid = valid.map(|text| text.as_bytes().to_vec());
        crate::fuzz::parser("JSON body of a batch", &valid).fuzz(|bytes| drop(operations(bytes)));
    }

    #[test]
    fn every_outcome_has_its_status() {
        let outcomes = [
            Outcome::Got(Ok(GetAnswer {
                siblings: Vec::new(),
                context: Context::default(),
            })),
            Outcome::Written(Ok(Written {
                context: Context::default(),
                replicas: 2,
                hints: 0,
            })),
            Outcome::Written(Err(Failure::refused(FailureCode::DiskFull, "no space"))),
        ];
        let body: serde_json::Value =
            serde_json::from_slice(&results(&outcomes)).expect("valid JSON");
        assert_eq!(body["results"][0]["status"], 404);
        assert_eq!(body["results"][0]["error"]["code"], "not_found");
        assert_eq!(body["results"][1]["acks"]["replicas"], 2);
        assert_eq!(body["results"][2]["status"], 507);
        assert_eq!(body["results"][2]["error"]["retryable"], true);
    }
}
