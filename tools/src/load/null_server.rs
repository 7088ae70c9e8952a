//! A server that does nothing, as fast as it can be done: what a generator can reach at most.
//!
//! One thread, one epoll instance. It speaks as much of RESP, memcached's meta commands and HTTP/1.1
//! as a generator needs, told apart by the first byte of each request: reads find nothing (HTTP: an
//! empty 200), writes are done. It keeps no data.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

/// Bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// Bytes of one request at most; longer ones end their connection.
const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Time after a request in which the next one is polled for. A sleeping server costs its clients the
/// wake-up, which in a virtual machine is an exit to the host for nearly each of their requests.
const POLL_FOR: Duration = Duration::from_micros(200);
/// Number of the listener among the events.
const LISTENER: u64 = u64::MAX;

/// A bound null server.
pub struct NullServer {
    listener: TcpListener,
    work: Duration,
}

struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    output: Vec<u8>,
}

impl NullServer {
    /// Binds; nothing is served yet.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            work: Duration::ZERO,
        })
    }

    /// Makes it compute for so long over each request: a server whose speed is known.
    pub fn working(self, work: Duration) -> Self {
        Self { work, ..self }
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` is set.
    pub fn serve(&self, stop: &AtomicBool) -> io::Result<()> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let number = epoll::EventData::new_u64;
        epoll::add(
            &poll,
            &self.listener,
            number(LISTENER),
            epoll::EventFlags::IN,
        )?;
        let mut clients: Vec<Option<Client>> = Vec::new();
        // Places in it that are empty.
        let mut free = Vec::new();
        let mut scratch = vec![0; READ_BYTES];
        let mut events = Vec::with_capacity(256);
        let mut served = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            events.clear();
            let polls = served.elapsed() < POLL_FOR;
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: if polls { 0 } else { 50_000_000 },
            };
            match epoll::wait(
                &poll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&timeout),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !events.is_empty() {
                served = Instant::now();
            } else if polls {
                // The client may wait for this CPU.
                std::thread::yield_now();
            }
            for event in &events {
                let epoll::Event { data, .. } = *event;
                if data.u64() == LISTENER {
                    while let Ok((stream, _)) = self.listener.accept() {
                        stream.set_nonblocking(true)?;
                        stream.set_nodelay(true)?;
                        let slot = free.pop().unwrap_or_else(|| {
                            clients.push(None);
                            clients.len() - 1
                        });
                        let data = number(u64::try_from(slot).expect("a small number"));
                        epoll::add(&poll, &stream, data, epoll::EventFlags::IN)?;
                        clients[slot] = Some(Client {
                            stream,
                            input: Vec::new(),
                            output: Vec::new(),
                        });
                    }
                    continue;
                }
                let slot = usize::try_from(data.u64()).expect("a small number");
                if let Some(client) = &mut clients[slot]
                    && client.serve(&mut scratch, self.work).is_err()
                {
                    clients[slot] = None;
                    free.push(slot);
                }
            }
        }
        Ok(())
    }
}

impl Client {
    fn serve(&mut self, scratch: &mut [u8], work: Duration) -> io::Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.input.extend_from_slice(&scratch[..count]);
                    let (taken, answered) = answer_all(&self.input, &mut self.output);
                    self.input.drain(..taken);
                    compute(work * answered);
                    if self.input.len() > REQUEST_BYTES_MAX {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                    self.flush()?;
                    if count < scratch.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Answers are short: a client that reads none of them for long is not served on.
    fn flush(&mut self) -> io::Result<()> {
        let sent = self.stream.write(&self.output)?;
        if sent < self.output.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.output.clear();
        Ok(())
    }
}

/// Keeps the CPU busy.
fn compute(length: Duration) {
    if !length.is_zero() {
        let begun = Instant::now();
        while begun.elapsed() < length {
            std::hint::spin_loop();
        }
    }
}

/// Answers every whole request at the front of `input`; returns the bytes that they took, and their
/// number.
fn answer_all(input: &[u8], output: &mut Vec<u8>) -> (usize, u32) {
    let mut at = 0;
    let mut answered = 0;
    while at < input.len() {
        let rest = &input[at..];
        let found = match rest[0] {
            b'*' => resp(rest),
            b'm' => memcached(rest),
            _ => http(rest),
        };
        let Some((length, answer)) = found else {
            break;
        };
        output.extend_from_slice(answer);
        at += length;
        answered += 1;
    }
    (at, answered)
}

/// The end of the line at `at`, its line feed included.
fn line_end(input: &[u8], at: usize) -> Option<usize> {
    Some(at + memchr::memchr(b'\n', input.get(at..)?)? + 1)
}

/// A decimal number that starts at `at`.
fn number(input: &[u8], at: usize) -> usize {
    let digits = input[at..].iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0_usize, |sum, digit| {
        sum.saturating_mul(10)
            .saturating_add(usize::from(digit - b'0'))
    })
}

fn resp(input: &[u8]) -> Option<(usize, &'static [u8])> {
    let mut at = line_end(input, 0)?;
    let mut name = 0..0;
    for part in 0..number(input, 1) {
        let start = line_end(input, at)?;
        let end = start.checked_add(number(input, at + 1))?;
        if part == 0 {
            name = start..end;
        }
        at = end.checked_add(2)?;
        if at > input.len() {
            return None;
        }
    }
    let answer: &[u8] = match input.get(name)? {
        b"GET" | b"get" => b"$-1\r\n",
        b"SET" | b"set" => b"+OK\r\n",
        b"PING" | b"ping" => b"+PONG\r\n",
        _ => b"-ERR null server\r\n",
    };
    Some((at, answer))
}

fn memcached(input: &[u8]) -> Option<(usize, &'static [u8])> {
    let end = line_end(input, 0)?;
    if !input.starts_with(b"ms ") {
        let answer: &[u8] = match &input[..2] {
            b"mg" => b"EN\r\n",
            b"mn" => b"MN\r\n",
            _ => b"HD\r\n",
        };
        return Some((end, answer));
    }
    let size = input[3..end].iter().position(|byte| *byte == b' ')? + 4;
    let whole = end.checked_add(number(input, size))?.checked_add(2)?;
    (input.len() >= whole).then_some((whole, b"HD\r\n"))
}

fn http(input: &[u8]) -> Option<(usize, &'static [u8])> {
    let head = memchr::memmem::find(input, b"\r\n\r\n")? + 4;
    let length = memchr::memmem::find(&input[..head], b"Content-Length: ")
        .map_or(0, |at| number(input, at + 16));
    let whole = head.checked_add(length)?;
    (input.len() >= whole).then_some((whole, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_every_protocol_are_answered_when_they_are_whole() {
        let requests: [(&[u8], &[u8]); 7] = [
            (b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n", b"$-1\r\n"),
            (b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\n\r\n\r\n", b"+OK\r\n"),
            (b"mg k v\r\n", b"EN\r\n"),
            (b"mn\r\n", b"MN\r\n"),
            (b"ms k 2\r\n\r\n\r\n", b"HD\r\n"),
            (
                b"GET / HTTP/1.1\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            ),
            (
                b"PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
                b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            ),
        ];
        let (mut all, mut answers) = (Vec::new(), Vec::new());
        for (request, answer) in requests {
            for cut in 0..request.len() {
                let mut output = Vec::new();
                assert_eq!(answer_all(&request[..cut], &mut output), (0, 0));
            }
            all.extend_from_slice(request);
            answers.extend_from_slice(answer);
        }
        let mut output = Vec::new();
        assert_eq!(answer_all(&all, &mut output), (all.len(), 7));
        assert_eq!(output, answers);
    }
}
