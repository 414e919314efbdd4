//! Printing: for people, for machines. Nothing prints elsewhere.

pub mod doctor;
pub mod explain;
pub mod matrix;
pub mod ports;
pub mod style;
pub mod trace;
pub mod watch;
