//! Runs many operations at once and answers each on its own.
//!
//! On the path: [`Node::batch`](crate::node::Node::batch) → here → the node's single operations.
//! Nothing is atomic across keys. Operations of one batch on one key run in no particular order.
//!
//! Its reads hold a bounded number of bytes, however large the values are: those beyond
//! [`BATCH_VALUE_BYTES_MAX`] are refused, and how many are in flight is bounded over all batches of the shard.

use std::cell::{Cell, RefCell};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use torc_env::Env;

use crate::api::{
    BATCH_OPERATIONS_MAX, BATCH_VALUE_BYTES_MAX, BatchRequest, Failure, FailureCode, GetAnswer,
    GetRequest, Operation, Outcome,
};
use crate::held::Charge;
use crate::node::Node;

/// Operations of one batch that run at the same time: enough to fill a group commit on every
/// replica, few enough that a batch does not push single requests aside.
const IN_FLIGHT_MAX: usize = 128;
/// Reads of all batches of a shard that run at the same time, besides one of each batch.
const READS_IN_FLIGHT_MAX: u32 = 128;

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
    let reads = Reads {
        node,
        value_bytes: Cell::new(0),
        is_full: Cell::new(false),
        charge: RefCell::new(node.held().charge()),
    };
    let mut outcomes = Vec::with_capacity(request.operations.len());
    let mut waiting = request.operations.into_iter();
    let mut running = FuturesOrdered::new();
    loop {
        while running.len() < IN_FLIGHT_MAX && (running.is_empty() || reads.may_start()) {
            let Some(operation) = waiting.next() else {
                break;
            };
            let place = match operation {
                Operation::Get(_) => Some(Place::take(&node.0.batch_reads)),
                Operation::Put(_) | Operation::Delete(_) => None,
            };
            let reads = &reads;
            running.push_back(async move {
                let _place = place;
                match operation {
                    Operation::Get(get) => Outcome::Got(reads.get(get).await),
                    Operation::Put(put) => Outcome::Written(node.put(put).await),
                    Operation::Delete(delete) => Outcome::Written(node.delete(delete).await),
                }
            });
        }
        match running.next().await {
            Some(outcome) => outcomes.push(outcome),
            None => return Ok(outcomes),
        }
    }
}

/// The reads of one batch.
struct Reads<'a, E: Env> {
    node: &'a Node<E>,
    /// What they have come to.
    value_bytes: Cell<usize>,
    /// One was refused, so those that have not begun are.
    is_full: Cell<bool>,
    charge: RefCell<Charge>,
}

impl<E: Env> Reads<'_, E> {
    fn may_start(&self) -> bool {
        self.node.0.batch_reads.get() < READS_IN_FLIGHT_MAX
    }

    async fn get(&self, get: GetRequest) -> Result<GetAnswer, Failure> {
        if self.is_full.get() {
            return Err(too_large());
        }
        let answer = self.node.get(get).await?;
        let bytes = answer.value_bytes();
        let before = self.value_bytes.get();
        // One alone always fits.
        if before > 0 && before + bytes > BATCH_VALUE_BYTES_MAX {
            self.is_full.set(true);
            return Err(too_large());
        }
        self.charge.borrow_mut().grow(bytes)?;
        self.value_bytes.set(before + bytes);
        Ok(answer)
    }
}

fn too_large() -> Failure {
    Failure::refused(
        FailureCode::TooLarge,
        format_args!(
            "the values of a batch come to {} MiB at most: read this key on its own, or in a smaller batch",
            BATCH_VALUE_BYTES_MAX >> 20
        ),
    )
}

/// A place among the reads of batches.
struct Place<'a>(&'a Cell<u32>);

impl<'a> Place<'a> {
    fn take(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
