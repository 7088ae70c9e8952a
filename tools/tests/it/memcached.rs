//! As much of memcached's meta commands as loads need, in memory, for machines without memcached.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};

use crate::cluster::serving;

type Values = Arc<Mutex<HashMap<Vec<u8>, Vec<u8>>>>;

/// Starts one, which serves until the tests end. A forgetful one acknowledges writes, and then has
/// no value for every seventh of the keys that it is asked for.
pub fn start(forgets: bool) -> String {
    let values = Values::default();
    serving(move |stream| {
        // A client that leaves is no failure.
        serve(&stream, &values, forgets).ok();
    })
}

fn serve(stream: &TcpStream, values: &Values, forgets: bool) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let mut output = stream;
    let mut asked = 0;
    loop {
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&[u8]> = line.trim_ascii_end().split(|byte| *byte == b' ').collect();
        let key = words.get(1).copied().unwrap_or_default().to_vec();
        let answer = match words[0] {
            b"mg" => {
                asked += 1;
                let found = values.lock().unwrap().get(&key).cloned();
                match found.filter(|_| !forgets || asked % 7 != 0) {
                    None => b"EN\r\n".to_vec(),
                    Some(value) => {
                        let head = format!("VA {}\r\n", value.len());
                        [head.as_bytes(), &value, b"\r\n"].concat()
                    }
                }
            }
            b"ms" => {
                let length: usize = std::str::from_utf8(words[2]).unwrap().parse().unwrap();
                let mut value = vec![0; length + 2];
                input.read_exact(&mut value)?;
                value.truncate(length);
                values.lock().unwrap().insert(key, value);
                b"HD\r\n".to_vec()
            }
            b"mn" => b"MN\r\n".to_vec(),
            b"md" => {
                let gone = values.lock().unwrap().remove(&key).is_some();
                if gone {
                    b"HD\r\n".to_vec()
                } else {
                    b"NF\r\n".to_vec()
                }
            }
            _ => b"ERROR\r\n".to_vec(),
        };
        output.write_all(&answer)?;
    }
}
