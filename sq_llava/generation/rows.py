"""The output folder of `sq-llava generate-data`.

OUT/data.jsonl        one row per line: `id`, `messages`, `images` and details; a recipe can read it directly
OUT/llava.json        the same rows in LLaVA's layout
OUT/rejected.jsonl    texts that were made, but left out: `id`, `step`, `reason`, `text`
OUT/failures.jsonl    rows that could not be made: `id`, `error`; the next run tries them again
OUT/answers.jsonl     paid answers, from which a killed run resumes
OUT/run.json          the settings of the run
OUT/README.md         a data card

Each run rewrites all files but the answers when it ends, each file in one step. With `--shard 2/8`, file names end in
`-00001-of-00008`. All shards write into the same folder, and the card counts the shards that are there.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

from sq_llava.output import written_whole
from sq_llava.resumable.jsonl import to_line


Item = TypeVar("Item")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the input: the items `index`, `index + count`, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> "Shard":
        """
        Reads `i/n`, counted from 1. `None` is the whole input.

        Raises:
            ValueError: If the text has another form.
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--shard {text}: expected i/n, such as 1/8 to 8/8.")
        return cls(int(found[1]) - 1, int(found[2]))

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.index :: self.count]

    @property
    def lock(self) -> str:
        """The part of the output folder that a run of this shard locks; empty for the whole folder."""
        return "" if self.count == 1 else f"shard-{self.index:05}-of-{self.count:05}"

    def name(self, file: str) -> str:
        """`data.jsonl` -> `data-00001-of-00008.jsonl`, if there are several shards."""
        stem, _, suffix = file.partition(".")
        return file if self.count == 1 else f"{stem}-{self.index:05}-of-{self.count:05}.{suffix}"


@dataclass(frozen=True)
class Rejected:
    """
    A text that was made, but left out. `step` and `reason` name the filter and its rule. The card counts the reasons,
    so `reason` must not depend on the text.
    """

    id: str
    step: str
    reason: str
    text: str
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """
    The content of the data card.

    Args:
        title (`str`): Title of the dataset.
        summary (`str`): What the dataset was made from, and how.
        settings (`dict`): Everything that is needed to make it again: the command, models and hashes.
        shares (`Sequence[str]`): Keys of the rows whose values are counted. A value can be a list, one for each turn.
        not_checked (`Sequence[str]`): Properties that nobody checked, but that a reader may take for granted.
    """

    title: str
    summary: str
    settings: Mapping[str, Any]
    shares: Sequence[str] = ()
    not_checked: Sequence[str] = field(default_factory=tuple)


def make_row(
    id: str, images: Sequence[str], turns: Iterable[tuple[str, str]], image_last: bool = False, **details: Any
) -> dict[str, Any]:
    """
    A row that `sq_llava/data/rows.py` and TRL can read.

    Args:
        id (`str`): Id of the row.
        images (`Sequence[str]`): Paths relative to the image root.
        turns (`Iterable[tuple[str, str]]`): Questions with their answers.
        image_last (`bool`): Whether the images go behind the first question, not before it.
        details: Further keys of the row, such as its kind and scores.
    """
    messages = []
    for question, answer in turns:
        pictures = [] if messages else [{"type": "image"} for _ in images]
        content = [*pictures, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content[::-1] if image_last else content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": id, "messages": messages, "images": list(images), **details}


def require_utf8(path: Path) -> None:
    """
    Raises:
        ValueError: If a file name is not UTF-8, because no row can hold it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!a}: the file name is not UTF-8. Rename the file.") from error


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
    """Rewrites all files of a shard, and the card."""
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
    """A file that gets its name when it is complete. Several machines may write the same file at the same time."""
    with written_whole(out / name) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def made_files(out: Path, stem: str, shard: Shard) -> list[Path]:
    """The files of all shards that are there."""
    return [path for index in range(shard.count) if (path := out / Shard(index, shard.count).name(stem)).is_file()]


def _card(out: Path, shard: Shard, card: Card) -> str:
    data = made_files(out, "data.jsonl", shard)
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
    reasons = Counter(
        f"{each['step']}: {each['reason']}" for each in read_lines(made_files(out, "rejected.jsonl", shard))
    )
    num_failures = sum(1 for _ in read_lines(made_files(out, "failures.jsonl", shard)))
    lines = [
        *_front_matter(card, num_rows, shard),
        f"# {card.title}\n",
        f"{card.summary}\n",
        f"{num_rows:,} rows, {num_turns:,} turns, {len(images):,} images. The images are not in this folder; their "
        "paths are relative to the image root of training.",
    ]
    if shard.count > 1:
        lines.append(f"{len(data)} of {shard.count} shards are finished.")
    for name, counts in shares.items():
        lines += ["", f"| {name} | number | share |", "|---|---|---|"]
        lines += [f"| {value} | {count:,} | {count / counts.total():.1%} |" for value, count in counts.most_common()]
    lines += ["", f"Left out: {sum(reasons.values()):,} by the rules below. {num_failures:,} could not be made."]
    if reasons:
        lines += ["", "| step: reason | number |", "|---|---|"]
        lines += [f"| {reason} | {count:,} |" for reason, count in sorted(reasons.items())]
    lines += ["", "## How it was made", ""]
    lines += [f"- {name}: `{value}`" for name, value in card.settings.items()]
    lines += ["", "## What was not checked", ""]
    licences = "The licences of the images and captions, and the terms for the models' output."
    lines += [f"- {each}" for each in (*card.not_checked, licences)]
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
