//! The APIs other than generation: `/tokenize`, `/detokenize`, `/v1/messages/count_tokens`, and
//! [`crate::pooling`].
//!
//! Formats and errors are those of a vLLM 0.32 server: of a generating one for the first three
//! APIs, of a pooling one for the others.

use serde_json::{Value, json};

use crate::api::Refusal;
use crate::config::EngineConfig;
use crate::exchange::Exchange;
use crate::http::Body;
use crate::json::Fields;
use crate::pooling;
use crate::token::{self, MODEL_TOKENS_MAX};
use crate::wire::Plan;

/// Maximum number of bytes in the body of a request to one of these APIs.
pub(crate) const BODY_BYTES_MAX: usize = 16 << 20;
/// Maximum number of tokens that `/tokenize` returns and `/detokenize` accepts.
const TOKENS_MAX: usize = 1 << 20;

/// An API other than generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extra {
    Tokenize,
    Detokenize,
    CountTokens,
    Embeddings,
    Score,
    Rerank,
}

/// Returns the API that `path` belongs to, or `None`.
pub(crate) fn extra(path: &str, config: &EngineConfig) -> Option<Extra> {
    Some(match path {
        _ if !config.look_alike => return None,
        "/tokenize" => Extra::Tokenize,
        "/detokenize" => Extra::Detokenize,
        "/v1/messages/count_tokens" => Extra::CountTokens,
        "/v1/embeddings" => Extra::Embeddings,
        "/score" | "/v1/score" => Extra::Score,
        "/rerank" | "/v1/rerank" | "/v2/rerank" => Extra::Rerank,
        _ => return None,
    })
}

impl Exchange<'_> {
    /// Returns the response to a request of one of these APIs.
    pub(crate) fn extra(&self, extra: Extra, body: &Body) -> Result<Plan, Refusal> {
        self.check_head(false)?;
        if body.bytes > body.kept.len() as u64 {
            let message = format!("The request body exceeds {BODY_BYTES_MAX} bytes.");
            return Err(Refusal::plain(413, message));
        }
        let fields = Fields::parse(&body.kept)
            .map_err(|error| Refusal::bad("body", format!("JSON decode error: {error}")))?;
        check_model(extra, &fields, &self.shared.config)?;
        match extra {
            Extra::Tokenize => self.tokenize(&fields),
            Extra::Detokenize => self.detokenize(&fields),
            Extra::CountTokens => count_tokens(&fields),
            Extra::Embeddings => pooling::embeddings(self, &fields),
            Extra::Score => pooling::score(self, &fields),
            Extra::Rerank => pooling::rerank(self, &fields),
        }
    }

    fn tokenize(&self, fields: &Fields<'_>) -> Result<Plan, Refusal> {
        let given = fields.some("messages").or_else(|| fields.some("prompt"));
        let given = given.ok_or_else(|| Refusal::bad("prompt", "Field required"))?;
        let (mut ids, mut words) = (Vec::new(), Vec::new());
        token::each_prompt_text(given, &mut |text| {
            for piece in token::pieces(text).take(TOKENS_MAX + 1 - ids.len()) {
                ids.push(self.shared.words.id(piece));
                words.push(piece.to_owned());
            }
        });
        if ids.len() > TOKENS_MAX {
            let message = format!("The prompt has more than {TOKENS_MAX} tokens.");
            return Err(Refusal::bad("prompt", message));
        }
        let words = fields.is_true("return_token_strs").then_some(words);
        let body = json!({
            "count": ids.len(), "max_model_len": MODEL_TOKENS_MAX, "tokens": ids,
            "token_strs": words,
        });
        Ok(Plan::json(200, body.to_string()))
    }

    fn detokenize(&self, fields: &Fields<'_>) -> Result<Plan, Refusal> {
        let given = fields.some("tokens");
        let given = given.ok_or_else(|| Refusal::bad("tokens", "Field required"))?;
        let ids: Vec<u32> = serde_json::from_str(given)
            .map_err(|_| Refusal::bad("tokens", "Input should be a valid list of token ids"))?;
        if ids.len() > TOKENS_MAX {
            let message = format!("There are more than {TOKENS_MAX} tokens.");
            return Err(Refusal::bad("tokens", message));
        }
        let text: String = ids.iter().map(|id| self.shared.words.word(*id)).collect();
        Ok(Plan::json(200, json!({"prompt": text}).to_string()))
    }

    /// Returns a new id for a response, such as `embd-000000000000002a`.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        format!("{prefix}-{:016x}", self.seq)
    }
}

fn count_tokens(fields: &Fields<'_>) -> Result<Plan, Refusal> {
    let messages = fields.some("messages");
    let messages = messages.ok_or_else(|| Refusal::bad("messages", "Field required"))?;
    let system = fields.some("system").map_or(0, token::prompt_tokens);
    let tokens = system + token::prompt_tokens(messages);
    let body = json!({
        "input_tokens": tokens, "context_management": {"original_input_tokens": tokens},
    });
    Ok(Plan::json(200, body.to_string()))
}

/// Checks `model`, which only `count_tokens` requires. The errors differ as those of vLLM do.
fn check_model(extra: Extra, fields: &Fields<'_>, config: &EngineConfig) -> Result<(), Refusal> {
    let model = match fields.some("model").map(serde_json::from_str::<Value>) {
        None if extra == Extra::CountTokens => {
            return Err(Refusal::bad("model", "Field required"));
        }
        None => return Ok(()),
        Some(Ok(Value::String(model))) => model,
        Some(_) => return Err(Refusal::bad("model", "Input should be a valid string")),
    };
    if !config.check_model || model == config.model {
        return Ok(());
    }
    let unknown = format!("The model `{model}` does not exist.");
    Err(match extra {
        Extra::Embeddings | Extra::Score | Extra::Rerank => Refusal::plain(404, unknown),
        Extra::Tokenize | Extra::Detokenize | Extra::CountTokens => Refusal {
            param: Some("model"),
            anthropic: extra == Extra::CountTokens,
            ..Refusal::plain(404, format!("{unknown} Valid aliases: {}.", config.model))
        },
    })
}
