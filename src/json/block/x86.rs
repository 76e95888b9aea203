//! Conversion of blocks to words with one bit per byte on x86-64, with two vectors of 32 bytes.
//!
//! A version with AVX-512 and one vector of 64 bytes was measured. It was a fifth faster for short
//! messages, and gained less for longer ones that do not fit into the L1 cache. That does not
//! justify a third implementation.

use std::arch::is_x86_feature_detected as has;
use std::arch::x86_64::*;

use super::walk::{self, Skip};
use super::{Block, CURLY, End, Masks};

/// Proof that the machine supports AVX2, PCLMULQDQ, BMI1 and BMI2, because only [`Avx2::detect`]
/// creates this value. These are available since Haswell (2013) and Zen (2017).
#[derive(Clone, Copy, Debug)]
pub(super) struct Avx2(());

impl Avx2 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        let has = has!("avx2") && has!("pclmulqdq") && has!("bmi1") && has!("bmi2");
        has.then_some(Self(()))
    }

    #[expect(unsafe_code, reason = "4 times as fast as portable code")]
    pub(super) fn string(self, piece: &[u8], at: usize, escaped: &mut bool) -> End {
        // SAFETY: `self` proves that the CPU supports the features.
        unsafe { string(piece, at, escaped) }
    }

    #[expect(unsafe_code, reason = "4 times as fast as portable code")]
    pub(super) fn container(self, skip: &mut Skip, piece: &[u8], at: usize) -> End {
        // SAFETY: `self` proves that the CPU supports the features.
        unsafe { container(skip, piece, at) }
    }
}

#[target_feature(enable = "avx2,pclmulqdq,bmi1,bmi2")]
fn string(piece: &[u8], at: usize, escaped: &mut bool) -> End {
    walk::string(piece, at, escaped, |block| masks(block))
}

#[target_feature(enable = "avx2,pclmulqdq,bmi1,bmi2")]
fn container(skip: &mut Skip, piece: &[u8], at: usize) -> End {
    walk::container(
        skip,
        piece,
        at,
        |block| masks(block),
        |bits| prefix_xor(bits),
    )
}

#[inline]
#[target_feature(enable = "avx2")]
fn masks(block: &Block) -> Masks {
    let (low, high) = (load(block, 0), load(block, 4));
    let gather = |low, high| {
        let bits = |vector| u64::from(_mm256_movemask_epi8(vector).cast_unsigned());
        bits(low) | bits(high) << 32
    };
    let equal = |low, high, byte: u8| {
        let byte = _mm256_set1_epi8(byte.cast_signed());
        gather(_mm256_cmpeq_epi8(low, byte), _mm256_cmpeq_epi8(high, byte))
    };
    // A byte is at most `byte` if it equals the minimum of the two.
    let at_most = |vector, byte: u8| {
        let byte = _mm256_set1_epi8(byte.cast_signed());
        _mm256_cmpeq_epi8(_mm256_min_epu8(vector, byte), vector)
    };
    let below = |bound: u8| gather(at_most(low, bound - 1), at_most(high, bound - 1));
    let fold = |vector| _mm256_or_si256(vector, _mm256_set1_epi8(CURLY.cast_signed()));
    // Moves the bit `CURLY` of each byte to its high bit, which `gather` reads. The shift works on
    // pairs of bytes, but bits from the other byte of a pair end up below the high bit.
    let curly = |vector| _mm256_slli_epi16::<{ CURLY.leading_zeros() as i32 }>(vector);
    // Few blocks contain control characters.
    let control = _mm256_or_si256(at_most(low, 0x1f), at_most(high, 0x1f));
    let (control, lowest) = match _mm256_movemask_epi8(control) {
        0 => (0, 0),
        _ => (below(0x20), below(b'\t')),
    };
    Masks {
        quote: equal(low, high, b'"'),
        backslash: equal(low, high, b'\\'),
        control,
        low: lowest,
        open: equal(fold(low), fold(high), b'{'),
        close: equal(fold(low), fold(high), b'}'),
        curly: gather(curly(low), curly(high)),
    }
}

/// Loads 32 bytes of a block, starting at index `first` of its 8-byte words. This code needs no raw
/// pointer, and the compiler turns it into a single load.
#[inline]
#[target_feature(enable = "avx2")]
fn load(block: &Block, first: usize) -> __m256i {
    let words = block.as_chunks::<8>().0;
    let word = |index| i64::from_le_bytes(words[first + index]);
    _mm256_setr_epi64x(word(0), word(1), word(2), word(3))
}

/// Returns a word in which each bit is the parity of the same bit and all lower bits of `bits`. If
/// `bits` are the quotes that are not escaped, the result has the bits from each opening quote up
/// to the byte before the closing quote set. The result is the carry-less product of `bits` and a
/// word of ones.
#[inline]
#[target_feature(enable = "pclmulqdq")]
fn prefix_xor(bits: u64) -> u64 {
    let bits = _mm_set_epi64x(0, bits.cast_signed());
    _mm_cvtsi128_si64(_mm_clmulepi64_si128::<0>(bits, _mm_set1_epi8(-1))).cast_unsigned()
}
