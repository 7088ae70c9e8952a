//! Seeds that must hold. `TORC_SIM_SEEDS=FIRST..END` runs others than the fixed ones: see
//! `docs/simulation.md`.

mod pool;
mod seeds;
