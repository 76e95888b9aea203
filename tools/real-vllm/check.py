#!/usr/bin/env python3
"""Check ringside's prefill/decode disaggregation with two real servers: vLLM with NIXL or Mooncake, or SGLang.

usage: check.py --ringside BINARY [--kv-connector NAME] [--prefill URL] [--decode URL] [--reference URL]
                [--trials N] [--seconds N] [CHECK...]

CHECK: tokens replay stale openai abort freed stranded messages counts members poison mixture. Default: those
that apply to the connector (see connectors.py), in this order, except `mixture`, which runs if it is named.
Exit status: 0 if every check passes.
"""
import argparse
import json
import pathlib
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import members as request_members
import mixture as mixed
import rig
from connectors import CONNECTORS
from relay import Cut, EditAnswer, Relay, SlowBody
from rig import (CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, RND, Answer, Engine, Ringside,
                 body, ids, metric, prompt_for, salted, until, verdict)

class Setup:
    """The addresses of the servers, and how to start ringside in front of them."""

    def __init__(self, args):
        self.binary, self.core = args.ringside, args.core
        self.connector = CONNECTORS[args.kv_connector]
        self.bootstrap_port = args.bootstrap_port
        self.prefill = Engine(args.prefill or self.connector.prefill)
        self.decode = Engine(args.decode or self.connector.decode)
        # The server that responds alone.
        alone = args.reference or self.connector.reference
        self.alone = Engine(alone) if alone else self.prefill
        self.port, self.trials, self.seconds = args.port, args.trials, args.seconds

    def ringside(self, *flags, decoder_port=None, prefiller_port=None):
        """Starts ringside on one core with one thread, so that connections are reused predictably."""
        self.port += 1
        prefiller = f"127.0.0.1:{prefiller_port or self.prefill.port}"
        return Ringside(self.binary, self.port, decoder_port or self.decode.port, prefiller,
                        "--cores", self.core, *self.connector.flags(self.bootstrap_port), *flags,
                        env=self.connector.env(self.bootstrap_port))

    def reference(self, path, asked):
        """Returns the response of one server alone, computed without a cached prefix."""
        plain = {key: value for key, value in asked.items() if key not in ("stream", "stream_options")}
        return self.alone.post(path, salted(plain))

    def body(self, api, prompt, **more):
        """Returns a request that the engines accept, whole and streamed."""
        asked = body(api, prompt, **more)
        if not self.connector.has_tokens:
            asked.pop("return_token_ids", None)
        return asked

    def sure_case(self, api, limit):
        """Returns a request and the response of one server alone whose text does not depend on rounding."""
        for _ in range(50):
            asked = self.body(api, prompt_for(api), limit=limit)
            want = self.alone.post(api, salted(rig.with_logprobs(api, asked)))
            assert want.status == 200, (want.status, want.raw)
            if rig.margin(want) > mixed.MARGIN:
                return asked, want
        raise SystemExit(f"no prompt for {api} has a margin above {mixed.MARGIN}")

    def load(self, engine):
        """Returns the number of requests that are in an engine."""
        return sum(engine.metric(name) for name in self.connector.load)


def tokens(setup):
    """Both legs together generate the same tokens as one server alone."""
    count, connector = setup.trials, setup.connector
    with setup.ringside() as ringside:
        counters = {name.split(":")[1]: (getattr(setup, role), name) for role, name in connector.moved}
        if connector.hits:
            counters["external_hits"] = (setup.decode, connector.hits)
        for api in connector.apis:
            for stream in (False, True):
                before = {name: engine.metric(metric) for name, (engine, metric) in counters.items()}
                remote = ringside.count("remote")
                right, prompt_tokens, cached, sample = 0, 0, set(), ""
                for _ in range(count):
                    if connector.has_tokens:
                        asked, want = body(api, prompt_for(api), limit=16), None
                    else:
                        asked, want = setup.sure_case(api, limit=16)
                    if stream:
                        asked |= {"stream": True, "stream_options": {"include_usage": True}}
                    got = ringside.engine.post(api, asked)
                    want = want or setup.reference(api, asked)
                    length = len(got.tokens) if connector.has_tokens else (got.usage or {}).get("completion_tokens")
                    is_right = bool(got.same(want)) and length == 16
                    right += is_right
                    if not is_right:
                        sample = f"{got.status} {got.tokens or got.text!r} instead of {want.tokens or want.text!r}"
                    if got.usage:
                        prompt_tokens += got.usage["prompt_tokens"]
                        cached.add((got.usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
                moved = {name: int(engine.metric(metric) - before[name])
                         for name, (engine, metric) in counters.items()}
                remote = ringside.count("remote") - remote
                ok = right == count == remote and prompt_tokens > 0 and min(moved.values()) >= count
                if connector.hits:
                    ok = ok and moved["external_hits"] > 0.8 * prompt_tokens
                verdict(ok, f"tokens {api} {'stream' if stream else 'whole'}", equal=f"{right}/{count}",
                        outcome_remote=remote, prompt_tokens=prompt_tokens, **moved,
                        client_cached_tokens=cached, **({"different": sample} if sample else {}))


def others(setup, count=40):
    """Sends other prompts to the prefiller, so that freed blocks are overwritten."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: setup.prefill.post(GENERATE, body(GENERATE, ids(), limit=1)), range(count)))


def reset_decode(setup):
    """Clears the decoder's prefix cache; requires VLLM_SERVER_DEV_MODE=1 in the decoder."""
    try:
        return setup.decode.post_raw("/reset_prefix_cache", b"")[0] == 200
    except OSError:
        return False


def replay(setup):
    """A decode connection that is closed right after the request never leads to wrong text."""
    trials, fresh_trials = setup.trials, (setup.trials + 1) // 2
    relay = Relay((setup.decode.host, setup.decode.port))
    resets = 0
    with setup.ringside(decoder_port=relay.port) as ringside:
        right = wrong = errors = null_replays = wrong_again = tried_again = 0
        was_reused = 0
        for trial in range(trials):
            api = (COMPLETIONS, CHAT, GENERATE)[trial % 3]
            warm = body(api, prompt_for(api), limit=2)
            assert ringside.engine.post(api, warm).status == 200
            absorb = trial % 2 == 0

            def between():
                nonlocal resets
                others(setup)
                resets += reset_decode(setup)

            act = Cut(absorb=absorb, reset=trial % 4 >= 2, between=between)
            armed = [act]

            def plan(request):
                takes = isinstance(request.kv, dict) and request.kv.get("do_remote_prefill")
                return armed.pop() if takes and armed else None

            asked = body(api, prompt_for(api), stream=trial % 5 >= 2)
            relay.plan, first = plan, len(relay.requests)
            got = ringside.engine.post(api, asked)
            want = setup.reference(api, asked)
            legs = relay.requests[first:]
            was_reused += legs[0].nth > 1
            replays = legs[1:]
            null_replays += len(replays) == 1 and replays[0].kv is None and replays[0].nth == 1
            right += bool(got.same(want))
            wrong += got.status == 200 and not got.same(want)
            errors += got.status != 200
            if absorb:
                # Control: the text that results if the same handoff is sent again.
                reset_decode(setup)
                again = setup.decode.post(api, salted(asked | {"stream": False, "kv_transfer_params": legs[0].kv}))
                tried_again += 1
                wrong_again += again.status == 200 and again.tokens != want.tokens
        fallback = ringside.count("local_fallback", "handoff_used")
        verdict(wrong == 0 and right == trials == null_replays == was_reused == fallback,
                "a reused connection is closed after the request: replay with a null handoff",
                trials=trials, right=right, wrong=wrong, errors=errors, reused=was_reused,
                replayed_with_null=null_replays,
                local_fallback_handoff_used=fallback,
                ringside_replays_total=ringside.counter("ringside_replays_total"),
                decode_cache_resets=resets)
        verdict(wrong_again > 0, "control: sending the same handoff again returns wrong text with status 200",
                wrong=f"{wrong_again}/{tried_again}")

        statuses, bodies = [], set()
        for trial in range(fresh_trials):
            api = (COMPLETIONS, CHAT, GENERATE)[trial % 3]
            relay.drop_idle()
            time.sleep(0.05)
            armed = [Cut(absorb=trial % 2 == 0, reset=trial % 4 >= 2, between=lambda: others(setup, 5))]

            def plan_fresh(request):
                takes = isinstance(request.kv, dict) and request.kv.get("do_remote_prefill")
                return armed.pop() if takes and armed else None

            relay.plan, first = plan_fresh, len(relay.requests)
            got = ringside.engine.post(api, body(api, prompt_for(api), stream=trial % 2 == 0))
            legs = relay.requests[first:]
            statuses.append((got.status, legs[0].nth, len(legs)))
            bodies.add(got.raw.decode())
        verdict(set(statuses) == {(502, 1, 1)}, "a new connection is closed after the request: an error, no replay",
                trials=fresh_trials, status_nth_legs=set(statuses))
        print("      " + " ".join(sorted(bodies)))
        relay.plan = lambda request: None
        asked = body(COMPLETIONS, ids())
        got = ringside.engine.post(COMPLETIONS, asked)
        verdict(got.same(setup.reference(COMPLETIONS, asked)), "the next request is correct")


def stale(setup, trials=6):
    """A handoff older than its limit is not used, and one that the decoder refuses is not fatal."""
    relay = Relay((setup.prefill.host, setup.prefill.port))
    # Keep a large distance from the limit in both cases: on a busy machine, a process may wait a
    # second until it is scheduled.
    for bound, seconds, want_outcome in (("2s", 6.0, ("local_fallback", "handoff_stale")),
                                         ("20s", 0.5, ("remote", "none"))):
        with setup.ringside("--handoff-max-age", bound, prefiller_port=relay.port) as ringside:
            relay.plan = lambda request: SlowBody(seconds)
            hits = setup.decode.metric("vllm:external_prefix_cache_hits_total")
            right, started = 0, time.monotonic()
            for trial in range(trials):
                api = (COMPLETIONS, CHAT, GENERATE)[trial % 3]
                asked = body(api, prompt_for(api), stream=trial % 2 == 1)
                got = ringside.engine.post(api, asked)
                right += bool(got.same(setup.reference(api, asked)))
            took = (time.monotonic() - started) / trials
            counted = ringside.count(*want_outcome)
            hits = setup.decode.metric("vllm:external_prefix_cache_hits_total") - hits
            pulled = hits > 0
            verdict(right == trials == counted and pulled == (want_outcome[0] == "remote"),
                    f"handoff {seconds} s old, limit {bound}", right=f"{right}/{trials}",
                    outcomes=ringside.outcomes(), external_hits=int(hits), seconds_each=f"{took:.1f}")

    def other_engine(answer):
        at = answer.index(b'"remote_engine_id":"') + len(b'"remote_engine_id":"')
        return answer[:at] + b"00000000" + answer[at + 8:]

    relay.plan = lambda request: EditAnswer(other_engine)
    for flag in ("recompute", "error"):
        with setup.ringside("--on-decode-kv-error", flag, prefiller_port=relay.port) as ringside:
            for stream in (False, True):
                right, shown, wrong, statuses = 0, 0, 0, set()
                for trial in range(trials // 2):
                    api = (COMPLETIONS, CHAT, GENERATE)[trial % 3]
                    asked = body(api, prompt_for(api), stream=stream)
                    got = ringside.engine.post(api, asked)
                    statuses.add(got.status)
                    same = got.same(setup.reference(api, asked))
                    right += bool(same)
                    shown += b'"error"' in got.raw
                    wrong += not same and b'"error"' not in got.raw
                # For a stream, vLLM sends status 200 before it loads the KV cache, and then fails
                # mid-stream. It is too late for a second attempt, so the client receives the error.
                recomputes = flag == "recompute" and not stream
                ok = wrong == 0 and (right if recomputes else shown) == trials // 2
                verdict(ok, f"handoff of an unknown engine, --on-decode-kv-error {flag}, "
                        f"{'stream' if stream else 'whole'}", right=f"{right}/{trials // 2}",
                        error_shown=shown, wrong=wrong, statuses=statuses, outcomes=ringside.outcomes())


def openai(setup, trials=5):
    """The openai package receives the same text through ringside, whole and streamed."""
    try:
        import openai as package
    except ImportError:
        verdict(False, "the openai package is not installed")
        return

    def client(engine):
        return package.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0)

    def chat(api, prompt, headers, extra, stream):
        answer = api.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=24, temperature=0,
            stream=stream, extra_headers=headers, extra_body=extra)
        if not stream:
            return answer.choices[0].message.content
        return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)

    def completions(api, prompt, headers, extra, stream):
        answer = api.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0,
                                        stream=stream, extra_headers=headers, extra_body=extra)
        if not stream:
            return answer.choices[0].text
        return "".join(part.choices[0].text for part in answer if part.choices)

    def responses(api, prompt, headers, extra, stream):
        answer = api.responses.create(model="tiny", input=prompt, max_output_tokens=24, temperature=0,
                                      stream=stream, extra_headers=headers, extra_body=extra)
        if not stream:
            return answer.output_text
        return "".join(event.delta for event in answer if event.type == "response.output_text.delta")

    with setup.ringside() as ringside:
        ours, alone = client(ringside.engine), client(setup.prefill)
        headers = {"x-prefiller-host-port": ringside.engine.headers["x-prefiller-host-port"]}
        for call in (chat, completions, responses):
            for stream in (True, False):
                before, right, sample = ringside.count("remote"), 0, ""
                for _ in range(trials):
                    prompt = rig.words()
                    got = call(ours, prompt, headers, {"ignore_eos": True}, stream)
                    want = call(alone, prompt, {}, {"ignore_eos": True, "cache_salt": uuid.uuid4().hex}, False)
                    right += got == want and len(got) > 0
                    sample = got
                remote = ringside.count("remote") - before
                verdict(right == trials == remote, f"openai {package.__version__} {call.__name__} "
                        f"{'stream' if stream else 'whole'}", equal=f"{right}/{trials}",
                        outcome_remote=remote, characters=len(sample))


def running(engine):
    return engine.metric("vllm:num_requests_running") + engine.metric("vllm:num_requests_waiting")


def ms(times):
    if None in times:
        return "never"
    times = sorted(times)
    return f"{times[0] * 1e3:.0f}/{times[len(times) // 2] * 1e3:.0f}/{times[-1] * 1e3:.0f}ms(min/median/max)"


def abort(setup, trials=5):
    """A client disconnect cancels the request on both servers."""
    prefill, decode = setup.prefill, setup.decode
    with setup.ringside() as ringside:
        idle = lambda: running(prefill) + running(decode) == 0
        for stream in (True, False):
            times, before = [], ringside.counter("ringside_client_disconnects_total")
            for _ in range(trials):
                asked = body(COMPLETIONS, ids(), limit=1500, stream=stream)
                sock = ringside.engine.begin(COMPLETIONS, asked)
                if stream:
                    for _ in range(5):
                        sock.recv(65536)
                assert until(lambda: running(decode) == 1) is not None
                sock.close()
                times.append(until(idle))
            left = ringside.counter("ringside_client_disconnects_total") - before
            # Without the abort, generating 1500 tokens would take several seconds.
            verdict(None not in times and max(times) < 2 and left == trials,
                    f"abort during a long decode, {'stream' if stream else 'whole'}", idle_after=ms(times),
                    client_disconnects=left)

        # A prefill of 1900 tokens, aborted at different times.
        times, before = [], ringside.counter("ringside_client_disconnects_total")
        phases_before = phases(ringside)
        for trial in range(4 * trials):
            asked = body(COMPLETIONS, ids(1900), limit=100, stream=True)
            sock = ringside.engine.begin(COMPLETIONS, asked)
            time.sleep(0.004 * (trial + 1))
            sock.close()
            times.append(until(idle))
        left = ringside.counter("ringside_client_disconnects_total") - before
        verdict(None not in times and max(times) < 2 and left == 4 * trials,
                "abort during a prefill of 1900 tokens, after 4 to 80 ms", idle_after=ms(times),
                client_disconnects=left, phases=changes(phases_before, phases(ringside)))

        # A prefill that is queued because the batch is full: it must be removed from the queue.
        queued = lambda: prefill.metric("vllm:num_requests_waiting")
        times, still = [], []
        phases_before = phases(ringside)
        for _ in range(trials):
            busy = [prefill.begin(GENERATE, body(GENERATE, ids(64), limit=1700, stream=True)) for _ in range(16)]
            full = until(lambda: prefill.metric("vllm:num_requests_running") == 16)
            sock = ringside.engine.begin(COMPLETIONS, body(COMPLETIONS, ids(), limit=100, stream=True))
            assert full is not None and until(lambda: queued() == 1) is not None, (full, queued())
            sock.close()
            times.append(until(lambda: queued() == 0))
            still.append(int(prefill.metric("vllm:num_requests_running")))
            for sock in busy:
                sock.close()
            until(idle)
        verdict(None not in times and max(times) < 2 and set(still) == {16},
                "abort of a prefill that is queued while 16 requests are running",
                gone_after=ms(times), still_running=set(still), phases=changes(phases_before, phases(ringside)))
        verdict(until(idle) is not None, "both servers are idle",
                prefill=int(running(prefill)), decode=int(running(decode)))
        usage = until(lambda: prefill.metric("vllm:kv_cache_usage_perc") + decode.metric("vllm:kv_cache_usage_perc") == 0, 45)
        verdict(usage is not None, "the KV cache of both servers is free again (lease 30 s)",
                after=f"{usage:.1f}s" if usage is not None else "never",
                expired_on_prefiller=int(prefill.metric("vllm:nixl_num_kv_expired_reqs_total")))
        asked = body(COMPLETIONS, ids())
        verdict(ringside.engine.post(COMPLETIONS, asked).same(setup.reference(COMPLETIONS, asked)),
                "the next request is correct")


def first_token_seconds(engine, asked):
    """Returns the seconds from a streamed request to the first event of its response."""
    started = time.monotonic()
    sock = engine.begin(COMPLETIONS, asked)
    received = b""
    while b"data:" not in received:
        received += sock.recv(65536)
    sock.close()
    return time.monotonic() - started


def freed(setup, count=20):
    """Cancelled prefills free their KV cache and do not delay later requests."""
    usage = lambda: sum(engine.metric("vllm:kv_cache_usage_perc") for engine in (setup.prefill, setup.decode))
    with setup.ringside() as ringside:
        short = lambda: body(COMPLETIONS, ids(30), limit=4, stream=True)
        alone = sorted(first_token_seconds(ringside.engine, short()) for _ in range(9))[4]
        assert until(lambda: usage() == 0, 45) is not None
        expired = lambda: int(setup.prefill.metric("vllm:nixl_num_kv_expired_reqs_total"))
        expired_before = expired()
        socks = [ringside.engine.begin(COMPLETIONS, body(COMPLETIONS, ids(1900), limit=100, stream=True))
                 for _ in range(count)]
        time.sleep(0.02)  # The prefiller needs about 0.3 s for all of them.
        for sock in socks:
            sock.close()
        behind = first_token_seconds(ringside.engine, short())
        back = until(lambda: usage() == 0, 45)
        left = {phase: int(n) for phase, n in phases(ringside).items() if n}
        # A prefill that finishes in the same engine step in which its abort arrives keeps its
        # blocks until the lease expires, because its handoff is never returned
        # (docs/stranded-kv.md).
        ran_out = expired() - expired_before
        verdict(left.get("prefill", 0) >= count // 2 and behind < 0.5 and back is not None
                and (back < 5 or ran_out > 0),
                f"a short request right after {count} cancelled prefills of 1900 tokens",
                first_token=f"{behind * 1000:.0f}ms", alone=f"{alone * 1000:.0f}ms",
                kv_usage_at_base_after=f"{back:.2f}s" if back is not None else "never",
                leases_run_out=ran_out, left_in=left)


def stranded(setup, trials=10):
    """KV cache is freed immediately if the client disconnects before the decoder has the request."""
    relay = Relay((setup.decode.host, setup.decode.port))
    expired = lambda: int(setup.prefill.metric("vllm:nixl_num_kv_expired_reqs_total"))
    used = lambda: setup.prefill.metric("vllm:kv_cache_usage_perc")
    # Engines ignore `user`. Here it makes the body larger than all buffers on the way.
    large = lambda: body(COMPLETIONS, ids(), limit=20, stream=True, user="x" * (24 << 20))

    def strand(ringside):
        relay.hold_over, relay.held = 1 << 20, 0
        sock = ringside.engine.begin(COMPLETIONS, large())
        assert until(lambda: relay.held == 1) is not None
        time.sleep(0.2)
        held = used()
        sock.close()
        return held

    for flags, count in ((("--release-stranded-kv=false",), 1), ((), trials)):
        with setup.ringside(*flags, decoder_port=relay.port) as ringside:
            assert until(lambda: used() == 0, 45) is not None
            expired_before, moved = expired(), setup.decode.metric("vllm:nixl_bytes_transferred_sum")
            times, held = [], []
            for _ in range(count):
                held.append(strand(ringside))
                times.append(until(lambda: used() == 0, 45))
                relay.hold_over = None
            outcomes = {kind: int(metric(ringside.admin, "ringside_stranded_kv_total", outcome=kind))
                        for kind in ("released", "failed", "left_to_lease")}
            moved = setup.decode.metric("vllm:nixl_bytes_transferred_sum") - moved
            ran_out = expired() - expired_before
            ok = None not in times and min(held) > 0 and moved == 0 and (
                min(times) > 15 and ran_out == 1 and outcomes["left_to_lease"] == count if flags
                else max(times) < 5 and ran_out == 0 and outcomes["released"] == count)
            verdict(ok, f"client disconnect between the legs, {flags[0] if flags else 'default'}",
                    blocks_free_after=ms(times), leases_run_out=ran_out, bytes_moved=int(moved), **outcomes)
            asked = body(COMPLETIONS, ids())
            verdict(ringside.engine.post(COMPLETIONS, asked).same(setup.reference(COMPLETIONS, asked)),
                    "the next request is correct")


def phases(ringside):
    names = "idle upload connect prefill retry_wait between_legs first_byte streaming stalled".split()
    return {name: ringside.counter("ringside_client_disconnects_total", phase=name) for name in names}


def changes(before, after):
    return ",".join(f"{name}:{after[name] - before[name]}" for name in after if after[name] != before[name])


def messages(setup, trials=3):
    """The messages and responses APIs return the same text as one server, whole and streamed."""
    with setup.ringside() as ringside:
        for api in (MESSAGES, RESPONSES):
            for stream in (False, True):
                before, right, sample = ringside.count("remote"), 0, None
                for _ in range(trials):
                    asked = body(api, rig.words(), limit=24, stream=stream)
                    got = ringside.engine.post(api, asked)
                    plain = {key: value for key, value in asked.items() if key != "stream"}
                    want = setup.prefill.post(api, plain)
                    right += bool(got.same(want))
                    sample = got
                remote = ringside.count("remote") - before
                verdict(right == trials == remote, f"{api} {'stream' if stream else 'whole'}",
                        equal=f"{right}/{trials}", outcome_remote=remote, status=sample.status,
                        characters=len(sample.text), usage=sample.usage and {
                            key: value for key, value in sample.usage.items() if isinstance(value, int)})


# The counts of a prompt that every API has, and by their names in each.
PROMPT_COUNTS = {"prompt_tokens", "input_tokens", "prompt_tokens_details.cached_tokens",
                 "input_tokens_details.cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"}


def numbers(usage, names=None):
    """Returns the integers of a usage, with those of its objects. A missing count is 0, so those are left out."""
    found = {}
    for name, value in (usage or {}).items():
        inner = numbers(value) if isinstance(value, dict) else {"": value} if isinstance(value, int) else {}
        found |= {f"{name}.{key}" if key else name: value for key, value in inner.items() if value}
    return {name: value for name, value in found.items() if names is None or name in names}


def cached_count(usage):
    return sum(value for name, value in numbers(usage, PROMPT_COUNTS).items() if "cached" in name or "read" in name)


def counts(setup, trials=3):
    """The counts that a client sees, above all of cached tokens, are those of the prefill server alone."""
    usage_in_all = {"include_usage": True, "continuous_usage_stats": True}
    with setup.ringside() as ringside:
        for api in (CHAT, COMPLETIONS, RESPONSES, GENERATE, MESSAGES):
            ways = {"whole": {}, "stream": {"stream": True}}
            if api in (CHAT, COMPLETIONS, GENERATE):
                ways["stream"] |= {"stream_options": {"include_usage": True}}
                ways["stream, usage in all events"] = {"stream": True, "stream_options": usage_in_all}
            for way, more in ways.items():
                right, remote, cached, faults = 0, ringside.count("remote"), set(), []
                for _ in range(trials):
                    asked = body(api, prompt_for(api, RND.randint(400, 800)), **more)
                    # The prefiller's cache has nothing of a request with another salt.
                    want_new, got_new = setup.prefill.post(api, salted(asked)), ringside.engine.post(api, asked)
                    got_old, want_old = ringside.engine.post(api, asked), setup.prefill.post(api, asked)
                    found = len(faults)
                    for state, got, want in (("new", got_new, want_new), ("cached", got_old, want_old)):
                        cached.add(cached_count(got.usage))
                        if not got.same(want) or (cached_count(want.usage) > 0) != (state == "cached"):
                            faults.append(f"{state}: {got.status} {got.raw[-300:]} instead of {want.raw[-300:]}")
                        # An engine has the prompt's length in all usages and the other counts in the last.
                        # Earlier ones may have the final counts instead.
                        allowed = [numbers(usage, PROMPT_COUNTS) for usage in want.usages[:1] + want.usages[-1:]]
                        if numbers(got.usage) != numbers(want.usage):
                            names = {name for name, _ in numbers(got.usage).items() ^ numbers(want.usage).items()}
                            faults.append(f"{state}: {', '.join(sorted(names))}: {got.usage} instead of {want.usage}")
                        elif any(numbers(usage, PROMPT_COUNTS) not in allowed for usage in got.usages):
                            faults.append(f"{state}, earlier events: {got.usages[0]}, final {got.usage}")
                    right += len(faults) == found
                remote = ringside.count("remote") - remote
                verdict(right == trials and remote == 2 * trials, f"counts {api} {way}", right=f"{right}/{trials}",
                        outcome_remote=remote, cached=sorted(cached),
                        **({"first_fault": faults[0]} if faults else {}))


def mixture(setup):
    """Good requests, refused ones and clients that leave: no wrong text, no delay, nothing is kept afterwards."""
    mixed.run(setup, setup.seconds)


def members(setup):
    """A request with each member that both legs carry, or that is capped, returns the text of one server."""
    apis = {"CHAT": CHAT, "COMPLETIONS": COMPLETIONS, "RESPONSES": RESPONSES, "MESSAGES": MESSAGES,
            "GENERATE": GENERATE, "SAMPLING": GENERATE}
    table = pathlib.Path(__file__).resolve().parents[2] / "src/pd/members.rs"
    rows = request_members.table_of(table.read_text())
    counts = {}
    with setup.ringside() as ringside:
        for name, member, more in request_members.requests(rows):
            api = apis[name]
            asked = body(api, prompt_for(api))
            if name == "SAMPLING":
                asked["sampling_params"] |= more
            else:
                asked |= more
            if member == "max_completion_tokens":
                del asked["max_tokens"]
            before = ringside.count("remote")
            try:
                got = ringside.engine.post(api, asked)
            except TimeoutError:
                counts["hung"] = counts.get("hung", 0) + 1
                verdict(False, f"{name} {member} hung", outcomes=ringside.outcomes())
                continue
            want = setup.reference(api, asked)
            # The outcome is counted after the response has been sent, which is before the reference.
            is_split = ringside.count("remote") - before == 1
            # A value that the engines refuse is refused in the same way.
            is_refused = got.status == want.status and got.status in (400, 422)
            if got.same(want):
                kind = "equal" if is_split else "equal_unsplit"
            else:
                kind = "refused" if is_refused else "different"
            counts[kind] = counts.get(kind, 0) + 1
            if kind != "equal":
                verdict(kind != "different", f"{name} {member} {kind}", status=got.status,
                        reference=want.status, outcomes=ringside.outcomes(),
                        got=repr(got.raw[:150]), want=repr(want.raw[:150]))
    verdict(not counts.get("different"), "members", **counts)


def poison(setup):
    """A client's own kv_transfer_params never reaches an engine, in any spelling."""
    handoff = setup.prefill.post_raw(GENERATE, json.dumps(
        body(GENERATE, ids(100), limit=1, kv_transfer_params={"do_remote_decode": True})).encode())
    # A real handoff of the prefiller, except that the block ids are a flat list. It crashes an
    # engine.
    poisonous = json.loads(handoff[1])["kv_transfer_params"] | {"remote_block_ids": [1, 2, 3]}
    flat = json.dumps(poisonous)
    with setup.ringside() as ringside:
        split, local = ringside.engine, ringside.engine.without_prefiller()

        def attempt(name, engine, path, data, chunked=False):
            before = ringside.counter("ringside_client_kv_params_masked_total")
            try:
                status, raw, _ = engine.post_raw(path, data, timeout=60, chunked=chunked)
            except OSError as error:
                status, raw = repr(error), b""
            time.sleep(0.2)
            masked = ringside.counter("ringside_client_kv_params_masked_total") - before
            alive = setup.decode.is_healthy() and setup.prefill.is_healthy()
            normal = right = False
            if alive:
                asked = body(COMPLETIONS, ids())
                got, want = split.post(COMPLETIONS, asked), setup.reference(COMPLETIONS, asked)
                alive, normal = setup.decode.is_healthy(), got.status == 200
                right = bool(got.same(want))
            shown = "" if status == 200 else raw[:120]
            verdict(alive and normal and right and isinstance(status, int) and status < 500, f"poison: {name}", status=status, masked=masked,
                    engines_alive=alive, next_request="right" if right else "NOT RIGHT",
                    **({"response": shown} if shown else {}))
            if not alive:
                raise SystemExit("an engine has stopped: restart the servers")

        for api in (COMPLETIONS, CHAT, GENERATE, RESPONSES, MESSAGES):
            asked = body(api, prompt_for(api), kv_transfer_params=poisonous)
            data = json.dumps(asked).encode()
            attempt(f"{api}, decode only", local, api, data)
            attempt(f"{api}, decode only, chunked", local, api, data, chunked=True)
            attempt(f"{api}, prefill/decode", split, api, data)
        base = json.dumps(body(COMPLETIONS, ids()))[:-1]
        spelled = {
            "twice": f'{base}, "kv_transfer_params": null, "kv_transfer_params": {flat}}}',
            "first of two": f'{base}, "kv_transfer_params": {flat}, "kv_transfer_params": {flat}}}',
            "escaped name": f'{base}, "kv_transfer_par\\u0061ms": {flat}}}',
            "no spaces": f'{base},"kv_transfer_params":{flat.replace(" ", "")}}}',
            "byte order mark": f'\ufeff{base}, "kv_transfer_params": {flat}}}',
            "after NaN": f'{base}, "x": NaN, "kv_transfer_params": {flat}}}',
            "n above 1": f'{base}, "temperature": 1, "n": 2, "kv_transfer_params": {flat}}}',
        }
        for name, text in spelled.items():
            attempt(f"{name}, decode only", local, COMPLETIONS, text.encode())
            attempt(f"{name}, prefill/decode", split, COMPLETIONS, text.encode())
        text = f'{base}, "kv_transfer_params": {flat}}}'
        attempt("UTF-16, decode only", local, COMPLETIONS, text.encode("utf-16"))
        attempt("encoded path", local, "/v1/complet%69ons", text.encode())
        attempt("trailing slash in the path", local, COMPLETIONS + "/", text.encode())
        nested = body(GENERATE, ids())
        nested["sampling_params"]["extra_args"] = {"kv_transfer_params": poisonous}
        attempt("sampling_params.extra_args, decode only", local, GENERATE, json.dumps(nested).encode())
        attempt("sampling_params.extra_args, prefill/decode", split, GENERATE, json.dumps(nested).encode())
        for value in ({}, 0, "", []):
            # Falsy values pass the checks of vLLM's front end and reach the scheduler.
            nested["sampling_params"]["extra_args"] = {"kv_transfer_params": value}
            data = json.dumps(nested).encode()
            attempt(f"sampling_params.extra_args {value!r}, prefill/decode", split, GENERATE, data)
            attempt(f"sampling_params.extra_args {value!r}, decode only", local, GENERATE, data)
        # vLLM copies vllm_xargs into the same dictionary. It only allows scalars and lists there,
        # and falsy values reach the scheduler.
        for value in ("x", [1], 0, "", []):
            asked = body(COMPLETIONS, ids(), vllm_xargs={"kv_transfer_params": value})
            attempt(f"vllm_xargs {value!r}, prefill/decode", split, COMPLETIONS, json.dumps(asked).encode())
            attempt(f"vllm_xargs {value!r}, decode only", local, COMPLETIONS, json.dumps(asked).encode())
        batch = {"model": "tiny", "max_tokens": 4, "kv_transfer_params": poisonous,
                 "messages": [[{"role": "user", "content": rig.words()}], [{"role": "user", "content": rig.words()}]]}
        attempt(CHAT + "/batch", local, CHAT + "/batch", json.dumps(batch).encode())
        attempt(CHAT + "/batch with a prefiller header", split, CHAT + "/batch", json.dumps(batch).encode())
        cohere = {"model": "tiny", "max_tokens": 4, "kv_transfer_params": poisonous,
                  "messages": [{"role": "user", "content": rig.words()}]}
        attempt("/v2/chat", local, "/v2/chat", json.dumps(cohere).encode())


CHECKS = {check.__name__: check
          for check in (tokens, replay, stale, openai, abort, freed, stranded, messages, counts, members, poison,
                        mixture)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ringside", required=True, metavar="BINARY")
    parser.add_argument("--kv-connector", default="nixlv2", choices=CONNECTORS, help="default: nixlv2")
    parser.add_argument("--prefill", metavar="URL", help="default: port 8100; for sglang 8600")
    parser.add_argument("--decode", metavar="URL", help="default: port 8200; for sglang 8700")
    parser.add_argument("--reference", metavar="URL",
                        help="the server that responds alone; default: the prefill server; for sglang port 8800")
    parser.add_argument("--bootstrap-port", type=int, default=8998,
                        help="bootstrap port of the prefill server (mooncake and sglang); default: 8998")
    parser.add_argument("--port", type=int, default=8300, help="ringside listens on the ports above this one")
    parser.add_argument("--core", default="0", help="CPU that ringside runs on")
    parser.add_argument("--trials", type=int, default=20, help="number of repetitions in `tokens` and `replay`")
    parser.add_argument("--seconds", type=float, default=600, help="duration of `mixture`; default: 600")
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    args = parser.parse_args()
    setup = Setup(args)
    applicable = setup.connector.checks + setup.connector.named
    for name in args.checks:
        if name not in applicable:
            parser.error(f"{name} is no check for {args.kv_connector}; there are {' '.join(applicable)}")
    for name in args.checks or setup.connector.checks:
        print(f"-- {name}: {CHECKS[name].__doc__}", flush=True)
        started = time.monotonic()
        CHECKS[name](setup)
        print(f"   {time.monotonic() - started:.0f} s")
    print(f"{len(rig.failures)} failed" if rig.failures else "all passed")
    sys.exit(bool(rig.failures))


if __name__ == "__main__":
    main()
