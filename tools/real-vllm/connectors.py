"""What the checks depend on for each KV connector: ports, flags, metrics of the engines, and which checks apply."""
from dataclasses import dataclass, field

from rig import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES

VLLM_LOAD = ("vllm:num_requests_running", "vllm:num_requests_waiting")
SGLANG_LOAD = tuple("sglang:" + name for name in (
    "num_running_reqs", "num_queue_reqs", "num_grammar_queue_reqs", "num_prefill_prealloc_queue_reqs",
    "num_prefill_bootstrap_queue_reqs", "num_prefill_inflight_queue_reqs", "num_decode_prealloc_queue_reqs",
    "num_decode_transfer_queue_reqs"))


@dataclass(frozen=True)
class Connector:
    """A KV connector and the engines that use it."""

    checks: tuple  # those that run by default, in this order
    named: tuple = ("mixture",)  # those that run only if they are named
    prefill: str = "http://127.0.0.1:8100"
    decode: str = "http://127.0.0.1:8200"
    reference: str = ""  # an engine that responds alone; the prefill server if empty
    apis: tuple = (COMPLETIONS, CHAT, GENERATE)  # of `tokens` and `mixture`
    more_apis: tuple = (RESPONSES, MESSAGES)  # that `mixture` sends refused requests to as well
    load: tuple = VLLM_LOAD  # gauges that are 0 if an engine is idle
    usage: str = "vllm:kv_cache_usage_perc"
    hits: str = "vllm:external_prefix_cache_hits_total"  # of the decoder: prompt tokens it has received
    settle: float = 0  # seconds until the gauges of an idle engine are up to date
    expired: str = ""  # of the prefiller: prompts whose KV cache was kept until the lease expired
    moved: tuple = ()  # further counters that show a transfer: role and name
    fatal: tuple = ()  # kinds of refused requests that `mixture` omits, because they stop the engine
    has_tokens: bool = True  # all responses have token ids if requested
    flags: object = field(default=lambda port: ())  # of ringside, for a bootstrap port
    env: object = field(default=lambda port: {})


CONNECTORS = {
    "nixlv2": Connector(
        checks=("tokens", "replay", "stale", "openai", "abort", "freed", "stranded", "messages", "counts",
                "members", "poison"),
        expired="vllm:nixl_num_kv_expired_reqs_total",
        moved=(("decode", "vllm:nixl_bytes_transferred_sum"),)),
    # The connector exports no metrics.
    "mooncake": Connector(
        checks=("tokens", "openai", "messages", "counts", "members"),
        flags=lambda port: ("--kv-connector", "mooncake", "--mooncake-bootstrap-port", str(port))),
    # Neither server of a pair can respond alone, so the reference is a third server.
    "sglang": Connector(
        checks=("tokens",),
        prefill="http://127.0.0.1:8600", decode="http://127.0.0.1:8700", reference="http://127.0.0.1:8800",
        apis=(COMPLETIONS, CHAT), more_apis=(), load=SGLANG_LOAD, usage="sglang:token_usage", settle=35, hits="",
        moved=(("prefill", "sglang:kv_transfer_total_mb_count"),), has_tokens=False,
        fatal=("prompt beyond the vocabulary",),
        flags=lambda port: ("--kv-connector", "sglang"),
        env=lambda port: {"SGLANG_BOOTSTRAP_PORT": str(port)}),
}
