//! Byte searches that carry the lexer over what it does not read.
//!
//! They hold no state and know no grammar. A search looks at a few bytes and two words first,
//! since most runs are short, and then at blocks with a branch-free test per byte, which the
//! compiler turns into vector code. A faster scanner replaces the inside of this file only.
//!
//! A word holds eight bytes, the first one lowest. The tests on words set the high bit of bytes
//! that stop, by the usual subtraction, whose borrow can make wrong bits above the lowest one that
//! is right but never below it: so the lowest bit is exact, and no other is looked at.

/// Finds the end of a run inside a string: the first quote, or the first control character,
/// which RFC 8259 section 7 wants escaped.
#[inline]
pub(super) fn quote_or_control(bytes: &[u8]) -> Option<usize> {
    find(
        bytes,
        |byte| (byte == b'"') | (byte < 0x20),
        |word| equal(word, b'"') | below(word, 0x20),
    )
}

/// Finds the next quote or bracket outside of strings, or a byte below TAB, which may stand
/// nowhere (this notices NUL and most of UTF-16 at the price of one comparison).
///
/// `[` and `{`, and `]` and `}`, differ in one bit, so two comparisons do for four brackets.
#[inline]
pub(super) fn structure(bytes: &[u8]) -> Option<usize> {
    const CASE: u8 = b'{' ^ b'[';
    find(
        bytes,
        |byte| (byte == b'"') | ((byte | CASE) == b'{') | ((byte | CASE) == b'}') | (byte < b'\t'),
        |word| {
            let folded = word | (LOW * u64::from(CASE));
            equal(word, b'"') | equal(folded, b'{') | equal(folded, b'}') | below(word, b'\t')
        },
    )
}

/// Whether `bytes` end with an odd number of backslashes: then what follows is escaped.
#[inline]
pub(super) fn ends_escaped(bytes: &[u8]) -> bool {
    let run = bytes
        .iter()
        .rev()
        .take_while(|&&byte| byte == b'\\')
        .count();
    run % 2 == 1
}

#[inline]
fn find(
    bytes: &[u8],
    stops: impl Fn(u8) -> bool,
    stops_word: impl Fn(u64) -> u64,
) -> Option<usize> {
    let in_words = |words: &[[u8; 8]]| {
        words.iter().enumerate().find_map(|(index, word)| {
            let found = stops_word(u64::from_le_bytes(*word));
            (found != 0).then(|| index * 8 + found.trailing_zeros() as usize / 8)
        })
    };
    let first = &bytes[..bytes.len().min(FIRST_BYTES)];
    if let Some(at) = first.iter().position(|&byte| stops(byte)) {
        return Some(at);
    }
    let (near, far) = bytes.split_at(bytes.len().min(NEAR_BYTES));
    let (words, rest) = near.as_chunks::<8>();
    if let Some(at) = in_words(words) {
        return Some(at);
    }
    if let Some(at) = rest.iter().position(|&byte| stops(byte)) {
        return Some(words.len() * 8 + at);
    }
    let (blocks, tail) = far.as_chunks::<BLOCK_BYTES>();
    let mut start = near.len();
    for block in blocks {
        if block.iter().fold(false, |any, &byte| any | stops(byte)) {
            return in_words(block.as_chunks::<8>().0).map(|at| start + at);
        }
        start += BLOCK_BYTES;
    }
    let (words, rest) = tail.as_chunks::<8>();
    if let Some(at) = in_words(words) {
        return Some(start + at);
    }
    start += words.len() * 8;
    rest.iter()
        .position(|&byte| stops(byte))
        .map(|at| start + at)
}

/// A word of ones, to repeat a byte by multiplication.
const LOW: u64 = 0x0101_0101_0101_0101;
/// The high bit of each byte.
const HIGH: u64 = LOW << 7;

/// Marks the bytes of `word` that equal `byte`; the lowest mark is exact.
const fn equal(word: u64, byte: u8) -> u64 {
    let zero = word ^ (LOW * byte as u64);
    zero.wrapping_sub(LOW) & !zero & HIGH
}

/// Marks the bytes of `word` below `bound`, which is at most 128; the lowest mark is exact.
const fn below(word: u64, bound: u8) -> u64 {
    word.wrapping_sub(LOW * bound as u64) & !word & HIGH
}

/// Bytes looked at before the words: quotes and brackets mostly stand close together.
const FIRST_BYTES: usize = 4;
/// Bytes looked at before the blocks begin.
const NEAR_BYTES: usize = 16;
/// Bytes tested together.
const BLOCK_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_at_every_place() {
        for byte in 0..=u8::MAX {
            for at in 0..170 {
                let mut bytes = [b'7'; 173];
                bytes[at] = byte;
                // What lies behind must not matter.
                bytes[at + 1..].fill(byte ^ 1);
                bytes[at + 1] = b'"';
                let next = |stops: bool| Some(if stops { at } else { at + 1 });
                let want = next(byte == b'"' || byte < 0x20);
                assert_eq!(quote_or_control(&bytes), want, "{byte} at {at}");
                let want = next(b"\"[]{}".contains(&byte) || byte < 9);
                assert_eq!(structure(&bytes), want, "{byte} at {at}");
            }
        }
    }

    #[test]
    fn nothing_to_find() {
        for len in 0..200 {
            let bytes = vec![b'7'; len];
            assert_eq!((quote_or_control(&bytes), structure(&bytes)), (None, None));
        }
    }

    #[test]
    fn escapes_are_counted() {
        for (bytes, want) in [
            (&b""[..], false),
            (b"a", false),
            (b"\\", true),
            (b"a\\\\", false),
            (b"\\\\\\", true),
        ] {
            assert_eq!(ends_escaped(bytes), want, "{bytes:?}");
        }
    }
}
