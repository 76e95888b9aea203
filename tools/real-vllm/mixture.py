"""The check `mixture`: good requests, refused ones and clients that leave, side by side on one ringside.

Good requests come from one client, one after the other, and have prompts whose texts were computed before.
Each has another salt, so that its KV cache has to be computed and transferred again. Neither the
refused requests nor the clients that leave may change a text, delay a good request or leave anything in the
engines. The time in which the whole machine was stopped (see `stops`) counts for no request.
"""
import collections
import http.client
import json
import random
import socket
import struct
import threading
import time
import typing

from rig import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, ids, prompt_for, salted, until, verdict
from stops import Stops

REFUSED_RATE = 2.0  # requests per second, all clients together
REFUSED_CLIENTS = 4
LEAVING_CLIENTS = 2
LEAVING_PAUSE = 1.0  # seconds on average
PROMPTS = 12  # per API
MARGIN = 0.05  # see `rig.margin`
HANG, SLOW, IDLE = 10.0, 2.0, 60.0  # limits in seconds
GIVE_UP = 60.0  # seconds until a client closes a connection that hangs

BIG = 9_999_999  # beyond every vocabulary
# Members that engines refuse. For the generate API they are members of `sampling_params`.
SAMPLING = {
    "temperature -1": {"temperature": -1},
    "temperature of a wrong type": {"temperature": "warm"},
    "top_p 2": {"top_p": 2},
    "top_k -5": {"top_k": -5},
    "min_p 3": {"min_p": 3},
    "frequency_penalty 9": {"frequency_penalty": 9},
    "presence_penalty -9": {"presence_penalty": -9},
    "repetition_penalty 0": {"repetition_penalty": 0},
    "logit_bias beyond the vocabulary": {"logit_bias": {str(BIG): 1}},
    "logit_bias of a wrong type": {"logit_bias": "x"},
    "allowed_token_ids beyond the vocabulary": {"allowed_token_ids": [BIG]},
    "stop_token_ids of a wrong type": {"stop_token_ids": "x"},
    "max_tokens 2.5": {"max_tokens": 2.5},
    "max_tokens -1": {"max_tokens": -1},
    "max_tokens 0": {"max_tokens": 0},
    "min_tokens above the limit": {"min_tokens": 50},
    "n 0": {"n": 0},
    "n of a wrong type": {"n": "two"},
    "seed of a wrong type": {"seed": "x"},
    "malformed grammar": {"structured_outputs": {"grammar": "root ::= ("}},
    "malformed pattern": {"structured_outputs": {"regex": "("}},
    "two structured outputs": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
}
# SGLang's names.
SAMPLING_SGLANG = {
    "malformed grammar": {"ebnf": "root ::= ("},
    "malformed pattern": {"regex": "("},
    "two structured outputs": {"regex": "a", "ebnf": 'root ::= "a"'},
}
OPENAI = {
    "stream maybe": {"stream": "maybe"},
    "unknown model": {"model": "no-such-model"},
    "stream_options without stream": {"stream": False, "stream_options": {"include_usage": True}},
    "unknown response_format": {"response_format": {"type": "nonsense"}},
    "response_format without its schema": {"response_format": {"type": "json_schema"}},
    "response_format with an invalid schema":
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}},
}
ONE_API = {
    CHAT: {
        "messages of a wrong type": {"messages": "hello"},
        "messages that are numbers": {"messages": [5]},
        "no messages": {"messages": []},
        "logprobs too large": {"logprobs": True, "top_logprobs": 1000},
        "top_logprobs without logprobs": {"top_logprobs": 2},
        "forced tool without tools": {"tool_choice": "required"},
    },
    COMPLETIONS: {
        "prompt of a wrong type": {"prompt": {"a": 1}},
        "prompt beyond the vocabulary": {"prompt": [BIG] * 200},
        "prompt longer than the context": {"prompt": [400] * 30_000},
        "no prompt": {"prompt": None},
        "logprobs too large": {"logprobs": 1000},
    },
    GENERATE: {
        "prompt of a wrong type": {"token_ids": "hello"},
        "prompt beyond the vocabulary": {"token_ids": [BIG] * 200},
        "prompt longer than the context": {"token_ids": [400] * 30_000},
        "sampling_params of a wrong type": {"sampling_params": 5},
        "stream maybe": {"stream": "maybe"},
    },
    RESPONSES: {
        "input of a wrong type": {"input": 5},
        "max_tokens -1": {"max_output_tokens": -1},
        "max_tokens 2.5": {"max_output_tokens": 2.5},
        "temperature -1": {"temperature": -1},
        "top_p 2": {"top_p": 2},
        "unknown model": {"model": "no-such-model"},
        "stream maybe": {"stream": "maybe"},
    },
    MESSAGES: {
        "messages of a wrong type": {"messages": "hello"},
        "max_tokens -1": {"max_tokens": -1},
        "max_tokens 2.5": {"max_tokens": 2.5},
        "no max_tokens": {"max_tokens": None},
        "temperature -1": {"temperature": -1},
        "top_p 2": {"top_p": 2},
        "unknown model": {"model": "no-such-model"},
        "stream maybe": {"stream": "maybe"},
        "forced tool without tools": {"tool_choice": {"type": "tool"}},
    },
}


def refused_requests(setup):
    """Returns requests that engines should refuse: the kind, the API and the body, which has a long prompt."""
    found, connector = [], setup.connector
    sampling = SAMPLING | (SAMPLING_SGLANG if GENERATE not in connector.apis else {})
    for api in connector.apis + connector.more_apis:
        kinds = dict(ONE_API[api])
        if api in (CHAT, COMPLETIONS):
            kinds |= OPENAI
        kinds = {kind: members for kind, members in kinds.items() if kind not in connector.fatal}
        for kind, members in kinds.items():
            found.append((kind, api, setup.body(api, prompt_for(api, 300)) | members))
        for kind, members in sampling.items() if api in connector.apis else ():
            asked = setup.body(api, prompt_for(api, 300))
            if api == GENERATE:
                asked["sampling_params"] |= members
            else:
                asked |= members
            found.append((kind, api, asked))
    # The same as streams. The engines refuse them before the first event.
    found += [(kind, api, asked | {"stream": True}) for kind, api, asked in found if "stream" not in asked]
    named = [(f"{kind} ({api}{' stream' if asked.get('stream') is True else ''})", kind, api,
              json.dumps(asked).encode()) for kind, api, asked in found]
    cut = json.dumps(setup.body(COMPLETIONS, ids(300))).encode()
    return named + [("body cut off", "body cut off", COMPLETIONS, cut[:-40]),
                    ("body without an object", "body without an object", CHAT, b'"hello"')]


class Call(typing.NamedTuple):
    """A request, and when it was sent and completed on the monotonic clock."""
    name: str
    start: float
    end: float

    def took(self):
        return self.end - self.start

    def longer_than(self, limit, stops):
        """Returns whether the request took longer than `limit` seconds of a running machine."""
        return self.took() - stops.within(self.start, self.end) > limit


class Mixture:
    """The clients of one run, and what they have seen."""

    def __init__(self, setup, ringside, seconds):
        self.setup, self.ringside = setup, ringside
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.lock = threading.Lock()
        self.good_calls, self.wrong, self.errors, self.prompt_tokens = [], [], [], 0
        self.refused, self.refused_kinds, self.refused_calls = collections.Counter(), set(), []
        self.not_refused, self.left = collections.Counter(), 0

    def describe(self, calls):
        """Returns a line for each of these calls, with the time since the start of the run."""
        return [f"{call.name} {call.took():.2f}s, from {call.start - self.started:.1f}s after the start"
                for call in calls]

    def is_over(self):
        return time.monotonic() >= self.end

    def good(self, cases):
        """Sends good requests one after the other."""
        at = 0
        while not self.is_over():
            api, asked, want = cases[at % len(cases)]
            stream = (at // len(cases) + at) % 2 == 1
            asked = salted(asked | ({"stream": True} if stream else {}))
            started = time.monotonic()
            try:
                got = self.ringside.engine.post(api, asked)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.errors.append(f"{api}: {error!r}")
                continue
            finally:
                at += 1
                self.good_calls.append(Call(f"{api} {'stream' if stream else 'whole'}", started, time.monotonic()))
            if got.status != 200 or not got.done:
                self.errors.append(f"{api}: {got.status} {got.raw[-200:]}")
            elif not got.same(want):
                self.wrong.append(f"{api}: {(got.tokens, got.text)} instead of {(want.tokens, want.text)}")
            self.prompt_tokens += want.usage["prompt_tokens"] if want.usage else 0

    def refuse(self, number, requests):
        """Sends requests that an engine alone refuses, at a fixed rate."""
        turn = number
        started = time.monotonic() + number / REFUSED_RATE
        while True:
            due = started + (turn // REFUSED_CLIENTS) * REFUSED_CLIENTS / REFUSED_RATE
            if due >= self.end:
                return
            time.sleep(max(0, due - time.monotonic()))
            name, kind, api, data, in_stream = requests[turn % len(requests)]
            turn += REFUSED_CLIENTS
            sent = time.monotonic()
            try:
                status, raw, _ = self.ringside.engine.post_raw(api, data, timeout=GIVE_UP)
            except TimeoutError:
                status, raw = "timeout", b""
            except (OSError, http.client.HTTPException) as error:
                status, raw = type(error).__name__, b""
            call = Call(name, sent, time.monotonic())
            with self.lock:
                if in_stream and is_error_event(status, raw):
                    status = "error_event"
                self.refused[status] += 1
                self.refused_kinds.add(kind)
                self.refused_calls.append(call)
                if status != "error_event" and not (isinstance(status, int) and 400 <= status < 500):
                    self.not_refused[f"{name}: {status} {raw[:150]}"] += 1

    def leave(self):
        """Sends requests and closes the connection 0 to 400 ms later."""
        choose = random.Random()
        while not self.is_over():
            api = choose.choice(self.setup.connector.apis)
            asked = self.setup.body(api, prompt_for(api, choose.randint(200, 1500)), limit=100,
                                    stream=choose.random() < 0.5)
            try:
                sock = self.ringside.engine.begin(api, asked)
            except OSError:
                with self.lock:
                    self.errors.append("a client that leaves cannot connect")
                time.sleep(1)
                continue
            time.sleep(choose.uniform(0, 0.4))
            if choose.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            with self.lock:
                self.left += 1
            time.sleep(choose.uniform(0, 2 * LEAVING_PAUSE))


def is_error_event(status, raw):
    """Returns whether a stream reports an error instead of text: engines validate some members too late."""
    events = [line for line in raw.split(b"\n") if line.startswith(b"data: {")]
    return status == 200 and any(b'"error"' in event for event in events)


def percentile(times, part):
    times = sorted(times)
    return times[min(len(times) - 1, int(len(times) * part))] if times else float("nan")


def good_cases(setup):
    """Returns requests and their texts, computed by an engine alone."""
    cases = []
    for number in range(PROMPTS):
        for api in setup.connector.apis:
            asked, want = setup.sure_case(api, limit=12)
            cases.append((api, asked, want))
    return cases


def refused_alone(setup):
    """Returns the requests of `refused_requests` that an engine alone refuses, in random order.

    The last member of each is whether the engine sends status 200 and then an error event.
    """
    refused, accepted = [], []
    for request in refused_requests(setup):
        name, _, api, data = request
        try:
            status, raw, _ = setup.alone.post_raw(api, data, timeout=60)
        except TimeoutError:
            status, raw = "timeout", b""
        except (OSError, http.client.HTTPException) as error:
            raise SystemExit(f"the engine has stopped: {name}: {error!r}")
        in_stream = is_error_event(status, raw)
        if in_stream or isinstance(status, int) and 400 <= status < 500:
            refused.append((*request, in_stream))
        else:
            accepted.append(f"{name}={status}")
    print(f"      {len(refused)} requests that an engine alone refuses, {sum(request[-1] for request in refused)} of "
          f"them in an event of a stream; not refused: {', '.join(accepted) or 'none'}")
    random.shuffle(refused)
    return refused


def run(setup, seconds):
    connector = setup.connector
    cases, refused = good_cases(setup), refused_alone(setup)
    with setup.ringside() as ringside:
        # The first request connects the engines with each other.
        api, asked, want = cases[0]
        first = ringside.engine.post(api, salted(asked))
        assert first.same(want), (first.status, first.raw, want.raw)
        engines = {"prefill": setup.prefill, "decode": setup.decode}
        settled = until(lambda: all(setup.load(engine) == 0 for engine in engines.values()), IDLE)
        assert settled is not None, "the engines are not idle before the run"
        time.sleep(setup.connector.settle)
        base = {name: engine.metric(connector.usage) for name, engine in engines.items()}
        if any(base.values()):
            print(f"      the KV cache is not empty before the run, which can hide what the run leaves: {base}")
        hits = setup.decode.metric(connector.hits) if connector.hits else 0
        expired = setup.prefill.metric(connector.expired) if connector.expired else 0

        mixture = Mixture(setup, ringside, seconds)
        threads = [threading.Thread(target=mixture.good, args=(cases,))]
        threads += [threading.Thread(target=mixture.refuse, args=(number, refused))
                    for number in range(REFUSED_CLIENTS)]
        threads += [threading.Thread(target=mixture.leave) for _ in range(LEAVING_CLIENTS)]
        with Stops() as stops:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        ended = time.monotonic()
        idle, free = {}, {}
        while time.monotonic() - ended < IDLE and len(idle) + len(free) < 2 * len(engines):
            for name, engine in engines.items():
                if name not in idle and setup.load(engine) == 0:
                    idle[name] = time.monotonic() - ended
                if name not in free and engine.metric(connector.usage) <= base[name]:
                    free[name] = time.monotonic() - ended
            time.sleep(0.1)
        # All of these must hold at the same time.
        at_end = {name: (int(setup.load(engine)), engine.metric(connector.usage)) for name, engine in engines.items()}

        times = [call.took() for call in mixture.good_calls]
        total = sum(mixture.refused.values())
        slow = [call for call in mixture.good_calls if call.longer_than(SLOW, stops)]
        hung = [call for call in mixture.refused_calls if call.longer_than(HANG, stops)]
        # Everything that the stops of the machine made late.
        late = [call for call in mixture.good_calls if call.took() > SLOW and call not in slow]
        late += [call for call in mixture.refused_calls if call.took() > HANG and call not in hung]
        for title, found in (("wrong", mixture.wrong), ("error", mixture.errors),
                             ("not refused", mixture.not_refused),
                             ("hung", mixture.describe(hung)), ("slow", mixture.describe(slow)),
                             ("the machine was stopped", mixture.describe(Call("", *stop) for stop in stops.found)),
                             ("late by that", mixture.describe(late))):
            for what in list(found)[:10]:
                print(f"      {title}: {what}")
        enough = total >= seconds * 1000 / 600
        verdict(times and not (mixture.wrong or mixture.errors or mixture.not_refused or hung or slow)
                and enough and len(mixture.refused_kinds) >= 15 and mixture.left > 0,
                f"mixture of {seconds:.0f} s", good=len(times) - len(mixture.wrong) - len(mixture.errors),
                wrong=len(mixture.wrong), errors=len(mixture.errors), p50=f"{percentile(times, 0.5) * 1000:.0f}ms",
                p99=f"{percentile(times, 0.99) * 1000:.0f}ms", max=f"{max(times, default=0) * 1000:.0f}ms",
                over_2s=len(slow), refused=",".join(f"{status}:{count}" for status, count in mixture.refused.most_common()),
                kinds=len(mixture.refused_kinds), not_refused=sum(mixture.not_refused.values()),
                hung=len(hung), late_by_stops=len(late), stops=len(stops.found),
                stopped=f"{sum(end - start for start, end in stops.found):.1f}s",
                refused_max=f"{max((call.took() for call in mixture.refused_calls), default=0) * 1000:.0f}ms",
                left=mixture.left)
        verdict(len(idle) == len(free) == len(engines) and all(
                    load == 0 and usage <= base[name] for name, (load, usage) in at_end.items()),
                "both engines are idle again, with the KV cache at its base",
                **{f"{name}_idle_after": seconds_text(idle.get(name)) for name in engines},
                **{f"{name}_kv_at_base_after": seconds_text(free.get(name)) for name in engines},
                base={name: round(value, 5) for name, value in base.items()},
                at_end=at_end,
                **({"leases_run_out": int(setup.prefill.metric(connector.expired) - expired)}
                   if connector.expired else {}),
                connections_open=ringside.counter("ringside_client_connections"))
        if connector.hits:
            hits = setup.decode.metric(connector.hits) - hits
            verdict(hits > 0.8 * mixture.prompt_tokens > 0, "the decoder has received the prompts",
                    good_prompt_tokens=mixture.prompt_tokens, external_hits=int(hits))
        right = sum(ringside.engine.post(api, salted(asked)).same(want) is True for api, asked, want in cases)
        verdict(right == len(cases), "all texts are right afterwards", right=f"{right}/{len(cases)}")
        print(f"      outcomes: {ringside.outcomes()}")
        print("      stranded: " + ", ".join(
            f"{kind}:{ringside.counter('ringside_stranded_kv_total', outcome=kind)}"
            for kind in ("released", "failed", "left_to_lease"))
            + "; disconnects: " + ringside.labelled("ringside_client_disconnects_total"))
        lines = collections.Counter(ringside.warnings())
        for line, count in lines.most_common(10):
            print(f"      ringside logged {count} times: {line}")


def seconds_text(seconds):
    return "never" if seconds is None else f"{seconds:.1f}s"
