#!/usr/bin/env python3
"""Compare the table of request members in src/pd/members.rs with the classes of an installed vLLM.

usage: members.py [--json FILE] [TABLE]

Run it with the Python of a virtual environment that has vLLM. TABLE is the path of members.rs; the
default is the one of this repository. --json takes the names from a file that an earlier run printed
with --dump, instead of from vLLM. Exit status: 0 if every member has a row and every row a member.
"""
import argparse
import importlib
import json
import pathlib
import re
import sys

# A value of each member that both legs carry or that is capped, for one request with it. A member that is
# missing here keeps the value of the request, and so do those whose default every request has.
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"name": "f", "description": "d", "parameters": SCHEMA}
VALUES = {
    "add_generation_prompt": True, "add_special_tokens": False, "allowed_token_ids": list(range(300, 900)),
    "bad_words": ["zzz"], "chat_template_kwargs": {"a": 1}, "continue_final_message": False,
    "detokenize": True, "documents": [{"title": "t", "text": "x"}], "enable_response_messages": False,
    "flat_logprobs": False, "frequency_penalty": 0.5, "ignore_eos": True, "include": [],
    "include_reasoning": True, "include_stop_str_in_output": True, "instructions": "Answer.",
    "length_penalty": 1.5, "logit_bias": {"400": 5}, "logprob_token_ids": [400], "logprobs": 1,
    "max_completion_tokens": 9, "max_output_tokens": 9, "max_tokens": 9, "max_tool_calls": 3,
    "metadata": {"user_id": "u"}, "min_p": 0.1, "min_tokens": 4, "mm_payload": "tensors", "output_kind": 0,
    "output_mode": "tokens", "parallel_tool_calls": True, "presence_penalty": 0.5,
    "previous_input_messages": None, "priority": 0, "prompt_cache_key": "k", "reasoning_effort": "low",
    "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3},
    "repetition_penalty": 1.2, "request_id": "r", "return_mm_kwargs": False,
    "return_prompt_text": True, "return_token_ids": True, "return_token_offsets": False,
    "return_tokens_as_token_ids": True, "routed_experts_prompt_start": 0, "seed": 7,
    "service_tier": "auto", "session_id": "s", "skip_clone": True, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "stop": ["qq"], "stop_sequences": ["qq"],
    "stop_token_ids": [5], "store": True, "stream": True, "stream_interval": 1,
    "stream_options": {"include_usage": True}, "suffix": None, "system": "Answer.", "temperature": 0,
    "text": {"format": {"type": "text"}}, "tool_choice": "none", "top_k": 5, "top_logprobs": 1, "top_p": 0.9,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "structured_outputs": {"json": SCHEMA}, "truncation_side": "left", "user": "u", "watermarking": None,
}
# Values of members that differ between classes, or need another member.
SPECIAL = {
    ("CHAT", "logprobs"): True, ("CHAT", "top_logprobs"): {"logprobs": True, "top_logprobs": 2},
    ("RESPONSES", "top_logprobs"): {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    ("CHAT", "stream_options"): {"stream": True, "stream_options": {"include_usage": True}},
    ("COMPLETIONS", "stream_options"): {"stream": True, "stream_options": {"include_usage": True}},
    ("GENERATE", "stream_options"): {"stream": True, "stream_options": {"include_usage": True}},
    ("CHAT", "logprob_token_ids"): {"logprobs": True, "logprob_token_ids": [400]},
    ("COMPLETIONS", "logprob_token_ids"): {"logprobs": 1, "logprob_token_ids": [400]},
    ("SAMPLING", "logprob_token_ids"): {"logprobs": 1, "logprob_token_ids": [400]},
    ("CHAT", "tools"): {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "none"},
    ("MESSAGES", "tools"): {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "none"}},
    ("MESSAGES", "tool_choice"): {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "none"}},
    ("RESPONSES", "tools"): [{"type": "function", **TOOL}],
    ("RESPONSES", "reasoning"): {"effort": "low"},
    ("MESSAGES", "output_config"): {"effort": "low"},
    ("RESPONSES", "metadata"): {"a": "b"},
}


def requests(rows):
    """Returns the class, the name and the further members of a request for each member that both legs
    carry or that is capped."""
    for name, members in rows.items():
        for member, verdict in members.items():
            if verdict != "Harmless" and not verdict.startswith("Capped"):
                continue
            special = SPECIAL.get((name, member))
            if isinstance(special, dict) and member in special:
                yield name, member, special
            elif special is not None or member in VALUES:
                yield name, member, {member: special if special is not None else VALUES[member]}
            else:
                yield name, member, {}


# The classes, by their names in the table. `SAMPLING` is `sampling_params` of the generate API.
CLASSES = {
    "CHAT": ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    "COMPLETIONS": ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    "RESPONSES": ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    "MESSAGES": ("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
    "GENERATE": ("vllm.entrypoints.scale_out.token_in_token_out.protocol", "GenerateRequest"),
    "SAMPLING": ("vllm.sampling_params", "SamplingParams"),
}
ALL = {"CHAT", "COMPLETIONS", "RESPONSES", "MESSAGES", "GENERATE"}
ROW = re.compile(r'^\s*row\(([A-Z |]+), "(\w+)", (.+)\),$')


def members_of(module, name):
    """Returns the names of the members that a class reads from a request body."""
    found = getattr(importlib.import_module(module), name)
    fields = getattr(found, "model_fields", None)
    if fields is None:
        # A struct of msgspec.
        return set(found.__struct_encode_fields__)
    names = set()
    for field, info in fields.items():
        alias = info.validation_alias or info.alias
        names.add(alias if isinstance(alias, str) else field)
    return names


def table_of(text):
    """Returns the rows of the table: for each class, its members with their verdicts."""
    rows = {name: {} for name in CLASSES}
    for line in text.splitlines():
        match = ROW.match(line)
        if not match:
            continue
        classes = {name.strip() for name in match[1].split("|")}
        if "ALL" in classes:
            classes |= ALL
        for name in classes & set(CLASSES):
            rows[name][match[2]] = match[3]
    return rows


def main():
    here = pathlib.Path(__file__).resolve()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="?", default=here.parents[2] / "src/pd/members.rs")
    parser.add_argument("--json", help="read the members from this file")
    parser.add_argument("--dump", action="store_true", help="print the members of vLLM as JSON")
    args = parser.parse_args()
    if args.json:
        members = {name: set(own) for name, own in json.loads(pathlib.Path(args.json).read_text()).items()}
    else:
        members = {name: members_of(*where) for name, where in CLASSES.items()}
    if args.dump:
        json.dump({name: sorted(own) for name, own in members.items()}, sys.stdout, indent=1)
        return 0
    rows = table_of(pathlib.Path(args.table).read_text())
    is_equal = True
    for name, own in members.items():
        missing, surplus = sorted(own - rows[name].keys()), sorted(rows[name].keys() - own)
        kinds = [verdict.split("(")[0] for verdict in rows[name].values()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        print(f"{name}: {len(own)} members; rows: {counts}")
        if missing:
            print(f"  without a row: {', '.join(missing)}")
        if surplus:
            print(f"  no member of this vLLM: {', '.join(surplus)}")
        is_equal = is_equal and not missing and not surplus
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
