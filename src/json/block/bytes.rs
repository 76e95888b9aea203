//! Byte-by-byte implementation of skipping strings and containers, for blocks that the arithmetic
//! of `walk` cannot handle, and as the reference for tests of the other implementations.

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

/// Processes one byte of a string. `escaped` specifies whether that byte is escaped, and is set to
/// whether the next one is. Returns whether the byte is the closing quote, or an error if it is a
/// control character.
fn in_string(byte: u8, escaped: &mut bool) -> Result<bool, JsonReason> {
    if byte < 0x20 {
        return Err(JsonReason::ControlCharacter);
    }
    let ends = byte == b'"' && !*escaped;
    *escaped = byte == b'\\' && !*escaped;
    Ok(ends)
}

/// Processes one byte of a skipped container. Returns whether it is the bracket that closes this
/// container, or an error if the byte is not allowed.
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
