//! A runtime in a temporary directory.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use torc_env::{Class, Env};
use torc_runtime::{Background, RealEnv, Runtime, RuntimeConfig, ShardHandle};

/// Settings for a test: background jobs on the shard, everything in `dir`.
pub fn config(dir: &tempfile::TempDir) -> RuntimeConfig {
    RuntimeConfig {
        background: Background::Shard,
        ..RuntimeConfig::new(dir.path())
    }
}

/// A directory on a real file system, removed at the end.
pub fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Runs `main` on one shard.
pub fn on_shard<F, M, T>(main: F) -> T
where
    F: Fn(ShardHandle) -> M + Clone + Send + 'static,
    M: Future<Output = T> + 'static,
    T: Send + 'static,
{
    let dir = temporary();
    Runtime::block_on(&config(&dir), main).unwrap()
}

/// Starts a task and returns what completes with its result.
pub fn task<T: 'static, F: Future<Output = T> + 'static>(
    env: &RealEnv,
    class: Class,
    future: F,
) -> impl Future<Output = T> + use<T, F> {
    let shared = Rc::new((Cell::new(None), Cell::new(None::<Waker>)));
    let theirs = Rc::clone(&shared);
    env.spawn(class, async move {
        theirs.0.set(Some(future.await));
        theirs.1.take().into_iter().for_each(Waker::wake);
    });
    poll_fn(move |cx| match shared.0.take() {
        Some(result) => Poll::Ready(result),
        None => {
            shared.1.set(Some(cx.waker().clone()));
            Poll::Pending
        }
    })
}

/// Long enough to mean "never" in a test that works.
pub const NEVER: Duration = Duration::from_secs(3600);
