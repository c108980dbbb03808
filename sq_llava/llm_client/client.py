"""A client for any OpenAI-compatible chat server. It never pays twice for an answer, and it stays within its caps.

    client = ChatClient(ChatSettings("gpt-4o", max_cost=5, input_price=2.5, output_price=10), Path("answers.jsonl"))
    text = client.complete([{"role": "user", "content": "Hello"}])

Every answer is kept in a journal (`journal.py`) under a hash of everything that it depends on. A killed run resumes
from there. One process at a time may write to a journal. The API key is read from `OPENAI_API_KEY` and is
never written to a file.

A request is sent again after the statuses 408, 409, 429 and 5xx, a timeout, a lost connection, or a response that is
no chat completion. The client waits for the seconds of `Retry-After` (at most 120), or else for about 0.5, 1, 2, 4,
then 8 seconds. Unless the server reported an error, nobody knows whether such a request was billed, so its full price
counts against the caps, in later runs too.

A reply that was paid but has no usable text, for example because it was cut off, stays in the journal, and the same
request is not sent again. Another attempt is another request, with another seed.

The client stops if many requests in a row fail for the same reason: 5 before the server's first answer, 10 after it,
and 10 if the server is busy or gone.

The user gives the prices. Requests under way when a run is killed are not counted.
"""

import hashlib
import json
import os
import random
import re
import threading
import uuid
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
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

from sq_llava.llm_client.budget import Budget, ChatStopped
from sq_llava.llm_client.journal import Journal
from sq_llava.llm_client.replies import (
    BYTES_PER_TOKEN,
    CUT_OFF,
    EMPTY,
    ErrorReply,
    mend,
    read_completion,
    retry_after,
    without_thoughts,
)
from sq_llava.llm_client.settings import MAX_TOKENS_FIELDS, ChatSettings
from sq_llava.output import output_lock


Messages = Sequence[Mapping[str, Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")

# The server would refuse every request: wrong key, no such model, no money left.
FINAL_STATUSES = (401, 404)
NO_MONEY = "insufficient_quota"
# The request was not sent. Compared by name: releases of openai use different HTTP libraries, which share these names.
NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "LocalProtocolError", "PoolTimeout", "UnsupportedProtocol")
# After this many failures in a row for the same reason, all requests would probably fail. A server that has answered
# gets more patience: a few requests in a row may be refused for what is in them. So does one that is busy.
NUM_IN_A_ROW, NUM_BEFORE_ANSWERS = 10, 5
NO_ANSWER = "no answer"
LONGEST_BACKOFF = 8.0  # seconds before a retry, if the server names none
# How servers say that they do not know a field of a request.
_UNKNOWN_FIELD = re.compile(
    r"unsupported|not supported|unknown|unrecogni[sz]ed|unexpected|extra |not permitted|not allowed", re.I
)


class ChatFailure(RuntimeError):
    """The server did not answer one request, even after retries."""


class UnusableAnswer(ChatFailure):
    """
    The server's reply is paid, but its text cannot be used. It is not asked for again, except in another attempt.

    Args:
        fault (`str`): The reason, one of those in `replies.py`.
        text (`str`): The text that came.
        detail (`str`): What else the server said.
    """

    def __init__(self, fault: str, text: str = "", detail: str = ""):
        super().__init__(f"{fault}: {detail}" if detail else fault)
        self.fault = fault
        self.text = text
        self.detail = detail


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
    """
    Estimate for requests: number of prompt tokens (about) and answer tokens (at most), and their cost. An answer of a
    wrong form is asked for again, up to `attempts` times in all.
    """

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    attempts: int


class ChatClient:
    """
    Args:
        settings (`ChatSettings`): The server and the caps.
        journal_path (`Path`): File of the paid answers.
        server_matters (`bool`): Reuse an answer only if it came from the same base URL.
        reads_only (`bool`): Send nothing; no key is needed.
        key (`str`, *optional*): API key; "" for a server that needs none. Default: `OPENAI_API_KEY`.
        other_journals (`Sequence[Path]`): Files of other paid answers, which are used and count toward the caps too.

    Attributes:
        before_answer (`Callable`, *optional*): Called before each new answer is kept.

    Raises:
        ValueError: If `OPENAI_API_KEY` is not set.
    """

    before_answer: Callable[[], None] | None = None

    def __init__(
        self,
        settings: ChatSettings,
        journal_path: Path,
        server_matters: bool = False,
        reads_only: bool = False,
        key: str | None = None,
        other_journals: Sequence[Path] = (),
    ):
        # A line break at its end, as from a file of Windows, is not allowed in a header.
        self._key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
        if key is None and not self._key and not reads_only:
            raise ValueError("OPENAI_API_KEY is not set: export it. If your server needs no key, any text will do.")
        self.settings = settings
        self.reads_only = reads_only
        self.api = openai.OpenAI(
            api_key=self._key or "none",
            base_url=settings.base_url,
            max_retries=settings.retries,
            timeout=settings.timeout,
        )
        # The library's own retries would not count against the caps.
        self._once = self.api.with_options(max_retries=0)
        self.base_url = str(self.api.base_url)
        self._stopping = threading.Event()
        self.journal = Journal(journal_path, reads_only=True, others=other_journals)
        self.budget = Budget(settings, self.journal, self._stopping)
        self._server_matters = server_matters
        self._used: dict[str, dict[str, Any]] = {}
        self._lock: ExitStack | None = None
        self._claiming = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}
        self._failures = _InARow()

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
                self.journal = Journal(self.journal.path, others=self.journal.others)
                self.budget = Budget(self.settings, self.journal, self._stopping)

    def complete(self, messages: Messages, attempt: int = 0, handled: Container[str] = ()) -> str:
        """
        The server's answer without its reasoning, from the journal if it is there.

        Args:
            messages: Messages of the chat completions API, with `role` and `content` (a text or a list of parts).
            attempt (`int`): Each number gets its own answer to the same messages.
            handled: Faults of a reply after which the caller uses its text. They do not end a run.

        Raises:
            ValueError: If another process writes to the journal.
            UnusableAnswer: If the reply has no text, was cut off or filtered.
            ChatFailure: If this request gets no reply.
            ChatStopped: If no request can be sent any more.
        """
        request = self.request(messages, attempt)
        line = self.journal.get(request.key)
        is_new = False
        if line is None:
            if self.reads_only:
                raise NotAsked(request)
            self.claim()
            # Two threads with the same request pay once.
            with self._asking.setdefault(request.key, threading.Lock()):
                line = self.journal.get(request.key)
                if line is None:
                    line, is_new = self._ask(request), True
        self._used[request.key] = line
        answer = without_thoughts(line["answer"])
        fault = line.get("fault") or (None if answer else EMPTY)
        # An item with several attempts counts once.
        unusable = fault and UnusableAnswer(fault, answer, line.get("detail", ""))
        if is_new and attempt == 0 and self._failures.add(None if fault in handled else fault):
            hint = f" Raise {self.settings.option_prefix}max-tokens." if fault == CUT_OFF else ""
            raise self._stop(f"{self._failures} have no usable answer: {unusable}.{hint}")
        if unusable:
            raise unusable
        return answer

    def answers(self, messages: Messages, handled: Container[str] = ()) -> Iterator[str]:
        """
        Usable answers to the same messages, from up to `settings.attempts` attempts. Take the first of the right form.

        Args:
            messages, handled: As for [`complete`]. After a fault that is handled, no other attempt is made.

        Raises:
            UnusableAnswer: If no attempt gave a usable answer. It is the last reply.
            ChatFailure, ChatStopped, ValueError: As for [`complete`].
        """
        unusable, num_answers = None, 0
        for attempt in range(self.settings.attempts):
            try:
                answer = self.complete(messages, attempt, handled)
            except UnusableAnswer as error:
                unusable = error
                if error.fault in handled:
                    break
            else:
                num_answers += 1
                yield answer
        if not num_answers:
            raise unusable

    def request(self, messages: Messages, attempt: int = 0) -> ChatRequest:
        settings = self.settings
        body = {
            "model": settings.model,
            "messages": list(messages),
            "temperature": min(settings.temperature + 0.5 * attempt, max(1.0, settings.temperature)),
            MAX_TOKENS_FIELDS[0]: settings.max_tokens,
        }
        if settings.top_p is not None:
            body["top_p"] = settings.top_p
        extra = settings.extra_fields()
        body |= extra
        # The name of the field for the maximum length does not change an answer, so it is not in the hash.
        depends_on = [self.base_url] if self._server_matters else []
        content = json.dumps([*depends_on, body, attempt], sort_keys=True)
        body[settings.max_tokens_field] = body.pop(MAX_TOKENS_FIELDS[0])
        if attempt and extra.get("seed", 0) is not None:
            body["seed"] = extra.get("seed", 0) + attempt
        sent = {name: value for name, value in body.items() if value is not None}
        return ChatRequest(hashlib.sha256(content.encode()).hexdigest(), sent)

    def refusal(self, request: ChatRequest) -> str | None:
        """Why the server refused this request the last time, if it did."""
        line = self.journal.get(f"{request.key} refused")
        return line and line["refused"]

    def work_on(
        self, items: Mapping[str, Item], work: Callable[[Item], Result], description: str | None
    ) -> Iterator[tuple[str, Result]]:
        """
        Calls `work` on each item, `concurrency` items at a time. Yields the id and the result of each item when it is
        done. Shows a progress bar with what was spent, unless `description` is `None`.

        Raises:
            ValueError: If another process writes to the journal.
            ChatStopped: If no request can be sent any more. Before this or any error of `work` is raised, the
                requests under way are answered and kept.
        """
        self.claim()
        stops: list[ChatStopped] = []

        def run(item: Item) -> Result:
            try:
                return work(item)
            except ChatStopped as stop:
                stops.append(stop)
                self._end_waiting()  # at once, so that no other thread sends a request
                raise

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        spent = TextColumn("{task.fields[spent]}")
        console, is_hidden = Console(stderr=True), description is None
        progress = Progress(*columns, spent, console=console, transient=True, disable=is_hidden)
        with ThreadPoolExecutor(self.settings.concurrency) as pool, progress:
            bar = progress.add_task(description or "", total=len(items), spent=str(self.budget.spent))
            futures = {pool.submit(run, item): id for id, item in items.items()}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    progress.update(bar, advance=1, spent=str(self.budget.spent))
                    yield futures[future], result
            except ChatStopped:
                raise stops[0] from None  # the others stopped because of this one
            finally:
                self._end_waiting()
                pool.shutdown(cancel_futures=True)
                self._stopping.clear()

    def _end_waiting(self) -> None:
        """Ends all waiting, for a retry or at a cap. No request is sent after that."""
        self._stopping.set()
        self.budget.wake()

    def report(self) -> dict[str, Any]:
        """
        Models, dates, number of tokens and cost of the replies since the last report; and in `spent`, what all
        requests in the journal used.
        """
        used, self._used = list(self._used.values()), {}
        tokens = [sum(line[name] for line in used) for name in ("prompt_tokens", "completion_tokens")]
        return {
            "model": self.settings.model,
            "answered_by": sorted({line["model"] for line in used}),
            "dates": sorted({line["date"] for line in used}),
            "base_url": self.base_url,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "num_answers": len(used),
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": None if self.settings.input_price is None else self.settings.price(*tokens),
            "spent": str(self.budget.spent),
        }

    def estimate(self, requests: Iterable[ChatRequest]) -> Estimate:
        """The tokens and the cost of these requests, if every answer has the maximum length and the right form."""
        num_requests, prompt_tokens = 0, 0
        for request in requests:
            num_images, num_bytes = measure(request.body["messages"])
            num_requests += 1
            prompt_tokens += num_bytes // BYTES_PER_TOKEN + num_images * self.settings.image_tokens
        completion_tokens = num_requests * self.settings.max_tokens
        cost = self.settings.price(prompt_tokens, completion_tokens)
        return Estimate(num_requests, prompt_tokens, completion_tokens, cost, self.settings.attempts)

    def _say(self, error: Exception) -> str:
        """The text of an error without the API key, which some servers repeat."""
        text = str(error)
        if isinstance(error, openai.APIStatusError) and text == f"Error code: {error.status_code}":
            text = f"{text} - {error.response.text}"  # a body that is not OpenAI's, such as FastAPI's
        text = mend(text)
        return (text.replace(self._key, "[OPENAI_API_KEY]") if self._key else text)[:500]

    def _stop(self, reason: str) -> ChatStopped:
        return ChatStopped(f"{self.settings.model}: {reason.rstrip('. ')}. The answers so far are kept.")

    def _ask(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request until it is answered, or as often as the settings allow. The reply is kept."""
        for attempt in count():
            try:
                line = {"key": request.key, **self._send(request)}
                break
            except _Unanswered as error:
                wait = random.uniform(0.75, 1.0) * min(0.5 * 2**attempt, LONGEST_BACKOFF)
                is_last = attempt == self.settings.retries
                if is_last or self._stopping.wait(wait if error.seconds is None else error.seconds):
                    if self._failures.add(NO_ANSWER):
                        sent = f"each sent {self.settings.retries + 1} times"
                        raise self._stop(f"the server did not answer {self._failures}, {sent}: {error}") from None
                    raise ChatFailure(str(error)) from None
        if self.before_answer is not None:
            self.before_answer()
        self.journal.add(line)
        return line

    def _send(self, request: ChatRequest) -> dict[str, Any]:
        """Sends a request once. A lost request counts in full against the caps, a refused one does not count."""
        num_images, num_bytes = measure(request.body["messages"])
        # No token is shorter than a byte.
        most = num_bytes + num_images * self.settings.image_tokens, self.settings.max_tokens
        reservation = self.budget.reserve(*most)
        used = lost = None
        try:
            line = read_completion(self._post(request), self.settings.model, most)
            used = line["prompt_tokens"], line["completion_tokens"]
            return {**line, "reserved": {"prompt_tokens": most[0], self.settings.max_tokens_field: most[1]}}
        except ErrorReply as error:
            raise self._refused(request, error.status, error.code, self._say(error)) from None
        except ValueError as error:
            lost = self._say(error)
            raise _Unanswered(lost) from None
        except openai.APIStatusError as error:
            seconds = retry_after(error.response.headers.get("Retry-After"))
            raise self._refused(request, error.status_code, error.code, self._say(error), seconds) from None
        except openai.APIConnectionError as error:
            name = type(error.__cause__).__name__
            reason = f"{self._say(error)} ({name})"
            if name not in NOT_CONNECTED:
                lost = reason  # it may have been answered and billed
            raise _Unanswered(reason) from None
        finally:
            self.budget.settle(reservation, most if lost else used)
            if lost is not None:  # no request has this key: it is not an answer
                self._note(f"{request.key} lost {uuid.uuid4().hex}", "lost", lost, most)

    def _post(self, request: ChatRequest) -> str:
        """The body of the server's response."""
        known = {name: request.body[name] for name in ("model", "messages")}
        others = {name: value for name, value in request.body.items() if name not in known}
        return self._once.chat.completions.with_raw_response.create(**known, extra_body=others).http_response.text

    def _refused(
        self, request: ChatRequest, status: int, code: Any, reason: str, seconds: float | None = None
    ) -> Exception:
        """What a refusal means: for all requests, for a while, or for this request alone."""
        if status in FINAL_STATUSES or code == NO_MONEY:
            return self._stop(f"the server refused: {reason}")
        if status in (408, 409, 429) or status >= 500:
            return _Unanswered(reason, seconds)
        if self.refusal(request) is None:
            self._note(f"{request.key} refused", "refused", reason, (0, 0))
        told = self.settings.max_tokens_field
        if told in reason and _UNKNOWN_FIELD.search(reason):
            reason += f" {self.settings.other_field}"
        if self._failures.add(f"status {status}"):
            return self._stop(f"the server refused {self._failures}: {reason}")
        return ChatFailure(reason)

    def _note(self, key: str, kind: str, reason: str, used: tuple[int, int]) -> None:
        """Keeps a line without an answer in the journal."""
        tokens = {"prompt_tokens": used[0], "completion_tokens": used[1]}
        self.journal.add({"key": key, kind: reason, "date": datetime.now(UTC).date().isoformat(), **tokens})


class _Unanswered(Exception):
    """The server is busy or the connection was lost. `seconds`: how long the server asks to wait, if it says so."""

    def __init__(self, reason: str, seconds: float | None = None):
        super().__init__(reason)
        self.seconds = seconds


class _InARow:
    """Counts the requests in a row that failed for the same reason."""

    def __init__(self):
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._num = 0
        self._has_answered = False

    def add(self, reason: str | None) -> bool:
        """Counts a failure, or an answer if `reason` is `None`. Returns `True` if there are too many."""
        with self._lock:
            self._num = self._num + 1 if reason == self._reason else 1
            self._reason = reason
            self._has_answered |= reason is None
            most = NUM_IN_A_ROW if self._has_answered or reason == NO_ANSWER else NUM_BEFORE_ANSWERS
            return reason is not None and self._num >= most

    def __str__(self) -> str:
        return f"{self._num} requests in a row"


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
