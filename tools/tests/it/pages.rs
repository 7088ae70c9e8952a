//! As much of Torc's HTTP interface as scans need, in memory: a store whose pages can be wrong.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use base64::Engine as _;

use crate::cluster::serving;

/// What a page has that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The first value that each key had.
    Old,
    /// The value of another key.
    Exchanged,
    /// A byte that was not written.
    Damaged,
    /// A key that is there already.
    Twice,
}

/// The first value and the newest one.
type Values = Arc<Mutex<BTreeMap<String, [Vec<u8>; 2]>>>;

/// Starts one, which serves until the tests end.
pub fn start(fault: Fault) -> String {
    let values = Values::default();
    serving(move |stream| {
        // A client that leaves is no failure.
        serve(&stream, &values, fault).ok();
    })
}

fn serve(stream: &TcpStream, values: &Values, fault: Fault) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let mut output = stream;
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if input.read_until(b'\n', &mut head)? == 0 {
                return Ok(());
            }
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.split("Content-Length: ").nth(1).map_or(0, |rest| {
            rest.split("\r\n").next().unwrap().parse().unwrap()
        });
        let mut body = vec![0; length];
        input.read_exact(&mut body)?;
        let path = head.split(['?', ' ']).nth(1).unwrap();
        let key = path.strip_prefix("/v1/keys/");
        let mut values = values.lock().unwrap();
        let (status, body) = match key {
            None => ("200 OK", page(&values, fault).into_bytes()),
            Some(key) if head.starts_with("PUT") => {
                let both = values.entry(key.to_owned());
                both.or_insert_with(|| [body.clone(), Vec::new()])[1].clone_from(&body);
                ("204 No Content", Vec::new())
            }
            Some(key) => match values.get(key) {
                Some([_, newest]) => ("200 OK", newest.clone()),
                None => ("404 Not Found", Vec::new()),
            },
        };
        drop(values);
        let head = format!(
            "HTTP/1.1 {status}\r\nX-Torc-Version: v\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        output.write_all(&[head.as_bytes(), &body].concat())?;
    }
}

/// A page of all keys.
fn page(values: &BTreeMap<String, [Vec<u8>; 2]>, fault: Fault) -> String {
    let mut listed: Vec<(&String, Vec<u8>)> = values
        .iter()
        .map(|(key, [first, newest])| {
            (
                key,
                if fault == Fault::Old { first } else { newest }.clone(),
            )
        })
        .collect();
    match &mut listed[..] {
        [one, other, ..] if fault == Fault::Exchanged => std::mem::swap(&mut one.1, &mut other.1),
        [one, ..] if fault == Fault::Damaged => *one.1.last_mut().unwrap() ^= 1,
        [_, .., last] if fault == Fault::Twice => {
            let last = last.clone();
            listed.push(last);
        }
        _ => {}
    }
    let encoded = |value| base64::engine::general_purpose::STANDARD.encode(value);
    let entries: Vec<String> = listed
        .iter()
        .map(|(key, value)| {
            let value = encoded(value);
            format!(r#"{{"key":"{key}","value":"{value}","value_encoding":"base64"}}"#)
        })
        .collect();
    format!(r#"{{"keys":[{}],"cursor":null}}"#, entries.join(","))
}
