"""The report of a run: `report.md` with charts and examples, and entries for a model card on the Hub.

    >>> write_report(Path("runs/evaluation/model"), TASKS)

The report is made from `results.json` and `examples.jsonl`. [`save_pictures`] must run first: it saves the pictures of
the examples that the report shows. The paper's results are copied from the paper, not measured here.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from sq_llava.evaluation.answering import open_task_image
from sq_llava.evaluation.paper import figures_of
from sq_llava.evaluation.peers import prefix_of
from sq_llava.evaluation.results import read_records
from sq_llava.evaluation.task import Example, Record, Task, breakdown_values, main_score
from sq_llava.output import write_text, written_whole


NUM_SHOWN = 3  # the report shows this many of the best examples, and as many of the worst
PICTURE_SIDE = 240  # pixels
MAX_LENGTH = 400  # characters of a text
# If more of the answers have no grade, a figure about the others is not set beside the paper's.
MOST_UNGRADED = 0.03


def write_report(out: Path, tasks: Mapping[str, Task]) -> Path:
    """
    Writes `report.md`, `figures.png`, `<task>/breakdown.png` and `.eval_results/<task>.yaml` into a run's folder.

    Args:
        out (`Path`): Folder of the run.
        tasks (`Mapping[str, Task]`): All tasks that the run may contain, by name.

    Returns:
        `Path` of `report.md`.
    """
    run = json.loads((out / "results.json").read_text())
    names = list(run["data_hashes"])
    records = {name: read_records(out / name / "examples.jsonl") for name in names}
    parts = [
        _ungraded(run, tasks),
        _heading(run),
        _draw_main_metrics(run, tasks, out),
        _paper_table(run, tasks),
        _metrics_table(run),
    ]
    parts += [_task_part(tasks[name], run, records[name], out) for name in names]
    write_eval_results(run, tasks, out)
    path = out / "report.md"
    write_text(path, "\n".join(part for part in parts if part))
    return path


def choose(task: Task, records: Sequence[Record]) -> dict[str, list[int]]:
    """
    Chooses the examples to show: up to three with the highest score, and up to three with the lowest.

    Returns:
        Heading -> indices into `records`.
    """
    scores = [(main_score(task, record), number) for number, record in enumerate(records)]
    scores = [(value, number) for value, number in scores if value is not None]
    if not scores:
        return {"Examples": list(range(min(2 * NUM_SHOWN, len(records))))}
    highest, lowest = max(scores)[0], min(scores)[0]
    if highest == lowest:
        return {f"Examples (all score {highest:g})": [number for _, number in scores[: 2 * NUM_SHOWN]]}
    best = [number for value, number in scores if value == highest][:NUM_SHOWN]
    worst = [number for value, number in scores if value == lowest][:NUM_SHOWN]
    return {f"Best examples (score {highest:g})": best, f"Worst examples (score {lowest:g})": worst}


def save_pictures(task: Task, examples: Sequence[Example], folder: Path) -> None:
    """
    Saves a small copy of the first image of each example that the report shows, as `pictures/<index>.jpg`.

    Args:
        examples (`Sequence[Example]`): The examples of `examples.jsonl` in `folder`, in the same order.
        folder (`Path`): The task's folder.
    """
    records = read_records(folder / "examples.jsonl")
    (folder / "pictures").mkdir(exist_ok=True)
    for number in (number for numbers in choose(task, records).values() for number in numbers):
        if examples[number].images and records[number].error is None:
            picture = open_task_image(examples[number].images[0])
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            with written_whole(folder / "pictures" / f"{number}.jpg") as new:
                picture.save(new)


def _heading(run: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    data = "; ".join(f"{name} {digest[:12]}" for name, digest in run["data_hashes"].items())
    earlier = {
        f"earlier run, {name}": f"{each['date']}, {_which_examples(each)}: `{each['command']}`"
        for name, each in run["earlier"].items()
    }
    rows = {
        "model": f"{run['model']} ({which_weights(run)})",
        "command": f"`{run['command']}`",
        "date": run["date"],
        "examples": _which_examples(run),
        "split": run["split"] or "default of each task",
        "system message": "the model's own" if run["system_message"] is None else as_text(run["system_message"]),
        "dtype, batch size, seed": f"{run['dtype']}, {run['batch_size']}, {run['seed']}",
        "versions": f"Python {run['python']}, {packages}; code {run['code_hash'][:12]}",
        "data": data,
        **earlier,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# Evaluation of {run['model']}\n\n| | |\n|---|---|\n{table}\n"


def _which_examples(run: Mapping[str, Any]) -> str:
    return "all" if run["limit"] is None else f"**at most {run['limit']} per task** (MMBench: about as many)"


def which_weights(run: Mapping[str, Any]) -> str:
    """The hash of a run's model, or the server of the model."""
    return f"hash {run['model_hash']}" if run.get("server") is None else f"served at {run['server']}"


def _ungraded(run: dict[str, Any], tasks: Mapping[str, Task]) -> str:
    """The first line of the report, if too many answers have no grade."""
    parts = [
        f"{each['num']:,} of {each['of']:,} answers of {tasks[name].title} have no grade"
        for name, each in run["ungraded"].items()
        if _is_partial(run, name)
    ]
    return f"**{'; '.join(parts)}. Figures that need a grade are only about the others.**\n" if parts else ""


def _is_partial(run: Mapping[str, Any], task: str) -> bool:
    each = run["ungraded"].get(task, {"num": 0, "of": 1})
    return each["num"] > MOST_UNGRADED * each["of"]


def main_entry(run: Mapping[str, Any], task: Task) -> dict[str, Any] | None:
    """The entry of the main metric. `None` if there is none, or if it leaves out too many answers without a grade."""
    entry = next((e for e in run["results"] if (e["task"], e["metric"]) == (task.name, task.main_metric)), None)
    if entry is not None and _is_partial(run, task.name) and entry["num"] < run["ungraded"][task.name]["of"]:
        return None
    return entry


def _paper_table(run: dict[str, Any], tasks: Mapping[str, Task]) -> str:
    names = [name for name in run["data_hashes"] if figures_of(name)]
    if not names:
        return ""
    measured = [main_entry(run, tasks[name]) for name in names]
    own = ["-" if each is None else f"{each['value'] * tasks[each['task']].scale:.1f}" for each in measured]
    nums = ["" if each is None else f"{each['num']:,}" for each in measured]
    rows = [f"| **this run** | {' | '.join(own)} |", f"| examples in this run | {' | '.join(nums)} |"]
    for model in figures_of(names[0]):
        rows.append(f"| {model} (paper) | {' | '.join(str(figures_of(name)[model]) for name in names)} |")
    head = f"| | {' | '.join(tasks[name].title for name in names)} |\n|---|{'---|' * len(names)}\n"
    body = "\n".join(rows)
    return f"## Comparison with the paper\n\nRows marked (paper) are **not measured here**.\n\n{head}{body}\n"


def _metrics_table(run: dict[str, Any]) -> str:
    rows = []
    for each in run["results"]:
        error = "" if each["standard_error"] is None else f"{each['standard_error']:.4f}"
        interval = "" if each["interval"] is None else "{:.4f} to {:.4f}".format(*each["interval"])
        rows.append(
            f"| {each['task']} | {as_text(each['metric'])} | {each['value']:.4f} | {error} | {interval} | "
            f"{each['num']:,} | {each['parsed_share']:.1%} | {each['num_failed']} | {each['num_unjudged']} |"
        )
    head = "| task | metric | value | standard error | 95% interval | examples | parsed | failed | not graded |"
    return f"## All metrics\n\n{head}\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _task_part(task: Task, run: dict[str, Any], records: Sequence[Record], out: Path) -> str:
    parts = [f"## {task.title}\n", task.note or "", _peers(task, run)]
    if task.name in run["missing"]:
        parts.append(f"**No metrics**: {run['missing'][task.name]}\n")
    judge = next((each["judge"] for each in run["results"] if each["task"] == task.name and each["judge"]), None)
    if judge is not None:
        parts.append(f"Graded by {', '.join(judge['answered_by'])} on {', '.join(judge['dates'])}.\n")
    parts.append(_draw_breakdown(task, run, records, out))
    parts.append(f"A complete prompt:\n\n{textwrap.indent(records[0].prompt, '    ', lambda line: True)}\n")
    for heading, numbers in choose(task, records).items():
        parts.append(f"### {heading}\n")
        parts += [_example(records[number], out, f"{task.name}/pictures/{number}.jpg") for number in numbers]
    return "\n".join(part for part in parts if part)


def _peers(task: Task, run: dict[str, Any]) -> str:
    """Says which versions of other projects the metrics named after them follow."""
    entries = [each for each in run["results"] if each["task"] == task.name and each["follows"]]
    found = {prefix_of(each["metric"]): each["follows"] for each in entries}
    return "".join(f"- `{prefix}/` follows {project}.\n" for prefix, project in found.items())


def _example(record: Record, out: Path, picture: str) -> str:
    parts = [f"![]({picture})\n" if (out / picture).is_file() else ""]
    parts.append(f"- `{record.example.id}`: {as_text(record.prompt[-MAX_LENGTH:])}")
    parts.append(f"- answer: **{as_text(record.answer)}**" if record.error is None else f"- {as_text(record.error)}")
    if record.score is not None and record.score.prediction is not None:
        parts.append(f"- parsed as: {as_text(record.score.prediction)}")
    parts.append(f"- reference: {as_text(record.example.reference)}\n")
    return "\n".join(part for part in parts if part)


def as_text(value: Any) -> str:
    """A value as one escaped line of Markdown, so that a model's answer cannot become a heading or a link."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    text = text if len(text) <= MAX_LENGTH else text[:MAX_LENGTH] + " ..."
    return "".join("\\" + letter if letter in "\\`*_[]<>|#" else letter for letter in text)


def _draw_main_metrics(run: dict[str, Any], tasks: Mapping[str, Task], out: Path) -> str:
    """Draws the main metric of each task and the paper's results."""
    found = [(tasks[name], main_entry(run, tasks[name])) for name in run["data_hashes"]]
    found = [(task, entry) for task, entry in found if entry is not None]
    if not found:
        return ""
    heights = [1 + len(figures_of(task.name)) for task, _ in found]
    figure = Figure(figsize=(8, sum(0.26 * height + 0.75 for height in heights)), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=[height + 1 for height in heights])[:, 0]
    for axis, (task, entry) in zip(axes, found):
        paper = figures_of(task.name)
        bars = {f"this run ({entry['num']:,} examples)": entry["value"] * task.scale}
        bars |= {f"{model} (paper)": value for model, value in paper.items()}
        errors = np.zeros((2, len(bars)))
        errors[:, 0] = reach(entry) * task.scale
        colours = ["#cc6677", *["#bbbbbb"] * len(paper)]
        drawn = axis.barh(list(bars), list(bars.values()), xerr=errors, color=colours)
        _label(axis, drawn, "{:.1f}", f"{task.title}: {task.main_metric}")
    with written_whole(out / "figures.png") as new:
        figure.savefig(new, dpi=110)
    return "![Main metric of each task with its 95% interval](figures.png)\n"


def _draw_breakdown(task: Task, run: dict[str, Any], records: Sequence[Record], out: Path) -> str:
    """Draws the main metric for each value of the breakdown, or the first metric that all values have."""
    parts = breakdown_values(task, records)
    entries = {each["metric"]: each for each in run["results"] if each["task"] == task.name}
    overall = [name for name in entries if all(f"{part}/{name}" in entries for part in parts)]
    if len(parts) < 2 or not overall:
        return ""
    name = task.main_metric if task.main_metric in overall else overall[0]
    chosen = [entries[f"{part}/{name}"] for part in parts]
    figure = Figure(figsize=(8, 0.7 + 0.3 * len(parts)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.barh(
        [f"{part} ({each['num']:,})" for part, each in zip(parts, chosen)],
        [each["value"] for each in chosen],
        xerr=np.stack([reach(each) for each in chosen], axis=1),
        color="#4477aa",
    )
    _label(axis, drawn, "{:.3f}", f"{task.title}: {name} by {task.breakdown}")
    with written_whole(out / task.name / "breakdown.png") as new:
        figure.savefig(new, dpi=110)
    return f"![{name} by {task.breakdown}]({task.name}/breakdown.png)\n"


def reach(entry: dict[str, Any]) -> np.ndarray:
    """How far the 95% interval reaches below and above the value, of shape `(2,)`; zeros without an interval."""
    low, high = entry["interval"] or (entry["value"], entry["value"])
    # A bootstrapped interval need not contain the value.
    return np.maximum(0, [entry["value"] - low, high - entry["value"]])


def _label(axis: Axes, bars: BarContainer, form: str, title: str) -> None:
    axis.bar_label(bars, fmt=form, padding=3, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)


def write_eval_results(run: dict[str, Any], tasks: Mapping[str, Task], out: Path) -> list[Path]:
    """
    Writes `.eval_results/<task>.yaml` for each task with a dataset on the Hub. Copy the files to a model's repository
    to show the results there (https://huggingface.co/docs/hub/eval-results).

    A task is left out if only a part of its examples was evaluated (`--limit`), or if examples have no grade. The file
    of a task of an earlier run stays as that run wrote it.
    """
    paths = []
    for name in (name for name in run["data_hashes"] if name not in run["earlier"]):
        entry = main_entry(run, tasks[name])
        if entry is None or tasks[name].hub_id is None or run["limit"] is not None or entry["num_unjudged"]:
            continue
        result = EvalResultEntry(
            dataset_id=tasks[name].hub_id,
            task_id=name,
            value=round(entry["value"] * tasks[name].scale, 4),
            date=run["date"],
            notes=_notes(run, entry),
        )
        path = out / ".eval_results" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_text(path, yaml.safe_dump(eval_result_entries_to_yaml([result]), sort_keys=False))
        paths.append(path)
    return paths


def _notes(run: dict[str, Any], entry: dict[str, Any]) -> str:
    """How a result was produced. `notes` is the only free text field of the format."""
    follows = "" if entry["follows"] is None else f" (follows {entry['follows']})"
    parts = [entry["metric"] + follows, f"{entry['num']} examples, {entry['num_failed']} failed"]
    if run["split"] is not None:
        parts.append(f"split {run['split']}")
    if entry["judge"] is not None:
        parts.append(f"graded by {', '.join(entry['judge']['answered_by'])}")
    hashes = {"model": run["model_hash"] or which_weights(run), "code": run["code_hash"], "data": entry["data_hash"]}
    parts.append("hashes: " + ", ".join(f"{name} {digest}" for name, digest in hashes.items()))
    versions = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    parts.append(f"Python {run['python']}, {versions}, seed {run['seed']}")
    return "; ".join([*parts, run["command"]])
