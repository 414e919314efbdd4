//! Printing: for people, for machines. Nothing prints elsewhere.

pub mod doctor;
pub mod style;
pub mod trace;
pub mod watch;
