//! Processing of the words that blocks are converted to. All functions are inlined into one
//! function per instruction set, so that they are compiled with its instructions.
//!
//! For each block of a skipped container ([`Walk::block`]), with one bit per byte in each word:
//!
//! ```text
//! escaped  = bytes after a backslash that escapes them, which can be in the previous block
//! inside   = prefix_xor(quote & !escaped) ^ quoted       opening quotes up to closing ones
//! outside  = !inside
//! if backslash & outside:
//!     process the block byte by byte                     invalid, so the words may be wrong
//! bad      = (control & inside) | (low & outside)
//! brackets = (open | close) & outside
//! if bad == 0 and the brackets are objects in a row, `{ } { } {`:
//!     one subtraction finds the containers that are open after the block
//! else for each bit in brackets | bad, first to last:
//!     bad bit:         fail
//!     opening bracket: push its kind; fail if that is too deep
//!     closing bracket: pop the same kind or fail; stop after it if it closes the container
//! quoted   = inside at the last byte                     for the next block
//! ```

use super::super::error::{JsonError, JsonReason};
use super::super::grammar::{Nest, Top};
use super::{BLOCK_BYTES, Block, End, Masks, bytes, ends_string, is_structure};

/// State of the lexer with respect to nesting, and to strings of the skipped container.
#[derive(Clone, Debug)]
pub(in super::super) struct Skip {
    pub(in super::super) nest: Nest,
    /// Number of open objects whose members the lexer reports. Containers inside them that were not
    /// entered are skipped.
    pub(in super::super) entered: usize,
    /// Whether the position is inside a string of a skipped container.
    pub(in super::super) quoted: bool,
    /// Whether the last byte is a backslash that escapes the next byte of the string.
    pub(in super::super) escaped: bool,
}

impl Skip {
    pub(in super::super) const fn new() -> Self {
        Self {
            nest: Nest::new(),
            entered: 0,
            quoted: false,
            escaped: false,
        }
    }

    /// Resets the state for another text. Bits in `nest` above its depth are never read, so they
    /// are not cleared.
    pub(in super::super) const fn reset(&mut self) {
        self.nest.top.depth = 0;
        self.entered = 0;
        self.quoted = false;
        self.escaped = false;
    }

    /// Opens or closes a container, depending on `bracket`. Returns whether that closed the skipped
    /// container. Fails if a closing bracket is of the wrong kind or the depth limit is exceeded.
    #[inline(always)]
    pub(super) fn bracket(&mut self, bracket: u8) -> Result<bool, JsonReason> {
        match bracket {
            open @ (b'{' | b'[') => {
                if !self.nest.open(open == b'{') {
                    return Err(JsonReason::TooDeep);
                }
                Ok(false)
            }
            close => {
                if self.nest.top.inside_object() != (close == b'}') {
                    return Err(JsonReason::MismatchedBracket);
                }
                self.nest.close();
                Ok(self.nest.top.depth == self.entered)
            }
        }
    }

    /// Processes the brackets of one block, which begins at `start` in `piece`, one by one. Each
    /// bit of `brackets` marks a bracket outside of strings, and each bit of `bad` a byte that is
    /// not allowed.
    ///
    /// Returns the position in `piece` after the closing bracket of the skipped container, or
    /// `None` if it is not among these brackets. Fails if a byte before that position is marked in
    /// `bad` or is an invalid bracket.
    #[inline(always)]
    fn one_by_one(&mut self, piece: &[u8], start: usize, brackets: u64, bad: u64) -> End {
        let mut stops = brackets | bad;
        while stops != 0 {
            let bit = stops & stops.wrapping_neg();
            let at = start + stops.trailing_zeros() as usize;
            if bad & bit != 0 {
                return Err(control(at));
            }
            match self.bracket(piece[at]) {
                Ok(false) => stops ^= bit,
                Ok(true) => return Ok(Some(at + 1)),
                Err(reason) => return Err(JsonError { offset: at, reason }),
            }
        }
        Ok(None)
    }

    #[inline(always)]
    const fn carry(&self) -> Carry {
        Carry {
            quoted: ones(self.quoted),
            escaped: self.escaped as u64,
            top: self.nest.top,
        }
    }

    #[inline(always)]
    const fn keep(&mut self, carry: Carry) {
        self.quoted = carry.quoted != 0;
        self.escaped = carry.escaped == 1;
        self.nest.top = carry.top;
    }
}

/// The state that a block of a skipped container passes to the next one. It is small enough to stay
/// in registers, because each block must wait for the state from the previous one.
#[derive(Clone, Copy)]
struct Carry {
    /// All bits set if the next block starts inside a string, otherwise 0.
    quoted: u64,
    /// 1 if the first byte of the next block is escaped, otherwise 0.
    escaped: u64,
    top: Top,
}

impl Carry {
    /// Processes all `brackets` of a block in one step if they are a sequence of objects that are
    /// not nested, and returns the containers that are open after the block. The first bracket may
    /// close an object opened earlier, and the last may open one that is not closed in this block.
    ///
    /// Returns `None` for any other sequence, and if it might close the skipped container or exceed
    /// the depth limit.
    ///
    /// If opening and closing brackets alternate, subtracting the word of opening brackets from the
    /// word of closing brackets sets every bit from each opening bracket up to the bit before its
    /// closing bracket: the borrow that starts at the opening bracket ends at the closing bracket.
    /// If they do not alternate, the result has a wrong bit at one of the brackets.
    #[inline(always)]
    fn objects_in_a_row(self, brackets: u64, masks: &Masks, entered: usize) -> Option<Top> {
        let (open, close) = (brackets & masks.open, brackets & masks.close);
        let ends_one = close & brackets & brackets.wrapping_neg() != 0;
        let inside = close.wrapping_sub(open).wrapping_sub(u64::from(ends_one));
        let outer = self.top.depth - usize::from(ends_one);
        let fits = ((brackets & !masks.curly) | ((inside ^ masks.open) & brackets) == 0)
            & (outer > entered)
            & (!ends_one | self.top.inside_object());
        if !fits {
            return None;
        }
        self.top.object_in(outer, inside >> 63 == 1)
    }
}

/// Skips the rest of a string; see [`Isa::string`](super::Isa::string).
///
/// After a block without a quote, further blocks without quotes and control characters are skipped
/// without inspecting their backslashes. The run of backslashes directly before the next block then
/// determines whether the first byte of that block is escaped, so each backslash is read at most
/// once more.
#[inline(always)]
pub(super) fn string(
    piece: &[u8],
    at: usize,
    escaped: &mut bool,
    masks: impl Fn(&Block) -> Masks,
) -> End {
    // Backslashes before this position are already accounted for in `escaped`.
    let floor = at + usize::from(*escaped);
    let mut at = at;
    let mut carry = u64::from(*escaped);
    while let Some(block) = piece[at..].first_chunk() {
        let block = masks(block);
        let (escapes, overflow) = escaped_bytes(block.backslash, carry);
        if let Some(end) = string_end(piece, at, &block, escapes)? {
            *escaped = false;
            return Ok(Some(end));
        }
        at += BLOCK_BYTES;
        carry = overflow;
        if block.quote == 0 {
            let run = run(&piece[at..], ends_string);
            if run > 0 {
                at += run;
                carry = u64::from(ends_escaped(&piece[floor.min(at)..at]));
            }
        }
    }
    if at < piece.len() {
        let block = last_masks(piece, at, &masks);
        let (escapes, _) = escaped_bytes(block.backslash, carry);
        if let Some(end) = string_end(piece, at, &block, escapes)? {
            *escaped = false;
            return Ok(Some(end));
        }
        carry = escapes >> (piece.len() - at) & 1;
    }
    *escaped = carry == 1;
    Ok(None)
}

/// Returns the position after the quote that ends the string, or `None` if it is not in the block
/// at `at`. Fails if a control character precedes the quote.
#[inline(always)]
fn string_end(piece: &[u8], at: usize, block: &Masks, escapes: u64) -> End {
    let ends = (block.quote & !escapes) | block.control;
    if ends == 0 {
        return Ok(None);
    }
    let end = at + ends.trailing_zeros() as usize;
    match piece[end] {
        b'"' => Ok(Some(end + 1)),
        _ => Err(control(end)),
    }
}

/// Skips the rest of a container; see [`Isa::container`](super::Isa::container).
#[inline(always)]
pub(super) fn container(
    skip: &mut Skip,
    piece: &[u8],
    mut at: usize,
    masks: impl Fn(&Block) -> Masks,
    prefix_xor: impl Fn(u64) -> u64,
) -> End {
    let mut walk = Walk {
        carry: skip.carry(),
        skip,
        piece,
        prefix_xor,
    };
    while let Some(block) = piece[at..].first_chunk() {
        let block = masks(block);
        let stop = walk.block(at, BLOCK_BYTES, &block)?;
        if stop.is_some() {
            walk.skip.keep(walk.carry);
            return Ok(stop);
        }
        at += BLOCK_BYTES;
        if block.quote != 0 {
            continue;
        }
        if walk.carry.quoted != 0 {
            let mut escaped = walk.carry.escaped == 1;
            let end = string(piece, at, &mut escaped, &masks)?;
            walk.carry.quoted = ones(end.is_none());
            walk.carry.escaped = u64::from(escaped);
            at = end.unwrap_or(piece.len());
        } else if block.open | block.close == 0 {
            at += run(&piece[at..], is_structure);
        }
    }
    let mut stop = None;
    if at < piece.len() {
        let block = last_masks(piece, at, &masks);
        stop = walk.block(at, piece.len() - at, &block)?;
    }
    walk.skip.keep(walk.carry);
    Ok(stop)
}

/// A walk through the blocks of a skipped container in `piece`.
struct Walk<'a, P> {
    skip: &'a mut Skip,
    /// The part of the state in `skip` that every block changes.
    carry: Carry,
    piece: &'a [u8],
    /// Sets each bit of a word to the XOR of itself and all lower bits.
    prefix_xor: P,
}

impl<P: Fn(u64) -> u64> Walk<'_, P> {
    /// Processes the `len` bytes of the piece at `at`, which are at most one block and are
    /// classified in `masks`. Returns the position in the piece after the closing bracket of the
    /// skipped container, or `None` if the bracket is not among these bytes.
    #[inline(always)]
    fn block(&mut self, at: usize, len: usize, masks: &Masks) -> End {
        let Self { skip, carry, .. } = self;
        let (escaped, overflow) = escaped_bytes(masks.backslash, carry.escaped);
        // Set from each opening quote up to the byte before the closing one.
        let inside = (self.prefix_xor)(masks.quote & !escaped) ^ carry.quoted;
        let outside = !inside;
        if masks.backslash & outside != 0 {
            skip.keep(*carry);
            let stop = bytes::container(skip, &self.piece[..at + len], at)?;
            *carry = skip.carry();
            return Ok(stop);
        }
        let bad = match masks.control {
            0 => 0,
            control => (control & inside) | (masks.low & outside),
        };
        let brackets = (masks.open | masks.close) & outside;
        match carry.objects_in_a_row(brackets, masks, skip.entered) {
            Some(top) if bad == 0 => carry.top = top,
            _ => {
                skip.nest.top = carry.top;
                let stop = skip.one_by_one(self.piece, at, brackets, bad)?;
                carry.top = skip.nest.top;
                if stop.is_some() {
                    (carry.quoted, carry.escaped) = (0, 0);
                    return Ok(stop);
                }
            }
        }
        carry.quoted = ones(inside >> 63 == 1);
        carry.escaped = escaped_after(escaped, overflow, len);
        Ok(None)
    }
}

/// Returns the masks of the last bytes of `piece`, from `at` to its end, which must be 1 to 63
/// bytes.
#[inline(always)]
fn last_masks(piece: &[u8], at: usize, masks: impl Fn(&Block) -> Masks) -> Masks {
    let rest = &piece[at..];
    let missing = BLOCK_BYTES - rest.len();
    match piece.last_chunk() {
        // Converting some earlier bytes again is cheaper than copying the last ones to a buffer.
        Some(block) => masks(block).after(missing),
        None => {
            let mut block = [b' '; BLOCK_BYTES];
            block[missing..].copy_from_slice(rest);
            masks(&block).after(missing)
        }
    }
}

/// Returns the total length in bytes of the leading 64-byte blocks that contain no byte for which
/// `stops` is true.
#[inline(always)]
fn run(bytes: &[u8], stops: impl Fn(u8) -> bool) -> usize {
    let (blocks, _) = bytes.as_chunks::<BLOCK_BYTES>();
    // Not an iterator with a counter, for which the loop has no register left.
    let mut rest = blocks;
    while let Some((block, after)) = rest.split_first()
        && !block.iter().fold(false, |any, &byte| any | stops(byte))
    {
        rest = after;
    }
    (blocks.len() - rest.len()) * BLOCK_BYTES
}

/// Returns which bytes are escaped by the backslash before them, and 1 if the first byte after the
/// block is escaped, otherwise 0. `carry` must be 1 if the first byte of the block is escaped.
///
/// In a run of backslashes, every other one is an escape. A subtraction of the backslashes carries
/// through each run, which distinguishes runs that begin at an odd bit from those at an even bit.
#[inline(always)]
fn escaped_bytes(backslash: u64, carry: u64) -> (u64, u64) {
    const ODD: u64 = 0xaaaa_aaaa_aaaa_aaaa;
    let may_escape = backslash & !carry;
    let escapes_or_ends = ((may_escape << 1) | ODD).wrapping_sub(may_escape) ^ ODD;
    let escaped = escapes_or_ends ^ (backslash | carry);
    let escapes = escapes_or_ends & backslash;
    (escaped, escapes >> 63)
}

/// Returns 1 if the byte after the first `len` bytes of a block is escaped, otherwise 0. `escaped`
/// and `overflow` are the results of [`escaped_bytes`] for the block. `len` must be at most 64.
#[inline(always)]
const fn escaped_after(escaped: u64, overflow: u64, len: usize) -> u64 {
    if len < BLOCK_BYTES {
        escaped >> len & 1
    } else {
        overflow
    }
}

/// Returns whether `bytes` end with an odd number of backslashes, so that the next byte is escaped.
#[inline(always)]
fn ends_escaped(bytes: &[u8]) -> bool {
    let backslashes = bytes.iter().rev().take_while(|&&byte| byte == b'\\');
    backslashes.count() % 2 == 1
}

/// Returns a word with all bits set if `all` is true, otherwise 0.
const fn ones(all: bool) -> u64 {
    (all as u64).wrapping_neg()
}

const fn control(offset: usize) -> JsonError {
    JsonError {
        offset,
        reason: JsonReason::ControlCharacter,
    }
}
