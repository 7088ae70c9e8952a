//! Nodes that come back with another number of shards: what `net/src/redistribute.rs` does in the real world.
//!
//! The real node redistributes and serves in one life. Here it takes two, since a life has as many shards as it
//! began with; between them the power is cut, because the new stores are promised to be durable by then. Which layout is
//! in force, which the real node keeps in its identity file, is kept here.

use std::path::Path;
use std::rc::Rc;

use torc_cluster::redistribute::{carry_over, is_divided};
use torc_engine::layout::is_store;
use torc_engine::{Layout, redistribute, remove_all};
use torc_env::{Class, Disk, Env, ShardId};
use torc_sim::{HostId, PowerCut, SimEnv};

use super::{Cluster, Running};
use crate::nemesis::Comeback;

impl Cluster {
    /// How a host's data is divided.
    pub(super) fn layout(&self, host: HostId) -> Layout {
        self.layouts.borrow()[usize::from(host.0)]
    }

    /// The shards of a host's node: as many as its data is divided among.
    pub(super) fn shards(&self, host: HostId) -> impl Iterator<Item = ShardId> + use<> {
        self.layout(host).shards()
    }

    /// Tells a host's node to close its stores and end, and its operator to configure other shards. Nothing, when
    /// it has never started.
    pub(crate) fn stop(self: &Rc<Self>, host: HostId, comeback: &Comeback) {
        let index = usize::from(host.0);
        let boot = self.boots.borrow()[index];
        if boot == 0 {
            return;
        }
        self.wanted.borrow_mut()[index] = comeback.shards;
        self.stopping.borrow_mut()[index] = Some(boot);
        let running: Option<Vec<Running>> = self
            .shards(host)
            .map(|shard| self.shard(host, shard))
            .collect();
        let Some(running) = running.filter(|_| comeback.is_clean) else {
            return self.simulation.crash(host, comeback.variant);
        };
        let (simulation, variant) = (self.simulation.clone(), comeback.variant);
        self.simulation
            .env(host, ShardId(0))
            .spawn(Class::Control, async move {
                for running in running {
                    // One that is shut already has nothing to close.
                    drop(running.store.close().await);
                }
                simulation.crash(host, variant);
            });
    }

    /// Kills a node that was told to stop and has not, and starts the host. What it finds to do first may be cut off.
    pub(crate) fn come_back(self: &Rc<Self>, host: HostId, comeback: &Comeback) {
        let index = usize::from(host.0);
        let Some(boot) = self.stopping.borrow_mut()[index].take() else {
            return;
        };
        if self.boots.borrow()[index] == boot {
            self.simulation.crash(host, comeback.variant);
        }
        if self.simulation.is_up(host) {
            return;
        }
        self.start(host);
        if let Some(operations) = comeback.cut_after {
            let operation = self.simulation.disk_operations(host) + operations;
            let variant = comeback.variant;
            self.simulation
                .cut_power(host, PowerCut { operation, variant });
        }
    }

    /// Whether the next start of a host has to divide its data anew.
    pub(super) fn is_to_be_divided(&self, host: HostId) -> bool {
        self.layout(host).shards != self.wanted.borrow()[usize::from(host.0)]
    }

    /// Divides a host's data among the shards that are wanted, and starts its node.
    pub(super) fn divide_and_start(self: &Rc<Self>, host: HostId) {
        self.simulation.restart(host, 1);
        self.running.borrow_mut()[usize::from(host.0)].clear();
        let env = self.simulation.env(host, ShardId(0));
        let cluster = self.clone();
        let sound = self.sound(host);
        env.clone().spawn(Class::Control, async move {
            match cluster.divide(host, &env).await {
                Ok(layout) => {
                    cluster.layouts.borrow_mut()[usize::from(host.0)] = layout;
                    let note = format_args!("host {} has layout {layout:?}", host.0);
                    cluster.simulation.note(note);
                    let variant = u32::try_from(env.random() % 7).unwrap_or(0);
                    cluster.simulation.crash(host, variant);
                    cluster.start(host);
                }
                Err(trouble) => {
                    let trouble = format!("host {}: redistribution: {trouble}", host.0);
                    cluster.end_after(host, sound, trouble);
                }
            }
        });
    }

    async fn divide(&self, host: HostId, env: &SimEnv) -> Result<Layout, String> {
        self.remove_other_layouts(host, env).await?;
        let from = self.layout(host);
        let to = Layout {
            number: from.number + 1,
            shards: self.wanted.borrow()[usize::from(host.0)],
        };
        let options = |layout, shard| self.store_options(host, layout, shard);
        let stores = redistribute(env, from, to, options, is_divided).await;
        let stores = stores.map_err(|error| error.to_string())?;
        let carried = carry_over(env, &stores).await;
        carried.map_err(|error| error.to_string())?;
        stores.finish().await.map_err(|error| error.to_string())?;
        Ok(to)
    }

    /// Removes what a redistribution has left, whether it took force or not.
    pub(super) async fn remove_other_layouts(
        &self,
        host: HostId,
        env: &SimEnv,
    ) -> Result<(), String> {
        let layout = self.layout(host);
        let remove = async {
            let disk = env.disk();
            for entry in disk.list(Path::new("")).await? {
                if is_store(&entry.name) && !layout.holds(&entry.name) {
                    remove_all(disk, Path::new(&entry.name)).await?;
                }
            }
            Ok(())
        };
        let removed: std::io::Result<()> = remove.await;
        removed.map_err(|error| format!("old stores: {error}"))
    }
}
