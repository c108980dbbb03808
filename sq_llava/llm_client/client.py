"""A client of any OpenAI-compatible chat server that never pays twice, and never more than it may.

    client = ChatClient(ChatSettings("gpt-4o", max_cost=5, input_price=2.5, output_price=10), Path("answers.jsonl"))
    text = client.complete([{"role": "user", "content": "Hello"}])

Every answer is kept in a journal of JSON lines (`sq_llava/llm_client/journal.py`) under a hash of all that it depends
on: a run that was killed takes it from there. One process at a time may add to it. The key comes from `OPENAI_API_KEY`
alone and is written nowhere.

A request is sent again after 408, 409, 429, 5xx, time-outs and lost connections: after the seconds of `Retry-After`
(up to 120), else after 0.5, 1, 2, 4, ... 8 seconds, a little less by chance. Of time-outs and lost connections nobody
knows whether they are paid: they count in full, in all runs, as do answers that hold no text. If `NUM_UNANSWERED`
requests in a row stay without an answer all the same, nothing more is asked. What this module does not do: know
prices, which are the user's to give; count what was under way when a run was killed.
"""

import hashlib
import json
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import openai
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sq_llava.llm_client.journal import Journal, lock
from sq_llava.llm_client.replies import mend, read_completion, retry_after
from sq_llava.llm_client.settings import ChatSettings


Messages = Sequence[Mapping[str, Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

# The server refuses whatever is sent: a wrong key, no right to the model, no such model, no money left.
FINAL_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
NO_MONEY = "insufficient_quota"
# Nothing was sent. By their names: openai's releases stand on different HTTP libraries, which share these.
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
# So many requests in a row, each sent several times, show that the server is gone, not that one of them is odd.
NUM_UNANSWERED = 10
LONGEST_BACKOFF = 8.0  # seconds before a request is sent again, if the server says nothing
# For an estimate: of English text, with its JSON.
BYTES_PER_TOKEN = 4


class ChatStopped(RuntimeError):
    """Nothing more can be asked in this run: a cap, a server that refuses us or is gone. What is done is kept."""


class ChatFailure(RuntimeError):
    """The server did not answer one request, also when asked again."""


class UnusableAnswer(ChatFailure):
    """The server answered, but with no text."""


class NotAsked(ChatFailure):
    """A client that only reads has no answer to this `request`."""

    def __init__(self, request: "ChatRequest"):
        super().__init__("not asked yet")
        self.request = request


@dataclass(frozen=True)
class ChatRequest:
    """What is sent, and the hash under which its answer is kept."""

    key: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """What requests will take: the tokens of their prompts, roughly, and of the answers, at most."""

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class ChatClient:
    """
    Args:
        settings (`ChatSettings`): Whom to ask, and how much.
        journal_path (`Path`): Of the answers that were paid for.
        server_matters (`bool`): Whether an answer is taken over only if the base URL is the same.
        reads_only (`bool`): Nothing is asked; no key is needed.

    Raises:
        ValueError: if `OPENAI_API_KEY` is not set.
    """

    def __init__(
        self, settings: ChatSettings, journal_path: Path, server_matters: bool = False, reads_only: bool = False
    ):
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not reads_only:
            raise ValueError("OPENAI_API_KEY is not set: export it (any text for a server that needs none).")
        self.settings = settings
        self.reads_only = reads_only
        self.api = openai.OpenAI(
            api_key=key or "none",
            base_url=settings.base_url,
            max_retries=settings.retries,
            timeout=settings.timeout,
        )
        # Sent again within the client, a request would pass the caps.
        self._once = self.api.with_options(max_retries=0)
        self.base_url = str(self.api.base_url)
        self.journal = Journal(journal_path, reads_only=True)
        self.budget = Budget(settings, self.journal)
        self._server_matters = server_matters
        self._used: dict[str, dict[str, Any]] = {}
        self._lock = None
        self._claiming = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._num_unanswered = 0
        self._stopping = threading.Event()

    def claim(self) -> None:
        """
        Lets no other process add to the journal as long as this client lives; done before anything is asked.

        Raises:
            ValueError: if another process does already.
        """
        with self._claiming:
            if self._lock is None:
                self._lock = lock(self.journal.path)
                # Another process may have added to it.
                self.journal = Journal(self.journal.path)
                self.budget = Budget(self.settings, self.journal)

    def complete(self, messages: Messages, attempt: int = 0) -> str:
        """
        The server's answer, from the journal if it is there.

        Args:
            messages: Of the chat completions API: `role` and `content`, a text or its parts.
            attempt (`int`): Another number asks anew.

        Raises:
            ValueError: if another process adds to the journal.
            UnusableAnswer: if the server's answer holds no text.
            ChatFailure: if there is no answer to this request.
            ChatStopped: if there will be none to any.
        """
        request = self.request(messages, attempt)
        line = self.journal.get(request.key)
        if line is None:
            if self.reads_only:
                raise NotAsked(request)
            self.claim()
            # The same request from two threads is paid once.
            with self._asking.setdefault(request.key, threading.Lock()):
                line = self.journal.get(request.key)
                if line is None:
                    line = {"key": request.key, **self._ask(request)}
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
        return ChatRequest(_hash([*depends_on, body, attempt]), body)

    def work_on(
        self, items: Mapping[str, Item], work: Callable[[Item], Result], description: str
    ) -> Iterator[tuple[str, Result]]:
        """
        Calls `work` on each item, as many at a time as requests may be under way, beside a bar that shows what was
        spent. Gives the id and the result of each as it is done.

        Raises:
            ValueError: if another process adds to the journal.
            ChatStopped: once the requests under way have been answered and kept; likewise what else `work` raises.
        """
        self.claim()
        with ThreadPoolExecutor(self.settings.concurrency) as pool, self._bar() as progress:
            bar = progress.add_task(description, total=len(items), spent=self.budget.describe())
            futures = {pool.submit(work, item): id for id, item in items.items()}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    progress.update(bar, advance=1, spent=self.budget.describe())
                    yield futures[future], result
            finally:
                self._stopping.set()  # nothing is sent again
                pool.shutdown(cancel_futures=True)
                self._stopping.clear()

    def report(self) -> dict[str, Any]:
        """Who answered and when, for a result; of what was asked since the last report."""
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
        """The tokens and the cost of these requests."""
        num_requests, prompt_tokens = 0, 0
        for request in requests:
            num_images, num_bytes = measure(request.body["messages"])
            num_requests += 1
            prompt_tokens += num_bytes // BYTES_PER_TOKEN + num_images * self.settings.image_tokens
        completion_tokens = num_requests * self.settings.max_tokens
        cost = self.settings.price(prompt_tokens, completion_tokens)
        return Estimate(num_requests, prompt_tokens, completion_tokens, cost)

    def _most_tokens(self, body: Mapping[str, Any]) -> tuple[int, int]:
        """The most tokens that a request's prompt and answer can have: no token is shorter than a byte."""
        num_images, num_bytes = measure(body["messages"])
        return num_bytes + num_images * self.settings.image_tokens, self.settings.max_tokens

    def _say(self, error: Exception) -> str:
        """Servers put the key that they were sent into their errors."""
        return mend(str(error)).replace(self.api.api_key, "[OPENAI_API_KEY]")[:500]

    def _bar(self) -> Progress:
        """A progress bar whose tasks have a field `spent`."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns, TextColumn("{task.fields[spent]}"), console=Console(stderr=True), transient=True)

    def _note_lost(self, key: str, most: tuple[int, int], reason: str) -> None:
        """
        Puts into the journal what was paid, as far as anybody knows, for no answer.

        Args:
            key: One that no request has, as this is not its answer.
        """
        date = datetime.now(UTC).date().isoformat()
        tokens = {"prompt_tokens": most[0], "completion_tokens": most[1]}
        self.journal.add({"key": key, "lost": reason, "date": date, **tokens})

    def _ask(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request, again where the server is busy or lost, and pays for it."""
        for attempt in count():
            try:
                return self._send(request)
            except _Unanswered as error:
                wait = random.uniform(0.75, 1.0) * min(0.5 * 2**attempt, LONGEST_BACKOFF)
                is_last = attempt == self.settings.retries
                if is_last or self._stopping.wait(wait if error.seconds is None else error.seconds):
                    raise self._given_up(error) from None

    def _given_up(self, error: Exception) -> ChatFailure | ChatStopped:
        """Of one request, or of all that follow. Threads may miscount by a few, which does no harm."""
        self._num_unanswered += 1
        if self._num_unanswered < NUM_UNANSWERED:
            return ChatFailure(str(error))
        return ChatStopped(
            f"{self.settings.model}: the server left {self._num_unanswered} requests in a row without an answer, each "
            f"sent {self.settings.retries + 1} times: {error} Run again when it is there: what was answered is kept."
        )

    def _send(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request once. A lost request counts as paid in full; one that was refused does not count."""
        most = self._most_tokens(request.body)
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
            # What is wrong with a single request is told by another status.
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                self._num_unanswered = 0
                raise ChatFailure(self._say(error)) from None
            raise _Unanswered(self._say(error), retry_after(error.response.headers.get("Retry-After"))) from None
        except openai.APIConnectionError as error:
            name = type(error.__cause__).__name__
            reason = f"{self._say(error)} ({name})"
            if name not in NOT_CONNECTED:
                used, lost = most, reason  # it may have been answered, and the answer lost
            raise _Unanswered(reason) from None
        finally:
            self.budget.settle(most, used)
            if lost is not None:
                self._note_lost(f"{request.key} lost {uuid.uuid4().hex}", most, lost)


class _Unanswered(Exception):
    """The server is busy, for so many seconds if it says so; or lost."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


def measure(messages: Messages) -> tuple[int, int]:
    """The number of images, and the bytes of all that is not an image."""
    num_images = 0
    texts = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        images = [part for part in parts if part.get("type") == "image_url"]
        num_images += len(images)
        texts.append({**message, "content": [part for part in parts if part not in images]} if images else message)
    return num_images, len(json.dumps(texts).encode())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Budget:
    """
    What may still be spent. Before a request is sent, the most that it can cost is set aside, so no cap is passed
    however many requests are under way.
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
        Waits for requests under way: they may turn out cheaper, or be refused.

        Raises:
            ChatStopped: at a cap.
        """
        tokens, cost = prompt_tokens + completion_tokens, self._settings.price(prompt_tokens, completion_tokens)
        with self._changed:
            while (reason := self._too_much(tokens, cost)) is not None:
                if not self._num_under_way:
                    raise ChatStopped(f"stopped by {reason} Raise it and run again: what was answered is kept.")
                self._changed.wait()
            self.num_requests += 1
            self._reserved_tokens += tokens
            self._reserved_cost += cost
            self._num_under_way += 1

    def settle(self, most: tuple[int, int], used: tuple[int, int] | None) -> None:
        """Counts what was used instead of what was set aside; a request that the server refused counts nothing."""
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
            spent = f"{self.cost:g} is spent, and the next request can cost {cost:g}"
            return f"{prefix}max-cost {max_cost:g}: {spent}."
        if max_tokens is not None and self.tokens + self._reserved_tokens + tokens > max_tokens:
            used = f"{self.tokens} are used, and the next request can use {tokens}"
            return f"{prefix}max-total-tokens {max_tokens}: {used}."
        return None
