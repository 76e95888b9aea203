//! The edits that turn the client's body into a leg's body.

use std::rc::Rc;

use crate::api::Api;
use crate::budget::Kept;
use crate::json::{Document, Edit, EditError, Level, Splices};
use crate::limits::SEND_JOINED_BYTES_MAX;
use crate::span::Span;

/// The token limits that a prefill leg sets to 1. The variants differ in the limits that are set
/// even if the client did not send them.
///
/// The names are those of chat completions. The generate API has `max_tokens` and `min_tokens`
/// inside `sampling_params`. The responses API has only `max_output_tokens`, which is always set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caps {
    /// `max_tokens`, `max_completion_tokens` and `min_tokens` are always set, because engines have
    /// defaults for them.
    All,
    /// The limits of [`Caps::All`] and `max_output_tokens` are always set.
    Every,
    /// `max_tokens` and `max_completion_tokens` are always set. `min_tokens` is set only if the
    /// client sent it, because engines refuse a minimum above the maximum.
    Maxima,
    /// `max_tokens` is always set, the other limits only if the client sent them.
    Sent,
    /// The limits of [`Caps::Sent`] and `min_tokens` are always set: an engine keeps no KV cache of
    /// a prompt whose first token ends the text.
    SentAndMinimum,
}

impl Caps {
    /// Returns whether `min_tokens` is set even if the client did not send it.
    const fn set_minimum(self) -> bool {
        matches!(self, Self::All | Self::Every | Self::SentAndMinimum)
    }
}

/// Number of edits for which a leg has room from the start: more than most legs have, and few
/// enough that the C library keeps the memory in its cache of small blocks.
const EDITS_USUAL: usize = 12;

const _: () = assert!(EDITS_USUAL * size_of::<Edit<'_>>() <= 1024);

/// The edits of one leg. A later edit of a member replaces an earlier one.
#[derive(Debug)]
pub(super) struct Edits<'a> {
    document: &'a Document,
    list: Vec<Edit<'a>>,
}

impl<'a> Edits<'a> {
    /// Returns an empty list of edits of the body that `document` describes.
    pub(super) fn of(document: &'a Document) -> Self {
        Self {
            document,
            list: Vec::with_capacity(EDITS_USUAL),
        }
    }

    /// Returns the edited body as splices over the client's.
    pub(super) fn splices(&self) -> Result<Splices, EditError> {
        self.document.edit(&self.list)
    }

    pub(super) fn set(&mut self, level: Level, name: &'static str, value: &'a [u8]) {
        self.push(Edit::Set { level, name, value });
    }

    /// Sets a member of the top level to a value that is shared instead of copied if it is large.
    pub(super) fn set_kept(&mut self, name: &'static str, value: &'a Rc<Kept>) {
        let level = Level::Top;
        if value.len() <= SEND_JOINED_BYTES_MAX {
            self.set(level, name, value);
        } else {
            self.push(Edit::SetKept { level, name, value });
        }
    }

    /// Sets a member of the top level to a part of the body between two texts.
    pub(super) fn set_around(
        &mut self,
        name: &'static str,
        begin: &'a [u8],
        source: Span,
        end: &'a [u8],
    ) {
        self.push(Edit::SetAround {
            level: Level::Top,
            name,
            begin,
            source,
            end,
        });
    }

    pub(super) fn remove(&mut self, level: Level, name: &'static str) {
        self.forget((level, name));
        let mut members = self.document.members().iter();
        // Most bodies have none of the members to remove, and a removal without effect costs as
        // much as any other edit.
        if members.any(|member| member.level == level && member.name == name) {
            self.list.push(Edit::Remove { level, name });
        }
    }

    /// Appends `text` after the last element of the top-level array `name`. The text begins with
    /// the comma that separates the elements.
    pub(super) fn append(&mut self, name: &'static str, text: &'a [u8]) {
        let level = Level::Top;
        self.push(Edit::Append { level, name, text });
    }

    fn push(&mut self, edit: Edit<'a>) {
        self.forget(edit.target());
        self.list.push(edit);
    }

    /// Drops the earlier edit of a member.
    fn forget(&mut self, target: (Level, &'static str)) {
        // There is at most one, and nearly never one.
        let earlier = self.list.iter().position(|edit| edit.target() == target);
        if let Some(earlier) = earlier {
            self.list.remove(earlier);
        }
    }

    /// Sets the token limits of an API to 1. `caps` selects the limits that are set even
    /// if the client did not send them.
    pub(super) fn cap(&mut self, api: Api, caps: Caps) {
        match api {
            Api::Chat | Api::Completions | Api::Messages | Api::Invocations | Api::Unsplit => {
                self.cap_chat(caps);
            }
            Api::Responses => {
                self.set(Level::Top, "max_output_tokens", b"1");
                // The prefill leg's response would be stored, under the client's id.
                self.set(Level::Top, "store", b"false");
            }
            Api::Generate => self.cap_generate(caps),
        }
    }

    fn cap_chat(&mut self, caps: Caps) {
        let document = self.document;
        let sent = |name| document.last(Level::Top, name).is_some();
        self.set(Level::Top, "max_tokens", b"1");
        if !matches!(caps, Caps::Sent | Caps::SentAndMinimum) || sent("max_completion_tokens") {
            self.set(Level::Top, "max_completion_tokens", b"1");
        }
        if caps.set_minimum() || sent("min_tokens") {
            self.set(Level::Top, "min_tokens", b"1");
        }
        if caps == Caps::Every {
            self.set(Level::Top, "max_output_tokens", b"1");
        }
    }

    fn cap_generate(&mut self, caps: Caps) {
        let document = self.document;
        let min_too = caps.set_minimum();
        if !document.has_object(Level::SamplingParams) {
            // `sampling_params` is replaced as a whole, which includes every earlier duplicate.
            // Edits inside one of them would conflict with that.
            self.list.retain(|edit| {
                !matches!(edit.target().0, Level::SamplingParams | Level::ExtraArgs)
            });
            let value: &[u8] = if min_too {
                br#"{"max_tokens":1,"min_tokens":1}"#
            } else {
                br#"{"max_tokens":1}"#
            };
            self.set(Level::Top, "sampling_params", value);
            return;
        }
        self.set(Level::SamplingParams, "max_tokens", b"1");
        if min_too || document.last(Level::SamplingParams, "min_tokens").is_some() {
            self.set(Level::SamplingParams, "min_tokens", b"1");
        }
    }

    /// Disables streaming. `stream_options` is removed, because engines refuse it on a request that
    /// does not stream.
    pub(super) fn whole_response(&mut self) {
        self.set(Level::Top, "stream", b"false");
        self.remove(Level::Top, "stream_options");
    }
}
