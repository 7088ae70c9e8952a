//! Load from several machines: agents that make it, a coordinator that merges what they measure.
//!
//! The coordinator sends its own command line to each agent, then phase after phase. Agents open their
//! connections and say when all stand; when they do at every agent, the coordinator tells all to begin. Agents send each interval's record back, histograms and all, as JSON, a message a line. Of
//! the keys each agent writes its own part, so that verification holds; rates and connections are
//! shared out. Clocks are not compared: all begin at the same moment after a message, within half of
//! the slowest round trip, and latencies are taken on one machine each.
//!
//! An agent does what whoever reaches its port says: load against any address. It listens on loopback
//! unless told otherwise, and writes no files.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::interrupt;
use super::output::{note, say};
use super::phase::{Collector, Flow, Measured, Observe};
use super::recorder::Recorder;
use super::run::Bench;
use super::wire::Packed;
use crate::failure::Failure;

/// Time from the word to begin to the beginning, in which it reaches every agent.
const BEGIN_AFTER: Duration = Duration::from_millis(200);
/// Silence of an agent after which it is given up; it reports once an interval.
const SILENCE_MAX: Duration = Duration::from_secs(90);

/// What a phase does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Writes each key of the agent's part.
    Fill,
    /// Reads each key of the agent's part.
    Verify {
        /// Whether a missing one is a loss.
        must_exist: bool,
    },
    /// The mix of the options.
    Mix,
}

/// A phase, as an agent is told it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// What it does.
    pub work: Work,
    /// Operations a second of all agents; `None` for a closed loop.
    pub rate: Option<f64>,
    /// Its length at most, in milliseconds.
    pub length_ms: u64,
    /// Seed of all random choices.
    pub seed: u64,
}

#[derive(Serialize, Deserialize)]
enum ToAgent {
    Ping,
    Prepare {
        words: Vec<String>,
        part: u64,
        parts: u64,
    },
    Phase(Order),
    /// The phase begins in so many milliseconds.
    Begin(u64),
    Stop,
}

#[derive(Serialize, Deserialize)]
enum FromAgent {
    Pong,
    Ready,
    /// All connections of a phase stand.
    Standing,
    Interval(u64, Box<Packed>),
    Done {
        seconds: f64,
    },
    Failed(String),
}

impl FromAgent {
    /// Whether more is to come of the phase.
    fn goes_on(&self) -> bool {
        matches!(self, FromAgent::Standing | FromAgent::Interval(..))
    }
}

fn send(stream: &mut TcpStream, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn receive<T: DeserializeOwned>(reader: &mut BufReader<TcpStream>) -> std::io::Result<T> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}

/// Serves one coordinator after the other.
pub fn serve(
    listen: SocketAddr,
    parse: impl Fn(&[String]) -> Result<super::options::Options, Failure>,
) -> Result<(), Failure> {
    let listener = TcpListener::bind(listen)
        .map_err(|error| Failure::new(format!("--listen {listen}: {error}")))?;
    say(&format!("load agent at {}\n", listener.local_addr()?))?;
    loop {
        let (stream, from) = listener.accept()?;
        note(&format!("coordinator {from}"));
        match serve_one(stream, &parse) {
            Ok(()) => note(&format!("coordinator {from} is done")),
            Err(error) => note(&format!("coordinator {from}: {error}")),
        }
    }
}

fn serve_one(
    stream: TcpStream,
    parse: &impl Fn(&[String]) -> Result<super::options::Options, Failure>,
) -> Result<(), Failure> {
    stream.set_nodelay(true)?;
    let mut out = stream.try_clone()?;
    // The reader goes to a thread of its own, so that a stop is heard during a phase.
    let mut reader = BufReader::new(stream);
    let (orders, mut inbox) = mpsc::channel();
    std::thread::spawn(move || {
        while let Ok(message) = receive::<ToAgent>(&mut reader) {
            if orders.send(message).is_err() {
                break;
            }
        }
    });
    let mut bench: Option<Bench> = None;
    while let Ok(message) = inbox.recv() {
        match message {
            ToAgent::Ping => send(&mut out, &FromAgent::Pong)?,
            ToAgent::Stop | ToAgent::Begin(_) => {}
            ToAgent::Prepare { words, part, parts } => {
                let made = parse(&words).and_then(|options| Bench::new(&options, (part, parts)));
                let answer = match made {
                    Ok(made) => {
                        bench = Some(made);
                        FromAgent::Ready
                    }
                    Err(failure) => FromAgent::Failed(failure.to_string()),
                };
                send(&mut out, &answer)?;
            }
            ToAgent::Phase(order) => {
                // The first is used by a worker before there are intervals, the second by their collector.
                let coordinator = Mutex::new((&mut out, &mut inbox));
                let begin = || {
                    let mut coordinator = coordinator.lock().ok()?;
                    let (out, orders) = &mut *coordinator;
                    send(out, &FromAgent::Standing).ok()?;
                    match orders.recv() {
                        Ok(ToAgent::Begin(in_ms)) => {
                            Some(Instant::now() + Duration::from_millis(in_ms))
                        }
                        _ => None,
                    }
                };
                let mut unheard = false;
                let mut observe = |at: u64, recorder: &Recorder| {
                    let packed = Box::new(Packed::of(recorder));
                    let Ok(mut coordinator) = coordinator.lock() else {
                        return Flow::Stop;
                    };
                    let (out, orders) = &mut *coordinator;
                    unheard |= send(out, &FromAgent::Interval(at, packed)).is_err();
                    let stopped = matches!(orders.try_recv(), Ok(ToAgent::Stop));
                    if stopped || unheard {
                        Flow::Stop
                    } else {
                        Flow::Continue
                    }
                };
                let measured = match &mut bench {
                    Some(bench) => bench.obey(&order, &begin, &mut observe),
                    None => Err(Failure::new("a phase before its preparation")),
                };
                let answer = match measured {
                    Ok(seconds) => FromAgent::Done { seconds },
                    Err(failure) => FromAgent::Failed(failure.to_string()),
                };
                send(&mut out, &answer)?;
            }
        }
    }
    Ok(())
}

/// The agents of a coordinator.
pub struct Agents {
    agents: Vec<Agent>,
    /// Half of the slowest round trip: how far apart they begin at most, in microseconds.
    pub skew_us: f64,
}

struct Agent {
    address: SocketAddr,
    out: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Agents {
    /// Connects to all and gives each its part of the work that `words` ask for.
    pub fn connect(addresses: &[SocketAddr], words: &[String]) -> Result<Self, Failure> {
        let parts = u64::try_from(addresses.len()).expect("a small number");
        let mut agents = Vec::new();
        let mut slowest = Duration::ZERO;
        for (part, address) in (0..parts).zip(addresses) {
            let fail =
                |error: &dyn std::fmt::Display| Failure::new(format!("agent {address}: {error}"));
            let stream = TcpStream::connect_timeout(address, Duration::from_secs(5))
                .map_err(|error| fail(&format!("{error}; is `torc load agent` running there?")))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            let mut agent = Agent {
                address: *address,
                out: stream.try_clone()?,
                reader: BufReader::new(stream),
            };
            for _ in 0..5 {
                let begun = Instant::now();
                agent.ask(&ToAgent::Ping).map_err(|error| fail(&error))?;
                slowest = slowest.max(begun.elapsed());
            }
            let prepare = ToAgent::Prepare {
                words: words.to_vec(),
                part,
                parts,
            };
            match agent.ask(&prepare).map_err(|error| fail(&error))? {
                FromAgent::Ready => agents.push(agent),
                FromAgent::Failed(words) => return Err(fail(&words)),
                _ => return Err(fail(&"an answer that was not asked for")),
            }
        }
        Ok(Self {
            agents,
            skew_us: slowest.as_secs_f64() * 1e6 / 2.0,
        })
    }

    /// Runs a phase on all agents at once.
    pub fn run(&mut self, order: &Order, observe: Observe<'_>) -> Result<Measured, Failure> {
        for agent in &mut self.agents {
            send(&mut agent.out, &ToAgent::Phase(order.clone()))?;
        }
        let mut collector = Collector::new(self.agents.len());
        let mut failed: Option<Failure> = None;
        let mut seconds: f64 = 0.0;
        let (heard, inbox) = mpsc::channel();
        let mut outs = Vec::new();
        for agent in &self.agents {
            outs.push(agent.out.try_clone()?);
        }
        std::thread::scope(|scope| {
            for (index, agent) in self.agents.iter_mut().enumerate() {
                let heard = heard.clone();
                scope.spawn(move || {
                    loop {
                        let message = receive::<FromAgent>(&mut agent.reader);
                        let last = !message.as_ref().is_ok_and(FromAgent::goes_on);
                        if heard.send((index, agent.address, message)).is_err() || last {
                            break;
                        }
                    }
                });
            }
            drop(heard);
            let mut stopped = false;
            let mut standing = 0;
            for (index, address, message) in inbox {
                let words = match message {
                    Ok(FromAgent::Interval(at, packed)) => match packed.unpack(index) {
                        Some(recorder) => {
                            collector.add(index, at, &recorder);
                            None
                        }
                        None => Some("a record that cannot be read".to_owned()),
                    },
                    Ok(FromAgent::Standing) => {
                        standing += 1;
                        if standing == outs.len() {
                            let in_ms = u64::try_from(BEGIN_AFTER.as_millis()).unwrap_or(0);
                            tell(&mut outs, &ToAgent::Begin(in_ms));
                        }
                        None
                    }
                    Ok(FromAgent::Done { seconds: took }) => {
                        seconds = seconds.max(took);
                        collector.end(index);
                        None
                    }
                    Ok(FromAgent::Failed(words)) => Some(words),
                    Ok(_) => Some("an answer that was not asked for".to_owned()),
                    Err(error) => Some(ended(&error)),
                };
                if let Some(words) = words {
                    collector.end(index);
                    failed.get_or_insert(Failure::new(format!("agent {address}: {words}")));
                }
                let stop = collector.deliver(observe) == Flow::Stop || failed.is_some();
                if (stop || interrupt::came()) && !stopped {
                    stopped = true;
                    tell(&mut outs, &ToAgent::Stop);
                }
            }
        });
        match failed {
            Some(failure) => Err(failure),
            None => Ok(Measured {
                seconds,
                total: collector.into_total(),
            }),
        }
    }
}

/// Tells all agents. That one is gone shows where it is heard.
fn tell(agents: &mut [TcpStream], message: &ToAgent) {
    for agent in agents {
        send(agent, message).ok();
    }
}

/// Why nothing more is heard of an agent.
fn ended(error: &std::io::Error) -> String {
    use std::io::ErrorKind::{TimedOut, UnexpectedEof, WouldBlock};
    match error.kind() {
        UnexpectedEof => "it ended before the run did".into(),
        TimedOut | WouldBlock => format!("nothing was heard for {} s", SILENCE_MAX.as_secs()),
        _ => error.to_string(),
    }
}

impl Agent {
    fn ask(&mut self, message: &ToAgent) -> std::io::Result<FromAgent> {
        send(&mut self.out, message)?;
        receive(&mut self.reader)
    }
}
