//! The HTTP part of the interface contract, line by line.

use serde_json::{Value, json};

use crate::support::{Http, Node};

const JSON: (&str, &str) = ("Content-Type", "application/json");
const RAW: (&str, &str) = ("Content-Type", "application/octet-stream");
const ACCEPT_RAW: (&str, &str) = ("Accept", "application/octet-stream");

fn put(node: &Node, path: &str, body: &Value) -> crate::support::Answer {
    node.http("PUT", path, &[JSON], body.to_string().as_bytes())
}

#[test]
fn a_value_comes_back_with_its_version_in_every_form() {
    let node = Node::start();
    let absent = node.http("GET", "/v1/keys/greeting", &[], b"");
    assert_eq!(absent.status, 404);
    assert_eq!(absent.error()["code"], "not_found");

    let written = put(&node, "/v1/keys/greeting", &json!({"value": "hello"}));
    assert_eq!(written.status, 200);
    let body = written.json();
    assert_eq!(body["version"]["context"], json!(written.version()));
    assert_eq!(body["version"]["clock"].as_object().unwrap().len(), 1);
    assert_eq!(body["acks"], json!({"replicas": 1, "hints": 0}));

    let read = node.http("GET", "/v1/keys/greeting", &[], b"");
    assert_eq!(read.status, 200);
    assert_eq!(read.json()["value"], "hello");
    assert_eq!(read.json().get("encoding"), None);
    assert_eq!(read.json()["version"]["context"], json!(read.version()));
    assert_eq!(read.json().get("siblings"), None);

    let raw = node.http("GET", "/v1/keys/greeting", &[ACCEPT_RAW], b"");
    assert_eq!((raw.status, &raw.body[..]), (200, &b"hello"[..]));
    assert_eq!(raw.header("Content-Type"), Some("application/octet-stream"));
    assert_eq!(raw.version(), read.version());

    let head = node.http("HEAD", "/v1/keys/greeting", &[], b"");
    assert_eq!(head.status, 200);
    assert_eq!(
        head.header("Content-Length"),
        Some(&*read.body.len().to_string())
    );
}

#[test]
fn values_that_are_no_text_travel_in_base64_and_raw() {
    let node = Node::start();
    let written = put(
        &node,
        "/v1/keys/bin",
        &json!({"value": "/wA=", "encoding": "base64"}),
    );
    assert_eq!(written.status, 200);
    let read = node.http("GET", "/v1/keys/bin", &[], b"").json();
    assert_eq!(
        (&read["value"], &read["encoding"]),
        (&json!("/wA="), &json!("base64"))
    );
    let minimal = [RAW, ("Prefer", "return=minimal")];
    let written = node.http("PUT", "/v1/keys/raw", &minimal, &[0xfe, 1]);
    assert_eq!((written.status, written.body.len()), (204, 0));
    assert!(!written.version().is_empty());
    let read = node.http("GET", "/v1/keys/raw", &[ACCEPT_RAW], b"");
    assert_eq!(read.body, [0xfe, 1]);
    let empty = node.http("PUT", "/v1/keys/empty", &[RAW], b"");
    assert_eq!(empty.status, 200);
    let read = node.http("GET", "/v1/keys/empty", &[], b"");
    assert_eq!(read.json()["value"], "");
}

#[test]
fn sizes_are_those_of_decoded_bytes() {
    let node = Node::start();
    let largest = vec![b'x'; 1 << 20];
    assert_eq!(node.http("PUT", "/v1/keys/a", &[RAW], &largest).status, 200);
    let read = node.http("GET", "/v1/keys/a", &[ACCEPT_RAW], b"");
    assert_eq!(read.body, largest);
    // Six bytes of JSON for each byte of the value.
    let escaped = format!("{{\"value\":\"{}\"}}", "\\u0001".repeat(1 << 20));
    let written = node.http("PUT", "/v1/keys/b", &[JSON], escaped.as_bytes());
    assert_eq!(written.status, 200);
    let mut larger = largest;
    larger.push(b'x');
    let mut connection = Http::connect(node.addresses.http);
    let refused = connection.request("PUT", "/v1/keys/a", &[RAW], &larger);
    assert_eq!(refused.status, 413);
    assert_eq!(refused.error()["retryable"], false);
    // The connection goes on.
    assert_eq!(connection.request("GET", "/health", &[], b"").status, 200);
    let far_larger = vec![b'x'; 8 << 20];
    assert_eq!(
        node.http("PUT", "/v1/keys/a", &[RAW], &far_larger).status,
        413
    );
}

#[test]
fn keys_are_bytes_and_paths_are_not_normalised() {
    let node = Node::start();
    for path in [
        "/v1/keys/.",
        "/v1/keys/..",
        "/v1/keys/a%2Fb",
        "/v1/keys/a+b",
        "/v1/keys/%00%ff",
        "/v1/keyspaces/default/keys/x",
    ] {
        assert_eq!(
            put(&node, path, &json!({"value": path})).status,
            200,
            "{path}"
        );
    }
    for path in [
        "/v1/keys/%2E",
        "/v1/keys/%2e%2E",
        "/v1/keys/a%2fb",
        "/v1/keys/a%2Bb",
    ] {
        assert_eq!(node.http("GET", path, &[], b"").status, 200, "{path}");
    }
    let same = node.http("GET", "/v1/keys/x", &[], b"");
    assert_eq!(same.json()["value"], "/v1/keyspaces/default/keys/x");
    assert_eq!(node.http("GET", "/v1/keys/a%20b", &[], b"").status, 404);
    for path in ["/v1/keys/%", "/v1/keys/%zz", "/v1/keys/"] {
        assert_eq!(put(&node, path, &json!({"value": 1})).status, 400, "{path}");
    }
    let long = format!("/v1/keys/{}", "k".repeat(1024));
    assert_eq!(put(&node, &long, &json!({"value": "v"})).status, 200);
    assert_eq!(
        put(&node, &(long + "k"), &json!({"value": "v"})).status,
        400
    );
    let nowhere = node.http("GET", "/v1/keyspaces/none/keys/a", &[], b"");
    assert_eq!(
        (nowhere.status, &nowhere.error()["code"]),
        (404, &json!("unknown_keyspace"))
    );
}

#[test]
fn writes_without_a_context_leave_siblings_and_one_with_it_resolves_them() {
    let node = Node::start();
    let first = put(&node, "/v1/keys/s", &json!({"value": "one"}));
    put(
        &node,
        "/v1/keys/s",
        &json!({"value": "/w==", "encoding": "base64"}),
    );
    let read = node.http("GET", "/v1/keys/s", &[], b"");
    assert_eq!(read.status, 300);
    let body = read.json();
    let siblings = body["siblings"].as_array().unwrap();
    assert_eq!(siblings.len(), 2);
    assert_eq!(siblings[0]["value"], body["value"]);
    assert!(siblings.contains(&json!({"value": "one"})));
    assert!(siblings.contains(&json!({"value": "/w==", "encoding": "base64"})));
    let raw = node.http("GET", "/v1/keys/s", &[ACCEPT_RAW], b"");
    assert_eq!((raw.status, raw.json()), (300, body.clone()));

    // The context of one of them replaces that one only.
    let written = put(
        &node,
        "/v1/keys/s",
        &json!({"value": "two", "context": first.json()["version"]}),
    );
    assert_eq!(written.status, 200);
    let read = node.http("GET", "/v1/keys/s", &[], b"");
    assert_eq!(read.status, 300);
    let values = read.json()["siblings"].to_string();
    assert!(
        values.contains("two") && !values.contains("one"),
        "{values}"
    );

    let written = put(
        &node,
        "/v1/keys/s",
        &json!({"value": "three", "context": read.version()}),
    );
    assert_eq!(written.status, 200);
    let read = node.http("GET", "/v1/keys/s", &[], b"");
    assert_eq!((read.status, &read.json()["value"]), (200, &json!("three")));

    let raw = [RAW, ("X-Torc-Context", &*read.version())];
    assert_eq!(node.http("PUT", "/v1/keys/s", &raw, b"four").status, 200);
    let read = node.http("GET", "/v1/keys/s", &[ACCEPT_RAW], b"");
    assert_eq!((read.status, &read.body[..]), (200, &b"four"[..]));
}

#[test]
fn a_delete_is_204_and_removes_what_its_context_has_seen() {
    let node = Node::start();
    assert_eq!(node.http("DELETE", "/v1/keys/d", &[], b"").status, 204);
    put(&node, "/v1/keys/d", &json!({"value": "v"}));
    let blind = node.http("DELETE", "/v1/keys/d", &[], b"");
    assert_eq!((blind.status, blind.body.len()), (204, 0));
    assert!(!blind.version().is_empty());
    let read = node.http("GET", "/v1/keys/d", &[], b"");
    assert_eq!(
        read.status, 200,
        "a delete that has seen nothing removes nothing"
    );
    let seen = [("X-Torc-Context", &*read.version())];
    assert_eq!(node.http("DELETE", "/v1/keys/d", &seen, b"").status, 204);
    let gone = node.http("GET", "/v1/keys/d", &[], b"");
    assert_eq!(gone.status, 404);
    assert!(
        gone.header("X-Torc-Version").is_some(),
        "a deleted key has a version"
    );
}

#[test]
fn conditions_hold_or_the_attempt_does_nothing() {
    let node = Node::start();
    let absent = [JSON, ("If-None-Match", "*")];
    let body = br#"{"value":"first"}"#;
    let created = node.http("PUT", "/v1/keys/c", &absent, body);
    assert_eq!(created.status, 200);
    let again = node.http("PUT", "/v1/keys/c", &absent, body);
    assert_eq!(again.status, 412);
    assert_eq!(again.error()["retryable"], false);
    assert_eq!(again.error()["in_doubt"], false);

    let version = created.version();
    let quoted = format!("\"{version}\"");
    let matched = [JSON, ("If-Match", &*quoted)];
    let second = node.http("PUT", "/v1/keys/c", &matched, br#"{"value":"second"}"#);
    assert_eq!(second.status, 200);
    let stale = node.http("PUT", "/v1/keys/c", &matched, br#"{"value":"third"}"#);
    assert_eq!(stale.status, 412);
    let read = node.http("GET", "/v1/keys/c", &[], b"");
    assert_eq!(
        (read.status, &read.json()["value"]),
        (200, &json!("second"))
    );

    let delete = [("If-Match", &*read.version())];
    assert_eq!(node.http("DELETE", "/v1/keys/c", &delete, b"").status, 204);
    let deleted = node.http("GET", "/v1/keys/c", &[], b"");
    let on_deleted = [JSON, ("If-Match", &*deleted.version())];
    assert_eq!(
        node.http("PUT", "/v1/keys/c", &on_deleted, body).status,
        412
    );
    assert_eq!(node.http("PUT", "/v1/keys/c", &absent, body).status, 200);
    let read = node.http("GET", "/v1/keys/c", &[], b"");
    assert_eq!(
        read.status, 200,
        "the write carries the context that was checked"
    );

    for headers in [
        vec![JSON, ("If-Match", "nonsense")],
        vec![JSON, ("If-Match", "")],
        vec![JSON, ("If-None-Match", "abc")],
        vec![JSON, ("If-None-Match", "*"), ("If-Match", &*version)],
        vec![JSON, ("If-Match", &*version), ("If-Match", &*version)],
        vec![JSON, ("X-Torc-Context", "AAAA")],
    ] {
        let refused = node.http("PUT", "/v1/keys/c", &headers, body);
        assert_eq!(refused.status, 400, "{headers:?}");
        assert_eq!(refused.error()["retryable"], false);
    }
    let sloppy = node.http(
        "PUT",
        "/v1/keys/c?sloppy=true",
        &[JSON, ("If-Match", &*version)],
        body,
    );
    assert_eq!(sloppy.status, 400);
}

#[test]
fn a_tampered_context_is_refused() {
    let node = Node::start();
    let version = put(&node, "/v1/keys/t", &json!({"value": "v"})).version();
    for at in 0..version.len() {
        let mut changed = version.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        let refused = put(
            &node,
            "/v1/keys/t",
            &json!({"value": "w", "context": changed}),
        );
        assert_eq!(refused.status, 400, "byte {at}");
    }
}

#[test]
fn a_retry_with_the_same_idempotency_key_gets_the_first_answer() {
    let node = Node::start();
    let headers = [JSON, ("Idempotency-Key", "order-7")];
    let body = br#"{"value":"once"}"#;
    let first = node.http("PUT", "/v1/keys/i", &headers, body);
    let replay = node.http("PUT", "/v1/keys/i", &headers, body);
    assert_eq!((first.status, replay.status), (200, 200));
    assert_eq!(first.json()["version"], replay.json()["version"]);
    let read = node.http("GET", "/v1/keys/i", &[], b"");
    assert_eq!((read.status, &read.json()["value"]), (200, &json!("once")));
    let other = node.http("PUT", "/v1/keys/i", &headers, br#"{"value":"twice"}"#);
    assert_eq!(other.status, 422);
    assert_eq!(other.error()["retryable"], false);
    let blank = [JSON, ("Idempotency-Key", "")];
    assert_eq!(node.http("PUT", "/v1/keys/i", &blank, body).status, 400);
}

#[test]
fn parameters_out_of_range_or_blank_are_refused() {
    let node = Node::start();
    let body = br#"{"value":"v"}"#;
    for query in [
        "r=",
        "w=",
        "w=0",
        "w=x",
        "w=2",
        "r=2",
        "sloppy=",
        "sloppy=yes",
        "timeout_ms=",
        "timeout_ms=0",
        "timeout_ms=60001",
        "w=1&w=1",
    ] {
        let path = format!("/v1/keys/q?{query}");
        let method = if query.starts_with('r') { "GET" } else { "PUT" };
        let refused = node.http(method, &path, &[JSON], body);
        assert_eq!(refused.status, 400, "{query}");
        assert_eq!(refused.error()["retryable"], false, "{query}");
    }
    for query in [
        "w=1",
        "w=one",
        "w=all",
        "w=quorum",
        "w=local_quorum",
        "timeout_ms=60000",
    ] {
        let path = format!("/v1/keys/q?{query}");
        let written = node.http("PUT", &path, &[JSON], body);
        assert_eq!(written.status, 200, "{query}");
    }
    for query in [
        "limit=",
        "limit=0",
        "limit=10001",
        "cursor=nonsense",
        "values=",
        "values=1",
    ] {
        let refused = node.http("GET", &format!("/v1/keys?{query}"), &[], b"");
        assert_eq!(refused.status, 400, "{query}");
    }
    for ttl in ["ttl_seconds=", "ttl_seconds=0", "ttl_seconds=-1"] {
        let refused = node.http("PUT", &format!("/v1/keys/q?{ttl}"), &[RAW], b"v");
        assert_eq!(refused.status, 400, "{ttl}");
    }
    let long = node.http("PUT", "/v1/keys/ttl?ttl_seconds=3600", &[RAW], b"v");
    assert_eq!(long.status, 200);
    assert_eq!(node.http("GET", "/v1/keys/ttl", &[], b"").status, 200);
}

#[test]
fn a_scan_lists_every_key_once_in_pages() {
    let node = Node::start();
    let mut connection = Http::connect(node.addresses.http);
    for index in 0..57 {
        let path = format!("/v1/keys/user%2F{index}");
        assert_eq!(connection.request("PUT", &path, &[RAW], b"v").status, 200);
    }
    connection.request("PUT", "/v1/keys/%ff", &[RAW], b"\xfe");
    connection.request("PUT", "/v1/keys/other", &[RAW], b"w");
    let mut found = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let at = cursor
            .map(|cursor| format!("&cursor={cursor}"))
            .unwrap_or_default();
        let page = connection.request("GET", &format!("/v1/keys?limit=10{at}"), &[], b"");
        assert_eq!(page.status, 200);
        let page = page.json();
        let keys = page["keys"].as_array().unwrap();
        assert!(keys.len() <= 10);
        found.extend(keys.iter().cloned());
        match &page["cursor"] {
            Value::Null => break,
            next => cursor = Some(next.as_str().unwrap().to_owned()),
        }
    }
    assert_eq!(found.len(), 59);
    assert!(found.contains(&json!({"key": "/w==", "encoding": "base64"})));
    assert!((0..57).all(|index| found.contains(&json!(format!("user/{index}")))));

    let page = connection.request("GET", "/v1/keys?prefix=oth&values=true", &[], b"");
    let page = page.json();
    assert_eq!(page["keys"].as_array().unwrap().len(), 1, "{page}");
    assert_eq!(page["keys"][0]["key"], "other");
    assert_eq!(page["keys"][0]["value"], "w");
}

#[test]
fn a_batch_answers_each_operation() {
    let node = Node::start();
    let batch = json!({"operations": [
        {"op": "put", "key": "a", "value": "1"},
        {"op": "put", "key": "b", "value": "/w==", "encoding": "base64", "ttl_seconds": 60},
        {"op": "get", "key": "nothing"},
        {"op": "delete", "key": "c"},
    ]});
    let answer = node.http("POST", "/v1/batch", &[JSON], batch.to_string().as_bytes());
    assert_eq!(answer.status, 200);
    let results = answer.json()["results"].as_array().unwrap().clone();
    let statuses: Vec<_> = results
        .iter()
        .map(|r| r["status"].as_u64().unwrap())
        .collect();
    assert_eq!(statuses, [200, 200, 404, 200]);
    let batch = json!({"operations": [{"op": "get", "key": "a"}, {"op": "get", "key": "b"}]});
    let answer = node.http("POST", "/v1/batch", &[JSON], batch.to_string().as_bytes());
    let results = answer.json()["results"].clone();
    assert_eq!(results[0]["value"], "1");
    assert_eq!(results[1]["encoding"], "base64");
    assert_eq!(node.http("GET", "/v1/batch", &[], b"").status, 405);
}

#[test]
fn a_session_is_given_back_with_every_answer() {
    let node = Node::start();
    let start = [JSON, ("X-Torc-Session", "")];
    let written = node.http("PUT", "/v1/keys/x", &start, br#"{"value":"v"}"#);
    let token = written.header("X-Torc-Session").unwrap().to_owned();
    let read = node.http("GET", "/v1/keys/x?r=1", &[("X-Torc-Session", &*token)], b"");
    assert_eq!(read.status, 200);
    assert!(read.header("X-Torc-Session").is_some());
    let refused = node.http("GET", "/v1/keys/x", &[("X-Torc-Session", "junk")], b"");
    assert_eq!(refused.status, 400);
    assert_eq!(
        node.http("GET", "/v1/keys/x", &[], b"")
            .header("X-Torc-Session"),
        None
    );
}

#[test]
fn a_pipeline_is_answered_in_order_and_sees_its_own_writes() {
    let node = Node::start();
    let mut connection = Http::connect(node.addresses.http);
    let mut bytes = Vec::new();
    for index in 0..200 {
        bytes.extend_from_slice(
            format!(
                "PUT /v1/keys/p?w=1 HTTP/1.1\r\nContent-Type: application/octet-stream\r\n\
                 Content-Length: 3\r\n\r\n{index:03}GET /v1/keys/p{index} HTTP/1.1\r\n\r\n"
            )
            .as_bytes(),
        );
    }
    bytes.extend_from_slice(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\nGET /health");
    connection.send(&bytes);
    for _ in 0..200 {
        // Each put without a context is one more sibling, up to the cap.
        assert!(matches!(connection.answer(false).status, 200 | 409));
        assert_eq!(connection.answer(false).status, 404);
    }
    assert_eq!(connection.answer(false).status, 200);
    assert!(connection.is_closed());
}

#[test]
fn a_client_that_waits_for_permission_to_send_gets_it() {
    let node = Node::start();
    let mut connection = Http::connect(node.addresses.http);
    connection.send(
        b"PUT /v1/keys/e HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\
          Content-Type: application/json\r\n\r\n",
    );
    assert_eq!(connection.answer(false).status, 100);
    connection.send(br#"{"value":"v"}"#);
    assert_eq!(connection.answer(false).status, 200);
}

#[test]
fn what_is_no_http_is_told_so_and_the_connection_ends() {
    let node = Node::start();
    for bytes in [
        &b"nonsense\r\n\r\n"[..],
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"PUT /v1/keys/a HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    ] {
        let mut connection = Http::connect(node.addresses.http);
        connection.send(bytes);
        let answer = connection.answer(false);
        assert!(matches!(answer.status, 400 | 413));
        assert_eq!(answer.header("Connection"), Some("close"));
        assert!(connection.is_closed());
    }
    assert_eq!(node.http("GET", "/nowhere", &[], b"").status, 404);
    let wrong = node.http("POST", "/v1/keys/a", &[], b"");
    assert_eq!(wrong.status, 405);
    assert_eq!(wrong.header("Allow"), Some("GET, HEAD, PUT, DELETE"));
}

#[test]
fn what_is_no_http_behind_a_request_under_way_ends_only_its_connection() {
    let node = Node::start();
    for _ in 0..20 {
        let mut connection = Http::connect(node.addresses.http);
        connection.send(b"GET /v1/keys/a HTTP/1.1\r\n\r\nnonsense\r\n\r\n");
        assert_eq!(connection.answer(false).status, 404);
        let refused = connection.answer(false);
        assert_eq!(
            (refused.status, refused.header("Connection")),
            (400, Some("close"))
        );
        assert!(connection.is_closed());
    }
    assert_eq!(node.http("GET", "/health", &[], b"").status, 200);
}

#[test]
fn what_would_be_missed_in_silence_is_refused() {
    let node = Node::start();
    let status = |method, path, headers: &[(&str, &str)], body: &[u8]| {
        let answer = node.http(method, path, headers, body);
        (answer.status, String::from_utf8(answer.body).unwrap())
    };
    let refused = [
        status("PUT", "/v1/keys/a", &[JSON], br#"{"value":"x","ttl":1}"#),
        status(
            "PUT",
            "/v1/keys/a?ttl_seconds=1",
            &[JSON],
            br#"{"value":"x"}"#,
        ),
        status("DELETE", "/v1/keys/a", &[JSON], br#"{"context":"x"}"#),
        status(
            "POST",
            "/v1/batch",
            &[JSON],
            br#"{"operations":[{"op":"put","key":"a","value":"x","if_match":"z"}]}"#,
        ),
        status(
            "POST",
            "/v1/batch",
            &[JSON, ("Idempotency-Key", "z")],
            br#"{"operations":[]}"#,
        ),
        status(
            "POST",
            "/v1/batch",
            &[JSON, ("X-Torc-Session", "junk")],
            br#"{"operations":[]}"#,
        ),
        status("GET", "/v1/keys", &[("X-Torc-Session", "")], b""),
        status("GET", "/v1/keys", &[("If-Match", "x")], b""),
    ];
    for (index, (status, body)) in refused.iter().enumerate() {
        assert_eq!(*status, 400, "{index}: {body}");
    }
    assert_eq!(node.http("GET", "/v1/keys/a", &[], b"").status, 404);
}

#[test]
fn a_batch_reads_what_its_session_has_written() {
    let node = Node::start();
    let start = [JSON, ("X-Torc-Session", "")];
    let put = br#"{"operations":[{"op":"put","key":"a","value":"1"},{"op":"put","key":"b","value":"2"}]}"#;
    let written = node.http("POST", "/v1/batch", &start, put);
    let token = written.header("X-Torc-Session").unwrap().to_owned();
    let session = [JSON, ("X-Torc-Session", &*token)];
    let read = node.http("GET", "/v1/keys/b?r=1", &session[1..], b"");
    assert_eq!(read.json()["value"], "2");
    let get = br#"{"operations":[{"op":"get","key":"a"}]}"#;
    let read = node.http("POST", "/v1/batch?r=1", &session, get);
    assert_eq!(read.json()["results"][0]["value"], "1");
    assert!(read.header("X-Torc-Session").is_some());
}

#[test]
fn the_values_of_a_batch_are_bounded_together() {
    let node = Node::start();
    let raw = [("Content-Type", "application/octet-stream")];
    node.http("PUT", "/v1/keys/large", &raw, &vec![b'x'; 1 << 20]);
    let operations: Vec<Value> = (0..40)
        .map(|_| json!({"op": "get", "key": "large"}))
        .collect();
    let batch = json!({ "operations": operations }).to_string();
    let answer = node.http("POST", "/v1/batch", &[JSON], batch.as_bytes());
    let results = answer.json()["results"].as_array().unwrap().clone();
    let count = |status: u64| results.iter().filter(|of| of["status"] == status).count();
    assert_eq!((count(200), count(413)), (16, 24));
}

#[test]
fn a_page_of_another_host_changes_nothing() {
    let node = Node::start();
    let put = |origin: &str| {
        let headers = [JSON, ("Origin", origin)];
        let answer = node.http("PUT", "/v1/keys/o", &headers, br#"{"value":"x"}"#);
        answer.status
    };
    assert_eq!(put("http://elsewhere.example"), 403);
    assert_eq!(put("null"), 403);
    assert_eq!(node.http("GET", "/v1/keys/o", &[], b"").status, 404);
    // What this client calls the host.
    assert_eq!(put("http://torc"), 200);
}

#[test]
fn a_connection_that_is_open_when_the_node_stops_is_told_to_close() {
    let node = Node::start();
    let mut connection = Http::connect(node.addresses.http);
    connection.send(b"GET /health HTTP/1.1\r\n\r\n");
    assert_eq!(connection.answer(false).header("Connection"), None);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| node.stop());
        loop {
            connection.send(b"GET /ready HTTP/1.1\r\n\r\n");
            let answer = connection.answer(false);
            if answer.header("Connection") == Some("close") {
                assert_eq!(answer.status, 503);
                break;
            }
        }
        assert!(connection.is_closed());
        stopping.join().unwrap();
    });
}

#[test]
fn operators_see_status_ring_metrics_and_keyspaces() {
    let node = Node::start();
    put(&node, "/v1/keys/m", &json!({"value": "v"}));
    assert_eq!(node.http("GET", "/health", &[], b"").status, 200);
    let status = node.http("GET", "/admin/status", &[], b"").json();
    assert_eq!(status["nodes"][0]["name"], "n1");
    assert_eq!(status["nodes"][0]["state"], "up");
    assert_eq!(status["nodes"][0]["shards"], 2);
    let ring = node.http("GET", "/admin/ring?key=m", &[], b"").json();
    assert_eq!(ring["replicas"], json!(["n1"]));
    let ring = node.http("GET", "/admin/ring", &[], b"").json();
    assert!(!ring["ranges"].as_array().unwrap().is_empty());

    let metrics = node.http("GET", "/metrics", &[], b"");
    let metrics = String::from_utf8(metrics.body).unwrap();
    for expected in [
        "torc_corrupt_blocks_total 0",
        "torc_writes_total 1",
        "torc_ready 1",
        "torc_compaction_backlog_bytes{shard=\"1\"} 0",
        "torc_write_amplification{shard=\"0\"} 0",
        "torc_space_amplification{shard=\"0\"} 0",
        "torc_read_amplification{shard=\"0\"} ",
        "torc_request_duration_seconds_count{protocol=\"http\",operation=\"put\"} 1",
    ] {
        assert!(
            metrics.contains(expected),
            "{expected} is missing in\n{metrics}"
        );
    }

    let body = br#"{"n":1,"conflict":"lww"}"#;
    let made = node.http("PUT", "/admin/keyspaces/users", &[JSON], body);
    assert_eq!(made.status, 200, "{made:?}");
    assert_eq!(made.json()["conflict"], "lww");
    let list = node.http("GET", "/admin/keyspaces", &[], b"").json();
    let names: Vec<_> = list["keyspaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| &k["name"])
        .collect();
    assert_eq!(names, ["default", "users"]);
    for _ in 0..2 {
        let written = put(&node, "/v1/keyspaces/users/keys/a", &json!({"value": "v"}));
        assert_eq!(written.status, 200);
    }
    let read = node.http("GET", "/v1/keyspaces/users/keys/a", &[], b"");
    assert_eq!(read.status, 200, "the last write wins");
    let body = br#"{"compaction":"fifo","ttl_default_seconds":60,"tombstone_grace_seconds":5}"#;
    let altered = node.http("PUT", "/admin/keyspaces/users", &[JSON], body);
    assert_eq!(altered.status, 200, "{altered:?}");
    let body = br#"{"compaction":"time_window","compaction_window_seconds":600}"#;
    let altered = node.http("PUT", "/admin/keyspaces/users", &[JSON], body);
    let now = node.http("GET", "/admin/keyspaces/users", &[], b"").json();
    assert_eq!(altered.json(), now);
    let expected = json!({
        "name": "users", "id": 2, "n": 1, "effective_n": 1, "mode": "eventual", "conflict": "lww",
        "ttl_default_seconds": 60, "compaction": "time_window", "compaction_window_seconds": 600,
        "tombstone_grace_seconds": 5,
    });
    assert_eq!(now, expected, "what is not named stays as it was");
    let same = node.http("PUT", "/admin/keyspaces/users", &[JSON], &altered.body);
    assert_eq!(same.json(), now, "an answer can be put back");
    for fixed in ["{\"conflict\":\"siblings\"}", "{\"n\":2}"] {
        let answer = node.http("PUT", "/admin/keyspaces/users", &[JSON], fixed.as_bytes());
        assert_eq!(answer.status, 409, "{fixed}");
        let message = answer.json()["error"]["message"].to_string();
        assert!(message.contains("cannot be altered"), "{message}");
    }
    for bad in [
        "{\"compaction\":\"fifo\",\"ttl_default_seconds\":0}",
        "{\"compaction\":\"hybrid\",\"compaction_window_seconds\":60}",
        "{\"compaction_window_seconds\":59}",
        "{\"compaction\":\"sometimes\"}",
        "{\"n\":0}",
        "{\"n\":300}",
        "{\"mode\":\"x\"}",
        "{\"nn\":1}",
        "{",
    ] {
        let refused = node.http("PUT", "/admin/keyspaces/bad", &[JSON], bad.as_bytes());
        assert_eq!(refused.status, 400, "{bad}");
    }
    let dropped = node.http("DELETE", "/admin/keyspaces/users", &[], b"");
    assert_eq!(dropped.status, 204, "{dropped:?}");
    assert_eq!(
        node.http("GET", "/v1/keyspaces/users/keys/a", &[], b"")
            .status,
        404
    );

    let compacted = node.http("POST", "/admin/compact", &[], b"");
    assert_eq!(compacted.status, 200, "{compacted:?}");
    let scrubbed = node.http("POST", "/admin/scrub", &[], b"");
    assert_eq!(scrubbed.status, 200, "{scrubbed:?}");
    let report = scrubbed.json();
    assert!(report["records"].is_u64(), "{report}");
    assert_eq!(report["damaged"], 0, "{report}");
    assert_eq!(node.http("GET", "/admin/scrub", &[], b"").status, 405);
    for (method, nothing) in [
        ("GET", json!({"damage": [], "waiting": 0})),
        ("POST", json!({"damage": [], "waiting": 0, "accepted": 0})),
    ] {
        assert_eq!(node.http(method, "/admin/damage", &[], b"").json(), nothing);
    }
    assert_eq!(node.http("PUT", "/admin/damage", &[], b"").status, 405);
    assert_eq!(node.http("POST", "/admin/repair", &[], b"").status, 200);
    assert_eq!(
        node.http("POST", "/admin/compact?detach=true", &[], b"")
            .status,
        202
    );
    let page = node.http("GET", "/", &[], b"");
    assert!(
        page.header("Content-Type")
            .unwrap()
            .starts_with("text/html")
    );
}

#[test]
fn snapshots_that_are_asked_for_at_once_are_taken_one_after_the_other() {
    let node = Node::start();
    let taken = std::thread::scope(|scope| {
        let take = || node.http("POST", "/admin/snapshots", &[], b"");
        let asked = [(); 3].map(|()| scope.spawn(take));
        asked.map(|asked| asked.join().unwrap())
    });
    let mut ids = taken.map(|answer| {
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["id"].as_str().unwrap().to_owned()
    });
    ids.sort();
    let listed = node.http("GET", "/admin/snapshots", &[], b"").json();
    let listed = listed["snapshots"].as_array().unwrap().iter();
    let listed: Vec<&str> = listed.map(|one| one["id"].as_str().unwrap()).collect();
    assert_eq!(listed, ids);
    for id in ids {
        let path = format!("/admin/snapshots/{id}");
        assert_eq!(node.http("DELETE", &path, &[], b"").status, 204);
        assert_eq!(node.http("DELETE", &path, &[], b"").status, 404);
    }
}

/// A tool that knows nothing of blobs would leave them out, and call what it has a backup.
#[test]
fn a_snapshot_is_handed_to_those_who_understand_its_version() {
    let node = Node::start();
    let take = |query: &str| node.http("POST", &format!("/admin/snapshots{query}"), &[], b"");
    let plain = take("");
    assert_eq!(plain.json()["version"], 1, "{plain:?}");
    let id = plain.json()["id"].as_str().unwrap().to_owned();
    let drop = |id: &str| node.http("DELETE", &format!("/admin/snapshots/{id}"), &[], b"");
    assert_eq!(drop(&id).status, 204);

    let large = vec![7; 100_000];
    let put = node.http("PUT", "/v1/keys/large", &[RAW], &large);
    assert_eq!(put.status, 200, "{put:?}");
    let refused = take("");
    assert_eq!(refused.status, 409, "{refused:?}");
    assert_eq!(refused.json()["error"]["code"], "snapshot_version");
    let message = refused.json()["error"]["message"].to_string();
    assert!(message.contains("version 2"), "{message}");
    assert!(message.contains("understands up to 1"), "{message}");
    let listed = node.http("GET", "/admin/snapshots", &[], b"").json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 0);

    let taken = take("?reads=2");
    assert_eq!(taken.json()["version"], 2, "{taken:?}");
    let id = taken.json()["id"].as_str().unwrap().to_owned();
    let ask = |reads: &str| {
        let path = format!("/admin/snapshots/{id}{reads}");
        node.http("GET", &path, &[], b"")
    };
    assert_eq!(ask("").status, 409);
    assert_eq!(ask("?reads=2").json(), taken.json());
    assert_eq!(ask("?reads=0").status, 400);

    // What a later build has left.
    let path = node
        .dir
        .path()
        .join("snapshots")
        .join(&id)
        .join("snapshot.json");
    let later = std::fs::read_to_string(&path).unwrap();
    let later = later.replace("\"version\":2", "\"version\":3");
    std::fs::write(&path, later).unwrap();
    let message = ask("?reads=3").json()["error"]["message"].to_string();
    assert!(message.contains("version 3"), "{message}");
    assert!(message.contains("this node's build"), "{message}");
    assert_eq!(drop(&id).status, 204);
}

#[test]
fn a_batch_of_any_keyspace_may_be_large() {
    let node = Node::start();
    let value = "x".repeat(900_000);
    let put = |index| json!({"op": "put", "key": format!("k{index}"), "value": value});
    let batch = json!({"operations": (0..8).map(put).collect::<Vec<_>>()}).to_string();
    for path in ["/v1/batch", "/v1/keyspaces/default/batch"] {
        let answer = node.http("POST", path, &[JSON], batch.as_bytes());
        assert_eq!(answer.status, 200, "{path}");
    }
}
