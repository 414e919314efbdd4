//! The kernel as a witness: what conntrack reported, and which rules the kernel itself says a packet hit.

pub mod conntrack;
mod headers;
mod nflog;
mod nftrace;
pub mod trace;
