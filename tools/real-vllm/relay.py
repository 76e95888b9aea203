"""A TCP relay that parses just enough HTTP to inject faults between ringside and a server.

It forwards bytes in both directions. Requests are delimited by their Content-Length and recorded.
Before a request is forwarded, it is passed to a plan, which returns the action to apply, or None.
"""
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Request:
    """One request, as received from ringside."""

    conn: int
    nth: int  # position on its connection, from 1
    path: str
    body: bytes
    done: str = "forwarded"

    @property
    def kv(self):
        """`kv_transfer_params` of the request, or "absent"."""
        try:
            return json.loads(self.body).get("kv_transfer_params", "absent")
        except ValueError:
            return "absent"


@dataclass
class Cut:
    """Forward the request, drop its response, and close both connections.

    `absorb`: before closing the server's connection, wait until its response has ended (for at
        most 30 s). Otherwise close it immediately.
    `between`: called after the server's connection is closed and before the client's is.
    `reset`: close the client's connection with RST instead of FIN.
    """

    absorb: bool
    reset: bool
    between: object = None


@dataclass
class SlowBody:
    """Forward the head of the response immediately and its body `seconds` later."""

    seconds: float


@dataclass
class EditAnswer:
    """Apply `edit` to the body of the response; it must not change the length."""

    edit: object


@dataclass
class _Conn:
    client: socket.socket
    server: socket.socket
    gate: threading.Event = field(default_factory=threading.Event)  # set: response bytes are dropped
    server_done: threading.Event = field(default_factory=threading.Event)
    act: object = None
    swallowed: int = 0
    last: float = field(default_factory=time.monotonic)


class Relay:
    """A relay to `server` that listens on an ephemeral port of 127.0.0.1."""

    def __init__(self, server):
        self.server = server
        self.plan = lambda request: None
        self.requests = []
        self.hold_over = None  # requests with a larger body (in bytes) are not read
        self.held = 0
        self._conns = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def drop_idle(self):
        """Closes all connections, as an engine does with idle connections."""
        with self._lock:
            conns = list(self._conns.values())
            self._conns.clear()
        for conn in conns:
            _close(conn.client, False)
            _close(conn.server, False)

    def _accept(self):
        number = 0
        while True:
            client, _ = self._listener.accept()
            number += 1
            try:
                server = socket.create_connection(self.server)
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = _Conn(client, server)
            with self._lock:
                self._conns[number] = conn
            threading.Thread(target=self._up, args=(number, conn), daemon=True).start()
            threading.Thread(target=self._down, args=(conn,), daemon=True).start()

    def _up(self, number, conn):
        reader = conn.client.makefile("rb")
        nth = 0
        try:
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = reader.readline()
                    if not line:
                        return
                    head += line
                lines = head.decode("latin-1").split("\r\n")
                length = 0
                for header in lines[1:]:
                    name, _, value = header.partition(":")
                    if name.lower() == "content-length":
                        length = int(value)
                    elif name.lower() == "transfer-encoding":
                        raise ValueError("this relay does not support chunked requests")
                if self.hold_over is not None and length > self.hold_over:
                    self.held += 1
                    while self.hold_over is not None:
                        time.sleep(0.05)
                    return
                body = reader.read(length)
                nth += 1
                request = Request(number, nth, lines[0].split(" ")[1], body)
                act = self.plan(request)
                self.requests.append(request)
                conn.act = act
                if isinstance(act, Cut):
                    conn.gate.set()
                conn.server.sendall(head + body)
                if isinstance(act, Cut):
                    self._cut(conn, act, request)
                    return
        except OSError:
            pass
        finally:
            _close(conn.server, False)
            _close(conn.client, False)

    def _cut(self, conn, act, request):
        if act.absorb:
            # Wait until response bytes have arrived and none have followed for 0.4 s.
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                time.sleep(0.02)
                if conn.swallowed and time.monotonic() - conn.last > 0.4:
                    break
        _close(conn.server, False)
        if act.between:
            act.between()
        request.done = f"closed after dropping {conn.swallowed} response bytes"
        _close(conn.client, act.reset)

    def _down(self, conn):
        try:
            while True:
                data = conn.server.recv(65536)
                if not data:
                    break
                if conn.gate.is_set():
                    conn.swallowed += len(data)
                    conn.last = time.monotonic()
                    continue
                act = conn.act
                if isinstance(act, (SlowBody, EditAnswer)):
                    conn.act = None
                    data = _whole_answer(conn.server, data)
                    head, _, body = data.partition(b"\r\n\r\n")
                    if isinstance(act, SlowBody):
                        conn.client.sendall(head + b"\r\n\r\n")
                        time.sleep(act.seconds)
                        data = body
                    else:
                        edited = act.edit(body)
                        assert len(edited) == len(body)
                        data = head + b"\r\n\r\n" + edited
                conn.client.sendall(data)
        except OSError:
            pass
        finally:
            conn.server_done.set()
            if not conn.gate.is_set():
                _close(conn.client, False)


def _whole_answer(server, data):
    """Reads until the response is complete. The response must have a Content-Length."""
    while b"\r\n\r\n" not in data:
        data += server.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                  if line.startswith(b"content-length:"))
    while len(body) < length:
        more = server.recv(65536)
        body += more
        data += more
    return data


def _close(sock, reset):
    try:
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
