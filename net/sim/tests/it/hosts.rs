use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Class, Disk, Env, Instant, Job, JobClass, ShardId};
use torc_sim::{Options, SimEnv, Simulation, Stalled};

#[test]
fn time_passes_only_in_sleep_and_work() {
    let before = std::time::Duration::from_secs(3600);
    let slept = torc_sim::run(1, async move |env| {
        let start = env.now();
        let wall = env.wall();
        env.sleep(before).await;
        assert!(env.wall().millis() - wall.millis() >= 3_600_000);
        env.now() - start
    });
    assert!(slept >= before && slept < before + Duration::from_millis(1));
}

#[test]
fn a_crash_drops_every_task_of_the_host_and_of_no_other() {
    struct Alive(Rc<Cell<u32>>);
    impl Drop for Alive {
        fn drop(&mut self) {
            self.0.set(self.0.get() - 1);
        }
    }
    let simulation = Simulation::new(2, Options::default());
    let hosts = [simulation.add_host(1), simulation.add_host(2)];
    let alive = Rc::new(Cell::new(0));
    for (host, shard) in [(0, 0), (1, 0), (1, 1)] {
        let env = simulation.env(hosts[host], ShardId(shard));
        alive.set(alive.get() + 1);
        let counted = Alive(alive.clone());
        let own = env.clone();
        env.spawn(Class::Foreground, async move {
            let _counted = counted;
            own.sleep(Duration::from_secs(1000)).await;
        });
    }
    let dead = simulation.env(hosts[1], ShardId(0));
    assert!(simulation.step());
    simulation.crash(hosts[1], 0);
    assert_eq!(alive.get(), 1);
    assert!(!dead.is_alive());
    dead.spawn(Class::Foreground, async {
        panic!("a dead process runs nothing")
    });
    while simulation.step() {}
    assert_eq!(alive.get(), 0);
}

#[test]
fn a_request_to_a_process_that_dies_has_no_answer() {
    let simulation = Simulation::new(2, Options::default());
    let host = simulation.add_host(1);
    let env = simulation.env(host, ShardId(0));
    let own = env.clone();
    let request = env.execute(Class::Foreground, async move {
        own.sleep(Duration::from_secs(10)).await;
    });
    let killer = simulation.clone();
    simulation.spawn(async move {
        killer.sleep(Duration::from_secs(1)).await;
        killer.crash(host, 0);
    });
    assert_eq!(simulation.run(request), Ok(None));
}

#[test]
fn a_paused_host_stands_still_while_time_goes_on() {
    let simulation = Simulation::new(2, Options::default());
    let host = simulation.add_host(1);
    let env = simulation.env(host, ShardId(0));
    let woke = Rc::new(Cell::new(Instant(0)));
    let (noted, own) = (woke.clone(), env.clone());
    let clock = simulation.clone();
    env.spawn(Class::Foreground, async move {
        own.sleep(Duration::from_secs(1)).await;
        noted.set(clock.now());
    });
    simulation.pause(host, true);
    let other = simulation.clone();
    let run = simulation.run(async move {
        other.sleep(Duration::from_secs(5)).await;
        other.pause(host, false);
        other.sleep(Duration::from_secs(1)).await;
    });
    assert_eq!(run, Ok(()));
    assert!(woke.get() >= Instant(0) + Duration::from_secs(5));
}

#[test]
fn waiting_for_nothing_is_a_stall() {
    let simulation = Simulation::new(2, Options::default());
    let waiting = simulation.run(std::future::pending::<()>());
    assert_eq!(waiting, Err(Stalled));
}

#[test]
fn instants_of_two_lives_have_nothing_to_do_with_each_other() {
    let simulation = Simulation::new(2, Options::default());
    let host = simulation.add_host(1);
    let before = simulation.env(host, ShardId(0)).now();
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let after = simulation.env(host, ShardId(0)).now();
    assert_ne!(before, after);
}

#[test]
fn civil_time_may_pass_on_every_host_while_nothing_else_happens() {
    let simulation = Simulation::new(5, Options::default());
    let hosts = [simulation.add_host(1), simulation.add_host(1)];
    let walls = || hosts.map(|host| simulation.env(host, ShardId(0)).wall().millis());
    let (before, now) = (walls(), simulation.now());
    simulation.pass_civil_time(Duration::from_secs(7200));
    assert_eq!(walls(), before.map(|millis| millis + 7_200_000));
    assert_eq!(simulation.now(), now);
}

#[test]
fn clocks_of_hosts_err_on_their_own() {
    let simulation = Simulation::new(2, Options::default());
    let (a, b) = (simulation.add_host(1), simulation.add_host(1));
    simulation.set_clock(a, -5_000_000, 0);
    let wall = |host| simulation.env(host, ShardId(0)).wall().0;
    assert_eq!(wall(b) - wall(a), 5_000_000);
}

struct Count(u32);

impl Job for Count {
    type Output = u32;

    async fn run<D: Disk>(self, disk: D) -> u32 {
        let mut steps = 0;
        for _ in 0..self.0 {
            disk.give_way().await;
            steps += 1;
        }
        steps
    }
}

#[test]
fn a_job_runs_even_where_background_work_is_starved() {
    let simulation = Simulation::new(2, Options::default());
    let host = simulation.add_host(1);
    let job = |class| {
        let run = async move |env: SimEnv| {
            let start = env.now();
            assert_eq!(env.background(class, Count(100)).await, 100);
            env.now() - start
        };
        simulation.run_on(host, ShardId(0), run).unwrap()
    };
    let calm = job(JobClass::Compaction);
    simulation.starve_background(host, true);
    let starved = job(JobClass::Compaction);
    assert!(starved > calm * 10, "{starved:?}, {calm:?}");
    assert!(job(JobClass::Flush) < starved);
}

#[test]
fn every_order_of_two_tasks_occurs() {
    let orders = Rc::new(RefCell::new(std::collections::BTreeSet::new()));
    for seed in 0..50 {
        let seen = orders.clone();
        torc_sim::run(seed, async move |env| {
            let order = Rc::new(RefCell::new(String::new()));
            for name in ['a', 'b', 'c'] {
                let order = order.clone();
                env.spawn(
                    Class::Foreground,
                    async move { order.borrow_mut().push(name) },
                );
            }
            env.sleep(Duration::from_millis(1)).await;
            seen.borrow_mut().insert(order.borrow().clone());
        });
    }
    assert_eq!(orders.borrow().len(), 6);
}
