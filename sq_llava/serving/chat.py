"""Turns requests into prompts, and generated text into completions, whole or as a stream of server-sent events."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from PIL import Image

from sq_llava.data.messages import images_of
from sq_llava.inference.asking_first import OwnTurns, split_last_turn
from sq_llava.inference.assistant import Assistant
from sq_llava.inference.dialogues import DESCRIBE
from sq_llava.inference.prompts import context_length, pixel_values, token_ids
from sq_llava.inference.settings import AskSettings
from sq_llava.serving.decoding import Prompt, Sampling
from sq_llava.serving.engine import Engine, Failure, Generation, Piece
from sq_llava.serving.images import TooLarge, decode_data_url, decode_image, fetch, num_pixels
from sq_llava.serving.metrics import Metrics
from sq_llava.serving.schema import ApiError, ChatCompletionRequest, ImagePart, TextPart, error_body
from sq_llava.serving.settings import Limits


# The defaults of `sq-llava ask` and of the authors' code.
QUESTION_SAMPLING = {name: getattr(AskSettings, name) for name in ("temperature", "top_p", "top_k")}
DEFAULT_NEW_TOKENS = 512
# Number of threads that decode images and encode prompts.
PREPARING_THREADS = 2


@dataclass(frozen=True)
class Ready:
    """
    A request with its encoded prompt.

    Args:
        extra (`dict`): Fields of the reply about what came before: `first_answer` (`self_question`), or `asked`
            (`self_questions`).
        extra_tokens (`int`): Number of tokens generated for that.
    """

    chat: ChatCompletionRequest
    prompt: Prompt
    sampling: Sampling
    extra: dict = field(default_factory=dict)
    extra_tokens: int = 0


class ChatService:
    """
    Answers the chat completions of one server.

    Args:
        model_name (`str`): Name of the model for clients.
    """

    def __init__(self, assistant: Assistant, engine: Engine, model_name: str, limits: Limits, metrics: Metrics):
        self.processor = assistant.processor
        self.engine = engine
        self.model_name = model_name
        self.limits = limits
        self.metrics = metrics
        self.created = int(time.time())
        self.context_length = context_length(assistant.model)
        self.longest_token = max(map(len, self.processor.tokenizer.get_vocab()))
        self.encoding = threading.Lock()
        # A separate executor limits the work of cancelled requests, because a thread cannot be interrupted.
        self.preparing = ThreadPoolExecutor(PREPARING_THREADS, "preparing")

    async def _in_thread(self, function: Callable, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.preparing, function, *arguments)

    async def prepare(self, chat: ChatCompletionRequest) -> Ready:
        """
        Checks a request and encodes its prompt.

        Raises:
            ApiError: if the request is invalid, too large, or for another model.
        """
        if chat.model != self.model_name:
            message = f"The model {chat.model!r} does not exist: this server has {self.model_name!r}."
            raise ApiError(404, message, "model_not_found", "model")
        if (chat.n or 1) > self.engine.max_batch_size:
            message = f"n is {chat.n}, but this server generates at most {self.engine.max_batch_size} texts at a time."
            raise ApiError(400, message, param="n")
        images = await self._read_images(chat)
        messages = await self._in_thread(self._place_images, chat, images)
        # The model has learned to ask only after an answer.
        answers_first = chat.asks and messages[-1]["role"] != "assistant"
        if answers_first:
            _describe_unless_asked(messages)
        # The limits are for what the client sends. What the model adds to it is kept short enough.
        prompt = await self._in_thread(self._encode, messages, chat.asks and not answers_first, True)
        sampling = self._sampling(chat, len(prompt.input_ids))
        if chat.self_questions:
            messages, extra, num_tokens = await self._ask_itself(chat, messages, sampling)
        elif answers_first:
            own_turns = OwnTurns(self.context_length, 0, sampling.max_new_tokens, most=sampling.max_new_tokens)
            answer = await self._add_turn(messages, sampling, partial(own_turns.length, turns_left=1))
            extra, num_tokens = {"first_answer": answer.content}, answer.num_tokens
        else:
            return Ready(chat, prompt, sampling)
        prompt = await self._in_thread(self._encode, messages, chat.asks)
        room = self.context_length - len(prompt.input_ids)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return Ready(chat, prompt, sampling, extra, num_tokens)

    async def _ask_itself(
        self, chat: ChatCompletionRequest, messages: list[dict], sampling: Sampling
    ) -> tuple[list[dict], dict, int]:
        """Returns messages with the model's own questions and answers, these as fields, and the number of tokens."""
        if not images_of(messages) or messages[-1]["role"] == "assistant":
            message = "self_questions needs an image, and messages that end with a user turn."
            raise ApiError(400, message, param="self_questions")
        messages, last = split_last_turn(messages)
        last_tokens = len((await self._in_thread(self._encode, [last], False)).input_ids)
        own_turns = OwnTurns(self.context_length, last_tokens, sampling.max_new_tokens)
        asks = [True, False] * chat.self_questions
        if messages[-1]["role"] != "assistant":
            asks.insert(0, False)  # the description
        turns = []
        for place, ask in enumerate(asks):
            length = partial(own_turns.length, turns_left=len(asks) - place, ask=ask)
            turns.append(await self._add_turn(messages, sampling, length, ask))
        own = [turn.content for turn in turns[len(asks) % 2 :]]
        asked = [{"question": question, "answer": answer} for question, answer in zip(own[::2], own[1::2])]
        return [*messages, last], {"asked": asked}, sum(turn.num_tokens for turn in turns)

    async def _add_turn(
        self, messages: list[dict], sampling: Sampling, length: Callable[[int], int], ask: bool = False
    ) -> "_Text":
        """
        Generates the next turn, an answer (greedy) or a question (sampled), and appends it to `messages`.

        Args:
            sampling (`Sampling`): The settings of the request. Only their seed is used.
            length (`Callable`): Maximum length of the turn after a prompt of so many tokens.
        """
        prompt = await self._in_thread(self._encode, messages, ask)
        settings = QUESTION_SAMPLING if ask else {}
        sampling = Sampling(length(len(prompt.input_ids)), seed=sampling.seed, **settings)
        text = await self._generate_one(prompt, sampling)
        messages.append({"role": "vusr" if ask else "assistant", "content": [{"type": "text", "text": text.content}]})
        return text

    async def _read_images(self, chat: ChatCompletionRequest) -> list[tuple[str, bytes]]:
        """The place of each image in the request, and its file."""
        places = [
            (f"messages[{index}].content[{part_index}].image_url", part.image_url.url)
            for index, message in enumerate(chat.messages)
            if not isinstance(message.content, str)
            for part_index, part in enumerate(message.content)
            if isinstance(part, ImagePart)
        ]
        if len(places) > self.limits.max_images:
            message = f"The request has {len(places)} images: at most {self.limits.max_images} are allowed."
            raise ApiError(400, message, "too_many_images", "messages")
        found, pixels, remote_bytes_left = [], 0, self.limits.max_body_bytes
        for place, url in places:
            try:
                if url.startswith("data:"):
                    data = await self._in_thread(decode_data_url, url)
                elif url.startswith(("http://", "https://")) and self.limits.allow_remote_images:
                    data = await fetch(url, remote_bytes_left)
                    remote_bytes_left -= len(data)
                elif url.startswith(("http://", "https://")):
                    raise ValueError("is a remote image, which this server does not fetch. Send it as a data: URL")
                else:
                    raise ValueError("is not a data: URL")
                pixels += await self._in_thread(num_pixels, data)
            except TooLarge as error:
                most = f"{self.limits.max_body_bytes:,}"
                message = f"{place}: the remote images of a request may have at most {most} bytes together."
                raise ApiError(413, message, "request_too_large", place) from error
            except ValueError as error:
                raise ApiError(400, f"{place} {error}.", "invalid_image", place) from error
            if pixels > self.limits.max_pixels:
                message = (
                    f"{place}: the images have more than {self.limits.max_pixels:,} pixels in total. Send smaller "
                    "images."
                )
                raise ApiError(400, message, "image_too_large", place)
            found.append((place, data))
        return found

    def _place_images(self, chat: ChatCompletionRequest, images: list[tuple[str, bytes]]) -> list[dict]:
        """Messages for the chat template, with decoded images. They contain no path and no URL."""
        images, messages = iter(images), []
        for message in chat.messages:
            role = "system" if message.role == "developer" else message.role
            is_text = isinstance(message.content, str)
            content = [TextPart(type="text", text=message.content)] if is_text else message.content
            parts = [
                {"type": "image", "image": self._decode(*next(images))}
                if isinstance(part, ImagePart)
                else {"type": "text", "text": part.text}
                for part in content
            ]
            messages.append({"role": role, "content": parts})
        return messages

    def _decode(self, place: str, data: bytes) -> Image.Image:
        try:
            return self.processor.image_processor.pad_and_resize(decode_image(data))
        except ValueError as error:
            raise ApiError(400, f"{place} {error}.", "invalid_image", place) from error

    def _encode(self, messages: list[dict], ask: bool, is_sent: bool = False) -> Prompt:
        """`is_sent`: the messages are those of the client, without turns of the model, so the limits apply."""
        most = (is_sent and self.limits.max_prompt_tokens) or self.context_length - 1
        parts = [part for message in messages for part in message["content"]]
        images = sum(part["type"] == "image" for part in parts)
        # Tokenizing takes time, so first refuse what is certainly too long.
        characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        at_least = images * self.processor.image_seq_length + characters // self.longest_token
        if at_least <= most:
            prompt = self._tokenize(messages, ask)
            at_least = len(prompt.input_ids)
        if at_least > most:
            message = f"The prompt has at least {at_least} tokens, but at most {most} are allowed."
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return prompt

    def _tokenize(self, messages: list[dict], ask: bool) -> Prompt:
        try:
            # A fast tokenizer must not be used by two threads at the same time.
            with self.encoding:
                [input_ids] = token_ids(self.processor, [messages], ask)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_messages", "messages") from error
        images = images_of(messages)
        return Prompt(input_ids, pixel_values(self.processor, images) if images else None)

    def _sampling(self, chat: ChatCompletionRequest, num_prompt_tokens: int) -> Sampling:
        room = self.context_length - num_prompt_tokens
        wanted = chat.max_completion_tokens or chat.max_tokens
        if (wanted or 1) > room:
            message = (
                f"The prompt has {num_prompt_tokens} tokens and {wanted or 1} are to be generated, but this model's "
                f"context has only {self.context_length} tokens."
            )
            raise ApiError(400, message, "context_length_exceeded", "messages")
        stop = (chat.stop,) if isinstance(chat.stop, str) else tuple(chat.stop or ())
        defaults = QUESTION_SAMPLING if chat.asks else {"temperature": 1.0, "top_p": 1.0, "top_k": None}
        given = {name: getattr(chat, name) for name in defaults if getattr(chat, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = None
        return Sampling(wanted or min(DEFAULT_NEW_TOKENS, room), seed=chat.seed, stop=stop, **{**defaults, **given})

    async def pieces(self, prompt: Prompt, sampling: Sampling, num_rows: int) -> AsyncIterator[Piece]:
        """
        Generates `num_rows` texts. The generation stops when the caller stops reading.

        Yields:
            The pieces of all texts, as they are generated.

        Raises:
            ApiError: if generation fails.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: Piece | Failure) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, event)
            except RuntimeError:  # the event loop has ended, so nobody waits any more
                generation.cancel()

        generation = Generation(prompt, sampling, num_rows, deliver)
        unfinished = set(range(num_rows))
        started = time.monotonic()
        try:
            self.engine.submit(generation)
            while unfinished:
                event = await queue.get()
                if isinstance(event, Failure):
                    raise ApiError(500, event.message, "generation_failed")
                self.metrics.count_piece(event, started)
                if event.finish_reason is not None:
                    unfinished.discard(event.index)
                yield event
        finally:
            generation.cancel()

    async def _generate_one(self, prompt: Prompt, sampling: Sampling) -> "_Text":
        text = _Text()
        async for piece in self.pieces(prompt, sampling, 1):
            text.add(piece)
        return text

    async def complete(self, ready: Ready) -> dict:
        """Generates the whole `chat.completion`."""
        num_rows = ready.chat.n or 1
        texts = [_Text() for _ in range(num_rows)]
        async for piece in self.pieces(ready.prompt, ready.sampling, num_rows):
            texts[piece.index].add(piece)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text.content},
                "logprobs": None,
                "finish_reason": text.finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        body = {**self._head("chat.completion"), "choices": choices, "usage": _usage(ready, texts)}
        return {**body, **ready.extra}

    async def stream(self, ready: Ready) -> AsyncIterator[str]:
        """Generates `chat.completion.chunk`s as server-sent events, with `[DONE]` at the end."""
        num_rows = ready.chat.n or 1
        options = ready.chat.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if with_usage else {})}
        for index in range(num_rows):
            yield _event({**head, **ready.extra, "choices": [_delta(index, {"role": "assistant", "content": ""})]})
        texts = [_Text() for _ in range(num_rows)]
        try:
            async for piece in self.pieces(ready.prompt, ready.sampling, num_rows):
                texts[piece.index].add(piece)
                if piece.text:
                    yield _event({**head, "choices": [_delta(piece.index, {"content": piece.text})]})
                if piece.finish_reason is not None:
                    yield _event({**head, "choices": [_delta(piece.index, {}, piece.finish_reason)]})
        except ApiError as error:
            yield _event(error.body())
            return
        if with_usage:
            yield _event({**head, "choices": [], "usage": _usage(ready, texts)})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model_name,
        }


@dataclass
class _Text:
    """The text of one row so far."""

    content: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.content += piece.text
        self.num_tokens = piece.num_tokens
        self.finish_reason = piece.finish_reason


def _describe_unless_asked(messages: list[dict]) -> None:
    """If the last turn has no text, lets it ask for a description of the image."""
    last = messages[-1]
    if not any(part["type"] == "text" and part["text"].strip() for part in last["content"]):
        last["content"] = [*last["content"], {"type": "text", "text": DESCRIBE}]


def _usage(ready: Ready, texts: list[_Text]) -> dict:
    prompt_tokens = len(ready.prompt.input_ids)
    completion_tokens = ready.extra_tokens + sum(text.num_tokens for text in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _delta(index: int, delta: dict, finish_reason: str | None = None) -> dict:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def timeout_event(seconds: float) -> bytes:
    return _event(error_body(504, f"The request took more than {seconds:g} seconds.", "timeout")).encode()
