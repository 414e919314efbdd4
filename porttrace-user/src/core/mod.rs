//! The pure core: values in, values out. No I/O, no async, no clock, no randomness.

pub mod correlate;
pub mod diagnose;
pub mod doctor;
pub mod explain;
pub mod kube;
pub mod matrix;
pub mod model;
pub mod near_miss;
pub mod parse;
pub mod ports;
pub mod quantity;
pub mod reach;
pub mod simulate;
pub mod world;
