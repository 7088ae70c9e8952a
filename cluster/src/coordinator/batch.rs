//! Runs many operations at once and answers each on its own.
//!
//! On the path: [`Node::batch`](crate::node::Node::batch) → here → the node's single operations.
//! Nothing is atomic across keys. Operations of one batch on one key run in no particular order.

use futures_util::StreamExt as _;
use futures_util::stream;
use torc_env::Env;

use crate::api::{BATCH_OPERATIONS_MAX, BatchRequest, Failure, FailureCode, Operation, Outcome};
use crate::node::Node;

/// Operations of one batch that run at the same time: enough to fill a group commit on every
/// replica, few enough that a batch does not push single requests aside.
const IN_FLIGHT_MAX: usize = 128;

/// Carries a batch out; the outcomes are in the order of the operations.
pub(crate) async fn batch<E: Env>(
    node: &Node<E>,
    request: BatchRequest,
) -> Result<Vec<Outcome>, Failure> {
    if request.operations.len() > BATCH_OPERATIONS_MAX {
        return Err(Failure::refused(
            FailureCode::InvalidRequest,
            format_args!(
                "a batch has up to {BATCH_OPERATIONS_MAX} operations, not {}",
                request.operations.len()
            ),
        ));
    }
    let outcomes = stream::iter(request.operations)
        .map(|operation| async move {
            match operation {
                Operation::Get(get) => Outcome::Got(node.get(get).await),
                Operation::Put(put) => Outcome::Written(node.put(put).await),
                Operation::Delete(delete) => Outcome::Written(node.delete(delete).await),
            }
        })
        .buffered(IN_FLIGHT_MAX)
        .collect()
        .await;
    Ok(outcomes)
}
