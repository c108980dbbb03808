"""The folder that `sq-llava generate-data` writes.

OUT/data.jsonl        one row a line: `id`, `messages`, `images`, and what is known of the row; a recipe reads it so
OUT/llava.json        the same rows in LLaVA's layout
OUT/rejected.jsonl    what was made and left out: `id`, `step`, `reason`, `text`
OUT/failures.jsonl    what could not be made: `id`, `error`; the next run tries it again
OUT/answers.jsonl     the answers that were paid for; a run that was killed resumes from them
OUT/run.json          what the run is
OUT/README.md         a data card

All but the answers is made anew at the end of each run, each file in one step. With `--shard 2/8` names end in
`-00001-of-00008`, all shards write into the same folder, and the card counts those that are there.
"""

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sq_llava.resumable.jsonl import to_line


Item = TypeVar("Item")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the input: its items `index`, `index + count`, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """
        Of `i/n`, counted from 1; of `None`, all.

        Raises:
            ValueError: if it is something else.
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard {text}: give i/n, such as 1/8 to 8/8.")
        return cls(int(found[1]) - 1, int(found[2]))

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.index :: self.count]

    def name(self, file: str) -> str:
        """`data.jsonl` -> `data-00001-of-00008.jsonl`, if there are several."""
        stem, _, suffix = file.partition(".")
        return file if self.count == 1 else f"{stem}-{self.index:05}-of-{self.count:05}.{suffix}"


@dataclass(frozen=True)
class Rejected:
    """
    What was made and left out: at which step, by which rule (a short name, which is counted), its text, and its scores
    if it has any.
    """

    id: str
    step: str
    reason: str
    text: str
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """
    Args:
        title (`str`): Of the data set.
        summary (`str`): What it was made of, and how.
        settings (`dict`): What it takes to make it again; the command, models and hashes.
        shares (`Sequence[str]`): Keys of the rows whose values are counted; a list has one for each turn.
        not_checked (`Sequence[str]`): What a reader may take for granted, but should not.
    """

    title: str
    summary: str
    settings: Mapping[str, Any]
    shares: Sequence[str] = ()
    not_checked: Sequence[str] = field(default_factory=tuple)


def make_row(id: str, images: Sequence[str], turns: Iterable[tuple[str, str]], **details: Any) -> dict[str, Any]:
    """
    A row that `sq_llava/data/rows.py` and TRL read.

    Args:
        images: Paths relative to the image root, in the first question.
        turns: Questions with their answers.
        details: What else is known of the row, such as its kind and scores.
    """
    messages = []
    for question, answer in turns:
        pictures = [] if messages else [{"type": "image"} for _ in images]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": id, "messages": messages, "images": list(images), **details}


def require_utf8(path: Path) -> None:
    """
    Raises:
        ValueError: if the name of a file is no UTF-8: no row could hold it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!a}: the name is no UTF-8: rename the file.") from error


def to_llava(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of [`make_row`] in LLaVA's layout."""
    turns = []
    for message in row["messages"]:
        parts = ["<image>" if part["type"] == "image" else part["text"] for part in message["content"]]
        turns.append({"from": "human" if message["role"] == "user" else "gpt", "value": "\n".join(parts)})
    images = row["images"]
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    details = {name: value for name, value in row.items() if name not in ("id", "messages", "images")}
    return {"id": row["id"], **image, "conversations": turns, **details}


def write_output(
    out: Path,
    shard: Shard,
    rows: Iterable[Mapping[str, Any]],
    rejected: Iterable[Rejected],
    failures: Mapping[str, str],
    card: Card,
) -> None:
    """Makes all files of a shard anew, and the card."""
    out.mkdir(parents=True, exist_ok=True)
    with _new(out, shard.name("data.jsonl")) as data, _new(out, shard.name("llava.json")) as llava:
        separator = "[\n"
        for row in rows:
            data.write(to_line(row))
            llava.write(separator + json.dumps(to_llava(row), ensure_ascii=False))
            separator = ",\n"
        llava.write("[]\n" if separator == "[\n" else "\n]\n")
    with _new(out, shard.name("rejected.jsonl")) as file:
        file.writelines(
            to_line({"id": each.id, "step": each.step, "reason": each.reason, "text": each.text, **each.scores})
            for each in rejected
        )
    with _new(out, shard.name("failures.jsonl")) as file:
        file.writelines(to_line({"id": id, "error": error}) for id, error in failures.items())
    with _new(out, "README.md") as file:
        file.write(_card(out, shard, card))


def read_lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


@contextmanager
def _new(out: Path, name: str) -> Iterator[TextIO]:
    """A file that has its name once it is whole; several machines write the same one at the same time."""
    path = out / f"{name}.{socket.gethostname()}.{os.getpid()}.new"
    try:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        path.replace(out / name)
    finally:
        path.unlink(missing_ok=True)


def _files(out: Path, stem: str, shard: Shard) -> list[Path]:
    return [path for index in range(shard.count) if (path := out / Shard(index, shard.count).name(stem)).is_file()]


def _card(out: Path, shard: Shard, card: Card) -> str:
    data = _files(out, "data.jsonl", shard)
    num_turns = 0
    shares = {name: Counter() for name in card.shares}
    images = set()
    num_rows = 0
    for row in read_lines(data):
        num_rows += 1
        num_turns += len(row["messages"]) // 2
        images.update(row["images"])
        for name, counts in shares.items():
            counts.update(row[name] if isinstance(row[name], list) else [row[name]])
    reasons = Counter(f"{each['step']}: {each['reason']}" for each in read_lines(_files(out, "rejected.jsonl", shard)))
    num_failures = sum(1 for _ in read_lines(_files(out, "failures.jsonl", shard)))
    lines = [
        *_front_matter(card, num_rows, shard),
        f"# {card.title}\n",
        f"{card.summary}\n",
        f"{num_rows:,} rows, {num_turns:,} turns, {len(images):,} images, which are not in here: paths are relative "
        "to the image root of training.",
    ]
    if shard.count > 1:
        lines.append(f"{len(data)} of {shard.count} shards are there.")
    for name, counts in shares.items():
        lines += ["", f"| {name} | number | share |", "|---|---|---|"]
        lines += [f"| {value} | {count:,} | {count / counts.total():.1%} |" for value, count in counts.most_common()]
    lines += ["", f"Left out: {sum(reasons.values()):,} by the rules below; {num_failures:,} could not be made."]
    if reasons:
        lines += ["", "| step: reason | number |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(reasons.items())]
    lines += ["", "## How it was made", ""]
    lines += [f"- {name}: `{value}`" for name, value in card.settings.items()]
    lines += ["", "## What was not checked", ""]
    lines += [f"- {each}" for each in (*card.not_checked, "Licences: of images, captions, and the models' output.")]
    return "\n".join(lines) + "\n"


def _front_matter(card: Card, num_rows: int, shard: Shard) -> list[str]:
    size = next((name for limit, name in SIZES if num_rows < limit), "n>1M")
    files = "data.jsonl" if shard.count == 1 else f"data-*-of-{shard.count:05}.jsonl"
    return [
        "---",
        f"pretty_name: {json.dumps(card.title)}",
        "task_categories: [image-text-to-text]",
        f"size_categories: [{size}]",
        "tags: [synthetic, sq-llava]",
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - split: train",
        f"    path: {files}",
        "---\n",
    ]
