//! A real node in this process, on ports that the system chooses, talked to over its sockets.

mod http;
mod resp;
mod server;
mod support;
