"""Asks a server about many items, in threads or in batches, so that a kill at any moment loses nothing that was paid.

What is asked about an item, in one step or in several, is a function that calls `client.complete`. It runs until the
journal holds all answers that it needs; then once more, in order, on the journal alone: the results are the same
however often the run was interrupted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sq_llava.chat_batches import BatchJournal, ask_in_batches
from sq_llava.chat_client import ChatClient, ChatFailure, ChatRequest, ChatStopped, NotAsked


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


def ask_all(
    client: ChatClient,
    items: Mapping[str, Item],
    work: Callable[[Item], Any],
    description: str,
    batch: bool = False,
) -> Asked:
    """
    Args:
        work (`Callable`): Asks about one item, in threads. Whatever it gives must follow from the item and the
            answers. It is to let `ChatFailure` pass.
    """
    failures: dict[str, str] = {}
    stopped = None

    def attempt(id: str) -> None:
        try:
            work(items[id])
        except ChatFailure as error:
            failures[id] = str(error)

    try:
        if batch:
            _fill_by_batches(client, items, work, description, failures)
        else:
            if BatchJournal(client).open:  # of a run with batches that was killed: they are paid
                ask_in_batches(client, {}, description)
            for _ in client.work_on({id: id for id in items}, attempt, description):
                pass
    except ChatStopped as stop:
        stopped = str(stop)
    except KeyboardInterrupt:
        stopped = "stopped by Ctrl-C. Run again: what was answered is kept."
    results, missing = read_all(client, items, work)
    failures = {id: failures[id] for id in missing if id in failures}
    return Asked(results, failures, len(missing) - len(failures), stopped)


def read_all(
    client: ChatClient, items: Mapping[str, Item], work: Callable[[Item], Any]
) -> tuple[dict[str, Any], dict[str, ChatRequest]]:
    """Results on the journal alone; and of items that lack an answer, the first request that has none."""
    results, missing = {}, {}
    before, client.reads_only = client.reads_only, True
    try:
        for id, item in items.items():
            try:
                results[id] = work(item)
            except NotAsked as error:
                missing[id] = error.request
    finally:
        client.reads_only = before
    return results, missing


def _fill_by_batches(
    client: ChatClient,
    items: Mapping[str, Item],
    work: Callable[[Item], Any],
    description: str,
    failures: dict[str, str],
) -> None:
    """The requests that stand next for all items go up together, until there are none; adds to `failures`."""
    while True:
        missing = read_all(client, items, work)[1]
        requests = {request.key: request for id, request in missing.items() if id not in failures}
        if not requests:
            return
        errors = ask_in_batches(client, requests, description)
        failures |= {id: errors[request.key] for id, request in missing.items() if request.key in errors}
