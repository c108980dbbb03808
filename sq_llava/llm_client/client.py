"""A client for any OpenAI-compatible chat server. It never pays twice for an answer, and it stays within its caps.

    client = ChatClient(ChatSettings("gpt-4o", max_cost=5, input_price=2.5, output_price=10), Path("answers.jsonl"))
    text = client.complete([{"role": "user", "content": "Hello"}])

Every answer is kept in a journal (`journal.py`) under a hash of everything that it depends on. A killed run resumes
from there. One process at a time may write to a journal. The API key is read from `OPENAI_API_KEY` and is
never written to a file.

A request is sent again after the statuses 408, 409, 429 and 5xx, a timeout, or a lost connection. The client waits for
the seconds of `Retry-After` (at most 120), or else for about 0.5, 1, 2, 4, then 8 seconds. After a timeout or a lost
connection, nobody knows whether the request was billed, so its full price counts against the caps, in later runs too.
The same holds for a response without text. If `NUM_UNANSWERED` requests in a row stay without an answer after all
retries, the client stops.

The user gives the prices. Requests under way when a run is killed are not counted.
"""

import hashlib
import json
import os
import random
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sq_llava.llm_client.journal import Journal
from sq_llava.llm_client.replies import mend, read_completion, retry_after
from sq_llava.llm_client.settings import ChatSettings
from sq_llava.output import output_lock


Messages = Sequence[Mapping[str, Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

# The server would refuse every request: wrong key, no permission for the model, no such model, no money left.
FINAL_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
NO_MONEY = "insufficient_quota"
# The request was not sent. Compared by name: releases of openai use different HTTP libraries, which share these names.
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# After this many failures in a row, each with all retries, the server is probably gone.
NUM_UNANSWERED = 10
LONGEST_BACKOFF = 8.0  # seconds before a retry, if the server names none
# For estimates: English text with its JSON.
BYTES_PER_TOKEN = 4


class ChatStopped(RuntimeError):
    """No more requests: a cap is reached, or the server refuses everything or is gone. Answers are kept."""


class ChatFailure(RuntimeError):
    """The server did not answer one request, even after retries."""


class UnusableAnswer(ChatFailure):
    """The server responded without text."""


class NotAsked(ChatFailure):
    """The journal of a client with `reads_only` has no answer to this `request`."""

    def __init__(self, request: "ChatRequest"):
        super().__init__("not asked yet")
        self.request = request


@dataclass(frozen=True)
class ChatRequest:
    """The body of a request, and the hash under which its answer is kept."""

    key: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Estimate for requests: number of prompt tokens (about) and answer tokens (at most), and their cost."""

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class ChatClient:
    """
    Args:
        settings (`ChatSettings`): The server and the caps.
        journal_path (`Path`): File of the paid answers.
        server_matters (`bool`): Reuse an answer only if it came from the same base URL.
        reads_only (`bool`): Send nothing; no key is needed.

    Attributes:
        before_answer (`Callable`, *optional*): Called before each new answer is kept.

    Raises:
        ValueError: If `OPENAI_API_KEY` is not set.
    """

    before_answer: Callable[[], None] | None = None

    def __init__(
        self, settings: ChatSettings, journal_path: Path, server_matters: bool = False, reads_only: bool = False
    ):
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not reads_only:
            raise ValueError("OPENAI_API_KEY is not set: export it. If your server needs no key, any text will do.")
        self.settings = settings
        self.reads_only = reads_only
        self.api = openai.OpenAI(
            api_key=key or "none", base_url=settings.base_url, max_retries=settings.retries, timeout=settings.timeout
        )
        # The library's own retries would not count against the caps.
        self._once = self.api.with_options(max_retries=0)
        self.base_url = str(self.api.base_url)
        self.journal = Journal(journal_path, reads_only=True)
        self.budget = Budget(settings, self.journal)
        self._server_matters = server_matters
        self._used: dict[str, dict[str, Any]] = {}
        self._lock: ExitStack | None = None
        self._claiming = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._num_unanswered = 0
        self._stopping = threading.Event()

    def claim(self) -> None:
        """
        Locks the journal for this process as long as this client lives. Call it before any request.

        Raises:
            ValueError: If another process holds the lock.
        """
        with self._claiming:
            if self._lock is None:
                lock = ExitStack()
                # Two processes would pay for the same answers.
                lock.enter_context(output_lock(self.journal.path.parent, self.journal.path.name))
                weakref.finalize(self, lock.close)
                self._lock = lock
                # Another process may have added answers.
                self.journal = Journal(self.journal.path)
                self.budget = Budget(self.settings, self.journal)

    def complete(self, messages: Messages, attempt: int = 0) -> str:
        """
        The server's answer, from the journal if it is there.

        Args:
            messages: Messages of the chat completions API, with `role` and `content` (a text or a list of parts).
            attempt (`int`): Each number gets its own answer to the same messages.

        Raises:
            ValueError: If another process writes to the journal.
            UnusableAnswer: If the server's response has no text.
            ChatFailure: If this request gets no answer.
            ChatStopped: If no request can be sent any more.
        """
        request = self.request(messages, attempt)
        line = self.journal.get(request.key)
        if line is None:
            if self.reads_only:
                raise NotAsked(request)
            self.claim()
            # Two threads with the same request pay once.
            with self._asking.setdefault(request.key, threading.Lock()):
                line = self.journal.get(request.key)
                if line is None:
                    line = {"key": request.key, **self._ask(request)}
                    if self.before_answer is not None:
                        self.before_answer()
                    self.journal.add(line)
        self._used[request.key] = line
        return line["answer"]

    def request(self, messages: Messages, attempt: int = 0) -> ChatRequest:
        temperature = min(self.settings.temperature + 0.5 * attempt, max(1.0, self.settings.temperature))
        body = {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_completion_tokens": self.settings.max_tokens,
        }
        depends_on = [self.base_url] if self._server_matters else []
        content = json.dumps([*depends_on, body, attempt], sort_keys=True)
        return ChatRequest(hashlib.sha256(content.encode()).hexdigest(), body)

    def work_on(
        self, items: Mapping[str, Item], work: Callable[[Item], Result], description: str
    ) -> Iterator[tuple[str, Result]]:
        """
        Calls `work` on each item, `concurrency` items at a time, and shows a progress bar with what was spent. Yields
        the id and the result of each item when it is done.

        Raises:
            ValueError: If another process writes to the journal.
            ChatStopped: If no request can be sent any more. Before this or any error of `work` is raised, the
                requests under way are answered and kept.
        """
        self.claim()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        spent = TextColumn("{task.fields[spent]}")
        progress = Progress(*columns, spent, console=Console(stderr=True), transient=True)
        with ThreadPoolExecutor(self.settings.concurrency) as pool, progress:
            bar = progress.add_task(description, total=len(items), spent=self.budget.describe())
            futures = {pool.submit(work, item): id for id, item in items.items()}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    progress.update(bar, advance=1, spent=self.budget.describe())
                    yield futures[future], result
            finally:
                self._stopping.set()  # ends all waiting for a retry
                pool.shutdown(cancel_futures=True)
                self._stopping.clear()

    def report(self) -> dict[str, Any]:
        """Models, dates and number of tokens of the answers since the last report."""
        used, self._used = list(self._used.values()), {}
        return {
            "model": self.settings.model,
            "answered_by": sorted({line["model"] for line in used}),
            "dates": sorted({line["date"] for line in used}),
            "base_url": self.base_url,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "num_answers": len(used),
            "prompt_tokens": sum(line["prompt_tokens"] for line in used),
            "completion_tokens": sum(line["completion_tokens"] for line in used),
        }

    def estimate(self, requests: Iterable[ChatRequest]) -> Estimate:
        """The tokens and the cost of these requests, if every answer has the maximum length."""
        num_requests, prompt_tokens = 0, 0
        for request in requests:
            num_images, num_bytes = measure(request.body["messages"])
            num_requests += 1
            prompt_tokens += num_bytes // BYTES_PER_TOKEN + num_images * self.settings.image_tokens
        completion_tokens = num_requests * self.settings.max_tokens
        cost = self.settings.price(prompt_tokens, completion_tokens)
        return Estimate(num_requests, prompt_tokens, completion_tokens, cost)

    def _say(self, error: Exception) -> str:
        """The text of an error without the API key, which some servers repeat."""
        return mend(str(error)).replace(self.api.api_key, "[OPENAI_API_KEY]")[:500]

    def _ask(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request until it is answered, or as often as the settings allow."""
        for attempt in count():
            try:
                return self._send(request)
            except _Unanswered as error:
                wait = random.uniform(0.75, 1.0) * min(0.5 * 2**attempt, LONGEST_BACKOFF)
                is_last = attempt == self.settings.retries
                if is_last or self._stopping.wait(wait if error.seconds is None else error.seconds):
                    raise self._given_up(error) from None

    def _given_up(self, error: Exception) -> ChatFailure | ChatStopped:
        """Gives up one request, or all of them. The count may be wrong by a few between threads: this does no harm."""
        self._num_unanswered += 1
        if self._num_unanswered < NUM_UNANSWERED:
            return ChatFailure(str(error))
        return ChatStopped(
            f"{self.settings.model}: the server did not answer {self._num_unanswered} requests in a row, each sent "
            f"{self.settings.retries + 1} times: {error} Run again when the server is back: the answers are kept."
        )

    def _send(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request once. A lost request counts in full against the caps, a refused one does not count."""
        num_images, num_bytes = measure(request.body["messages"])
        # No token is shorter than a byte.
        most = num_bytes + num_images * self.settings.image_tokens, self.settings.max_tokens
        self.budget.reserve(*most)
        used = lost = None
        try:
            response = self._once.chat.completions.with_raw_response.create(**request.body).http_response
            self._num_unanswered = 0
            used = most
            line = read_completion(response.text, most)
            used = line["prompt_tokens"], line["completion_tokens"]
            return line
        except ValueError as error:
            lost = self._say(error)
            raise UnusableAnswer(lost) from None
        except openai.APIStatusError as error:
            if isinstance(error, FINAL_ERRORS) or error.code == NO_MONEY:
                raise ChatStopped(f"{self.settings.model}: the server refused: {self._say(error)}") from None
            # Other statuses below 500 concern this one request.
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                self._num_unanswered = 0
                raise ChatFailure(self._say(error)) from None
            raise _Unanswered(self._say(error), retry_after(error.response.headers.get("Retry-After"))) from None
        except openai.APIConnectionError as error:
            name = type(error.__cause__).__name__
            reason = f"{self._say(error)} ({name})"
            if name not in NOT_CONNECTED:
                used, lost = most, reason  # it may have been answered and billed
            raise _Unanswered(reason) from None
        finally:
            self.budget.settle(most, used)
            if lost is not None:
                key = f"{request.key} lost {uuid.uuid4().hex}"  # no request has this key: it is not an answer
                tokens = {"prompt_tokens": most[0], "completion_tokens": most[1]}
                self.journal.add({"key": key, "lost": lost, "date": datetime.now(UTC).date().isoformat(), **tokens})


class _Unanswered(Exception):
    """The server is busy or the connection was lost. `seconds`: how long the server asks to wait, if it says so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


def measure(messages: Messages) -> tuple[int, int]:
    """The number of images in the messages, and the number of bytes of everything else."""
    num_images = 0
    texts = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        images = [part for part in parts if part.get("type") == "image_url"]
        num_images += len(images)
        texts.append({**message, "content": [part for part in parts if part not in images]} if images else message)
    return num_images, len(json.dumps(texts).encode())


class Budget:
    """
    Enforces the caps. Before a request is sent, its maximum cost is reserved. So no cap is exceeded, even with many
    requests under way.
    """

    def __init__(self, settings: ChatSettings, journal: Journal):
        self._settings = settings
        self._changed = threading.Condition()
        lines = journal.all()
        self.num_requests = len(lines)
        self.tokens = sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines)
        self.cost = sum(settings.price(line["prompt_tokens"], line["completion_tokens"]) for line in lines)
        self._reserved_tokens = 0
        self._reserved_cost = 0.0
        self._num_under_way = 0

    def describe(self) -> str:
        cost = "" if self._settings.input_price is None else f", {self.cost:.2f} spent"
        return f"{self.num_requests:,} requests, {self.tokens:,} tokens{cost}"

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> None:
        """
        Reserves the maximum that a request can use. At a cap, it waits for requests under way, which may cost less.

        Raises:
            ChatStopped: If the request does not fit under a cap and none is under way.
        """
        tokens, cost = prompt_tokens + completion_tokens, self._settings.price(prompt_tokens, completion_tokens)
        with self._changed:
            while (reason := self._too_much(tokens, cost)) is not None:
                if not self._num_under_way:
                    raise ChatStopped(f"stopped by {reason} Raise this limit and run again: the answers are kept.")
                self._changed.wait()
            self.num_requests += 1
            self._reserved_tokens += tokens
            self._reserved_cost += cost
            self._num_under_way += 1

    def settle(self, most: tuple[int, int], used: tuple[int, int] | None) -> None:
        """Replaces the reservation by what was used. A request that the server refused (`used` is `None`) is free."""
        with self._changed:
            self._reserved_tokens -= sum(most)
            self._reserved_cost -= self._settings.price(*most)
            self._num_under_way -= 1
            if used is None:
                self.num_requests -= 1
            else:
                self.tokens += sum(used)
                self.cost += self._settings.price(*used)
            self._changed.notify_all()

    def _too_much(self, tokens: int, cost: float) -> str | None:
        max_tokens, max_cost = self._settings.max_total_tokens, self._settings.max_cost
        max_requests, prefix = self._settings.max_requests, self._settings.option_prefix
        if max_requests is not None and self.num_requests >= max_requests:
            return f"{prefix}max-requests {max_requests}."
        if max_cost is not None and self.cost + self._reserved_cost + cost > max_cost:
            spent = f"{self.cost:g} is spent, and the next request can cost up to {cost:g}"
            return f"{prefix}max-cost {max_cost:g}: {spent}."
        if max_tokens is not None and self.tokens + self._reserved_tokens + tokens > max_tokens:
            used = f"{self.tokens} are used, and the next request can use up to {tokens}"
            return f"{prefix}max-total-tokens {max_tokens}: {used}."
        return None
