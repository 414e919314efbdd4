//! The kernel's own description of its types (BTF), read only as far as the probe needs it.
//!
//! One pass over the types remembers where each begins and which of the wanted names they define: 5 MB in a few
//! milliseconds. Layout: Documentation/bpf/btf.rst.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};
use thiserror::Error;

const HEADER_MAGIC: u16 = 0xeb9f;

const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const ENUM64: u32 = 19;

/// Anonymous structures are followed this deep.
const NESTING: u32 = 8;

#[derive(Debug, Error)]
pub enum BtfError {
    #[error("cannot read {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("{path} is not BTF as this porttrace knows it: {what}")]
    Format { path: String, what: &'static str },
}

/// A BTF blob, and for a module's split BTF the vmlinux blob that it builds on.
#[derive(Debug)]
pub struct Btf<'base> {
    base: Option<&'base Btf<'base>>,
    data: Vec<u8>,
    strings: usize,
    /// String offsets below this belong to the base.
    first_string: u32,
    first_id: u32,
    /// Where each type begins in `data`, by id minus `first_id`.
    types: Vec<u32>,
    /// Wanted names: kind and name to id.
    named: BTreeMap<(u32, String), u32>,
}

/// One type's fixed part.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    vlen: u32,
    kind_flag: bool,
    /// Size, or the id of the type that it refers to.
    size_or_type: u32,
    /// Where the variable part begins, in the blob that holds the type.
    rest: usize,
}

impl<'base> Btf<'base> {
    /// Reads `path` and remembers the structures, enumerations, functions and typedefs named in `wanted`.
    pub fn read(path: &Path, base: Option<&'base Self>, wanted: &[&str]) -> Result<Self, BtfError> {
        let shown = path.display().to_string();
        let data = fs::read(path).map_err(|error| BtfError::Read { path: shown.clone(), error })?;
        Self::parse(data, base, wanted).map_err(|what| BtfError::Format { path: shown, what })
    }

    fn parse(data: Vec<u8>, base: Option<&'base Self>, wanted: &[&str]) -> Result<Self, &'static str> {
        if data.get(..2).map(|magic| u16::from_le_bytes([magic[0], magic[1]])) != Some(HEADER_MAGIC) {
            return Err("no BTF header of this machine's byte order");
        }
        let header = |at: usize| word(&data, at).map(|value| value as usize).ok_or("the header is cut short");
        let start = header(4)?;
        let (types_at, types_len) = (start + header(8)?, header(12)?);
        let (strings, strings_len) = (start + header(16)?, header(20)?);
        if types_at + types_len > data.len() || strings + strings_len > data.len() {
            return Err("a section lies beyond the end");
        }
        let (first_id, first_string) = base
            .map_or((1, 0), |base| (base.first_id + base.types.len() as u32, (base.data.len() - base.strings) as u32));
        let mut btf = Self {
            base,
            data,
            strings,
            first_string,
            first_id,
            types: Vec::with_capacity(types_len / 24),
            named: BTreeMap::new(),
        };
        btf.index(types_at, types_at + types_len, wanted).ok_or("a type is cut short or of an unknown kind")?;
        Ok(btf)
    }

    /// Byte offset of `member` in `struct`; members of anonymous inner structures and unions count as its own.
    pub fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let id = self.structure(structure)?;
        self.member(id, member, 0).map(|bits| bits / 8)
    }

    /// Size of a structure in bytes.
    pub fn size(&self, structure: &str) -> Option<u32> {
        self.fixed(self.structure(structure)?).map(|(_, found)| found.size_or_type)
    }

    /// Value of an enumeration's constant.
    pub fn constant(&self, enumeration: &str, name: &str) -> Option<u32> {
        self.constants(enumeration).into_iter().find(|(_, found)| found == name).map(|(value, _)| value)
    }

    /// An enumeration's constants by value (the last one where two share a value); empty when there is none of the name.
    pub fn constants(&self, enumeration: &str) -> BTreeMap<u32, String> {
        let (id, entry) = match (self.id(ENUM, enumeration), self.id(ENUM64, enumeration)) {
            (Some(id), _) => (id, 8),
            (None, Some(id)) => (id, 12),
            (None, None) => return BTreeMap::new(),
        };
        let Some((owner, found)) = self.fixed(id) else { return BTreeMap::new() };
        (0..found.vlen as usize)
            .filter_map(|index| {
                let at = found.rest + index * entry;
                Some((word(&owner.data, at + 4)?, self.string(word(&owner.data, at)?)?.to_owned()))
            })
            .collect()
    }

    /// Id of a typedef, as `attach_btf_id` of a `tp_btf` program wants it (`btf_trace_<tracepoint>`).
    pub fn typedef(&self, name: &str) -> Option<u32> {
        self.id(TYPEDEF, name)
    }

    /// Id of a function, as a program calls it.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.id(FUNC, name)
    }

    /// Id of a structure.
    pub fn structure(&self, name: &str) -> Option<u32> {
        self.id(STRUCT, name)
    }

    /// Number of arguments of the function type behind a typedef, the tracepoint's hidden first one not counted.
    pub fn tracepoint_arguments(&self, typedef: &str) -> Option<u32> {
        let pointer = self.fixed(self.id(TYPEDEF, typedef)?)?.1.size_or_type;
        let function = self.fixed(self.fixed(pointer)?.1.size_or_type)?.1;
        (function.kind == FUNC_PROTO).then(|| function.vlen.saturating_sub(1))
    }

    fn id(&self, kind: u32, name: &str) -> Option<u32> {
        let own = self.named.get(&(kind, name.to_owned())).copied();
        own.or_else(|| self.base?.id(kind, name))
    }

    fn index(&mut self, mut at: usize, end: usize, wanted: &[&str]) -> Option<()> {
        while at < end {
            let found = type_at(&self.data, at)?;
            let id = self.first_id + self.types.len() as u32;
            self.types.push(at as u32);
            if matches!(found.kind, STRUCT | ENUM | ENUM64 | FUNC | TYPEDEF) && found.name != 0 {
                let name = self.string(found.name)?;
                if wanted.contains(&name) {
                    let key = (found.kind, name.to_owned());
                    self.named.entry(key).or_insert(id);
                }
            }
            at = found.rest + variable_size(found.kind, found.vlen)?;
        }
        Some(())
    }

    fn fixed(&self, id: u32) -> Option<(&Self, Type)> {
        if id < self.first_id {
            return self.base?.fixed(id);
        }
        let at = *self.types.get((id - self.first_id) as usize)? as usize;
        Some((self, type_at(&self.data, at)?))
    }

    fn member(&self, id: u32, wanted: &str, depth: u32) -> Option<u32> {
        let (owner, found) = self.fixed(id)?;
        if !matches!(found.kind, STRUCT | UNION) || depth > NESTING {
            return None;
        }
        for index in 0..found.vlen as usize {
            let at = found.rest + index * 12;
            let (name, member_type, raw) =
                (word(&owner.data, at)?, word(&owner.data, at + 4)?, word(&owner.data, at + 8)?);
            let bits = if found.kind_flag { raw & 0x00ff_ffff } else { raw };
            if name == 0 {
                if let Some(inner) = self.member(member_type, wanted, depth + 1) {
                    return Some(bits + inner);
                }
            } else if self.string(name)? == wanted {
                return Some(bits);
            }
        }
        None
    }

    fn string(&self, offset: u32) -> Option<&str> {
        if offset < self.first_string {
            return self.base?.string(offset);
        }
        let rest = self.data.get(self.strings + (offset - self.first_string) as usize..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&rest[..end]).ok()
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn type_at(data: &[u8], at: usize) -> Option<Type> {
    let info = word(data, at + 4)?;
    Some(Type {
        name: word(data, at)?,
        kind: (info >> 24) & 0x1f,
        vlen: info & 0xffff,
        kind_flag: info >> 31 == 1,
        size_or_type: word(data, at + 8)?,
        rest: at + 12,
    })
}

/// Bytes that follow a type's fixed part.
fn variable_size(kind: u32, vlen: u32) -> Option<usize> {
    let vlen = vlen as usize;
    Some(match kind {
        1 | 14 | 17 => 4,
        ARRAY => 12,
        STRUCT | UNION | 15 | ENUM64 => vlen * 12,
        ENUM | FUNC_PROTO => vlen * 8,
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { union { struct { u32 a; u32 b; }; }; u32 c; }` and `enum colours { RED = 7 }`.
    fn blob() -> Vec<u8> {
        let strings = b"\0outer\0a\0b\0c\0colours\0RED\0u32\0";
        let name = |wanted: &str| {
            let needle = format!("\0{wanted}\0");
            strings.windows(needle.len()).position(|window| window == needle.as_bytes()).map_or(0, |at| at as u32 + 1)
        };
        let mut types: Vec<u32> = Vec::new();
        types.extend([name("u32"), 1 << 24, 4, 32]);
        types.extend([0, STRUCT << 24 | 2, 8, name("a"), 1, 0, name("b"), 1, 32]);
        types.extend([0, UNION << 24 | 1, 8, 0, 2, 0]);
        types.extend([name("outer"), STRUCT << 24 | 2, 12, 0, 3, 0, name("c"), 1, 64]);
        types.extend([name("colours"), ENUM << 24 | 1, 4, name("RED"), 7]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut blob = Vec::new();
        blob.extend(HEADER_MAGIC.to_le_bytes());
        blob.extend([1, 0]);
        for value in [24, 0, types.len(), types.len(), strings.len()] {
            blob.extend((value as u32).to_ne_bytes());
        }
        blob.extend(types);
        blob.extend(strings);
        blob
    }

    #[test]
    fn members_of_anonymous_structures_are_found() {
        let btf = Btf::parse(blob(), None, &["outer", "colours"]).unwrap();
        assert_eq!(btf.offset("outer", "a"), Some(0));
        assert_eq!(btf.offset("outer", "b"), Some(4));
        assert_eq!(btf.offset("outer", "c"), Some(8));
        assert_eq!(btf.offset("outer", "d"), None);
        assert_eq!(btf.size("outer"), Some(12));
        assert_eq!(btf.constant("colours", "RED"), Some(7));
        assert_eq!(btf.constants("shapes"), BTreeMap::new());
    }

    #[test]
    fn every_cut_is_an_error_and_none_panics() {
        let whole = blob();
        for length in 0..whole.len() {
            assert!(Btf::parse(whole[..length].to_vec(), None, &["outer"]).is_err(), "cut at {length}");
        }
    }
}
