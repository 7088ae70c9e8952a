//! Asking every shard of this node, for the few things that are about the whole node: metrics, flush,
//! drain. Off the data path: this is the only place where shards share a lock.

use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use torc_env::{Class, Env, ShardId};
use torc_runtime::ShardHandle;

use crate::service::Service;

/// Answers as they come in.
struct Gathered<T> {
    answers: Mutex<Answers<T>>,
}

struct Answers<T> {
    by_shard: Vec<Option<T>>,
    missing: usize,
    waker: Option<Waker>,
}

/// Runs `ask` on every shard and returns the answers in order of shards; `None` of a shard that is not
/// there any more. It runs to its end also when nobody waits any more.
pub async fn on_every_shard<T, F, A>(handle: &ShardHandle, ask: F) -> Vec<Option<T>>
where
    T: Send + 'static,
    F: Fn(Rc<Service>) -> A + Clone + Send + 'static,
    A: Future<Output = T> + 'static,
{
    on_first_shards(handle, handle.env().shard_count(), ask).await
}

/// As [`on_every_shard`], on one shard that is the same whoever asks.
pub async fn on_one_shard<T, F, A>(handle: &ShardHandle, ask: F) -> Option<T>
where
    T: Send + 'static,
    F: Fn(Rc<Service>) -> A + Clone + Send + 'static,
    A: Future<Output = T> + 'static,
{
    on_first_shards(handle, 1, ask).await.pop().flatten()
}

async fn on_first_shards<T, F, A>(handle: &ShardHandle, count: u16, ask: F) -> Vec<Option<T>>
where
    T: Send + 'static,
    F: Fn(Rc<Service>) -> A + Clone + Send + 'static,
    A: Future<Output = T> + 'static,
{
    let gathered = Arc::new(Gathered {
        answers: Mutex::new(Answers {
            by_shard: (0..count).map(|_| None).collect(),
            missing: usize::from(count),
            waker: None,
        }),
    });
    for shard in (0..count).map(ShardId) {
        let ask = ask.clone();
        let seat = Seat {
            gathered: Arc::clone(&gathered),
            shard,
            answer: None,
        };
        // Refused or dropped, the seat reports that there is no answer.
        let left = handle.run_on(shard, move |there| {
            let Some(service) = Service::current() else {
                return;
            };
            there.env().spawn(Class::Control, async move {
                let answer = ask(service).await;
                seat.take(answer);
            });
        });
        if left.is_err() {
            tracing::warn!(%shard, "a shard takes no orders");
        }
    }
    poll_fn(move |cx| {
        let mut answers = gathered.lock();
        if answers.missing == 0 {
            return Poll::Ready(std::mem::take(&mut answers.by_shard));
        }
        answers.waker = Some(cx.waker().clone());
        Poll::Pending
    })
    .await
}

/// Answers of all shards, where one that has ended has failed.
pub fn or_ended<T>(
    answers: Vec<Option<Result<T, String>>>,
) -> impl Iterator<Item = Result<T, String>> {
    let ended = || Err("a shard has ended".to_owned());
    answers
        .into_iter()
        .map(move |answer| answer.unwrap_or_else(ended))
}

impl<T> Gathered<T> {
    fn lock(&self) -> std::sync::MutexGuard<'_, Answers<T>> {
        // A panic ends the process, so nobody sees what one left behind.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one shard's answer. Its end counts, however it comes.
struct Seat<T> {
    gathered: Arc<Gathered<T>>,
    shard: ShardId,
    answer: Option<T>,
}

impl<T> Seat<T> {
    /// The shard has answered.
    fn take(mut self, answer: T) {
        self.answer = Some(answer);
    }
}

impl<T> Drop for Seat<T> {
    fn drop(&mut self) {
        let mut answers = self.gathered.lock();
        answers.by_shard[usize::from(self.shard.0)] = self.answer.take();
        answers.missing -= 1;
        let waker = if answers.missing == 0 {
            answers.waker.take()
        } else {
            None
        };
        drop(answers);
        waker.into_iter().for_each(Waker::wake);
    }
}
