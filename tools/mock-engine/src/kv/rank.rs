//! The data-parallel rank that `MoRI-IO` derives from the id of a request.
//!
//! The proxy computes the same ranks with the same hash function. The pinned values of the tests
//! below and of the proxy's tests keep both correct.

use blake2::{Blake2s256, Digest};

/// Returns the data-parallel rank, below `ranks`, that a request with this id belongs to: the first
/// 8 bytes of the id's BLAKE2s-256 digest (RFC 7693), modulo `ranks`. Returns 0 if `ranks` is 0 or
/// 1.
#[must_use]
pub fn dp_rank(id: &str, ranks: u64) -> u64 {
    if ranks <= 1 {
        return 0;
    }
    let digest = Blake2s256::digest(id);
    let first = digest[..8].iter();
    first.fold(0, |number: u64, byte| number << 8 | u64::from(*byte)) % ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::hex;

    #[test]
    fn digests_match_rfc_7693() {
        let want = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982";
        assert_eq!(hex(&Blake2s256::digest("abc")), want);
        // An empty input, and an input longer than one block.
        let empty = "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9";
        assert_eq!(hex(&Blake2s256::digest("")), empty);
        assert_ne!(Blake2s256::digest([0; 64]), Blake2s256::digest([0; 65]));
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
