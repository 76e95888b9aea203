//! The encoder stage: the images, audio and video of a request are first sent to encoders
//! (`docs/pd-sidecar.md#encoders`).
//!
//! Each item is sent as a separate chat completion. The encoders' output is passed on through a
//! store, or through the `ec_transfer_params` of their responses, which every later leg carries.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;

use super::edits::Caps;
use super::leg::{Leg, Role, Take};
use super::options::EcConnector;
use super::request::{self, PdRequest};
use crate::api::Api;
use crate::budget::{Budget, BudgetSpent, Kept};
use crate::json::{
    EditError, JsonError, Level, Splices, elements, inner, member, members, string_is, validate,
};
use crate::limits::ENCODED_MEMBERS_MAX;
use crate::span::Span;

/// Maximum number of items (images, audio and video parts) in one request. Engines allow far fewer
/// per prompt.
pub const ITEMS_MAX: usize = 256;

/// The kind of an item. Items of the same kind and source are encoded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Image,
    Audio,
    Video,
}

/// Types of content parts that are sent to encoders, each with the member that contains the item.
/// vLLM takes a part without `type` for the first of them whose member it has.
const TYPES: [(&str, &str, Kind); 5] = [
    ("image_url", "image_url", Kind::Image),
    ("audio_url", "audio_url", Kind::Audio),
    ("input_audio", "input_audio", Kind::Audio),
    ("video_url", "video_url", Kind::Video),
    (INPUT_IMAGE, "image_url", Kind::Image),
];

/// The type of an image in the responses API.
const INPUT_IMAGE: &str = "input_image";

/// Members that the request to an encoder has in common with one of another API, whose other
/// members a chat completion does not have or has in another shape.
const COMMON: [&str; 6] = [
    "model",
    "cache_salt",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "priority",
];

/// A content part that is sent to an encoder, as a part of a chat completion: a part of the
/// request's body between two texts.
#[derive(Debug)]
pub struct Item {
    begin: Vec<u8>,
    source: Span,
    end: Vec<u8>,
}

/// The reason why the items of a request cannot be sent to encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ItemsError {
    /// The conversation is not valid JSON.
    Json(JsonError),
    /// The request has more items than [`ITEMS_MAX`].
    TooMany,
}

/// Returns the items in the conversation of a request, in order. An item with the kind and source
/// of an earlier one is omitted.
///
/// # Errors
/// If there are more than [`ITEMS_MAX`], or if the conversation is invalid.
pub fn items(request: &PdRequest<'_>) -> Result<Vec<Item>, ItemsError> {
    request::check_messages(request.document, request.body).map_err(ItemsError::Json)?;
    let mut found = Found {
        body: request.body,
        items: Vec::new(),
        seen: HashSet::new(),
    };
    match request.api {
        Api::Responses => {
            for turn in elements(input(request)?) {
                // Function calls have their results in `output`.
                for name in ["content", "output"] {
                    for part in elements(member(turn.value, name).unwrap_or_default()) {
                        found.chat_part(part.value)?;
                    }
                }
            }
        }
        Api::Messages => {
            for message in elements(messages(request)) {
                found.message(message.value)?;
            }
        }
        Api::Chat | Api::Completions | Api::Generate | Api::Invocations | Api::Unsplit => {
            for message in elements(messages(request)) {
                for part in elements(member(message.value, "content").unwrap_or_default()) {
                    found.chat_part(part.value)?;
                }
            }
        }
    }
    Ok(found.items)
}

fn messages<'a>(request: &PdRequest<'a>) -> &'a [u8] {
    let messages = request.document.last(Level::Top, "messages");
    messages.map_or(&b""[..], |member| member.value.of(request.body))
}

/// Returns the `input` of the responses API, which no other leg reads.
fn input<'a>(request: &PdRequest<'a>) -> Result<&'a [u8], ItemsError> {
    let Some(input) = member(request.body, "input") else {
        return Ok(b"");
    };
    let start = Span::within(request.body, input).start;
    validate(input).map_err(|error| ItemsError::Json(error.after(start)))?;
    Ok(input)
}

/// The items found so far in the body of a request.
struct Found<'a> {
    body: &'a [u8],
    items: Vec<Item>,
    seen: HashSet<(Kind, &'a [u8])>,
}

impl<'a> Found<'a> {
    /// Adds a part of a chat completion or of the responses API, if it is an item. Parts whose item
    /// is only in the cache of an engine have `null` instead.
    fn chat_part(&mut self, part: &'a [u8]) -> Result<(), ItemsError> {
        let kind = member(part, "type").filter(|kind| *kind != b"null");
        let known = TYPES.iter().find_map(|&(name, key, item)| {
            if !kind.is_none_or(|kind| string_is(kind, name)) {
                return None;
            }
            let place = member(part, key).filter(|place| *place != b"null");
            place.map(|place| (place, item))
        });
        let Some((place, item)) = known else {
            return Ok(());
        };
        // Some clients send the URL itself instead of an object that contains it.
        let url = member(place, "url").or_else(|| inner(place).map(|_| place));
        if url == Some(b"null") {
            return Ok(());
        }
        let is_input = kind.is_some_and(|kind| string_is(kind, INPUT_IMAGE));
        let body = self.body;
        self.add(item, url, || match url.and_then(inner) {
            Some(url) if is_input => image_part(&[], Span::within(body, url), member(part, "uuid")),
            _ => Item {
                begin: Vec::new(),
                source: Span::within(body, part),
                end: Vec::new(),
            },
        })
    }

    /// Adds the items of a message of the messages API, also of tool results.
    fn message(&mut self, message: &'a [u8]) -> Result<(), ItemsError> {
        let is_users = member(message, "role").is_some_and(|role| string_is(role, "user"));
        for block in elements(member(message, "content").unwrap_or_default()) {
            let kind = member(block.value, "type").unwrap_or_default();
            if string_is(kind, "image") {
                self.source(block.value)?;
            } else if string_is(kind, "tool_result") && is_users {
                for result in elements(member(block.value, "content").unwrap_or_default()) {
                    let kind = member(result.value, "type").unwrap_or_default();
                    if string_is(kind, "image") {
                        self.source(result.value)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds an image of the messages API, as the part that vLLM makes of it.
    fn source(&mut self, image: &'a [u8]) -> Result<(), ItemsError> {
        let source = member(image, "source").unwrap_or_default();
        let text = |name, default| {
            let text = member(source, name).and_then(inner);
            text.unwrap_or(default)
        };
        let is_url = member(source, "type").is_some_and(|kind| string_is(kind, "url"));
        let kind = text("media_type", b"image/jpeg");
        let (begin, data): (&[&[u8]], _) = if is_url {
            (&[], text("url", b""))
        } else {
            (&[b"data:", kind, b";base64,"], text("data", b""))
        };
        if data.is_empty() {
            return Ok(());
        }
        let source = Span::within(self.body, data);
        self.add(Kind::Image, Some(data), || image_part(begin, source, None))
    }

    fn add(
        &mut self,
        kind: Kind,
        source: Option<&'a [u8]>,
        part: impl FnOnce() -> Item,
    ) -> Result<(), ItemsError> {
        if source.is_some_and(|source| !self.seen.insert((kind, source))) {
            return Ok(());
        }
        if self.items.len() == ITEMS_MAX {
            return Err(ItemsError::TooMany);
        }
        self.items.push(part());
        Ok(())
    }
}

/// Returns the part of a chat completion for the image at a URL, which consists of `begin`, in
/// pieces of a JSON string, and `rest` in the body, and with the `uuid` of the original part.
fn image_part(begin: &[&[u8]], rest: Span, uuid: Option<&[u8]>) -> Item {
    let start: &[u8] = br#"{"type":"image_url","image_url":{"url":""#;
    let end = match uuid {
        Some(uuid) => [br#""},"uuid":"#, uuid, b"}"].concat(),
        None => br#""}}"#.to_vec(),
    };
    Item {
        begin: [start, &begin.concat()].concat(),
        source: rest,
        end,
    }
}

/// Returns how many bytes the items have in addition to the request's body.
#[must_use]
pub fn text_bytes(items: &[Item]) -> usize {
    let texts = items.iter().map(|item| item.begin.len() + item.end.len());
    texts.sum()
}

/// The requests to encoders for the items of one request.
#[derive(Debug)]
pub struct Stage<'a> {
    request: PdRequest<'a>,
    take: Take,
    /// The start of the request's body, with the members that chat completions have in common with
    /// a request of another API. `None` if the request is a chat completion.
    common: Option<Rc<Kept>>,
}

impl<'a> Stage<'a> {
    /// Creates the stage. Reads the whole body of a request of another API, once for all items.
    ///
    /// # Errors
    /// The budget does not allow what is kept of it.
    pub fn new(
        request: &PdRequest<'a>,
        ec: EcConnector,
        budget: &Arc<Budget>,
    ) -> Result<Self, BudgetSpent> {
        let is_other = matches!(request.api, Api::Responses | Api::Messages);
        let common = is_other.then(|| common_members(request.body, budget));
        Ok(Self {
            request: *request,
            take: match ec {
                EcConnector::Example => Take::Nothing,
                EcConnector::Nixl => Take::Whole,
            },
            common: common.transpose()?.map(Rc::new),
        })
    }

    /// Returns the leg that sends one item to an encoder.
    ///
    /// # Errors
    /// If the body needs more than `JSON_EDITS_MAX` edits.
    pub fn leg(&self, item: &Item) -> Result<Leg, EditError> {
        let [begin, end]: [&[u8]; 2] = [br#"[{"role":"user","content":["#, b"]}]"];
        let (begin, end) = ([begin, &item.begin].concat(), [&item.end, end].concat());
        if let Some(common) = &self.common {
            let after = [&end, &br#","max_tokens":1,"stream":false}"#[..]].concat();
            let texts: [&[u8]; 2] = [&begin, &after];
            return Ok(Leg {
                role: Role::Encode,
                body: Splices::around(common, texts, item.source, self.request.body.len()),
                take: self.take,
                rank: None,
                request_id: None,
            });
        }
        let request = PdRequest {
            api: Api::Chat,
            ..self.request
        };
        let mut edits = request.edits();
        edits.set_around("messages", &begin, item.source, &end);
        edits.cap(request.api, Caps::Sent);
        edits.whole_response();
        request.leg(Role::Encode, &edits, self.take)
    }
}

/// Returns the start of an object with the members of [`COMMON`] in `body`, up to the value of
/// `messages`.
fn common_members(body: &[u8], budget: &Arc<Budget>) -> Result<Kept, BudgetSpent> {
    let mut found = Kept::new(budget);
    found.append(b"{")?;
    for item in members(body) {
        let is_common = COMMON.iter().any(|name| item.is(name));
        if is_common && validate(item.value).is_ok() {
            for part in [item.key, b":", item.value, b","] {
                found.append(part)?;
            }
        }
    }
    found.append(br#""messages":"#)?;
    Ok(found)
}

/// The encoders' `ec_transfer_params`, merged member by member. A later member replaces an earlier
/// one of the same name.
#[derive(Debug, Default)]
pub struct Merge<'a> {
    /// The members in the order of their first occurrence: name, with quotes, and value.
    members: Vec<(&'a [u8], &'a [u8])>,
    /// The index of each name in `members`.
    by_name: HashMap<&'a [u8], usize>,
}

/// The encoders have returned more than [`ENCODED_MEMBERS_MAX`] members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyMembers;

impl<'a> Merge<'a> {
    /// Adds the parameters of one encoder's response, which must be valid JSON. Returns `false` if
    /// it has no `ec_transfer_params`, or if they are not an object with at least one member.
    ///
    /// # Errors
    /// There are more than [`ENCODED_MEMBERS_MAX`] members.
    pub fn take(&mut self, response: &'a [u8]) -> Result<bool, TooManyMembers> {
        let params = member(response, "ec_transfer_params").unwrap_or_default();
        let mut has_any = false;
        for item in members(params) {
            has_any = true;
            match self.by_name.entry(item.key) {
                Entry::Occupied(known) => self.members[*known.get()].1 = item.value,
                Entry::Vacant(new) if self.members.len() < ENCODED_MEMBERS_MAX => {
                    new.insert(self.members.len());
                    self.members.push((item.key, item.value));
                }
                Entry::Vacant(_) => return Err(TooManyMembers),
            }
        }
        Ok(has_any)
    }

    /// Returns the merged object, or `None` if no response had any parameters.
    ///
    /// # Errors
    /// The budget does not allow it.
    pub fn finish(self, budget: &Arc<Budget>) -> Result<Option<Kept>, BudgetSpent> {
        if self.members.is_empty() {
            return Ok(None);
        }
        let mut object = Kept::new(budget);
        // A comma or brace, and a colon.
        let bytes = |(key, value): &(&[u8], &[u8])| key.len() + value.len() + 2;
        object.reserve_exact(self.members.iter().map(bytes).sum::<usize>() + 1)?;
        for (index, (key, value)) in self.members.iter().enumerate() {
            let start: &[u8] = if index > 0 { b"," } else { b"{" };
            for part in [start, key, b":", value] {
                object.append(part)?;
            }
        }
        object.append(b"}")?;
        Ok(Some(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::testing::{Subject, apply};
    use serde_json::json;

    fn items_of(messages: &str) -> Result<usize, ItemsError> {
        let body = format!(r#"{{"messages":{messages}}}"#);
        items(&Subject::new(Api::Chat, &body).request()).map(|items| items.len())
    }

    fn parts_of(api: Api, body: &str) -> Vec<serde_json::Value> {
        let subject = Subject::new(api, body);
        let items = items(&subject.request()).unwrap();
        items.iter().map(|item| part_of(item, body)).collect()
    }

    fn part_of(item: &Item, body: &str) -> serde_json::Value {
        let source = item.source.of(body.as_bytes());
        serde_json::from_slice(&[&item.begin, source, &item.end].concat()).unwrap()
    }

    #[test]
    fn c1_c3_items_are_counted_and_repeated_urls_omitted() {
        let image = r#"{"type":"image_url","image_url":{"url":"http://img/1"}}"#;
        let other = r#"{"type":"image_url","image_url":{"url":"http://img/2"}}"#;
        let plain = r#"{"type":"image_url","image_url":"http://img/3"}"#;
        let video = r#"{"type":"video_url","video_url":{"url":"http://img/1"}}"#;
        let audio = r#"{"type":"input_audio","input_audio":{"data":"QQ==","format":"wav"}}"#;
        let text = r#"{"type":"text","text":"image_url"}"#;
        let escaped = r#"{"ty\u0070e":"image\u005furl","image_url":{"url":"http://img/9"}}"#;
        let untyped = r#"{"image_url":{"url":"http://img/1"}}"#;
        let untyped_video = r#"{"type":null,"video_url":"http://vid/1"}"#;
        let input = r#"{"type":"input_image","image_url":"http://img/1"}"#;
        let cached = r#"{"type":"image_url","image_url":null,"uuid":"u"}"#;
        let cases: [(&[&str], usize); 15] = [
            (&[r#"{"image_url":{"url":null},"uuid":"u"}"#], 0),
            (&[text], 0),
            (&[untyped], 1),
            (&[untyped, image, input], 1),
            (&[untyped_video, input, other], 3),
            (&[cached, r#"{"uuid":"u","image_url":null}"#], 0),
            (
                &[r#"{"type":"text","image_url":{"url":"http://img/1"}}"#],
                0,
            ),
            (&[image], 1),
            (&[image, text, other], 2),
            (&[image, image], 1),
            (&[plain, plain], 1),
            (&[video, video, image], 2),
            (&[audio, audio], 2),
            (&[escaped], 1),
            (&[r#"{"type":7}"#, "null", "[]"], 0),
        ];
        for (parts, want) in cases {
            let parts = parts.join(",");
            let one = format!(r#"[{{"role":"user","content":[{parts}]}}]"#);
            assert_eq!(items_of(&one), Ok(want), "{one}");
        }
        let two = format!(
            r#"[{{"content":"plain"}},{{"content":[{image}]}},{{"content":[{image},{audio}]}}]"#
        );
        assert_eq!(items_of(&two), Ok(2));
        assert_eq!(items_of(r#""no list""#), Ok(0));
        let many = vec![audio; ITEMS_MAX + 1].join(",");
        let many = format!(r#"[{{"content":[{many}]}}]"#);
        assert_eq!(items_of(&many), Err(ItemsError::TooMany));
    }

    #[test]
    fn items_of_the_responses_api_are_in_messages_and_in_results_of_tools() {
        let image = r#"{"type":"input_image","detail":"low","image_url":"http://img/1"}"#;
        let other = r#"{"type":"input_image","image_url":"data:image/png;base64,AA==","uuid":"u"}"#;
        let file = r#"{"type":"input_image","file_id":"f"}"#;
        let body = format!(
            r#"{{"input":"old","inp\u0075t":[{{"role":"user","content":[{{"type":"input_text","text":"x"}},{image},{file}]}},{{"role":"user","content":"text"}},{{"type":"function_call_output","call_id":"c","output":[{other},{image}]}},{{"type":"function_call_output","call_id":"c","output":"text"}}]}}"#
        );
        let want = [
            json!({"type": "image_url", "image_url": {"url": "http://img/1"}}),
            json!({"type": "image_url", "uuid": "u",
                "image_url": {"url": "data:image/png;base64,AA=="}}),
        ];
        assert_eq!(parts_of(Api::Responses, &body), want);
        assert!(parts_of(Api::Responses, r#"{"input":"text"}"#).is_empty());
        assert!(parts_of(Api::Responses, "{}").is_empty());
        let broken = Subject::new(Api::Responses, r#"{"x":1,"input":["\x"]}"#);
        let error = items(&broken.request()).unwrap_err();
        assert!(
            matches!(error, ItemsError::Json(error) if error.offset == 18),
            "{error:?}"
        );
    }

    #[test]
    fn images_of_the_messages_api_are_those_that_the_engine_makes_of_them() {
        let data = r#"{"type":"image","source":{"type":"base64","media_type":"image/png","data":"QQ=\u003d"}}"#;
        let again = r#"{"type":"image","source":{"data":"QQ=\u003d"}}"#;
        let untyped = r#"{"type":"image","source":{"data":"Qg=="}}"#;
        let url = r#"{"type":"image","source":{"type":"url","url":"http://img/1"}}"#;
        let nothing = r#"{"type":"image","source":{"type":"file","file_id":"f"}}"#;
        let text = r#"{"type":"text","text":"x"}"#;
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":[{data},{text},{nothing},{again}]}},{{"role":"assistant","content":[{{"type":"tool_result","content":[{url}]}}]}},{{"role":"user","content":"text"}},{{"role":"user","content":[{{"type":"tool_result","tool_use_id":"t","content":[{text},{untyped},{url}]}},{{"type":"tool_result","content":"text"}}]}}]}}"#
        );
        let want: Vec<_> = [
            "data:image/png;base64,QQ==",
            "data:image/jpeg;base64,Qg==",
            "http://img/1",
        ]
        .iter()
        .map(|url| json!({"type": "image_url", "image_url": {"url": url}}))
        .collect();
        assert_eq!(parts_of(Api::Messages, &body), want);
    }

    #[test]
    fn an_encode_request_of_another_api_is_a_chat_completion() {
        for (api, conversation) in [
            (
                Api::Responses,
                r#""input":[{"role":"user","content":[{"type":"input_image","image_url":"u"}]}],"tools":[{"type":"function","name":"f"}],"max_output_tokens":9"#,
            ),
            (
                Api::Messages,
                r#""messages":[{"role":"user","content":[{"type":"image","source":{"type":"url","url":"u"}}]}],"system":"s","max_tokens":9"#,
            ),
        ] {
            let body = format!(r#"{{"stream":true,"model":"vl","cache_salt":"s",{conversation}}}"#);
            let subject = Subject::new(api, &body);
            let request = subject.request();
            let items = items(&request).unwrap();
            let budget = Budget::new(1 << 20);
            let stage = Stage::new(&request, EcConnector::Example, &budget).unwrap();
            let leg = stage.leg(&items[0]).unwrap();
            let item = part_of(&items[0], &body);
            let want = json!({"model": "vl", "cache_salt": "s", "max_tokens": 1, "stream": false,
                "messages": [{"role": "user", "content": [item]}]});
            assert_eq!(apply(&leg, &body), want);
        }
    }

    #[test]
    fn c2_an_encode_request_has_one_item_and_a_token_limit_of_one() {
        let body = r#"{"model":"vl","max_tokens":8,"stream":true,"stream_options":{},"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://img/1"}},{"type":"text","text":"what?"}]}]}"#;
        let subject = Subject::new(Api::Chat, body);
        let request = subject.request();
        let items = items(&request).unwrap();
        let budget = Budget::new(0);
        let stage = Stage::new(&request, EcConnector::Nixl, &budget).unwrap();
        let leg = stage.leg(&items[0]).unwrap();
        let want = json!({"model": "vl", "max_tokens": 1, "stream": false, "messages": [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://img/1"}}]}]});
        assert_eq!(apply(&leg, body), want);
    }

    #[test]
    fn c4_params_are_merged_and_the_later_one_is_kept() {
        let budget = Budget::new(1 << 20);
        let response = |params: &str| format!(r#"{{"id":"x","ec_transfer_params":{params}}}"#);
        let first = response(r#"{"h1":{"peer_port":1},"h2":[1.0]}"#);
        let nothing = ["null", "{}", "[]", "7", "\"x\""].map(response);
        let last = response(r#"{"h1":12345678901234567890}"#);
        let mut merge = Merge::default();
        assert_eq!(merge.take(first.as_bytes()), Ok(true));
        for nothing in &nothing {
            assert_eq!(merge.take(nothing.as_bytes()), Ok(false), "{nothing}");
        }
        assert_eq!(merge.take(b"{}"), Ok(false));
        assert_eq!(merge.take(last.as_bytes()), Ok(true));
        let merged = merge.finish(&budget).unwrap().unwrap();
        assert_eq!(&*merged, br#"{"h1":12345678901234567890,"h2":[1.0]}"#);
        assert_eq!(budget.used(), merged.len() as u64, "no room is left over");
        assert_eq!(Merge::default().finish(&budget), Ok(None));
    }

    #[test]
    fn merged_members_are_limited() {
        let of = |count: usize, value: &str| {
            let member = |nth| format!(r#""m{nth}":{value}"#);
            let members: Vec<_> = (0..count).map(member).collect();
            format!(r#"{{"ec_transfer_params":{{{}}}}}"#, members.join(","))
        };
        let (all, more) = (
            of(ENCODED_MEMBERS_MAX, "1"),
            of(ENCODED_MEMBERS_MAX + 1, "1"),
        );
        let mut merge = Merge::default();
        assert_eq!(merge.take(all.as_bytes()), Ok(true));
        assert_eq!(merge.take(all.as_bytes()), Ok(true), "the same names");
        assert_eq!(
            merge.take(br#"{"ec_transfer_params":{"x":1}}"#),
            Err(TooManyMembers)
        );
        assert_eq!(Merge::default().take(more.as_bytes()), Err(TooManyMembers));
        let small = Budget::new(10);
        let mut merge = Merge::default();
        assert_eq!(merge.take(all.as_bytes()), Ok(true));
        assert_eq!(merge.finish(&small), Err(BudgetSpent));
    }
}
