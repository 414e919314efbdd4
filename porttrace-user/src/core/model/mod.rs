//! The words everything else speaks: packets and tuples, traces, events.

pub mod cluster;
pub mod dump;
pub mod event;
pub mod facts;
pub mod flow;
pub mod hops;
pub mod interfaces;
pub mod name;
pub mod native;
pub mod place;
pub mod pods;
pub mod rules;
mod sets;
pub mod state;
pub mod steps;
mod targets;
pub mod trace;
pub mod workloads;
