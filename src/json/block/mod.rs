//! Carries the lexer over strings and containers, 64 bytes at a time.
//!
//! A block of 64 bytes becomes a few words with one bit per byte: quotes, backslashes, brackets,
//! control characters. Arithmetic on those words tells which quotes are escaped and which bytes lie
//! inside strings, as simdjson does it (Langdale and Lemire, "Parsing Gigabytes of JSON per
//! Second", VLDB Journal 28, 2019, section 3.1); what is left to look at one by one are brackets,
//! and of those only the ones that nest. `walk` has that arithmetic, the same for all instruction
//! sets; they differ in how a block becomes words.
//!
//! A backslash outside of strings, which no valid text has, escapes nothing. The arithmetic would
//! let it, so a block with one is read byte by byte.

mod bytes;
mod portable;
mod walk;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::LazyLock;

use super::error::JsonError;
pub(super) use portable::plain_text;
pub(super) use walk::Skip;

/// How far a piece was read: some place behind the quote or bracket that was looked for, or none
/// when the piece ended before it. An error has the offset in the piece.
pub(super) type End = Result<Option<usize>, JsonError>;

/// The instructions to use, chosen once per text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Isa(Set);

#[derive(Clone, Copy, Debug)]
enum Set {
    /// No blocks but one byte after the other, for comparison.
    #[cfg(any(test, feature = "fuzzing"))]
    Bytes,
    /// Words of eight bytes, on any machine.
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
}

impl Isa {
    /// The fastest that this machine has.
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

    /// All that this machine has, and bytes alone as the first.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn all() -> Vec<Self> {
        let mut all = vec![Self(Set::Bytes), Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        all.extend(x86::Avx2::detect().map(|isa| Self(Set::Avx2(isa))));
        all
    }

    /// Reads on at `at` inside a string, to behind its closing quote. `escaped` says whether the
    /// next byte is escaped, on entry and when the piece ended first.
    ///
    /// # Errors
    ///
    /// A control character.
    pub(super) fn string(self, piece: &[u8], at: usize, escaped: &mut bool) -> End {
        match self.0 {
            #[cfg(any(test, feature = "fuzzing"))]
            Set::Bytes => bytes::string(piece, at, escaped),
            Set::Portable => portable::string(piece, at, escaped),
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(isa) => isa.string(piece, at, escaped),
        }
    }

    /// Reads on at `at` inside a skipped container, to behind its closing bracket.
    ///
    /// # Errors
    ///
    /// A control character in a string, a byte below TAB outside, a bracket of the wrong kind or
    /// one too deep.
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

/// Bytes in a block: one bit each in a word.
const BLOCK_BYTES: usize = 64;

type Block = [u8; BLOCK_BYTES];

/// What the bytes of a block are, the first one in the lowest bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Masks {
    quote: u64,
    backslash: u64,
    /// Below 0x20: not in strings (RFC 8259 section 7).
    control: u64,
    /// Below TAB: nowhere. That notices NUL and most of UTF-16.
    low: u64,
    /// `{` and `[`
    open: u64,
    /// `}` and `]`
    close: u64,
    /// Set for `{` and `}`, clear for `[` and `]`; anything for other bytes.
    curly: u64,
}

impl Masks {
    /// Drops the first `count` bytes, 63 at most.
    #[inline(always)]
    const fn behind(self, count: usize) -> Self {
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

/// The one bit in which `{` differs from `[`, and `}` from `]`.
const CURLY: u8 = b'{' ^ b'[';

const fn ends_string(byte: u8) -> bool {
    (byte == b'"') | (byte < 0x20)
}

/// Whether `byte` matters outside of strings.
const fn is_structure(byte: u8) -> bool {
    (byte == b'"') | ((byte | CURLY) == b'{') | ((byte | CURLY) == b'}') | (byte < b'\t')
}

#[cfg(test)]
mod tests;
