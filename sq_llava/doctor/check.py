"""Checks training data: reads every row and the header of every image, and counts the tokens of every row.

    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml --dataset_path mine.json --image_root images --json
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml --fix clean

`train_sft.py` checks a sample of the rows before it loads a model; `--doctor full` checks all of them. `read_row` of
`sq_llava/data/rows.py` finds the faults of a single row, and `image_faults` of `sq_llava/data/images.py` those of an
image. `TextCheck` of `sq_llava/doctor/text_check.py` finds what the tokenizer cannot use. This module adds the checks
that need other rows, and runs all checks in several processes. `docs/data.md` lists the codes of all faults.

The pixels of an image whose header and last bytes are fine are not decoded. The meaning of a text is not judged.
"""

import multiprocessing
import os
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
from sq_llava.data.json_file import JsonFile
from sq_llava.data.lengths import count_tokens, kept_exchanges, prefix_lengths, token_ids
from sq_llava.data.packing import pack_in_windows
from sq_llava.data.rows import id_of, is_embedded, read_row, rows_per_epoch, with_instruction
from sq_llava.data.self_questions import askable_turns
from sq_llava.data.sources import DataSource, Table, image_root_of, open_source
from sq_llava.doctor.text_check import TextCheck
from sq_llava.stopping import children_miss_interrupts
from sq_llava.training.settings import SQLlavaArguments
from sq_llava.training.stage_model import composed_processor


# Number of rows, and of images, that a process gets at a time.
ROWS_AT_A_TIME = 256
IMAGES_AT_A_TIME = 64
# Below this number of rows, one process is faster: a new process takes seconds to import the libraries.
ROWS_FOR_PROCESSES = 20_000
PREVIEWED_ROWS = 3
HISTOGRAM_BARS = 12


@dataclass(frozen=True)
class Finding:
    """One line of the report: a [`Fault`] and its place. `row` counts from 0 within `file`."""

    level: str
    code: str
    id: str | None
    row: int
    file: str
    message: str
    fix: str


class CheckedRow(NamedTuple):
    """
    The result for one row. `paths` are its image files, not checked yet. An unknown id or number of images is `None`,
    an unknown number of tokens is 0.
    """

    id: str | None
    faults: list[Fault]
    paths: Sequence[str] = ()
    num_images: int | None = None
    num_tokens: int = 0
    num_cut: int = 0
    num_askable: int = 0


class Place(NamedTuple):
    """The place of a row: index of its source, index within the source, and id."""

    source: int
    row: int
    id: str | None


@dataclass
class DataCheck:
    """
    The opened sources and the settings of a check. Every process gets a copy.

    Args:
        sources (`list[DataSource]`): Training data, as in the recipe. The sources are opened here, and those of
            `eval_sources` are appended.
        processor ([`SQLlavaProcessor`]): The processor of the model to train.
        plain (`bool`): The caption template of stage 1.
        max_length (`int`, *optional*): Maximum length of a row in tokens.
        self_question_ratio (`float`): Probability that a turn after the first becomes a self-question.
        packing (`bool`): Whether rows will be packed. The summary then says how full the packs are.
        eval_sources (`dict[str, list[DataSource]]`): Other data by the setting of the recipe that names it, such as
            `eval_datasets`; checked after the training data.
        read_images, measure_lengths (`bool`): Whether image files are opened, and rows are tokenized.

    Attributes:
        settings (`list[str]`): The setting that names each source.

    Raises:
        ValueError: if a source cannot be opened, or its image_root is no folder.
    """

    sources: list[DataSource]
    processor: SQLlavaProcessor
    plain: bool = False
    max_length: int | None = None
    self_question_ratio: float = 0.5
    packing: bool = False
    eval_sources: dict[str, list[DataSource]] = field(default_factory=dict)
    read_images: bool = True
    measure_lengths: bool = True
    settings: list[str] = field(init=False)
    opened: list[JsonFile | Table] = field(init=False)
    image_roots: list[Path] = field(init=False)

    def __post_init__(self):
        self.num_trained = len(self.sources)
        of_setting = {"datasets": self.sources, **self.eval_sources}
        self.settings = [setting for setting, sources in of_setting.items() for _ in sources]
        self.sources = [source for sources in of_setting.values() for source in sources]
        self.opened = [open_source(source) for source in self.sources]
        self.image_roots = [image_root_of(source, rows) for source, rows in zip(self.sources, self.opened)]
        self._texts = TextCheck(self.processor, self.plain)

    def check_rows(self, source: int, indices: Sequence[int]) -> list[CheckedRow]:
        """Checks the rows of a source at these indices, in this order."""
        checked, to_measure = [], {}
        for index, raw in zip(indices, self.opened[source].rows(indices)):
            row, messages = self._check_row(raw, source)
            if self.measure_lengths and messages is not None:
                to_measure[len(checked)] = with_instruction(messages, self.sources[source].instructions, index)
            checked.append(row)
        tokenized = token_ids(self.processor, list(to_measure.values()), self.plain)
        for (index, messages), ids in zip(to_measure.items(), tokenized):
            row = self._with_length(checked[index], messages, count_tokens(self.processor, ids))
            checked[index] = row._replace(faults=[*row.faults, *self._texts.unknown_faults(messages, ids)])
        return checked

    def _check_row(self, raw: Any, source: int) -> tuple[CheckedRow, list[dict] | None]:
        """Checks everything but the length. Returns the result, and the messages if they can be tokenized."""
        if isinstance(raw, ValueError):
            fault = Fault(
                "broken_encoding" if isinstance(raw, UnicodeDecodeError) else "broken_json",
                f"the row cannot be read as JSON: {raw}.",
                "Write it again as JSON in UTF-8.",
            )
            return CheckedRow(None, [fault]), None
        row_id = id_of(raw)
        faults, messages, images = read_row(raw, self.image_roots[source])
        if any(fault.level == "error" for fault in faults):
            return CheckedRow(row_id, faults), None
        paths = []
        text_faults = list(self._texts.faults(messages))
        can_be_tokenized = not any(fault.level == "error" for fault in text_faults)
        faults += text_faults
        if self.read_images:
            for image in images:
                if is_embedded(image):
                    faults += image_faults(image)
                else:
                    paths.append(os.path.join(self.image_roots[source], image))
        num_askable = 0 if self.plain else len(askable_turns(messages))
        row = CheckedRow(row_id, faults, paths, len(images), num_askable=num_askable)
        return row, messages if can_be_tokenized else None

    def _with_length(self, row: CheckedRow, messages: list[dict], length: int) -> CheckedRow:
        """Adds the length of a row without self-questions, and what the collator cuts off from it."""
        row = row._replace(num_tokens=length)
        if self.max_length is None or length <= self.max_length:
            return row
        [lengths] = prefix_lengths(self.processor, [messages], self.plain)
        if lengths[0] > self.max_length:
            fault = Fault(
                "too_long",
                f"its first question and answer have {lengths[0]} tokens, more than max_length {self.max_length}.",
                "Raise max_length or shorten them.",
            )
            return row._replace(faults=[*row.faults, fault])
        kept = kept_exchanges(lengths, self.max_length, row.id)
        num_turns, num_cut = 2 * (len(lengths) - kept), length - int(lengths[kept - 1])
        fault = Fault(
            "cut",
            f"the row has {length} tokens, so its last {num_turns} turns ({num_cut} tokens) are cut off.",
            f"Raise max_length ({self.max_length}) or split the row.",
            "warning",
        )
        num_askable = 0 if self.plain else len(askable_turns(messages[:-num_turns]))
        return row._replace(faults=[*row.faults, fault], num_cut=num_cut, num_askable=num_askable)


@dataclass
class Report:
    """
    Attributes:
        findings (`list[Finding]`): Sorted by source and row.
        summary (`dict`): Counts over all sources, as `--json` prints them.
        left_out (`list[set[int]]`): Indices of the rows with errors, for each source.
        sound (`list[tuple[int, int]]`): Source and index of the first few rows without errors.
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
    """Returns the indices of the rows to check in each source: all, or in total about `limit`, evenly spaced."""
    sizes = [len(rows) for rows in check.opened]
    if limit is None or limit >= sum(sizes):
        return [range(size) for size in sizes]
    wanted = [-(-limit * size // sum(sizes)) for size in sizes]
    return [np.linspace(0, size - 1, count).astype(int).tolist() for size, count in zip(sizes, wanted)]


_check: DataCheck | None = None  # the check of this process


def _begin(check: DataCheck) -> None:
    global _check
    _check = check
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already


def _check_rows(task: tuple[int, Sequence[int]]) -> list[CheckedRow]:
    return _check.check_rows(*task)


def _check_images(paths: Sequence[str]) -> list[list[Fault]]:
    return [list(image_faults(path)) for path in paths]


@contextmanager
def in_processes(check: DataCheck, num_proc: int) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Provides a `map` over processes that each hold the check. The results come in the order of the tasks."""
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
        for process in multiprocessing.active_children():  # do not wait until they have imported the libraries
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def examine(check: DataCheck, progress: Progress, limit: int | None = None, num_proc: int | None = None) -> Report:
    """
    Checks rows and images. The report does not depend on the number of processes.

    Args:
        check ([`DataCheck`]): What to check.
        progress (`rich.progress.Progress`): Shows the progress.
        limit (`int`, *optional*): Check about this many rows, evenly spaced.
        num_proc (`int`, *optional*): Number of processes. Default: one per core, or one if there are few rows.
    """
    chosen = choose_rows(check, limit)
    if num_proc is None:
        num_proc = 1 if sum(map(len, chosen)) < ROWS_FOR_PROCESSES else os.cpu_count() or 1
    with in_processes(check, num_proc) as map_in_order:
        return go_through(check, chosen, map_in_order, progress)


def go_through(check: DataCheck, chosen: list[Sequence[int]], map_in_order: Callable, progress: Progress) -> Report:
    """Checks the chosen rows of each source, then each of their image files once."""
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
    """Collects the results of the processes: first those of the rows, in their order, then those of the images."""

    def __init__(self, check: DataCheck, chosen: list[Sequence[int]]):
        self.check, self.chosen = check, chosen
        self.faults: dict[Place, list[Fault]] = {}
        self.first_of_id: list[dict[str, int]] = [{} for _ in check.sources]
        # Image file -> the rows that use it. Each file is checked once.
        self.users: dict[str, list[Place]] = {}
        self.lengths: list[int] = []
        self.num_cut: list[int] = []
        self.num_askable = [0] * len(check.sources)
        self.num_images = self.num_readable = self.num_text_only = 0
        for source, rows in enumerate(check.opened):
            if rows.broken:
                message = f"the file cannot be read as JSON from here on: {rows.broken}."
                fault = Fault("broken_json", message, "Correct the file there.")
                self._add(Place(source, len(rows), None), [fault])
            elif not len(rows):
                self._add(Place(source, 0, None), [Fault("no_rows", "the file has no rows.", "Remove this source.")])

    def _add(self, place: Place, faults: list[Fault]) -> None:
        if faults:
            self.faults.setdefault(place, []).extend(faults)

    def add_row(self, source: int, index: int, row: CheckedRow) -> None:
        place = Place(source, index, row.id)
        self._add(place, row.faults)
        if row.id is not None:
            first = self.first_of_id[source].setdefault(row.id, index)
            if first != index:
                fix = "Give each row its own id. You need ids to find rows; training ignores them."
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
            Finding(id=place.id, row=place.row, file=self.check.opened[place.source].path, **asdict(fault))
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
                    "setting": setting,
                    "rows": len(rows),
                    "rows_looked_at": len(looked_at),
                    "rows_with_errors": len(wrong),
                }
                for rows, setting, looked_at, wrong in zip(
                    self.check.opened, self.check.settings, self.chosen, left_out
                )
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
        """Estimates the self-questions in one epoch, from the rows that were checked."""
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
        width = -(-width // digit) * digit  # rounded up to one digit and zeros
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
    """Makes the check of a recipe. It needs the data and the processor, but no weights."""
    return DataCheck(
        arguments.datasets,
        composed_processor(arguments, model_config),
        plain=arguments.stage == "align",
        max_length=training_args.max_length,
        self_question_ratio=arguments.self_question_ratio,
        packing=arguments.packing,
        eval_sources={
            "eval_datasets": arguments.eval_datasets,
            "generation_datasets": arguments.generation_datasets,
            "text_probe": [] if arguments.text_probe is None else [DataSource(arguments.text_probe)],
        },
        **looked_at,
    )
