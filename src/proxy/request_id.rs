//! The `x-request-id` of a request.

use crate::limits::REQUEST_ID_BYTES_MAX;

/// Length of a generated id in bytes.
const GENERATED_BYTES: usize = 36;

/// Whether a client's id may be copied into heads and logs: visible ASCII of limited length.
fn is_usable(id: &[u8]) -> bool {
    !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX && id.iter().all(u8::is_ascii_graphic)
}

/// The id of a request. An id of the usual length is stored inline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RequestId {
    Short([u8; GENERATED_BYTES]),
    Other(Box<[u8]>),
}

impl RequestId {
    /// Returns the client's id if it is usable, otherwise a new one in the text form of a UUID
    /// version 7 (RFC 9562 5.7). It starts with the time, so that ids sort by arrival in logs.
    pub(super) fn choose(client: Option<&[u8]>, unix_ms: u64, random: [u64; 2]) -> Self {
        match client {
            Some(id) if is_usable(id) => match id.try_into() {
                Ok(short) => Self::Short(short),
                Err(_) => Self::Other(id.into()),
            },
            Some(_) | None => Self::Short(uuid7(unix_ms, random)),
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short(id) => id,
            Self::Other(id) => id,
        }
    }
}

fn uuid7(unix_ms: u64, random: [u64; 2]) -> [u8; GENERATED_BYTES] {
    let mut bytes = [0_u8; 16];
    bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
    bytes[6..8].copy_from_slice(&random[0].to_be_bytes()[..2]);
    bytes[8..].copy_from_slice(&random[1].to_be_bytes());
    bytes[6] = 0x70 | (bytes[6] & 0x0f);
    bytes[8] = 0x80 | (bytes[8] & 0x3f);
    let mut text = [b'-'; GENERATED_BYTES];
    for (i, byte) in bytes.into_iter().enumerate() {
        // Groups of 4, 2, 2, 2 and 6 bytes, separated by hyphens.
        let hyphens = (i.clamp(2, 10) - 2) / 2;
        let at = 2 * i + hyphens;
        text[at] = hex(byte >> 4);
        text[at + 1] = hex(byte & 0x0f);
    }
    text
}

const fn hex(nibble: u8) -> u8 {
    if nibble < 10 {
        b'0' + nibble
    } else {
        b'a' + nibble - 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(client: Option<&[u8]>) -> String {
        let id = RequestId::choose(client, 0x0123_4567_89ab, [u64::MAX, u64::MAX]);
        String::from_utf8(id.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn usable_ids_are_kept_and_others_replaced() {
        let generated = "01234567-89ab-7fff-bfff-ffffffffffff";
        assert_eq!(chosen(Some(b"gw-17")), "gw-17");
        assert_eq!(chosen(None), generated);
        assert_eq!(chosen(Some(b"")), generated);
        assert_eq!(chosen(Some(b"two words")), generated);
        assert_eq!(chosen(Some("ü".as_bytes())), generated);
        assert_eq!(chosen(Some(&[b'x'; REQUEST_ID_BYTES_MAX + 1])), generated);
        assert_eq!(
            chosen(Some(&[b'x'; REQUEST_ID_BYTES_MAX])).len(),
            REQUEST_ID_BYTES_MAX
        );
    }
}
