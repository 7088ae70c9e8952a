//! What the assembler of a shard (the net crate) may do with it besides [`Env`]: register
//! handlers, send something to another shard, stop everything.

use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Bytes, Env, Origin, ShardId};

use crate::env::{RealEnv, RemoteCaller};
use crate::shard::Control;

/// A shard, from inside. Cheap to clone; stays on the shard's thread.
#[derive(Clone)]
pub struct ShardHandle {
    env: RealEnv,
}

/// A message that could not be left for a shard: the shard does not exist, or has too many.
pub struct Refused(Control);

impl Refused {
    pub(crate) fn new(message: Control) -> Refused {
        Refused(message)
    }

    /// The message, to run elsewhere or to drop.
    pub fn into_message(self) -> Box<dyn FnOnce(&ShardHandle) + Send> {
        self.0
    }
}

impl std::fmt::Debug for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refused")
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the shard does not take the message")
    }
}

impl std::error::Error for Refused {}

impl ShardHandle {
    pub(crate) fn new(env: RealEnv) -> ShardHandle {
        ShardHandle { env }
    }

    /// The shard's environment.
    pub fn env(&self) -> &RealEnv {
        &self.env
    }

    /// Registers who answers the calls of this node's shards to this one. Each request runs as a
    /// task of the class that the caller named. Before this, calls end with
    /// [`CallError::Unreachable`](torc_env::CallError::Unreachable).
    pub fn serve<F, A>(&self, handler: F)
    where
        F: Fn(Origin, Bytes) -> A + 'static,
        A: Future<Output = Bytes> + 'static,
    {
        let env = self.env.clone();
        let node = env.node();
        let handler = Rc::new(move |from, class, request, reply: crate::shard::ReplyTo| {
            let answer = handler(Origin { node, shard: from }, request);
            env.spawn(class, async move { reply.send(Ok(answer.await)) });
        });
        *self.env.core().handler.borrow_mut() = Some(handler);
    }

    /// Plugs in the way to other nodes. Before this, calls to them end with
    /// [`CallError::Unreachable`](torc_env::CallError::Unreachable).
    pub fn set_remote(&self, remote: Rc<dyn RemoteCaller>) {
        *self.env.core().remote.borrow_mut() = Some(remote);
    }

    /// Runs `message` on another shard (or on this one), soon, between two ticks. It must be short:
    /// what takes longer is spawned there.
    pub fn run_on(
        &self,
        shard: ShardId,
        message: impl FnOnce(&ShardHandle) + Send + 'static,
    ) -> Result<(), Refused> {
        self.env
            .core()
            .shared
            .send(shard, Box::new(message))
            .map_err(Refused)
    }

    /// How often packets for this shard's connections were handled by the kernel on each CPU, of the
    /// receives that were looked at (one in 64 of each connection).
    pub fn arrivals(&self) -> BTreeMap<usize, u64> {
        self.env.core().arrivals.borrow().clone()
    }

    /// How long background jobs of the whole node have waited to leave time of the disk to the shards.
    pub fn background_waited(&self) -> Duration {
        self.env.core().shared.background.waited()
    }

    /// Bytes of removed files of the whole node that still take space: it is given back piece by piece.
    pub fn removed_pending_bytes(&self) -> u64 {
        self.env.core().shared.reclaim.pending_bytes()
    }

    /// Ends every shard of this runtime; [`Runtime::wait`](crate::Runtime::wait) then returns.
    pub fn stop_all(&self) {
        self.env.core().shared.stop();
    }
}
