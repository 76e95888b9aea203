//! Overwrites values of a body in place while it streams, without changing its length.
//!
//! A decode-only body is forwarded with the client's `Content-Length`, so a member cannot be
//! removed from it. Instead, the value is replaced by `null`, padded with spaces to the same
//! length, which engines treat as an absent member.
//!
//! A value that is overwritten is validated in full: with the value, its defect would disappear,
//! and the engine would serve a body that it must refuse.
//!
//! A value shorter than `null` has no room for that. An empty object passes unmodified, because
//! engines treat it as an absent member too. Any other short value is refused, because an engine
//! that expects an object fails on a `0` or `""` (`docs/engines.md#client-supplied-parameters`).
//!
//! If a part of the input ends before the fourth byte of a value, it is not yet known whether the
//! value is that short. These bytes, three at most, are then held back until the next part arrives.

use std::ops::Deref;

#[cfg(any(test, feature = "fuzzing"))]
use super::block::Isa;
use super::error::{JsonError, JsonReason};
use super::lex::{Event, Kind, Lexer};
use super::scan::{Level, Watch, is_valid_watch, watched};
use super::validate::Validator;

/// Overwrites the values of the watched members, at their levels, while a body streams.
///
/// If the value of a watched member is an object, the whole object is overwritten, including any
/// watched members inside it. All repetitions of a member are overwritten.
#[derive(Clone, Debug)]
pub struct Mask {
    lexer: Lexer,
    watch: Watch,
    level: Level,
    next: Next,
    /// The watched value that is being overwritten, `None` outside of such a value.
    value: Option<Masking>,
    /// Validates `value`; `None` if the lexer validates values of its kind.
    validator: Option<Box<Validator>>,
    held: HeldBytes,
    masked: u32,
    model: Model,
    failed: Option<JsonError>,
}

/// The text of the top-level member `model`.
#[derive(Clone, Debug)]
enum Model {
    /// It is not read.
    Ignored,
    /// It has not been found.
    Absent,
    /// It begins at this offset in the body.
    Begun(usize),
    /// The text, as it is in the body: between the quotes, with its escapes.
    Read(Box<[u8]>),
}

/// Action for the value of the member whose name was read last.
#[derive(Clone, Copy, Debug)]
enum Next {
    Skip,
    Mask,
    Model,
    Enter(Level),
}

#[derive(Clone, Copy, Debug)]
struct Masking {
    start: usize,
    kind: Kind,
    /// Whether the value is known to be at least as long as `null`, which is 4 bytes.
    decided: bool,
}

/// The bytes that can be sent after [`Mask::feed`]: first `held`, then `piece[..ready]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// Bytes that earlier calls held back and that can now be sent.
    pub held: HeldBytes,
    /// Number of leading bytes of `piece` that can be sent.
    pub ready: usize,
}

/// A buffer of up to four bytes of a body. Dereferences to a slice of the bytes it contains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldBytes {
    bytes: [u8; NULL.len()],
    len: u8,
}

const NULL: &[u8; 4] = b"null";

impl HeldBytes {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if let Some(place) = self.bytes.get_mut(usize::from(self.len)) {
                *place = byte;
                self.len += 1;
            }
        }
    }
}

impl Deref for HeldBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl Mask {
    /// Creates a mask for the members of `watch`.
    #[must_use]
    pub fn new(watch: Watch) -> Self {
        debug_assert!(is_valid_watch(watch));
        Self {
            lexer: Lexer::new(),
            watch,
            level: Level::Top,
            next: Next::Skip,
            value: None,
            validator: None,
            held: HeldBytes::default(),
            masked: 0,
            model: Model::Ignored,
            failed: None,
        }
    }

    /// Also reads the model that the body names.
    #[must_use]
    pub fn reading_model(mut self) -> Self {
        self.model = Model::Absent;
        self
    }

    /// Returns the text of the top-level string `model`, with its escapes. Returns `None` without
    /// one, for one that was split between two calls of [`Mask::feed`], and without
    /// [`Mask::reading_model`].
    #[must_use]
    pub fn model(&self) -> Option<&[u8]> {
        match &self.model {
            Model::Read(text) => Some(text),
            Model::Ignored | Model::Absent | Model::Begun(_) => None,
        }
    }

    /// Uses the implementation `isa` to skip strings and containers, instead of the fastest one
    /// that this machine supports.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_isa(mut self, isa: Isa) -> Self {
        self.lexer = self.lexer.with_isa(isa);
        self
    }

    /// Scans `piece`, the next part of the body, overwrites values in it, and returns which bytes
    /// can be sent.
    ///
    /// The rest of `piece`, three bytes at most, is held back and returned by a later call.
    ///
    /// # Errors
    ///
    /// The body is not a JSON object, or a value can neither be overwritten nor pass unmodified.
    /// `piece` may then be partly overwritten and must not be sent. Every later call returns the
    /// same error.
    pub fn feed(&mut self, piece: &mut [u8]) -> Result<Masked, JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.read(piece)
            .inspect_err(|&error| self.failed = Some(error))
    }

    /// Returns the error of an earlier [`Mask::feed`], if one failed.
    ///
    /// # Errors
    ///
    /// As [`Mask::feed`].
    pub fn check(&self) -> Result<(), JsonError> {
        self.failed.map_or(Ok(()), Err)
    }

    /// Checks that the body is complete. Must be called at its end.
    ///
    /// No bytes are held back at that point, because every value ends before the closing brace.
    ///
    /// # Errors
    ///
    /// The body is incomplete, or [`Mask::feed`] failed earlier, in which case its error is
    /// returned.
    pub fn finish(&mut self) -> Result<(), JsonError> {
        self.check()?;
        self.lexer.finish()?;
        debug_assert!(self.held.is_empty());
        Ok(())
    }

    /// Returns the number of values overwritten. A value that was already `null` does not count.
    #[must_use]
    pub const fn masked(&self) -> u32 {
        self.masked
    }

    fn read(&mut self, piece: &mut [u8]) -> Result<Masked, JsonError> {
        let base = self.lexer.base();
        let mut out = Masked {
            held: HeldBytes::default(),
            ready: piece.len(),
        };
        loop {
            let event = match self.lexer.next(piece) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => {
                    // An earlier error takes precedence, however the body is split.
                    self.validate(error.offset, base, piece)?;
                    return Err(error);
                }
            };
            match event {
                Event::Name { .. } => self.name(),
                Event::Value { at, kind } => self.value_start(at, kind),
                Event::ValueEnd { at } => {
                    if let Model::Begun(start) = self.model {
                        let text = start.checked_sub(base);
                        let text = text.and_then(|start| piece.get(start + 1..at - base - 1));
                        self.model = text.map_or(Model::Absent, |text| Model::Read(text.into()));
                    }
                    self.validate(at, base, piece)?;
                    self.validator = None;
                    if let Some(value) = self.value.take() {
                        let masked = self.overwrite(value, at, base, piece, &mut out.held);
                        if !masked && value.kind != Kind::Object {
                            return Err(JsonError {
                                offset: value.start,
                                reason: JsonReason::NotClients,
                            });
                        }
                        self.release(&mut out.held);
                    }
                }
                Event::Comma { .. } => {}
                Event::Close { .. } => self.level = self.level.parent(),
            }
        }
        self.validate(base + piece.len(), base, piece)?;
        if let Some(value) = self.value {
            let decided = self.overwrite(value, base + piece.len(), base, piece, &mut out.held);
            self.value = Some(Masking { decided, ..value });
            if !decided {
                out.ready = value.start.saturating_sub(base);
                self.held.push(&piece[out.ready..]);
            }
        }
        Ok(out)
    }

    fn name(&mut self) {
        self.next = Next::Skip;
        let Some(name) = self.lexer.name() else {
            return;
        };
        if watched(self.watch, self.level, name).is_some() {
            self.next = Next::Mask;
        } else if let Some(child) = self.level.child(name) {
            self.next = Next::Enter(child);
        } else if name == b"model" && self.level == Level::Top {
            self.next = Next::Model;
        }
    }

    fn value_start(&mut self, at: usize, kind: Kind) {
        match self.next {
            Next::Mask if kind != Kind::Null => {
                self.value = Some(Masking {
                    start: at,
                    kind,
                    decided: false,
                });
                self.validator = matches!(kind, Kind::Object | Kind::Array | Kind::String)
                    .then(|| Box::new(Validator::new()));
            }
            Next::Enter(child) if kind == Kind::Object => {
                self.level = child;
                self.lexer.enter();
            }
            Next::Model if kind == Kind::String && !matches!(self.model, Model::Ignored) => {
                self.model = Model::Begun(at);
            }
            // The last one of repeated members counts.
            Next::Model if !matches!(self.model, Model::Ignored) => self.model = Model::Absent,
            Next::Skip | Next::Mask | Next::Model | Next::Enter(_) => {}
        }
    }

    /// Validates the bytes of the current value that are in `piece`, up to offset `end` of the
    /// body. `base` is the offset in the body at which `piece` starts.
    fn validate(&mut self, end: usize, base: usize, piece: &[u8]) -> Result<(), JsonError> {
        let (Some(value), Some(validator)) = (self.value, &mut self.validator) else {
            return Ok(());
        };
        let from = value.start + validator.read_bytes();
        let new = &piece[from - base..end - base];
        validator
            .feed(new)
            .map_err(|error| error.after(value.start))
    }

    /// Overwrites the bytes of `value` that are in `piece`, up to offset `end` of the body. `base`
    /// is the offset in the body at which `piece` starts. Bytes of the value that were held back
    /// are also overwritten and moved to `out`.
    ///
    /// Returns `false` and changes nothing if fewer than 4 bytes of the value, the length of
    /// `null`, have arrived.
    fn overwrite(
        &mut self,
        value: Masking,
        end: usize,
        base: usize,
        piece: &mut [u8],
        out: &mut HeldBytes,
    ) -> bool {
        if end - value.start < NULL.len() {
            return false;
        }
        if !value.decided {
            self.masked = self.masked.saturating_add(1);
            let held = self.held.len();
            self.held = HeldBytes::default();
            out.push(&NULL[..held]);
        }
        let from = value.start.max(base);
        let part = &mut piece[from - base..end - base];
        part.fill(b' ');
        let text = NULL.get(from - value.start..).unwrap_or_default();
        let text = &text[..text.len().min(part.len())];
        part[..text.len()].copy_from_slice(text);
        true
    }

    fn release(&mut self, out: &mut HeldBytes) {
        let held = self.held;
        out.push(&held);
        self.held = HeldBytes::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCH: Watch = &[
        (Level::Top, "kv"),
        (Level::SamplingParams, "kv"),
        (Level::ExtraArgs, "kv"),
        (Level::Xargs, "kv"),
    ];

    #[test]
    fn watched_values_are_overwritten() {
        let cases = [
            (
                r#"{"kv":{"a":[1,"}"]},"x":1}"#,
                r#"{"kv":null         ,"x":1}"#,
                1,
            ),
            (r#"{"kv":1234}"#, r#"{"kv":null}"#, 1),
            (r#"{"kv":{} ,"kv":{ }}"#, r#"{"kv":{} ,"kv":{ }}"#, 0),
            (
                r#"{"vllm_xargs":{"kv":"abc","x":1,"sampling_params":{"kv":1}},"x":0}"#,
                r#"{"vllm_xargs":{"kv":null ,"x":1,"sampling_params":{"kv":1}},"x":0}"#,
                1,
            ),
            (r#"{"kv":true,"kv":false}"#, r#"{"kv":null,"kv":null }"#, 2),
            (r#"{"kv":null}"#, r#"{"kv":null}"#, 0),
            (
                r#"{"x":{"kv":12345},"y":"kv"}"#,
                r#"{"x":{"kv":12345},"y":"kv"}"#,
                0,
            ),
            (r#"{"k\u0076" : "é\"é"}"#, r#"{"k\u0076" : null    }"#, 1),
            (
                r#"{"sampling_params":{"kv":[1,2],"extra_args":{"kv":[33]}},"kv":[4,5]}"#,
                r#"{"sampling_params":{"kv":null ,"extra_args":{"kv":null}},"kv":null }"#,
                3,
            ),
        ];
        for (text, want, count) in cases {
            for size in 1..=text.len() {
                let mut mask = Mask::new(WATCH);
                let mut sent = Vec::new();
                for piece in text.as_bytes().chunks(size) {
                    let mut piece = piece.to_vec();
                    let masked = mask.feed(&mut piece).unwrap();
                    sent.extend_from_slice(&masked.held);
                    sent.extend_from_slice(&piece[..masked.ready]);
                }
                mask.finish().unwrap();
                assert_eq!(String::from_utf8(sent).unwrap(), want, "parts of {size}");
                assert_eq!(mask.masked(), count, "{text}");
            }
        }
    }

    #[test]
    fn the_model_is_read_if_it_arrives_in_one_piece() {
        let cases: [(&str, Option<&str>); 7] = [
            (r#"{"model":"m/7b","a":1}"#, Some("m/7b")),
            (r#"{"model":""}"#, Some("")),
            (r#"{"model":"a\"b","model":"last"}"#, Some("last")),
            (r#"{"a":{"model":"inner"}}"#, None),
            (r#"{"model":7,"b":"text"}"#, None),
            (r#"{"model":"m","model":7}"#, None),
            (r#"{"b":"text"}"#, None),
        ];
        for (text, want) in cases {
            let mut mask = Mask::new(WATCH).reading_model();
            mask.feed(&mut text.as_bytes().to_vec()).unwrap();
            assert_eq!(mask.model(), want.map(str::as_bytes), "{text}");
            let mut unread = Mask::new(WATCH);
            unread.feed(&mut text.as_bytes().to_vec()).unwrap();
            assert_eq!(unread.model(), None);
        }
        let (begin, end) = (br#"{"model":"m"#.as_slice(), br#"","c":"d"}"#.as_slice());
        let mut mask = Mask::new(WATCH).reading_model();
        for part in [begin, end] {
            mask.feed(&mut part.to_vec()).unwrap();
        }
        assert_eq!(mask.model(), None);
    }

    #[test]
    fn short_values_are_refused() {
        for value in ["0", "\"\"", "[]", "[0]", "-1", "\"a\"", "123"] {
            for text in [
                format!(r#"{{"kv":{value}}}"#),
                format!(r#"{{"vllm_xargs":{{"kv":{value} }}}}"#),
            ] {
                for size in 1..=text.len() {
                    let mut mask = Mask::new(WATCH);
                    let mut pieces = text.as_bytes().chunks(size).map(<[u8]>::to_vec);
                    let error = pieces
                        .find_map(|mut piece| mask.feed(&mut piece).err())
                        .unwrap();
                    assert_eq!(error.reason, JsonReason::NotClients, "{text}");
                    assert_eq!(error.offset, text.find(value).unwrap(), "{text}");
                }
            }
        }
    }

    #[test]
    fn only_an_incomplete_short_value_is_held_back() {
        let mut mask = Mask::new(WATCH);
        let mut piece = *br#"{"kv":123"#;
        let masked = mask.feed(&mut piece).unwrap();
        assert_eq!((&*masked.held, masked.ready), (&b""[..], 6));
        let mut piece = *b"45,";
        let masked = mask.feed(&mut piece).unwrap();
        assert_eq!(
            (&*masked.held, masked.ready, &piece),
            (&b"nul"[..], 3, b"l ,")
        );
        assert!(mask.finish().is_err());
    }
}
