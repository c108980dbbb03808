"""MM-Vet: open questions that need several abilities at once (https://arxiv.org/abs/2308.02490), graded by a judge.

    sq-llava evaluate --model M --tasks mmvet --data DIR --judge-model gpt-4o

Each of the 218 questions lists the capabilities that it needs: recognition (rec), OCR, knowledge (know), language
generation (gen), spatial awareness (spat), math. The judge reads question, ground truth and prediction in a table with
a few graded examples, and gives a grade from 0 to 1. `score` is the mean, `ocr/score` the mean over the questions that
need OCR. `mmvet` asks only the question, as LLaVA does. `mmvet_lmms_eval` adds lmms-eval's prefix.

The judge's prompt has MM-Vet's format and scale, but its own wording and examples. For results that can be compared
with the paper, upload `mmvet.json`, which is always written, to
https://huggingface.co/spaces/whyu/MM-Vet_Evaluator.

LLaVA's folder: `mm-vet.json` from the authors' zip (id -> imagename, question, answer, capability) and `images`. If
`llava-mm-vet.jsonl` (question_id, image, text) exists, the questions are read from it. In a Hub table without
question_id, the id is the row number.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sq_llava.evaluation.judge import Judge, Messages, Verdict
from sq_llava.evaluation.reading import Data, TaskImage, check_fields, id_of, read_json, read_jsonl, unique_by
from sq_llava.evaluation.task import Example, Record, Score, Task
from sq_llava.output import write_text


LMMS_EVAL_PREFIX = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)

INSTRUCTION = """\
Each row of this table holds a question about an image, its ground truth, the prediction of a model, and how correct
the prediction is, from 0.0 (all wrong) to 1.0 (all right) in steps of 0.1. Where the ground truth has <AND>, each of
the parts must be in the prediction for 1.0; where it has <OR>, any one of them will do. Complete the last row: answer
with the number that is missing, and nothing else.

question | ground truth | prediction | correctness
--- | --- | --- | ---
Which fruits are in the bowl? | apple <AND> pear | There are three bananas. | 0.0
Which fruits are in the bowl? | apple <AND> pear | I see a pear and some grapes. | 0.5
Which fruits are in the bowl? | apple <AND> pear | A pear lies next to an apple. | 1.0
What is the red vehicle? | bus <OR> coach | It is a coach. | 1.0
What is the total on the receipt? | 14.50 | 1450 dollars | 0.0
Why is the sign funny? | It forbids dogs to read, but only somebody who reads it could obey, and dogs cannot read. | \
The sign is about dogs, which is unusual and amusing. | 0.2
Why is the sign funny? | It forbids dogs to read, but only somebody who reads it could obey, and dogs cannot read. | \
It tells dogs not to read, which they cannot do anyway. | 0.7
"""

# A number from 0 to 1, perhaps with a label before it, the scale behind it, and marks of Markdown around both.
_GRADE = re.compile(
    r"""[\s|*_`#"{]*(?:(?:the\ )?(?:correctness|score|grade)(?:\ score)?[\s*_`"]*(?:[:=|]|\bis\b)[\s*_`"]*)?
    (0|1|[01]?\.\d+)(?=(?:\ ?/\ ?1(?:\.0)?)?[.,;\s|*_`"}]*(?:\s|$))""",
    re.I | re.X,
)


def read(data: Data) -> list[Example]:
    if not data.is_table:
        return _read_folder(data)
    rows = data.rows(["question", "answer", "image", "capability"], default_split="test")
    return [
        _example(id_of(row, number), row["image"], row, f"{data}, row {number}") for number, row in enumerate(rows)
    ]


def _read_folder(data: Data) -> list[Example]:
    data.split_of_files("test")
    file = data.file("mm-vet.json", "mm-vet/mm-vet.json")
    rows = {}
    for id, row in read_json(file).items():
        rows[id] = check_fields(row, ["imagename", "question", "answer", "capability"], f"{file}, {id}")
    questions_file = data.folder / "llava-mm-vet.jsonl"
    if questions_file.is_file():
        asked = read_jsonl(questions_file, ["question_id", "image", "text"])
        questions = {_id(id): row for id, row in unique_by(asked, "question_id", str(questions_file)).items()}
        missing = sorted(questions.keys() - rows.keys())
        if missing:
            raise ValueError(f"{file}: lacks {', '.join(missing[:5])}, which {questions_file} asks.")
        rows = {
            id: {**rows[id], "imagename": question["image"], "question": question["text"]}
            for id, question in questions.items()
        }
    root = file.parent / "images"
    return [_example(id, data.image(root, row["imagename"]), row, f"{file}, {id}") for id, row in rows.items()]


def _example(id: Any, image: TaskImage, row: dict[str, Any], place: str) -> Example:
    capability = row["capability"]
    capabilities = capability.split(",") if isinstance(capability, str) else list(capability)
    if not re.fullmatch(r"v1_\d+", _id(id)):
        raise ValueError(f"{place}: id is {id!r}, expected v1_<number> or a number.")
    return Example(
        id=_id(id),
        prompt=row["question"],
        images=[image],
        reference=str(row["answer"]),
        details={"question": row["question"], "capabilities": [name.strip() for name in capabilities]},
    )


def _id(id: Any) -> str:
    """The id in the server's form, `v1_<number>`. LLaVA's files have only the number."""
    return f"v1_{str(id).removeprefix('v1_')}"


def read_with_prefix(data: Data) -> list[Example]:
    return [replace(example, prompt=LMMS_EVAL_PREFIX + example.prompt) for example in read(data)]


def question_for_judge(record: Record) -> Messages:
    ground_truth = record.example.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = f"{record.example.details['question']} | {ground_truth} | {record.answer} |"
    return [{"role": "user", "content": INSTRUCTION + row}]


def parse_grade(text: str) -> float:
    """
    The grade at the beginning of the judge's answer, perhaps after a label.

        >>> parse_grade("0.5"), parse_grade("1 - all there"), parse_grade("**Correctness:** 0.7")
        (0.5, 1.0, 0.7)

    Raises:
        ValueError: If the answer does not begin with a number from 0 to 1.
    """
    found = _GRADE.match(text)
    if found is None or float(found[1]) > 1:
        raise ValueError(f"{text[:80]!r} does not begin with a number from 0 to 1")
    return float(found[1])


def judge(records: Sequence[Record], judge: Judge, folder: Path) -> list[Score]:
    questions = {record.example.id: question_for_judge(record) for record in records if record.error is None}
    verdicts = judge.complete_all(questions, parse_grade, "MM-Vet: judging")
    return [score(record, verdicts.get(record.example.id)) for record in records]


def score(record: Record, verdict: Verdict | None) -> Score:
    """The score of an answer. Without an answer there is no verdict, and the grade is 0."""
    if verdict is None:
        return Score(_values(record, 0.0), is_parsed=False)
    if verdict.error is not None:
        return Score({}, is_parsed=False, prediction=verdict.text, judge_error=verdict.error)
    return Score(_values(record, verdict.value), prediction=verdict.text)


def _values(record: Record, grade: float) -> dict[str, float]:
    return {"score": grade, **{f"{name}/score": grade for name in record.example.details["capabilities"]}}


def write_submission(records: Sequence[Record], folder: Path) -> Path:
    """Writes an object of id -> answer. The answer of a failed example is empty."""
    path = folder / "mmvet.json"
    answers = {record.example.id: record.answer for record in records}
    write_text(path, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    return path


TASK = Task(
    name="mmvet",
    title="MM-Vet",
    hub_id="lmms-lab-encoder/MMVet",
    folder="mm-vet",
    read=read,
    score=None,
    judge=judge,
    main_metric="score",
    write_submission=write_submission,
    max_new_tokens=1024,
)
LMMS_EVAL_TASK = replace(TASK, name="mmvet_lmms_eval", title="MM-Vet, prompt of lmms-eval", read=read_with_prefix)
