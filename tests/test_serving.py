"""The server as OpenAI's own client sees it, without a port."""

import base64
import io

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from sq_llava.inference import DESCRIBE, Assistant
from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from tests import tiny


LIMITS = Limits(max_body_bytes=200_000, max_images=2, max_pixels=100_000, request_seconds=30)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    processor = tiny.tiny_processor(system_message="Be kind.")
    return Assistant(tiny.tiny_model_for(processor), processor)


@pytest.fixture(scope="module")
def http(assistant):
    with TestClient(create_app(assistant, "tiny", LIMITS, max_batch_size=4)) as client:
        yield client


@pytest.fixture
def client(http) -> OpenAI:
    return OpenAI(http_client=http, base_url="http://testserver/v1", api_key="none", max_retries=0)


def data_url(image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def image_part(image) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def user(text: str, *images) -> dict:
    return {"role": "user", "content": [*map(image_part, images), {"type": "text", "text": text}]}


def ask_for(client: OpenAI, *messages: dict, **settings):
    settings = {"temperature": 0, "max_tokens": 8, **settings}
    return client.chat.completions.create(model="tiny", messages=list(messages), **settings)


def test_answer_to_an_image_is_that_of_the_library(client, assistant):
    reply = ask_for(client, user("What is it?", tiny.picture()))
    assert reply.choices[0].message.content == assistant.answer(tiny.picture(), "What is it?", 8)
    assert reply.choices[0].message.role == "assistant"
    assert reply.model == "tiny"


def test_usage_counts_image_tokens_and_generated_ones(client, assistant):
    text = ask_for(client, user("What is it?")).usage
    image = ask_for(client, user("What is it?", tiny.picture()))
    line_break = len(assistant.processor.tokenizer("\n", add_special_tokens=False).input_ids)
    assert 9 < image.usage.prompt_tokens - text.prompt_tokens <= 9 + line_break + 1
    assert image.choices[0].finish_reason == "length"
    assert image.usage.completion_tokens == 8
    assert image.usage.total_tokens == image.usage.prompt_tokens + 8


def test_stream_gives_the_same_text_in_pieces(client):
    message = user("What is it?", tiny.picture())
    whole = ask_for(client, message, max_tokens=12)
    chunks = list(ask_for(client, message, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
