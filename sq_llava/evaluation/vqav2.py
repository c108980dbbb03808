"""VQA v2: open questions about COCO images, with ten human answers each (https://visualqa.org).

    sq-llava evaluate --model M --tasks vqav2 --data DIR                       # test-dev: writes vqav2.json for EvalAI
    sq-llava evaluate --model M --tasks vqav2 --data DIR --split validation    # scored here

The paper reports test-dev. Only the server has its answers (https://eval.ai/web/challenges/challenge-page/830).
Results on the validation split are not comparable with it. They are computed in three forms: `m4c/` normalizes
answers as the server does, `official/` as the evaluation code of VQA v2, and `lmms_eval/` as lmms-eval 0.7.3.
`accuracy` leaves out each human answer in turn; `accuracy_short` is min(1, matches / 3).

LLaVA's folder: `llava_vqav2_mscoco_test-dev2015.jsonl` (or `test2015`: question_id, image, text) and the images in
`test2015`. For `validation`: `v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json`
from VQA, and `val2014`. The server requires an answer for each question of test2015. If
`llava_vqav2_mscoco_test2015.jsonl` is in the folder (also beside Parquet files), the submission gets "" as the answer
to the questions that were not asked.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sq_llava.evaluation import short_answers
from sq_llava.evaluation.metrics import (
    normalize_lmms_eval,
    normalize_m4c,
    short_form,
    vqa_accuracy,
    vqa_accuracy_official,
)
from sq_llava.evaluation.reading import Data, read_json_list, read_jsonl, unique_by
from sq_llava.evaluation.short_answers import (
    INSTRUCTION,
    human_answers,
    official_id,
    read_questions,
    read_table,
    write_upload,
)
from sq_llava.evaluation.task import Example, Record, Score, Task


ALL_TEST_QUESTIONS = "llava_vqav2_mscoco_test2015.jsonl"
TEST_QUESTIONS = {"testdev": "llava_vqav2_mscoco_test-dev2015.jsonl", "test": ALL_TEST_QUESTIONS}
VALIDATION_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VALIDATION_ANSWERS = "v2_mscoco_val2014_annotations.json"


def read(data: Data) -> list[Example]:
    if data.is_table:
        return _with_all_questions(data, read_table(data, "testdev", _prompt))
    split = data.split_of_files(*TEST_QUESTIONS, "validation")
    if split == "validation":
        return _read_validation(data)
    return _with_all_questions(data, read_questions(data, data.file(TEST_QUESTIONS[split]), "test2015"))


def _prompt(row: dict[str, Any]) -> str:
    return row["question"] + INSTRUCTION


def _read_validation(data: Data) -> list[Example]:
    file, answer_file = data.file(VALIDATION_QUESTIONS), data.file(VALIDATION_ANSWERS)
    annotations = read_json_list(answer_file, "annotations", ["question_id", "answers"])
    answers = unique_by(annotations, "question_id", str(answer_file))
    examples = []
    for row in read_json_list(file, "questions", ["question_id", "question", "image_id"]):
        if row["question_id"] not in answers:
            raise ValueError(f"{answer_file}: has no answers for question {row['question_id']} of {file}.")
        name = f"COCO_val2014_{str(row['image_id']).zfill(12)}.jpg"
        examples.append(
            Example(
                id=str(row["question_id"]),
                prompt=_prompt(row),
                images=[data.image(file.parent / "val2014", name)],
                reference=human_answers(answers[row["question_id"]], f"{answer_file}, question {row['question_id']}"),
            )
        )
    return examples


def _with_all_questions(data: Data, examples: Sequence[Example]) -> list[Example]:
    """Adds the path of the file with all ids to the test questions. The submission needs these ids."""
    all_questions = data.find(ALL_TEST_QUESTIONS) if data.folder is not None else None
    details = {"all_questions": str(all_questions)} if all_questions is not None else {}
    return [replace(each, details=details) if each.reference is None else each for each in examples]


def score(example: Example, answer: str) -> Score:
    common = short_answers.score(example, answer)
    if example.reference is None:
        return common
    values = {
        **common.values,
        "official/accuracy": vqa_accuracy_official(answer, example.reference),
        "official/accuracy_short": vqa_accuracy_official(answer, example.reference, short_form),
        "lmms_eval/accuracy": vqa_accuracy(answer, example.reference, normalize_lmms_eval),
    }
    return replace(common, values=values)


def write_submission(records: Sequence[Record], folder: Path) -> Path | None:
    """Writes `[{question_id, answer}, ...]` with normalized answers. `None` for a split that is scored here."""
    first = records[0].example
    if first.reference is not None:
        return None
    answers = {official_id(record.example.id): normalize_m4c(record.answer) for record in records}
    if "all_questions" in first.details:
        file = Path(first.details["all_questions"])
        ids = unique_by(read_jsonl(file, ["question_id"]), "question_id", str(file))
        answers = {**dict.fromkeys(ids, ""), **answers}
    return write_upload(folder / "vqav2.json", answers, "question_id")


TASK = Task(
    name="vqav2",
    title="VQA v2",
    hub_id="lmms-lab-encoder/VQAv2",
    read=read,
    score=score,
    main_metric="m4c/accuracy",
    write_submission=write_submission,
)
