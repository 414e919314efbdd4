//! The probe against the kernel: real packets through a node that rewrites them.

mod filter;
mod frames;
mod lifecycle;
mod loss;
mod path;
mod programs;
mod refusal;
mod routes;
mod world;
