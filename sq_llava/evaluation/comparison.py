"""Compares two evaluations: paired differences with 95% intervals, and the examples whose score changed.

    >>> differences = compare(Path("runs/evaluation/a"), Path("runs/evaluation/b"))

Both models answered the same examples, so the examples are resampled in pairs, with replacement (paired bootstrap).
Examples that are not independent, such as the questions of POPE about an image, are drawn together.
The interval holds 95% of the resampled differences. It covers the random choice of examples, but not the randomness of
training. Written to OUT:

    comparison.json, comparison.md   each metric of both, its difference and its interval
    <task>.flipped.jsonl             the examples whose score changed, largest change first
"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sq_llava.evaluation.report import as_text, main_entry, which_weights
from sq_llava.evaluation.results import read_records
from sq_llava.evaluation.run import TASKS, Evaluation, find_task, read_examples
from sq_llava.evaluation.task import Record, Task, breakdown_values, main_score, scored_parts, units_of, weigh
from sq_llava.evaluation.uncertainty import Interval, percentile_interval, resampled
from sq_llava.output import write_json, write_text
from sq_llava.resumable.jsonl import write_jsonl


NUM_SHOWN = 5  # changed examples in the report
NUM_LETTERS = 300  # the report shows this many last characters of a prompt


@dataclass(frozen=True)
class Difference:
    """
    A metric of both evaluations. `difference` is second - first; its 95% interval is from `low` to `high`. Both are
    `None` if there is no interval (see [`paired_interval`]).
    """

    task: str
    metric: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    num: int

    @property
    def is_clear(self) -> bool:
        """True if the interval excludes 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    @property
    def interval(self) -> str:
        """The interval as text; empty if there is none."""
        return "" if self.low is None else f"{self.low:+.4f} to {self.high:+.4f}"


def check_comparable(other: Path, evaluation: Evaluation) -> None:
    """
    Checks, before a run, that it can be compared with the evaluation in the folder `other`.

    Raises:
        ValueError: If `other` is the run's own folder, lacks a task, or has other examples or another judge.
    """
    if other.resolve() == evaluation.out.resolve():
        raise ValueError(f"--against {other}: this run writes to the same folder. Choose another --out.")
    run = json.loads((other / "results.json").read_text())
    judges = _judges(run)
    for name in evaluation.tasks:
        path = other / name / "examples.jsonl"
        if name not in run["data_hashes"] or not path.is_file():  # without its results, its judge is not known
            raise ValueError(f"--against {other}: has no results for {name}. Remove it from --tasks.")
        theirs = {record.example.id: record.example.reference for record in read_records(path)}
        ours = {example.id: example.reference for example in read_examples(find_task(name), evaluation)}
        # Through JSON, because a tuple becomes a list in the file.
        check_same_examples(theirs, json.loads(json.dumps(ours)), str(path), evaluation.data)
        if evaluation.judge is not None:
            _check_same_judge(name, judges.get(name), evaluation.judge.model, other)


def _judges(run: Mapping[str, Any]) -> dict[str, str]:
    """Task -> name of the judge, for the tasks of a `results.json` that a judge graded."""
    return {each["task"]: each["judge"]["model"] for each in run["results"] if each["judge"] is not None}


def _check_same_judge(task: str, first: str | None, second: str | None, place: Path) -> None:
    if first is not None and second is not None and first != second:
        raise ValueError(
            f"{place}: {task} was graded by {first}, but the other run uses {second}. Grades of different judges "
            "cannot be compared."
        )


def check_same_examples(
    first: Mapping[str, Any], second: Mapping[str, Any], first_place: str, second_place: str
) -> None:
    """
    Checks that two evaluations have the same examples.

    Args:
        first, second (`Mapping[str, Any]`): Example id -> reference.

    Raises:
        ValueError: If an example is missing in one of them, or has another reference.
    """
    for place, lacking, other, whole in (
        (first_place, first, second_place, second),
        (second_place, second, first_place, first),
    ):
        missing = [id for id in whole if id not in lacking]
        if missing:
            raise ValueError(
                f"{place}: lacks {len(missing):,} of the examples in {other}, such as {missing[0]!r}. Use the same "
                "--data, --split and --limit for both."
            )
    for id, reference in second.items():
        if first[id] != reference:
            raise ValueError(f"{first_place}: example {id!r} has a different reference than in {second_place}.")


def compare(
    first: Path,
    second: Path,
    out: Path | None = None,
    num_resamples: int = 2000,
    num_corpus_resamples: int = 400,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> list[Difference]:
    """
    Compares two evaluations.

    Args:
        first, second (`Path`): Folders of evaluations.
        out (`Path`, *optional*): Output folder. Default: `comparison` in the second folder.
        num_resamples (`int`): Bootstrap resamples for metrics that are means over examples.
        num_corpus_resamples (`int`): Bootstrap resamples for corpus metrics, which take longer.
        seed (`int`): Random seed of the resampling.
        tasks (`Sequence[str]`, *optional*): Names of the tasks to compare. Default: all that both have.

    Raises:
        ValueError: If they have no task in common, or a task has other examples or another judge.
    """
    runs = [json.loads((folder / "results.json").read_text()) for folder in (first, second)]
    names = [name for name in runs[1]["data_hashes"] if name in TASKS and name in runs[0]["data_hashes"]]
    if not names:
        raise ValueError(f"{first} and {second} have no task in common: no task is in results.json of both.")
    out = out or second / "comparison"
    out.mkdir(parents=True, exist_ok=True)
    differences = []
    flipped = {}
    judges = [_judges(run) for run in runs]
    for name in names if tasks is None else dict.fromkeys(tasks):
        _check_same_judge(name, judges[0].get(name), judges[1].get(name), first)
        pairs = match(first / name / "examples.jsonl", second / name / "examples.jsonl")
        flipped[name] = flips(TASKS[name], pairs)
        write_jsonl(out / f"{name}.flipped.jsonl", flipped[name])
        differences += compare_task(TASKS[name], pairs, num_resamples, num_corpus_resamples, seed)
    about = {"first": str(first), "second": str(second), "seed": seed, "num_resamples": num_resamples}
    about |= {"num_corpus_resamples": num_corpus_resamples, "differences": [asdict(each) for each in differences]}
    # The fields that are needed to repeat both runs. The metrics are in `differences`.
    about["runs"] = [{name: value for name, value in run.items() if name != "results"} for run in runs]
    write_json(out / "comparison.json", about)
    write_text(out / "comparison.md", to_markdown(first, second, runs, differences, flipped))
    return differences


Pair = tuple[Record, Record]


def match(first: Path, second: Path) -> list[Pair]:
    """
    Pairs the records of two `examples.jsonl` by id, in the order of the second.

    Raises:
        ValueError: If the files are not about the same examples.
    """
    theirs = {record.example.id: record for record in read_records(first)}
    ours = {record.example.id: record for record in read_records(second)}
    references = [{id: record.example.reference for id, record in each.items()} for each in (theirs, ours)]
    check_same_examples(*references, str(first), str(second))
    return [(theirs[id], record) for id, record in ours.items()]


def compare_task(
    task: Task, pairs: Sequence[Pair], num_resamples: int, num_corpus_resamples: int, seed: int
) -> list[Difference]:
    """The differences of shared metrics. A metric leaves out pairs in which one record has no value for it."""
    pairs = [pair for pair in pairs if all(record.score for record in pair)]
    differences = _compare_part(task, pairs, "", num_resamples, num_corpus_resamples, seed)
    for value in breakdown_values(task, [second for _, second in pairs]):
        chosen = [pair for pair in pairs if pair[1].example.details.get(task.breakdown) == value]
        differences += _compare_part(task, chosen, f"{value}/", num_resamples, num_corpus_resamples, seed)
    return differences


def _compare_part(
    task: Task, pairs: Sequence[Pair], prefix: str, num_resamples: int, num_corpus_resamples: int, seed: int
) -> list[Difference]:
    found: dict[str, list[tuple[Hashable, float, float]]] = {}
    parts = [list(scored_parts(task, [pair[side] for pair in pairs])) for side in (0, 1)]
    for (unit, first), (_, second) in zip(*parts):
        for name in first:
            if name in second:
                found.setdefault(name, []).append((unit, first[name], second[name]))
    differences = []
    for name, values in found.items():
        units, *both = zip(*values)
        first, second = map(np.array, both)
        interval = difference_interval(second - first, num_resamples, seed, units)
        means = first.mean(), second.mean()
        differences.append(_difference(task, prefix + name, *means, interval, len(units)))
    return differences + _compare_corpus(task, pairs, prefix, num_corpus_resamples, seed)


def difference_interval(
    differences: np.ndarray, num_resamples: int, seed: int, units: Sequence[Hashable] | None = None
) -> Interval | None:
    """
    The 95% interval of the mean of paired differences, of shape `(num_pairs,)`: a percentile bootstrap of units.
    `None` as for [`paired_interval`].
    """

    def mean(times: np.ndarray) -> dict[str, float]:
        return {"mean": float(times @ differences / times.sum())}

    units = range(len(differences)) if units is None else units
    return paired_interval(resampled(mean, units, num_resamples, seed)["mean"], units)


def paired_interval(drawn: np.ndarray, units: Sequence[Hashable]) -> Interval | None:
    """
    The 95% interval of a difference from its resampled values. `None` for fewer than two units, and if all units
    changed alike: they do not show how much others would differ. If none changed, it is from 0 to 0.
    """
    low, high = percentile_interval(drawn)
    is_alike = low != 0 and math.isclose(low, high)  # sums of equal differences differ by rounding errors
    return None if is_alike or len(set(units)) < 2 else (low, high)


def _compare_corpus(task: Task, pairs: Sequence[Pair], prefix: str, num_resamples: int, seed: int) -> list[Difference]:
    pairs = [pair for pair in pairs if all(record.score.judge_error is None for record in pair)]
    if task.corpus_metrics is None or not pairs:
        return []
    figures_of = [weigh(task, [pair[side] for pair in pairs]) for side in (0, 1)]
    first, second = (figures(np.ones(len(pairs), dtype=int)) for figures in figures_of)
    units = units_of(task, [pair[0] for pair in pairs])
    # The same seed draws the same examples for both.
    drawn = [resampled(figures, units, num_resamples, seed) for figures in figures_of]
    return [
        _difference(
            task,
            prefix + name,
            first[name],
            second[name],
            paired_interval(drawn[1][name] - drawn[0][name], units),
            len(pairs),
        )
        for name in first
        if name in second and name in drawn[0] and name in drawn[1]
    ]


def _difference(
    task: Task, metric: str, first: float, second: float, interval: Interval | None, num: int
) -> Difference:
    low, high = interval or (None, None)
    return Difference(task.name, metric, float(first), float(second), float(second - first), low, high, num)


def flips(task: Task, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The examples whose [`main_score`] changed, largest change first."""
    lines = []
    for first, second in pairs:
        before, after = main_score(task, first), main_score(task, second)
        if before is not None and after is not None and before != after:
            lines.append(
                {
                    "id": second.example.id,
                    "change": after - before,
                    "prompt": second.prompt,
                    "reference": second.example.reference,
                    "first": first.answer if first.error is None else f"[{first.error}]",
                    "second": second.answer if second.error is None else f"[{second.error}]",
                }
            )
    return sorted(lines, key=lambda line: -abs(line["change"]))


def write_overview(folders: Sequence[Path], path: Path) -> Path:
    """
    Writes a table of several evaluations: a row for each task with its main metric, and a column for each model.

    Returns:
        `path`.
    """
    runs = [json.loads((folder / "results.json").read_text()) for folder in folders]
    names = list(dict.fromkeys(name for run in runs for name in run["data_hashes"]))
    rows = []
    for name in names:
        found = [main_entry(run, TASKS[name]) for run in runs]
        rows.append(f"| {name} | {as_text(TASKS[name].main_metric)} | {' | '.join(map(_with_interval, found))} |\n")
    head = " | ".join(as_text(run["model"]) for run in runs)
    table = f"| task | metric | {head} |\n|---|---|{'---|' * len(runs)}\n{''.join(rows)}"
    about = "".join(
        f"- {as_text(run['model'])} ({which_weights(run)}): {folder}\n" for run, folder in zip(runs, folders)
    )
    write_text(
        path,
        f"# {len(runs)} models\n\n{about}\nMain metrics with their 95% intervals. Differences between two models are "
        f"in the folder `comparison` of the second: they are paired, so their intervals are narrower.\n\n{table}",
    )
    return path


def _with_interval(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    interval = "" if entry["interval"] is None else " ({:.4f} to {:.4f})".format(*entry["interval"])
    return f"{entry['value']:.4f}{interval}"


def to_markdown(
    first: Path,
    second: Path,
    runs: Sequence[Mapping[str, Any]],
    differences: Sequence[Difference],
    flipped: dict[str, list[dict[str, Any]]],
) -> str:
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    about = "\n".join(
        f"- {as_text(name)}: {as_text(run['model'])} ({which_weights(run)}), code "
        f"{run['code_hash'][:12]}, seed {run['seed']}, {run['date']}: `{run['command']}`"
        for name, run in zip(names, runs, strict=True)
    )
    rows = "\n".join(
        f"| {each.task} | {as_text(each.metric)} | {each.first:.4f} | {each.second:.4f} | {each.difference:+.4f} | "
        f"{each.interval} | {'yes' if each.is_clear else 'no'} | {each.num:,} |"
        for each in differences
    )
    parts = [
        f"# {second} compared with {first}\n\n{about}\n\n"
        "Paired differences with 95% intervals (bootstrap over examples). clear: the interval excludes 0. Each row is "
        "tested alone at 95%: with many rows, about one in twenty is clear by chance.\n",
        f"| task | metric | {as_text(names[0])} | {as_text(names[1])} | difference | 95% | clear | examples |\n"
        f"|---|---|---|---|---|---|---|---|\n{rows}\n",
    ]
    for task, lines in flipped.items():
        if not any(each.task == task for each in differences):
            parts.append(f"## {task}: nothing to compare\n\nNo example has a score in both evaluations.\n")
            continue
        gained = sum(line["change"] > 0 for line in lines)
        parts.append(f"## {task}: {gained} examples better, {len(lines) - gained} worse\n")
        for line in lines[:NUM_SHOWN]:
            parts.append(
                f"- `{line['id']}` ({line['change']:+.2f}) {as_text(line['prompt'][-NUM_LETTERS:])}\n"
                f"  - reference: {as_text(line['reference'])}\n"
                f"  - {as_text(names[0])}: {as_text(line['first'])}\n"
                f"  - {as_text(names[1])}: {as_text(line['second'])}\n"
            )
    return "\n".join(parts)
