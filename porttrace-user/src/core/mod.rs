//! The pure core: values in, values out. No I/O, no async, no clock, no randomness.

pub mod correlate;
pub mod doctor;
pub mod kube;
pub mod model;
pub mod near_miss;
pub mod parse;
pub mod simulate;
