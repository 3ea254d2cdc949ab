"""A server on loopback that answers as it is told: well, badly, late, half, or not at all."""

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["FaultServer", "Hang", "Reply", "Reset", "chat_reply", "user_text"]


@dataclass(frozen=True)
class Reply:
    """An answer; with `cut` the connection ends before its last bytes."""

    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


@dataclass(frozen=True)
class Hang:
    """Nothing for a while, then nothing more."""

    seconds: float


@dataclass(frozen=True)
class Reset:
    """The connection is reset before a byte of the answer."""


def chat_reply(text: str | None) -> Reply:
    answer = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
    return Reply(json.dumps(answer))


def user_text(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports what went wrong in the test's own answer, not that a client went away.

        A client that gives up may reset its connection at any point, between two requests too.
        """
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FaultServer:
    """Calls `answer(body, number)` for the request of that number, counted from 0."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply | Hang | Reset]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.authorizations: list[str | None] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._answer = answer
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _take(self, handler: BaseHTTPRequestHandler) -> tuple[dict[str, Any], int]:
        num_bytes = int(handler.headers["Content-Length"] or 0)
        content = handler.rfile.read(num_bytes)
        if len(content) < num_bytes:
            raise ConnectionAbortedError("the client went away between the head and the body")
        body = json.loads(content or "{}")
        with self._lock:
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.authorizations.append(handler.headers["Authorization"])
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return body, len(self.bodies) - 1

    def _handler(server: Self) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body, number = server._take(self)
                try:
                    self._send(server._answer(body, number))
                finally:
                    with server._lock:
                        server._at_once -= 1

            do_GET = do_POST

            def _send(self, reply: Reply | Hang | Reset) -> None:
                if isinstance(reply, Hang):
                    time.sleep(reply.seconds)
                    return
                if isinstance(reply, Reset):
                    # Lingering for no time at all sends RST instead of FIN.
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    return
                content = reply.body.encode()
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) - reply.cut])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
