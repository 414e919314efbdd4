//! Ways to spoil real data.

use proptest::collection::vec;
use proptest::prelude::*;

/// One way to spoil bytes; positions are fractions of the length.
#[derive(Clone, Debug)]
pub enum Damage {
    Delete(f64, usize),
    Insert(f64, Vec<u8>),
    Overwrite(f64, u8),
    Cut(f64),
    Repeat(f64, usize),
    /// Flips one bit.
    Flip(f64, u8),
    /// Deletes the line there, or says it twice.
    Line(f64, bool),
}

impl Damage {
    pub fn apply(&self, bytes: &mut Vec<u8>) {
        let at = |place: &f64| ((bytes.len() as f64) * place) as usize;
        match self {
            Self::Delete(place, length) => {
                let start = at(place);
                bytes.drain(start..(start + length).min(bytes.len()));
            }
            Self::Insert(place, new) => {
                let start = at(place);
                bytes.splice(start..start, new.iter().copied());
            }
            Self::Overwrite(place, byte) => {
                let start = at(place);
                if let Some(old) = bytes.get_mut(start) {
                    *old = *byte;
                }
            }
            Self::Cut(place) => bytes.truncate(at(place)),
            Self::Repeat(place, length) => {
                let start = at(place);
                let piece = bytes[start..(start + length).min(bytes.len())].to_vec();
                bytes.splice(start..start, piece);
            }
            Self::Flip(place, bit) => {
                let start = at(place);
                if let Some(byte) = bytes.get_mut(start) {
                    *byte ^= 1 << bit;
                }
            }
            Self::Line(place, twice) => {
                let middle = at(place);
                let start = bytes[..middle].iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
                let end =
                    bytes[middle..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |end| middle + end + 1);
                let line: Vec<u8> = bytes.drain(start..end).collect();
                if *twice {
                    bytes.splice(start..start, [line.as_slice(), &line].concat());
                }
            }
        }
    }
}

/// Some of them, one after the other.
pub fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let words = prop::sample::select(vec![
        "\"",
        "-1",
        "99999999999999999999",
        "\r\n",
        "\0",
        "\u{fffd}",
        "[[[[",
        "{}",
        "null",
        "-A",
        " --",
        "!",
        "=",
        "/",
        ":",
        "0x",
        "255.255.255.256",
        "::",
        "%",
        ",",
        "[UNREPLIED]",
        "src=",
        "é",
    ]);
    let new = prop_oneof![vec(any::<u8>(), 0..8), words.prop_map(|word| word.as_bytes().to_vec())];
    let one = prop_oneof![
        (0.0..1.0, 0usize..40).prop_map(|(place, length)| Damage::Delete(place, length)),
        (0.0..1.0, new).prop_map(|(place, new)| Damage::Insert(place, new)),
        (0.0..1.0, any::<u8>()).prop_map(|(place, byte)| Damage::Overwrite(place, byte)),
        (0.0..1.0).prop_map(Damage::Cut),
        (0.0..1.0, 0usize..200).prop_map(|(place, length)| Damage::Repeat(place, length)),
        (0.0..1.0, 0u8..8).prop_map(|(place, bit)| Damage::Flip(place, bit)),
        (0.0..1.0, any::<bool>()).prop_map(|(place, twice)| Damage::Line(place, twice)),
    ];
    vec(one, 1..6)
}
