//! Reads a prefill engine's response while it arrives and extracts the handoff.
//!
//! Only the raw bytes of the top-level `kv_transfer_params` and the counts of `usage` are kept. The
//! handoff is relayed byte for byte, so it is validated strictly once it is complete: it must be an
//! object and valid according to RFC 8259 at every depth. Its members are the business of the
//! engines, which differ in them. Only the form of the block ids is determined ([`Blocks`]),
//! because an engine may exit if it receives the other one.

use std::sync::{Arc, LazyLock};

use memchr::memmem;

#[cfg(any(test, feature = "fuzzing"))]
use super::block::Isa;
use super::cursor::{elements, member, string_is};
use super::error::{JsonError, JsonReason};
use super::handoff_shape::{Blocks, Shape, integer};
use super::lex::{Event, Kind, Lexer};
use super::validate::Validator;
use crate::budget::{Budget, Kept};
use crate::span::Span;

/// Searches for the name of the member that is kept.
static EXPERTS: LazyLock<memmem::Finder<'static>> =
    LazyLock::new(|| memmem::Finder::new(b"\"routed_experts\""));

/// Returns whether a response may contain routed experts: it has their name somewhere.
#[must_use]
pub fn has_experts(response: &[u8]) -> bool {
    EXPERTS.find(response).is_some()
}

/// Reads a prefill engine's response in parts and extracts the handoff.
#[derive(Debug)]
pub struct PrefillResponse {
    lexer: Lexer,
    place: Place,
    next: Next,
    keeping: Option<Keeping>,
    params: Found,
    kept: Kept,
    /// Validates `kept` as it arrives, since a handoff can have many MiB.
    validator: Validator,
    /// Why `kept` is not valid JSON.
    invalid: Option<JsonReason>,
    choices: Kept,
    are_choices_too_large: bool,
    kept_bytes_max: usize,
    count: Digits,
    reads_end: bool,
    end: End,
    /// The counts of `usage`, indexed by [`Count`]; `None` without a valid count.
    counts: [Option<u64>; COUNTS],
    failed: Option<JsonError>,
}

/// The object of the response whose members are being read.
#[derive(Clone, Copy, Debug)]
enum Place {
    Top,
    Usage,
    Details(Details),
}

#[derive(Clone, Copy, Debug)]
enum Details {
    /// `prompt_tokens_details`, in chat completions and completions.
    Prompt,
    /// `input_tokens_details`, in the responses API.
    Input,
}

/// A count of the response's `usage`.
#[derive(Clone, Copy, Debug)]
enum Count {
    /// `prompt_tokens_details.cached_tokens`
    CachedOfPrompt,
    /// `input_tokens_details.cached_tokens`
    CachedOfInput,
    /// `cache_read_input_tokens`
    CacheRead,
    /// `cache_creation_input_tokens`, or `created_cache_tokens` or `cache_write_tokens` in the
    /// details.
    Created,
    /// `input_tokens`
    Input,
}

const COUNTS: usize = Count::Input as usize + 1;

impl Details {
    const fn count(self) -> Count {
        match self {
            Self::Prompt => Count::CachedOfPrompt,
            Self::Input => Count::CachedOfInput,
        }
    }
}

/// Action for the value of the member whose name was read last.
#[derive(Clone, Copy, Debug)]
enum Next {
    Skip,
    Params,
    Choices,
    Enter(Place),
    Count(Count),
    Word(Word),
}

/// A member of the response whose value is the reason why generation ended.
#[derive(Clone, Copy, Debug)]
enum Word {
    StopReason,
    Status,
}

/// The value whose bytes are being kept, and the offset in the response at which it starts.
#[derive(Clone, Copy, Debug)]
enum Keeping {
    Params { start: usize },
    Choices { start: usize },
    Count { count: Count, start: usize },
    Word { word: Word, start: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Absent,
    Null,
    Object,
    Unfit,
}

/// The parts of a prefill engine's response that the decode leg uses.
#[derive(Debug, PartialEq, Eq)]
pub struct Handoff {
    /// The response's `kv_transfer_params`.
    pub params: Params,
    /// The prefill engine's count of cached prompt tokens, from the response's `usage`. `None` if
    /// the response contains no valid count, as for the others.
    pub cached_tokens: Option<u64>,
    /// The prefill engine's count of the prompt's tokens that it added to its cache.
    pub created_tokens: Option<u64>,
    /// The response's `usage.input_tokens`: in the messages API, the tokens of the prompt without
    /// those that other counts include.
    pub input_tokens: Option<u64>,
    /// The prefill engine's count of cached prompt tokens, from `remote_prefill_cached_tokens` in
    /// the `kv_transfer_params`. `None` if they contain no valid count or are not usable.
    pub remote_prefill_cached_tokens: Option<u64>,
    /// The form of the block ids in the `kv_transfer_params`.
    pub blocks: Blocks,
    /// Whether the `transfer_mode` in the `kv_transfer_params` is `push`.
    pub is_push: bool,
    /// The response's `choices`, if they contain routed experts.
    pub choices: Choices,
    /// Why the engine generated no further token; unknown without
    /// [`PrefillResponse::reading_end`].
    pub end: End,
}

/// Why an engine generated no further token for a request with a limit of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// The response has no known reason.
    #[default]
    Unknown,
    /// The limit, or a stop string, which the engine's front end finds: the KV cache is kept.
    Limit,
    /// The token itself, such as one that ends the text: the KV cache is not kept.
    Token,
}

impl End {
    /// Reads the `finish_reason` of the first element of `choices`: of chat completions,
    /// completions and the generate API.
    fn of_choices(choices: &[u8]) -> Self {
        let choice = elements(choices).next();
        let reason = choice.and_then(|choice| member(choice.value, "finish_reason"));
        match reason {
            Some(reason) if string_is(reason, "length") => Self::Limit,
            Some(reason) if reason != b"null" => Self::Token,
            Some(_) | None => Self::Unknown,
        }
    }

    /// Reads the value of `name`: `stop_reason` of the messages API, or `status` of the responses
    /// API.
    fn of_word(word: Word, value: &[u8]) -> Self {
        let is_one_of = |values: &[&str]| values.iter().any(|text| string_is(value, text));
        match word {
            Word::StopReason if is_one_of(&["max_tokens", "stop_sequence"]) => Self::Limit,
            Word::StopReason if is_one_of(&["end_turn", "tool_use"]) => Self::Token,
            Word::Status if is_one_of(&["incomplete"]) => Self::Limit,
            Word::Status if is_one_of(&["completed"]) => Self::Token,
            Word::StopReason | Word::Status => Self::Unknown,
        }
    }
}

/// The `choices` of a prefill response, an array.
#[derive(Debug, PartialEq, Eq)]
pub enum Choices {
    /// They contain no routed experts.
    Plain,
    /// They contain routed experts.
    Experts(Kept),
    /// They are larger than what is kept, or than the budget allows, so they may contain routed
    /// experts.
    TooLarge,
}

/// The `kv_transfer_params` of a response.
#[derive(Debug, PartialEq, Eq)]
pub enum Params {
    /// The response has no `kv_transfer_params`.
    Absent,
    /// The value is `null` or an object without members: the prefill engine has no KV cache to
    /// transfer.
    Null,
    /// A valid JSON object, as the bytes received.
    Object(Kept),
    /// The value cannot be used as a handoff, for the reason in this text.
    Malformed(&'static str),
}

impl PrefillResponse {
    /// Creates a reader that keeps at most `kept_bytes_max` bytes of `kv_transfer_params`, and as
    /// many of `choices`, and counts them in `budget`.
    #[must_use]
    pub fn new(kept_bytes_max: usize, budget: &Arc<Budget>) -> Self {
        Self {
            lexer: Lexer::new(),
            place: Place::Top,
            next: Next::Skip,
            keeping: None,
            params: Found::Absent,
            kept: Kept::new(budget),
            validator: Validator::new(),
            invalid: None,
            choices: Kept::new(budget),
            are_choices_too_large: false,
            kept_bytes_max,
            count: Digits::new(),
            reads_end: false,
            end: End::Unknown,
            counts: [None; COUNTS],
            failed: None,
        }
    }

    /// Announces the length of the response in bytes (see [`Kept::announce`]).
    #[must_use]
    pub fn of_length(mut self, bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.kept.announce(bytes.min(self.kept_bytes_max));
        self.choices.announce(bytes.min(self.kept_bytes_max));
        self
    }

    /// Also reads why the engine generated no further token.
    #[must_use]
    pub fn reading_end(mut self) -> Self {
        self.reads_end = true;
        self
    }

    /// Uses the implementation `isa` to skip strings and containers, instead of the fastest one
    /// that this machine supports.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_isa(mut self, isa: Isa) -> Self {
        self.lexer = self.lexer.with_isa(isa);
        self
    }

    /// Reads `piece`, the next part of the response.
    ///
    /// # Errors
    ///
    /// The response is not a JSON object, its handoff is larger than the limit, or the budget is
    /// spent. Every later call returns the same error.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.read(piece)
            .inspect_err(|&error| self.failed = Some(error))
    }

    /// Returns the handoff at the end of the response.
    ///
    /// # Errors
    ///
    /// The response is incomplete, or [`PrefillResponse::feed`] failed earlier, in which case its
    /// error is returned. A handoff of the wrong shape is not an error but results in
    /// [`Params::Malformed`].
    pub fn finish(mut self) -> Result<Handoff, JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.kept.complete();
        self.choices.complete();
        self.lexer.finish()?;
        let mut remote_prefill_cached_tokens = None;
        let mut blocks = Blocks::Other;
        let mut is_push = false;
        let params = match self.params {
            Found::Absent => Params::Absent,
            Found::Null => Params::Null,
            Found::Unfit => Params::Malformed("kv_transfer_params is not an object"),
            Found::Object => match self.shape() {
                Ok(shape) if shape.is_empty => Params::Null,
                Ok(shape) => {
                    remote_prefill_cached_tokens = shape.cached_tokens(&self.kept);
                    blocks = shape.blocks(&self.kept);
                    is_push = shape.is_push(&self.kept);
                    Params::Object(self.kept)
                }
                Err(reason) => Params::Malformed(reason.text()),
            },
        };
        let [of_prompt, of_input, cache_read, created, input] = self.counts;
        let end = match self.end {
            End::Unknown if self.reads_end => End::of_choices(&self.choices),
            known => known,
        };
        Ok(Handoff {
            end,
            params,
            cached_tokens: of_prompt.or(of_input).or(cache_read),
            created_tokens: created,
            input_tokens: input,
            remote_prefill_cached_tokens,
            blocks,
            is_push,
            choices: if self.are_choices_too_large {
                Choices::TooLarge
            } else if has_experts(&self.choices) {
                Choices::Experts(self.choices)
            } else {
                Choices::Plain
            },
        })
    }

    /// Returns the known members of the handoff, or why it is not valid.
    fn shape(&self) -> Result<Shape, JsonReason> {
        if let Some(reason) = self.invalid {
            return Err(reason);
        }
        let valid = self.validator.finish();
        let shape = valid.and_then(|()| Shape::read(&self.kept));
        shape.map_err(|error| error.reason)
    }

    fn read(&mut self, piece: &[u8]) -> Result<(), JsonError> {
        let base = self.lexer.base();
        while let Some(event) = self.lexer.next(piece)? {
            match event {
                Event::Name { .. } => self.name(),
                Event::Value { at, kind } => self.value(at, kind),
                Event::ValueEnd { at } => {
                    self.skip_plain_choices(piece, base, at);
                    self.take(piece, base, at)?;
                    match self.keeping.take() {
                        Some(Keeping::Count { count, .. }) => {
                            self.counts[count as usize] = self.count.integer();
                        }
                        Some(Keeping::Word { word, .. }) => {
                            self.end = End::of_word(word, self.count.text());
                        }
                        Some(Keeping::Params { .. } | Keeping::Choices { .. }) | None => {}
                    }
                }
                Event::Comma { .. } => {}
                Event::Close { .. } => match self.place {
                    Place::Top | Place::Usage => self.place = Place::Top,
                    Place::Details(_) => self.place = Place::Usage,
                },
            }
        }
        self.take(piece, base, base + piece.len())
    }

    /// Does not keep `choices` that are entirely in `piece` and have no routed experts, as those of
    /// nearly every response.
    fn skip_plain_choices(&mut self, piece: &[u8], base: usize, end: usize) {
        if let Some(Keeping::Choices { start }) = self.keeping
            && start >= base
        {
            let choices = Span::new(start - base, end - base).of(piece);
            if !has_experts(choices) {
                if self.reads_end {
                    self.end = End::of_choices(choices);
                }
                self.keeping = None;
            }
        }
    }

    /// Copies the bytes of the value being kept that are in `piece`, up to offset `end` of the
    /// response. `base` is the offset in the response at which `piece` starts. Does nothing if no
    /// value is being kept. Stops keeping `choices` that are longer than `kept_bytes_max`, and
    /// fails if `kv_transfer_params` are.
    fn take(&mut self, piece: &[u8], base: usize, end: usize) -> Result<(), JsonError> {
        match self.keeping {
            None => {}
            Some(Keeping::Params { start } | Keeping::Choices { start }) => {
                let kept = match self.keeping {
                    Some(Keeping::Choices { .. }) => &mut self.choices,
                    _ => &mut self.kept,
                };
                let part = Span::new(start.max(base) - base, end - base).of(piece);
                if part.len() > self.kept_bytes_max - kept.len() {
                    if matches!(self.keeping, Some(Keeping::Choices { .. })) {
                        self.drop_choices();
                        return Ok(());
                    }
                    return Err(JsonError {
                        offset: start,
                        reason: JsonReason::KeptTooLarge,
                    });
                }
                let appended = kept.append(part);
                if appended.is_err() && matches!(self.keeping, Some(Keeping::Choices { .. })) {
                    // Nearly none have experts, and the handoff may fit.
                    self.drop_choices();
                    return Ok(());
                }
                appended.map_err(|_| JsonError {
                    offset: start,
                    reason: JsonReason::BudgetSpent,
                })?;
                if matches!(self.keeping, Some(Keeping::Params { .. })) && self.invalid.is_none() {
                    let fed = self.validator.feed(part);
                    self.invalid = fed.err().map(|error| error.reason);
                }
            }
            Some(Keeping::Count { start, .. } | Keeping::Word { start, .. }) => {
                self.count
                    .push(Span::new(start.max(base) - base, end - base).of(piece));
            }
        }
        Ok(())
    }

    fn drop_choices(&mut self) {
        self.keeping = None;
        self.choices.clear();
        self.are_choices_too_large = true;
    }

    fn name(&mut self) {
        self.next = match (self.place, self.lexer.name()) {
            (Place::Top, Some(b"kv_transfer_params")) => Next::Params,
            (Place::Top, Some(b"choices")) => Next::Choices,
            (Place::Top, Some(b"usage")) => Next::Enter(Place::Usage),
            (Place::Top, Some(b"stop_reason")) if self.reads_end => Next::Word(Word::StopReason),
            (Place::Top, Some(b"status")) if self.reads_end => Next::Word(Word::Status),
            (Place::Usage, Some(b"prompt_tokens_details")) => {
                Next::Enter(Place::Details(Details::Prompt))
            }
            (Place::Usage, Some(b"input_tokens_details")) => {
                Next::Enter(Place::Details(Details::Input))
            }
            (Place::Usage, Some(b"input_tokens")) => Next::Count(Count::Input),
            (Place::Usage, Some(b"cache_read_input_tokens")) => Next::Count(Count::CacheRead),
            (Place::Usage, Some(b"cache_creation_input_tokens")) => Next::Count(Count::Created),
            (Place::Details(details), Some(b"cached_tokens")) => Next::Count(details.count()),
            (Place::Details(_), Some(b"created_cache_tokens" | b"cache_write_tokens")) => {
                Next::Count(Count::Created)
            }
            _ => Next::Skip,
        };
    }

    /// Handles the start of a member's value at offset `at`. The value of a repeated member
    /// replaces the earlier one.
    fn value(&mut self, at: usize, kind: Kind) {
        match self.next {
            Next::Skip => {}
            Next::Params => {
                self.kept.clear();
                self.validator = Validator::new();
                self.invalid = None;
                self.params = match kind {
                    Kind::Object => Found::Object,
                    Kind::Null => Found::Null,
                    Kind::Array | Kind::String | Kind::Number | Kind::True | Kind::False => {
                        Found::Unfit
                    }
                };
                if kind == Kind::Object {
                    self.keeping = Some(Keeping::Params { start: at });
                }
            }
            Next::Choices => {
                self.choices.clear();
                self.end = End::Unknown;
                self.are_choices_too_large = false;
                if kind == Kind::Array {
                    self.keeping = Some(Keeping::Choices { start: at });
                }
            }
            Next::Enter(place) => {
                match place {
                    Place::Top => {}
                    Place::Usage => self.counts = [None; COUNTS],
                    Place::Details(details) => {
                        self.counts[details.count() as usize] = None;
                        self.counts[Count::Created as usize] = None;
                    }
                }
                if kind == Kind::Object {
                    self.place = place;
                    self.lexer.enter();
                }
            }
            Next::Word(word) => {
                if kind == Kind::String {
                    self.count = Digits::new();
                    self.keeping = Some(Keeping::Word { word, start: at });
                }
            }
            Next::Count(count) => {
                self.counts[count as usize] = None;
                if kind == Kind::Number {
                    self.count = Digits::new();
                    self.keeping = Some(Keeping::Count { count, start: at });
                }
            }
        }
    }
}

/// A short text, such as a count of cached tokens, collected while it arrives.
#[derive(Clone, Copy, Debug)]
struct Digits {
    bytes: [u8; COUNT_DIGITS_MAX],
    len: usize,
}

/// Number of digits of the largest `u64`. A longer number is not accepted as a count.
const COUNT_DIGITS_MAX: usize = 20;

impl Digits {
    const fn new() -> Self {
        Self {
            bytes: [0; COUNT_DIGITS_MAX],
            len: 0,
        }
    }

    /// Appends `text`. If that exceeds the capacity, `len` becomes larger than the length of
    /// `bytes`, and [`Digits::integer`] returns `None`.
    fn push(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
            }
            self.len = (self.len + 1).min(COUNT_DIGITS_MAX + 1);
        }
    }

    /// Returns the text, or nothing if it exceeds the capacity.
    fn text(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn integer(&self) -> Option<u64> {
        integer(self.bytes.get(..self.len)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(kept_bytes_max: usize) -> PrefillResponse {
        PrefillResponse::new(kept_bytes_max, &Budget::new(u64::MAX))
    }

    fn handoff(text: &str) -> Result<Handoff, JsonError> {
        let mut response = reader(4096);
        response.feed(text.as_bytes())?;
        response.finish()
    }

    #[test]
    fn every_object_is_kept_as_received() {
        for object in [
            r#"{ "do_remote_prefill" : true }"#,
            r#"{"do_remote_prefill":false,"unknown":{"deep":[1.5e3]}}"#,
            // TPU
            r#"{"uuid":7,"remote_block_ids":[1],"remote_host":["a","b"],"remote_port":["1","2"]}"#,
            r#"{"remote_port":"5600","tp_size":1.0,"remote_engine_id":null}"#,
        ] {
            let text = format!(r#"{{"choices":[],"kv_transfer_params": {object} ,"x":1}}"#);
            let params = handoff(&text).unwrap().params;
            assert_eq!(params, Params::Object(Kept::unlimited(object)));
        }
    }

    #[test]
    fn choices_with_routed_experts_are_kept_for_every_cut() {
        let with = r#"[{"index":0,"routed_experts" : "AAAA","x":[{}]}]"#;
        let without = r#"[{"index":0,"message":{"content":"no routed_experts"}}]"#;
        for (choices, want) in [
            (with, Some(with)),
            (without, None),
            ("[]", None),
            ("null", None),
            (r#"{"routed_experts":1}"#, None),
        ] {
            let text = format!(r#"{{"a":{{}},"choices": {choices} ,"usage":{{}}}}"#);
            for size in 1..=text.len() {
                let mut scan = reader(1024);
                for piece in text.as_bytes().chunks(size) {
                    scan.feed(piece).unwrap();
                }
                let kept = scan.finish().unwrap().choices;
                let want = want.map_or(Choices::Plain, |want| {
                    Choices::Experts(Kept::unlimited(want))
                });
                assert_eq!(kept, want, "{text} in {size}");
            }
        }
        let repeated = format!(r#"{{"choices":{with},"choices":[]}}"#);
        assert_eq!(handoff(&repeated).unwrap().choices, Choices::Plain);
        let text = format!(r#"{{"choices":{with},"kv_transfer_params":{{"a":1}}}}"#);
        for size in 1..=text.len() {
            let mut small = reader(with.len() - 1);
            for piece in text.as_bytes().chunks(size) {
                small.feed(piece).unwrap();
            }
            let found = small.finish().unwrap();
            assert_eq!(found.choices, Choices::TooLarge, "{size}");
            assert_eq!(found.params, Params::Object(Kept::unlimited(br#"{"a":1}"#)));
        }
        let mut small = reader(8);
        let text = r#"{"kv_transfer_params":{"a":12345}}"#;
        assert_eq!(
            small.feed(text.as_bytes()).map_err(|error| error.reason),
            Err(JsonReason::KeptTooLarge)
        );
    }

    #[test]
    fn an_object_without_members_counts_as_null() {
        for object in ["{}", "{ \n}"] {
            let text = format!(r#"{{"kv_transfer_params":{object}}}"#);
            assert_eq!(handoff(&text).unwrap().params, Params::Null);
        }
    }

    #[test]
    fn an_object_with_an_error_inside_is_malformed() {
        for (rest, complaint) in [
            (r#""x":01"#, "expected a comma or a closing bracket"),
            (r#""x":[1,]"#, "expected a value"),
            (r#""x":"\x""#, "not a valid escape sequence"),
        ] {
            let text = format!(r#"{{"kv_transfer_params":{{{rest}}}}}"#);
            let params = handoff(&text).unwrap().params;
            assert_eq!(params, Params::Malformed(complaint), "{rest}");
        }
    }

    #[test]
    fn the_form_of_the_block_ids_is_determined() {
        for (value, want) in [
            ("null", Blocks::Other),
            ("[]", Blocks::Other),
            ("7", Blocks::Other),
            (r#""1""#, Blocks::Other),
            (r#"["a\"]","b"]"#, Blocks::Other),
            (r#"[{"a":[1]}]"#, Blocks::Other),
            ("[[]]", Blocks::Nested),
            ("[ [1, 2],[3] ]", Blocks::Nested),
            (r#"[["a"],[]]"#, Blocks::Nested),
            ("[[[2]]]", Blocks::Nested),
            ("[1,2]", Blocks::Flat),
            ("[-1]", Blocks::Flat),
            ("[1,[2]]", Blocks::Flat),
            ("[[2],1]", Blocks::Flat),
        ] {
            let text = format!(r#"{{"kv_transfer_params":{{"remote_block_ids":{value}}}}}"#);
            assert_eq!(handoff(&text).unwrap().blocks, want, "{value}");
        }
        let twice =
            r#"{"kv_transfer_params":{"remote_block_ids":[1],"r\u0065mote_block_ids":[[1]]}}"#;
        assert_eq!(handoff(twice).unwrap().blocks, Blocks::Nested);
    }

    #[test]
    fn params_that_are_absent_null_or_not_an_object() {
        let no_object = || Params::Malformed("kv_transfer_params is not an object");
        let cases = [
            ("{}", Params::Absent),
            (r#"{"kv_transfer_params":null}"#, Params::Null),
            (r#"{"kv_transfer_params":[]}"#, no_object()),
            (r#"{"kv_transfer_params":true}"#, no_object()),
            (
                r#"{"kv_transfer_params":{"a":1},"kv_transfer_params":null}"#,
                Params::Null,
            ),
            (
                r#"{"x":{"kv_transfer_params":{"do_remote_prefill":true}}}"#,
                Params::Absent,
            ),
        ];
        for (text, want) in cases {
            assert_eq!(handoff(text).unwrap().params, want, "{text}");
        }
    }

    #[test]
    fn the_last_of_repeated_params_is_kept() {
        let last = r#"{"do_remote_prefill":true,"n":2}"#;
        let text = format!(
            r#"{{"kv_transfer_params":{{"do_remote_prefill":true,"n":1}},"kv_transfer_params":{last}}}"#
        );
        let params = handoff(&text).unwrap().params;
        assert_eq!(params, Params::Object(Kept::unlimited(last)));
    }

    #[test]
    fn params_with_invalid_utf8_are_malformed() {
        let mut response = reader(4096);
        response
            .feed(b"{\"kv_transfer_params\":{\"do_remote_prefill\":true,\"x\":\"\xff\"}}")
            .unwrap();
        assert_eq!(
            response.finish().unwrap().params,
            Params::Malformed("not valid UTF-8")
        );
    }

    #[test]
    fn counts() {
        let cases = [
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":16}}}"#,
                Some(16),
            ),
            (
                r#"{"usage":{"input_tokens_details":{"cached_tokens":16}}}"#,
                Some(16),
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":18446744073709551615}}}"#,
                Some(u64::MAX),
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":18446744073709551616}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":100000000000000000000000}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":-1}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1.0}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":"1"}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1,"cached_tokens":null}}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1}},"usage":{}}"#,
                None,
            ),
            (
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1},"prompt_tokens_details":0}}"#,
                None,
            ),
            (
                r#"{"choices":{"usage":{"prompt_tokens_details":{"cached_tokens":1}}}}"#,
                None,
            ),
            (r#"{"usage":{"cached_tokens":1}}"#, None),
        ];
        for (text, want) in cases {
            assert_eq!(handoff(text).unwrap().cached_tokens, want, "{text}");
        }
        let text = r#"{"kv_transfer_params":{"do_remote_prefill":true,"remote_prefill_cached_tokens":416}}"#;
        assert_eq!(
            handoff(text).unwrap().remote_prefill_cached_tokens,
            Some(416)
        );
    }

    #[test]
    fn what_is_kept_is_counted_and_returned() {
        let text = r#"{"kv_transfer_params":{"a":1},"choices":[{"routed_experts":"AAAA"}]}"#;
        let budget = Budget::new(2000);
        let mut response = PrefillResponse::new(4096, &budget);
        for piece in text.as_bytes().chunks(7) {
            response.feed(piece).unwrap();
        }
        let found = response.finish().unwrap();
        assert!(budget.used() >= 50, "both are kept");
        drop(found);
        assert_eq!(budget.used(), 0);
        let long = format!(r#"{{"kv_transfer_params":{{"a":"{}"}}}}"#, "x".repeat(3000));
        let mut response = PrefillResponse::new(4096, &budget);
        let fed = long
            .as_bytes()
            .chunks(100)
            .try_for_each(|piece| response.feed(piece));
        assert_eq!(fed.unwrap_err().reason, JsonReason::BudgetSpent);
        drop(response);
        assert_eq!(budget.used(), 0);
        // Choices are not needed if they have no experts.
        let long = "x".repeat(3000);
        let long = format!(r#"{{"choices":["{long}"],"kv_transfer_params":{{"a":1}}}}"#);
        let mut response = PrefillResponse::new(4096, &budget);
        for piece in long.as_bytes().chunks(100) {
            response.feed(piece).unwrap();
        }
        let found = response.finish().unwrap();
        assert_eq!(found.choices, Choices::TooLarge);
        assert_eq!(found.params, Params::Object(Kept::unlimited(r#"{"a":1}"#)));
    }

    #[test]
    fn params_beyond_the_limit_are_refused() {
        let object = r#"{"do_remote_prefill":true}"#;
        let text = format!(r#"{{"kv_transfer_params":{object}}}"#);
        for size in [1, 7, 100] {
            for (max, fits) in [(object.len(), true), (object.len() - 1, false), (0, false)] {
                let mut response = reader(max);
                let fed = text
                    .as_bytes()
                    .chunks(size)
                    .try_for_each(|piece| response.feed(piece));
                let want = JsonError {
                    offset: 22,
                    reason: JsonReason::KeptTooLarge,
                };
                assert_eq!(fed, if fits { Ok(()) } else { Err(want) }, "{max}");
            }
        }
    }
}
