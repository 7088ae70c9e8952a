//! The binary protocol, served. Format page: `docs/formats/binary-protocol.md`; frames and messages
//! are defined in `torc-client`, which both ends share.
//!
//! On the path: the listener reads the client's hello ([`handshake`]), hands the socket to the shard
//! that the client wants, and [`Binary`] is the protocol of the connection from there on: requests are
//! validated and read in place, values are slices of the frame that they came in, answers leave in
//! whatever order they become ready.

pub mod handshake;
mod translate;

use std::rc::Rc;

use bytes::BytesMut;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use torc_client::wire::frame::{self, FRAME_BYTES_MAX};
use torc_client::wire::message::{self, KIND_REQUEST};
use torc_cluster::api::{
    BatchRequest, Failure, FailureCode, Operation, Outcome, ScanAnswer, ScanRequest,
};
use torc_cluster::held::Charge;
use torc_env::Env;

use crate::binary::translate::Route;
use crate::connection::{After, LastWord, Parsed, Protocol, Touches};
use crate::metrics::{Action, Wire};
use crate::output::Output;
use crate::service::{Service, touches_key};

/// The binary protocol on one connection, after the handshake.
pub struct Binary {
    service: Rc<Service>,
    /// The peer sent something that is no frame: where the next one starts is unknown.
    is_broken: bool,
}

/// A request as it was parsed.
pub struct Request {
    id: u64,
    work: Work,
}

enum Work {
    Ping,
    Route(bytes::Bytes),
    One(Operation),
    Batch(Vec<Operation>),
    Scan(ScanRequest),
    Refused(Failure),
}

/// An answer that is not bytes yet.
pub struct Answer {
    id: u64,
    result: Done,
    /// What it takes of the shard's memory.
    charge: Charge,
}

enum Done {
    Pong,
    Route(Route),
    One(Outcome),
    Batch(Vec<Outcome>),
    Page(ScanAnswer),
    Failure(Failure),
    /// The end of the connection.
    Broken,
}

impl Done {
    /// Bytes of the values in it.
    fn value_bytes(&self) -> usize {
        match self {
            Done::One(outcome) => outcome.value_bytes(),
            Done::Batch(outcomes) => outcomes.iter().map(Outcome::value_bytes).sum(),
            Done::Page(page) => page.value_bytes(),
            Done::Pong | Done::Route(_) | Done::Failure(_) | Done::Broken => 0,
        }
    }
}

impl Binary {
    /// A connection whose handshake is done.
    pub fn new(service: Rc<Service>) -> Self {
        Self {
            service,
            is_broken: false,
        }
    }

    fn read(&self, frame: frame::Frame) -> Request {
        let id = frame.header.request;
        let work = match message::request(&frame.payload) {
            Ok(request) => {
                let deadline = self
                    .service
                    .deadline(u64::from(request.timeout_ms.to_native()));
                translate::work(&frame.payload, request, deadline)
            }
            Err(error) => Err(Failure::refused(FailureCode::InvalidRequest, error)),
        };
        Request {
            id,
            work: work.unwrap_or_else(Work::Refused),
        }
    }
}

impl Protocol for Binary {
    type Request = Request;
    type Answer = Answer;
    const ORDERED: bool = false;

    fn parse(&mut self, input: &mut BytesMut) -> Parsed<Self> {
        if self.is_broken {
            input.clear();
            return Parsed::More;
        }
        match frame::decode(input, FRAME_BYTES_MAX) {
            Ok(None) => Parsed::More,
            // Kinds of later versions are skipped.
            Ok(Some(frame)) if frame.header.kind != KIND_REQUEST => Parsed::Answer(Answer {
                id: frame.header.request,
                result: Done::Failure(Failure::refused(
                    FailureCode::Unsupported,
                    "a frame of an unknown kind",
                )),
                charge: self.service.node.held().charge(),
            }),
            Ok(Some(frame)) => {
                let request = self.read(frame);
                let touches = touches(&request.work);
                Parsed::Request(request, touches)
            }
            Err(error) => {
                tracing::debug!("a client of the binary protocol is dropped: {error}");
                self.is_broken = true;
                Parsed::Answer(Answer {
                    id: 0,
                    result: Done::Broken,
                    charge: self.service.node.held().charge(),
                })
            }
        }
    }

    fn in_request(&self, input: &BytesMut) -> bool {
        !input.is_empty()
    }

    fn start(&mut self, request: Request) -> LocalBoxFuture<'static, Answer> {
        let service = Rc::clone(&self.service);
        async move {
            let began = service.env.now();
            let action = action(&request.work);
            let is_write = is_write(&request.work);
            let mut result = carry_out(&service, request.work).await;
            let mut charge = service.node.held().charge();
            if let Err(mut failure) = charge.grow(result.value_bytes()) {
                // Of a batch, whose writes are done.
                failure.in_doubt = is_write;
                result = Done::Failure(failure);
            }
            if let Some(action) = action {
                let failed = matches!(
                    result,
                    Done::Failure(_) | Done::One(Outcome::Got(Err(_)) | Outcome::Written(Err(_)))
                );
                let took = service.env.now() - began;
                service.metrics.answered(Wire::Binary, action, took, failed);
            }
            Answer {
                id: request.id,
                result,
                charge,
            }
        }
        .boxed_local()
    }

    fn write(&mut self, answer: Answer, out: &mut Output) -> After {
        let id = answer.id;
        let buffer = out.buffer();
        match answer.result {
            Done::Pong => message::encode_answer(buffer, id, &message::Answer::Pong),
            Done::Route(route) => route.write(buffer, id),
            Done::One(outcome) => translate::write_outcome(buffer, id, &outcome),
            Done::Batch(outcomes) => translate::write_batch(buffer, id, &outcomes),
            Done::Page(page) => translate::write_page(buffer, id, &page),
            Done::Failure(failure) => translate::write_failure(buffer, id, &failure),
            Done::Broken => return After::Linger,
        }
        // The connection counts what it has not sent.
        drop(answer.charge);
        After::Next
    }

    fn last_word(&mut self, _word: LastWord, _out: &mut Output) {}
}

async fn carry_out(service: &Service, work: Work) -> Done {
    let node = &service.node;
    match work {
        Work::Ping => Done::Pong,
        Work::Route(keyspace) => match Route::of(service, &keyspace) {
            Ok(route) => Done::Route(route),
            Err(failure) => Done::Failure(failure),
        },
        Work::One(Operation::Get(get)) => Done::One(Outcome::Got(node.get(get).await)),
        Work::One(Operation::Put(put)) => Done::One(Outcome::Written(node.put(put).await)),
        Work::One(Operation::Delete(delete)) => {
            Done::One(Outcome::Written(node.delete(delete).await))
        }
        Work::Batch(operations) => match node.batch(BatchRequest { operations }).await {
            Ok(outcomes) => Done::Batch(outcomes),
            Err(failure) => Done::Failure(failure),
        },
        Work::Scan(scan) => match node.scan(scan).await {
            Ok(page) => Done::Page(page),
            Err(failure) => Done::Failure(failure),
        },
        Work::Refused(failure) => Done::Failure(failure),
    }
}

/// What a request touches. Answers need not come in order here, but operations on one key that a
/// client has pipelined still happen in the order in which it sent them.
fn touches(work: &Work) -> Touches {
    match work {
        Work::One(Operation::Get(get)) => touches_key(&get.keyspace, &get.key, false),
        Work::One(Operation::Put(put)) => touches_key(&put.keyspace, &put.key, true),
        Work::One(Operation::Delete(delete)) => touches_key(&delete.keyspace, &delete.key, true),
        Work::Batch(_) => Touches::Everything {
            write: is_write(work),
        },
        Work::Scan(_) => Touches::Everything { write: false },
        Work::Ping | Work::Route(_) | Work::Refused(_) => Touches::Nothing,
    }
}

fn is_write(work: &Work) -> bool {
    let writes = |operation: &Operation| !matches!(operation, Operation::Get(_));
    match work {
        Work::One(operation) => writes(operation),
        Work::Batch(operations) => operations.iter().any(writes),
        Work::Ping | Work::Route(_) | Work::Scan(_) | Work::Refused(_) => false,
    }
}

fn action(work: &Work) -> Option<Action> {
    match work {
        Work::One(Operation::Get(_)) => Some(Action::Get),
        Work::One(Operation::Put(_)) => Some(Action::Put),
        Work::One(Operation::Delete(_)) => Some(Action::Delete),
        Work::Batch(_) => Some(Action::Batch),
        Work::Scan(_) => Some(Action::Scan),
        Work::Ping | Work::Route(_) | Work::Refused(_) => None,
    }
}
