"""The server on a port: clients at the same time, clients that disconnect, too many clients, and the shutdown."""

import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from openai import OpenAI
from typer.testing import CliRunner

from sq_llava.cli import main as cli
from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from sq_llava.serving.connections import TimedConnection
from tests import ROOT, tiny
from tests.assistants import tiny_assistant
from tests.processes import free_port
from tests.serving.in_thread import in_thread
from tests.serving.test_chat import ask_for, metric_of, user
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


def client_of(port: int) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.02)


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx2.TransportError:
        return False


def request_without_reading(port: int, **settings) -> socket.socket:
    """Sends a chat completion, and reads nothing of the reply."""
    body = json.dumps({"model": "tiny", "messages": [user("a")], "max_tokens": 900, **settings}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.connect(("127.0.0.1", port))
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return client


@contextmanager
def slow_server(max_batch_size: int = 2, seconds_per_token: float = 0.01, **limits):
    """A server in a thread of this process. Yields its port, and a function that reads one of its metrics."""
    assistant = tiny_assistant()
    forward = assistant.model.forward

    def slow_forward(**inputs):
        time.sleep(seconds_per_token)
        return forward(**inputs)

    assistant.model.forward = slow_forward
    app = create_app(assistant, "tiny", Limits(**{"request_seconds": 30, **limits}), max_batch_size)
    with in_thread(app) as port:

        def metric(name: str) -> float:
            return metric_of(httpx2.get(f"http://127.0.0.1:{port}/metrics").text, name)

        yield port, metric


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    assistant = tiny_assistant()
    # Without an end token, every text has its maximum length.
    assistant.model.generation_config.suppress_tokens.append(assistant.processor.tokenizer.eos_token_id)
    assistant.model.save_pretrained(path)
    assistant.processor.save_pretrained(path)
    return path


@contextmanager
def server_process(folder: Path):
    """`sq-llava serve` in a process of its own. Yields its port and the process."""
    port = free_port()
    command = [warm_python(), "-m", "sq_llava", "serve", str(folder), "--port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: answers(port) or process.poll() is not None, 180)
        assert process.poll() is None, process.communicate()[1][-2000:]
        yield port, process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_eight_clients_get_the_same_together_as_alone_and_the_shutdown_waits_for_them(folder):
    def ask(port: int, number: int) -> str:
        message = user(f"What is it? {'And what else? ' * (number % 3)}", *map(tiny.picture, range(number % 3)))
        reply = ask_for(client_of(port), message, max_tokens=10 + 5 * number, stream=number % 2 == 1)
        if number % 2:
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return reply.choices[0].message.content

    with server_process(folder) as (port, process):
        alone = [ask(port, number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda number: ask(port, number), range(8)))
        assert together == alone and len(set(alone)) > 4

        stream = iter(ask_for(client_of(port), user("What is it?", tiny.picture()), max_tokens=800, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        until(lambda: not answers(port))
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        output = process.communicate(timeout=30)
        assert "Finished server process" in output[1]


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_disconnects_stops_its_generation(stream):
    with slow_server() as (port, metric):
        with request_without_reading(port, temperature=0, stream=stream):
            until(lambda: metric("generated_tokens_total") > 5)
        until(lambda: metric("rows_running") == 0 and metric("requests_under_way") == 0)
        assert metric("generated_tokens_total") < 300


def test_one_request_too_many_gets_status_429():
    with slow_server(max_batch_size=1, max_waiting=1, seconds_per_token=0.02) as (port, metric):
        client = client_of(port)
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(ask_for, client, user("Hello."), max_tokens=60) for _ in range(2)]
            until(lambda: metric("requests_under_way") == 2)
            with pytest.raises(openai.RateLimitError, match="Try again") as error:
                ask_for(client, user("Hello.", *[tiny.picture(0, 400, 400)]))
            assert error.value.response.headers["Retry-After"] == "1"
            assert [reply.result().choices[0].finish_reason for reply in replies] == ["length"] * 2
        assert ask_for(OpenAI(base_url=client.base_url, api_key="x"), user("Hello.")).usage.completion_tokens == 8


def test_request_that_takes_too_long_is_stopped():
    with slow_server(request_seconds=0.6) as (port, metric):
        with pytest.raises(openai.InternalServerError, match=r"more than 0\.6 seconds") as error:
            ask_for(client_of(port), user("Hello."), max_tokens=900)
        assert error.value.status_code == 504 and error.value.code == "timeout"
        texts = []
        with pytest.raises(openai.APIError, match=r"more than 0\.6 seconds"):
            for chunk in ask_for(client_of(port), user("Hello."), max_tokens=900, stream=True):
                texts.append(chunk.choices[0].delta.content)
        assert len(texts) > 5
        with socket.create_connection(("127.0.0.1", port)) as half:  # a body that never comes
            half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert half.recv(1000).startswith(b"HTTP/1.1 504")
        until(lambda: metric("rows_running") == 0 and metric("requests_under_way") == 0, 2)


def test_client_that_does_not_read_is_disconnected(monkeypatch):
    monkeypatch.setattr("sq_llava.serving.app.SECONDS_FOR_LAST_WORDS", 0.2)
    with (
        slow_server(request_seconds=1.0, seconds_per_token=0) as (port, metric),
        request_without_reading(port, temperature=1, stream=True, n=2),
    ):
        until(lambda: metric("requests_under_way") == 1, 2)
        until(lambda: metric("requests_under_way") == 0, 5)


def test_large_body_is_refused_with_a_message():
    with (
        slow_server(max_body_bytes=100_000) as (port, _),
        pytest.raises(openai.APIStatusError, match="more than") as e,
    ):
        ask_for(client_of(port), user("x" * 3_000_000))
    assert e.value.status_code == 413


def test_late_request_joins_the_batch_of_an_earlier_one():
    with slow_server(seconds_per_token=0.01) as (port, metric), ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask_for, client_of(port), user("Hello."), max_tokens=150)
        until(lambda: metric("rows_running") == 1)
        ask_for(client_of(port), user("Hello."), max_tokens=3)
        assert not long.done()
        assert long.result().usage.completion_tokens == 150


def test_command_serves_the_folder_by_its_name_with_the_limits_given(folder, monkeypatch):
    served = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: served.append((app, settings)))
    monkeypatch.setenv("SECRET", "s3cret")
    options = ["--port", "9", "--max-body-mb", "0.001", "--api-key-env", "SECRET", "--device", "cpu"]
    options += ["--header-seconds", "3", "--allowed-hosts", "a.example", "--allowed-hosts", "*.b.example"]
    result = CliRunner().invoke(cli.app, ["serve", str(folder), *options])
    assert result.exit_code == 0, result.output
    ((app, settings),) = served
    assert settings["port"] == 9 and settings["host"] == "127.0.0.1"
    assert settings["http"].func is TimedConnection and settings["http"].keywords == {"header_seconds": 3}
    with TestClient(app, base_url="http://x.b.example:9", headers={"Authorization": "Bearer s3cret"}) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert http.post("/v1/chat/completions", json={"model": "x" * 2000}).status_code == 413
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_api_key_that_is_not_set_is_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.delenv("SECRET", raising=False)
    result = CliRunner().invoke(cli.app, ["serve", "none", "--api-key-env", "SECRET"])
    assert result.exit_code == 1 and "variable SECRET is not set" in " ".join(result.output.split())
