"""Shared by the tasks with short answers: LLaVA's instruction, VQA accuracy, the files for the EvalAI server."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sq_llava.evaluation.metrics import normalize_m4c, short_form, vqa_accuracy
from sq_llava.evaluation.reading import Data, check_fields, read_json_rows, read_jsonl, unique_by
from sq_llava.evaluation.task import Example, Score
from sq_llava.output import write_text


INSTRUCTION = "\nAnswer the question using a single word or phrase."


def human_answers(row: dict[str, Any], place: str) -> list[str] | None:
    """
    The human answers to a question: strings, or objects with `answer`. `None` if only a server has them (`answers` is
    null, empty, or has only empty answers).
    """
    answers = [
        each if isinstance(each, str) else str(check_fields(each, ["answer"], f"{place}, answers")["answer"])
        for each in row["answers"] or []
    ]
    return answers if any(answers) else None


def read_table(
    data: Data, default_split: str, prompt_of: Callable[[dict[str, Any]], str], *columns: str
) -> list[Example]:
    """
    Reads the Hub's table of a task with human answers.

    Args:
        columns (`str`): Required columns besides `question_id`, `question`, `image` and `answers`.
    """
    rows = data.rows(["question_id", "question", "image", "answers", *columns], default_split)
    return [
        Example(
            id=str(row["question_id"]),
            prompt=prompt_of(row),
            images=[row["image"]],
            reference=human_answers(row, f"{data}, row {number}"),
        )
        for number, row in enumerate(rows)
    ]


def read_questions(data: Data, file: Path, image_folder: str) -> list[Example]:
    """Reads LLaVA's file of questions without answers. Their texts include the instruction."""
    return [
        Example(str(row["question_id"]), row["text"], [data.image(file.parent / image_folder, row["image"])], None)
        for row in read_jsonl(file, ["question_id", "image", "text"])
    ]


def score(example: Example, answer: str) -> Score:
    """VQA accuracy with EvalAI's normalizer, in two forms: leave-one-out, as LLaVA does, and min(1, matches / 3)."""
    prediction = normalize_m4c(answer)
    if example.reference is None:
        return Score({}, is_parsed=prediction != "", prediction=prediction)
    values = {
        "m4c/accuracy": vqa_accuracy(answer, example.reference),
        "m4c/accuracy_short": vqa_accuracy(answer, example.reference, accuracy=short_form),
    }
    return Score(values, is_parsed=prediction != "", prediction=prediction)


def official_id(id: str) -> int | str:
    """The id of a question as a server wants it: a number. An id of the user's own data may be any text."""
    return int(id) if id.isdecimal() else id


def write_upload(path: Path, answers: Mapping[Any, str], id_field: str, answer_field: str = "answer") -> Path:
    """Writes `[{id_field: id, answer_field: answer}, ...]` in the order of `answers`, and checks the file."""
    entries = [{id_field: id, answer_field: answer} for id, answer in answers.items()]
    write_text(path, json.dumps(entries, ensure_ascii=False))
    check_upload(path, list(answers), id_field, answer_field)
    return path


def check_upload(path: Path, ids: Sequence[Any], id_field: str, answer_field: str = "answer") -> None:
    """
    Checks a file before it is uploaded to a server.

    Args:
        ids (`Sequence`): All ids that the server expects, in the type that it expects.

    Raises:
        ValueError: If the file is not a JSON list with exactly one text for each id.
    """
    entries = read_json_rows(path, [id_field, answer_field])
    for number, entry in enumerate(entries):
        if not isinstance(entry[answer_field], str):
            raise ValueError(f"{path}, row {number}: {answer_field} is {entry[answer_field]!r}, expected a string.")
    there = unique_by(entries, id_field, str(path))
    missing = [id for id in ids if id not in there]
    if missing:
        raise ValueError(f"{path}: lacks answers for {len(missing)} ids, such as {missing[0]!r}.")
    if len(there) > len(ids):
        unknown = next(iter(there.keys() - set(ids)))
        raise ValueError(f"{path}: has an answer for {unknown!r}, which is not a question of the data.")
