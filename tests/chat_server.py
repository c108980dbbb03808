"""A chat completions server on this machine that answers, and fails, as a test says; it has a Batch API, too."""

import email
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server does with a request: an answer, another body, a refusal, or nothing at all."""

    text: str = ""
    body: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    closes: bool = False
    cuts: bool = False


@dataclass
class ChatServer:
    """
    `requests` are the bodies that came in, singly or in batches; `most_at_once` is how many were under way at a time.
    A batch takes `num_looks` looks to be done. The answers to the first `num_lost` creations of batches are lost, and
    the first `num_cut` files are cut off.
    """

    url: str
    requests: list[dict] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict] = field(default_factory=dict)
    has_batches: bool = True
    num_looks: int = 1
    num_lost: int = 0
    num_cut: int = 0


def completion(text: str | None, prompt_tokens: int = 100, completion_tokens: int = 10) -> str:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    return json.dumps(
        {"id": "1", "object": "chat.completion", "model": "judge-2026", "choices": choices, "usage": usage}
    )


@contextmanager
def chat_server(reply: Callable[[dict, int], Reply | str]) -> Iterator[ChatServer]:
    """
    Args:
        reply (`Callable`): (body of the request, how often the same body came before) -> what to do.
    """
    lock = threading.Lock()
    under_way = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            nonlocal under_way
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if not self.path.endswith("/chat/completions"):
                if not server_state.has_batches:
                    self.send(Reply(status=404, body="{}"))
                else:
                    is_file = self.path.endswith("/files")
                    self.send(self.upload(content) if is_file else self.create(json.loads(content)))
                return
            request = json.loads(content)
            with lock:
                number = server_state.requests.count(request)
                server_state.requests.append(request)
                server_state.authorizations.append(self.headers["Authorization"])
                server_state.times.append(time.monotonic())
                under_way += 1
                server_state.most_at_once = max(server_state.most_at_once, under_way)
            try:
                said = reply(request, number)
                self.send(Reply(text=said) if isinstance(said, str) else said)
            finally:
                with lock:
                    under_way -= 1

        def upload(self, content: bytes) -> Reply:
            form = email.message_from_bytes(f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode() + content)
            parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
            assert parts["purpose"].get_payload(decode=True) == b"batch"
            return as_reply(add_file(parts["file"].get_payload(decode=True)))

        def create(self, wanted: dict) -> Reply:
            """Answers the whole batch at once, but says so only after some looks."""
            lines = {True: [], False: []}
            for line in map(json.loads, server_state.files[wanted["input_file_id"]].splitlines()):
                said = reply(line["body"], server_state.requests.count(line["body"]))
                said = Reply(text=said) if isinstance(said, str) else said
                server_state.requests.append(line["body"])
                body = json.loads(completion(said.text) if said.body is None else said.body)
                response = {"status_code": said.status, "request_id": "1", "body": body}
                line = {"id": "1", "custom_id": line["custom_id"], "response": response, "error": None}
                lines[said.status == 200].append(json.dumps(line) + "\n")
            batch = {
                "id": f"batch_{len(server_state.batches)}",
                "object": "batch",
                "created_at": 0,
                **wanted,
                "status": "in_progress",
                "looks": 0,
                "output_file_id": add_file("".join(lines[True]).encode())["id"] if lines[True] else None,
                "error_file_id": add_file("".join(lines[False]).encode())["id"] if lines[False] else None,
            }
            server_state.batches[batch["id"]] = batch
            return Reply(closes=True) if len(server_state.batches) <= server_state.num_lost else as_reply(batch)

        def do_GET(self):
            kind, *rest = self.path.partition("?")[0].removeprefix("/v1/").split("/")
            if kind == "files":
                content = server_state.files[rest[0]].decode()
                if server_state.num_cut > 0:
                    server_state.num_cut -= 1
                    content = content[:-20]
                self.send(Reply(body=content))
            elif not rest:
                self.send(as_reply({"object": "list", "data": list(server_state.batches.values()), "has_more": False}))
            else:
                batch = server_state.batches[rest[0]]
                batch["looks"] += 1
                if batch["looks"] > server_state.num_looks and batch["status"] == "in_progress":
                    batch["status"] = "completed"
                self.send(as_reply(batch))

        def send(self, said: Reply):
            time.sleep(said.seconds)
            if said.closes:
                self.close_connection = True
                return
            body = (completion(said.text) if said.body is None else said.body).encode()
            self.send_response(said.status)
            for name, value in {"Content-Type": "application/json", **said.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if said.cuts else body)
            self.close_connection = self.close_connection or said.cuts

        def log_message(self, *args):
            pass  # nothing on the tests' standard error

    def add_file(content: bytes) -> dict:
        file = {"id": f"file_{len(server_state.files)}", "object": "file", "bytes": len(content), "created_at": 0}
        server_state.files[file["id"]] = content
        return {**file, "filename": "requests.jsonl", "purpose": "batch", "status": "processed"}

    def as_reply(value: dict) -> Reply:
        return Reply(body=json.dumps(value))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server_state = ChatServer(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server_state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
