//! Starting and stopping: one thread a shard, all of one node.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use torc_env::{Class, Env, ShardId};

use crate::background::Background;
use crate::config::RuntimeConfig;
use crate::doorbell::Doorbell;
use crate::env::RealEnv;
use crate::executor::{Executor, Foreign};
use crate::handle::{Refused, ShardHandle};
use crate::limits;
use crate::mesh::{self, Mesh};
use crate::probe::ProbeError;
use crate::random::Random;
use crate::reactor::Reactor;
use crate::reclaim::Reclaim;
use crate::shard::{self, CONTROL_MESSAGES_MAX, Core, Root, ShardEnds, Shared};
use crate::spin::Spin;
use crate::sys;

/// Why a runtime did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// This host's io_uring is not good enough.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The data directory cannot be used.
    #[error("the data directory {path} cannot be used: {source}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The operating system refused a thread, a descriptor, or randomness.
    #[error("the operating system refused {what}: {source}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

/// The running shards of a node.
pub struct Runtime {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Runtime {
    /// Starts the shards and runs `main` on each, as a task of the control class. A shard runs until
    /// the runtime is stopped, whether `main` has ended or not.
    pub fn start<F, M>(config: &RuntimeConfig, main: F) -> Result<Runtime, StartError>
    where
        F: Fn(ShardHandle) -> M + Clone + Send + 'static,
        M: Future<Output = ()> + 'static,
    {
        assert!(config.shards > 0, "a node has at least one shard");
        prepare_host(config)?;
        let foreign = (0..config.shards)
            .map(|_| Ok(Arc::new(Foreign::new(Doorbell::new()?))))
            .collect::<io::Result<Vec<_>>>()
            .map_err(refused("an eventfd"))?;
        let meshes = mesh::build(&foreign);
        let shared = Arc::new(Shared {
            shards: foreign
                .into_iter()
                .map(|foreign| ShardEnds {
                    foreign,
                    control: ArrayQueue::new(CONTROL_MESSAGES_MAX),
                })
                .collect(),
            stopping: AtomicBool::new(false),
            background: Background::new(config),
            reclaim: Arc::new(Reclaim::new()),
        });
        let mut runtime = Runtime {
            shared,
            threads: Vec::with_capacity(meshes.len()),
        };
        let (started, starts) = mpsc::channel();
        let cores = cores_to_pin(config);
        for (shard, mesh) in (0..).map(ShardId).zip(meshes) {
            let birth = Birth {
                config: config.clone(),
                shard,
                mesh,
                shared: Arc::clone(&runtime.shared),
                core: cores.get(usize::from(shard.0)).copied(),
            };
            let (main, started) = (main.clone(), started.clone());
            let thread = std::thread::Builder::new()
                .name(format!("shard-{shard}"))
                .spawn(move || live(birth, main, started))
                .map_err(refused("a thread"))?;
            runtime.threads.push(thread);
        }
        drop(started);
        // Dropping `runtime` on the way out stops the shards that did start.
        starts.into_iter().collect::<Result<(), StartError>>()?;
        Ok(runtime)
    }

    /// Runs `main` on a runtime of one shard, here and now, and returns its result: for tools and
    /// tests.
    pub fn block_on<F, M, T>(config: &RuntimeConfig, main: F) -> Result<T, StartError>
    where
        F: Fn(ShardHandle) -> M + Clone + Send + 'static,
        M: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, result) = mpsc::channel();
        let runtime = Runtime::start(config, move |handle: ShardHandle| {
            let (main, sender) = (main.clone(), sender.clone());
            async move {
                let value = main(handle.clone()).await;
                // The receiver waits until every sender is gone, so this arrives.
                drop(sender.send(value));
                handle.stop_all();
            }
        })?;
        runtime.wait();
        Ok(result
            .recv()
            .expect("a shard ends by its main's end or by a panic, which `wait` passes on"))
    }

    /// Runs `message` on a shard, soon; see [`ShardHandle::run_on`].
    pub fn run_on(
        &self,
        shard: ShardId,
        message: impl FnOnce(&ShardHandle) + Send + 'static,
    ) -> Result<(), Refused> {
        self.handle().run_on(shard, message)
    }

    /// A handle for other threads, such as the one that waits for signals.
    pub fn handle(&self) -> RuntimeHandle {
        RuntimeHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Waits until the shards have ended: after [`ShardHandle::stop_all`], or by a panic, which is
    /// passed on.
    pub fn wait(mut self) {
        let threads = std::mem::take(&mut self.threads);
        let panics = threads.into_iter().filter_map(|thread| thread.join().err());
        if let Some(panic) = panics.last() {
            resume_unwind(panic);
        }
    }

    /// Drops every task, waits for the operations in flight, and ends the threads. Whoever wants to
    /// end gracefully does that first.
    pub fn stop(self) {
        self.shared.stop();
        self.wait();
    }
}

/// A runtime, from outside: for the threads that are no shards. Outlives the shards harmlessly.
#[derive(Clone)]
pub struct RuntimeHandle {
    shared: Arc<Shared>,
}

impl RuntimeHandle {
    /// Runs `message` on a shard, soon; see [`ShardHandle::run_on`].
    pub fn run_on(
        &self,
        shard: ShardId,
        message: impl FnOnce(&ShardHandle) + Send + 'static,
    ) -> Result<(), Refused> {
        self.shared
            .send(shard, Box::new(message))
            .map_err(Refused::new)
    }

    /// Ends every shard at once; [`Runtime::wait`] then returns.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a shard panicked");
            }
        }
        self.shared.background.stop();
        self.shared.reclaim.stop();
    }
}

/// What the operating system refused.
fn refused(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |source| StartError::System { what, source }
}

fn prepare_host(config: &RuntimeConfig) -> Result<(), StartError> {
    match limits::raise() {
        Ok(limits) => limits
            .advice()
            .iter()
            .for_each(|advice| tracing::warn!("{advice}")),
        Err(error) => tracing::warn!("resource limits are unknown: {error}"),
    }
    // The first touch of a huge page zeroes 2 MiB while requests wait (docs/decisions/0010).
    if let Err(error) = sys::forbid_huge_pages() {
        tracing::warn!("huge pages cannot be kept out, requests may wait for them: {error}");
    }
    std::fs::create_dir_all(&config.data_dir).map_err(|source| StartError::DataDir {
        path: config.data_dir.clone(),
        source,
    })
}

/// The cores for shards 0, 1, …; empty when shards are not pinned.
fn cores_to_pin(config: &RuntimeConfig) -> Vec<core_affinity::CoreId> {
    if !config.pin {
        return Vec::new();
    }
    let mut cores = core_affinity::get_core_ids().unwrap_or_default();
    cores.drain(..config.first_core.min(cores.len()));
    if cores.len() < usize::from(config.shards) {
        tracing::info!(
            shards = config.shards,
            cores = cores.len(),
            "more shards than cores: not pinned, no spinning"
        );
        return Vec::new();
    }
    cores
}

/// What a shard's thread starts from.
struct Birth {
    config: RuntimeConfig,
    shard: ShardId,
    mesh: Mesh,
    shared: Arc<Shared>,
    core: Option<core_affinity::CoreId>,
}

/// The thread of a shard, from start to end.
fn live<F, M>(birth: Birth, main: F, started: mpsc::Sender<Result<(), StartError>>)
where
    F: Fn(ShardHandle) -> M,
    M: Future<Output = ()> + 'static,
{
    let shared = Arc::clone(&birth.shared);
    let env = match assemble(birth) {
        Ok(core) => RealEnv::new(Rc::new(core)),
        Err(error) => {
            // `Runtime::start` waits for every shard, so this arrives.
            drop(started.send(Err(error)));
            return;
        }
    };
    drop(started.send(Ok(())));
    // `Runtime::start` waits until every sender is gone.
    drop(started);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        env.spawn(Class::Control, main(ShardHandle::new(env.clone())));
        shard::run(&env);
    }));
    // A node with a dead shard is no node: the others end as well.
    shared.stop();
    shard::end(&env);
    if let Err(panic) = ended {
        resume_unwind(panic);
    }
}

fn assemble(birth: Birth) -> Result<Core, StartError> {
    let Birth {
        config,
        shard,
        mesh,
        shared,
        core,
    } = birth;
    let all_cpus = sys::affinity().map_err(refused("its CPU affinity"))?;
    let pinned = core.is_some_and(core_affinity::set_for_current);
    let foreign = Arc::clone(&shared.shards[usize::from(shard.0)].foreign);
    let reactor = Reactor::new(config.ring_entries, Arc::clone(&foreign))?;
    if pinned && let Err(error) = reactor.set_worker_affinity(&all_cpus) {
        tracing::warn!("the kernel's I/O workers stay on the shard's core: {error}");
    }
    let root = Root::open(&config.data_dir).map_err(|source| StartError::DataDir {
        path: config.data_dir.clone(),
        source,
    })?;
    Ok(Core {
        executor: Executor::new(foreign),
        reactor: RefCell::new(reactor),
        timers: RefCell::default(),
        calls: Rc::default(),
        mesh,
        random: Random::from_system().map_err(refused("randomness"))?,
        node: config.node,
        shard,
        shared,
        root,
        handler: RefCell::default(),
        remote: RefCell::default(),
        spin: Spin::new(if pinned { config.spin } else { Duration::ZERO }),
        arrivals: RefCell::default(),
    })
}
