"""Helpers for the checks: prompts, HTTP, metrics, ringside processes, verdicts."""
import http.client
import json
import os
import random
import re
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
import uuid

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
GENERATE, RESPONSES, MESSAGES = "/inference/v1/generate", "/v1/responses", "/v1/messages"
RND = random.Random()
SYLLABLES = "ba bo ce di fa go hu ka lo mi ne po ra so tu va wi xe yo zu".split()
failures = []


def verdict(ok, what, **figures):
    """Prints a PASS or FAIL line and records failures."""
    text = " ".join(f"{key}={value}" for key, value in figures.items())
    print(f"{'PASS' if ok else 'FAIL'}  {what}" + (f"  [{text}]" if text else ""), flush=True)
    if not ok:
        failures.append(what)
    return ok


def until(condition, seconds=20):
    """Waits until `condition` is true. Returns the seconds that took, or None after `seconds`."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if condition():
            return time.monotonic() - started
        time.sleep(0.005)
    return None


def ids(count=None):
    return [RND.randrange(300, 2000) for _ in range(count or RND.randint(200, 400))]


def words(count=None):
    """Returns random text of about `count` tokens."""
    return " ".join("".join(RND.choices(SYLLABLES, k=2)) for _ in range((count or RND.randint(200, 400)) // 3))


def body(api, prompt, limit=12, stream=False, **more):
    """Returns a greedy request for `limit` tokens.

    `prompt` is a list of token ids for completions and generate, and text for the other APIs.
    """
    if api == GENERATE:
        asked = {"token_ids": prompt, "sampling_params":
                 {"max_tokens": limit, "temperature": 0, "ignore_eos": True}}
    else:
        asked = {"model": "tiny", "temperature": 0}
        if api == COMPLETIONS:
            asked |= {"prompt": prompt, "max_tokens": limit, "ignore_eos": True, "return_token_ids": True}
        elif api == CHAT:
            asked |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit,
                      "ignore_eos": True, "return_token_ids": True}
        elif api == RESPONSES:
            asked |= {"input": prompt, "max_output_tokens": limit, "ignore_eos": True}
        elif api == MESSAGES:
            asked |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit}
    return asked | ({"stream": True} if stream else {}) | more


def prompt_for(api, count=None):
    return ids(count) if api in (GENERATE, COMPLETIONS) else words(count)


def salted(asked):
    """Returns the same request with a random salt, so that it shares no cached prefix."""
    return asked | {"cache_salt": uuid.uuid4().hex}


class Answer:
    """The status and content of a response of any API, whole or streamed."""

    def __init__(self, status, raw, streamed):
        self.status, self.raw, self.tokens, self.text = status, raw, [], ""
        self.done = not streamed
        self.usages = []  # all of a response, in order
        if status != 200:
            return
        if not streamed:
            self._whole(json.loads(raw))
            return
        for event in raw.decode().split("\n\n"):
            for line in event.split("\n"):
                if line.startswith("data: "):
                    self._event(line[6:])

    @property
    def usage(self):
        return self.usages[-1] if self.usages else None

    def _choice(self, choice):
        self.tokens += choice.get("token_ids") or []
        content = choice.get("message") or choice.get("delta") or choice
        self.text += content.get("content") or content.get("text") or ""

    def _usage(self, holder):
        if holder and holder.get("usage"):
            self.usages.append(holder["usage"])

    def _whole(self, answer):
        self._usage(answer)
        for choice in answer.get("choices", []):
            self._choice(choice)
        for block in answer.get("content") or []:
            self.text += block.get("text", "")
        for item in answer.get("output") or []:
            self.text += "".join(part.get("text", "") for part in item.get("content") or [])

    def _event(self, data):
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        for holder in (event, event.get("message"), event.get("response")):
            self._usage(holder)
        for choice in event.get("choices", []):
            self._choice(choice)
        kind = event.get("type", "")
        if kind == "content_block_delta":
            self.text += event["delta"].get("text", "")
        elif kind == "response.output_text.delta":
            self.text += event["delta"]
        elif kind in ("message_stop", "response.completed", "response.incomplete"):
            self.done = True

    def same(self, other):
        return (self.status == other.status == 200 and self.done and other.done
                and (self.tokens or self.text) and (self.tokens, self.text) == (other.tokens, other.text))


def margin(answer):
    """Returns the least difference between the log-probabilities of the two best tokens at any position.

    `answer` is a response to a request with two top log-probabilities. If the margin is large, the text
    does not depend on rounding, which depends on what else is in a batch.
    """
    found = json.loads(answer.raw)["choices"][0]["logprobs"]
    if "content" in found:
        places = [[best["logprob"] for best in place["top_logprobs"]] for place in found["content"]]
    else:
        places = [list(place.values()) for place in found["top_logprobs"]]
    # Two tokens with the same text are one member of a completion's object.
    return min((best[0] - best[1] if len(best) > 1 else 0 for best in (sorted(place)[::-1] for place in places)),
               default=0)


def with_logprobs(api, asked):
    """Returns the same request with the two best log-probabilities of each token, for `margin`."""
    if api == GENERATE:
        return asked | {"sampling_params": asked["sampling_params"] | {"logprobs": 2}}
    return asked | ({"logprobs": True, "top_logprobs": 2} if api == CHAT else {"logprobs": 2})


class Engine:
    """Client for an HTTP server, which is an engine or ringside."""

    def __init__(self, url, prefiller=None):
        parsed = urllib.parse.urlsplit(url)
        self.url, self.host, self.port = url, parsed.hostname, parsed.port
        self.headers = {"content-type": "application/json"}
        if prefiller:
            self.headers["x-prefiller-host-port"] = prefiller

    def without_prefiller(self):
        return Engine(self.url)

    def post_raw(self, path, data, timeout=120, chunked=False):
        conn = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            if chunked:
                pieces = (data[at:at + 7] for at in range(0, len(data), 7))
                conn.request("POST", path, pieces, self.headers, encode_chunked=True)
            else:
                conn.request("POST", path, data, self.headers)
            answer = conn.getresponse()
            return answer.status, answer.read(), answer
        finally:
            conn.close()

    def post(self, path, asked):
        status, raw, _ = self.post_raw(path, json.dumps(asked).encode())
        return Answer(status, raw, bool(asked.get("stream")))

    def begin(self, path, asked):
        """Sends a request and returns the socket, from which the caller reads the response."""
        data = json.dumps(asked).encode()
        sock = socket.create_connection((self.host, self.port), timeout=60)
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        sock.sendall(f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\n{head}"
                     f"content-length: {len(data)}\r\n\r\n".encode() + data)
        return sock

    def is_healthy(self):
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def metric(self, name, **labels):
        return metric(self.url, name, **labels)


def metric(url, name, **labels):
    """Returns the sum of the samples of `name` whose labels include `labels`."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    total = 0.0
    for line in text.splitlines():
        match = re.match(r"([\w:]+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            have = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if all(have.get(key) == value for key, value in labels.items()):
                total += float(match[3])
    return total


class Ringside:
    """A ringside process in front of one decoder."""

    def __init__(self, binary, port, decoder_port, prefiller, *flags, env=None):
        self.admin = f"http://127.0.0.1:{port + 1500}"
        self.command = [binary, "sidecar", "--host", "127.0.0.1", "--port", str(port),
                        "--model-server-host", "127.0.0.1", "--model-server-port", str(decoder_port),
                        "--secure-proxy=false", "--admin-address", f"127.0.0.1:{port + 1500}",
                        *flags]
        # A file, because ringside would stop at a full pipe.
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=self.log,
                                        env=os.environ | (env or {}))
        self.engine = Engine(f"http://127.0.0.1:{port}", prefiller)
        for _ in range(100):
            if self.process.poll() is not None:
                raise SystemExit(f"ringside exited: {self.logged()}")
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("ringside does not listen on its port")

    def logged(self):
        """Returns what ringside has logged so far."""
        return os.pread(self.log.fileno(), 1 << 24, 0).decode(errors="replace")

    def count(self, outcome, reason=None):
        labels = {"outcome": outcome} | ({"reason": reason} if reason else {})
        return int(metric(self.admin, "ringside_pd_requests_total", **labels))

    def outcomes(self):
        """Returns all outcomes counted so far, except those that are 0."""
        with urllib.request.urlopen(self.admin + "/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(r'ringside_pd_requests_total\{outcome="(\w+)",reason="(\w+)"\} (\d+)', text)
        return ",".join(f"{outcome}/{reason}:{count}" for outcome, reason, count in found if count != "0")

    def counter(self, name, **labels):
        return int(metric(self.admin, name, **labels))

    def labelled(self, name):
        """Returns the samples of a metric with one label, except those that are 0."""
        with urllib.request.urlopen(self.admin + "/metrics", timeout=30) as answer:
            found = re.findall(rf'{name}\{{\w+="(\w+)"\}} (\d+)', answer.read().decode())
        return ",".join(f"{label}:{count}" for label, count in found if count != "0") or "none"

    def warnings(self):
        """Returns the warnings and errors in ringside's log, without their times and with N for numbers."""
        lines = (re.sub(r"\x1b\[[0-9;]*m", "", line) for line in self.logged().splitlines())
        return [re.sub(r"\d+", "N", line.split(" ", 1)[-1].strip()) for line in lines
                if re.search(r"^\S+\s+(WARN|ERROR)|panick", line)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Kill the process instead of draining it, so that it stops immediately.
        self.process.kill()
        self.process.wait()
