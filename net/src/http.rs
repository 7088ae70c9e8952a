//! HTTP/1.1: requests, answers, and what the paths of the interface contract do.
//!
//! On the path: [`Http`] is the protocol of a connection; a request is parsed
//! ([`request`]), routed ([`route`]), carried out ([`keys`], [`scan`], [`batch`], [`admin`]) and
//! answered ([`response`]).

pub mod admin;
pub mod batch;
pub mod json;
pub mod keys;
pub mod page;
pub mod query;
pub mod request;
pub mod response;
pub mod route;
pub mod scan;
pub mod session;

use std::rc::Rc;

use bytes::{BufMut, BytesMut};
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use torc_cluster::held::Charge;
use torc_env::Env;

use crate::connection::{After, LastWord, Parsed, Protocol, Touches};
use crate::http::request::{Method, Parser, Request, Step};
use crate::http::response::{Problem, Response};
use crate::http::route::Route;
use crate::metrics::{Action, Wire};
use crate::output::Output;
use crate::service::{Service, touches_key};

/// HTTP on one connection.
pub struct Http {
    parser: Parser,
    service: Rc<Service>,
    /// The client said that nothing follows; what follows is not looked at.
    is_closing: bool,
}

impl Http {
    /// A connection that has not sent anything yet.
    pub fn new(service: Rc<Service>) -> Self {
        Self {
            parser: Parser::default(),
            service,
            is_closing: false,
        }
    }
}

/// What is written for a request.
pub enum Answer {
    /// The client may send the body.
    Continue,
    /// The answer to a request.
    Response {
        /// The answer.
        response: Box<Response>,
        /// Whether the connection ends with it.
        close: bool,
        /// Whether the body is left out (HEAD).
        head_only: bool,
        /// What it takes of the shard's memory.
        charge: Charge,
    },
    /// The answer to something that is no request; the connection ends with it.
    Refused(Problem),
}

impl Protocol for Http {
    type Request = (Box<Request>, Result<Route, Problem>);
    type Answer = Answer;
    const ORDERED: bool = true;

    fn parse(&mut self, input: &mut BytesMut) -> Parsed<Self> {
        if self.is_closing {
            input.clear();
            return Parsed::More;
        }
        match self.parser.advance(input) {
            Step::More => Parsed::More,
            Step::Continue => Parsed::Answer(Answer::Continue),
            Step::Refused(problem) => Parsed::Answer(Answer::Refused(problem)),
            Step::Request(request) => {
                self.is_closing = request.close;
                let route = Route::of(&request.path);
                let touches = touches(&request, &route);
                Parsed::Request((request, route), touches)
            }
        }
    }

    fn in_request(&self, input: &BytesMut) -> bool {
        self.parser.in_request(input)
    }

    fn throws_away(&self) -> bool {
        self.parser.is_discarding()
    }

    fn start(&mut self, (request, route): Self::Request) -> LocalBoxFuture<'static, Self::Answer> {
        let service = Rc::clone(&self.service);
        async move {
            let close = request.close || service.stop.is_raised();
            let head_only = request.method == Method::Head;
            let began = service.env.now();
            let action = route
                .as_ref()
                .ok()
                .and_then(|route| action(&request, route));
            let is_write = request.method.is_write();
            let outcome = match route {
                Ok(route) => carry_out(Rc::clone(&service), *request, route).await,
                Err(problem) => Err(problem),
            };
            if let Some(action) = action {
                let failed = outcome.as_ref().is_err_and(|problem| problem.status >= 500);
                let took = service.env.now() - began;
                service.metrics.answered(Wire::Http, action, took, failed);
            }
            let mut response = outcome.unwrap_or_else(Response::from);
            let mut charge = service.node.held().charge();
            if let Err(mut failure) = charge.grow(response.body.len()) {
                // Of a batch, whose writes are done.
                failure.in_doubt = is_write;
                response = Response::from(Problem::from(failure));
            }
            Answer::Response {
                response: Box::new(response),
                close,
                head_only,
                charge,
            }
        }
        .boxed_local()
    }

    fn write(&mut self, answer: Answer, out: &mut Output) -> After {
        match answer {
            Answer::Continue => {
                out.buffer().put_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                After::Next
            }
            Answer::Response {
                response,
                close,
                head_only,
                charge,
            } => {
                response.write(out, close, head_only);
                // The connection counts what it has not sent.
                drop(charge);
                if close { After::Close } else { After::Next }
            }
            Answer::Refused(problem) => {
                Response::from(problem).write(out, true, false);
                After::Linger
            }
        }
    }

    fn last_word(&mut self, word: LastWord, out: &mut Output) {
        let problem = match word {
            LastWord::TooSlow => Problem::too_slow(),
            LastWord::Overloaded => Problem::overloaded(
                "this shard holds as much for its clients as it may (memory.clients_mb)",
            ),
        };
        Response::from(problem).write(out, true, false);
    }
}

/// What a request touches, so that a pipeline behaves as if it ran in order.
fn touches(request: &Request, route: &Result<Route, Problem>) -> Touches {
    let write = request.method.is_write();
    match route {
        Ok(Route::Key { keyspace, key }) => touches_key(keyspace, key, write),
        Ok(Route::Keys { .. }) => Touches::Everything { write: false },
        Ok(Route::Batch { .. } | Route::Admin(_)) => Touches::Everything { write: true },
        Ok(Route::Health | Route::Ready | Route::Metrics | Route::Page) | Err(_) => {
            Touches::Nothing
        }
    }
}

/// What is measured of a request.
fn action(request: &Request, route: &Route) -> Option<Action> {
    match (route, request.method) {
        (Route::Key { .. }, Method::Get | Method::Head) => Some(Action::Get),
        (Route::Key { .. }, Method::Put) => Some(Action::Put),
        (Route::Key { .. }, Method::Delete) => Some(Action::Delete),
        (Route::Keys { .. }, _) => Some(Action::Scan),
        (Route::Batch { .. }, _) => Some(Action::Batch),
        _ => None,
    }
}

async fn carry_out(
    service: Rc<Service>,
    request: Request,
    route: Route,
) -> Result<Response, Problem> {
    // A page that somebody else serves must not make an operator's browser write.
    if request.method.is_write() && request.headers.is_of_another_site() {
        return Err(Problem::new(
            403,
            "other_origin",
            "a page of another host may not change anything here (Origin and Host differ)",
        ));
    }
    match route {
        Route::Key { keyspace, key } => keys::handle(service, request, keyspace, key).await,
        Route::Keys { keyspace } => scan::handle(service, request, keyspace).await,
        Route::Batch { keyspace } => batch::handle(service, request, keyspace).await,
        Route::Admin(order) => admin::handle(service, request, order).await,
        Route::Health | Route::Ready | Route::Metrics | Route::Page => {
            if !matches!(request.method, Method::Get | Method::Head) {
                return Err(Problem::method_not_allowed("GET, HEAD"));
            }
            match route {
                Route::Health => admin::health(&service).await,
                Route::Ready => admin::ready(&service).await,
                Route::Metrics => admin::metrics(&service).await,
                _ => Ok(page::response()),
            }
        }
    }
}
