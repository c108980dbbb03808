"""A benchmark: examples read from its files, a prompt for each, and a score for each answer.

A module such as `pope.py` holds one benchmark and ends in its [`Task`]. All benchmarks record and count their examples
in the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sq_llava.evaluation.judge import Judge
from sq_llava.evaluation.metrics import bootstrap_errors, standard_error
from sq_llava.evaluation.reading import Data, TaskImage


@dataclass(frozen=True)
class Example:
    """
    One question of a benchmark.

    Args:
        id (`str`): Unique in the task: answers are matched by it.
        prompt (`str`): The text of the user turn, behind its images.
        images (`Sequence`): Paths, or images inside a table.
        reference (`Any`): What the answer is scored against, as JSON.
        details (`dict`): What else the score, a breakdown or a submission needs, as JSON: category, options, ...
    """

    id: str
    prompt: str
    images: Sequence[TaskImage]
    reference: Any
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """
    Args:
        values (`dict[str, float]`): This answer's value of each metric; a metric is the mean over its examples.
        is_parsed (`bool`): Whether the task could read the answer.
        prediction (`Any`): What was read out of the answer, or what the judge said, as JSON.
        judge_error (`str`, *optional*): Why the judge gave no grade. Such an example enters no figure.
    """

    values: dict[str, float]
    is_parsed: bool = True
    prediction: Any = None
    judge_error: str | None = None


@dataclass(frozen=True)
class Record:
    """An example with the model's answer, or the `error` why there is none: a line of the task's JSONL."""

    example: Example
    prompt: str
    answer: str
    error: str | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Metric:
    """
    A figure over `num` examples. `value` is a share from 0 to 1 unless the task says otherwise, `standard_error` is
    `None` where it is not that of a mean, nor one by bootstrap (`Task.num_resamples`).
    """

    name: str
    value: float
    num: int
    standard_error: float | None = None


@dataclass(frozen=True)
class Task:
    """
    Args:
        name (`str`): On the command line.
        title (`str`): In the report.
        hub_id (`str`): The data set on the Hub.
        read (`Callable`): [`Data`] -> list of [`Example`], from the Hub's Parquet files or from LLaVA's own folders.
        score (`Callable`): (example, answer) -> [`Score`]; `None` where a server or a judge scores.
        judge (`Callable`, *optional*): (records, [`Judge`], folder) -> the score of each; a record that failed is not
            sent, and has the lowest one.
        folder (`str`, *optional*): Its name among LLaVA's folders, where it is not the task's.
        main_metric (`str`): The one that the paper's tables give.
        corpus_metrics (`Callable`, *optional*): Scored records -> `{name: value}`, for what is no mean over examples.
        weighted_metrics (`Callable`, *optional*): Scored records -> a function of how often each of them counts (an
            array) -> corpus metrics, where computing them anew for each resample would take too long.
        num_resamples (`int`): For standard errors of `corpus_metrics` by bootstrap; 0: without.
        unit (`Callable`, *optional*): An example -> what it belongs to, where a corpus metric needs several together:
            they are drawn as one when two runs are compared.
        breakdown (`str`, *optional*): The key of `Example.details` whose values get figures of their own; an example
            without it is in the overall ones alone.
        write_submission (`Callable`, *optional*): (records, folder) -> the file that the task's server takes, or
            `None` for a split that no server scores.
        max_new_tokens (`int`): The most tokens of an answer.
        note (`str`, *optional*): What a reader of the report must know to compare its figures with others.
        scale (`float`): What `main_metric` is multiplied by to be in the unit of the paper's tables.
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
    num_resamples: int = 0
    unit: Callable[[Example], Any] | None = None
    breakdown: str | None = None
    write_submission: Callable[[Sequence[Record], Path], Path | None] | None = None
    max_new_tokens: int = 128
    note: str | None = None
    scale: float = 100.0


def main_score(task: Task, record: Record) -> float | None:
    """
    How good one answer is, to sort examples by: its part of the main metric; where that is of the whole corpus,
    whether the reference was read out of it, or else its first score. `None` for one without any.
    """
    if record.score is None or record.score.judge_error is not None:
        return None
    values, reference = record.score.values, record.example.reference
    if task.main_metric in values:
        return values[task.main_metric]
    if isinstance(record.score.prediction, str) and isinstance(reference, str):
        return float(record.error is None and record.score.prediction == reference)
    return next(iter(values.values()), None)


def summarize(task: Task, records: Sequence[Record]) -> list[Metric]:
    """
    The figures of a task. An example that failed has been scored like an empty answer: it counts. One that a judge
    gave no grade does not, nor one without a score.

    Args:
        records: One for each example.
    """
    records = [record for record in records if record.score is not None and record.score.judge_error is None]
    if not records:
        return []
    metrics = _figures(task, records, "")
    if task.breakdown is not None:
        for value in sorted({each.example.details.get(task.breakdown) for each in records} - {None}):
            chosen = [record for record in records if record.example.details.get(task.breakdown) == value]
            metrics += _figures(task, chosen, f"{value}/")
    return metrics


def _figures(task: Task, records: Sequence[Record], prefix: str) -> list[Metric]:
    values: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.score.values.items():
            values.setdefault(name, []).append(value)
    metrics = [
        Metric(prefix + name, sum(each) / len(each), len(each), standard_error(each)) for name, each in values.items()
    ]
    if task.corpus_metrics is not None:
        figures = task.corpus_metrics(records)
        errors = bootstrap_errors(task.corpus_metrics, records, task.num_resamples)
        metrics += [Metric(prefix + name, value, len(records), errors.get(name)) for name, value in figures.items()]
    return metrics
