//! A large text that is rarely read: what `iptables-save` printed. It is held packed, and unpacked where somebody reads a line.

use super::name::Name;
use foldhash::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use zstd::bulk::{Compressor, Decompressor};

/// Bytes of a block, about so: each has whole lines.
pub const BLOCK: usize = 32 << 10;
/// Lines that were read last and may soon be read again, as those on the paths of connections are.
const LINES: usize = 1024;
/// Of zstd's levels the fastest that packs well.
const LEVEL: i32 = 1;

/// The text, in blocks of whole lines.
#[derive(Default)]
pub struct Dump {
    /// There when all of it was written.
    blocks: OnceLock<Box<[Block]>>,
    unpacked: Mutex<Unpacked>,
}

struct Block {
    /// Where it begins, and how long it is, in bytes of the text.
    start: u32,
    len: u32,
    /// As long as the text is: not packed.
    packed: Box<[u8]>,
}

#[derive(Default)]
struct Unpacked {
    unpacker: Option<Decompressor<'static>>,
    /// The block that was read last and where it begins, for those who read line after line.
    block: Option<(u32, String)>,
    lines: HashMap<u32, Name>,
}

/// Writes a dump; until it is finished no line can be read.
#[derive(Default)]
pub struct Writer {
    dump: Arc<Dump>,
    blocks: Vec<Block>,
    len: u32,
    packer: Option<Compressor<'static>>,
}

/// A piece of a line, which keeps the dump alive instead of being copied out of it.
#[derive(Clone)]
pub struct Text {
    dump: Arc<Dump>,
    start: u32,
    len: u32,
}

/// A text in pieces of whole lines, none much longer than a block should be.
pub fn blocks(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let behind = memchr::memchr(b'\n', text.as_bytes().get(BLOCK..).unwrap_or_default());
        let (block, rest) = text.split_at(behind.map_or(text.len(), |end| BLOCK + end + 1));
        text = rest;
        (!block.is_empty()).then_some(block)
    })
}

impl Writer {
    /// Appends a block of whole lines and says where it begins; `None`, and it is left out, beyond 4 GiB.
    pub fn push(&mut self, text: &str) -> Option<u32> {
        let (start, len) = (self.len, u32::try_from(text.len()).ok()?);
        self.len = start.checked_add(len)?;
        let packed = self.pack(text.as_bytes()).filter(|packed| packed.len() < text.len());
        let packed = packed.unwrap_or_else(|| text.as_bytes().to_vec()).into_boxed_slice();
        self.blocks.push(Block { start, len, packed });
        Some(start)
    }

    fn pack(&mut self, text: &[u8]) -> Option<Vec<u8>> {
        if self.packer.is_none() {
            self.packer = Compressor::new(LEVEL).ok();
        }
        self.packer.as_mut()?.compress(text).ok()
    }

    /// The bytes `start..start + len` of the text; from the dump's end on, nothing.
    pub fn text(&self, start: u32, len: usize) -> Text {
        Text { dump: Arc::clone(&self.dump), start, len: u32::try_from(len).unwrap_or(0) }
    }

    /// From now on lines can be read.
    pub fn finish(self) {
        // Nobody else sets it.
        let _ = self.dump.blocks.set(self.blocks.into_boxed_slice());
    }
}

impl Dump {
    /// What `read` makes of the block that holds byte `at`, and of where in it the byte is.
    fn with_block<T>(
        &self,
        unpacked: &mut Unpacked,
        at: u32,
        read: impl FnOnce(&str, usize) -> Option<T>,
    ) -> Option<T> {
        let blocks = self.blocks.get()?;
        let block = &blocks[blocks.partition_point(|block| block.start <= at).checked_sub(1)?];
        if unpacked.block.as_ref().is_none_or(|(start, _)| *start != block.start) {
            unpacked.block = Some((block.start, unpacked.unpack(block)?));
        }
        let (start, text) = unpacked.block.as_ref()?;
        read(text, (at - start) as usize)
    }
}

impl Unpacked {
    fn unpack(&mut self, block: &Block) -> Option<String> {
        let bytes = if block.packed.len() == block.len as usize {
            block.packed.to_vec()
        } else {
            if self.unpacker.is_none() {
                self.unpacker = Decompressor::new().ok();
            }
            self.unpacker.as_mut()?.decompress(&block.packed, block.len as usize).ok()?
        };
        String::from_utf8(bytes).ok()
    }
}

impl Text {
    /// The piece; empty where it is none of the dump.
    pub fn read(&self) -> Name {
        let mut unpacked = self.dump.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = unpacked.lines.get(&self.start) {
            return line.clone();
        }
        let piece = |block: &str, at: usize| block.get(at..at + self.len as usize).map(Name::from);
        let line = self.dump.with_block(&mut unpacked, self.start, piece).unwrap_or_default();
        if unpacked.lines.len() >= LINES {
            unpacked.lines.clear();
        }
        unpacked.lines.insert(self.start, line.clone());
        line
    }

    /// What stands before the piece in its line.
    pub fn before(&self) -> String {
        let mut unpacked = self.dump.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        let head = |block: &str, at: usize| {
            let before = block.get(..at)?;
            Some(before.rsplit('\n').next().unwrap_or(before).to_owned())
        };
        self.dump.with_block(&mut unpacked, self.start, head).unwrap_or_default()
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        self.read() == other.read()
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.read(), f)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.read(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10,000 different lines, and each as a piece.
    fn written() -> (Vec<String>, Vec<Text>) {
        let lines: Vec<String> = (0..10_000).map(|number| format!("[{number}:7] -A KUBE-{}", number * 7_919)).collect();
        let whole: String = lines.iter().flat_map(|line| [line, "\n"]).collect();
        let (mut writer, mut texts) = (Writer::default(), Vec::new());
        for block in blocks(&whole) {
            let mut at = writer.push(block).expect("it is small");
            for line in block.lines() {
                let skipped = line.find('-').expect("each has one");
                texts.push(writer.text(at + skipped as u32, line.len() - skipped));
                at += line.len() as u32 + 1;
            }
        }
        writer.finish();
        (lines, texts)
    }

    #[test]
    fn every_line_is_found_again_in_any_order() {
        let (lines, texts) = written();
        let each = || lines.iter().zip(&texts);
        for (line, text) in each().chain(each().rev().step_by(37)) {
            assert_eq!(format!("{}{}", text.before(), text.read()), *line);
        }
    }

    #[test]
    fn it_is_held_packed_and_few_lines_beside() {
        let (lines, texts) = written();
        texts.iter().for_each(|text| drop(text.read()));
        let dump = &texts[0].dump;
        let packed: usize = dump.blocks.get().map_or(0, |blocks| blocks.iter().map(|block| block.packed.len()).sum());
        assert!(packed * 3 < lines.iter().map(String::len).sum(), "{packed}");
        assert!(dump.unpacked.lock().is_ok_and(|unpacked| unpacked.lines.len() <= LINES));
    }

    #[test]
    fn what_does_not_pack_and_what_is_not_there() {
        let mut writer = Writer::default();
        let start = writer.push("a").expect("it is small");
        let (there, behind, elsewhere) = (writer.text(start, 1), writer.text(start, 2), writer.text(9, 1));
        assert_eq!(there.read(), "", "it is not finished");
        writer.finish();
        assert_eq!((behind.read(), elsewhere.read()), ("".into(), "".into()));
        assert_eq!(Text { ..there }.before(), "");
    }
}
