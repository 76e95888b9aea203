//! The parts of RFC 8259's grammar that the lexer and the strict validator share: numbers, escapes
//! and the stack of open containers.

use crate::limits::JSON_DEPTH_MAX;

/// The open containers, one bit each: set for an object, clear for an array.
#[derive(Clone, Debug)]
pub(super) struct Nest {
    pub(super) top: Top,
    /// The kinds as they were each time that the depth was a multiple of 64 and grew.
    below: [u64; JSON_DEPTH_MAX / KINDS],
}

/// The innermost open containers: what of a [`Nest`] a loop keeps in registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Top {
    /// The innermost in the lowest bit; as many as the depth is above a multiple of 64.
    kinds: u64,
    /// Containers open; never above `JSON_DEPTH_MAX`.
    pub(super) depth: usize,
}

/// Bits in a word of kinds.
const KINDS: usize = 64;

const _: () = assert!(JSON_DEPTH_MAX.is_multiple_of(KINDS));

impl Nest {
    pub(super) const fn new() -> Self {
        Self {
            top: Top { kinds: 0, depth: 0 },
            below: [0; JSON_DEPTH_MAX / KINDS],
        }
    }

    /// Opens a container; false when it would be one too many.
    #[inline]
    pub(super) fn open(&mut self, object: bool) -> bool {
        let Top { kinds, depth } = self.top;
        if depth.is_multiple_of(KINDS) {
            match self.below.get_mut(depth / KINDS) {
                Some(below) => *below = kinds,
                None => return false,
            }
        }
        self.top.kinds = kinds << 1 | u64::from(object);
        self.top.depth = depth + 1;
        true
    }

    /// Closes the innermost container; there must be one.
    #[inline]
    pub(super) fn close(&mut self) {
        debug_assert!(self.top.depth > 0);
        self.top.depth -= 1;
        self.top.kinds >>= 1;
        if self.top.depth.is_multiple_of(KINDS)
            && let Some(below) = self.below.get(self.top.depth / KINDS)
        {
            self.top.kinds = *below;
        }
    }
}

impl Top {
    /// Whether the innermost open container is an object.
    #[inline]
    pub(super) const fn inside_object(self) -> bool {
        self.kinds & 1 == 1
    }

    /// Goes on from depth `outer`, which is this one or the one around it, with one object more or
    /// none. None where that takes more than the bits at hand, as at the limit of the depth.
    #[inline]
    pub(super) const fn object_in(self, outer: usize, open: bool) -> Option<Self> {
        if outer.is_multiple_of(KINDS) {
            return None;
        }
        Some(Self {
            kinds: self.kinds >> (self.depth - outer) << open as u32 | open as u64,
            depth: outer + open as usize,
        })
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
            assert_eq!(nest.top.depth, depth);
            assert!(nest.open(depth % 3 == 0));
        }
        assert!(!nest.open(true));
        for depth in (0..JSON_DEPTH_MAX).rev() {
            assert_eq!(nest.top.inside_object(), depth % 3 == 0, "{depth}");
            nest.close();
            // A place that was an object's becomes an array's, and the other way round.
            assert!(nest.open(depth % 3 != 0));
            assert_eq!(nest.top.inside_object(), depth % 3 != 0, "{depth}");
            nest.close();
            assert_eq!(nest.top.depth, depth);
        }
    }

    #[test]
    fn an_object_beside_others() {
        let mut nest = Nest::new();
        for depth in 0..JSON_DEPTH_MAX {
            assert!(nest.open(depth % 5 < 3));
            let top = nest.top;
            for (ends, opens) in [(false, false), (false, true), (true, false), (true, true)] {
                let outer = top.depth - usize::from(ends);
                let Some(changed) = top.object_in(outer, opens) else {
                    assert!(outer.is_multiple_of(KINDS));
                    continue;
                };
                let mut want = nest.clone();
                if ends {
                    want.close();
                }
                if opens {
                    want.open(true);
                }
                nest.top = changed;
                for _ in 0..want.top.depth {
                    assert_eq!(nest.top.depth, want.top.depth);
                    assert_eq!(nest.top.inside_object(), want.top.inside_object());
                    nest.close();
                    want.close();
                }
                nest.top = top;
            }
        }
    }
}
