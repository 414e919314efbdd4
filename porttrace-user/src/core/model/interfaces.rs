//! Names of interfaces by index, kept after an interface is gone.

use std::collections::BTreeMap;

/// What is known of the node's interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    known: BTreeMap<u32, Interface>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub loopback: bool,
}

impl Interfaces {
    pub fn insert(&mut self, index: u32, name: impl Into<String>, loopback: bool) {
        self.known.insert(index, Interface { name: name.into(), loopback });
    }

    /// The interface's name, or `if42` for an index that was never announced.
    pub fn name(&self, index: u32) -> String {
        self.known.get(&index).map_or_else(|| format!("if{index}"), |interface| interface.name.clone())
    }

    pub fn is_loopback(&self, index: u32) -> bool {
        self.known.get(&index).is_some_and(|interface| interface.loopback)
    }

    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}
