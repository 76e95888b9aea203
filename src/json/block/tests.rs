//! Compares every instruction set that this machine supports with the byte-by-byte implementation.

use std::mem::discriminant;

use super::super::oracle::Random;
use super::*;
use crate::limits::JSON_DEPTH_MAX;

/// Result of skipping a string or container in a text, and the state afterwards.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Result of skipping. Its offsets are relative to the start of the whole text.
    end: End,
    quoted: bool,
    escaped: bool,
    /// Kinds of the containers that are still open, the innermost first: `true` for an object,
    /// `false` for an array.
    open: Vec<bool>,
}

/// Skips a container from state `skip` on, with `text` split at the positions `cuts`. Each part is
/// passed in a buffer that contains other bytes before it, as in a body where members that are read
/// precede the container.
fn container(isa: Isa, skip: &Skip, text: &[u8], cuts: &[usize]) -> Seen {
    let mut skip = skip.clone();
    let end = pieces(text, cuts, |piece, at| isa.container(&mut skip, piece, at));
    let mut open = Vec::new();
    while skip.nest.top.depth > 0 {
        open.push(skip.nest.top.inside_object());
        skip.nest.close();
    }
    // The state after an error is not used.
    let (quoted, escaped) = (skip.quoted && end.is_ok(), skip.escaped && end.is_ok());
    open.truncate(if end.is_ok() { open.len() } else { 0 });
    Seen {
        end,
        quoted,
        escaped,
        open,
    }
}

fn string(isa: Isa, escaped: bool, text: &[u8], cuts: &[usize]) -> Seen {
    let mut escaped = escaped;
    let end = pieces(text, cuts, |piece, at| isa.string(piece, at, &mut escaped));
    let escaped = escaped && end.is_ok();
    Seen {
        end,
        quoted: false,
        escaped,
        open: Vec::new(),
    }
}

fn pieces(text: &[u8], cuts: &[usize], mut read: impl FnMut(&[u8], usize) -> End) -> End {
    let mut start = 0;
    for &cut in cuts.iter().chain([&text.len()]) {
        let before =
            &b"\"\\[{}]\"x\\\\\x01{\"a\": \"b\", \"c\": [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]"
                [..];
        let before = &before[..(start * 7 + cut) % before.len()];
        let piece = [before, &text[start..cut]].concat();
        let moved = |at: usize| at - before.len() + start;
        match read(&piece, before.len()) {
            Ok(None) => start = cut,
            Ok(Some(at)) => return Ok(Some(moved(at))),
            Err(error) => {
                let offset = moved(error.offset);
                return Err(JsonError { offset, ..error });
            }
        }
    }
    Ok(None)
}

/// Asserts that all implementations return the same result for `text`, both as a container in state
/// `skip` and as a string, as a whole and split at random positions.
fn same(text: &[u8], skip: &Skip, random: &mut Random) {
    let [bytes, others @ ..] = &Isa::all()[..] else {
        panic!("no implementation")
    };
    let want = container(*bytes, skip, text, &[]);
    let want_string = string(*bytes, skip.escaped, text, &[]);
    for &isa in others {
        for cuts in [Vec::new(), random.cuts(text.len()), random.cuts(text.len())] {
            let seen = container(isa, skip, text, &cuts);
            assert_eq!(seen, want, "{isa:?} {cuts:?} {}", text.escape_ascii());
            let seen = string(isa, skip.escaped, text, &cuts);
            assert_eq!(
                seen,
                want_string,
                "{isa:?} {cuts:?} {}",
                text.escape_ascii()
            );
        }
    }
}

/// Returns the state inside an array in the outermost object, which has been entered.
fn in_array() -> Skip {
    let mut skip = Skip::new();
    skip.nest.open(true);
    skip.entered = 1;
    skip.nest.open(false);
    skip
}

#[test]
fn every_used_instruction_set_is_tested() {
    let all = Isa::all().into_iter().map(|isa| discriminant(&isa.0));
    let used = [Set::Bytes, Set::Portable, Isa::best().0];
    assert!(
        used.iter()
            .all(|set| all.clone().any(|tested| tested == discriminant(set)))
    );
}

#[test]
fn every_byte_at_every_position() {
    let mut random = Random::new(0);
    for quoted in [false, true] {
        let mut skip = in_array();
        skip.quoted = quoted;
        for byte in 0..=u8::MAX {
            for at in 0..140 {
                let mut text = [b'7'; 150];
                text[at] = byte;
                // The bytes after it must not affect the result.
                text[at + 1..].fill(byte ^ 1);
                text[at + 1] = b'"';
                text[at + 2] = b']';
                same(&text, &skip, &mut random);
            }
        }
    }
}

#[test]
fn runs_of_backslashes() {
    let mut random = Random::new(1);
    for (quoted, escaped) in [(false, false), (true, false), (true, true)] {
        let mut skip = in_array();
        (skip.quoted, skip.escaped) = (quoted, escaped);
        for lead in 0..70 {
            for run in [0, 1, 2, 3, 4, 5, 62, 63, 64, 65, 66, 127, 128, 129] {
                let text = format!("{}{}\"]\",]", "x".repeat(lead), "\\".repeat(run));
                same(text.as_bytes(), &skip, &mut random);
            }
        }
    }
}

/// Returns the bytes of a container, mostly valid, from its first element to beyond its end.
fn random_text(random: &mut Random, skip: &Skip) -> Vec<u8> {
    let mut open = skip.clone();
    let mut text = Vec::new();
    let faults = random.pick(&[20, 200, 10_000]);
    // Each kind of element is absent, rare or frequent.
    let weights = [(); 6].map(|()| random.pick(&[0, 1, 6]));
    for _ in 0..random.below(60) {
        if random.one_in(faults) {
            text.push(random.pick(b"\\\x00\x08\x1f\x7f[]{}\"\xff"));
        }
        let last = weights.iter().sum::<usize>() + 1;
        let mut element = random.below(last);
        let kind = weights.iter().position(|&weight| {
            let here = element < weight;
            element = element.saturating_sub(weight);
            here
        });
        match kind {
            Some(0) => random_string(random, faults, &mut text),
            Some(1) => {
                text.extend_from_slice(random.pick(&[&b"7,"[..], b": ", b",\n\t", b"true,"]))
            }
            Some(2) => text.extend(std::iter::repeat_n(b'7', random.below(150))),
            Some(3) => {
                text.push(b'{');
                open.nest.open(true);
            }
            Some(4) if random.one_in(3) => {
                text.push(b'[');
                open.nest.open(false);
            }
            // Sometimes closes the skipped container itself.
            _ if open.nest.top.depth > open.entered + usize::from(!random.one_in(40)) => {
                text.push(if open.nest.top.inside_object() {
                    b'}'
                } else {
                    b']'
                });
                open.nest.close();
            }
            _ => {}
        }
    }
    text
}

fn random_string(random: &mut Random, faults: usize, text: &mut Vec<u8>) {
    text.push(b'"');
    let dense = random.pick(&[2, 10, 100]);
    for _ in 0..random.pick(&[0, 3, 30, 150]) {
        if random.one_in(faults * 10) {
            text.push(random.pick(b"\x00\n\x1f"));
        } else if random.one_in(dense) {
            text.extend_from_slice(random.pick(&[&b"\\\\"[..], b"\\\"", b"\\n", b"{", b"]", b"}"]));
        } else {
            text.push(random.pick(b"xyz \xc3\x7f"));
        }
    }
    text.push(b'"');
}

#[test]
fn random_containers() {
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mut skip = Skip::new();
        // `Top::kinds` has 64 bits, so errors are most likely around multiples of 64.
        let depth = random.pick(&[
            1,
            2,
            3,
            62,
            63,
            64,
            65,
            127,
            128,
            JSON_DEPTH_MAX - 1,
            JSON_DEPTH_MAX,
        ]);
        for _ in 0..depth {
            skip.nest.open(random.one_in(2));
        }
        skip.entered = random
            .pick(&[1, depth - 1, depth - 1])
            .clamp(1, 4)
            .min(depth);
        if skip.entered == depth {
            skip.nest.open(random.one_in(2));
        }
        let text = random_text(&mut random, &skip);
        same(&text, &skip, &mut random);
        skip.quoted = true;
        skip.escaped = random.one_in(2);
        same(&text, &skip, &mut random);
    }
}

#[test]
fn random_bytes() {
    for seed in 0..5_000 {
        let mut random = Random::new(seed);
        let alphabet = random.pick(&[&b"\"\\"[..], b"\"\\x{}", b"[]{}\"", b"\"\\[]{},\n\x01 x"]);
        let len = random.below(300);
        let text: Vec<u8> = (0..len).map(|_| random.pick(alphabet)).collect();
        let mut skip = in_array();
        skip.quoted = random.one_in(2);
        same(&text, &skip, &mut random);
    }
}
