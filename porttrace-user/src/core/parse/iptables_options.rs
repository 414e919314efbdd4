//! The words of one `-m NAME …` block, and the values that stand in them.

use crate::core::model::flow::Family;
use crate::core::model::rules::Net;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A word of a rule and its place in the line.
#[derive(Clone, Copy)]
pub(super) struct Word<'a> {
    pub text: &'a str,
    pub start: usize,
    pub end: usize,
}

/// Walks over the options of a block.
pub(super) struct Options<'b, 'a> {
    words: &'b [Word<'a>],
    at: usize,
}

/// `! --name`, and where it starts.
pub(super) struct Opt<'a> {
    pub name: &'a str,
    pub negated: bool,
    pub start: usize,
}

impl<'b, 'a> Options<'b, 'a> {
    pub(super) const fn new(words: &'b [Word<'a>]) -> Self {
        Self { words, at: 0 }
    }

    pub(super) fn option(&mut self) -> Option<Opt<'a>> {
        let mut word = *self.words.get(self.at)?;
        let start = word.start;
        let negated = word.text == "!";
        if negated {
            self.at += 1;
            word = *self.words.get(self.at)?;
        }
        self.at += 1;
        Some(Opt { name: word.text, negated, start })
    }

    /// The option's value. A `!` before it (the spelling of old iptables) is skipped and sets `negated`.
    pub(super) fn value(&mut self, option: &mut Opt<'_>) -> &'a str {
        if self.peek() == Some("!") {
            option.negated = true;
            self.at += 1;
        }
        let word = self.words.get(self.at).map_or("", |word| word.text);
        self.at += 1;
        word
    }

    pub(super) fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).map(|word| word.text)
    }

    /// Skips the values of an option that is not known.
    pub(super) fn skip_values(&mut self) {
        while self.peek().is_some_and(|word| !word.starts_with('-') && word != "!") {
            self.at += 1;
        }
    }

    /// End of the word that was read last.
    pub(super) fn end(&self) -> usize {
        self.words.get(self.at.min(self.words.len()).wrapping_sub(1)).map_or(0, |word| word.end)
    }
}

/// `10.0.0.0/8`, `10.0.0.0/255.0.255.0`, `fd00::/8`, a bare address. `None` for anything else and for the other family.
pub(super) fn net(text: &str, family: Family) -> Option<Net> {
    let (address, mask) = text.split_once('/').map_or((text, None), |(address, mask)| (address, Some(mask)));
    match family {
        Family::V4 => {
            let address = address.parse::<Ipv4Addr>().ok()?.to_bits();
            let mask = mask.map_or(Some(u32::MAX), |mask| match mask.parse::<u8>() {
                Ok(prefix @ 0..=32) => Some(u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)),
                Ok(_) => None,
                Err(_) => mask.parse().ok().map(Ipv4Addr::to_bits),
            })?;
            Some(Net::V4 { addr: address & mask, mask })
        }
        Family::V6 => {
            let address = address.parse::<Ipv6Addr>().ok()?.to_bits();
            let mask = mask.map_or(Some(u128::MAX), |mask| match mask.parse::<u8>() {
                Ok(prefix @ 0..=128) => Some(u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)),
                Ok(_) => None,
                Err(_) => mask.parse().ok().map(Ipv6Addr::to_bits),
            })?;
            Some(Net::V6(Box::new((address & mask, mask))))
        }
    }
}

/// `80`, `80:90`, `:90`, `80:`, and the names that iptables itself would have turned into numbers are not accepted.
pub(super) fn range(text: &str, separator: char) -> Option<(u16, u16)> {
    match text.split_once(separator) {
        None => text.parse().ok().map(|port| (port, port)),
        Some((low, high)) => {
            let low = if low.is_empty() { 0 } else { low.parse().ok()? };
            let high = if high.is_empty() { u16::MAX } else { high.parse().ok()? };
            Some((low, high))
        }
    }
}

/// `0x4000`, `16384`.
pub(super) fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `value` or `value/mask`.
pub(super) fn masked(text: &str) -> Option<(u32, u32)> {
    match text.split_once('/') {
        None => number(text).map(|value| (value, u32::MAX)),
        Some((value, mask)) => number(value).zip(number(mask)),
    }
}
