"""Asks a server about many items, in threads. A kill at any moment loses no answer that was received.

The caller's function `work` asks about one item, with one or several calls of `client.complete`. It first runs in
threads, until the journal has the answers. Then it runs again, item by item, with the journal alone. Therefore the
results do not depend on interruptions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, NotAsked
from sq_llava.stopping import INTERRUPTED


Item = TypeVar("Item")


@dataclass(frozen=True)
class Asked:
    """
    Args:
        results (`dict`): Result of the function for each item that has all its answers, in the order of the items.
        failures (`dict`): The server's error for each item that it did not answer.
        num_open (`int`): Number of items that were not asked about before the run stopped.
        stopped (`str`, *optional*): Why the run stopped early.
    """

    results: dict[str, Any]
    failures: dict[str, str]
    num_open: int
    stopped: str | None = None


def ask_all(client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any], description: str) -> Asked:
    """
    Asks about all items. A client with `reads_only` uses only the answers in the journal.

    Args:
        client (`ChatClient`): Sends the requests.
        items (`Mapping`): The items by their ids.
        work (`Callable`): Asks about one item, in a thread. Its result must depend only on the item and the answers.
            It must not catch `ChatFailure`.
        description (`str`): Text beside the progress bar.

    Raises:
        ValueError: If another process writes to the journal.
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
    before, client.reads_only = client.reads_only, True
    try:
        for id, item in items.items():
            try:
                results[id] = work(item)
            except NotAsked:
                missing.append(id)
    finally:
        client.reads_only = before
    return results, missing
