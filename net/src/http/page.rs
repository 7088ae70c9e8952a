//! `/`: the status page. One file without any other resource; it polls `/admin/status` and
//! `/metrics` of the node that served it.

use crate::http::response::{ContentType, Response};

/// The page.
pub fn response() -> Response {
    Response::with_body(200, ContentType::Html, PAGE)
}

const PAGE: &str = include_str!("page.html");
