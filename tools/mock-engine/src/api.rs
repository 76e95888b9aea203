//! Reads an inference request: its API, limits and prompt, checked the way vLLM checks them.
//!
//! Only the members whose effect a proxy can observe are checked. Sampling parameters are not read.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::config::EngineConfig;
use crate::continued::continued;
use crate::form::{Form, form};
use crate::json::Fields;
use crate::logprobs::candidates;
use crate::token::prompt_tokens;

/// The inference API that a request uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completions,
    Responses,
    Messages,
    Generate,
}

/// The inference route that a request path belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Api(Kind),
    /// `/invocations`: the members of the body determine the API.
    ByShape,
}

/// Returns the inference route that `path` belongs to, or `None` for any other path.
pub(crate) fn route(path: &str) -> Option<Route> {
    Some(match path {
        "/v1/chat/completions" => Route::Api(Kind::Chat),
        "/v1/completions" => Route::Api(Kind::Completions),
        "/v1/responses" => Route::Api(Kind::Responses),
        "/v1/messages" => Route::Api(Kind::Messages),
        "/inference/v1/generate" => Route::Api(Kind::Generate),
        "/invocations" => Route::ByShape,
        _ => return None,
    })
}

impl Kind {
    /// Returns the name of the request member that contains the prompt.
    fn prompt(self) -> &'static str {
        match self {
            Self::Chat | Self::Messages => "messages",
            Self::Completions => "prompt",
            Self::Responses => "input",
            Self::Generate => "token_ids",
        }
    }
}

/// An error response in vLLM's format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) param: Option<&'static str>,
    pub(crate) message: String,
    /// Whether the body has the format of the messages API.
    pub(crate) anthropic: bool,
}

impl Refusal {
    /// Returns a 400 response whose error names the member `param`.
    pub(crate) fn bad(param: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: 400,
            param: Some(param),
            message: message.into(),
            anthropic: false,
        }
    }

    /// Returns a response that names no member.
    pub(crate) fn plain(status: u16, message: impl Into<String>) -> Self {
        Self {
            status,
            param: None,
            message: message.into(),
            anthropic: false,
        }
    }

    /// Returns a 500 response that names no member.
    pub(crate) fn internal(message: &str) -> Self {
        Self::plain(500, message)
    }

    /// Returns the JSON body of the error response.
    pub(crate) fn body(&self) -> String {
        let kind = match self.status {
            400 | 413 => "BadRequestError",
            401 => "AuthenticationError",
            404 => "NotFoundError",
            503 => "ServiceUnavailableError",
            _ => "InternalServerError",
        };
        if self.anthropic {
            let error = serde_json::json!({"type": kind, "message": self.message});
            return serde_json::json!({"type": "error", "error": error}).to_string();
        }
        serde_json::json!({"error": {
            "message": self.message, "type": kind, "param": self.param, "code": self.status,
        }})
        .to_string()
    }
}

/// The parts of an inference request that determine its response. All of them have been checked.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) kind: Kind,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    /// Number of tokens to generate per choice.
    pub(crate) tokens: u32,
    /// Index, from 0, of the first token to generate. Greater than 0 if the request continues an
    /// earlier response and contains that many tokens of it.
    pub(crate) first: u32,
    /// Whether `tokens` equals the token limit of the request, so that the finish reason is
    /// `length`.
    pub(crate) limited: bool,
    pub(crate) choices: u32,
    /// The limit on `tokens` in the request, if it has one.
    pub(crate) limit: Option<u32>,
    pub(crate) form: Form,
    /// Number of candidates per token in `logprobs`; `None`: no log-probabilities.
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_tokens: u64,
    pub(crate) prompt_sha256: String,
}

/// Formats bytes as lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Returns the SHA-256 (hex) of the prompt's JSON bytes as received and the number of its
/// tokens, or `None` if the request has no prompt.
pub(crate) fn prompt_of(route: Route, fields: &Fields<'_>) -> Option<(String, u64)> {
    let kind = kind_of(route, fields)?;
    let raw = fields.some(kind.prompt())?;
    let sha = hex(&Sha256::digest(raw.as_bytes()));
    let system = match kind {
        Kind::Messages => fields.some("system").map_or(0, prompt_tokens),
        Kind::Chat | Kind::Completions | Kind::Responses | Kind::Generate => 0,
    };
    Some((sha, system + prompt_tokens(raw)))
}

/// Returns the API of a request, determined by its path or, for `/invocations`, by its members.
/// Returns `None` for a request to `/invocations` without `messages` and `prompt`.
pub(crate) fn kind_of(route: Route, fields: &Fields<'_>) -> Option<Kind> {
    match route {
        Route::Api(kind) => Some(kind),
        Route::ByShape if fields.has("messages") => Some(Kind::Chat),
        Route::ByShape if fields.has("prompt") => Some(Kind::Completions),
        Route::ByShape => None,
    }
}

/// Checks the members of an inference request. `prompt` is the result of [`prompt_of`]. Returns the
/// error response to send if the request is invalid.
pub(crate) fn check(
    route: Route,
    fields: &Fields<'_>,
    prompt: Option<(String, u64)>,
    config: &EngineConfig,
) -> Result<Ask, Refusal> {
    let Some(kind) = kind_of(route, fields) else {
        return Err(Refusal::bad("body", "neither messages nor prompt"));
    };
    let Some((prompt_sha256, prompt_tokens)) = prompt else {
        return Err(Refusal::bad(kind.prompt(), "Field required"));
    };
    check_model(kind, fields, config)?;
    let stream = boolean(fields, "stream")?;
    let options = match fields.some("stream_options") {
        Some(_) if !stream => {
            let message = "Stream options can only be defined when `stream=True`.";
            return Err(Refusal::bad("stream_options", message));
        }
        Some(raw) => Fields::parse(raw.as_bytes())
            .map_err(|_| Refusal::bad("stream_options", "not an object"))?,
        None => Fields::default(),
    };
    let sampling = match (kind, fields.some("sampling_params")) {
        (Kind::Generate, Some(raw)) => Fields::parse(raw.as_bytes())
            .map_err(|_| Refusal::bad("sampling_params", "not an object"))?,
        (Kind::Generate, None) => return Err(Refusal::bad("sampling_params", "Field required")),
        _ => Fields::default(),
    };
    let limits = if kind == Kind::Generate {
        &sampling
    } else {
        fields
    };
    let continuation = match kind {
        Kind::Chat => continued(fields)?,
        Kind::Completions | Kind::Responses | Kind::Messages | Kind::Generate => None,
    };
    let (first, prompt_sha256) = match continuation {
        Some(continuation) => (continuation.first, continuation.prompt_sha256),
        None => (0, prompt_sha256),
    };
    let (words, at_limit, limit) = length(kind, limits, config, first)?;
    let form = match form(kind, fields, words) {
        // Test suites send tool choices that vLLM refuses.
        Err(_) if !config.look_alike => Form::Words,
        form => form?,
    };
    let pieces = form.pieces("");
    let (tokens, limited) = match &pieces {
        None => (words, at_limit),
        Some(pieces) => cut(pieces.len() as u32, limit),
    };
    let choices = choices(kind, fields, limits)?;
    let logprobs = candidates(kind, fields)?;
    if !stream {
        let bytes = pieces.map_or(0, |pieces| pieces.iter().map(String::len).sum());
        // A schema's constants can be long tokens.
        check_size(u64::from(tokens).max(bytes as u64 / 8), choices, logprobs)?;
    }
    Ok(Ask {
        kind,
        stream,
        include_usage: options.is_true("include_usage"),
        continuous_usage: options.is_true("include_usage")
            && options.is_true("continuous_usage_stats"),
        tokens,
        first,
        limited,
        choices,
        limit,
        form,
        logprobs,
        prompt_tokens,
        prompt_sha256,
    })
}

/// Returns the number of tokens of a text that has `all` tokens under the limit of the request, and
/// whether the limit cuts it.
fn cut(all: u32, limit: Option<u32>) -> (u32, bool) {
    let tokens = limit.map_or(all, |limit| limit.min(all));
    (tokens, tokens < all)
}

/// Checks the size of a response that is not a stream.
fn check_size(tokens: u64, choices: u32, logprobs: Option<u32>) -> Result<(), Refusal> {
    let parts = 1 + logprobs.map_or(0, |candidates| 4 + 4 * u64::from(candidates));
    if tokens * u64::from(choices) * parts > WHOLE_TOKENS_MAX {
        let message = "too many tokens for a response that is not a stream";
        return Err(Refusal::bad("max_tokens", message));
    }
    Ok(())
}

/// The model in requests of ringside that release KV cache. No engine serves it. If the mock did,
/// it would count the handoff of another prompt.
const UNSERVED: &str = "ringside-releases-kv-cache";

fn check_model(kind: Kind, fields: &Fields<'_>, config: &EngineConfig) -> Result<(), Refusal> {
    let is_unknown =
        |model: &str| model == UNSERVED || (config.check_model && model != config.model);
    match fields.string("model") {
        Some(model) if is_unknown(&model) => Err(Refusal {
            status: 404,
            param: Some("model"),
            message: format!(
                "The model `{model}` does not exist. Valid aliases: {}.",
                config.model
            ),
            anthropic: kind == Kind::Messages,
        }),
        _ => Ok(()),
    }
}

/// Returns the number of tokens to generate per choice, whether it equals the token limit of the
/// request, and this limit. `limits` is the object that contains the limit: `sampling_params` of
/// the generate API, otherwise the request body. `first` is the number of tokens of the response
/// that the request already contains.
fn length(
    kind: Kind,
    limits: &Fields<'_>,
    config: &EngineConfig,
    first: u32,
) -> Result<(u32, bool, Option<u32>), Refusal> {
    let limit = match kind {
        Kind::Chat => match number(limits, "max_completion_tokens", 1)? {
            Some(limit) => Some(limit),
            None => number(limits, "max_tokens", 1)?,
        },
        Kind::Completions => Some(number(limits, "max_tokens", 1)?.unwrap_or(16)),
        Kind::Responses => number(limits, "max_output_tokens", 1)?,
        Kind::Messages => match number(limits, "max_tokens", 1)? {
            Some(limit) => Some(limit),
            None => return Err(Refusal::bad("max_tokens", "Field required")),
        },
        Kind::Generate => number(limits, "max_tokens", 1)?,
    };
    let least = match kind {
        Kind::Chat | Kind::Completions | Kind::Generate => {
            number(limits, "min_tokens", 0)?.unwrap_or(0)
        }
        Kind::Responses | Kind::Messages => 0,
    };
    let most = limit.unwrap_or(u32::MAX);
    if least > most {
        let message =
            format!("min_tokens must be less than or equal to max_tokens={most}, got {least}.");
        return Err(Refusal::bad("min_tokens", message));
    }
    let wanted = match limit {
        Some(limit) if limits.is_true("ignore_eos") => limit,
        _ if first > 0 => config.tokens.saturating_sub(first),
        _ => config.tokens.max(1),
    };
    let tokens = wanted.max(least).min(most);
    Ok((tokens, Some(tokens) == limit, limit))
}

/// Returns the number of choices in the response: `n` for each prompt.
fn choices(kind: Kind, fields: &Fields<'_>, limits: &Fields<'_>) -> Result<u32, Refusal> {
    let n = match kind {
        Kind::Responses | Kind::Messages => 1,
        Kind::Chat | Kind::Completions | Kind::Generate => number(limits, "n", 1)?.unwrap_or(1),
    };
    let prompts = match (kind, fields.some("prompt")) {
        (Kind::Completions, Some(raw)) if raw.starts_with('[') => {
            serde_json::from_str::<Vec<&serde_json::value::RawValue>>(raw)
                .ok()
                .filter(|list| {
                    list.first()
                        .is_some_and(|first| first.get().starts_with(['"', '[']))
                })
                .map_or(1, |list| list.len() as u32)
        }
        _ => 1,
    };
    let total = n.saturating_mul(prompts);
    if total > CHOICES_MAX {
        return Err(Refusal::bad(
            "n",
            format!("n must be at most {CHOICES_MAX}."),
        ));
    }
    Ok(total)
}

/// Maximum number of tokens, over all choices, in a response that is not a stream. Such a response
/// is built in memory. A token with log-probabilities counts several times.
const WHOLE_TOKENS_MAX: u64 = 1 << 22;
/// Maximum number of choices in a response.
const CHOICES_MAX: u32 = 16_384;

fn boolean(fields: &Fields<'_>, name: &'static str) -> Result<bool, Refusal> {
    match fields.some(name) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(Refusal::bad(name, "Input should be a valid boolean")),
    }
}

fn number(fields: &Fields<'_>, name: &'static str, least: u32) -> Result<Option<u32>, Refusal> {
    let Some(raw) = fields.some(name) else {
        return Ok(None);
    };
    match raw.parse::<i64>() {
        Ok(value) => match u32::try_from(value) {
            Ok(value) if value >= least => Ok(Some(value)),
            _ => Err(Refusal::bad(
                name,
                format!("{name} must be at least {least}, got {value}."),
            )),
        },
        Err(_) => Err(Refusal::bad(name, "Input should be a valid integer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(kind: Kind, text: &str) -> Result<Ask, Refusal> {
        let fields = Fields::parse(text.as_bytes()).unwrap();
        let route = Route::Api(kind);
        let prompt = prompt_of(route, &fields);
        check(route, &fields, prompt, &EngineConfig::default())
    }

    #[test]
    fn token_limits_are_read_from_each_apis_members() {
        let cases = [
            (Kind::Chat, r#"{"messages":[]}"#, 32, false),
            (
                Kind::Chat,
                r#"{"messages":[],"max_tokens":2,"max_completion_tokens":5}"#,
                5,
                true,
            ),
            (
                Kind::Chat,
                r#"{"messages":[],"max_tokens":2,"max_completion_tokens":null}"#,
                2,
                true,
            ),
            (Kind::Chat, r#"{"messages":[],"max_tokens":100}"#, 32, false),
            (
                Kind::Chat,
                r#"{"messages":[],"max_tokens":100,"ignore_eos":true}"#,
                100,
                true,
            ),
            (Kind::Chat, r#"{"messages":[],"min_tokens":40}"#, 40, false),
            (Kind::Completions, r#"{"prompt":"a"}"#, 16, true),
            (
                Kind::Responses,
                r#"{"input":"a","max_output_tokens":3,"max_tokens":1}"#,
                3,
                true,
            ),
            (Kind::Messages, r#"{"messages":[],"max_tokens":4}"#, 4, true),
            (
                Kind::Generate,
                r#"{"token_ids":[1],"sampling_params":{"max_tokens":6}}"#,
                6,
                true,
            ),
            (
                Kind::Generate,
                r#"{"token_ids":[1],"sampling_params":{},"max_tokens":1}"#,
                32,
                false,
            ),
        ];
        for (kind, text, tokens, limited) in cases {
            let got = ask(kind, text).unwrap();
            assert_eq!((got.tokens, got.limited), (tokens, limited), "{text}");
        }
    }

    #[test]
    fn refusals_name_the_member() {
        let cases = [
            (Kind::Chat, r#"{}"#, "messages"),
            (
                Kind::Chat,
                r#"{"messages":[],"min_tokens":5,"max_tokens":1}"#,
                "min_tokens",
            ),
            (
                Kind::Chat,
                r#"{"messages":[],"stream_options":{}}"#,
                "stream_options",
            ),
            (
                Kind::Chat,
                r#"{"messages":[],"max_tokens":0}"#,
                "max_tokens",
            ),
            (
                Kind::Chat,
                r#"{"messages":[],"max_tokens":"x"}"#,
                "max_tokens",
            ),
            (Kind::Chat, r#"{"messages":[],"stream":1}"#, "stream"),
            (Kind::Messages, r#"{"messages":[]}"#, "max_tokens"),
            (Kind::Generate, r#"{"token_ids":[1]}"#, "sampling_params"),
        ];
        for (kind, text, param) in cases {
            let got = ask(kind, text).unwrap_err();
            assert_eq!((got.status, got.param), (400, Some(param)), "{text}");
        }
    }

    #[test]
    fn choices_are_n_times_the_number_of_prompts() {
        for (text, want) in [
            (r#"{"prompt":["a","b"],"n":3}"#, 6),
            (r#"{"prompt":[1,2]}"#, 1),
            (r#"{"prompt":[[1],[2]]}"#, 2),
        ] {
            assert_eq!(
                ask(Kind::Completions, text).unwrap().choices,
                want,
                "{text}"
            );
        }
    }

    #[test]
    fn the_prompt_is_hashed_as_received() {
        let fields = Fields::parse(br#"{"messages": [ 1.0 ] }"#).unwrap();
        let (sha, _) = prompt_of(Route::Api(Kind::Chat), &fields).unwrap();
        assert_eq!(sha, hex(&Sha256::digest(b"[ 1.0 ]")));
    }
}
