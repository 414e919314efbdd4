//! Text that is cloned often: names of chains, interfaces, Services. A clone never copies the characters.

use arcstr::ArcStr;
use serde::{Serialize, Serializer};
use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

/// A short text that many values share: a table, a chain, an interface. As large as a pointer.
#[derive(Clone, Default)]
pub struct Name(ArcStr);

/// A [`Name`] of a literal, which nobody counts.
macro_rules! name {
    ($text:literal) => {
        $crate::core::model::name::Name::literal(arcstr::literal!($text))
    };
}
pub(crate) use name;

impl Name {
    /// For the macro of the same name.
    pub const fn literal(text: ArcStr) -> Self {
        Self(text)
    }

    pub fn as_str(&self) -> &str {
        self
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for Name {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Name {}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        **self == *other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        **self == **other
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_equal_by_what_they_say() {
        assert_eq!(Name::from("nat"), name!("nat"));
        assert_eq!(format!("{:>5}|{:?}", name!("nat"), Name::from("nat")), "  nat|\"nat\"");
        assert_eq!(size_of::<Option<Name>>(), size_of::<usize>());
    }
}
