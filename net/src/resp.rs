//! The Redis protocol, for the commands that map onto a key-value store.
//!
//! On the path: [`Resp`] is the protocol of a connection; a command is parsed ([`request`]), read
//! ([`command`]), carried out ([`execute`]) and answered ([`reply`]).

pub mod command;
pub mod execute;
pub mod reply;
pub mod request;

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use torc_cluster::held::Charge;
use torc_env::Env;

use crate::connection::{After, LastWord, Parsed, Protocol, Touches};
use crate::metrics::{Action, Wire};
use crate::output::Output;
use crate::resp::command::{Command, Local};
use crate::resp::reply::{Reply, Version};
use crate::resp::request::Parser;
use crate::service::{Service, default_keyspace, touches_key};

/// RESP on one connection.
pub struct Resp {
    parser: Parser,
    service: Rc<Service>,
    version: Version,
    /// What the client calls itself.
    name: Bytes,
    /// Number of the connection on this node.
    id: u64,
    /// After `QUIT` or an error of the protocol nothing is looked at.
    is_closing: bool,
}

impl Resp {
    /// A connection that has not sent anything yet.
    pub fn new(service: Rc<Service>, id: u64) -> Self {
        Self {
            parser: Parser::default(),
            service,
            version: Version::default(),
            name: Bytes::new(),
            id,
            is_closing: false,
        }
    }

    /// Answers what needs no store. The connection's own state changes here, in the order of the
    /// commands; each reply remembers the version that it is written in.
    fn local(&mut self, local: Local) -> Reply {
        match local {
            Local::Say(reply) => reply,
            Local::Hello { version, name } => {
                self.version = version.unwrap_or(self.version);
                self.name = name.unwrap_or_else(|| self.name.clone());
                self.hello()
            }
            Local::SetName(name) => {
                self.name = name;
                Reply::OK
            }
            Local::GetName if self.name.is_empty() => Reply::Null,
            Local::GetName => Reply::Bulk(self.name.clone()),
            Local::Id => self.id_reply(),
            Local::Info => Reply::text(self.info()),
            Local::Reset => {
                self.version = Version::default();
                self.name = Bytes::new();
                Reply::Status("RESET")
            }
            Local::Quit => Reply::OK,
        }
    }

    fn hello(&self) -> Reply {
        let version = match self.version {
            Version::Two => 2,
            Version::Three => 3,
        };
        let field = |name: &str, value: Reply| (Reply::text(name), value);
        Reply::Map(vec![
            field("server", Reply::text("torc")),
            field("version", Reply::text(env!("CARGO_PKG_VERSION"))),
            field("proto", Reply::Integer(version)),
            field("id", self.id_reply()),
            field("mode", Reply::text("standalone")),
            field("role", Reply::text("master")),
            field("modules", Reply::Array(Vec::new())),
        ])
    }

    fn id_reply(&self) -> Reply {
        Reply::Integer(i64::try_from(self.id).unwrap_or(i64::MAX))
    }

    fn info(&self) -> String {
        let env = &self.service.env;
        format!(
            "# Server\r\ntorc_version:{}\r\nredis_mode:standalone\r\nnode:{}\r\nshard:{}\r\n\
             shards:{}\r\n\r\n# Clients\r\nconnected_clients_on_shard:{}\r\n",
            env!("CARGO_PKG_VERSION"),
            env.node(),
            env.shard(),
            env.shard_count(),
            self.service.connections.get(),
        )
    }
}

/// What is written for a command.
pub struct Answer {
    reply: Reply,
    /// The version that the connection spoke when the command came.
    version: Version,
    after: After,
    /// What it takes of the shard's memory.
    charge: Charge,
}

impl Protocol for Resp {
    type Request = Command;
    type Answer = Answer;
    const ORDERED: bool = true;

    fn parse(&mut self, input: &mut BytesMut) -> Parsed<Self> {
        if self.is_closing {
            input.clear();
            return Parsed::More;
        }
        let (reply, after) = loop {
            let arguments = match self.parser.advance(input) {
                Ok(None) => return Parsed::More,
                Ok(Some(arguments)) => arguments,
                Err(error) => break (Reply::error(error), After::Linger),
            };
            if arguments.is_empty() {
                continue;
            }
            if arguments[0].eq_ignore_ascii_case(b"POST")
                || arguments[0].eq_ignore_ascii_case(b"HOST:")
            {
                // A browser that was led here must not get further.
                let reply = Reply::error("this is the Redis protocol, HTTP has a port of its own");
                break (reply, After::Linger);
            }
            match command::read(&arguments) {
                Ok(Command::Local(local)) => {
                    let after = match local {
                        Local::Quit => After::Close,
                        _ => After::Next,
                    };
                    break (self.local(local), after);
                }
                Ok(command) => {
                    let touches = touches(&command);
                    return Parsed::Request(command, touches);
                }
                Err(reply) => break (reply, After::Next),
            }
        };
        self.is_closing = after != After::Next;
        Parsed::Answer(Answer {
            reply,
            version: self.version,
            after,
            charge: self.service.node.held().charge(),
        })
    }

    fn in_request(&self, input: &BytesMut) -> bool {
        self.parser.in_request(input)
    }

    fn start(&mut self, command: Command) -> LocalBoxFuture<'static, Answer> {
        let service = Rc::clone(&self.service);
        let version = self.version;
        async move {
            let began = service.env.now();
            let action = action(&command);
            let mut reply = execute::execute(Rc::clone(&service), command).await;
            let mut charge = service.node.held().charge();
            // Only the answers of reads are large.
            if let Err(failure) = charge.grow(reply.bytes()) {
                reply = execute::error(&failure);
            }
            let failed = matches!(reply, Reply::Error(_));
            let took = service.env.now() - began;
            service.metrics.answered(Wire::Resp, action, took, failed);
            Answer {
                reply,
                version,
                after: After::Next,
                charge,
            }
        }
        .boxed_local()
    }

    fn write(&mut self, answer: Answer, out: &mut Output) -> After {
        answer.reply.write(out, answer.version);
        // The connection counts what it has not sent.
        drop(answer.charge);
        answer.after
    }

    fn last_word(&mut self, word: LastWord, out: &mut Output) {
        let reply = match word {
            LastWord::TooSlow => Reply::error("the command took too long to arrive"),
            LastWord::Overloaded => Reply::Error(
                "TRYAGAIN overloaded: this shard holds as much for its clients as it may (memory.clients_mb)"
                    .into(),
            ),
        };
        reply.write(out, self.version);
    }
}

fn touches(command: &Command) -> Touches {
    let keyspace = default_keyspace();
    let one = |key: &Bytes, write| touches_key(&keyspace, key, write);
    match command {
        Command::Local(_) => Touches::Nothing,
        Command::Get(key)
        | Command::Strlen(key)
        | Command::Type(key)
        | Command::Ttl { key, .. } => one(key, false),
        Command::Set(set) => one(&set.key, true),
        Command::GetDel(key) | Command::Expire { key, .. } | Command::Persist(key) => {
            one(key, true)
        }
        Command::Del(keys) if keys.len() == 1 => one(&keys[0], true),
        Command::Exists(_) | Command::MGet(_) => Touches::Everything { write: false },
        Command::Del(_) | Command::MSet(_) => Touches::Everything { write: true },
    }
}

fn action(command: &Command) -> Action {
    match command {
        Command::Local(_)
        | Command::Get(_)
        | Command::Strlen(_)
        | Command::Type(_)
        | Command::Ttl { .. } => Action::Get,
        Command::Set(_) | Command::Expire { .. } | Command::Persist(_) => Action::Put,
        Command::GetDel(_) | Command::Del(_) => Action::Delete,
        Command::Exists(_) | Command::MGet(_) | Command::MSet(_) => Action::Batch,
    }
}
