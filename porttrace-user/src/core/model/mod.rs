//! The words everything else speaks: packets and tuples, traces, events.

pub mod event;
pub mod flow;
pub mod interfaces;
pub mod rules;
pub mod state;
pub mod trace;
