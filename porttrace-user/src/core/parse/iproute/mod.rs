//! The JSON of iproute2: `ip -j route|rule|addr|neigh`, `ip -d -j link`, `bridge -d -j link`.
//!
//! Each shape is written as well as read: what netlink told is kept in snapshots in the form that the tools print.

mod link;
mod route;
mod rule;

pub use link::{addresses, apply_bridge_links, links, neighbours, write_addresses, write_links, write_neighbours};
pub use route::{routes, write_routes};
pub use rule::{policy, write_policy};

use super::notes::{Notes, quote};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads a JSON array and turns each element into a value; elements that cannot be turned are noted and left out.
/// `None` when the text is not a JSON array: half a routing table would predict wrong paths.
fn elements<Raw: DeserializeOwned, T>(
    text: &str,
    notes: &mut Notes,
    mut turn: impl FnMut(Raw) -> Result<T, String>,
) -> Option<Vec<T>> {
    // The tools print nothing at all when there is nothing to list.
    if text.trim().is_empty() {
        return Some(Vec::new());
    }
    let array: Vec<Value> = match serde_json::from_str(text) {
        Ok(array) => array,
        Err(error) => {
            notes.add(error.line(), format!("not a whole JSON array ({error}); nothing of it is used"));
            return None;
        }
    };
    let mut found = Vec::with_capacity(array.len());
    for (index, element) in array.into_iter().enumerate() {
        // `ip -j` leaves empty objects where it filtered something out.
        if element.as_object().is_some_and(serde_json::Map::is_empty) {
            continue;
        }
        let shown = element.to_string();
        let value = serde_json::from_value(element).map_err(|error| error.to_string()).and_then(&mut turn);
        match value {
            Ok(value) => found.push(value),
            Err(why) => notes.add(0, format!("element {} left out ({why}): {}", index + 1, quote(&shown))),
        }
    }
    Some(found)
}

/// Serialises as one line, as `ip -j` does.
fn to_json<Raw: serde::Serialize>(raw: &[Raw]) -> String {
    // Serialising plain structs with string keys cannot fail.
    let mut text = serde_json::to_string(raw).unwrap_or_default();
    text.push('\n');
    text
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}
