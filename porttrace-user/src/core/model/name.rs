//! Text that is cloned often: names of chains and interfaces, lines of a dump. A clone never copies the characters.

use serde::{Serialize, Serializer};
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A short text that many values share: a table, a chain, an interface.
#[derive(Clone)]
pub enum Name {
    Static(&'static str),
    Shared(Arc<str>),
    /// A large text, taken over as it is.
    Whole(Arc<String>),
}

impl Name {
    pub fn as_str(&self) -> &str {
        self
    }

    /// Shares a large text without copying it.
    pub fn whole(text: String) -> Self {
        Self::Whole(Arc::new(text))
    }
}

impl Default for Name {
    fn default() -> Self {
        Self::Static("")
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        Self::Shared(text.into())
    }
}

impl From<String> for Name {
    fn from(text: String) -> Self {
        Self::Shared(text.into())
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Static(text) => text,
            Self::Shared(text) => text,
            Self::Whole(text) => text,
        }
    }
}

/// A piece of a larger text (one line of a dump) that keeps the whole alive instead of copying the piece.
#[derive(Clone, Default)]
pub struct Text {
    whole: Name,
    start: u32,
    len: u32,
}

impl Text {
    /// The bytes `start..start + len` of `whole`; empty when that is not a piece of it.
    pub fn of(whole: &Name, start: usize, len: usize) -> Self {
        match (u32::try_from(start), u32::try_from(len)) {
            (Ok(start), Ok(len)) => Self { whole: whole.clone(), start, len },
            _ => Self::default(),
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::of(&Name::from(text), 0, text.len())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        let start = self.start as usize;
        self.whole.get(start..start + self.len as usize).unwrap_or("")
    }
}

/// Both are compared, hashed and printed as the text that they stand for.
macro_rules! as_text {
    ($($kind:ty),*) => {$(
        impl PartialEq for $kind {
            fn eq(&self, other: &Self) -> bool {
                **self == **other
            }
        }

        impl Eq for $kind {}

        impl PartialEq<str> for $kind {
            fn eq(&self, other: &str) -> bool {
                **self == *other
            }
        }

        impl PartialEq<&str> for $kind {
            fn eq(&self, other: &&str) -> bool {
                **self == **other
            }
        }

        impl PartialOrd for $kind {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $kind {
            fn cmp(&self, other: &Self) -> Ordering {
                (**self).cmp(&**other)
            }
        }

        impl Hash for $kind {
            fn hash<H: Hasher>(&self, state: &mut H) {
                (**self).hash(state);
            }
        }

        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self)
            }
        }

        impl fmt::Debug for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&**self, f)
            }
        }

        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self)
            }
        }
    )*};
}

as_text!(Name, Text);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_a_piece_of_its_whole() {
        let whole = Name::from("first\nsecond\n");
        let line = Text::of(&whole, 6, 6);
        assert_eq!(line, "second");
        assert_eq!(Text::of(&whole, 6, 600), "");
    }

    #[test]
    fn names_are_equal_by_what_they_say() {
        assert_eq!(Name::from("nat"), Name::Static("nat"));
        assert_eq!(format!("{:>5}|{:?}", Name::Static("nat"), Text::from("nat")), "  nat|\"nat\"");
    }
}
