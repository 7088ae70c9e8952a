//! Tasks, timers, ticks, start and stop.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use torc_env::{Class, Env, Instant, ShardId};
use torc_runtime::{ListenOptions, Runtime, RuntimeConfig, StartError, TcpListener, TcpStream};

use crate::support::{NEVER, config, on_shard, task, temporary};

#[test]
fn timers_complete_in_order_and_not_early() {
    on_shard(|shard| async move {
        let env = shard.env();
        let order = Rc::new(RefCell::new(Vec::new()));
        let sleeps = [30_u64, 10, 20].map(|millis| {
            let (order, clock) = (Rc::clone(&order), env.clone());
            task(env, Class::Control, async move {
                let at = clock.now() + Duration::from_millis(millis);
                clock.sleep_until(at).await;
                assert!(clock.now() >= at);
                order.borrow_mut().push(millis);
            })
        });
        futures_util::future::join_all(sleeps).await;
        assert_eq!(*order.borrow(), [10, 20, 30]);
        env.sleep(Duration::ZERO).await;
        env.sleep_until(Instant(0)).await;
    });
}

#[test]
fn a_dropped_timer_wakes_nobody() {
    on_shard(|shard| async move {
        let env = shard.env();
        let polls = Rc::new(Cell::new(0));
        let counted = Rc::clone(&polls);
        let clock = env.clone();
        let sleeper = task(env, Class::Control, async move {
            let mut brief = Some(Box::pin(clock.sleep(Duration::from_millis(2))));
            let mut long = Box::pin(clock.sleep(Duration::from_millis(20)));
            std::future::poll_fn(|cx| {
                counted.set(counted.get() + 1);
                if let Some(brief) = &mut brief {
                    assert!(brief.as_mut().poll(cx).is_pending());
                }
                brief = None;
                long.as_mut().poll(cx)
            })
            .await;
        });
        sleeper.await;
        assert_eq!(
            polls.get(),
            2,
            "once to start, once for the timer that was kept"
        );
    });
}

#[test]
fn giving_way_lets_others_run_once_the_quantum_is_over() {
    on_shard(|shard| async move {
        let env = shard.env();
        let other_ran = Rc::new(Cell::new(false));
        let flag = Rc::clone(&other_ran);
        let clock = env.clone();
        let busy = task(env, Class::Foreground, async move {
            let mut items = 0_u64;
            while !flag.get() {
                clock.give_way().await;
                items += 1;
            }
            items
        });
        env.spawn(Class::Foreground, async move { other_ran.set(true) });
        assert!(busy.await > 1, "the first item did not give way");
    });
}

#[test]
fn completions_are_seen_while_a_task_is_busy() {
    on_shard(|shard| async move {
        let env = shard.env();
        let done = Rc::new(Cell::new(false));
        let (flag, clock) = (Rc::clone(&done), env.clone());
        env.spawn(Class::Repair, async move {
            // Never out of work; it only gives way.
            while !flag.get() {
                clock.give_way().await;
            }
        });
        env.sleep(Duration::from_millis(1)).await;
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = TcpListener::bind(env, any, ListenOptions::default()).unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = task(env, Class::Foreground, async move {
            listener.accept().await.unwrap()
        });
        let client = TcpStream::connect(env, address, NEVER).await.unwrap();
        drop(client);
        let (end, _) = accepted.await.recv(BytesMut::with_capacity(1)).await;
        assert_eq!(end.unwrap(), 0);
        done.set(true);
    });
}

#[test]
fn everything_queued_in_a_tick_is_there_at_its_end() {
    on_shard(|shard| async move {
        let env = shard.env();
        let queue = Rc::new(RefCell::new(Vec::new()));
        let (taken, writer) = (Rc::clone(&queue), env.clone());
        let written = task(env, Class::Foreground, async move {
            writer.end_of_tick().await;
            std::mem::take(&mut *taken.borrow_mut())
        });
        for number in 0..10 {
            let queue = Rc::clone(&queue);
            env.spawn(
                Class::Control,
                async move { queue.borrow_mut().push(number) },
            );
        }
        assert_eq!(written.await.len(), 10);
    });
}

#[test]
fn clocks_and_randomness_move() {
    on_shard(|shard| async move {
        let env = shard.env();
        let (now, wall) = (env.now(), env.wall());
        env.sleep(Duration::from_millis(2)).await;
        assert!(env.now() - now >= Duration::from_millis(2));
        assert!(wall.millis() > 1_600_000_000_000);
        assert_ne!(env.random(), env.random());
    });
}

#[test]
fn stopping_drops_the_tasks_of_every_shard_whatever_they_wait_for() {
    /// Tells when it is dropped.
    struct Dropped(std::sync::mpsc::Sender<ShardId>, ShardId);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.send(self.1).unwrap();
        }
    }
    let dir = temporary();
    let config = RuntimeConfig {
        shards: 3,
        ..config(&dir)
    };
    let (dropped, drops) = std::sync::mpsc::channel();
    let (started, starts) = std::sync::mpsc::channel();
    let runtime = Runtime::start(&config, move |shard| {
        let (dropped, started) = (dropped.clone(), started.clone());
        async move {
            let env = shard.env().clone();
            let token = |env: &torc_runtime::RealEnv| Dropped(dropped.clone(), env.shard());
            let held = token(&env);
            let clock = env.clone();
            env.spawn(Class::Control, async move {
                clock.sleep(NEVER).await;
                drop(held);
            });
            let held = token(&env);
            let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
            let listener = TcpListener::bind(&env, any, ListenOptions::default()).unwrap();
            env.spawn(Class::Foreground, async move {
                drop(listener.accept().await);
                drop(held);
            });
            let held = token(&env);
            started.send(()).unwrap();
            std::future::pending::<()>().await;
            drop(held);
        }
    })
    .unwrap();
    assert_eq!(starts.iter().take(3).count(), 3);
    runtime.stop();
    assert_eq!(drops.iter().count(), 9);
}

#[test]
fn a_panic_on_a_shard_ends_the_runtime_and_is_passed_on() {
    let dir = temporary();
    let config = RuntimeConfig {
        shards: 2,
        ..config(&dir)
    };
    let runtime = Runtime::start(&config, |shard| async move {
        if shard.env().shard() == ShardId(1) {
            panic!("on purpose");
        }
        std::future::pending::<()>().await;
    })
    .unwrap();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.wait()));
    assert_eq!(
        *panic.unwrap_err().downcast::<&str>().unwrap(),
        "on purpose"
    );
}

#[test]
fn a_thread_that_is_no_shard_sends_messages_and_stops_the_runtime() {
    let dir = temporary();
    let runtime = Runtime::start(&config(&dir), |_| std::future::pending()).unwrap();
    let handle = runtime.handle();
    let outside = std::thread::spawn(move || {
        let (sender, answer) = std::sync::mpsc::channel();
        handle
            .run_on(ShardId(0), move |shard| {
                sender.send(shard.env().shard()).unwrap();
            })
            .unwrap();
        assert_eq!(answer.recv(), Ok(ShardId(0)));
        handle.stop();
    });
    runtime.wait();
    outside.join().unwrap();
}

#[test]
fn a_data_directory_that_cannot_be_made_is_named() {
    let dir = temporary();
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let config = RuntimeConfig::new(file.join("below"));
    let error = Runtime::start(&config, |_| async {}).err().unwrap();
    assert!(matches!(error, StartError::DataDir { .. }), "{error}");
    assert!(error.to_string().contains("below"));
}

#[test]
fn spinning_and_pinned_shards_work_the_same() {
    let dir = temporary();
    let config = RuntimeConfig {
        pin: true,
        spin: Duration::from_micros(50),
        ..config(&dir)
    };
    let slept = Runtime::block_on(&config, |shard| async move {
        let before = shard.env().now();
        shard.env().sleep(Duration::from_millis(3)).await;
        shard.env().now() - before
    });
    assert!(slept.unwrap() >= Duration::from_millis(3));
}

#[test]
fn a_node_runs_without_huge_pages() {
    let dir = temporary();
    Runtime::block_on(&config(&dir), |_| async {}).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    // Kernels before 5.0 do not say.
    if let Some(enabled) = status
        .lines()
        .find_map(|line| line.strip_prefix("THP_enabled:"))
    {
        assert_eq!(enabled.trim(), "0");
    }
}
