//! Waiting for virtual time, and letting others run.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::log::Event;
use crate::world::World;

/// Completes at its time. Dropped before, its event does nothing.
pub struct Sleep {
    world: Rc<World>,
    at_ns: u64,
    registered: Option<Rc<RefCell<Option<Waker>>>>,
}

impl Sleep {
    pub(crate) fn until(world: Rc<World>, at_ns: u64) -> Self {
        Self {
            world,
            at_ns,
            registered: None,
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.world.now_ns() >= self.at_ns {
            return Poll::Ready(());
        }
        let waker = Some(context.waker().clone());
        if let Some(registered) = &self.registered {
            *registered.borrow_mut() = waker;
            return Poll::Pending;
        }
        let registered = Rc::new(RefCell::new(waker));
        self.registered = Some(registered.clone());
        self.world.schedule(self.at_ns, move |world| {
            let waker = registered.borrow_mut().take();
            if let Some(waker) = waker {
                world.record(Event::Timer, 0, 0);
                waker.wake();
            }
        });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(registered) = &self.registered {
            registered.borrow_mut().take();
        }
    }
}

/// Yields once, or not at all.
pub struct GiveWay {
    yields: bool,
}

impl GiveWay {
    pub(crate) fn drawn(world: &World) -> Self {
        let p = world.options.give_way;
        let yields = world.streams.borrow_mut().schedule.chance(p);
        Self { yields }
    }
}

impl Future for GiveWay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if !self.yields {
            return Poll::Ready(());
        }
        self.yields = false;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}
