//! Seeds that must hold. `TORC_SIM_SEEDS=FIRST..END` runs others than the fixed ones: see
//! `docs/simulation.md`.

#[cfg(mutations)]
mod mutations;
mod pool;
#[cfg(not(mutations))]
mod seeds;
