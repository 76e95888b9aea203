//! Byte searches that carry the lexer over what it does not read.
//!
//! They hold no state and know no grammar. A search looks at a few bytes one by one, since most
//! strings are short, and then at blocks with a branch-free test per byte, which the compiler
//! turns into vector code. A faster scanner replaces the inside of this file only.

/// Finds the end of a run inside a string: the first quote, or the first control character,
/// which RFC 8259 section 7 wants escaped.
#[inline]
pub(super) fn quote_or_control(bytes: &[u8]) -> Option<usize> {
    find(bytes, |byte| (byte == b'"') | (byte < 0x20))
}

/// Finds the next quote or bracket outside of strings, or a byte below TAB, which may stand
/// nowhere (this notices NUL and most of UTF-16 at the price of one comparison).
///
/// `[` and `{`, and `]` and `}`, differ in one bit, so two comparisons do for four brackets.
#[inline]
pub(super) fn structure(bytes: &[u8]) -> Option<usize> {
    find(bytes, |byte| {
        (byte == b'"') | ((byte | 0x20) == b'{') | ((byte | 0x20) == b'}') | (byte < b'\t')
    })
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
fn find(bytes: &[u8], stops: impl Fn(u8) -> bool) -> Option<usize> {
    let near = &bytes[..bytes.len().min(NEAR_BYTES)];
    if let Some(at) = near.iter().position(|&byte| stops(byte)) {
        return Some(at);
    }
    let (blocks, tail) = bytes[near.len()..].as_chunks::<BLOCK_BYTES>();
    let mut start = near.len();
    for block in blocks {
        if block.iter().fold(false, |any, &byte| any | stops(byte)) {
            return block
                .iter()
                .position(|&byte| stops(byte))
                .map(|at| start + at);
        }
        start += BLOCK_BYTES;
    }
    tail.iter()
        .position(|&byte| stops(byte))
        .map(|at| start + at)
}

/// Bytes looked at one by one before the blocks begin.
const NEAR_BYTES: usize = 16;
/// Bytes tested together.
const BLOCK_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_at_every_place() {
        for byte in 0..=u8::MAX {
            for at in 0..200 {
                let mut bytes = [b'7'; 200];
                bytes[at] = byte;
                let want = (byte == b'"' || byte < 0x20).then_some(at);
                assert_eq!(quote_or_control(&bytes), want, "{byte} at {at}");
                let want = (b"\"[]{}".contains(&byte) || byte < 9).then_some(at);
                assert_eq!(structure(&bytes), want, "{byte} at {at}");
            }
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
