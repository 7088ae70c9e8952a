//! Deletes a key: a write of a tombstone.
//!
//! On the path: [`Node::delete`](crate::node::Node::delete) → here → [`put`](super::put).
//!
//! A delete removes what its context has seen, like any write, and nothing without one; it is done
//! whether or not the key exists, because a replica that does not answer may hold it. The tombstone
//! lives until every owner is known to have it.

use std::rc::Rc;

use torc_env::Env;

use crate::api::{DeleteRequest, Failure, Written};
use crate::coordinator::put::{WriteOperation, write_named};
use crate::core::Core;

/// Carries a deletion out.
pub(crate) async fn delete<E: Env>(
    core: &Rc<Core<E>>,
    request: DeleteRequest,
) -> Result<Written, Failure> {
    let operation = WriteOperation {
        key: request.key,
        value: None,
        ttl_seconds: 0,
        options: request.write,
        is_forwarded: false,
        id: core.next_request(),
    };
    write_named(core, &request.keyspace, &operation).await
}
