"""A judge: a language model behind an OpenAI-compatible server that grades answers.

    export OPENAI_API_KEY=...
    sq-llava evaluate --model M --tasks llava_bench,mmvet --data DIR --judge-model gpt-4o \
        --judge-max-cost 5 --judge-input-price 2.5 --judge-output-price 10

Every answer of the judge is kept in `OUT/judge.jsonl` under a hash of all that it depends on, so a run that was killed
does not pay twice. An answer that cannot be read is asked for again, up to `attempts` times; what could not be judged
is listed and counted and enters no mean. The key comes from the environment alone and is written nowhere.

The client of `openai` sends a request again after 408, 409, 429, 5xx, time-outs and lost connections: after the
seconds of `Retry-After` (up to 120), else after 0.5, 1, 2, 4, ... 8 seconds, a little less by chance. If
`NUM_UNANSWERED` requests in a row stay without an answer all the same, nothing more is asked. What this module does
not do: know prices, which are the user's to give.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from rich.console import Console
from rich.progress import Progress


Messages = Sequence[Mapping[str, str]]

# The server refuses whatever is sent: a wrong key, no right to the model, no such model, no money left.
FINAL_ERRORS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
NO_MONEY = "insufficient_quota"
# So many requests in a row, each sent several times, show that the server is gone, not that one of them is odd.
NUM_UNANSWERED = 10


class JudgeStopped(RuntimeError):
    """Nothing more can be asked in this run: a cap, a server that refuses us or is gone. What is done is kept."""


class JudgeFailure(RuntimeError):
    """The server did not answer one request, also when asked again."""


@dataclass(frozen=True)
class JudgeSettings:
    """
    Args:
        model (`str`): As the server names it.
        base_url (`str`, *optional*): Of the server, up to `/v1`; else `OPENAI_BASE_URL`, else OpenAI's own.
        temperature (`float`): Of the first attempt; each further one is 0.5 warmer, up to 1.
        max_tokens (`int`): Of an answer, a reasoning model's thoughts included.
        concurrency (`int`): Requests at a time.
        retries (`int`): How often a request is sent again that the server did not answer.
        timeout (`float`): Seconds for one answer.
        attempts (`int`): How often an answer is asked for, until one can be read.
        max_requests (`int`, *optional*): Of all runs into the same folder, without the server's refusals.
        max_cost (`float`, *optional*): Likewise; in the unit of the prices.
        input_price, output_price (`float`, *optional*): Of a million tokens.
        swap (`bool`): Pairs are judged in both orders, to measure what the order does.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.0
    max_tokens: int = 1024
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0
    attempts: int = 3
    max_requests: int | None = None
    max_cost: float | None = None
    input_price: float | None = None
    output_price: float | None = None
    swap: bool = False

    def __post_init__(self):
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise ValueError("--judge-max-cost needs --judge-input-price and --judge-output-price (per million).")
        if self.base_url is not None:
            url = urlsplit(self.base_url)
            if url.scheme not in ("http", "https") or url.username or url.password or url.query:
                raise ValueError(
                    "--judge-base-url: give http(s)://host/v1, without a name, a key or a query in it; "
                    "the key comes from OPENAI_API_KEY."
                )


@dataclass(frozen=True)
class Verdict:
    """What was read out of the judge's answer `text`; or `None`, and why not."""

    value: Any
    text: str
    error: str | None = None


class Judge:
    """
    Args:
        settings (`JudgeSettings`): Whom to ask, and how much.
        folder (`Path`): For `judge.jsonl`, the answers that were paid for.

    Raises:
        ValueError: if `OPENAI_API_KEY` is not set.
    """

    def __init__(self, settings: JudgeSettings, folder: Path):
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise ValueError("OPENAI_API_KEY is not set: export it (any text for a server that needs none).")
        self.settings = settings
        self._client = openai.OpenAI(
            api_key=key, base_url=settings.base_url, max_retries=settings.retries, timeout=settings.timeout
        )
        self._answers = _Answers(folder / "judge.jsonl")
        self._budget = _Budget(settings, self._answers)
        self._used: list[dict[str, Any]] = []
        self._num_unanswered = 0

    def complete(self, messages: Messages, attempt: int = 0) -> str:
        """
        The judge's answer, from the folder if it is there.

        Args:
            messages: Of the chat completions API: `role` and `content`.
            attempt (`int`): Another number asks anew.

        Raises:
            ValueError: if the server's answer holds no text.
            JudgeFailure: if there is no answer to this request.
            JudgeStopped: if there will be none to any.
        """
        request = {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": min(self.settings.temperature + 0.5 * attempt, max(1.0, self.settings.temperature)),
            "max_completion_tokens": self.settings.max_tokens,
        }
        key = _hash([str(self._client.base_url), request, attempt])
        line = self._answers.get(key)
        if line is None:
            line = {"key": key, **self._ask(request)}
            self._answers.add(line)
        self._used.append(line)
        return line["answer"]

    def complete_all(
        self, conversations: Mapping[str, Messages], parse: Callable[[str], Any], description: str
    ) -> dict[str, Verdict]:
        """
        A verdict for each conversation, by its id.

        Args:
            parse (`Callable`): The judge's answer -> its value; raises a `ValueError` if it cannot be read.

        Raises:
            JudgeStopped: once the requests under way have been answered and kept.
        """
        verdicts = {}
        with (
            ThreadPoolExecutor(self.settings.concurrency) as pool,
            Progress(console=Console(stderr=True), transient=True) as progress,
        ):
            bar = progress.add_task(description, total=len(conversations))
            futures = {pool.submit(self._verdict, each, parse): id for id, each in conversations.items()}
            try:
                for future in as_completed(futures):
                    verdicts[futures[future]] = future.result()
                    progress.advance(bar)
            finally:
                pool.shutdown(cancel_futures=True)
        return verdicts

    def report(self) -> dict[str, Any]:
        """Who judged and when, for a result; of what was asked since the last report."""
        used, self._used = self._used, []
        return {
            "model": self.settings.model,
            "answered_by": sorted({line["model"] for line in used}),
            "dates": sorted({line["date"] for line in used}),
            "base_url": str(self._client.base_url),
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "num_answers": len(used),
            "prompt_tokens": sum(line["prompt_tokens"] for line in used),
            "completion_tokens": sum(line["completion_tokens"] for line in used),
        }

    def _verdict(self, messages: Messages, parse: Callable[[str], Any]) -> Verdict:
        text, reason = "", ""
        for attempt in range(self.settings.attempts):
            try:
                text = self.complete(messages, attempt)
                return Verdict(parse(text), text)
            except JudgeFailure as error:
                return Verdict(None, text, str(error))
            except ValueError as error:
                reason = str(error)
        return Verdict(None, text, f"not readable in {self.settings.attempts} attempts: {reason}")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and pays for it."""
        # No token is shorter than a byte.
        most_tokens = len(json.dumps(request["messages"]).encode()), self.settings.max_tokens
        highest = self._budget.price(*most_tokens)
        self._budget.reserve(highest)
        cost = 0.0  # of a request that the server refused
        try:
            response = self._client.chat.completions.with_raw_response.create(**request).http_response
            self._num_unanswered = 0
            cost = highest
            line = _read(response.text, most_tokens)
            cost = self._budget.price(line["prompt_tokens"], line["completion_tokens"])
            return line
        except ValueError as error:
            raise ValueError(self._say(error)) from None
        except openai.APIStatusError as error:
            if isinstance(error, FINAL_ERRORS) or error.code == NO_MONEY:
                raise JudgeStopped(f"the judge's server refused: {self._say(error)}") from None
            # What is wrong with a single request is told by another status, at once.
            is_busy = error.status_code in (408, 409, 429) or error.status_code >= 500
            raise self._failure(self._say(error), is_answer=not is_busy) from None
        except openai.APIConnectionError as error:
            cost = highest  # it may have been answered, and the answer lost
            reason = f"{self._say(error)} ({type(error.__cause__).__name__})"
            raise self._failure(reason, is_answer=False) from None
        finally:
            self._budget.settle(highest, cost)

    def _failure(self, reason: str, is_answer: bool) -> JudgeFailure | JudgeStopped:
        """Of one request, or of all that follow. Threads may miscount by a few, which does no harm."""
        self._num_unanswered = 0 if is_answer else self._num_unanswered + 1
        if self._num_unanswered < NUM_UNANSWERED:
            return JudgeFailure(reason)
        return JudgeStopped(
            f"the judge's server left {self._num_unanswered} requests in a row without an answer, each sent "
            f"{self.settings.retries + 1} times: {reason} Run again when it is there: what was answered is kept."
        )

    def _say(self, error: Exception) -> str:
        """Servers put the key that they were sent into their errors."""
        return str(error).replace(self._client.api_key, "[OPENAI_API_KEY]")[:500]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(body: str, most_tokens: tuple[int, int]) -> dict[str, Any]:
    """
    Text, model and tokens of a chat completion; `most_tokens` where the server does not count them.

    Raises:
        ValueError: if the body has another form, or no text in it.
    """
    try:
        completion = json.loads(body)
        answer = completion["choices"][0]["message"]["content"]
        usage = completion.get("usage") or dict(zip(("prompt_tokens", "completion_tokens"), most_tokens))
        line = {
            "answer": answer,
            "model": completion["model"],
            "date": datetime.now(UTC).date().isoformat(),
            "prompt_tokens": int(usage["prompt_tokens"]),
            "completion_tokens": int(usage["completion_tokens"]),
        }
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the server's answer is no chat completion ({error!r}): {body[:200]!r}") from error
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"the server's answer holds no text: {body[:200]!r}")
    return line


class _Answers:
    """The judge's answers on disk: one JSON line each, appended as they come."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._lines: dict[str, dict[str, Any]] = {}
        if path.is_file():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # a kill has cut the last line off
                path.write_bytes(whole)
            self._lines = {line["key"]: line for line in map(json.loads, whole.splitlines())}

    def get(self, key: str) -> dict[str, Any] | None:
        return self._lines.get(key)

    def all(self) -> list[dict[str, Any]]:
        return list(self._lines.values())

    def add(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
            self._lines[line["key"]] = line


class _Budget:
    """
    What may still be asked. Before a request is sent, its highest price is set aside, so that no cap is passed
    however many are under way; a request that was not answered counts as well.
    """

    def __init__(self, settings: JudgeSettings, answers: _Answers):
        self._settings = settings
        self._changed = threading.Condition()
        self._requests = len(answers.all())
        self._spent = sum(self.price(line["prompt_tokens"], line["completion_tokens"]) for line in answers.all())
        self._reserved = 0.0
        self._num_under_way = 0

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        if self._settings.max_cost is None:
            return 0.0
        tokens = prompt_tokens * self._settings.input_price + completion_tokens * self._settings.output_price
        return tokens / 1e6

    def reserve(self, highest: float) -> None:
        """Waits for requests under way if they may turn out cheaper. Raises [`JudgeStopped`] at a cap."""
        max_requests, max_cost = self._settings.max_requests, self._settings.max_cost
        with self._changed:
            while max_cost is not None and self._spent + self._reserved + highest > max_cost:
                if not self._num_under_way:
                    raise JudgeStopped(
                        f"stopped by --judge-max-cost {max_cost:g}: {self._spent:g} is spent, and the next request "
                        f"can cost {highest:g}. Raise it and run again: what was answered is kept."
                    )
                self._changed.wait()
            if max_requests is not None and self._requests >= max_requests:
                raise JudgeStopped(
                    f"stopped by --judge-max-requests {max_requests}. Raise it and run again: what was answered is "
                    "kept."
                )
            self._requests += 1
            self._reserved += highest
            self._num_under_way += 1

    def settle(self, highest: float, cost: float) -> None:
        with self._changed:
            self._reserved -= highest
            self._num_under_way -= 1
            self._spent += cost
            self._changed.notify_all()
