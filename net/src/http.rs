//! HTTP/1.1: requests, answers, and what the paths of the interface contract do.

pub mod json;
pub mod query;
pub mod request;
pub mod response;
pub mod route;
