//! The parts of the RFC 8259 grammar that the lexer and the strict validator share: numbers,
//! escapes and the stack of open containers.

use crate::limits::JSON_DEPTH_MAX;

/// The stack of open containers, with one bit for each: set for an object, clear for an array.
#[derive(Clone, Debug)]
pub(super) struct Nest {
    pub(super) top: Top,
    /// At index `i`: the value of [`Top::kinds`] with `64 * i` open containers, saved when the next
    /// container is opened and restored when it is closed.
    below: [u64; JSON_DEPTH_MAX / KINDS],
}

/// The innermost open containers: the part of a [`Nest`] that fits into registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Top {
    /// One bit per container, the innermost in the lowest bit: set for an object, clear for an
    /// array. Only the bits of the containers deeper than the largest multiple of 64 below `depth`
    /// are certain to be valid: the lowest 6 bits at depth 70, and all 64 bits at depth 64.
    kinds: u64,
    /// Number of open containers, at most `JSON_DEPTH_MAX`.
    pub(super) depth: usize,
}

/// Number of bits in [`Top::kinds`].
const KINDS: usize = 64;

const _: () = assert!(JSON_DEPTH_MAX.is_multiple_of(KINDS));

impl Nest {
    pub(super) const fn new() -> Self {
        Self {
            top: Top { kinds: 0, depth: 0 },
            below: [0; JSON_DEPTH_MAX / KINDS],
        }
    }

    /// Opens an object if `object` is true, otherwise an array. Returns `false` and opens nothing
    /// if `JSON_DEPTH_MAX` containers are open.
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

    /// Closes the innermost container. At least one must be open.
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
    /// Returns whether the innermost open container is an object.
    #[inline]
    pub(super) const fn inside_object(self) -> bool {
        self.kinds & 1 == 1
    }

    /// Returns whether the innermost open container is an array.
    #[inline]
    pub(super) const fn inside_array(self) -> bool {
        self.depth > 0 && self.kinds & 1 == 0
    }

    /// Returns the open containers after closing down to depth `outer`, which must be the current
    /// depth or one less, and after opening one object if `open` is true.
    ///
    /// Returns `None` if `outer` is a multiple of 64, because that requires bits outside of `Top`.
    /// The depth limit is a multiple of 64, so the result never exceeds it.
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

/// States of the number grammar (RFC 8259 section 6), named after the part that was read last.
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
    /// Returns the state after the first byte of a number, `None` if no number begins with `byte`.
    pub(super) const fn start(byte: u8) -> Option<Self> {
        match byte {
            b'-' => Some(Self::Minus),
            b'0' => Some(Self::Zero),
            b'1'..=b'9' => Some(Self::Integer),
            _ => None,
        }
    }

    /// Returns the state after one more byte, `None` if `byte` cannot continue the number.
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

    /// Returns the number of digits at the start of `rest` that do not change the state.
    #[inline]
    pub(super) fn run(self, rest: &[u8]) -> usize {
        match self {
            Self::Integer | Self::Fraction | Self::Power => digits(rest),
            Self::Minus | Self::Zero | Self::Point | Self::Exponent | Self::Sign => 0,
        }
    }

    /// Returns whether the number may end in this state.
    pub(super) const fn is_complete(self) -> bool {
        matches!(
            self,
            Self::Zero | Self::Integer | Self::Fraction | Self::Power
        )
    }
}

/// Returns the number of digits at the start of `text`.
#[inline]
pub(super) fn digits(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

/// Returns the byte that a backslash followed by `byte` represents (RFC 8259 section 7).
///
/// Returns `None` for `u`, which callers handle themselves, and for bytes that cannot follow a
/// backslash.
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
    fn nest_tracks_the_kind_of_each_container() {
        let mut nest = Nest::new();
        for depth in 0..JSON_DEPTH_MAX {
            assert_eq!(nest.top.depth, depth);
            assert!(nest.open(depth % 3 == 0));
        }
        assert!(!nest.open(true));
        for depth in (0..JSON_DEPTH_MAX).rev() {
            assert_eq!(nest.top.inside_object(), depth % 3 == 0, "{depth}");
            nest.close();
            // The bit at this depth must change when the other kind of container is opened.
            assert!(nest.open(depth % 3 != 0));
            assert_eq!(nest.top.inside_object(), depth % 3 != 0, "{depth}");
            nest.close();
            assert_eq!(nest.top.depth, depth);
        }
    }

    #[test]
    fn object_in_agrees_with_close_and_open() {
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
