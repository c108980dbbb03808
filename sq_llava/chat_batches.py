"""Asks by the Batch API of a chat server: many requests in a file, answered within a day, often at half the price.

    ask_in_batches(client, lambda: requests, errors := {}, "Asking")

What a batch costs is paid when it is created, so a kill must not make it be created again. Beside the client's journal
stands another one, `<its name>.batches.jsonl`: that a batch is planned, under a name of its own, is written before it
is created, its id after. A planned batch without an id is looked for at the server by that name, which it carries as
metadata. What this module does not do: cancel a batch.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import openai
from openai.types import Batch

from sq_llava.appended_lines import whole_lines
from sq_llava.chat_client import ChatClient, ChatRequest, ChatStopped
from sq_llava.chat_replies import read_completion


ENDPOINT = "/v1/chat/completions"
# What OpenAI takes in a batch, the bytes with room to spare.
MAX_REQUESTS = 50_000
MAX_BYTES = 150_000_000
SHORTEST_WAIT, LONGEST_WAIT = 0.2, 30.0  # seconds between two looks at a batch
FINAL = ("completed", "failed", "expired", "cancelled")
NAME = "sq_llava_batch"


@dataclass
class PlannedBatch:
    """Requests that go up together: key -> the most tokens of prompt and answer, which are set aside."""

    name: str
    most: dict[str, tuple[int, int]]
    id: str | None = None


class BatchJournal:
    """The batches that were planned, created and read, one event a line."""

    def __init__(self, client: ChatClient):
        self._path = client.journal.path.with_suffix(".batches.jsonl")
        self.open: dict[str, PlannedBatch] = {}
        for line in map(json.loads, whole_lines(self._path)):
            if line["event"] == "planned":
                most = {key: tuple(most) for key, most in line["most"].items()}
                self.open[line["name"]] = PlannedBatch(line["name"], most)
            elif line["event"] == "created":
                self.open[line["name"]].id = line["id"]
            else:
                del self.open[line["name"]]

    def plan(self, most: dict[str, tuple[int, int]]) -> PlannedBatch:
        batch = PlannedBatch(uuid.uuid4().hex, most)
        self._write({"event": "planned", "name": batch.name, "most": most})
        self.open[batch.name] = batch
        return batch

    def created(self, batch: PlannedBatch, id: str) -> None:
        self._write({"event": "created", "name": batch.name, "id": id})
        batch.id = id

    def read(self, batch: PlannedBatch) -> None:
        self._write({"event": "read", "name": batch.name})
        del self.open[batch.name]

    def _write(self, line: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write((json.dumps(line) + "\n").encode())


def ask_in_batches(
    client: ChatClient, requests: Callable[[], Iterable[ChatRequest]], errors: dict[str, str], description: str
) -> None:
    """
    Puts answers into the client's journal; first those of batches that a killed run has left.

    Args:
        requests (`Callable`): Gives what is to be asked now; called until nothing is left. No more of it is held than
            one batch takes.
        errors (`dict`): Gets key of a request that got no answer -> why; those in it are not asked.

    Raises:
        ValueError: if another process adds to the journal.
        ChatStopped: at a cap, once what fits has been answered; or if the server is gone, refuses or has no Batch API.
    """
    client.claim()
    journal = BatchJournal(client)
    try:
        for batch in list(journal.open.values()):
            # A kill may have come while its answers were being kept.
            batch.most = {
                key: most
                for key, most in batch.most.items()
                if client.journal.get(key) is None and client.journal.get(_lost(key, batch)) is None
            }
            for most in batch.most.values():
                client.budget.hold(*most)
            if batch.id is None and (id := _find(client, batch)) is not None:
                journal.created(batch, id)
        _read_open(client, journal, errors, description)
        while _create_all(client, journal, requests(), errors):
            _read_open(client, journal, errors, description)
    except openai.NotFoundError as error:
        raise ChatStopped(
            f"{client.base_url} has no Batch API, or not this batch or model (leave --batch out?): {client.say(error)}"
        ) from None
    except openai.OpenAIError as error:
        raise ChatStopped(f"{client.say(error)} Run again: a batch that was created goes on at the server.") from None


def _create_all(
    client: ChatClient, journal: BatchJournal, requests: Iterable[ChatRequest], errors: Mapping[str, str]
) -> int:
    """
    Creates as many batches as the requests take, within the caps, and gives their number.

    Raises:
        ChatStopped: if nothing fits any more. Answers are cheaper than what was set aside: then more may fit.
    """
    stop = None
    num_created = 0
    for lines, most in _packed(client, requests, errors):
        fitting = {}
        for key, tokens in most.items():
            try:
                client.budget.reserve(*tokens, may_wait=False)
            except ChatStopped as error:
                stop = error
                break
            fitting[key] = tokens
        if fitting:
            _create(client, journal, journal.plan(fitting), b"".join(lines[: len(fitting)]))
            num_created += 1
        if stop is not None:
            break
    if stop is not None and not num_created:
        raise stop
    return num_created


def _packed(
    client: ChatClient, requests: Iterable[ChatRequest], errors: Mapping[str, str]
) -> Iterator[tuple[list[bytes], dict[str, tuple[int, int]]]]:
    """Lines of a file with the most tokens of each, as many as a batch takes."""
    lines: list[bytes] = []
    most: dict[str, tuple[int, int]] = {}
    num_bytes = 0
    seen = set(errors)
    for request in requests:
        key = request.key
        if key in seen:
            continue
        seen.add(key)
        line = json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": request.body}).encode() + b"\n"
        if lines and (len(lines) == MAX_REQUESTS or num_bytes + len(line) > MAX_BYTES):
            yield lines, most
            lines, most, num_bytes = [], {}, 0
        lines.append(line)
        most[key] = client.most_tokens(request.body)
        num_bytes += len(line)
    if lines:
        yield lines, most


def _create(client: ChatClient, journal: BatchJournal, batch: PlannedBatch, content: bytes) -> None:
    file = client.api.files.create(file=("requests.jsonl", content), purpose="batch")
    # Sent again without a look, a request whose answer was lost would create and pay a second batch.
    once = client.api.with_options(max_retries=0)
    for attempt in range(client.settings.retries + 1):
        try:
            created = once.batches.create(
                input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h", metadata={NAME: batch.name}
            )
        except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
            if (id := _find(client, batch)) is None and attempt == client.settings.retries:
                raise
        else:
            id = created.id
        if id is not None:
            journal.created(batch, id)
            return
        time.sleep(min(0.5 * 2**attempt, 8))


def _find(client: ChatClient, batch: PlannedBatch) -> str | None:
    """The id of a batch that was created, though nobody noted it."""
    batches = client.api.batches.list(limit=100)
    return next((each.id for each in batches if (each.metadata or {}).get(NAME) == batch.name), None)


def _read_open(client: ChatClient, journal: BatchJournal, errors: dict[str, str], description: str) -> None:
    """Waits for the batches under way, and reads them."""
    total = sum(len(batch.most) for batch in journal.open.values())
    wait = SHORTEST_WAIT
    with client.bar() as progress:
        bar = progress.add_task(f"{description}, by batch", total=total, spent=client.budget.describe())
        num_read = 0
        while journal.open:
            num_done = 0
            for batch in list(journal.open.values()):
                state = client.api.batches.retrieve(batch.id) if batch.id is not None else None
                if state is None or state.status in FINAL:
                    _read(client, journal, batch, state, errors)
                    num_read += len(batch.most)
                elif state.request_counts is not None:
                    num_done += state.request_counts.completed
            progress.update(bar, completed=num_read + num_done, spent=client.budget.describe())
            if journal.open:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)


def _read(
    client: ChatClient, journal: BatchJournal, batch: PlannedBatch, state: Batch | None, errors: dict[str, str]
) -> None:
    """Keeps the answers of a batch that is done, settles what was set aside for it, and forgets it."""
    used: dict[str, tuple[int, int] | None] = dict.fromkeys(batch.most)
    said = {}
    if state is not None:  # else it was never created
        said = dict.fromkeys(batch.most, f"the batch is {state.status}, without an answer")
        for line in _lines(client, state):
            if line["custom_id"] in batch.most:
                _take(client, line, batch, used, said)
    for key, most in batch.most.items():
        client.budget.settle(most, used[key])
    errors |= said
    journal.read(batch)
    if state is not None and state.status == "failed":
        problems = [problem.message for problem in (state.errors.data or [])] if state.errors else []
        raise ChatStopped(f"the server refused the batch {batch.id}: {' '.join(filter(None, problems))}")


def _take(
    client: ChatClient,
    line: Mapping[str, Any],
    batch: PlannedBatch,
    used: dict[str, tuple[int, int] | None],
    said: dict[str, str],
) -> None:
    """One line of a batch's files: an answer goes into the client's journal, an error into `said`."""
    key, response = line["custom_id"], line.get("response") or {}
    if response.get("status_code") != 200:
        said[key] = client.say(ValueError(json.dumps(line.get("error") or response.get("body"))))
        return
    used[key] = batch.most[key]
    try:
        answer = read_completion(json.dumps(response["body"]), batch.most[key])
    except ValueError as error:
        said[key] = client.say(error)
        client.note_lost(_lost(key, batch), batch.most[key], said[key])
        return
    used[key] = answer["prompt_tokens"], answer["completion_tokens"]
    del said[key]
    client.journal.add({"key": key, **answer})


def _lost(key: str, batch: PlannedBatch) -> str:
    """Under which the client's journal has what was paid for a request of a batch that got no usable answer."""
    return f"{key} lost {batch.name}"


def _lines(client: ChatClient, state: Batch) -> list[dict[str, Any]]:
    """What the files of a batch hold: answers, and errors."""
    lines = []
    for file_id in filter(None, (state.output_file_id, state.error_file_id)):
        try:
            # `str.splitlines` would also split at U+2028 and the like, which JSON leaves as they are.
            content = client.api.files.content(file_id).content
            lines += [json.loads(line) for line in content.split(b"\n") if line.strip()]
        except ValueError as error:
            raise ChatStopped(
                f"the file {file_id} of the batch {state.id} cannot be read as JSON lines: {error}. Run again: "
                "nothing is paid twice."
            ) from error
    return lines
