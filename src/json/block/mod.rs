//! Skips strings and containers for the lexer, 64 bytes at a time.
//!
//! A block of 64 bytes is converted to a few words with one bit per byte: quotes, backslashes,
//! brackets, control characters. Arithmetic on these words determines which quotes are escaped and
//! which bytes are inside strings, with the algorithm of simdjson (Langdale and Lemire, "Parsing
//! Gigabytes of JSON per Second", VLDB Journal 28, 2019, section 3.1). Only brackets remain to be
//! processed one by one, and only in blocks where they are nested.
//!
//! The arithmetic is in `walk` and is the same for all instruction sets. They differ only in how a
//! block is converted to words.
//!
//! A backslash outside of strings does not occur in valid JSON and escapes nothing. The arithmetic
//! would treat it as an escape, so a block that contains one is processed byte by byte.

mod bytes;
mod portable;
mod walk;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use super::error::JsonError;
pub(super) use portable::plain_text;
pub(super) use walk::Skip;

/// Result of skipping a string or container: the position after its closing quote or bracket, or
/// `None` if the input ended before it. The offset of an error is relative to the input slice.
pub(super) type End = Result<Option<usize>, JsonError>;

/// The implementation that skips strings and containers, selected when a lexer is created.
#[derive(Clone, Copy, Debug)]
pub(super) struct Isa(Set);

#[derive(Clone, Copy, Debug)]
enum Set {
    /// Processes one byte at a time instead of blocks, as a reference for tests and fuzzing.
    #[cfg(any(test, feature = "fuzzing"))]
    Bytes,
    /// Processes blocks of 64 bytes with code that runs on every target.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
}

impl Isa {
    /// Returns the fastest implementation that this machine supports.
    #[inline]
    pub(super) fn best() -> Self {
        static BEST: LazyLock<Isa> = LazyLock::new(Isa::detect);
        *BEST
    }

    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(isa) = x86::Avx2::detect() {
            return Self(Set::Avx2(isa));
        }
        Self(Set::Portable)
    }

    /// Returns all implementations that this machine supports. The first one is `Set::Bytes`.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Self(Set::Bytes), Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        all.extend(x86::Avx2::detect().map(|isa| Self(Set::Avx2(isa))));
        all
    }

    /// Skips the rest of a string, from `piece[at]` to its closing quote.
    ///
    /// `escaped` specifies whether the byte at `at` is escaped. If the string does not end in
    /// `piece`, it is set to whether the next byte is escaped.
    ///
    /// # Errors
    ///
    /// The string contains a control character.
    pub(super) fn string(self, piece: &[u8], at: usize, escaped: &mut bool) -> End {
        match self.0 {
            #[cfg(any(test, feature = "fuzzing"))]
            Set::Bytes => bytes::string(piece, at, escaped),
            Set::Portable => portable::string(piece, at, escaped),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(isa) => isa.string(piece, at, escaped),
        }
    }

    /// Skips the rest of a container, from `piece[at]` to its closing bracket.
    ///
    /// # Errors
    ///
    /// A control character in a string, a byte below TAB outside of strings, a closing bracket of
    /// the wrong kind, or nesting beyond the depth limit.
    pub(super) fn container(self, skip: &mut Skip, piece: &[u8], at: usize) -> End {
        match self.0 {
            #[cfg(any(test, feature = "fuzzing"))]
            Set::Bytes => bytes::container(skip, piece, at),
            Set::Portable => portable::container(skip, piece, at),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(isa) => isa.container(skip, piece, at),
        }
    }
}

/// Number of bytes in a block, which is the number of bits in a word.
const BLOCK_BYTES: usize = 64;

type Block = [u8; BLOCK_BYTES];

/// Classification of the bytes of a block, with the first byte in the lowest bit of each word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Masks {
    quote: u64,
    backslash: u64,
    /// Bytes below 0x20, which are not allowed in strings (RFC 8259 section 7).
    control: u64,
    /// Bytes below TAB, which are not allowed anywhere. NUL is one of them, so most UTF-16 text is
    /// detected.
    low: u64,
    /// Set for `{` and `[`, also inside strings.
    open: u64,
    /// Set for `}` and `]`, also inside strings.
    close: u64,
    /// Set for `{` and `}`, clear for `[` and `]`, undefined for other bytes.
    curly: u64,
}

impl Masks {
    /// Returns the masks without the first `count` bytes of the block. `count` must be at most 63.
    #[inline(always)]
    const fn after(self, count: usize) -> Self {
        Self {
            quote: self.quote >> count,
            backslash: self.backslash >> count,
            control: self.control >> count,
            low: self.low >> count,
            open: self.open >> count,
            close: self.close >> count,
            curly: self.curly >> count,
        }
    }
}

/// The bit that distinguishes `{` from `[`, and `}` from `]`.
const CURLY: u8 = b'{' ^ b'[';

const fn ends_string(byte: u8) -> bool {
    (byte == b'"') | (byte < 0x20)
}

/// Returns whether `byte`, found outside of strings, must be processed: whether it is a quote, a
/// bracket or not allowed there.
const fn is_structure(byte: u8) -> bool {
    (byte == b'"') | ((byte | CURLY) == b'{') | ((byte | CURLY) == b'}') | (byte < b'\t')
}

#[cfg(test)]
mod tests;
