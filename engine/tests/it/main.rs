//! The store as a whole, in the simulated world.

mod faults;
mod model;
mod power;
mod store;
mod support;
