"""Tiny datasets in the layouts of benchmarks, and scores of answers to them without a model."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from click.testing import Result
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.evaluation.judge import Judge
from sq_llava.evaluation.results import TaskResult
from sq_llava.evaluation.run import Evaluation, assess, find_task, read_examples
from sq_llava.evaluation.task import Example, Metric, Record
from tests import tiny


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(seed, 8, 8).save(buffer, "PNG")
    return buffer.getvalue()


def write_image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """A table in the Hub's layout: `image` has the type `Image`, with the bytes in the table."""
    table = datasets.Dataset.from_list(rows)
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))


def write_split(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)


def stored(seed: int = 0) -> dict[str, Any]:
    return {"bytes": png(seed), "path": f"{seed}.png"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_easy_vqa(folder: Path, questions: Sequence[str], num_images: int = 1) -> Path:
    """easy-VQA data: questions q0, q1, ... about the images in turn, each with the answer "yes"."""
    rows = []
    for number, question in enumerate(questions):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "yes"}]
        image = f"{number % num_images}.png"
        rows.append({"id": f"q{number}", "image": image, "kind": "shape", "conversations": turns})
    write_json(folder / "test.json", rows)
    for number in range(num_images):
        write_image(folder / "images" / f"{number}.png", number)
    return folder


def examples_of(task: str, data: Path | str, split: str | None = None) -> list[Example]:
    return read_examples(find_task(task), Evaluation("no model", [task], str(data), Path("-"), split=split))


def assess_answers(
    task: str,
    data: Path,
    answers: Mapping[str, str | None] | Callable[[Example], str],
    out: Path,
    split: str | None = None,
    judge: Judge | None = None,
) -> TaskResult:
    """The result of an evaluation with these answers: id -> text, or a function of an example. `None`: it failed."""
    evaluation = Evaluation("no model", [task], str(data), out, split=split)
    records = []
    for example in read_examples(find_task(task), evaluation):
        answer = answers(example) if callable(answers) else answers[example.id]
        records.append(Record(example, example.prompt, answer or "", "it broke" if answer is None else None))
    (out / task).mkdir(parents=True, exist_ok=True)
    return assess(find_task(task), records, evaluation, {"data_hashes": {task: "-"}}, judge)


def metrics_of(result: TaskResult) -> dict[str, Metric]:
    return {metric.name: metric for metric in result.metrics}


def figures(result: TaskResult) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def image_bytes(example: Example) -> list[bytes]:
    return [image.read_bytes() if isinstance(image, Path) else image.read()["bytes"] for image in example.images]


def evaluate_command(**options: Any) -> list[str]:
    """The arguments of `sq-llava evaluate` on the CPU: `judge_model="x"` becomes `--judge-model=x`."""
    return ["evaluate", "--device=cpu", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def run_evaluate(**options: Any) -> Result:
    return CliRunner().invoke(app, evaluate_command(**options))
