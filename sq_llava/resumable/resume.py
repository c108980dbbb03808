"""Resumable work on many items: in batches, on one or several processes.

    lines = run_resumable(pictures, describe_batch, Path("out"), "described", "Describing", batch_size=8)

Each process appends one JSON line per item to `<stem>-<rank>.jsonl`. A later run reads the files of all processes and
works on the items that have no line. The number of processes may change. Items that failed are tried again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from jinja2 import TemplateError
from rich.progress import Progress

from sq_llava.console import messages_console
from sq_llava.resumable.jsonl import LineWriter, read_complete_lines
from sq_llava.resumable.run_note import RunNote


Item = TypeVar("Item")
Result = TypeVar("Result")

# Errors of one item, such as an image that cannot be opened or a prompt that needs too much memory.
ITEM_ERRORS = (ValueError, RuntimeError, TemplateError)


def run_resumable(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Iterable[Mapping[str, Any]]],
    folder: Path,
    stem: str,
    description: str,
    batch_size: int = 1,
    make_batches: Callable[[Sequence[Item]], Sequence[Sequence[Item]]] | None = None,
    failed: Mapping[str, Any] = {},
    note: RunNote | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Works on every item that has no line in `folder` yet. If a batch fails, its items are tried one by one.

    Args:
        items (`Sequence`): Each item has a unique `id`.
        work (`Callable`): Takes a batch of items and gives the fields of each item's line.
        folder (`Path`): Folder of the files of lines.
        stem (`str`): First part of the names of these files.
        description (`str`): Text beside the progress bar.
        batch_size (`int`): Number of items in a batch.
        make_batches (`Callable`, *optional*): Divides the remaining items into batches, which are distributed over the
            processes. By default, items are distributed, and each process makes its own batches.
        failed (`Mapping`): Fields of the line of an item that failed, in addition to `error`.
        note ([`RunNote`], *optional*): The note of the run. It is written before the first line.
        hashes (`Mapping[str, str]`, *optional*): Item id -> hash of what its result depends on. The hash is kept in
            the line as `input_hash`.

    Returns:
        The line of each item by its id, on every process. A line has an `error`, which is `None` for success.
    """
    state = PartialState()
    mine = slice(state.process_index, None, state.num_processes)
    done = read_lines(folder, stem, [item.id for item in items], hashes=hashes)
    folder.mkdir(parents=True, exist_ok=True)
    left = [item for item in items if item.id not in done]
    batches = make_batches(left)[mine] if make_batches else in_batches(left[mine], batch_size)
    fresh = []
    with LineWriter(folder / f"{stem}-{state.process_index}.jsonl") as file:
        for outcomes in work_in_batches(batches, work, description, state.is_main_process):
            lines = [
                {"id": item.id, **(failed if result is None else result), "error": error}
                | ({} if hashes is None else {"input_hash": hashes[item.id]})
                for item, result, error in outcomes
            ]
            if note is not None:
                note.write()
            file.add(lines)
            fresh += lines
    return done | {line["id"]: line for line in gather_object(fresh)}


def in_batches(items: Sequence[Item], batch_size: int) -> list[Sequence[Item]]:
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]


def work_in_batches(
    batches: Sequence[Sequence[Item]],
    work: Callable[[Sequence[Item]], Iterable[Result]],
    description: str,
    shows_progress: bool = True,
) -> Iterator[list[tuple[Item, Result | None, str | None]]]:
    """
    Yields a list for each batch: every item with its result and its error, one of which is `None`. If a batch fails,
    its items are tried one by one.
    """
    with Progress(console=messages_console, transient=True, disable=not shows_progress) as progress:
        bar = progress.add_task(description, total=sum(map(len, batches)))
        for batch in batches:
            yield _attempt(work, batch)
            progress.advance(bar, len(batch))


def _attempt(
    work: Callable[[Sequence[Item]], Iterable[Result]], batch: Sequence[Item]
) -> list[tuple[Item, Result | None, str | None]]:
    try:
        results = list(work(batch))
    except ITEM_ERRORS as error:
        if len(batch) == 1:
            return [(batch[0], None, f"{type(error).__name__}: {error}")]
    else:
        return [(item, result, None) for item, result in zip(batch, results, strict=True)]
    # Not inside the handler: the traceback would keep the tensors of the failed batch in memory.
    return [outcome for item in batch for outcome in _attempt(work, [item])]


def read_lines(
    folder: Path,
    stem: str,
    known_ids: Sequence[str],
    with_failed: bool = False,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """
    The lines of earlier runs by their `id`. An incomplete line is removed from its file. Every process reads before
    any process may write.

    Args:
        folder (`Path`): Folder of the files of lines. It may be missing.
        stem (`str`): First part of the names of these files.
        known_ids (`Sequence[str]`): The ids of all items of this run.
        with_failed (`bool`): Also return items that failed and have not succeeded later. Their `error` is not `None`.
        hashes (`Mapping[str, str]`, *optional*): As for [`run_resumable`].

    Raises:
        ValueError: If there is a result for an id that is not in `known_ids`, or for another hash. A line of an item
            that failed has no result: its input may be repaired or removed.
    """
    known = set(known_ids)
    done = {}
    for path in sorted(folder.glob(f"{stem}-*.jsonl")):
        for line in map(json.loads, read_complete_lines(path, mends=PartialState().is_main_process)):
            id = line["id"]
            if line["error"] is not None:
                if with_failed and id in known:
                    done.setdefault(id, line)
                continue
            if id not in known:
                raise ValueError(
                    f"{path} has a line for {id!r}, which is not in the input: the input has changed, or --limit "
                    "differs from before. Leave --limit out to use all answers, or choose another --out."
                )
            if hashes is not None and line.get("input_hash") != hashes[id]:
                raise ValueError(
                    f"{path}: the line for {id!r} is about other data: its texts or images have changed since. Choose "
                    "another --out, or remove the folder."
                )
            done[id] = line
    PartialState().wait_for_everyone()
    return done
