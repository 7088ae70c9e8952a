//! A real node in this process, on ports that the system chooses, talked to over its sockets.

#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]

mod binary;
mod http;
mod link;
mod resp;
mod server;
mod support;
