//! Tests of the runtime on the real kernel: real rings, files and sockets.

#[cfg(test)]
mod background;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod mesh;
#[cfg(test)]
mod net;
#[cfg(test)]
mod support;
#[cfg(test)]
mod tasks;
