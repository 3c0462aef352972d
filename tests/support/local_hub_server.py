"""How the stand-in for the Hugging Face Hub talks HTTP, and lets requests fail where a test wants it."""

import contextlib
import json
import re
import socket
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from support.local_hub_storage import Refusal


@dataclass
class Reply:
    """Content other than bytes is sent as JSON."""

    content: object
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def refused(refusal: Refusal) -> Reply:
    headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
    return Reply({"error": str(refusal)}, refusal.status, headers)


@dataclass
class Fault:
    """Lets requests fail that have this method and an address, without its query, that is all of `pattern`.

    They are answered with `status`, or, with `drop_after`, lose their connection once that many bytes of their body
    have arrived; nothing comes of them. This happens `times` times (None: always), then they work again.

    Clients send most requests up to five times more after 408, 429, 5xx and broken connections, and wait 23 seconds in
    all between them; a failure that they are to see takes `times=6`. Creating repositories, branches and commits is
    tried once.
    """

    method: str
    pattern: str
    status: int = 500
    drop_after: int | None = None
    times: int | None = 1

    def strikes(self, method: str, path: str) -> bool:
        if self.times == 0 or method != self.method or not re.fullmatch(self.pattern, path):
            return False
        if self.times is not None:
            self.times -= 1
        return True


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end for `bytes=4-7` or `bytes=4-`, the forms that clients send; None where all is asked for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if match is None:
        return None
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size


class Handler(BaseHTTPRequestHandler):
    """Passes requests to the `hub` of its server."""

    protocol_version = "HTTP/1.1"  # clients reuse connections
    disable_nagle_algorithm = True  # head and content are two writes; the second must not wait for the first's receipt

    def _handle(self) -> None:
        size, fault = int(self.headers.get("Content-Length", 0)), self.server.hub.fault(self.command, self.path)
        if fault and fault.drop_after is not None:
            self.rfile.read(min(size, fault.drop_after))
            self._drop()
            return
        body = self.rfile.read(size)
        if len(body) < size:  # the client is gone
            self.close_connection = True
        elif fault:
            self._send(Reply({"error": "a test wants this to fail"}, fault.status))
        else:
            self._send(self.server.hub.answer(self.command, self.path, self.headers, body))

    def _drop(self) -> None:
        """Close without the usual farewell: the client finds its connection reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def _send(self, reply: Reply) -> None:
        content = reply.content if isinstance(reply.content, bytes) else json.dumps(reply.content).encode()
        kind = "application/octet-stream" if isinstance(reply.content, bytes) else "application/json"
        with contextlib.suppress(ConnectionError):  # streaming clients hang up when they have read enough
            self.send_response(reply.status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *args) -> None:
        """Quiet: tests print what they need."""
