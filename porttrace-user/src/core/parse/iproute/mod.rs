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

/// A TOS byte: a number in hexadecimal, or a name of iproute2's rt_dsfield.
fn tos(text: &str) -> Result<u8, String> {
    // Class and drop precedence (RFC 2597).
    let assured = |digits: &str| match digits.as_bytes() {
        [class @ b'1'..=b'4', drop @ b'1'..=b'3'] => Some((class - b'0') << 5 | (drop - b'0') << 3),
        _ => None,
    };
    let selector = |digit: &str| match digit.as_bytes() {
        [class @ b'0'..=b'7'] => Some((class - b'0') << 5),
        _ => None,
    };
    let named = match text {
        "EF" => Some(0xb8),
        _ => text.strip_prefix("AF").and_then(assured).or_else(|| text.strip_prefix("CS").and_then(selector)),
    };
    let number = || u8::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok();
    named.or_else(number).ok_or_else(|| format!("{text:?} is no TOS"))
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}
