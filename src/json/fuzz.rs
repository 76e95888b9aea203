//! Bodies of the fuzz targets. Each takes arbitrary bytes and asserts properties that must hold for
//! all input. `cargo test` also runs them over the committed corpus and over random documents.

mod usage;

pub use usage::{fuzz_sse, fuzz_usage};

use std::rc::Rc;
use std::sync::Arc;

use super::oracle::{
    Random, Tree, compare_validity, may_have_surrogates, same_for_all_cuts, same_for_all_isas,
};
use super::{
    Document, Edit, EditError, FormMask, FormMaskError, Handoff, JsonError, JsonReason, Kind,
    Level, Mask, Params, PrefillResponse, Scanner, Watch, validate,
};
use crate::budget::{Budget, Kept};
use crate::span::Span;

const WATCH: Watch = &[
    (Level::Top, "max_tokens"),
    (Level::Top, "stream"),
    (Level::Top, "stream_options"),
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "sampling_params"),
    (Level::SamplingParams, "max_tokens"),
    (Level::SamplingParams, "min_tokens"),
    (Level::SamplingParams, "extra_args"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "max_tokens"),
    (Level::Xargs, "kv_transfer_params"),
];

/// A subset of [`WATCH`] without the members whose objects contain other watched members.
const LEAVES: Watch = &[
    (Level::Top, "max_tokens"),
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "stream"),
    (Level::SamplingParams, "max_tokens"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
];

/// Member names for random request bodies, including names that are similar to watched ones.
#[cfg(test)]
const NAMES: &[&str] = &[
    "max_tokens",
    "max_token",
    "stream",
    "stream_options",
    "kv_transfer_params",
    "sampling_params",
    "sampling_params",
    "sampling_params",
    "extra_args",
    "extra_args",
    "vllm_xargs",
    "vllm_xargs",
    "min_tokens",
    "Max_tokens",
    "usage",
    "response",
    "prompt_tokens_details",
    "input_tokens_details",
    "cached_tokens",
    "",
];

/// Member names for random responses.
#[cfg(test)]
const RESPONSE_NAMES: &[&str] = &[
    "usage",
    "usage",
    "usage",
    "response",
    "prompt_tokens_details",
    "prompt_tokens_details",
    "input_tokens_details",
    "input_tokens_details",
    "cached_tokens",
    "cached_tokens",
    "kv_transfer_params",
    "do_remote_prefill",
    "remote_block_ids",
];

/// Returns a random number generator that is seeded with a hash of `data`.
fn seeded(data: &[u8]) -> Random {
    let sum = data.iter().fold(data.len() as u64, |sum, &byte| {
        sum.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte)
    });
    Random::new(sum)
}

/// Checks that the scanner does not panic, that its result for `data` is the same for all
/// instruction sets and for several splits, that it accepts every valid object within its limits,
/// and that it finds the same members as a full parser.
pub fn fuzz_scan(data: &[u8]) {
    let mut random = seeded(data);
    let result = same_for_all_isas(data, &mut random, |pieces, isa| {
        let scanner = Scanner::new(WATCH).with_isa(isa);
        scan_with(scanner, pieces)
            .map(|document| (document.members, document.objects, document.effective))
    });
    let tree = Tree::parse(data);
    if !outside_serde(data) {
        let valid = serde_json::from_slice::<serde_json::Value>(data).is_ok();
        assert_eq!(
            validate(data).is_ok(),
            valid,
            "validator: {}",
            data.escape_ascii()
        );
        assert_eq!(tree.is_some(), valid, "oracle: {}", data.escape_ascii());
    }
    compare_validity(data, validate(data));
    let Some(tree) = tree else { return };
    if !tree.is_object() {
        assert!(result.is_err(), "not an object: {}", data.escape_ascii());
        return;
    }
    if let Ok(document) = scan(&mut std::iter::once(data)) {
        compare(data, &document, &tree);
    } else {
        assert!(
            repetitions(&tree) > 15,
            "valid but refused: {}",
            data.escape_ascii()
        );
    }
}

/// Checks that editing and then parsing a body gives the same result as parsing and then editing
/// it, and that no byte outside of the edits changes, whether the body is valid or not.
pub fn fuzz_edit(data: &[u8]) {
    let mut random = seeded(data);
    let Ok(document) = scan(&mut std::iter::once(data)) else {
        return;
    };
    for _ in 0..4 {
        let edits = random_edits(&mut random);
        let splices = match document.edit(&edits) {
            Ok(splices) => splices,
            Err(error) => {
                assert_eq!(error, EditError::NoObject);
                assert!(edits.iter().any(|edit| match edit {
                    Edit::Set { level, .. }
                    | Edit::SetKept { level, .. }
                    | Edit::SetAround { level, .. } => !document.has_object(*level),
                    Edit::Remove { .. } | Edit::Append { .. } => false,
                }));
                continue;
            }
        };
        let edited: Vec<u8> = splices.pieces(data).flatten().copied().collect();
        assert_eq!(splices.len(), edited.len());
        check_uncopied(&document, data, &edits, &edited, &mut random);
        assert_eq!(splices.count(), splices.pieces(data).count());
        assert!(splices.pieces(data).all(|piece| !piece.is_empty()));
        check_fill(&splices, data, &edited, &mut random);
        check_outside(&document, data, &edits, &splices);
        if let Some(mut tree) = Tree::parse(data) {
            apply(&mut tree, &edits);
            let text = || {
                format!(
                    "{} {edits:?} {}",
                    data.escape_ascii(),
                    edited.escape_ascii()
                )
            };
            assert_eq!(Tree::parse(&edited), Some(tree), "{}", text());
        }
    }
}

/// Checks that the mask keeps the length, changes only the watched values, overwrites these
/// correctly, holds back at most three bytes, and refuses values that are too short, for several
/// splits of the input.
pub fn fuzz_mask(data: &[u8]) {
    for watch in [WATCH, LEAVES] {
        let mut random = seeded(data);
        let result = same_for_all_isas(data, &mut random, |pieces, isa| {
            mask(Mask::new(watch).with_isa(isa), pieces)
        });
        let (masked, count) = match result {
            Ok(masked) => masked,
            Err(error) => {
                assert!(
                    error.reason == JsonReason::NotClients
                        || !Tree::parse(data).is_some_and(|tree| tree.is_object())
                );
                continue;
            }
        };
        let mut want = data.to_vec();
        let mut overwritten = 0;
        let Ok(document) = scan(&mut std::iter::once(data)) else {
            continue;
        };
        let mut hidden_until = 0;
        for member in document.members() {
            let listed = watch.contains(&(member.level, member.name));
            // Watched members inside an overwritten value do not count separately.
            if !listed || member.key.start < hidden_until {
                continue;
            }
            hidden_until = member.value.end;
            let is_harmless = matches!(member.kind, Kind::Null | Kind::Object);
            assert!(
                member.value.len() >= 4 || is_harmless,
                "{}",
                data.escape_ascii()
            );
            if member.value.len() >= 4 && member.kind != Kind::Null {
                overwritten += 1;
                want[member.value.start..member.value.end].fill(b' ');
                want[member.value.start..member.value.start + 4].copy_from_slice(b"null");
            }
        }
        assert_eq!(masked, want, "{}", data.escape_ascii());
        assert_eq!(count, overwritten);
    }
}

/// Checks that the result of reading a prefill response is the same for several splits of the
/// input, and that the handoff is valid and byte-identical to a part of the input.
pub fn fuzz_response(data: &[u8]) {
    let mut random = seeded(data);
    let result = same_for_all_isas(data, &mut random, |pieces, isa| {
        response(
            PrefillResponse::new(1 << 20, &unlimited()).with_isa(isa),
            pieces,
        )
    });
    let tree = Tree::parse(data).filter(Tree::is_object);
    let Ok(handoff) = result else {
        assert!(tree.is_none(), "valid but refused: {}", data.escape_ascii());
        return;
    };
    if let Params::Object(bytes) = &handoff.params {
        assert!(validate(bytes).is_ok());
        assert!(bytes.starts_with(b"{"));
        assert!(data.windows(bytes.len()).any(|window| window == &**bytes));
        let small = PrefillResponse::new(bytes.len() - 1, &unlimited());
        let small = response(small, &mut std::iter::once(data));
        assert!(
            small.is_err(),
            "kept more than allowed: {}",
            data.escape_ascii()
        );
    }
    let Some(tree) = tree else { return };
    let params = tree.last("kv_transfer_params");
    match &handoff.params {
        Params::Absent => assert_eq!(params, None),
        Params::Null => assert!(params.is_some_and(Tree::is_nothing)),
        Params::Object(bytes) => {
            assert_eq!(params, Tree::parse(bytes).as_ref());
            let is_push = params.is_some_and(|params| params.has_text("transfer_mode", "push"));
            assert_eq!(handoff.is_push, is_push);
        }
        Params::Malformed(_) => assert!(params.is_some()),
    }
    let usage = tree.last("usage");
    let count = |object: Option<&Tree>, name: &str| match object?.last(name)? {
        Tree::Scalar(text) if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        Tree::Scalar(_) | Tree::Array(_) | Tree::Object(_) => None,
    };
    let cached = |details: &str| count(usage?.last(details), "cached_tokens");
    let want = cached("prompt_tokens_details")
        .or_else(|| cached("input_tokens_details"))
        .or_else(|| count(usage, "cache_read_input_tokens"));
    assert_eq!(handoff.cached_tokens, want, "{}", data.escape_ascii());
    assert_eq!(handoff.input_tokens, count(usage, "input_tokens"));
}

/// Boundary of the forms in these tests.
const BOUNDARY: &[u8] = b"x7";

/// Checks that a form gives the same result for several splits, keeps its length, and has nothing
/// left to overwrite afterwards.
pub fn fuzz_form(data: &[u8]) {
    let mut random = seeded(data);
    let result = same_for_all_cuts(data, &mut random, form);
    if let Ok((sent, _)) = result {
        assert_eq!(sent.len(), data.len());
        let again = form(&mut std::iter::once(&sent[..]));
        assert_eq!(again, Ok((sent, 0)));
    }
}

fn form(pieces: &mut dyn Iterator<Item = &[u8]>) -> Result<(Vec<u8>, u32), FormMaskError> {
    let mut mask = FormMask::new(BOUNDARY);
    let mut sent = Vec::new();
    for piece in pieces {
        mask.feed(piece, &mut sent)?;
    }
    mask.finish()?;
    Ok((sent, mask.masked()))
}

fn scan(pieces: &mut dyn Iterator<Item = &[u8]>) -> Result<Document, JsonError> {
    scan_with(Scanner::new(WATCH), pieces)
}

fn scan_with(
    mut scanner: Scanner,
    pieces: &mut dyn Iterator<Item = &[u8]>,
) -> Result<Document, JsonError> {
    for piece in pieces {
        scanner.feed(piece)?;
    }
    scanner.finish()
}

fn mask(
    mut mask: Mask,
    pieces: &mut dyn Iterator<Item = &[u8]>,
) -> Result<(Vec<u8>, u32), JsonError> {
    let mut sent = Vec::new();
    let mut received = 0;
    for piece in pieces {
        received += piece.len();
        let mut piece = piece.to_vec();
        let masked = mask.feed(&mut piece)?;
        sent.extend_from_slice(&masked.held);
        sent.extend_from_slice(&piece[..masked.ready]);
        assert!(
            received - sent.len() <= 3,
            "more than three bytes held back"
        );
    }
    mask.finish()?;
    assert_eq!(received, sent.len());
    Ok((sent, mask.masked()))
}

fn unlimited() -> Arc<Budget> {
    Budget::new(u64::MAX)
}

fn response(
    mut response: PrefillResponse,
    pieces: &mut dyn Iterator<Item = &[u8]>,
) -> Result<Handoff, JsonError> {
    for piece in pieces {
        response.feed(piece)?;
    }
    response.finish()
}

const fn path(level: Level) -> &'static [&'static str] {
    match level {
        Level::Top => &[],
        Level::SamplingParams => &["sampling_params"],
        Level::ExtraArgs => &["sampling_params", "extra_args"],
        Level::Xargs => &["vllm_xargs"],
        Level::Parameters => &["parameters"],
    }
}

/// Returns the object that an engine would use at `level`, or `None` if it would find none.
fn effective(tree: &Tree, level: Level) -> Option<&Tree> {
    let found = path(level)
        .iter()
        .try_fold(tree, |tree, name| tree.last(name));
    found.filter(|tree| tree.is_object())
}

fn compare(data: &[u8], document: &Document, tree: &Tree) {
    for &(level, name) in WATCH {
        let object = effective(tree, level);
        assert_eq!(
            document.has_object(level),
            object.is_some(),
            "{}",
            data.escape_ascii()
        );
        let want = object.and_then(|object| object.last(name));
        let member = document.last(level, name);
        let found = member.and_then(|member| Tree::parse(member.value.of(data)));
        assert_eq!(
            found.as_ref(),
            want,
            "{level:?} {name} in {}",
            data.escape_ascii()
        );
        let mut count = 0;
        tree.clone().each(path(level), &mut |members| {
            count += members.iter().filter(|member| member.0 == name).count();
        });
        let listed = document
            .members()
            .iter()
            .filter(|m| (m.level, m.name) == (level, name));
        assert_eq!(
            listed.count(),
            count,
            "{level:?} {name} in {}",
            data.escape_ascii()
        );
    }
    for member in document.members() {
        let name = member.key.of(data);
        assert_eq!(
            serde_json::from_slice::<String>(name).ok().as_deref(),
            Some(member.name)
        );
        let kind = match data[member.value.start] {
            b'{' => Kind::Object,
            b'[' => Kind::Array,
            b'"' => Kind::String,
            b't' => Kind::True,
            b'f' => Kind::False,
            b'n' => Kind::Null,
            _ => Kind::Number,
        };
        assert_eq!(member.kind, kind);
    }
}

/// Returns an upper bound for the number of objects and watched members that count towards the
/// limits of the scanner.
fn repetitions(tree: &Tree) -> usize {
    let mut count = 0;
    for level in [
        Level::Top,
        Level::SamplingParams,
        Level::ExtraArgs,
        Level::Xargs,
        Level::Parameters,
    ] {
        tree.clone()
            .each(path(level), &mut |members| count += 1 + members.len());
    }
    count
}

/// Returns whether `serde_json` may refuse a valid text, because it may have lone surrogates, which
/// the grammar allows, or because it may be nested too deeply for `serde_json`.
fn outside_serde(data: &[u8]) -> bool {
    let deep = data
        .iter()
        .filter(|&&byte| matches!(byte, b'[' | b'{'))
        .count()
        > 99;
    deep || may_have_surrogates(data)
}

fn random_edits(random: &mut Random) -> Vec<Edit<'static>> {
    let mut edits: Vec<Edit<'static>> = Vec::new();
    for &(level, name) in WATCH {
        let inside = edits.iter().any(|edit| {
            matches!(
                edit.target(),
                (Level::Top, "sampling_params") | (Level::SamplingParams, "extra_args")
            )
        });
        if inside && level != Level::Top {
            continue;
        }
        match random.below(6) {
            0 => {
                let value = random.pick(&[&b"1"[..], b"null", b"{\"a\":[1,\"}\"]}", b" \"x\" "]);
                edits.push(Edit::Set { level, name, value });
            }
            1 => edits.push(Edit::Remove { level, name }),
            _ => {}
        }
    }
    edits
}

fn apply(tree: &mut Tree, edits: &[Edit<'_>]) {
    for edit in edits {
        match *edit {
            // Not generated, because the text depends on whether the array is empty.
            Edit::Append { .. } | Edit::SetKept { .. } | Edit::SetAround { .. } => {}
            Edit::Remove { level, name } => tree.each(path(level), &mut |members| {
                members.retain(|member| member.0 != name);
            }),
            Edit::Set { level, name, value } => tree.each(path(level), &mut |members| {
                let Some(value) = Tree::parse(value) else {
                    return;
                };
                if !members.iter().any(|member| member.0 == name) {
                    members.push((name.to_owned(), value.clone()));
                }
                for member in members.iter_mut().filter(|member| member.0 == name) {
                    member.1 = value.clone();
                }
            }),
        }
    }
}

/// Checks that values which are shared, or parts of the body, result in the same as copied ones.
fn check_uncopied(
    document: &Document,
    data: &[u8],
    edits: &[Edit<'_>],
    edited: &[u8],
    random: &mut Random,
) {
    let bytes_of = |edits: &[Edit<'_>]| -> Result<Vec<u8>, EditError> {
        let splices = document.edit(edits)?;
        Ok(splices.pieces(data).flatten().copied().collect())
    };
    let start = random.below(data.len() + 1);
    let source = Span::new(start, start + random.below(data.len() - start + 1));
    let values = edits.iter().map(|edit| match edit {
        Edit::Set { value, .. } => {
            let around = [value, source.of(data), value].concat();
            (Rc::new(Kept::unlimited(value)), around)
        }
        _ => (Rc::new(Kept::unlimited("")), Vec::new()),
    });
    let values: Vec<_> = values.collect();
    let (mut shared, mut around, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    for (edit, (kept, text)) in edits.iter().zip(&values) {
        let Edit::Set { level, name, value } = *edit else {
            for edits in [&mut shared, &mut around, &mut copied] {
                edits.push(*edit);
            }
            continue;
        };
        shared.push(Edit::SetKept {
            level,
            name,
            value: kept,
        });
        around.push(Edit::SetAround {
            level,
            name,
            begin: value,
            source,
            end: value,
        });
        copied.push(Edit::Set {
            level,
            name,
            value: text,
        });
    }
    assert_eq!(bytes_of(&shared).as_deref(), Ok(edited), "shared values");
    assert_eq!(bytes_of(&around), bytes_of(&copied), "parts of the body");
}

fn check_fill(splices: &super::Splices, data: &[u8], edited: &[u8], random: &mut Random) {
    for slots in [1, 2, 5, 200] {
        let skip = random.below(edited.len() + 1);
        let mut slices = vec![std::io::IoSlice::new(&[]); slots];
        let filled = splices.fill(data, skip, &mut slices);
        let bytes: Vec<u8> = slices[..filled]
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        assert!(edited[skip..].starts_with(&bytes));
        assert!(slices[..filled].iter().all(|slice| !slice.is_empty()));
        if filled < slots {
            assert_eq!(bytes.len(), edited.len() - skip);
        }
    }
}

/// Checks that the edited body `splices` contains every byte of the source in order, except for
/// edited members, a comma next to a removed member, and whitespace between adjacent removed
/// members.
fn check_outside(document: &Document, data: &[u8], edits: &[Edit<'_>], splices: &super::Splices) {
    let mut kept = vec![false; data.len()];
    let mut last = 0;
    for piece in splices.pieces(data) {
        let range = data.as_ptr_range();
        if !range.contains(&piece.as_ptr()) {
            continue;
        }
        let start = piece.as_ptr().addr() - range.start.addr();
        assert!(start >= last);
        last = start + piece.len();
        kept[start..last].fill(true);
    }
    for member in document.members() {
        for edit in edits {
            match edit {
                Edit::Set { level, name, .. } if (*level, *name) == (member.level, member.name) => {
                    kept[member.value.start..member.value.end].fill(true);
                }
                Edit::Remove { level, name } if (*level, *name) == (member.level, member.name) => {
                    let start = member.comma_before.unwrap_or(member.key.start);
                    let end = member
                        .comma_after
                        .map_or(member.value.end, |comma| comma + 1);
                    kept[start..end].fill(true);
                }
                Edit::Set { .. }
                | Edit::SetKept { .. }
                | Edit::SetAround { .. }
                | Edit::Remove { .. }
                | Edit::Append { .. } => {}
            }
        }
    }
    assert!(
        kept.iter().all(|&kept| kept),
        "{} {edits:?}",
        data.escape_ascii()
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    type Body = fn(&[u8]);
    const BODIES: [(&str, Body); 7] = [
        ("json_scan", fuzz_scan),
        ("json_edit", fuzz_edit),
        ("json_mask", fuzz_mask),
        ("json_form", fuzz_form),
        ("json_response", fuzz_response),
        ("json_usage", fuzz_usage),
        ("sse", fuzz_sse),
    ];

    #[test]
    fn committed_corpus() {
        for (name, body) in BODIES {
            let path = format!("{}/fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
            let mut files = 0;
            for entry in std::fs::read_dir(path).unwrap() {
                body(&std::fs::read(entry.unwrap().path()).unwrap());
                files += 1;
            }
            assert!(files >= 10, "{name} has {files} files");
        }
    }

    #[test]
    fn random_documents() {
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let text = random.document(NAMES);
            assert!(
                Tree::parse(&text).is_some(),
                "seed {seed}: {}",
                text.escape_ascii()
            );
            for (_, body) in BODIES {
                body(&text);
            }
            let text = random.document(RESPONSE_NAMES);
            fuzz_response(&text);
            fuzz_usage(&text);
        }
    }

    #[test]
    fn mutated_documents() {
        for seed in 0..2500 {
            let mut random = Random::new(seed);
            let mut text = random.document(NAMES);
            random.mutate(&mut text);
            for (_, body) in BODIES {
                body(&text);
            }
        }
    }

    #[test]
    fn random_forms() {
        for seed in 0..1500 {
            let mut random = Random::new(seed);
            let mut body = Vec::new();
            for _ in 0..random.below(5) {
                let name = random.pick(&["vllm_xargs", "vllm_xargs", "file", "vllm\\_xargs"]);
                let head =
                    format!("--x7\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n");
                body.extend_from_slice(head.as_bytes());
                body.extend_from_slice(&random.document(NAMES));
                body.extend_from_slice(random.pick(&["\r\n", "\r\n--x\r\n", "\r\n"]).as_bytes());
            }
            body.extend_from_slice(b"--x7--\r\n");
            fuzz_form(&body);
            random.mutate(&mut body);
            fuzz_form(&body);
        }
    }

    #[test]
    fn random_streams() {
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            let mut stream = Vec::new();
            for _ in 0..random.below(6) {
                let head = [
                    "data: ", "data:", "data:  ", "event: ", ": ", "id:", "dat", "data",
                ];
                stream.extend_from_slice(random.pick(&head).as_bytes());
                let mut text = random.document(RESPONSE_NAMES);
                text.retain(|byte| !matches!(byte, b'\n' | b'\r'));
                if random.one_in(5) {
                    random.mutate(&mut text);
                }
                stream.extend_from_slice(text.trim_ascii_start());
                stream.extend_from_slice(random.pick(&["\n\n", "\r\n\r\n", "\r", "\n"]).as_bytes());
            }
            if random.one_in(2) {
                stream.extend_from_slice(b"data: [DONE]\n\n");
            }
            fuzz_sse(&stream);
        }
    }
}
