//! Base64 with padding (RFC 4648, section 4) in large texts, of which only a part is decoded or
//! replaced.

/// The alphabet, by value.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The value of each character; `INVALID` for bytes outside of the alphabet.
const VALUES: [u8; 256] = {
    let mut values = [INVALID; 256];
    let mut value = 0;
    while value < ALPHABET.len() {
        values[ALPHABET[value] as usize] = value as u8;
        value += 1;
    }
    values
};
const INVALID: u8 = 0xff;

/// A base64 text whose length is valid. Its characters are checked when they are decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text<'a>(&'a [u8]);

impl<'a> Text<'a> {
    /// Returns `None` if the length of the text is not a multiple of 4.
    pub(crate) fn new(text: &'a [u8]) -> Option<Self> {
        text.len().is_multiple_of(4).then_some(Self(text))
    }

    /// Returns the characters.
    pub(crate) const fn bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Returns the number of bytes that the text encodes.
    pub(crate) fn decoded_len(&self) -> usize {
        let padding = self.0.iter().rev().take(2);
        let padding = padding.take_while(|byte| **byte == b'=').count();
        self.0.len() / 4 * 3 - padding
    }

    /// Decodes `len` bytes from byte `at` on. Returns `None` if the text is too short or contains a
    /// character that is not one of the alphabet.
    pub(crate) fn decode(&self, at: usize, len: usize) -> Option<Vec<u8>> {
        let end = at.checked_add(len)?;
        if end > self.decoded_len() {
            return None;
        }
        let quads = self.0.get(at / 3 * 4..end.div_ceil(3) * 4)?;
        let mut bytes = Vec::with_capacity(quads.len() / 4 * 3);
        for quad in quads.chunks_exact(4) {
            bytes.extend_from_slice(&decode_quad(quad)?);
        }
        bytes.drain(..at % 3);
        bytes.truncate(len);
        Some(bytes)
    }
}

/// Replaces the bytes of `text` from byte `at` on by `data`, without a change of its length.
/// Returns `None` if the text is too short or contains a character that is not one of the alphabet.
pub(crate) fn overwrite(text: &mut [u8], at: usize, data: &[u8]) -> Option<()> {
    let end = at.checked_add(data.len())?;
    if end > Text::new(text)?.decoded_len() {
        return None;
    }
    let mut next = at;
    while next < end {
        let start = next / 3 * 3;
        let quad = text.get_mut(start / 3 * 4..)?.get_mut(..4)?;
        let until = end.min(start + 3);
        let mut bytes = decode_quad(quad)?;
        bytes[next - start..until - start].copy_from_slice(&data[next - at..until - at]);
        let padding = quad.iter().filter(|byte| **byte == b'=').count();
        let encoded = encode_triple(bytes);
        quad[..4 - padding].copy_from_slice(&encoded[..4 - padding]);
        next = until;
    }
    Some(())
}

/// Decodes four characters. Padding, which is allowed as the last one or two, counts as zero.
fn decode_quad(quad: &[u8]) -> Option<[u8; 3]> {
    let mut bits = 0_u32;
    for (index, &character) in quad.iter().enumerate() {
        let is_padding = character == b'=' && (index == 3 || index == 2 && quad[3] == b'=');
        let value = match VALUES[usize::from(character)] {
            INVALID if is_padding => 0,
            INVALID => return None,
            value => value,
        };
        bits = bits << 6 | u32::from(value);
    }
    let [_, bytes @ ..] = bits.to_be_bytes();
    Some(bytes)
}

fn encode_triple([a, b, c]: [u8; 3]) -> [u8; 4] {
    let bits = u32::from_be_bytes([0, a, b, c]);
    [18, 12, 6, 0].map(|shift| ALPHABET[(bits >> shift & 63) as usize])
}

/// Encodes bytes.
#[cfg(test)]
pub(crate) fn encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for triple in bytes.chunks(3) {
        let mut padded = [0; 3];
        padded[..triple.len()].copy_from_slice(triple);
        let encoded = encode_triple(padded);
        text.extend(
            encoded[..=triple.len()]
                .iter()
                .map(|byte| char::from(*byte)),
        );
        text.extend(std::iter::repeat_n('=', 3 - triple.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of RFC 4648, section 10.
    #[test]
    fn the_vectors_of_the_rfc() {
        for (bytes, want) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), want);
            let text = Text::new(want.as_bytes()).unwrap();
            assert_eq!(text.decoded_len(), bytes.len());
            let decoded = text.decode(0, bytes.len()).unwrap();
            assert_eq!(decoded, bytes.as_bytes());
        }
    }

    #[test]
    fn every_part_can_be_decoded_and_overwritten() {
        for len in 0..20_usize {
            let bytes: Vec<u8> = (0..len).map(|at| (at * 37 + 200) as u8).collect();
            for at in 0..=len {
                for part in 0..=len - at {
                    let text = encode(&bytes);
                    let text = Text::new(text.as_bytes()).unwrap();
                    assert_eq!(text.decode(at, part).unwrap(), &bytes[at..at + part]);
                    assert_eq!(text.decode(at, len - at + 1), None);
                    let data = vec![0x5a; part];
                    let mut want = bytes.clone();
                    want[at..at + part].copy_from_slice(&data);
                    let mut have = encode(&bytes).into_bytes();
                    overwrite(&mut have, at, &data).unwrap();
                    assert_eq!(have, encode(&want).as_bytes());
                }
                let mut short = encode(&bytes).into_bytes();
                assert_eq!(overwrite(&mut short, at, &vec![0; len - at + 1]), None);
            }
        }
    }

    #[test]
    fn other_characters_are_refused() {
        for text in ["A\\/A", "A=AA", "AAA-", "AA A", "===="] {
            let quad = Text::new(text.as_bytes()).unwrap();
            assert_eq!(quad.decode(0, 1), None, "{text}");
            assert_eq!(overwrite(&mut text.as_bytes().to_vec(), 0, b"x"), None);
        }
        assert!(Text::new(b"AAA").is_none());
    }
}
