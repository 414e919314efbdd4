//! The probe against the kernel: real packets through a node that rewrites them.

mod filter;
mod frames;
mod lifecycle;
mod loss;
mod path;
mod refusal;
mod world;
