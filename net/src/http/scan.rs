//! `/v1/keys`: the keys of a keyspace, page by page.

use std::rc::Rc;

use bytes::Bytes;
use torc_cluster::api::{
    GetAnswer, SCAN_LIMIT_DEFAULT, SCAN_LIMIT_MAX, ScanAnswer, ScanEntry, ScanRequest,
};

use crate::http::json;
use crate::http::keys::write_got;
use crate::http::query::Query;
use crate::http::request::{Method, Request};
use crate::http::response::{Problem, Response};
use crate::service::Service;

/// Answers a request for a page of keys.
///
/// # Errors
/// What the client is told instead of a good answer.
pub async fn handle(
    service: Rc<Service>,
    request: Request,
    keyspace: Bytes,
) -> Result<Response, Problem> {
    if !matches!(request.method, Method::Get | Method::Head) {
        return Err(Problem::method_not_allowed("GET, HEAD"));
    }
    let headers = &request.headers;
    let of_one_key = headers.of_one_key();
    if let Some(name) = of_one_key.or(headers.session.as_ref().map(|_| "X-Torc-Session")) {
        return Err(Problem::bad_request(format!(
            "{name} is for requests that name their keys, a scan does not"
        )));
    }
    let query = Query::parse(&request.query)?;
    let limit = query.number("limit", 1, u64::from(SCAN_LIMIT_MAX))?;
    let limit = limit.and_then(|limit| u32::try_from(limit).ok());
    let values = query.boolean("values")?.unwrap_or(false);
    // A blank cursor is where a loop starts that has none yet.
    let cursor = query.bytes("cursor").filter(|cursor| !cursor.is_empty());
    let cursor = cursor.map(|cursor| {
        String::from_utf8(cursor.to_vec()).map_err(|_| {
            Problem::new(
                400,
                "bad_token",
                "the cursor is not one that a scan gave out",
            )
        })
    });
    let answer = service
        .node
        .scan(ScanRequest {
            keyspace,
            cursor: cursor.transpose()?,
            limit: limit.unwrap_or(SCAN_LIMIT_DEFAULT),
            prefix: query.bytes("prefix").cloned().unwrap_or_default(),
            values,
            r: query.level("r")?,
            deadline: service.deadline(query.timeout_ms()?),
        })
        .await?;
    Ok(Response::json(200, page(&answer, values)))
}

fn page(answer: &ScanAnswer, values: bool) -> Vec<u8> {
    let mut body = Vec::with_capacity(64 + 32 * answer.entries.len());
    body.extend_from_slice(b"{\"keys\":[");
    for (index, entry) in answer.entries.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        match std::str::from_utf8(&entry.key) {
            Ok(key) if !values => json::write_string(&mut body, key),
            _ => write_entry(&mut body, entry, values),
        }
    }
    body.extend_from_slice(b"],\"cursor\":");
    match &answer.cursor {
        Some(cursor) => json::write_string(&mut body, cursor),
        None => body.extend_from_slice(b"null"),
    }
    body.push(b'}');
    body
}

/// A key as an object; its `encoding` is the key's, `value_encoding` the value's.
fn write_entry(body: &mut Vec<u8>, entry: &ScanEntry, values: bool) {
    body.push(b'{');
    json::write_bytes_field(body, "key", "encoding", &entry.key);
    if values {
        body.push(b',');
        let version = entry.context.to_opaque();
        let got = GetAnswer {
            siblings: entry.siblings.clone(),
            context: entry.context.clone(),
        };
        write_got(body, &got, &version, "value_encoding");
    }
    body.push(b'}');
}

#[cfg(test)]
mod tests {
    use torc_cluster::api::{Context, Sibling};

    use super::*;

    fn entry(key: &'static [u8], value: &'static [u8]) -> ScanEntry {
        ScanEntry {
            key: Bytes::from_static(key),
            siblings: vec![Sibling {
                value: Bytes::from_static(value),
                expires_at_ms: 0,
            }],
            context: Context::default(),
        }
    }

    #[test]
    fn a_page_lists_keys_as_text_and_says_when_they_are_none() {
        let answer = ScanAnswer {
            entries: vec![entry(b"a\"", b"1"), entry(&[0xff], b"2")],
            cursor: Some("next".into()),
        };
        assert_eq!(
            String::from_utf8(page(&answer, false)).expect("UTF-8"),
            r#"{"keys":["a\"",{"key":"/w==","encoding":"base64"}],"cursor":"next"}"#
        );
        let answer = ScanAnswer {
            entries: Vec::new(),
            cursor: None,
        };
        assert_eq!(page(&answer, true), br#"{"keys":[],"cursor":null}"#);
    }

    #[test]
    fn a_page_with_values_is_json_with_both_encodings_apart() {
        let answer = ScanAnswer {
            entries: vec![entry(&[0xff], &[0xfe])],
            cursor: None,
        };
        let page: serde_json::Value =
            serde_json::from_slice(&page(&answer, true)).expect("valid JSON");
        let key = &page["keys"][0];
        assert_eq!(key["key"], "/w==");
        assert_eq!(key["encoding"], "base64");
        assert_eq!(key["value"], "/g==");
        assert_eq!(key["value_encoding"], "base64");
        assert!(key["version"]["context"].is_string());
    }
}
