//! [`RealEnv`]: the world as engine and cluster see it, in production.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use torc_env::{
    Address, Bytes, CallError, Class, Env, Instant, Job, JobClass, NodeId, ShardId, WallTime,
};

use crate::calls::PendingCall;
use crate::clock;
use crate::disk::RingDisk;
use crate::executor;
use crate::mesh::Request;
use crate::shard::Core;
use crate::timer::TimerKey;

/// The way to other nodes: the peer links of this shard. Plugged in by
/// [`ShardHandle::set_remote`](crate::ShardHandle::set_remote).
pub trait RemoteCaller {
    /// Sends `request` to a shard of another node and completes `call` with the answer, at most
    /// once. Returns at once. The runtime ends the call by itself at `deadline` (with
    /// [`CallError::Lost`]); a carrier that has not sent the request by then should forget it.
    fn start(
        &self,
        to: Address,
        class: Class,
        request: Bytes,
        deadline: Instant,
        call: PendingCall,
    );
}

/// One shard's view of the world, on io_uring. Cheap to clone (one reference count).
#[derive(Clone)]
pub struct RealEnv {
    disk: RingDisk,
}

impl RealEnv {
    pub(crate) fn new(core: Rc<Core>) -> RealEnv {
        RealEnv {
            disk: RingDisk::new(core),
        }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        self.disk.core()
    }

    /// Completes when every task that is ready in this tick has run once. What they queued for one
    /// connection can then leave in one send: a writer that is woken by the first message waits
    /// here before it takes all of them.
    pub fn end_of_tick(&self) -> impl Future<Output = ()> + 'static {
        let core = Rc::clone(self.core());
        let asked = Cell::new(false);
        poll_fn(move |cx| {
            if asked.replace(true) {
                return Poll::Ready(());
            }
            core.executor.wake_at_end_of_tick(cx.waker().clone());
            Poll::Pending
        })
    }
}

impl Env for RealEnv {
    type Disk = RingDisk;

    fn disk(&self) -> &RingDisk {
        &self.disk
    }

    fn now(&self) -> Instant {
        clock::now()
    }

    fn wall(&self) -> WallTime {
        clock::wall()
    }

    fn random(&self) -> u64 {
        self.core().random.next()
    }

    fn node(&self) -> NodeId {
        self.core().node
    }

    fn shard(&self) -> ShardId {
        self.core().shard
    }

    fn shard_count(&self) -> u16 {
        u16::try_from(self.core().shared.shards.len()).expect("the configuration counts in u16")
    }

    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) {
        self.core().executor.spawn(class, task);
    }

    fn sleep_until(&self, at: Instant) -> impl Future<Output = ()> + 'static {
        Sleep {
            core: Rc::clone(self.core()),
            at,
            timer: None,
        }
    }

    fn give_way(&self) -> impl Future<Output = ()> + 'static {
        executor::give_way()
    }

    fn background<J: Job>(
        &self,
        class: JobClass,
        job: J,
    ) -> impl Future<Output = J::Output> + 'static {
        crate::background::run(self.clone(), class, job)
    }

    fn call(
        &self,
        to: Address,
        class: Class,
        request: Bytes,
        deadline: Instant,
    ) -> impl Future<Output = Result<Bytes, CallError>> + 'static {
        call(Rc::clone(self.core()), to, class, request, deadline)
    }
}

async fn call(
    core: Rc<Core>,
    to: Address,
    class: Class,
    payload: Bytes,
    deadline: Instant,
) -> Result<Bytes, CallError> {
    let (call, answer) = core.calls.open(clock::now(), deadline);
    if to.node != core.node {
        let Some(remote) = core.remote.borrow().clone() else {
            return Err(CallError::Unreachable);
        };
        let pending = PendingCall::new(&core.calls, call);
        remote.start(to, class, payload, deadline, pending);
        return answer.await;
    }
    let request = Request {
        call,
        class,
        deadline,
        payload,
    };
    let exists = usize::from(to.shard.0) < core.shared.shards.len();
    let shard = if exists { to.shard } else { ShardId(0) };
    if shard == core.shard {
        core.handle(shard, request);
    } else {
        core.mesh.send(shard, request)?;
    }
    answer.await
}

/// See [`Env::sleep_until`].
struct Sleep {
    core: Rc<Core>,
    at: Instant,
    timer: Option<TimerKey>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut timers = this.core.timers.borrow_mut();
        match this.timer {
            Some(timer) if timers.refresh(timer, cx.waker()) => Poll::Pending,
            Some(_) => Poll::Ready(()),
            None if this.at <= clock::now() => Poll::Ready(()),
            None => {
                this.timer = Some(timers.set(this.at, cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.core.timers.borrow_mut().cancel(timer);
        }
    }
}
