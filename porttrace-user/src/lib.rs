//! Why a packet to a Kubernetes port does or does not arrive: the library behind the `porttrace` command.

pub mod collect;
pub mod core;
pub mod render;
