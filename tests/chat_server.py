"""A real HTTP server on the loopback that speaks the chat part of the OpenAI protocol, and fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Response = tuple[int, dict[str, str], str]  # status, headers, body


def says(text: str | None) -> Response:
    """A chat completion."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    return 200, {}, json.dumps({"object": "chat.completion", "choices": choices})


class ChatServer:
    """respond: what to answer to a request; requests: (path, headers, body) of all that came."""

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any]], Response] = lambda request: says("Score: 5")
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.busy = self.most = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with chat._lock:
                    chat.requests.append((self.path, {k.lower(): v for k, v in self.headers.items()}, request))
                    chat.busy += 1
                    chat.most = max(chat.most, chat.busy)
                status, headers, body = chat.respond(request)
                with chat._lock:
                    chat.busy -= 1
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(body.encode()))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def questions(self) -> list[str]:
        """The text of every question that came."""
        return [body["messages"][-1]["content"] for _, _, body in self.requests]

    def script(self, *responses: Response) -> None:
        """Give these responses in turn, and the last one from then on."""
        left = list(responses)
        self.respond = lambda request: left.pop(0) if len(left) > 1 else left[0]

    def hang(self) -> Response:
        """Answer when the test is over."""
        self.released.wait(30)
        return says("too late")


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Run a server while the block runs."""
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
