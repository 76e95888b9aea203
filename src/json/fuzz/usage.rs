//! Bodies of the fuzz targets of responses that are edited while they pass.

use super::seeded;
use crate::json::oracle::{Tree, same_for_all_cuts};
use crate::json::transform::{PromptUsage, ResponseEdit, ResponseForm, Transforms, UsageShape};
use crate::limits::JSON_HELD_BYTES_MAX;

/// Checks for all values of [`UsageShape`] and of [`ResponseForm`] that the output of the rewriter
/// is the same for several splits of the input, that no bytes are lost, and that rewriting and then
/// parsing a text gives the same result as parsing and then editing it.
pub fn fuzz_usage(data: &[u8]) {
    for shape in SHAPES {
        let mut random = seeded(data);
        let json = same_for_all_cuts(data, &mut random, |pieces| {
            rewrite(pieces, ResponseForm::Json, shape)
        });
        check_rewrite(data, &json.0, json.1, shape);
        let sse = same_for_all_cuts(data, &mut random, |pieces| {
            rewrite(pieces, ResponseForm::Sse, shape)
        });
        let ends = |byte: &u8| matches!(byte, b'\n' | b'\r');
        let (old, new) = (data.split(ends), sse.0.split(ends));
        assert_eq!(old.clone().count(), new.clone().count());
        for (old, new) in old.zip(new) {
            let text = old
                .strip_prefix(b"data:")
                .map(|text| text.strip_prefix(b" ").unwrap_or(text));
            match text.filter(|text| text.starts_with(b"{")) {
                Some(text) => {
                    let head = old.len() - text.len();
                    assert_eq!(new[..head], old[..head]);
                    // Each line is a separate text, so the result must equal that of the JSON form.
                    let line = rewrite(&mut std::iter::once(text), ResponseForm::Json, shape);
                    if Tree::parse(text).is_some() {
                        assert_eq!(
                            new[head..].escape_ascii().to_string(),
                            line.0.escape_ascii().to_string()
                        );
                        check_rewrite(text, &line.0, line.1, shape);
                    }
                }
                None => assert_eq!(new, old),
            }
        }
    }
}

/// Returns the data of the `data` lines of a stream.
fn data_lines(stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = stream.split(|byte| matches!(byte, b'\n' | b'\r'));
    lines.filter_map(|line| line.strip_prefix(b"data:"))
}

/// Checks an event stream with [`crate::h1::fuzz::fuzz_sse`] and [`fuzz_usage`], and checks that
/// rewriting does not change the number of data lines.
pub fn fuzz_sse(data: &[u8]) {
    crate::h1::fuzz::fuzz_sse(data);
    fuzz_usage(data);
    for shape in SHAPES {
        let (sent, _) = rewrite(&mut std::iter::once(data), ResponseForm::Sse, shape);
        let count = |bytes: &[u8]| data_lines(bytes).count();
        assert_eq!(count(&sent), count(data), "{}", data.escape_ascii());
    }
}

/// The counts that the rewriter sets in these tests.
const COUNTS: PromptUsage = PromptUsage {
    cached: 4321,
    created: Some(u64::MAX),
    other: Some(0),
};

const SHAPES: [UsageShape; 3] = [
    UsageShape::Chat,
    UsageShape::Responses,
    UsageShape::Messages,
];

fn rewrite(
    pieces: &mut dyn Iterator<Item = &[u8]>,
    form: ResponseForm,
    shape: UsageShape,
) -> (Vec<u8>, u32) {
    let edit = ResponseEdit::usage(shape, &COUNTS);
    let mut rewriter = Transforms::new(form, edit.into_iter().collect());
    let mut sent = Vec::new();
    let mut keep = |bytes: &[u8]| {
        assert!(!bytes.is_empty());
        sent.extend_from_slice(bytes);
    };
    for piece in pieces {
        rewriter.feed(piece, &mut keep);
    }
    rewriter.finish(&mut keep);
    (sent, rewriter.rewritten())
}

fn check_rewrite(old: &[u8], new: &[u8], rewritten: u32, shape: UsageShape) {
    if rewritten == 0 {
        assert_eq!(
            new.escape_ascii().to_string(),
            old.escape_ascii().to_string()
        );
    }
    // Only values up to this length are removed; all other bytes must be present.
    assert!(new.len() + rewritten as usize * JSON_HELD_BYTES_MAX >= old.len());
    let Some(mut tree) = Tree::parse(old) else {
        return;
    };
    let mut set = |usage: &mut Vec<(String, Tree)>| set_counts(usage, shape);
    tree.each(&["usage"], &mut set);
    match shape {
        UsageShape::Chat => {}
        UsageShape::Responses => tree.each(&["response", "usage"], &mut set),
        UsageShape::Messages => tree.each(&["message", "usage"], &mut set),
    }
    let parsed = Tree::parse(new);
    // A long value is not replaced. The member is repeated after it with the correct value.
    let last_wins = || parsed.clone().map(Tree::last_wins) == Some(tree.clone().last_wins());
    assert!(
        parsed.as_ref() == Some(&tree) || (old.len() > JSON_HELD_BYTES_MAX && last_wins()),
        "{} {}",
        old.escape_ascii(),
        new.escape_ascii()
    );
}

/// Sets [`COUNTS`] in the members of a `usage` object, as the rewriter does in its text.
fn set_counts(usage: &mut Vec<(String, Tree)>, shape: UsageShape) {
    let cached = COUNTS.cached;
    let [created, other] = [COUNTS.created, COUNTS.other].map(Option::unwrap_or_default);
    let details = match shape {
        UsageShape::Chat => "prompt_tokens_details",
        UsageShape::Responses => "input_tokens_details",
        UsageShape::Messages => {
            set_count(usage, "cache_read_input_tokens", cached, true);
            set_count(usage, "cache_creation_input_tokens", created, true);
            set_count(usage, "input_tokens", other, false);
            return;
        }
    };
    if !usage.iter().any(|member| member.0 == details) {
        usage.push((details.to_owned(), Tree::Object(Vec::new())));
    }
    for (_, value) in usage.iter_mut().filter(|member| member.0 == details) {
        if !value.is_object() {
            *value = Tree::Object(Vec::new());
        }
        value.each(&[], &mut |members| {
            set_count(members, "cached_tokens", cached, true);
            let name = match shape {
                UsageShape::Responses => "cache_write_tokens",
                _ => "created_cache_tokens",
            };
            set_count(members, name, created, false);
        });
    }
}

/// Sets each member `name` to `count`; adds one if there is none and `is_required`.
fn set_count(members: &mut Vec<(String, Tree)>, name: &str, count: u64, is_required: bool) {
    let count = Tree::Scalar(count.to_string());
    if is_required && !members.iter().any(|member| member.0 == name) {
        members.push((name.to_owned(), count.clone()));
    }
    for member in members.iter_mut().filter(|member| member.0 == name) {
        member.1 = count.clone();
    }
}
