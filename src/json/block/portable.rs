//! Conversion of blocks to words with one bit per byte, in portable code.
//!
//! The compiler vectorises an independent test of each byte on every target with vector
//! instructions. It does not do so for gathering the results into a word, so that is done with
//! multiplications.

use super::walk::{self, Skip};
use super::{Block, CURLY, End, Masks, ends_string};

pub(super) fn string(piece: &[u8], at: usize, escaped: &mut bool) -> End {
    walk::string(piece, at, escaped, masks)
}

pub(super) fn container(skip: &mut Skip, piece: &[u8], at: usize) -> End {
    walk::container(skip, piece, at, masks, prefix_xor)
}

#[inline(always)]
fn masks(block: &Block) -> Masks {
    let control = gather(block, |byte| byte < 0x20);
    Masks {
        quote: gather(block, |byte| byte == b'"'),
        backslash: gather(block, |byte| byte == b'\\'),
        control,
        // Few blocks contain control characters.
        low: match control {
            0 => 0,
            _ => gather(block, |byte| byte < b'\t'),
        },
        open: gather(block, |byte| byte | CURLY == b'{'),
        close: gather(block, |byte| byte | CURLY == b'}'),
        curly: gather(block, |byte| byte & CURLY != 0),
    }
}

/// Returns the number of bytes before the first quote, backslash or control character in `bytes`,
/// or 32 if there is none.
#[inline(always)]
pub(in super::super) fn plain_text(bytes: &[u8; 32]) -> usize {
    let stops = gather(bytes, |byte| (byte == b'\\') | ends_string(byte));
    stops.trailing_zeros().min(32) as usize
}

/// Tests each byte and returns the results as bits, the first byte in the lowest bit.
#[inline(always)]
fn gather<const N: usize>(block: &[u8; N], test: impl Fn(u8) -> bool) -> u64 {
    let mut marks = [0; N];
    for (mark, &byte) in marks.iter_mut().zip(block) {
        *mark = u8::from(test(byte));
    }
    let words = marks.as_chunks::<8>().0.iter();
    words.rev().fold(0, |bits, word| {
        bits << 8 | u64::from_le_bytes(*word).wrapping_mul(GATHER) >> 56
    })
}

/// Returns a word in which each bit is the parity of the same bit and all lower bits of `bits`. If
/// `bits` are the quotes that are not escaped, the result has the bits from each opening quote up
/// to the byte before the closing quote set.
#[inline(always)]
fn prefix_xor(bits: u64) -> u64 {
    (0..6).fold(bits, |bits, step| bits ^ bits << (1 << step))
}

/// Factor that gathers the lowest bits of the 8 bytes of a word in its highest byte. All other bits
/// of the word must be clear. The multiplication moves the lowest bit of byte `n` to bit `56 + n`,
/// and no other bit to the highest byte.
const GATHER: u64 = 0x0102_0408_1020_4080;
