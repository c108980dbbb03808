"""A server for chat completions on this machine. The test decides how it answers or fails."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "sk-secret-0123456789"


@dataclass
class Reply:
    """
    The server's reaction to a request.

    Args:
        text (`str`): Text of the answer.
        body (`str`, *optional*): The whole body, instead of `text`.
        seconds (`float`): Time before the answer.
        closes (`bool`): Close the connection without an answer.
        cuts (`bool`): Send half of the body, then close the connection.
        billed (`tuple[int, int]`): Prompt and answer tokens that the server charges for a reply with the status 200.
    """

    text: str = ""
    body: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    closes: bool = False
    cuts: bool = False
    billed: tuple[int, int] = (100, 10)


@dataclass
class ChatServer:
    """
    The requests (their bodies) that came in, the highest number of requests at the same time, and the prompt and
    answer tokens that the server charges.
    """

    url: str
    requests: list[dict] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    billed: tuple[int, int] = (0, 0)


def completion(
    text: object, prompt_tokens: object = 100, completion_tokens: object = 10, finish_reason: str = "stop", **fields
) -> str:
    """The body of a reply. `fields` are added to it, or replace its fields."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choices = [{"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}]
    body = {"id": "1", "object": "chat.completion", "model": "judge-2026", "choices": choices, "usage": usage}
    return json.dumps(body | fields, ensure_ascii=False)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Callable[[dict, int], Reply | str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.lock, self.under_way = reply, threading.Lock(), 0
        self.state = ChatServer(f"http://127.0.0.1:{self.server_port}/v1")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, state = self.server, self.server.state
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = state.requests.count(request)
            state.requests.append(request)
            state.authorizations.append(self.headers["Authorization"])
            state.times.append(time.monotonic())
            server.under_way += 1
            state.most_at_once = max(state.most_at_once, server.under_way)
        try:
            said = server.reply(request, number)
            said = Reply(text=said) if isinstance(said, str) else said
            if said.status == 200:
                with server.lock:
                    state.billed = tuple(map(sum, zip(state.billed, said.billed)))
            self.send(said)
        finally:
            with server.lock:
                server.under_way -= 1

    def send(self, said: Reply):
        time.sleep(said.seconds)
        if said.closes:
            self.close_connection = True
            return
        body = completion(said.text) if said.body is None else said.body
        body = body.encode("utf-8", "backslashreplace")  # half surrogate pairs become JSON escapes
        self.send_response(said.status)
        for name, value in {"Content-Type": "application/json", **said.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if said.cuts else body)
        self.close_connection = self.close_connection or said.cuts

    def log_message(self, *args):
        pass  # by default, it writes to standard error


@contextmanager
def chat_server(reply: Callable[[dict, int], Reply | str]) -> Iterator[ChatServer]:
    """
    Args:
        reply (`Callable`): (body of the request, how often the same body came before) -> [`Reply`], or its text.
    """
    server = _Server(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
