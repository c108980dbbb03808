"""A model on an OpenAI-compatible server (vLLM, `sq-llava serve`, a paid service) that answers prompts of benchmarks.

    sq-llava evaluate --base-url http://127.0.0.1:8000/v1 --model NAME --tasks pope --data DIR

[`ServedModel`] has the methods of `Assistant` that an evaluation needs, so prompts, parsers and metrics are the same
for both. Requests ask for greedy decoding. Images are sent as PNG, without loss. The server applies the chat template,
and its own limits on images and lengths. Every answer is kept in `served.jsonl` as it arrives
(`sq_llava/llm_client/client.py`), so it is not asked for twice.
"""

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai

from sq_llava.data.images import png_data_url
from sq_llava.data.messages import images_of, place_images_of_all
from sq_llava.evaluation.settings import KEY_VARIABLE, ServerSettings
from sq_llava.llm_client.client import ChatClient, ChatStopped, UnusableAnswer
from sq_llava.llm_client.replies import CUT_OFF, EMPTY, REFUSED


SECONDS_TO_CONNECT = 10.0
# What the client calls unusable is the answer of the model here: a text at its maximum length, none, or a refusal.
ANSWERS = (CUT_OFF, EMPTY, REFUSED)


class ServedModel:
    """
    Args:
        settings (`ServerSettings`): The server, the name of the model, and limits.
        folder (`Path`): Folder of `served.jsonl`.

    Raises:
        ConnectionError: If no server answers, or if it refuses the key.
        ValueError: If the environment variable of `--api-key-env` is not set.
    """

    def __init__(self, settings: ServerSettings, folder: Path):
        variable = settings.api_key_env
        key = os.environ.get(variable)
        if not key and variable != KEY_VARIABLE:
            raise ValueError(f"--api-key-env: the environment variable {variable} is not set.")
        with _key_in_environment(key or "none"):
            self._client = ChatClient(settings, folder / "served.jsonl", server_matters=True)
        self._check_server(settings)

    def _check_server(self, settings: ServerSettings) -> None:
        url = settings.base_url
        try:
            self._client.api.with_options(max_retries=0, timeout=SECONDS_TO_CONNECT).models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise ConnectionError(f"{url} refuses the key in {settings.api_key_env}.") from error
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"{url}: no server answers ({type(error.__cause__ or error).__name__}). Start it, or correct "
                "--base-url. The URL of most servers ends in /v1."
            ) from error
        except openai.APIStatusError:
            pass  # a server without a list of models

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The messages as text, for the report. The server has the chat template."""
        lines = []
        for message in messages:
            parts = [part.get("text", "<image>") for part in message["content"]]
            lines.append(f"{message['role']}: " + "\n".join(parts))
        return "\n".join(lines)

    def answer_batch(self, requests: list[tuple], max_new_tokens: int) -> list[str]:
        """
        Answers several requests, `concurrency` at a time. Args and Returns: as for `Assistant.answer_batch`.

        Raises:
            ChatFailure: If the server does not answer one of them.
            ConnectionError: If it refuses all, is gone, or a limit is reached.
        """
        conversations = place_images_of_all(requests)
        images = {id(image): image for each in conversations for image in images_of(each)}
        urls = {key: png_data_url(image) for key, image in images.items()}
        self._client.settings = replace(self._client.settings, max_tokens=max_new_tokens)
        with ThreadPoolExecutor(self._client.settings.concurrency) as pool:
            futures = [pool.submit(self._answer, _for_server(each, urls)) for each in conversations]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # after Ctrl+C too: requests under way are answered and kept, the others are not sent
                pool.shutdown(cancel_futures=True)
        if errors := [each.exception() for each in futures if not each.cancelled() and each.exception() is not None]:
            raise next((error for error in errors if isinstance(error, ConnectionError)), errors[0])
        return [each.result() for each in futures]

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._client.complete(messages, handled=ANSWERS)
        except UnusableAnswer as error:
            if error.fault not in ANSWERS:
                raise
            return error.text
        except ChatStopped as stop:
            # Not an error of one example: the run ends.
            raise ConnectionError(f"{stop} Repeat the command to resume.") from stop


def _for_server(messages: list[dict[str, Any]], urls: dict[int, str]) -> list[dict[str, Any]]:
    """Replaces each image by its data URL."""
    return [
        {
            **message,
            "content": [
                {"type": "image_url", "image_url": {"url": urls[id(part["image"])]}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


@contextmanager
def _key_in_environment(key: str) -> Iterator[None]:
    """Sets the variable that [`ChatClient`] reads its key from. The judge may need another key."""
    before = os.environ.get(KEY_VARIABLE)
    os.environ[KEY_VARIABLE] = key
    try:
        yield
    finally:
        if before is None:
            del os.environ[KEY_VARIABLE]
        else:
            os.environ[KEY_VARIABLE] = before
