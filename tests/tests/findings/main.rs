//! Findings held against the network: each situation is made in the lab, real clients meet it, `porttrace explain` must name it and
//! nothing else, and after doing what the finding says the same clients are served and it is gone.

mod bridges;
mod ebpf;
mod hostports;
mod node;
mod objects;
mod replies;
mod services;
mod stage;
mod tables;
