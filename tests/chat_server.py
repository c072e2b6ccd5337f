"""A real HTTP server on localhost with the chat part of the OpenAI protocol, and with scripted failures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], str]  # status, headers, body


def chat_reply(text: str | None) -> Response:
    """Return a chat completion with this text."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    return 200, {}, json.dumps({"object": "chat.completion", "choices": choices})


class ChatServer:
    """respond: returns the response to a request. requests: (path, headers, body) of all received requests.
    peak: the largest number of concurrent requests. sent: bytes of each response, rounded up to MiB."""

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any]], Response] = lambda request: chat_reply("Score: 5")
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.active = self.peak = 0
        self.sent: list[int] = []
        self.released = threading.Event()
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with chat._lock:
                    chat.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, request))
                    chat.active += 1
                    chat.peak = max(chat.peak, chat.active)
                status, headers, body = chat.respond(request)
                with chat._lock:
                    chat.active -= 1
                self.send_response(status)
                for name, value in ({"content-length": str(len(body.encode()))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                raw, sent = body.encode(), 0
                with suppress(ConnectionError):  # a client may have read enough
                    for start in range(0, len(raw), 1 << 20):
                        self.wfile.write(raw[start : start + (1 << 20)])
                        sent = start + (1 << 20)
                chat.sent.append(sent)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def questions(self) -> list[str]:
        """The text of every received question."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]

    def script(self, *responses: Response) -> None:
        """Return these responses in turn, then repeat the last one."""
        left = list(responses)
        self.respond = lambda request: left.pop(0) if len(left) > 1 else left[0]

    def hang(self) -> Response:
        """Do not respond before the test ends."""
        self.released.wait(30)
        return chat_reply("too late")


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Run a server during the block."""
    chat = ChatServer()
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.released.set()
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()
