//! Helpers for tests and fuzzing: a naive parser that keeps repeated members, a generator of random
//! documents, and a random number generator. The parser is slow, recursive and independent of the
//! lexer. `serde_json` parses its names and scalars, and every result is compared with the parse of
//! `simd-json`.

use simd_json::{ErrorType, Node, StaticNode};

use super::block::Isa;
use super::error::JsonError;

/// Maximum number of nested containers that [`Tree::parse`] reads, because it is recursive. Other
/// tests cover deeply nested texts.
const DEPTH_MAX: usize = 101;

/// A JSON value. Scalars are stored as received, member names are unescaped, and repeated members
/// are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    Object(Vec<(String, Self)>),
    Array(Vec<Self>),
    Scalar(String),
}

impl Tree {
    /// Parses a JSON text. Returns `None` if the text is invalid, has more than [`DEPTH_MAX`]
    /// nested containers, or contains a name or scalar that `serde_json` refuses.
    ///
    /// Panics if `simd-json` disagrees; see [`compare_with_simd`].
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let tree = std::str::from_utf8(bytes).ok().and_then(|text| {
            let (tree, rest) = value(text, 0)?;
            blank(rest).is_empty().then_some(tree)
        });
        compare_with_simd(bytes, tree.as_ref());
        tree
    }

    pub(super) fn members(&self) -> Option<&Vec<(String, Self)>> {
        match self {
            Self::Object(members) => Some(members),
            Self::Array(_) | Self::Scalar(_) => None,
        }
    }

    /// Returns the last value of the member `name`, or `None` if this is not an object or has no
    /// such member.
    pub(super) fn last(&self, name: &str) -> Option<&Self> {
        self.members()?
            .iter()
            .rev()
            .find(|member| member.0 == name)
            .map(|member| &member.1)
    }

    pub(super) fn is_object(&self) -> bool {
        matches!(self, Self::Object(_))
    }

    /// Returns whether this is `null` or an object without members.
    pub(super) fn is_nothing(&self) -> bool {
        match self {
            Self::Object(members) => members.is_empty(),
            Self::Array(_) => false,
            Self::Scalar(text) => text == "null",
        }
    }

    /// Returns whether the last member `name` of this object is the string `want`.
    pub(super) fn has_text(&self, name: &str, want: &str) -> bool {
        match self.last(name) {
            Some(Self::Scalar(text)) => {
                serde_json::from_str::<String>(text).is_ok_and(|text| text == want)
            }
            Some(Self::Object(_) | Self::Array(_)) | None => false,
        }
    }

    /// Returns this value with only the last value of each repeated member, at the position of the
    /// first, in objects at every depth.
    pub(super) fn last_wins(self) -> Self {
        match self {
            Self::Object(members) => {
                let mut kept: Vec<(String, Self)> = Vec::new();
                for (name, value) in members {
                    let value = value.last_wins();
                    match kept.iter_mut().find(|member| member.0 == name) {
                        Some(member) => member.1 = value,
                        None => kept.push((name, value)),
                    }
                }
                Self::Object(kept)
            }
            Self::Array(values) => Self::Array(values.into_iter().map(Self::last_wins).collect()),
            Self::Scalar(text) => Self::Scalar(text),
        }
    }

    /// Calls `act` with the members of every object that is reached from this value through the
    /// member names in `path`, including objects in repeated members.
    pub(super) fn each(&mut self, path: &[&str], act: &mut impl FnMut(&mut Vec<(String, Self)>)) {
        let Self::Object(members) = self else { return };
        let Some((first, rest)) = path.split_first() else {
            return act(members);
        };
        for (name, value) in members {
            if name == first {
                value.each(rest, act);
            }
        }
    }
}

/// Panics unless `simd-json` parses `bytes` to the same values as `tree`, with repeated members, or
/// refuses them if `tree` is `None`.
///
/// There are two exceptions. `simd-json` refuses numbers that neither a 64-bit integer nor a finite
/// `f64` can hold, because it converts all numbers. It reads more nested containers than `tree` can
/// have.
fn compare_with_simd(bytes: &[u8], tree: Option<&Tree>) {
    // The parser unescapes strings in place.
    let mut copy = bytes.to_vec();
    let tape = simd_json::to_tape(&mut copy);
    match (tree, tape) {
        (Some(tree), Ok(tape)) => {
            let mut nodes = tape.0.iter();
            let same = tree.equals(&mut nodes) && nodes.len() == 0;
            assert!(same, "simd-json: {tape:?}: {}", bytes.escape_ascii());
        }
        (Some(tree), Err(error)) => {
            let expected = tree.has_huge_number();
            assert!(expected, "simd-json: {error}: {}", bytes.escape_ascii());
        }
        (None, Ok(_)) => {
            let opens = bytes.iter().filter(|&&byte| matches!(byte, b'[' | b'{'));
            let expected = opens.count() > DEPTH_MAX;
            assert!(expected, "simd-json: accepted {}", bytes.escape_ascii());
        }
        (None, Err(_)) => {}
    }
}

/// Panics unless `valid`, the validator's result for `data`, is that of `simd-json`, at any depth.
///
/// There are two exceptions: `simd-json` refuses numbers that it cannot convert, and escaped lone
/// surrogates, which the grammar allows. The depth limits of both are 1,024.
pub(super) fn compare_validity(data: &[u8], valid: Result<(), JsonError>) {
    match simd_json::to_tape(&mut data.to_vec()) {
        Ok(_) => assert_eq!(valid, Ok(()), "{}", data.escape_ascii()),
        Err(error) => {
            let refuses_more = match error.error() {
                ErrorType::InvalidNumber => true,
                // Unescaped, the validator refuses them as invalid UTF-8.
                ErrorType::InvalidUnicodeCodepoint | ErrorType::InvalidUtf8 => {
                    may_have_surrogates(data)
                }
                _ => false,
            };
            let expected = valid.is_err() || refuses_more;
            assert!(expected, "simd-json: {error}: {}", data.escape_ascii());
        }
    }
}

/// Returns whether `data` has an escape in the range of the surrogates.
pub(super) fn may_have_surrogates(data: &[u8]) -> bool {
    let mut parts = data.windows(3);
    parts.any(|part| part.eq_ignore_ascii_case(b"\\ud"))
}

impl Tree {
    /// Consumes the nodes of one value. Returns whether they have the same value as this one.
    fn equals(&self, nodes: &mut std::slice::Iter<'_, Node<'_>>) -> bool {
        match (self, nodes.next()) {
            (Self::Object(members), Some(Node::Object { len, .. })) => {
                members.len() == *len
                    && members.iter().all(|(name, value)| {
                        nodes.next() == Some(&Node::String(name)) && value.equals(nodes)
                    })
            }
            (Self::Array(values), Some(Node::Array { len, .. })) => {
                values.len() == *len && values.iter().all(|value| value.equals(nodes))
            }
            (Self::Scalar(text), Some(Node::String(string))) => {
                serde_json::from_str::<String>(text).is_ok_and(|text| text == *string)
            }
            (Self::Scalar(text), Some(Node::Static(node))) => {
                scalar(text).is_some_and(|scalar| scalar == *node)
            }
            _ => false,
        }
    }

    fn has_huge_number(&self) -> bool {
        match self {
            Self::Object(members) => members.iter().any(|(_, value)| value.has_huge_number()),
            Self::Array(values) => values.iter().any(Self::has_huge_number),
            Self::Scalar(text) => !text.starts_with('"') && scalar(text).is_none(),
        }
    }
}

/// Returns the value of a valid scalar that is not a string, in the type that `simd-json` gives it.
/// Returns `None` if no such type can hold the number.
fn scalar(text: &str) -> Option<StaticNode> {
    match text {
        "null" => return Some(StaticNode::Null),
        "true" | "false" => return Some(StaticNode::Bool(text == "true")),
        _ => {}
    }
    if text.contains(['.', 'e', 'E']) {
        let number = text.parse().ok().filter(|number: &f64| number.is_finite());
        number.map(StaticNode::F64)
    } else if text.starts_with('-') {
        text.parse().ok().map(StaticNode::I64)
    } else {
        text.parse().ok().map(StaticNode::U64)
    }
}

fn blank(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\n', '\r'])
}

fn value(text: &str, depth: usize) -> Option<(Tree, &str)> {
    let text = blank(text);
    if let Some(inner) = text.strip_prefix('{') {
        let mut members = Vec::new();
        let rest = list(inner, '}', depth, &mut |text| {
            let (name, rest) = string(blank(text))?;
            let name = serde_json::from_str(name).ok()?;
            let (value, rest) = value(blank(rest).strip_prefix(':')?, depth + 1)?;
            members.push((name, value));
            Some(rest)
        })?;
        return Some((Tree::Object(members), rest));
    }
    if let Some(inner) = text.strip_prefix('[') {
        let mut values = Vec::new();
        let rest = list(inner, ']', depth, &mut |text| {
            let (value, rest) = value(text, depth + 1)?;
            values.push(value);
            Some(rest)
        })?;
        return Some((Tree::Array(values), rest));
    }
    let (scalar, rest) = if text.starts_with('"') {
        string(text)?
    } else {
        let end = text
            .find([' ', '\t', '\n', '\r', ',', ']', '}'])
            .unwrap_or(text.len());
        text.split_at(end)
    };
    serde_json::from_str::<serde_json::Value>(scalar).ok()?;
    Some((Tree::Scalar(scalar.to_owned()), rest))
}

fn list<'a>(
    inner: &'a str,
    close: char,
    depth: usize,
    item: &mut dyn FnMut(&'a str) -> Option<&'a str>,
) -> Option<&'a str> {
    if depth >= DEPTH_MAX {
        return None;
    }
    let mut rest = blank(inner);
    if let Some(rest) = rest.strip_prefix(close) {
        return Some(rest);
    }
    loop {
        rest = blank(item(rest)?);
        if let Some(rest) = rest.strip_prefix(close) {
            return Some(rest);
        }
        rest = rest.strip_prefix(',')?;
    }
}

/// Splits `text` after the string literal at its start. The first part includes the quotes. Returns
/// `None` if `text` does not begin with a complete string literal.
fn string(text: &str) -> Option<(&str, &str)> {
    let inner = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, byte) in inner.bytes().enumerate() {
        match byte {
            b'"' if !escaped => return Some(text.split_at(at + 2)),
            0..=0x1f => return None,
            _ => escaped = byte == b'\\' && !escaped,
        }
    }
    None
}

/// Marsaglia's xorshift generator, which returns the same numbers on every run.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) const fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Returns up to five positions at which to split `len` bytes, in ascending order and possibly
    /// with duplicates.
    pub(super) fn cuts(&mut self, len: usize) -> Vec<usize> {
        let mut cuts: Vec<usize> = (0..self.below(6)).map(|_| self.below(len + 1)).collect();
        cuts.sort_unstable();
        cuts
    }
}

#[cfg(test)]
impl Random {
    pub(super) const fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    /// Returns a random valid JSON object. Most member names are from `names`.
    pub(super) fn document(&mut self, names: &[&str]) -> Vec<u8> {
        let mut text = Vec::new();
        self.blank(&mut text);
        self.object(names, 0, &mut text);
        self.blank(&mut text);
        text
    }

    fn object(&mut self, names: &[&str], depth: usize, text: &mut Vec<u8>) {
        text.push(b'{');
        self.blank(text);
        let count = self.below(if depth == 0 { 9 } else { 5 });
        for index in 0..count {
            if index > 0 {
                text.push(b',');
                self.blank(text);
            }
            self.name(names, text);
            self.blank(text);
            text.push(b':');
            self.blank(text);
            self.value(names, depth + 1, text);
            self.blank(text);
        }
        text.push(b'}');
    }

    fn value(&mut self, names: &[&str], depth: usize, text: &mut Vec<u8>) {
        match self.below(if depth > 5 { 4 } else { 8 }) {
            0 | 1 => text.extend_from_slice(self.pick(NUMBERS).as_bytes()),
            2 => text.extend_from_slice(self.pick(&["null", "true", "false"]).as_bytes()),
            3 => text.extend_from_slice(self.pick(STRINGS).as_bytes()),
            4 => {
                text.push(b'[');
                for index in 0..self.below(4) {
                    if index > 0 {
                        text.push(b',');
                    }
                    self.blank(text);
                    self.value(names, depth + 1, text);
                    self.blank(text);
                }
                text.push(b']');
            }
            _ => self.object(names, depth, text),
        }
    }

    fn name(&mut self, names: &[&str], text: &mut Vec<u8>) {
        if self.one_in(4) {
            text.extend_from_slice(self.pick(STRINGS).as_bytes());
            return;
        }
        text.push(b'"');
        for byte in self.pick(names).bytes() {
            match self.below(20) {
                0 => text.extend_from_slice(format!("\\u{byte:04x}").as_bytes()),
                1 => text.extend_from_slice(format!("\\u{byte:04X}").as_bytes()),
                _ => text.push(byte),
            }
        }
        if self.one_in(16) {
            text.extend_from_slice(self.pick(&["s", "\\u0000", " ", "\\/", "é"]).as_bytes());
        }
        text.push(b'"');
    }

    fn blank(&mut self, text: &mut Vec<u8>) {
        while self.one_in(4) {
            text.push(self.pick(b" \t\n\r"));
        }
    }

    /// Changes `text` one to three times: replaces, removes or inserts a byte, or truncates the
    /// text.
    pub(super) fn mutate(&mut self, text: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            if text.is_empty() {
                return;
            }
            let at = self.below(text.len());
            let byte = self.pick(b"\"\\{}[],:0-.eEtn u\x00\x1f\n\xc3\xff");
            match self.below(4) {
                0 => text[at] = byte,
                1 => drop(text.remove(at)),
                2 => text.insert(at, byte),
                _ => text.truncate(at),
            }
        }
    }
}

#[cfg(test)]
const NUMBERS: &[&str] = &[
    "0",
    "-0",
    "7",
    "16",
    "100",
    "12345678901234567890123456789",
    "-1.50e+07",
    "1E-2",
    "0.1",
    "18446744073709551615",
    "18446744073709551616",
];

#[cfg(test)]
const STRINGS: &[&str] = &[
    r#""""#,
    r#""a""#,
    r#""ab""#,
    r#""\\""#,
    r#""\"""#,
    r#""set \"max_tokens\": 5, {[""#,
    r#""]}\\\\\"""#,
    r#""max_tokens""#,
    r#""\u00e9\ud83d\ude00é😀""#,
    r#""{\"usage\":{\"prompt_tokens\":1}}""#,
    r#""a long text that reaches well beyond one block of sixty-four bytes, \"quoted\" and all\n""#,
    r#""0123456789012345678901234567890123456789012345678901234567890123456789""#,
];

/// Calls `run` with `text` as a whole, byte by byte, and split at random positions. Asserts that
/// all results are equal, and returns the result.
pub(super) fn same_for_all_cuts<T: PartialEq + std::fmt::Debug>(
    text: &[u8],
    random: &mut Random,
    run: impl Fn(&mut dyn Iterator<Item = &[u8]>) -> T,
) -> T {
    let want = run(&mut std::iter::once(text));
    let bytes = run(&mut text.chunks(1));
    assert_eq!(bytes, want, "byte by byte: {}", text.escape_ascii());
    for _ in 0..3 {
        let mut cuts = random.cuts(text.len());
        cuts.insert(0, 0);
        cuts.push(text.len());
        let cut = run(&mut cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]));
        assert_eq!(cut, want, "split at {cuts:?}: {}", text.escape_ascii());
    }
    want
}

/// Does the same as [`same_for_all_cuts`], and also asserts that the result is the same with all
/// implementations of [`Isa`] that this machine supports.
pub(super) fn same_for_all_isas<T: PartialEq + std::fmt::Debug>(
    text: &[u8],
    random: &mut Random,
    run: impl Fn(&mut dyn Iterator<Item = &[u8]>, Isa) -> T,
) -> T {
    let want = same_for_all_cuts(text, random, |pieces| run(pieces, Isa::best()));
    for isa in Isa::all() {
        let (start, end) = text.split_at(random.below(text.len() + 1));
        let seen = run(&mut [start, end].into_iter(), isa);
        let cut = start.len();
        assert_eq!(
            seen,
            want,
            "{isa:?}, split at {cut}: {}",
            text.escape_ascii()
        );
    }
    want
}
