"""The files that an evaluation writes: `results.json`, the examples, a report with charts, entries for a model card.

OUT/results.json                 all metrics, and what is needed to repeat the run
OUT/<task>/examples.jsonl        prompt, answer, reference and score of each example
OUT/<task>/answers-*.jsonl       answers as they were generated; an interrupted run resumes from them
OUT/report.md, OUT/*.png         the metrics beside the paper's, and bar charts
OUT/.eval_results/<task>.yaml    entries for the model card on the Hub
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from sq_llava.evaluation.peers import PEERS, prefix_of
from sq_llava.evaluation.reading import StoredImage, TaskImage, read_jsonl
from sq_llava.evaluation.task import Example, Metric, Record, Score
from sq_llava.locations import base_of_adapter, find_config, is_adapter, revision_of_base
from sq_llava.output import command_line, write_json
from sq_llava.resources import CODE_FILES, code_file
from sq_llava.resumable.jsonl import write_jsonl


# Fields of a line of `examples.jsonl`.
LINE = ("id", "prompt", "images", "answer", "prediction", "reference", "error", "details")
SCORE = ("scores", "parsed", "judge_error")
# Fields of `results.json` with a value for each task. The others are about the whole run.
OF_TASKS = ("data_hashes", "earlier", "missing", "ungraded", "results")
PACKAGES = ("torch", "transformers", "peft", "pillow", "sq-llava")


@dataclass(frozen=True)
class TaskResult:
    """
    The result of one task.

    Args:
        data (`str`): Where the data is, as given by the user.
        num (`int`): Number of examples.
        num_failed (`int`): Number of examples without an answer.
        parsed_share (`float`): Share of examples whose answer could be parsed, from 0 to 1.
        missing (`str`, *optional*): Why there are no metrics, and how to get them.
        judge (`dict`, *optional*): Who graded and when.
        num_unjudged (`int`): Number of examples without a grade.
    """

    task: str
    data: str
    data_hash: str
    num: int
    num_failed: int
    parsed_share: float
    metrics: Sequence[Metric]
    missing: str | None = None
    judge: dict[str, Any] | None = None
    num_unjudged: int = 0


def hash_of_model(model: str) -> str:
    """
    Identifies a model.

    Returns:
        For a folder: SHA-256 over the names and contents of its weights, JSON files and templates, and over the base
        model of an adapter. For a model on the Hub: its commit, and for an adapter also that of its base.
    """
    folder = Path(model).expanduser()
    digest = hashlib.sha256()
    if not folder.is_dir():
        commit = find_config(model).parent.name  # .../snapshots/<commit>/config.json
        if not is_adapter(model):
            return commit
        base, revision = base_of_adapter(model), revision_of_base(model)
        return f"{commit} on {revision or hash_of_model(base)}"
    if is_adapter(folder):
        digest.update(hash_of_model(base_of_adapter(folder)).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".bin"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_of_code() -> str:
    """SHA-256 over the Python files of this library and the Hub files of the model."""
    package = files("sq_llava")
    sources = {path.relative_to(package.parent).as_posix(): path for path in package.rglob("*.py")}
    sources |= {name: code_file(name) for name in CODE_FILES}
    digest = hashlib.sha256()
    for name, path in sorted(sources.items()):
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()


def hashes_of_examples(examples: Sequence[Example]) -> dict[str, str]:
    """Example id -> SHA-256 over its id, prompt, reference and image files."""
    hashes: dict[str, str] = {}
    image_digests: dict[Any, bytes] = {}
    for example in examples:
        digest = hashlib.sha256(json.dumps([example.id, example.prompt, example.reference]).encode())
        for image in example.images:
            key = (id(image.table), image.row, image.column) if isinstance(image, StoredImage) else image
            if key not in image_digests:
                image_digests[key] = _digest_of_image(image)
            digest.update(image_digests[key])
        hashes[example.id] = digest.hexdigest()
    return hashes


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """SHA-256 over the hashes of all items, in their order."""
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()


def _digest_of_image(image: TaskImage) -> bytes:
    try:
        content = image.read_bytes() if isinstance(image, Path) else image.read()["bytes"]
    except (OSError, ValueError):
        return b"missing"  # the run will record the example as failed
    return hashlib.sha256(content).digest()


def record_line(record: Record) -> dict[str, Any]:
    """The line of `examples.jsonl` for a record."""
    example, score = record.example, record.score
    return {
        "id": example.id,
        "prompt": record.prompt,
        "images": [str(image) for image in example.images],
        "answer": record.answer,
        "prediction": score.prediction if score else None,
        "reference": example.reference,
        "scores": score.values if score else None,
        "parsed": score.is_parsed if score else None,
        "judge_error": score.judge_error if score else None,
        "error": record.error,
        "details": example.details,
    }


def write_examples(records: Sequence[Record], folder: Path) -> Path:
    path = folder / "examples.jsonl"
    write_jsonl(path, map(record_line, records))
    return path


def read_records(path: Path) -> list[Record]:
    """
    Reads the records of an `examples.jsonl`, without their images.

    Raises:
        ValueError: If a field is missing. The message has line and field.
    """
    records = []
    for line in read_jsonl(path, [*LINE, *SCORE]):
        example = Example(line["id"], line["prompt"], [], line["reference"], line["details"])
        score = None
        if line["scores"] is not None:
            score = Score(line["scores"], line["parsed"], line["prediction"], line["judge_error"])
        records.append(Record(example, line["prompt"], line["answer"], line["error"], score))
    return records


def write_results(
    results: Sequence[TaskResult], out: Path, about: dict[str, Any], before: Mapping[str, Any] | None = None
) -> Path:
    """
    Writes `results.json`: the fields of `about`, and one entry per metric.

    Args:
        before (`Mapping`, *optional*): `results.json` of an earlier run. Its other tasks stay in the file.
    """
    entries = [
        {
            "task": result.task,
            "metric": metric.name,
            "value": metric.value,
            "num": metric.num,
            "standard_error": metric.standard_error,
            "interval": metric.interval,
            "follows": PEERS.get(prefix_of(metric.name)),
            "parsed_share": result.parsed_share,
            "num_failed": result.num_failed,
            "data": result.data,
            "data_hash": result.data_hash,
            "judge": result.judge,
            "num_unjudged": result.num_unjudged,
        }
        for result in results
        for metric in result.metrics
    ]
    missing = {result.task: result.missing for result in results if result.missing is not None}
    ungraded = {result.task: {"num": result.num_unjudged, "of": result.num} for result in results if result.judge}
    content = {**about, "earlier": {}, "missing": missing, "ungraded": ungraded, "results": entries}
    if before is not None:
        content = _with_earlier_tasks(content, before, out)
    path = out / "results.json"
    write_json(path, content)
    return path


def _with_earlier_tasks(content: dict[str, Any], before: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """`earlier` gets the fields of the run that each of the tasks comes from, such as its command."""
    names = [
        name
        for name in before["data_hashes"]
        if name not in content["data_hashes"] and (out / name / "examples.jsonl").is_file()
    ]
    run = {field: value for field, value in before.items() if field not in OF_TASKS}
    earlier = before.get("earlier", {})
    kept = {
        field: {name: value for name, value in before[field].items() if name in names} | content[field]
        for field in ("data_hashes", "missing", "ungraded")
    }
    entries = [each for each in before["results"] if each["task"] in names] + content["results"]
    return content | kept | {"earlier": {name: earlier.get(name, run) for name in names}, "results": entries}


def environment() -> dict[str, Any]:
    """The command, the date (UTC), and the versions of Python and packages."""
    return {
        "command": command_line(),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: version(name) for name in PACKAGES},
    }
