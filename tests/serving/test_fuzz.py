"""Random requests: whatever a client sends gets an answer, and never a status of 500 or more."""

import base64
import json
from collections import Counter

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from tests import tiny
from tests.serving.test_chat import data_url


SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
LIMITS = Limits(max_body_bytes=100_000, max_images=2, max_pixels=10_000, request_seconds=30)
PICTURE = data_url(tiny.picture())
PNG = base64.b64decode(PICTURE.partition(",")[2])


@pytest.fixture(scope="module")
def http(assistant):
    with TestClient(create_app(assistant, "tiny", LIMITS, 4), raise_server_exceptions=False) as client:
        yield client
        assert client.get("/health").status_code == 200


def check(reply, seen: Counter) -> None:
    seen[reply.status_code] += 1
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_requests_from_the_schema_are_answered(http, mode):
    schema = schemathesis.openapi.from_dict(http.app.openapi())
    operation = schema["/v1/chat/completions"]["POST"]
    seen = Counter()

    @settings(max_examples=30, **SETTINGS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        body = case.body
        if isinstance(body, dict):
            body = {**body, "model": "tiny", "max_tokens": 2, "max_completion_tokens": None}
        content = body if isinstance(body, bytes) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        check(http.request(case.method, case.formatted_path, content=content, headers=headers), seen)

    send()
    assert sum(seen.values()) >= 10 and (mode.is_negative or seen[200])


def broken_image(draw) -> str:
    data = bytearray(PNG)
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=6)):
        data[place] = draw(st.integers(0, 255))
    return "data:image/png;base64," + base64.b64encode(bytes(data[: draw(st.integers(0, len(data)))])).decode()


texts = st.one_of(
    st.text(max_size=30), st.sampled_from(["", "What?", "</s>", "<image>", "[vusr]", "\x00", "\u202e😀"])
)
urls = st.one_of(
    st.just(PICTURE),
    st.composite(broken_image)(),
    st.text(max_size=30),
    st.binary(max_size=50).map(lambda data: "data:image/gif;base64," + base64.b64encode(data).decode()),
    st.sampled_from(["file:///etc/passwd", "http://127.0.0.1/", "data:,", "data:image/png;base64,====", "/dev/zero"]),
)
parts = st.one_of(
    texts.map(lambda text: {"type": "text", "text": text}),
    urls.map(lambda url: {"type": "image_url", "image_url": {"url": url}}),
)
messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "assistant", "system", "vusr", "developer"]),
        "content": st.one_of(texts, st.lists(parts, max_size=3)),
    }
)
requests = st.fixed_dictionaries(
    {
        "model": st.just("tiny"),
        "messages": st.lists(messages, min_size=1, max_size=4),
        "max_tokens": st.integers(1, 3),
    },
    optional={
        "self_question": st.booleans(),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(1, 2**40),
        "n": st.integers(1, 5),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.one_of(texts, st.lists(texts, max_size=5)),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
    },
)


@pytest.mark.slow
def test_almost_valid_requests_are_answered(http):
    seen = Counter()

    @settings(max_examples=150, **SETTINGS)
    @given(body=requests)
    def send(body):
        reply = http.post("/v1/chat/completions", json=body)
        check(reply, seen)
        if reply.status_code == 200 and body.get("stream"):
            assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text

    send()
    assert seen[200] > 20 and seen[400] > 20


def test_any_bytes_are_answered(http):
    @settings(max_examples=60, **SETTINGS)
    @given(body=st.binary(max_size=60), path=st.sampled_from(["/v1/chat/completions", "/v1/models/x", "/", "/v1"]))
    def send(body, path):
        for method in ("POST", "GET"):
            check(http.request(method, path, content=body, headers={"Content-Type": "application/json"}), Counter())

    send()
