"""A benchmark: it reads examples from files, makes a prompt for each, and scores each answer.

Each module such as `pope.py` holds one benchmark and ends with its [`Task`]. All benchmarks record and count their
examples in the same way.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sq_llava.evaluation.judge import Judge
from sq_llava.evaluation.reading import Data, TaskImage
from sq_llava.evaluation.uncertainty import (
    Interval,
    corpus_interval,
    mean_interval,
    repeat,
    resampled,
    standard_error,
)


@dataclass(frozen=True)
class Example:
    """
    One question of a benchmark.

    Args:
        id (`str`): Unique within the task. Answers are matched to examples by it.
        prompt (`str`): Text of the user turn. It follows the images.
        images (`Sequence`): Paths, or images stored in a table.
        reference (`Any`): What the answer is scored against, JSON-serializable; `None` if only a server has it.
        details (`dict`): Other JSON-serializable data for the score, the breakdown or the submission, such as options.
    """

    id: str
    prompt: str
    images: Sequence[TaskImage]
    reference: Any
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """
    The score of one answer.

    Args:
        values (`dict[str, float]`): Metric name -> value for this answer. The metric is the mean over its examples.
        is_parsed (`bool`): Whether the task could parse the answer.
        prediction (`Any`): The parsed answer, or the judge's text. JSON-serializable.
        judge_error (`str`, *optional*): Why the judge gave no grade. `values` then has only the metrics that do not
            need one, and corpus metrics leave the example out.
    """

    values: dict[str, float]
    is_parsed: bool = True
    prediction: Any = None
    judge_error: str | None = None


@dataclass(frozen=True)
class Record:
    """One line of `examples.jsonl`: an example with the model's answer, or with the `error` that prevented one."""

    example: Example
    prompt: str
    answer: str
    error: str | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Metric:
    """
    A metric over `num` examples, or units of examples. `value` is from 0 to 1 unless the task says otherwise.
    `standard_error` and the 95% `interval` are `None` for fewer than two units, and for a corpus metric that is not
    bootstrapped.
    """

    name: str
    value: float
    num: int
    standard_error: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Task:
    """
    A benchmark.

    Args:
        name (`str`): Name on the command line.
        title (`str`): Name in the report.
        hub_id (`str`, *optional*): The task's dataset on the Hub.
        read (`Callable`): [`Data`] -> list of [`Example`]. Reads the Hub's Parquet files or LLaVA's folders.
        score (`Callable`): (example, answer) -> [`Score`]; `None` if a server or a judge scores.
        judge (`Callable`, *optional*): (records, [`Judge`], folder) -> one score per record. A failed record is not
            sent to the judge and gets the lowest score.
        folder (`str`, *optional*): Name of the task's folder in LLaVA's layout, if it differs from `name`.
        main_metric (`str`): The metric that the paper's tables report.
        corpus_metrics (`Callable`, *optional*): Scored records -> `{name: value}`, for metrics that are not a mean
            over examples.
        weighted_metrics (`Callable`, *optional*): A fast form of `corpus_metrics` for resampling. Scored records -> a
            function that takes an array (how often each record counts) and returns the corpus metrics.
        num_resamples (`int`): Bootstrap resamples for the standard errors of `corpus_metrics`.
        unit (`Callable`, *optional*): Example -> key of its unit, for examples that are not independent, such as the
            questions about an image. Standard errors, intervals and comparisons keep a unit together.
        score_unit (`Callable`, *optional*): Scored records of a unit -> `{name: value}`, for metrics that are means
            over units. Empty for a unit that lacks examples.
        breakdown (`str`, *optional*): Key of `Example.details`. Each of its values gets its own metrics. An example
            without the key counts only in the overall metrics.
        write_submission (`Callable`, *optional*): (records, folder) -> the file to upload to the task's server, or
            `None` for a split that no server scores.
        max_new_tokens (`int`): Maximum number of tokens in an answer.
        note (`str`, *optional*): Text for the report that explains how results compare with published ones.
        scale (`float`): Factor that brings `main_metric` to the unit of the paper's tables.
        metrics_are_shares (`bool`): Whether all metrics are shares, from 0 to 1. Otherwise 0 and 1 are numbers like
            any other, and Wilson's interval is not used.
    """

    name: str
    title: str
    hub_id: str | None
    read: Callable[[Data], list[Example]]
    score: Callable[[Example, str], Score] | None
    main_metric: str
    judge: Callable[[Sequence[Record], Judge, Path], list[Score]] | None = None
    folder: str | None = None
    corpus_metrics: Callable[[Sequence[Record]], dict[str, float]] | None = None
    weighted_metrics: Callable[[Sequence[Record]], Callable[[np.ndarray], dict[str, float]]] | None = None
    num_resamples: int = 200
    unit: Callable[[Example], Hashable] | None = None
    score_unit: Callable[[Sequence[Record]], dict[str, float]] | None = None
    breakdown: str | None = None
    write_submission: Callable[[Sequence[Record], Path], Path | None] | None = None
    max_new_tokens: int = 128
    note: str | None = None
    scale: float = 100.0
    metrics_are_shares: bool = True


def main_score(task: Task, record: Record) -> float | None:
    """
    The score of one answer, for sorting examples.

    Returns:
        The main metric of this answer. If it exists only for the whole corpus: 1 if the prediction equals the
        reference, else 0; an answer that could not be parsed (`None`) is wrong. If it does, but prediction or
        reference is not a string: the first value of the score. `None` without a value, a score or a grade.
    """
    if record.score is None:
        return None
    values, reference = record.score.values, record.example.reference
    if task.main_metric in values:
        return values[task.main_metric]
    if record.score.judge_error is not None:
        return None
    if isinstance(record.score.prediction, str | None) and isinstance(reference, str):
        return float(record.error is None and record.score.prediction == reference)
    return next(iter(values.values()), None)


def summarize(task: Task, records: Sequence[Record]) -> list[Metric]:
    """
    The metrics of a task, over all examples and for each value of the breakdown.

    Failed examples count as wrong. Examples without a score do not count, and those without a grade from the judge
    only in metrics that need none.

    Args:
        records: One record per example.
    """
    records = [record for record in records if record.score is not None]
    if not records:
        return []
    metrics = _metrics_of(task, records, "")
    for value in breakdown_values(task, records):
        chosen = [record for record in records if record.example.details.get(task.breakdown) == value]
        metrics += _metrics_of(task, chosen, f"{value}/")
    return metrics


def breakdown_values(task: Task, records: Sequence[Record]) -> list[str]:
    """The values of the task's breakdown, such as the categories."""
    return sorted({record.example.details.get(task.breakdown) for record in records} - {None})


def units_of(task: Task, records: Sequence[Record]) -> list[Hashable]:
    """The unit of each record. By default, each is its own."""
    return [record.example.id if task.unit is None else task.unit(record.example) for record in records]


def scored_parts(task: Task, records: Sequence[Record]) -> Iterator[tuple[Hashable, dict[str, float]]]:
    """The unit and the values of each record, and then of each unit. Metrics that are means are over these values."""
    units = units_of(task, records)
    yield from ((unit, record.score.values) for unit, record in zip(units, records))
    if task.score_unit is not None:
        members: dict[Hashable, list[Record]] = {}
        for unit, record in zip(units, records):
            members.setdefault(unit, []).append(record)
        yield from ((unit, task.score_unit(each)) for unit, each in members.items())


def weigh(task: Task, records: Sequence[Record]) -> Callable[[np.ndarray], dict[str, float]]:
    """The corpus metrics as a function of how often each record counts, an array of shape `(num_records,)`."""
    return task.weighted_metrics(records) if task.weighted_metrics else repeat(task.corpus_metrics, records)


def _metrics_of(task: Task, records: Sequence[Record], prefix: str) -> list[Metric]:
    found: dict[str, list[tuple[Hashable, float]]] = {}
    for unit, values in scored_parts(task, records):
        for name, value in values.items():
            found.setdefault(name, []).append((unit, value))
    metrics = []
    for name, pairs in found.items():
        units, values = zip(*pairs)
        mean = sum(values) / len(values)
        errors = standard_error(values, units), mean_interval(values, units, task.metrics_are_shares)
        metrics.append(Metric(prefix + name, mean, len(values), *errors))
    return metrics + _corpus_metrics_of(task, records, prefix)


def _corpus_metrics_of(task: Task, records: Sequence[Record], prefix: str) -> list[Metric]:
    records = [record for record in records if record.score.judge_error is None]
    if task.corpus_metrics is None or not records:
        return []
    figures, units = task.corpus_metrics(records), units_of(task, records)
    num_units = len(set(units))
    drawn = resampled(weigh(task, records), units, task.num_resamples) if figures and num_units > 1 else {}
    metrics = []
    for name, value in figures.items():
        error = interval = None
        if name in drawn:
            error = float(np.nanstd(drawn[name], ddof=1))
            interval = corpus_interval(value, drawn[name], num_units if task.metrics_are_shares else None)
        metrics.append(Metric(prefix + name, value, len(records), error, interval))
    return metrics
