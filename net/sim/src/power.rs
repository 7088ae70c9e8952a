//! Exhaustive power cuts: a workload is cut at each of its disk operations in turn, in several
//! ways, and what is found after reopening is checked.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;

use torc_env::ShardId;

use crate::{HostId, Options, PowerCut, SimEnv, Simulation};

/// Which cuts to make.
#[derive(Clone, Debug)]
pub struct Cuts {
    /// Seed of the world and of what survives.
    pub seed: u64,
    /// The world.
    pub options: Options,
    /// Cut at every `stride`-th operation; 1 for all.
    pub stride: u64,
    /// Ways to cut at each operation; see [`PowerCut::variant`].
    pub variants: u32,
    /// Whether power is also cut, once, at each operation of the recovery.
    pub cut_recovery: bool,
}

impl Default for Cuts {
    fn default() -> Self {
        Self {
            seed: 1,
            options: Options::default(),
            stride: 1,
            variants: 5,
            cut_recovery: false,
        }
    }
}

/// Runs `workload` once for every disk operation and variant, cuts the power there, restarts the
/// host and runs `check` over what the disk holds. Both get the same fresh `T`, in which the workload
/// notes what it was promised. Ends with a run that no cut interrupted, and returns the number of
/// images that were checked.
///
/// # Panics
/// When `check` panics; a line on standard error says which cut it was.
pub fn at_every_power_cut<T, W, C>(
    cuts: &Cuts,
    workload: impl Fn(SimEnv, Rc<RefCell<T>>) -> W,
    check: impl Fn(SimEnv, Rc<RefCell<T>>) -> C,
) -> u64
where
    T: Default + 'static,
    W: Future<Output = ()> + 'static,
    C: Future<Output = ()> + 'static,
{
    let mut images = 0;
    let mut operation = 0;
    loop {
        let mut was_cut = false;
        for variant in 0..cuts.variants {
            let cut = PowerCut { operation, variant };
            let image = Image::after(cuts, cut, &workload);
            was_cut = image.was_cut;
            images += image.check(cuts, &workload, &check);
            if !was_cut {
                break;
            }
        }
        if !was_cut {
            return images;
        }
        operation += cuts.stride.max(1);
    }
}

/// A disk after a workload, cut or not, and what the workload was promised.
struct Image<T> {
    simulation: Simulation,
    host: HostId,
    cut: PowerCut,
    promised: Rc<RefCell<T>>,
    was_cut: bool,
}

/// Says where it happened when a check panics.
struct Guard(u64, PowerCut, Option<PowerCut>);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "after a power cut: seed {}, {:?}, during recovery: {:?}",
                self.0, self.1, self.2
            );
        }
    }
}

impl<T: Default + 'static> Image<T> {
    fn after<W: Future<Output = ()> + 'static>(
        cuts: &Cuts,
        cut: PowerCut,
        workload: &impl Fn(SimEnv, Rc<RefCell<T>>) -> W,
    ) -> Self {
        let _guard = Guard(cuts.seed, cut, None);
        let simulation = Simulation::new(cuts.seed, cuts.options.clone());
        let host = simulation.add_host(1);
        simulation.cut_power(host, cut);
        let promised = Rc::new(RefCell::new(T::default()));
        let noted = promised.clone();
        let done = simulation.run_on(host, ShardId(0), |env| workload(env, noted));
        let was_cut = done.is_none();
        if !was_cut {
            simulation.crash(host, cut.variant);
        }
        simulation.restart(host, 1);
        Self {
            simulation,
            host,
            cut,
            promised,
            was_cut,
        }
    }

    fn check<W, C>(
        self,
        cuts: &Cuts,
        workload: &impl Fn(SimEnv, Rc<RefCell<T>>) -> W,
        check: &impl Fn(SimEnv, Rc<RefCell<T>>) -> C,
    ) -> u64
    where
        W: Future<Output = ()> + 'static,
        C: Future<Output = ()> + 'static,
    {
        let mut images = 1;
        let first = self.simulation.disk_operations(self.host);
        self.reopen(cuts, None, check);
        let operations = self.simulation.disk_operations(self.host) - first;
        if cuts.cut_recovery {
            for operation in first..first + operations {
                let again = PowerCut {
                    operation,
                    variant: 3 + self.cut.variant,
                };
                Image::after(cuts, self.cut, workload).reopen(cuts, Some(again), check);
                images += 1;
            }
        }
        images
    }

    fn reopen<C: Future<Output = ()> + 'static>(
        &self,
        cuts: &Cuts,
        cut: Option<PowerCut>,
        check: &impl Fn(SimEnv, Rc<RefCell<T>>) -> C,
    ) {
        let _guard = Guard(cuts.seed, self.cut, cut);
        if let Some(cut) = cut {
            self.simulation.cut_power(self.host, cut);
        }
        let run = || {
            self.simulation.run_on(self.host, ShardId(0), |env| {
                check(env, self.promised.clone())
            })
        };
        if run().is_none() {
            self.simulation.restart(self.host, 1);
            run().expect("power is cut once during recovery");
        }
    }
}
