"""Asks a server about many items in threads, so that a kill at any moment loses nothing that was paid.

A function asks about one item, in one or several calls of `client.complete`. First it runs in threads until the
journal holds the answers; then once more, in order, on the journal alone. So the results are the same however often
the run was interrupted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, NotAsked
from sq_llava.stopping import INTERRUPTED


Item = TypeVar("Item")


@dataclass(frozen=True)
class Asked:
    """
    Args:
        results (`dict`): What the function made of each item for which it has all answers, in the items' order.
        failures (`dict`): Items that the server did not answer, and its error.
        num_open (`int`): Items that were not asked about before the run was stopped.
        stopped (`str`, *optional*): What stopped it.
    """

    results: dict[str, Any]
    failures: dict[str, str]
    num_open: int
    stopped: str | None = None


def ask_all(client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any], description: str) -> Asked:
    """
    Asks about all items; with a client that only reads, only what the journal holds is used.

    Args:
        work (`Callable`): Asks about one item, in threads. Its result must depend on the item and the answers alone.
            It must not catch `ChatFailure`.

    Raises:
        ValueError: if another process adds to the journal.
    """
    if client.reads_only:
        results, missing = _read_all(client, items, work)
        return Asked(results, {}, len(missing))
    client.claim()
    failures: dict[str, str] = {}
    stopped = None

    def attempt(id: str) -> None:
        try:
            work(items[id])
        except ChatFailure as error:
            failures[id] = str(error)

    try:
        for _ in client.work_on({id: id for id in items}, attempt, description):
            pass
    except ChatStopped as stop:
        stopped = str(stop)
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    results, missing = _read_all(client, items, work)
    failures = {id: failures[id] for id in missing if id in failures}
    return Asked(results, failures, len(missing) - len(failures), stopped)


def _read_all(
    client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any]
) -> tuple[dict[str, Any], list[str]]:
    """The results from the journal alone, and the items that lack an answer."""
    results, missing = {}, []
    with _reading_only(client):
        for id, item in items.items():
            try:
                results[id] = work(item)
            except NotAsked:
                missing.append(id)
    return results, missing


@contextmanager
def _reading_only(client: ChatClient) -> Iterator[None]:
    before, client.reads_only = client.reads_only, True
    try:
        yield
    finally:
        client.reads_only = before
