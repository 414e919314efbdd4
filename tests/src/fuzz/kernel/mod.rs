//! The kernel's side: a router and its neighbours as network namespaces, packets on the wire, and what became of them.

pub mod legacy;
pub mod live;
pub mod path;
pub mod router;
pub mod send;
pub mod trace;
pub mod wire;
