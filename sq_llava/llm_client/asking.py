"""Asks a server about many items, in threads. A kill at any moment loses no answer that was received.

The caller's function `work` asks about one item, with one or several calls of `client.complete`. It first runs in
threads, until the journal has the answers. Then it runs again, item by item, with the journal alone. Therefore the
results do not depend on interruptions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sq_llava.llm_client.client import ChatClient, ChatFailure, ChatStopped, NotAsked, UnusableAnswer
from sq_llava.stopping import INTERRUPTED


Item = TypeVar("Item")


@dataclass(frozen=True)
class Asked:
    """
    Args:
        results (`dict`): Result of the function for each item that has all its answers, in the order of the items.
        failures (`dict`): The server's error for each item that it did not answer. The next run tries these again.
        num_open (`int`): Number of items that were not asked about before the run stopped.
        stopped (`str`, *optional*): Why the run stopped early.
        unusable (`dict`): For each item whose paid replies all cannot be used, the fault of the last one and its text.
    """

    results: dict[str, Any]
    failures: dict[str, str]
    num_open: int
    stopped: str | None = None
    unusable: dict[str, tuple[str, str]] = field(default_factory=dict)


def ask_all(client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any], description: str) -> Asked:
    """
    Asks about all items. A client with `reads_only` uses only the answers in the journal. Items that the server
    refused in an earlier run come last, so that they do not keep the others from being asked about.

    Args:
        client (`ChatClient`): Sends the requests.
        items (`Mapping`): The items by their ids.
        work (`Callable`): Asks about one item, in a thread. Its result must depend only on the item and the answers.
            It must not catch `ChatFailure`, except `UnusableAnswer`.
        description (`str`): Text beside the progress bar.

    Raises:
        ValueError: If another process writes to the journal.
    """
    failures: dict[str, str] = {}
    stopped = None

    def attempt(id: str) -> None:
        try:
            work(items[id])
        except ChatFailure as error:
            failures[id] = str(error)

    if not client.reads_only:
        client.claim()
        refused = _read_all(client, items, work)[2] if client.journal.has_refusals else {}
        try:
            for _ in client.work_on({id: id for id in sorted(items, key=refused.__contains__)}, attempt, description):
                pass
        except ChatStopped as stop:
            stopped = str(stop)
        except KeyboardInterrupt:
            stopped = INTERRUPTED
    results, missing, refused = _read_all(client, items, work)
    failures = {id: failures.get(id) or refused[id] for id in missing if id in failures or id in refused}
    faults = {id: each for id, each in results.items() if isinstance(each, UnusableAnswer)}
    unusable = {id: (each.fault, each.text or each.detail) for id, each in faults.items()}
    results = {id: result for id, result in results.items() if id not in unusable}
    return Asked(results, failures, len(missing) - len(failures), stopped, unusable)


def _read_all(
    client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any]
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """
    Reads the journal alone.

    Returns:
        The results, or an `UnusableAnswer`, of the items that need no more requests; the ids of the others; and why
        the server refused some of these.
    """
    results, missing, refused = {}, [], {}
    before, client.reads_only = client.reads_only, True
    try:
        for id, item in items.items():
            try:
                results[id] = work(item)
            except UnusableAnswer as error:
                results[id] = error
            except NotAsked as error:
                missing.append(id)
                reason = client.refusal(error.request)
                if reason is not None:
                    refused[id] = reason
    finally:
        client.reads_only = before
    return results, missing, refused
