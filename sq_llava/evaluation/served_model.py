"""A model on an OpenAI-compatible server (vLLM, `sq-llava serve`, a paid service) that answers prompts of benchmarks.

    sq-llava evaluate --base-url http://127.0.0.1:8000/v1 --model NAME --tasks pope --data DIR

[`ServedModel`] has the methods of `Assistant` that an evaluation needs, so prompts, parsers and metrics are the same
for both. Requests ask for greedy decoding. Images are sent as PNG, without loss. The server applies the chat template,
and its own limits on images and lengths. Every answer is kept in `served.jsonl` as it arrives
(`sq_llava/llm_client/client.py`), so it is not asked for twice.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai

from sq_llava.data.images import png_data_url
from sq_llava.data.messages import images_of, place_images_of_all
from sq_llava.early_checks import require_key
from sq_llava.evaluation.settings import KEY_VARIABLE, ServerSettings
from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, UnusableAnswer
from sq_llava.llm_client.replies import CUT_OFF, EMPTY, REFUSED


SECONDS_TO_CONNECT = 10.0
# What the client calls unusable is the answer of the model here: a text at its maximum length, none, or a refusal.
ANSWERS = (CUT_OFF, EMPTY, REFUSED)


class ServedModel:
    """
    Args:
        settings (`ServerSettings`): The server, the name of the model, and limits.
        journals (`Sequence[Path]`): Files of the answers received so far. New answers go into the first one.

    Raises:
        ConnectionError: If no server answers, or if it refuses the key.
        ValueError: If the environment variable of `--api-key-env` is not set.
    """

    def __init__(self, settings: ServerSettings, journals: Sequence[Path]):
        variable = settings.api_key_env
        key = os.environ.get(variable, "") if variable == KEY_VARIABLE else require_key(variable)
        self._client = ChatClient(settings, journals[0], server_matters=True, key=key, other_journals=journals[1:])
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
        messages = {str(number): _for_server(each, urls) for number, each in enumerate(conversations)}
        try:
            answers = dict(self._client.work_on(messages, self._answer, None))
        except ChatStopped as stop:
            # Not an error of one example: the run ends.
            raise ConnectionError(f"{stop} Repeat the command to resume.") from stop
        # Only now, so that the other answers of the batch are kept.
        for answer in answers.values():
            if isinstance(answer, ChatFailure):
                raise answer
        return [answers[number] for number in messages]

    def _answer(self, messages: list[dict[str, Any]]) -> str | ChatFailure:
        try:
            return self._client.complete(messages, handled=ANSWERS)
        except UnusableAnswer as error:
            return error.text if error.fault in ANSWERS else error
        except ChatFailure as error:
            return error


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
