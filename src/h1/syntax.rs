//! Byte classes of RFC 9110 5.6, shared by heads, chunk trailers and targets.

const TOKEN: u8 = 1;
const VALUE: u8 = 2;
const TARGET: u8 = 4;

const CLASS: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0_usize;
    while byte < 256 {
        let b = byte as u8;
        let mut class = 0;
        let mark = matches!(
            b,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        );
        if b.is_ascii_alphanumeric() || mark {
            class |= TOKEN;
        }
        if b == b'\t' || (b >= b' ' && b != 0x7f) {
            class |= VALUE;
        }
        // A fragment never belongs into a request (RFC 9112 3.2), and readers disagree on whether
        // the path ends before it.
        if b.is_ascii_graphic() && b != b'#' {
            class |= TARGET;
        }
        table[byte] = class;
        byte += 1;
    }
    table
}

/// Whether `byte` may stand in a token (RFC 9110 5.6.2).
pub(super) const fn is_token_byte(byte: u8) -> bool {
    CLASS[byte as usize] & TOKEN != 0
}

/// Whether `bytes` is a token: token bytes, at least one.
pub(super) fn is_token(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(|&byte| is_token_byte(byte))
}

/// Whether `byte` may stand in a field value: HTAB, SP, visible or obs-text (RFC 9110 5.5).
pub(super) const fn is_value_byte(byte: u8) -> bool {
    CLASS[byte as usize] & VALUE != 0
}

/// Whether `byte` may stand in a request target: visible ASCII but `#`.
pub(super) const fn is_target_byte(byte: u8) -> bool {
    CLASS[byte as usize] & TARGET != 0
}

/// Whether `byte` is optional whitespace (RFC 9110 5.6.3).
pub(super) const fn is_ows(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// The value of a hexadecimal digit.
pub(super) const fn hex_value(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}
