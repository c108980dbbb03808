"""VizWiz: questions by blind people about their own photos; some cannot be answered (https://vizwiz.org).

    sq-llava evaluate --model M --tasks vizwiz --data DIR                      # test: writes vizwiz.json for EvalAI
    sq-llava evaluate --model M --tasks vizwiz --data DIR --split val          # scored here

The paper reports the test split. Only the server has its answers
(https://eval.ai/web/challenges/challenge-page/1911). Results on `val` are not comparable with it. Questions of a Hub
table are capitalized (first letter upper case, the rest lower case), as in lmms-eval. LLaVA's file has whole prompts.

LLaVA's folder: `llava_test.jsonl` (question_id, image, text) and the photos in `test`. For `val`: the authors'
`val.json` (image, question, answers) and the photos in `val`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sq_llava.evaluation.metrics import normalize_m4c
from sq_llava.evaluation.reading import Data, read_json_rows
from sq_llava.evaluation.short_answers import (
    INSTRUCTION,
    human_answers,
    read_questions,
    read_table,
    score,
    write_upload,
)
from sq_llava.evaluation.task import Example, Record, Task


SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + INSTRUCTION


def read(data: Data) -> list[Example]:
    if data.is_table:
        return _with_bare_ids(read_table(data, "test", _prompt))
    if data.split_of_files("test", "val") == "val":
        return _read_val(data)
    return _with_bare_ids(read_questions(data, data.file("llava_test.jsonl"), "test"))


def _read_val(data: Data) -> list[Example]:
    file = data.file("val.json", "Annotations/val.json")
    examples = [
        Example(
            id=row["image"],
            prompt=_prompt(row),
            images=[data.image(data.folder / "val", row["image"])],
            reference=human_answers(row, f"{file}, row {number}"),
        )
        for number, row in enumerate(read_json_rows(file, ["image", "question", "answers"]))
    ]
    return _with_bare_ids(examples)


def _prompt(row: dict[str, Any]) -> str:
    return row["question"].capitalize() + SUFFIX


def _with_bare_ids(examples: Sequence[Example]) -> list[Example]:
    """Removes `.jpg` from ids, as in the Hub's table. Each photo has one question, so the file name is the id."""
    return [replace(example, id=example.id.removesuffix(".jpg")) for example in examples]


def write_submission(records: Sequence[Record], folder: Path) -> Path | None:
    """Writes `[{image, answer}, ...]` in the order of the questions. `None` for a split that is scored here."""
    if records[0].example.reference is not None:
        return None
    answers = {f"{record.example.id}.jpg": normalize_m4c(record.answer) for record in records}
    return write_upload(folder / "vizwiz.json", answers, "image")


TASK = Task(
    name="vizwiz",
    title="VizWiz",
    hub_id="lmms-lab-encoder/VizWiz-VQA",
    read=read,
    score=score,
    main_metric="m4c/accuracy",
    write_submission=write_submission,
)
