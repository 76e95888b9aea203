//! Edits of a scanned body, represented as splices over its unchanged bytes.
//!
//! All bytes outside of edited members and their commas are unchanged: order, whitespace, numbers
//! and escapes. The body is neither stored nor copied here; only inserted text is, unless it is
//! [`Kept`] elsewhere.
//!
//! A run of adjacent removed members is removed together with the comma after it. If the run is at
//! the end of the object, the comma before it is removed instead, and no comma if the object has no
//! other members. Insertions are placed directly before the closing brace. Removals and insertions
//! can therefore be combined freely in one object.

use std::fmt;
use std::io::IoSlice;
use std::rc::Rc;

use super::lex::Kind;
use super::scan::{Document, Level, Member, Object, watched};
use crate::budget::Kept;
use crate::limits::JSON_EDITS_MAX;
use crate::span::Span;

/// An edit of one member of a request body.
#[derive(Clone, Copy, Debug)]
pub enum Edit<'a> {
    /// Replaces the value of every occurrence of the member `name` at `level`. In each object of
    /// that level without the member, inserts it before the closing brace.
    Set {
        /// The object that contains the member.
        level: Level,
        /// Name of the member, which must be in the watch table.
        name: &'static str,
        /// The new value, which must be valid JSON.
        value: &'a [u8],
    },
    /// As `Set`, with a value that may be large, so that it is shared instead of copied.
    SetKept {
        /// The object that contains the member.
        level: Level,
        /// Name of the member, which must be in the watch table.
        name: &'static str,
        /// The new value, which must be valid JSON.
        value: &'a Rc<Kept>,
    },
    /// As `Set`, with a value that contains a part of the body itself, which is not copied either.
    SetAround {
        /// The object that contains the member.
        level: Level,
        /// Name of the member, which must be in the watch table.
        name: &'static str,
        /// The start of the new value. With the other parts it must be valid JSON.
        begin: &'a [u8],
        /// The part of the body that follows.
        source: Span,
        /// The end of the new value.
        end: &'a [u8],
    },
    /// Removes every occurrence of the member `name` at `level`, and a comma next to it.
    Remove {
        /// The object that contains the member.
        level: Level,
        /// Name of the member, which must be in the watch table.
        name: &'static str,
    },
    /// Appends elements to every array that is a value of the member `name` at `level`: inserts
    /// `text` before its closing bracket. Values of other kinds are unchanged.
    Append {
        /// The object that contains the member.
        level: Level,
        /// Name of the member, which must be in the watch table.
        name: &'static str,
        /// The elements to append. The text must begin with a comma if the array is not empty.
        text: &'a [u8],
    },
}

impl<'a> Edit<'a> {
    /// Returns the new value of the member, if the edit sets it.
    const fn value(&self) -> Option<Value<'a>> {
        match *self {
            Self::Set { value, .. } => Some(Value::Bytes(value)),
            Self::SetKept { value, .. } => Some(Value::Kept(value)),
            Self::SetAround {
                begin, source, end, ..
            } => Some(Value::Around(begin, source, end)),
            Self::Remove { .. } | Self::Append { .. } => None,
        }
    }

    /// Returns the level and the name of the edited member.
    #[must_use]
    pub const fn target(&self) -> (Level, &'static str) {
        match *self {
            Self::Set { level, name, .. }
            | Self::SetKept { level, name, .. }
            | Self::SetAround { level, name, .. }
            | Self::Remove { level, name }
            | Self::Append { level, name, .. } => (level, name),
        }
    }
}

/// The new value of a member.
#[derive(Clone, Copy)]
enum Value<'a> {
    Bytes(&'a [u8]),
    Kept(&'a Rc<Kept>),
    /// A part of the body between two texts.
    Around(&'a [u8], Span, &'a [u8]),
}

impl Value<'_> {
    fn is_empty(self) -> bool {
        match self {
            Self::Bytes(bytes) => bytes.is_empty(),
            Self::Kept(kept) => kept.is_empty(),
            Self::Around(begin, source, end) => {
                begin.is_empty() && source.is_empty() && end.is_empty()
            }
        }
    }
}

/// Reason why edits were refused. Each is a mistake of the caller, which can inspect the document
/// before it edits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EditError {
    /// An edit refers to a member that is not in the watch table, so its occurrences were not
    /// recorded.
    NotWatched,
    /// Two edits refer to the same member name at the same level.
    Twice,
    /// An edit refers to a member of an object, and another edit to that object itself or to one
    /// that contains it.
    InsideEdited,
    /// An edit sets a member at a level for which the body has no object. To add that object, set
    /// the member whose value it is.
    NoObject,
    /// More than `JSON_EDITS_MAX` edits, or more than that many replacements in the body that
    /// result from them.
    TooMany,
}

impl EditError {
    /// Returns a description of the reason for refusing the edits.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotWatched => "edit of a member that is not watched",
            Self::Twice => "two edits of one member",
            Self::InsideEdited => "edit inside an object that is itself edited",
            Self::NoObject => "no object to edit at that level",
            Self::TooMany => "too many edits",
        }
    }
}

impl fmt::Display for EditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for EditError {}

impl Document {
    /// Returns the body with `edits` applied.
    ///
    /// An edit inside `sampling_params`, `extra_args` or `vllm_xargs` cannot be combined with an
    /// edit of that member itself. Removing an absent member, or appending to one, has no effect.
    ///
    /// # Errors
    ///
    /// See [`EditError`].
    pub fn edit(&self, edits: &[Edit<'_>]) -> Result<Splices, EditError> {
        self.check(edits)?;
        let mut changes = Changes::with_room(edits, self.members.len());
        for index in 0..self.objects.len() {
            self.edit_object(index, edits, &mut changes);
        }
        if changes.list.len() > JSON_EDITS_MAX {
            return Err(EditError::TooMany);
        }
        // A stable sort: insertions at one place stay in their order.
        changes.list.sort_by_key(|change| change.source.start);
        Ok(changes.splices(self.bytes))
    }

    fn check(&self, edits: &[Edit<'_>]) -> Result<(), EditError> {
        if edits.len() > JSON_EDITS_MAX {
            return Err(EditError::TooMany);
        }
        for (index, edit) in edits.iter().enumerate() {
            let (level, name) = edit.target();
            let known = watched(self.watch, level, name.as_bytes()).is_some();
            debug_assert!(known, "{name} is edited but not watched");
            if !known {
                return Err(EditError::NotWatched);
            }
            if edits[..index]
                .iter()
                .any(|earlier| earlier.target() == (level, name))
            {
                return Err(EditError::Twice);
            }
            if let Some(child) = level.child(name.as_bytes())
                && edits
                    .iter()
                    .any(|other| child.subtree().contains(&other.target().0.index()))
            {
                return Err(EditError::InsideEdited);
            }
            if let Some(value) = edit.value() {
                debug_assert!(!value.is_empty(), "{name} is set to an empty value");
                if !self.has_object(level) {
                    return Err(EditError::NoObject);
                }
            }
        }
        Ok(())
    }

    fn edit_object(&self, index: usize, edits: &[Edit<'_>], changes: &mut Changes) {
        let object = &self.objects[index];
        let members = || {
            self.members
                .iter()
                .filter(move |member| member.object == index)
        };
        let mut run: Option<Run> = None;
        let mut removed = 0;
        for member in members() {
            let edit = edits
                .iter()
                .find(|edit| edit.target() == (member.level, member.name));
            if let Some(value) = edit.and_then(Edit::value) {
                changes.set(member.value, value);
            }
            match edit {
                Some(Edit::Append { text, .. }) if member.kind == Kind::Array => {
                    let place = member.value.end - 1;
                    changes.replace(Span::new(place, place), &[text]);
                }
                Some(Edit::Remove { .. }) => {
                    removed += 1;
                    match &mut run {
                        Some(run) if run.touches(member) => run.last = *member,
                        _ => {
                            changes.remove(run.take());
                            run = Some(Run {
                                first: *member,
                                last: *member,
                            });
                        }
                    }
                }
                _ => {}
            }
        }
        changes.remove(run);
        let mut follows = object.members > removed;
        for edit in edits {
            let Some(value) = edit.value() else {
                continue;
            };
            let (level, name) = edit.target();
            if level == object.level && !members().any(|member| member.name == name) {
                changes.insert(object, follows, name, value);
                follows = true;
            }
        }
    }
}

/// A run of adjacent members that are removed together.
#[derive(Clone, Copy)]
struct Run {
    first: Member,
    last: Member,
}

impl Run {
    fn touches(&self, next: &Member) -> bool {
        self.last.comma_after.is_some() && self.last.comma_after == next.comma_before
    }

    fn span(&self) -> Span {
        match (self.first.comma_before, self.last.comma_after) {
            (_, Some(comma)) => Span::new(self.first.key.start, comma + 1),
            (Some(comma), None) => Span::new(comma, self.last.value.end),
            (None, None) => Span::new(self.first.key.start, self.last.value.end),
        }
    }
}

/// A range of the scanned body that is replaced.
#[derive(Clone, Copy, Debug)]
struct Change {
    source: Span,
    by: By,
}

#[derive(Clone, Copy, Debug)]
enum By {
    /// A range of [`Changes::text`].
    Text(Span),
    /// The element of [`Changes::kept`] at this index.
    Kept(usize),
    /// A range of the body between two of [`Changes::text`].
    Around(Span, Span, Span),
}

#[derive(Debug)]
struct Changes {
    list: Vec<Change>,
    text: Vec<u8>,
    kept: Vec<Rc<Kept>>,
}

impl Changes {
    /// Creates an empty list of changes with capacity for the usual result of `edits` on a body
    /// with `members` watched members.
    fn with_room(edits: &[Edit<'_>], members: usize) -> Self {
        let text = edits.iter().map(|edit| match edit {
            // An insertion adds a comma, two quotes and a colon.
            Edit::Set { name, value, .. } => name.len() + value.len() + 4,
            Edit::SetKept { name, .. } => name.len() + 4,
            Edit::SetAround {
                name, begin, end, ..
            } => name.len() + begin.len() + end.len() + 4,
            Edit::Append { text, .. } => text.len(),
            Edit::Remove { .. } => 0,
        });
        Self {
            list: Vec::with_capacity(members + 4),
            text: Vec::with_capacity(text.sum()),
            kept: Vec::new(),
        }
    }

    fn replace(&mut self, source: Span, parts: &[&[u8]]) {
        let start = self.text.len();
        for part in parts {
            self.text.extend_from_slice(part);
        }
        self.list.push(Change {
            source,
            by: By::Text(Span::new(start, self.text.len())),
        });
    }

    /// Replaces `source` by a value.
    fn set(&mut self, source: Span, value: Value<'_>) {
        match value {
            Value::Bytes(bytes) => self.replace(source, &[bytes]),
            Value::Kept(kept) => {
                let by = By::Kept(self.kept.len());
                self.list.push(Change { source, by });
                self.kept.push(Rc::clone(kept));
            }
            Value::Around(begin, part, end) => {
                let start = self.text.len();
                self.text.extend_from_slice(begin);
                let middle = self.text.len();
                self.text.extend_from_slice(end);
                let before = Span::new(start, middle);
                let by = By::Around(before, part, Span::new(middle, self.text.len()));
                self.list.push(Change { source, by });
            }
        }
    }

    fn remove(&mut self, run: Option<Run>) {
        if let Some(run) = run {
            self.replace(run.span(), &[]);
        }
    }

    /// Inserts a member before the closing brace of `object`. If `follows` is true, the object has
    /// other members, and a comma is inserted first. Consecutive insertions at the same position
    /// are merged into one change.
    fn insert(&mut self, object: &Object, follows: bool, name: &str, value: Value<'_>) {
        let comma: &[u8] = if follows { b"," } else { b"" };
        let place = Span::new(object.close, object.close);
        let bytes = match value {
            Value::Bytes(bytes) => bytes,
            Value::Kept(_) | Value::Around(..) => b"",
        };
        self.replace(place, &[comma, b"\"", name.as_bytes(), b"\":", bytes]);
        if let [.., earlier, last] = &mut *self.list
            && earlier.source == last.source
            && let (By::Text(earlier), By::Text(last)) = (&mut earlier.by, last.by)
        {
            earlier.end = last.end;
            self.list.pop();
        }
        if !matches!(value, Value::Bytes(_)) {
            self.set(place, value);
        }
    }

    fn splices(self, source_bytes: usize) -> Splices {
        let mut pieces = Vec::with_capacity(self.list.len() * 2 + 1);
        let mut done = 0;
        for change in &self.list {
            debug_assert!(done <= change.source.start, "changes overlap");
            pieces.push(Piece::Source(Span::new(done, change.source.start)));
            match change.by {
                By::Text(span) => pieces.push(Piece::Text(span)),
                By::Kept(index) => pieces.push(Piece::Kept(index, self.kept[index].len())),
                By::Around(before, part, after) => {
                    pieces.extend([Piece::Text(before), Piece::Source(part), Piece::Text(after)])
                }
            }
            done = change.source.end;
        }
        pieces.push(Piece::Source(Span::new(done, source_bytes)));
        pieces.retain(|piece| piece.len() > 0);
        let len = pieces.iter().map(|piece| piece.len()).sum();
        Splices {
            pieces,
            text: self.text,
            kept: self.kept,
            len,
            source_bytes,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    Source(Span),
    Text(Span),
    /// The index in [`Splices::kept`], and the length.
    Kept(usize, usize),
}

impl Piece {
    const fn len(self) -> usize {
        match self {
            Self::Source(span) | Self::Text(span) => span.len(),
            Self::Kept(_, len) => len,
        }
    }
}

/// An edited body: a list of ranges of the source, which is the body that was scanned, and of the
/// inserted text, in order.
///
/// The source is not stored. The methods that need it take it as a parameter.
#[derive(Clone, Debug, Default)]
pub struct Splices {
    pieces: Vec<Piece>,
    text: Vec<u8>,
    kept: Vec<Rc<Kept>>,
    len: usize,
    source_bytes: usize,
}

impl Splices {
    /// Returns the splices of an unedited body of `len` bytes.
    #[must_use]
    pub fn untouched(len: usize) -> Self {
        Self {
            pieces: vec![Piece::Source(Span::new(0, len))],
            text: Vec::new(),
            kept: Vec::new(),
            len,
            source_bytes: len,
        }
    }

    /// Returns the splices of a body that begins with `begin` and, of the source of `source_bytes`
    /// bytes, has only `part`, between two texts.
    #[must_use]
    pub fn around(
        begin: &Rc<Kept>,
        [before, after]: [&[u8]; 2],
        part: Span,
        source_bytes: usize,
    ) -> Self {
        let (middle, all) = (before.len(), before.len() + after.len());
        let mut pieces = vec![
            Piece::Kept(0, begin.len()),
            Piece::Text(Span::new(0, middle)),
            Piece::Source(part),
            Piece::Text(Span::new(middle, all)),
        ];
        pieces.retain(|piece| piece.len() > 0);
        Self {
            pieces,
            text: [before, after].concat(),
            kept: vec![Rc::clone(begin)],
            len: begin.len() + all + part.len(),
            source_bytes,
        }
    }

    /// Returns the number of bytes of inserted text that is copied here.
    #[must_use]
    pub const fn text_bytes(&self) -> usize {
        self.text.len()
    }

    /// Returns the length of the edited body in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the edited body is empty, which cannot result from a valid body.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the number of slices that [`Splices::pieces`] returns.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.pieces.len()
    }

    /// Returns the slices of the edited body in order. None of them is empty.
    pub fn pieces<'a>(&'a self, source: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        debug_assert_eq!(
            source.len(),
            self.source_bytes,
            "not the source that was scanned"
        );
        self.pieces.iter().map(move |piece| match piece {
            Piece::Source(span) => span.of(source),
            Piece::Text(span) => span.of(&self.text),
            Piece::Kept(index, _) => &self.kept[*index],
        })
    }

    /// Fills `out`, for a vectored write, with slices of the edited body, leaving out its first
    /// `skip` bytes, which have already been sent. Returns the number of elements of `out` that
    /// were filled.
    pub fn fill<'a>(&'a self, source: &'a [u8], mut skip: usize, out: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for piece in self.pieces(source) {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let Some(place) = out.get_mut(filled) else {
                break;
            };
            *place = IoSlice::new(&piece[skip..]);
            skip = 0;
            filled += 1;
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Scanner, Watch};
    use super::*;

    const WATCH: Watch = &[
        (Level::Top, "a"),
        (Level::Top, "b"),
        (Level::Top, "c"),
        (Level::Top, "sampling_params"),
        (Level::SamplingParams, "a"),
        (Level::SamplingParams, "extra_args"),
        (Level::ExtraArgs, "a"),
    ];

    fn document(text: &str) -> Document {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(text.as_bytes()).unwrap();
        scanner.finish().unwrap()
    }

    fn edited(text: &str, edits: &[Edit<'_>]) -> Result<String, EditError> {
        let splices = document(text).edit(edits)?;
        let bytes: Vec<u8> = splices.pieces(text.as_bytes()).flatten().copied().collect();
        Ok(String::from_utf8(bytes).unwrap())
    }

    const fn set(level: Level, name: &'static str, value: &'static str) -> Edit<'static> {
        Edit::Set {
            level,
            name,
            value: value.as_bytes(),
        }
    }

    const fn remove(level: Level, name: &'static str) -> Edit<'static> {
        Edit::Remove { level, name }
    }

    /// A kept value, and one around a part of the body, results in the same body as a copied one,
    /// in every place.
    #[test]
    fn large_values_are_not_copied() {
        let kept = Rc::new(Kept::unlimited("[1,2]"));
        let top = Level::Top;
        for text in [
            "{}",
            r#"{"x":1}"#,
            r#"{"b":0,"x":1,"b":{}}"#,
            r#"{"a":1,"b":2,"c":3}"#,
        ] {
            let part = Span::new(0, text.len());
            let around = format!("[{text}]");
            let set_kept = |name| Edit::SetKept {
                level: top,
                name,
                value: &kept,
            };
            let set_around = |name| Edit::SetAround {
                level: top,
                name,
                begin: b"[",
                source: part,
                end: b"]",
            };
            let copied = |name, value| Edit::Set {
                level: top,
                name,
                value,
            };
            let (a, c) = (set(top, "a", "7"), set(top, "c", "8"));
            for (set, value) in [
                (&set_kept as &dyn Fn(_) -> _, &kept[..]),
                (&set_around, around.as_bytes()),
            ] {
                for (set, copied) in [
                    (vec![set("b")], vec![copied("b", value)]),
                    (vec![a, set("b"), c], vec![a, copied("b", value), c]),
                    (
                        vec![set("b"), remove(top, "a"), remove(top, "c")],
                        vec![copied("b", value), remove(top, "a"), remove(top, "c")],
                    ),
                    (
                        vec![set("c"), remove(top, "b"), set("a")],
                        vec![copied("c", value), remove(top, "b"), copied("a", value)],
                    ),
                ] {
                    assert_eq!(
                        edited(text, &set),
                        edited(text, &copied),
                        "{text} {copied:?}"
                    );
                }
            }
        }
        assert_eq!(Rc::strong_count(&kept), 1);
    }

    #[test]
    fn edits_at_the_top_level() {
        let top = Level::Top;
        let (no_a, no_b, no_c) = (remove(top, "a"), remove(top, "b"), remove(top, "c"));
        let cases: [(&str, &[Edit<'_>], &str); 16] = [
            (r#"{ "x" : 1.0 }"#, &[], r#"{ "x" : 1.0 }"#),
            (r#"{"a":1,"x":2}"#, &[no_a], r#"{"x":2}"#),
            (r#"{"x":1, "a":1 , "y":2}"#, &[no_a], r#"{"x":1,  "y":2}"#),
            (r#"{"x":2 , "a":1 }"#, &[no_a], r#"{"x":2  }"#),
            (r#"{ "a":1 }"#, &[no_a], "{  }"),
            (r#"{"a":1,"b":2,"c":3}"#, &[no_a, no_b, no_c], "{}"),
            (
                r#"{"a":1,"x":2,"b":2,"c":3}"#,
                &[no_c, no_a, no_b],
                r#"{"x":2}"#,
            ),
            (r#"{"a":1,"b":2,"x":3}"#, &[no_a, no_b], r#"{"x":3}"#),
            (r#"{"a":1,"a":2,"x":3,"a":4}"#, &[no_a], r#"{"x":3}"#),
            (r#"{"x":3}"#, &[no_a], r#"{"x":3}"#),
            (
                "{}",
                &[set(top, "a", "1"), set(top, "b", "[2]")],
                r#"{"a":1,"b":[2]}"#,
            ),
            (r#"{"x":1 }"#, &[set(top, "a", "2")], r#"{"x":1 ,"a":2}"#),
            (
                r#"{"a":1,"b":2}"#,
                &[no_a, no_b, set(top, "c", "3")],
                r#"{"c":3}"#,
            ),
            (
                r#"{"x":1,"b":2}"#,
                &[no_b, set(top, "c", "3")],
                r#"{"x":1,"c":3}"#,
            ),
            (
                r#"{"a":1,"b":2,"a":3}"#,
                &[set(top, "a", "9")],
                r#"{"a":9,"b":2,"a":9}"#,
            ),
            (r#"{"\u0061":1}"#, &[set(top, "a", "9")], r#"{"\u0061":9}"#),
        ];
        for (text, edits, want) in cases {
            assert_eq!(edited(text, edits).as_deref(), Ok(want), "{text} {edits:?}");
        }
    }

    #[test]
    fn edits_inside_nested_objects() {
        let (top, inside) = (Level::Top, Level::SamplingParams);
        let no_a = remove(top, "a");
        let cases: [(&str, &[Edit<'_>], &str); 5] = [
            (
                r#"{"sampling_params":{"a":1},"a":2}"#,
                &[set(inside, "a", "7"), no_a],
                r#"{"sampling_params":{"a":7}}"#,
            ),
            (
                r#"{"sampling_params":{},"sampling_params":{"a":1}}"#,
                &[set(inside, "a", "7")],
                r#"{"sampling_params":{"a":7},"sampling_params":{"a":7}}"#,
            ),
            (
                r#"{"sampling_params":{"extra_args":{}}}"#,
                &[
                    set(Level::ExtraArgs, "a", "1"),
                    set(inside, "a", "2"),
                    set(top, "a", "3"),
                ],
                r#"{"sampling_params":{"extra_args":{"a":1},"a":2},"a":3}"#,
            ),
            (
                r#"{"sampling_params":null}"#,
                &[set(top, "sampling_params", r#"{"a":1}"#)],
                r#"{"sampling_params":{"a":1}}"#,
            ),
            (
                r#"{"x":[{"a":1},"\"a\":1"],"y":{"a":1,"sampling_params":{"a":1}}}"#,
                &[no_a, remove(inside, "a")],
                r#"{"x":[{"a":1},"\"a\":1"],"y":{"a":1,"sampling_params":{"a":1}}}"#,
            ),
        ];
        for (text, edits, want) in cases {
            assert_eq!(edited(text, edits).as_deref(), Ok(want), "{text} {edits:?}");
        }
    }

    #[test]
    fn invalid_edits_are_refused() {
        let (top, inside) = (Level::Top, Level::SamplingParams);
        let one = set(inside, "a", "1");
        let cases: [(&str, &[Edit<'_>], EditError); 7] = [
            ("{}", &[one], EditError::NoObject),
            (r#"{"sampling_params":[]}"#, &[one], EditError::NoObject),
            (
                r#"{"sampling_params":{},"sampling_params":0}"#,
                &[one],
                EditError::NoObject,
            ),
            (
                "{}",
                &[set(top, "a", "1"), remove(top, "a")],
                EditError::Twice,
            ),
            (
                r#"{"sampling_params":{}}"#,
                &[one, remove(top, "sampling_params")],
                EditError::InsideEdited,
            ),
            (
                r#"{"sampling_params":{"extra_args":{}}}"#,
                &[
                    remove(Level::ExtraArgs, "a"),
                    set(inside, "extra_args", "{}"),
                ],
                EditError::InsideEdited,
            ),
            (
                "{}",
                &[remove(top, "a"); JSON_EDITS_MAX + 1],
                EditError::TooMany,
            ),
        ];
        for (text, edits, want) in cases {
            assert_eq!(edited(text, edits), Err(want), "{text} {edits:?}");
        }
    }

    #[test]
    fn fill_resumes_at_any_offset() {
        let text = r#"{"a":1,"x":"a long string","b":2}"#;
        let edits = [set(Level::Top, "a", "[1,2]"), set(Level::Top, "c", "{}")];
        let splices = document(text).edit(&edits).unwrap();
        let whole = edited(text, &edits).unwrap();
        assert_eq!(splices.len(), whole.len());
        for skip in 0..=whole.len() {
            let mut slices = [IoSlice::new(b""); 8];
            let filled = splices.fill(text.as_bytes(), skip, &mut slices);
            let bytes: Vec<u8> = slices[..filled].iter().flat_map(|s| s.to_vec()).collect();
            assert_eq!(bytes, &whole.as_bytes()[skip..]);
        }
    }
}
