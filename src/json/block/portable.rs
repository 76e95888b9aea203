//! Blocks on any machine, in plain code.
//!
//! A test of each byte alone becomes vector code wherever the compiler has vectors; to gather its
//! answers into a word it has nothing as good, so that is done by multiplications.

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
        // Few blocks have any.
        low: match control {
            0 => 0,
            _ => gather(block, |byte| byte < b'\t'),
        },
        open: gather(block, |byte| byte | CURLY == b'{'),
        close: gather(block, |byte| byte | CURLY == b'}'),
        curly: gather(block, |byte| byte & CURLY != 0),
    }
}

/// How many bytes come before the first that ends or escapes or may not be in a string.
#[inline(always)]
pub(in super::super) fn plain_text(bytes: &[u8; 32]) -> usize {
    let stops = gather(bytes, |byte| (byte == b'\\') | ends_string(byte));
    stops.trailing_zeros().min(32) as usize
}

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

/// Each bit is the parity of all up to it.
#[inline(always)]
fn prefix_xor(bits: u64) -> u64 {
    (0..6).fold(bits, |bits, step| bits ^ bits << (1 << step))
}

/// Moves the lowest bit of byte `n` to bit `56 + n`, and nothing else there.
const GATHER: u64 = 0x0102_0408_1020_4080;
