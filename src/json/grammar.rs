//! The parts of RFC 8259's grammar that the lexer and the strict validator share: numbers, escapes
//! and the stack of open containers.

use crate::limits::JSON_DEPTH_MAX;

/// The open containers, one bit each.
#[derive(Clone, Debug)]
pub(super) struct Nest {
    /// Set for an object, clear for an array.
    objects: [u64; JSON_DEPTH_MAX / 64],
    /// Containers open; never above `JSON_DEPTH_MAX`.
    pub(super) depth: usize,
}

const _: () = assert!(JSON_DEPTH_MAX.is_multiple_of(64));

impl Nest {
    pub(super) const fn new() -> Self {
        Self {
            objects: [0; JSON_DEPTH_MAX / 64],
            depth: 0,
        }
    }

    /// Opens a container; false when it would be one too many.
    pub(super) fn open(&mut self, object: bool) -> bool {
        if self.depth == JSON_DEPTH_MAX {
            return false;
        }
        let word = &mut self.objects[self.depth / 64];
        let bit = 1 << (self.depth % 64);
        if object {
            *word |= bit
        } else {
            *word &= !bit
        }
        self.depth += 1;
        true
    }

    /// Whether the innermost open container is an object.
    pub(super) fn inside_object(&self) -> bool {
        debug_assert!(self.depth > 0);
        let last = self.depth.saturating_sub(1);
        self.objects[last / 64] >> (last % 64) & 1 == 1
    }
}

/// The grammar of numbers, RFC 8259 section 6, as states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

impl Number {
    /// A number's first byte.
    pub(super) const fn start(byte: u8) -> Option<Self> {
        match byte {
            b'-' => Some(Self::Minus),
            b'0' => Some(Self::Zero),
            b'1'..=b'9' => Some(Self::Integer),
            _ => None,
        }
    }

    /// One byte more; `None` when the number does not go on with it.
    pub(super) const fn step(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (Self::Minus, b'0') => Some(Self::Zero),
            (Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Some(Self::Integer),
            (Self::Zero | Self::Integer, b'.') => Some(Self::Point),
            (Self::Point | Self::Fraction, b'0'..=b'9') => Some(Self::Fraction),
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Some(Self::Exponent),
            (Self::Exponent, b'+' | b'-') => Some(Self::Sign),
            (Self::Exponent | Self::Sign | Self::Power, b'0'..=b'9') => Some(Self::Power),
            _ => None,
        }
    }

    /// Whether the number may end here.
    pub(super) const fn is_complete(self) -> bool {
        matches!(
            self,
            Self::Zero | Self::Integer | Self::Fraction | Self::Power
        )
    }
}

/// The byte that a backslash and `byte` stand for (RFC 8259 section 7); `u` is not among them.
pub(super) const fn unescape(byte: u8) -> Option<u8> {
    match byte {
        b'"' | b'\\' | b'/' => Some(byte),
        b'b' => Some(0x08),
        b'f' => Some(0x0c),
        b'n' => Some(b'\n'),
        b'r' => Some(b'\r'),
        b't' => Some(b'\t'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let valid = [
            "0", "-0", "7", "10", "-12", "0.0", "1.50", "1e5", "1E+05", "-0.1e-10",
        ];
        let invalid = [
            "-", "+1", "01", "1.", ".5", "1e", "1e+", "1.e5", "--1", "0x1", "1.2.3",
        ];
        let accepted = |text: &str| {
            let mut bytes = text.bytes();
            let first = bytes.next().and_then(Number::start)?;
            bytes
                .try_fold(first, Number::step)
                .filter(|number| number.is_complete())
        };
        for text in valid {
            assert!(accepted(text).is_some(), "{text}");
        }
        for text in invalid {
            assert!(accepted(text).is_none(), "{text}");
        }
    }

    #[test]
    fn containers_are_remembered_by_kind() {
        let mut nest = Nest::new();
        for depth in 0..JSON_DEPTH_MAX {
            assert!(nest.open(depth % 3 == 0));
        }
        assert!(!nest.open(true));
        for depth in (0..JSON_DEPTH_MAX).rev() {
            assert_eq!(nest.inside_object(), depth % 3 == 0);
            nest.depth -= 1;
        }
        // A place that was an object's becomes an array's.
        assert!(nest.open(false) && !nest.inside_object());
    }
}
