//! BLAKE2s-256 (RFC 7693) and the data-parallel rank that `MoRI-IO` derives from it.
//!
//! This implementation is independent of the proxy's because it verifies the ranks that the proxy
//! computes.

const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];

/// For each of the eight mixing steps of a round, the indices of the four words that it combines:
/// first the columns, then the diagonals of the 16-word working vector (`v` in [`compress`]).
const LANES: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];

/// Returns the data-parallel rank, below `ranks`, that a request with this id belongs to. Returns 0
/// if `ranks` is 0 or 1.
#[must_use]
pub fn dp_rank(id: &str, ranks: u64) -> u64 {
    if ranks <= 1 {
        return 0;
    }
    let digest = digest(id.as_bytes());
    let first = digest[..8].iter();
    first.fold(0, |number: u64, byte| number << 8 | u64::from(*byte)) % ranks
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut state = IV;
    // Parameter block: 32-byte digest, no key, fanout 1, depth 1.
    state[0] ^= 0x0101_0020;
    let mut blocks: Vec<&[u8]> = bytes.chunks(64).collect();
    if blocks.is_empty() {
        blocks.push(&[]);
    }
    let last = blocks.len() - 1;
    let mut counted = 0;
    for (nth, block) in blocks.into_iter().enumerate() {
        counted += block.len() as u64;
        let mut padded = [0; 64];
        padded[..block.len()].copy_from_slice(block);
        compress(&mut state, &padded, counted, nth == last);
    }
    let mut digest = [0; 32];
    for (out, word) in digest.chunks_mut(4).zip(state) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    digest
}

fn compress(state: &mut [u32; 8], block: &[u8; 64], counted: u64, last: bool) {
    let mut words = [0_u32; 16];
    for (word, bytes) in words.iter_mut().zip(block.chunks(4)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    let mut v = [0; 16];
    v[..8].copy_from_slice(state);
    v[8..].copy_from_slice(&IV);
    v[12] ^= counted as u32;
    v[13] ^= (counted >> 32) as u32;
    if last {
        v[14] = !v[14];
    }
    for round in SIGMA {
        for (nth, [a, b, c, d]) in LANES.into_iter().enumerate() {
            for (message, turns) in [(round[2 * nth], [16, 12]), (round[2 * nth + 1], [8, 7])] {
                v[a] = v[a].wrapping_add(v[b]).wrapping_add(words[message]);
                v[d] = (v[d] ^ v[a]).rotate_right(turns[0]);
                v[c] = v[c].wrapping_add(v[d]);
                v[b] = (v[b] ^ v[c]).rotate_right(turns[1]);
            }
        }
    }
    for (nth, word) in state.iter_mut().enumerate() {
        *word ^= v[nth] ^ v[nth + 8];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::hex;

    #[test]
    fn digests_match_rfc_7693() {
        let want = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982";
        assert_eq!(hex(&digest(b"abc")), want);
        // An empty input, and an input longer than one block.
        let empty = "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9";
        assert_eq!(hex(&digest(b"")), empty);
        assert_ne!(digest(&[0; 64]), digest(&[0; 65]));
    }

    #[test]
    fn ranks_match_pinned_values() {
        for (id, ranks, want) in [
            ("abc", 8, 2),
            ("cmpl-foo-0", 8, 5),
            ("00000000-0000-0000-0000-000000000000", 8, 6),
            ("abc", 2, 0),
            ("abc", 16, 2),
            ("abc", 1, 0),
            ("abc", 0, 0),
        ] {
            assert_eq!(dp_rank(id, ranks), want, "{id} of {ranks}");
        }
    }
}
