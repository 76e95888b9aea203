//! The members of request bodies, and how a request with each of them is split.
//!
//! The prefill leg is a copy of the client's body with other limits and without streaming, and the
//! decode leg is the client's body. [`ROWS`] states for each member of the request classes of vLLM
//! 0.32.0 whether both legs can carry it (`docs/engines.md#requests-that-stay-with-the-decoder`).
//! `tools/real-vllm/members.py` compares the table with the classes of an installed vLLM.

use Reason::{
    BeamSearch, BestOf, BuiltInTools, CacheUnread, CachedMedia, ForcedTool, PromptCut,
    PromptEmbeds, PromptLogprobs, ResponseState, SeveralChoices, SeveralPrompts, ThinkingBudget,
    ToolWithoutId,
};
use Value::{Any, Limit, Minimum, Stream, StreamOptions};
use Verdict::{Capped, Decoder, Entered, Harmless, Proxy};
use When::{
    AboveOne, Budget, BuiltInTool, ListOfSeveral, NamedTool, NamelessCall, NotCount, NotDisabled,
    NotNull, NullData, Set, SetWithLogprobs, UuidOnly,
};

use super::outcome::Reason;

/// A set of request classes, one bit each.
pub type Classes = u8;

/// `/v1/chat/completions`
pub const CHAT: Classes = 1;
/// `/v1/completions`
pub const COMPLETIONS: Classes = 1 << 1;
/// `/v1/responses`
pub const RESPONSES: Classes = 1 << 2;
/// `/v1/messages`
pub const MESSAGES: Classes = 1 << 3;
/// `/inference/v1/generate`
pub const GENERATE: Classes = 1 << 4;
/// The `sampling_params` of `/inference/v1/generate`.
pub const SAMPLING: Classes = 1 << 5;
/// No member in vLLM 0.32.0, but in older or other engines.
pub const OTHER: Classes = 1 << 6;
const ALL: Classes = CHAT | COMPLETIONS | RESPONSES | MESSAGES | GENERATE;

/// A member of request bodies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The classes that have the member.
    pub classes: Classes,
    /// The name of the member.
    pub name: &'static str,
    /// The treatment of the member.
    pub verdict: Verdict,
}

/// The treatment of a member when a request is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both legs carry the client's value.
    Harmless,
    /// The prefill leg carries another value. A request whose value is none of these stays with the
    /// decoder, which would refuse it after the prefill.
    Capped(Value),
    /// A request with such a value stays with the decoder, for this reason.
    Decoder(When, Reason),
    /// The value is an object, whose members have their own rows or are the proxy's.
    Entered,
    /// No value passes from a client to an engine that reads the member.
    Proxy,
}

/// The values of a member that the prefill leg replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Any value.
    Any,
    /// `null`, or an integer of 1 or more without sign.
    Limit,
    /// `null`, or an integer without sign.
    Minimum,
    /// `null`, or a value that engines read as true or false.
    Stream,
    /// `null`, or an object in a request that streams.
    StreamOptions,
}

/// The values of a member that keep a request with the decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Any value but `null`.
    NotNull,
    /// Any value but `null` and `false`.
    Set,
    /// Like [`When::Set`], in a request that sets `logprobs`.
    SetWithLogprobs,
    /// Any value but `null`, 0 and 1.
    AboveOne,
    /// Any value but `null` and an integer without sign. -1 means the context length.
    NotCount,
    /// Any value but `"disabled"`.
    NotDisabled,
    /// A list of several prompts.
    ListOfSeveral,
    /// A list with a tool that the engine runs itself: one whose type is not `function`, `custom`
    /// or `namespace`.
    BuiltInTool,
    /// An object with `budget_tokens`, unless engines accept it with the limit of the prefill leg.
    Budget,
    /// An object whose `type` is `tool`.
    NamedTool,
    /// A list of messages in which a `tool_use` block has no `id`, or an empty one.
    NamelessCall,
    /// An object whose `kwargs_data` is or contains `null`: the item is only in one engine's cache.
    NullData,
    /// A list with a part that has `uuid` but no `url`, for the same reason.
    UuidOnly,
}

/// The members of all request classes, in alphabetical order.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    row(CHAT, "add_generation_prompt", Harmless),
    row(CHAT | COMPLETIONS, "add_special_tokens", Harmless),
    row(SAMPLING, "_all_stop_token_ids", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "allowed_token_ids", Harmless),
    row(RESPONSES, "background", Decoder(Set, ResponseState)),
    row(CHAT | COMPLETIONS | SAMPLING, "bad_words", Harmless),
    row(SAMPLING, "_bad_words_token_ids", Harmless),
    row(ALL, "cache_salt", Harmless),
    row(CHAT, "chat_template", Harmless),
    row(CHAT | RESPONSES | MESSAGES, "chat_template_kwargs", Harmless),
    row(GENERATE, "content_parts", Decoder(UuidOnly, CachedMedia)),
    row(CHAT, "continue_final_message", Harmless),
    row(SAMPLING, "detokenize", Harmless),
    row(CHAT, "documents", Harmless),
    row(ALL, "ec_transfer_params", Proxy),
    row(CHAT, "echo", Decoder(Set, PromptLogprobs)),
    row(COMPLETIONS, "echo", Decoder(SetWithLogprobs, PromptLogprobs)),
    row(RESPONSES, "enable_response_messages", Harmless),
    row(SAMPLING, "_eos_token_id", Harmless),
    row(SAMPLING, "extra_args", Entered),
    row(GENERATE, "features", Decoder(NullData, CachedMedia)),
    row(SAMPLING, "flat_logprobs", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "frequency_penalty", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "ignore_eos", Harmless),
    row(RESPONSES, "include", Harmless),
    row(CHAT | RESPONSES, "include_reasoning", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "include_stop_str_in_output", Harmless),
    row(RESPONSES, "input", Harmless),
    row(RESPONSES, "instructions", Harmless),
    row(ALL, "kv_transfer_params", Proxy),
    row(CHAT | COMPLETIONS, "length_penalty", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "logit_bias", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "logprob_token_ids", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "logprobs", Harmless),
    row(CHAT, "max_completion_tokens", Capped(Limit)),
    row(RESPONSES, "max_output_tokens", Capped(Limit)),
    row(CHAT | COMPLETIONS | MESSAGES | SAMPLING, "max_tokens", Capped(Limit)),
    row(RESPONSES, "max_tool_calls", Harmless),
    row(CHAT | RESPONSES, "media_io_kwargs", Harmless),
    row(CHAT, "messages", Harmless),
    row(MESSAGES, "messages", Decoder(NamelessCall, ToolWithoutId)),
    row(RESPONSES | MESSAGES, "metadata", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "min_p", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "min_tokens", Capped(Minimum)),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES, "mm_payload", Harmless),
    row(CHAT | RESPONSES, "mm_processor_kwargs", Harmless),
    row(ALL, "model", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "n", Decoder(AboveOne, SeveralChoices)),
    row(MESSAGES, "output_config", Harmless),
    row(SAMPLING, "output_kind", Harmless),
    row(GENERATE, "output_mode", Harmless),
    row(SAMPLING, "output_text_buffer_length", Harmless),
    row(CHAT | RESPONSES, "parallel_tool_calls", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "presence_penalty", Harmless),
    row(RESPONSES, "previous_input_messages", Harmless),
    row(RESPONSES, "previous_response_id", Decoder(NotNull, ResponseState)),
    row(CHAT | COMPLETIONS | RESPONSES | GENERATE, "priority", Harmless),
    row(COMPLETIONS, "prompt", Decoder(ListOfSeveral, SeveralPrompts)),
    row(RESPONSES, "prompt", Harmless),
    row(RESPONSES, "prompt_cache_key", Harmless),
    row(COMPLETIONS, "prompt_embeds", Decoder(NotNull, PromptEmbeds)),
    row(SAMPLING, "prompt_logprob_start", Decoder(NotNull, PromptLogprobs)),
    row(SAMPLING, "prompt_logprob_token_ids", Decoder(NotNull, PromptLogprobs)),
    row(CHAT | COMPLETIONS | SAMPLING, "prompt_logprobs", Decoder(NotNull, PromptLogprobs)),
    row(RESPONSES, "reasoning", Harmless),
    row(CHAT, "reasoning_effort", Harmless),
    row(GENERATE, "reasoning_ended", Harmless),
    row(GENERATE, "reasoning_parser_kwargs", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "repetition_detection", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "repetition_penalty", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | GENERATE, "request_id", Harmless),
    row(CHAT | COMPLETIONS, "response_format", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES, "return_mm_kwargs", Harmless),
    row(CHAT, "return_prompt_text", Harmless),
    row(CHAT | COMPLETIONS | GENERATE, "return_token_ids", Harmless),
    row(CHAT | COMPLETIONS, "return_token_offsets", Harmless),
    row(CHAT | COMPLETIONS, "return_tokens_as_token_ids", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "routed_experts_prompt_start", Harmless),
    row(GENERATE, "sampling_params", Entered),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "seed", Harmless),
    row(RESPONSES, "service_tier", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES, "session_id", Harmless),
    row(SAMPLING, "skip_clone", Harmless),
    row(SAMPLING, "skip_reading_prefix_cache", Decoder(Set, CacheUnread)),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "skip_special_tokens", Harmless),
    row(CHAT | COMPLETIONS | SAMPLING, "spaces_between_special_tokens", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "stop", Harmless),
    row(MESSAGES, "stop_sequences", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "stop_token_ids", Harmless),
    row(RESPONSES, "store", Capped(Any)),
    row(ALL, "stream", Capped(Stream)),
    row(CHAT | COMPLETIONS | SAMPLING, "stream_interval", Harmless),
    row(CHAT | COMPLETIONS | GENERATE, "stream_options", Capped(StreamOptions)),
    row(CHAT | COMPLETIONS | RESPONSES | SAMPLING, "structured_outputs", Harmless),
    row(COMPLETIONS, "suffix", Harmless),
    row(MESSAGES, "system", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES | SAMPLING, "temperature", Harmless),
    row(RESPONSES, "text", Harmless),
    row(MESSAGES, "thinking", Decoder(Budget, ThinkingBudget)),
    row(CHAT | COMPLETIONS | SAMPLING, "thinking_token_budget", Harmless),
    row(GENERATE, "token_ids", Harmless),
    row(GENERATE, "token_offsets", Harmless),
    row(MESSAGES, "tool_choice", Decoder(NamedTool, ForcedTool)),
    row(CHAT | RESPONSES, "tool_choice", Harmless),
    row(RESPONSES, "tools", Decoder(BuiltInTool, BuiltInTools)),
    row(CHAT | MESSAGES, "tools", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES | SAMPLING, "top_k", Harmless),
    row(CHAT | RESPONSES, "top_logprobs", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES | SAMPLING, "top_p", Harmless),
    row(SAMPLING, "trace_decode_token_ids", Harmless),
    row(CHAT | COMPLETIONS, "truncate_prompt_tokens", Decoder(NotCount, PromptCut)),
    row(RESPONSES, "truncation", Decoder(NotDisabled, PromptCut)),
    row(CHAT | COMPLETIONS, "truncation_side", Harmless),
    row(CHAT | COMPLETIONS, "use_beam_search", Decoder(Set, BeamSearch)),
    row(CHAT | COMPLETIONS | RESPONSES, "user", Harmless),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES, "vllm_xargs", Entered),
    row(CHAT | COMPLETIONS | RESPONSES | MESSAGES | SAMPLING, "watermarking", Harmless),
    row(SAMPLING, "_watermarking_skipped", Harmless),
    // vLLM up to 0.10.
    row(OTHER, "best_of", Decoder(AboveOne, BestOf)),
    // llm-d's vLLM.
    row(OTHER, "cache_hit_threshold", Harmless),
    // SGLang and ATOM.
    row(OTHER, "bootstrap_host", Proxy),
    row(OTHER, "bootstrap_pair_key", Proxy),
    row(OTHER, "bootstrap_port", Proxy),
    row(OTHER, "bootstrap_room", Proxy),
    row(OTHER, "data_parallel_rank", Harmless),
    row(OTHER, "decode_tp_size", Proxy),
    row(OTHER, "disagg_prefill_dp_rank", Proxy),
];

const fn row(classes: Classes, name: &'static str, verdict: Verdict) -> Row {
    Row {
        classes,
        name,
        verdict,
    }
}

/// The rows with a rule about values: those that a request's members are compared with.
pub const RULES: &[Row] = &{
    let mut rules = [ROWS[0]; RULES_COUNT];
    let (mut at, mut count) = (0, 0);
    while at < ROWS.len() {
        if ROWS[at].has_rule() {
            rules[count] = ROWS[at];
            count += 1;
        }
        at += 1;
    }
    rules
};

const RULES_COUNT: usize = {
    let (mut at, mut count) = (0, 0);
    while at < ROWS.len() {
        count += ROWS[at].has_rule() as usize;
        at += 1;
    }
    count
};

impl Row {
    const fn has_rule(&self) -> bool {
        match self.verdict {
            Capped(Any) | Harmless | Entered | Proxy => false,
            Capped(_) | Decoder(..) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Level;
    use crate::pd::request::WATCH;

    #[test]
    fn a_class_has_one_row_per_member() {
        for (at, row) in ROWS.iter().enumerate() {
            let others = &ROWS[at + 1..];
            let mut others = others.iter().filter(|other| other.name == row.name);
            assert!(
                others.all(|other| other.classes & row.classes == 0),
                "{}",
                row.name
            );
        }
    }

    #[test]
    fn members_with_a_rule_are_watched() {
        for row in ROWS {
            if matches!(row.verdict, Harmless | Entered) {
                continue;
            }
            let levels = [(Level::Top, ALL | OTHER), (Level::SamplingParams, SAMPLING)];
            for (level, classes) in levels {
                let is_watched = WATCH.contains(&(level, row.name));
                assert!(
                    is_watched || row.classes & classes == 0,
                    "{level:?} {}",
                    row.name
                );
            }
        }
    }
}
