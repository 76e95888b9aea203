//! One byte after the other: for a block that the arithmetic cannot read, and for tests to compare
//! all others with.

use super::super::error::{JsonError, JsonReason};
use super::{End, Skip};

#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn string(piece: &[u8], at: usize, escaped: &mut bool) -> End {
    for (at, &byte) in piece.iter().enumerate().skip(at) {
        if in_string(byte, escaped).map_err(|reason| JsonError { offset: at, reason })? {
            return Ok(Some(at + 1));
        }
    }
    Ok(None)
}

#[cold]
pub(super) fn container(skip: &mut Skip, piece: &[u8], at: usize) -> End {
    for (at, &byte) in piece.iter().enumerate().skip(at) {
        if in_container(skip, byte).map_err(|reason| JsonError { offset: at, reason })? {
            return Ok(Some(at + 1));
        }
    }
    Ok(None)
}

/// One byte of a string; true for the closing quote.
fn in_string(byte: u8, escaped: &mut bool) -> Result<bool, JsonReason> {
    if byte < 0x20 {
        return Err(JsonReason::ControlCharacter);
    }
    let ends = byte == b'"' && !*escaped;
    *escaped = byte == b'\\' && !*escaped;
    Ok(ends)
}

/// One byte of a skipped container; true for its closing bracket.
fn in_container(skip: &mut Skip, byte: u8) -> Result<bool, JsonReason> {
    if skip.quoted {
        skip.quoted = !in_string(byte, &mut skip.escaped)?;
        return Ok(false);
    }
    match byte {
        0..b'\t' => Err(JsonReason::ControlCharacter),
        b'"' => {
            skip.quoted = true;
            Ok(false)
        }
        b'{' | b'[' | b'}' | b']' => skip.bracket(byte),
        _ => Ok(false),
    }
}
