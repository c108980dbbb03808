"""The data check: reads every row, the header of every image and the length of every row before training meets them.

    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml --dataset_path mine.json --image_root images --json
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml --fix mended

`train_sft.py` looks at a sample of the rows before it loads a model, and at all of them with `--doctor full`. What is
wrong with a row by itself is said by `read_row` of `sq_llava/data/rows.py`, with an image by `image_faults` of
`sq_llava/data/images.py`; here stands what needs the processor, the other rows, or several processes. What it does not
do: decode the pixels of an image whose header and end are whole; judge what a text says.
"""

import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress
from trl import ModelConfig, SFTConfig

from processing_sq_llava import SQLlavaProcessor
from sq_llava.data.images import Fault, image_faults
from sq_llava.data.lengths import kept_exchanges, prefix_lengths, token_counts
from sq_llava.data.packing import pack_in_windows
from sq_llava.data.row_layouts import IMAGE_PART
from sq_llava.data.rows import is_embedded, read_row, rows_per_epoch, with_instruction
from sq_llava.data.sources import DataSource, JsonFile, Table, image_root_of, open_source
from sq_llava.stopping import children_miss_interrupts
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.stage_model import composed_processor


# Rows, and images, that a process is given at a time.
ROWS_AT_A_TIME = 256
IMAGES_AT_A_TIME = 64
# A new process takes seconds to import the libraries: below this number of rows, one process is faster.
ROWS_FOR_PROCESSES = 20_000
PREVIEWED_ROWS = 3
HISTOGRAM_BARS = 12
# All but tab and line breaks.
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
CONTROL_BYTES = bytes(byte for byte in range(128) if CONTROL_CHARACTER.match(chr(byte)))


@dataclass(frozen=True)
class Finding:
    """One line of the report. `row` counts from 0 in its `file`; `level` is as of [`Fault`]."""

    level: str
    code: str
    id: str | None
    row: int
    file: str
    message: str
    fix: str


class CheckedRow(NamedTuple):
    """What one row gives: `paths` are its image files, still to be looked at. `None` and 0 tokens: not known."""

    id: str | None
    faults: list[Fault]
    paths: Sequence[str] = ()
    num_images: int | None = None
    num_tokens: int = 0
    num_cut: int = 0
    num_askable: int = 0


class Place(NamedTuple):
    """Where a row stands: the number of its source, its own number there, and its id."""

    source: int
    row: int
    id: str | None


@dataclass
class DataCheck:
    """
    What is checked, and what for; it travels to every process.

    Args:
        sources (`list[DataSource]`): To train on, as in the recipe. They are opened here.
        processor ([`SQLlavaProcessor`]): Of the model to train.
        plain (`bool`): The caption layout of stage 1.
        max_length (`int`, *optional*): Of a row, in tokens.
        self_question_ratio (`float`): Probability that a turn after the first is asked by the model.
        packing (`bool`): Whether rows will be packed: how full the packs are is told then.
        eval_sources (`list[DataSource]`): Checked too, behind the others.
        read_images, measure_lengths (`bool`): Whether image files are opened, and rows are tokenized.

    Raises:
        ValueError: if a source cannot be opened at all, or its image_root is no folder.
    """

    sources: list[DataSource]
    processor: SQLlavaProcessor
    plain: bool = False
    max_length: int | None = None
    self_question_ratio: float = 0.5
    packing: bool = False
    eval_sources: list[DataSource] = field(default_factory=list)
    read_images: bool = True
    measure_lengths: bool = True
    opened: list[JsonFile | Table] = field(init=False)
    image_roots: list[Path] = field(init=False)

    def __post_init__(self):
        self.num_trained = len(self.sources)
        self.sources = [*self.sources, *self.eval_sources]
        self.opened = [open_source(source) for source in self.sources]
        self.image_roots = [image_root_of(source, rows) for source, rows in zip(self.sources, self.opened)]
        self._markers = [] if self.plain else [self.processor.user_marker, self.processor.assistant_marker]
        # Without any of these, a text holds no control token: most have none.
        self._first_characters = {token[0] for token in self.processor.control_tokens}

    def check_rows(self, source: int, indices: Sequence[int]) -> list[CheckedRow]:
        """The rows of these places in a source, in their order."""
        checked, to_measure = [], {}
        for index, raw in zip(indices, self.opened[source].rows(indices)):
            row, messages = self._check_row(raw, source)
            if self.measure_lengths and messages is not None:
                to_measure[len(checked)] = with_instruction(messages, self.sources[source].instructions, index)
            checked.append(row)
        lengths = token_counts(self.processor, list(to_measure.values()), self.plain)
        for (index, messages), length in zip(to_measure.items(), lengths):
            checked[index] = self._with_length(checked[index], messages, length)
        return checked

    def _check_row(self, raw: Any, source: int) -> tuple[CheckedRow, list[dict] | None]:
        """The row, and its messages if they can be tokenized."""
        if isinstance(raw, ValueError):
            code = "broken_encoding" if isinstance(raw, UnicodeDecodeError) else "broken_json"
            return CheckedRow(None, [Fault(code, f"cannot be read as JSON: {raw}.", "Write the row anew.")]), None
        row_id = str(raw["id"]) if isinstance(raw, dict) and raw.get("id") is not None else None
        faults, messages, images = read_row(raw, self.image_roots[source])
        if any(fault.level == "error" for fault in faults):
            return CheckedRow(row_id, faults), None
        paths = []
        text_faults = list(self._text_faults(messages))
        can_be_tokenized = not any(fault.level == "error" for fault in text_faults)
        faults += text_faults
        if self.read_images:
            for image in images:
                if is_embedded(image):
                    faults += image_faults(image)
                else:
                    paths.append(os.path.join(self.image_roots[source], image))
        num_askable = self._num_askable(messages) if images else 0
        row = CheckedRow(row_id, faults, paths, len(images), num_askable=num_askable)
        return row, messages if can_be_tokenized else None

    def _text_faults(self, messages: list[dict]) -> Iterator[Fault]:
        # As the chat template does, which refuses a row with a control token.
        texts = ["".join([part["text"] for part in m["content"] if part["type"] == "text"]) for m in messages]
        whole = "\n".join(texts)
        encoded = whole.encode()
        # Faster than the expression, which only the texts of a few rows need.
        if b"\xc2" in encoded or len(encoded.translate(None, CONTROL_BYTES)) < len(encoded):
            for index, text in enumerate(texts):
                if found := sorted(set(CONTROL_CHARACTER.findall(text))):
                    yield Fault(
                        "control_character",
                        f"turn {index} holds {', '.join(map(ascii, found))}, which no keyboard writes.",
                        "Take it out.",
                        "warning",
                    )
        if not any(beginning in whole for beginning in (*self._first_characters, *self._markers)):
            return
        for index, text in enumerate(texts):
            if found := [token for token in self.processor.control_tokens if token in text]:
                yield Fault(
                    "control_token",
                    f"turn {index} holds {', '.join(map(repr, found))}, which the model reads as a command.",
                    "Take it out, or write it otherwise.",
                )
            if found := [marker for marker in self._markers if marker in text]:
                yield Fault(
                    "role_marker",
                    f"turn {index} holds {', '.join(map(repr, found))}, as if another turn began there.",
                    "Make turns of it, or write it otherwise.",
                    "warning",
                )

    def _num_askable(self, messages: list[dict]) -> int:
        """Turns that may be drawn as self-questions."""
        holds_image = [IMAGE_PART in message["content"] for message in messages]
        if self.plain or not any(holds_image):
            return 0
        user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
        return sum(not holds_image[index] for index in user_turns[1:])

    def _with_length(self, row: CheckedRow, messages: list[dict], length: int) -> CheckedRow:
        """The row with its length while no turn is a self-question, and with what the collator cuts off."""
        row = row._replace(num_tokens=length)
        if self.max_length is None or length <= self.max_length:
            return row
        [lengths] = prefix_lengths(self.processor, [messages], self.plain)
        if lengths[0] > self.max_length:
            fault = Fault(
                "too_long",
                f"its first question and answer have {lengths[0]} tokens, more than max_length {self.max_length}.",
                "Raise max_length, or shorten them.",
            )
            return row._replace(faults=[*row.faults, fault])
        kept = kept_exchanges(lengths, self.max_length, row.id)
        num_turns, num_cut = 2 * (len(lengths) - kept), length - int(lengths[kept - 1])
        fault = Fault(
            "cut",
            f"has {length} tokens: its last {num_turns} turns, {num_cut} tokens, are cut off.",
            f"Raise max_length, {self.max_length}, or split the row.",
            "warning",
        )
        num_askable = self._num_askable(messages[:-num_turns])
        return row._replace(faults=[*row.faults, fault], num_cut=num_cut, num_askable=num_askable)

    def check_images(self, paths: Sequence[str]) -> list[list[Fault]]:
        return [list(image_faults(path)) for path in paths]


@dataclass
class Report:
    """
    Attributes:
        findings (`list[Finding]`): In the order of sources and rows.
        summary (`dict`): Numbers of the whole, as JSON has them.
        left_out (`list[set[int]]`): The rows with errors, for each source.
        sound (`list[tuple[int, int]]`): Source and row of the first few without errors.
    """

    findings: list[Finding]
    summary: dict[str, Any]
    left_out: list[set[int]]
    sound: list[tuple[int, int]]

    @property
    def num_errors(self) -> int:
        return self.summary["findings"]["error"]

    def to_json(self) -> dict[str, Any]:
        return {"findings": [asdict(finding) for finding in self.findings], "summary": self.summary}


def choose_rows(check: DataCheck, limit: int | None) -> list[Sequence[int]]:
    """The rows to look at in each source: all, or about `limit` in all, spread evenly."""
    sizes = [len(rows) for rows in check.opened]
    if limit is None or limit >= sum(sizes):
        return [range(size) for size in sizes]
    wanted = [-(-limit * size // sum(sizes)) for size in sizes]
    return [np.linspace(0, size - 1, count).astype(int).tolist() for size, count in zip(sizes, wanted)]


_check: DataCheck | None = None  # of this process


def _begin(check: DataCheck) -> None:
    global _check
    _check = check
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already


def _check_rows(task: tuple[int, Sequence[int]]) -> list[CheckedRow]:
    return _check.check_rows(*task)


def _check_images(paths: Sequence[str]) -> list[list[Fault]]:
    return _check.check_images(paths)


@contextmanager
def in_processes(check: DataCheck, num_proc: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Gives a `map` over processes that have the check, whose results come in the order of the tasks."""
    global _check
    if num_proc == 1:
        _check = check
        yield map
        _check = None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_proc, context, initializer=_begin, initargs=(check,))
    with children_miss_interrupts():
        for _ in range(num_proc):
            pool.submit(int)  # starts a process
    try:
        yield pool.map
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():  # else, their seconds of imports are waited for
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def examine(check: DataCheck, progress: Progress, limit: int | None = None, num_proc: int | None = None) -> Report:
    """
    Looks at rows and images. The report does not depend on the number of processes.

    Args:
        progress (`rich.progress.Progress`): Where to show how far it is.
        limit (`int`, *optional*): Look at about this many rows, evenly spaced.
        num_proc (`int`, *optional*): Processes; by default one for each core, and one alone for few rows.
    """
    chosen = choose_rows(check, limit)
    if num_proc is None:
        num_proc = 1 if sum(map(len, chosen)) < ROWS_FOR_PROCESSES else os.cpu_count() or 1
    with in_processes(check, num_proc) as map_in_order:
        return go_through(check, chosen, map_in_order, progress)


def go_through(check: DataCheck, chosen: list[Sequence[int]], map_in_order: Callable, progress: Progress) -> Report:
    """Looks at these rows of each source, then at their image files, each once."""
    tally = Tally(check, chosen)
    bar = progress.add_task("Rows", total=sum(map(len, chosen)))
    tasks = [
        (source, indices[begin : begin + ROWS_AT_A_TIME])
        for source, indices in enumerate(chosen)
        for begin in range(0, len(indices), ROWS_AT_A_TIME)
    ]
    for (source, indices), rows in zip(tasks, map_in_order(_check_rows, tasks)):
        for index, row in zip(indices, rows):
            tally.add_row(source, index, row)
        progress.advance(bar, len(indices))

    bar = progress.add_task("Images", total=len(tally.users))
    paths = list(tally.users)
    tasks = [paths[begin : begin + IMAGES_AT_A_TIME] for begin in range(0, len(paths), IMAGES_AT_A_TIME)]
    for task, results in zip(tasks, map_in_order(_check_images, tasks)):
        for path, faults in zip(task, results):
            tally.add_image(path, faults)
        progress.advance(bar, len(task))
    return tally.report()


class Tally:
    """Joins what the processes found. Rows come in their order, then images."""

    def __init__(self, check: DataCheck, chosen: list[Sequence[int]]):
        self.check, self.chosen = check, chosen
        self.faults: dict[Place, list[Fault]] = {}
        self.first_of_id: list[dict[str, int]] = [{} for _ in check.sources]
        # The rows that use an image file: it is looked at once.
        self.users: dict[str, list[Place]] = {}
        self.lengths: list[int] = []
        self.num_cut: list[int] = []
        self.num_askable = [0] * len(check.sources)
        self.num_images = self.num_readable = self.num_text_only = 0
        for source, rows in enumerate(check.opened):
            if rows.broken:
                fault = Fault("broken_json", f"{rows.broken}. No row behind can be found.", "Mend the file there.")
                self._add(Place(source, len(rows), None), [fault])
            elif not len(rows):
                self._add(Place(source, 0, None), [Fault("no_rows", "the file has no rows.", "Take it out.")])

    def _add(self, place: Place, faults: list[Fault]) -> None:
        if faults:
            self.faults.setdefault(place, []).extend(faults)

    def add_row(self, source: int, index: int, row: CheckedRow) -> None:
        place = Place(source, index, row.id)
        self._add(place, row.faults)
        if row.id is not None:
            first = self.first_of_id[source].setdefault(row.id, index)
            if first != index:
                fix = "Give it another, to find it again; training does not use ids."
                self._add(place, [Fault("duplicate_id", f"row {first} has the same id.", fix, "warning")])
        for path in row.paths:
            self.users.setdefault(path, []).append(place)
        if row.num_images is not None:
            self.num_readable += 1
            self.num_images += row.num_images
            self.num_text_only += row.num_images == 0
        if row.num_tokens:
            self.lengths.append(row.num_tokens)
            self.num_cut.append(row.num_cut)
        self.num_askable[source] += row.num_askable

    def add_image(self, path: str, faults: list[Fault]) -> None:
        for place in dict.fromkeys(self.users[path]):
            self._add(place, faults)

    def report(self) -> Report:
        findings = [
            Finding(
                fault.level,
                fault.code,
                place.id,
                place.row,
                self.check.opened[place.source].path,
                fault.message,
                fault.fix,
            )
            for place in sorted(self.faults, key=lambda place: (place.source, place.row))
            for fault in self.faults[place]
        ]
        left_out = [set() for _ in self.check.sources]
        for place, faults in self.faults.items():
            if any(fault.level == "error" for fault in faults):
                left_out[place.source].add(place.row)
        sound = ((s, row) for s, rows in enumerate(self.chosen) for row in rows if row not in left_out[s])
        levels = Counter(finding.level for finding in findings)
        summary = {
            "sources": [
                {
                    "file": rows.path,
                    "rows": len(rows),
                    "rows_looked_at": len(looked_at),
                    "rows_with_errors": len(wrong),
                }
                for rows, looked_at, wrong in zip(self.check.opened, self.chosen, left_out)
            ],
            "findings": {level: levels[level] for level in ("error", "warning", "info")},
            "codes": dict(Counter(finding.code for finding in findings)),
            "images": self.num_images,
            "image_files": len(self.users),
            "text_only_share": self.num_text_only / max(self.num_readable, 1),
            "self_questions_per_epoch": round(self._self_questions(), 1),
            "tokens": self._token_summary() if self.lengths else None,
        }
        return Report(findings, summary, left_out, list(islice(sound, PREVIEWED_ROWS)))

    def _self_questions(self) -> float:
        """Expected in an epoch; where rows were left out of the look, the others stand for them."""
        return self.check.self_question_ratio * sum(
            number * rows_per_epoch(source, len(rows)) / len(looked_at)
            for number, source, rows, looked_at in zip(
                self.num_askable[: self.check.num_trained], self.check.sources, self.check.opened, self.chosen
            )
            if len(looked_at)
        )

    def _token_summary(self) -> dict[str, Any]:
        lengths, num_cut = np.array(self.lengths), np.array(self.num_cut)
        width = max(1, -(-int(lengths.max()) // HISTOGRAM_BARS))
        digit = 10 ** (len(str(width)) - 1)
        width = -(-width // digit) * digit  # a round number
        counts = np.bincount(lengths // width)
        packing, kept = None, lengths - num_cut
        if self.check.packing and (kept <= self.check.max_length).any():
            fitting = kept[kept <= self.check.max_length]
            packs = pack_in_windows(np.arange(len(fitting)), fitting.tolist(), self.check.max_length)
            fill = float(fitting.sum() / (len(packs) * self.check.max_length))
            packing = {"packs": len(packs), "fill": round(fill, 3)}
        return {
            "rows": len(lengths),
            "total": int(lengths.sum()),
            "mean": round(float(lengths.mean()), 1),
            "median": float(np.median(lengths)),
            "percentile_95": round(float(np.percentile(lengths, 95)), 1),
            "longest": int(lengths.max()),
            "max_length": self.check.max_length,
            "rows_cut": int((num_cut > 0).sum()),
            "tokens_cut": int(num_cut.sum()),
            "packing": packing,
            "histogram": [
                {"from": bar * width, "to": (bar + 1) * width - 1, "rows": int(count)}
                for bar, count in enumerate(counts)
            ],
        }


def data_check(
    arguments: SQLlavaArguments, training_args: SFTConfig, model_config: ModelConfig, **looked_at: bool
) -> DataCheck:
    """What the doctor needs of a recipe: the data and the processor, but no weights."""
    return DataCheck(
        arguments.datasets,
        composed_processor(arguments, model_config),
        plain=arguments.stage == "align",
        max_length=training_args.max_length,
        self_question_ratio=arguments.self_question_ratio,
        packing=arguments.packing,
        eval_sources=[*arguments.eval_datasets, *arguments.generation_datasets],
        **looked_at,
    )
