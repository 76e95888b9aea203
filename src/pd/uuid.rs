//! The UUID that identifies a request to the engines.

use std::fmt;

/// A random UUID (RFC 9562 5.4, version 4). It is stored as a number, because the text form is not
/// needed for most requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uuid(u128);

/// The text form of a UUID, with hyphens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UuidText([u8; 36]);

impl Uuid {
    /// Returns a version 4 UUID made of these random numbers.
    #[must_use]
    pub fn v4(random: [u64; 2]) -> Self {
        let high = (random[0] & !0xf000) | 0x4000;
        let low = (random[1] & !(0b11 << 62)) | (0b10 << 62);
        Self::of_digits((u128::from(high) << 64) | u128::from(low))
    }

    /// Returns the UUID of 32 hexadecimal digits, the first digit in the highest bits.
    #[must_use]
    pub const fn of_digits(digits: u128) -> Self {
        Self(digits)
    }

    /// Returns its lowest `bits` bits, at most 62, which have no fixed ones among them.
    #[must_use]
    pub const fn number(self, bits: u32) -> u64 {
        debug_assert!(bits <= 62, "the version or the variant is included");
        self.0 as u64 & ((1 << bits) - 1)
    }

    /// Returns the text form.
    #[must_use]
    pub fn text(self) -> UuidText {
        let mut text = [b'-'; 36];
        let mut shift = 128_u32;
        for (at, byte) in text.iter_mut().enumerate() {
            if !matches!(at, 8 | 13 | 18 | 23) {
                shift -= 4;
                *byte = b"0123456789abcdef"[(self.0 >> shift & 0xf) as usize];
            }
        }
        UuidText(text)
    }
}

impl UuidText {
    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_and_variant_are_at_their_positions() {
        let zeros = "00000000-0000-4000-8000-000000000000";
        let ones = "ffffffff-ffff-4fff-bfff-ffffffffffff";
        assert_eq!(Uuid::v4([0, 0]).text().as_str(), zeros);
        assert_eq!(Uuid::v4([u64::MAX, u64::MAX]).text().as_str(), ones);
        assert_eq!(Uuid::v4([0, u64::MAX]).number(62), u64::MAX >> 2);
        assert_eq!(Uuid::v4([u64::MAX, 0]).number(62), 0);
        let digits = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef;
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(Uuid::of_digits(digits).to_string(), text);
    }
}
