//! A node to talk to, and the least of an HTTP client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use torc_net::{Addresses, Server, ServerConfig};
use torc_runtime::Background;

/// How long anything may take before a test gives up: generous, because nothing is asserted about time.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A node that runs until it is dropped.
pub struct Node {
    server: Option<Server>,
    pub addresses: Addresses,
    pub dir: TempDir,
}

impl Node {
    /// A cluster of one node with two shards, in the ring.
    pub fn start() -> Node {
        Node::start_in(tempfile::tempdir().unwrap())
    }

    /// As [`Node::start`], in a directory that may have been used before.
    pub fn start_in(dir: TempDir) -> Node {
        let settings = config(&dir);
        Node::start_with(dir, settings)
    }

    /// As [`Node::start_in`], with settings of its own.
    pub fn start_with(dir: TempDir, settings: ServerConfig) -> Node {
        let server = Server::start(settings).unwrap();
        let node = Node {
            addresses: server.addresses(),
            server: Some(server),
            dir,
        };
        node.wait_until_ready();
        node
    }

    pub fn wait_until_ready(&self) {
        let until = Instant::now() + PATIENCE;
        while self.http("GET", "/ready", &[], b"").status != 200 {
            assert!(Instant::now() < until, "the node does not become ready");
            std::thread::yield_now();
        }
    }

    /// One request on a connection of its own.
    pub fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        Http::connect(self.addresses.http).request(method, path, headers, body)
    }

    pub fn is_running(&self) -> bool {
        self.server.as_ref().is_some_and(Server::is_running)
    }

    /// Drains and stops the node; the directory stays.
    pub fn stop(mut self) -> TempDir {
        let server = self.server.take().unwrap();
        assert!(server.stop(), "the node drains in time");
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// Settings of a small node in `dir`.
pub fn config(dir: &TempDir) -> ServerConfig {
    let mut config = ServerConfig::standalone(dir.path());
    config.shards.count = 2;
    config.shards.background = Background::Shard;
    config.cluster.gossip_interval = Duration::from_millis(50);
    config.memory.memtable_bytes = 8 << 20;
    config.memory.cache_bytes = 8 << 20;
    config
}

/// An HTTP connection.
pub struct Http {
    stream: BufReader<TcpStream>,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(other, _)| other.eq_ignore_ascii_case(name))
            .map(|(_, value)| &**value)
    }

    /// The opaque version that every successful answer carries.
    pub fn version(&self) -> String {
        self.header("X-Torc-Version").unwrap().to_owned()
    }

    /// The error object.
    pub fn error(&self) -> serde_json::Value {
        self.json()["error"].clone()
    }
}

impl Http {
    pub fn connect(address: SocketAddr) -> Http {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Http {
            stream: BufReader::new(stream),
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Answer {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: torc\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() || matches!(method, "PUT" | "POST") {
            request += &format!("Content-Length: {}\r\n", body.len());
        }
        request += "\r\n";
        let mut bytes = request.into_bytes();
        bytes.extend_from_slice(body);
        self.send(&bytes);
        self.answer(method == "HEAD")
    }

    /// Reads one answer.
    pub fn answer(&mut self, head_only: bool) -> Answer {
        let line = self.line();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        let mut headers = Vec::new();
        let mut length = 0;
        loop {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(": ").unwrap();
            if name == "Content-Length" {
                length = value.parse().unwrap();
            }
            headers.push((name.to_owned(), value.to_owned()));
        }
        let mut body = vec![0; if head_only { 0 } else { length }];
        self.stream.read_exact(&mut body).unwrap();
        Answer {
            status,
            headers,
            body,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).unwrap();
        assert!(read > 0, "the server closed the connection");
        line.trim_end_matches("\r\n").to_owned()
    }

    /// Whether the server has closed the connection, and nothing came before that.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset is an end as well.
        match self.stream.read_to_end(&mut rest) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
