"""GQA: compositional questions about photos, with one answer each (https://cs.stanford.edu/people/dorarad/gqa).

    sq-llava evaluate --model M --tasks gqa --data DIR

`accuracy`: the answer must equal the reference, ignoring case, trailing periods and white space around both.
`llava/accuracy` is what GQA's `eval.py` finds in the file that LLaVA's script writes: the script removes trailing
periods but leaves the space before them, and `eval.py` compares exactly, so "cat ." is wrong. `lmms_eval/accuracy`
ignores case and all punctuation, but no white space. The predictions of `accuracy` are also written for `eval.py`, as
`testdev_balanced_predictions.json`.

The Hub's layout has two tables: questions (testdev_balanced_instructions: id, imageId, question, answer) and images
(testdev_balanced_images: id, image). LLaVA's folder: `llava_gqa_testdev_balanced.jsonl` (question_id, image, text),
GQA's `data/testdev_balanced_questions.json` and `data/images`.
"""

import string
from collections.abc import Sequence
from pathlib import Path

from sq_llava.evaluation.metrics import bare, exact_match
from sq_llava.evaluation.reading import Data, check_fields, read_json, read_jsonl, unique_by
from sq_llava.evaluation.short_answers import INSTRUCTION, write_upload
from sq_llava.evaluation.task import Example, Record, Score, Task


WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(data: Data) -> list[Example]:
    if not data.is_table:
        return _read_folder(data)
    rows = list(data.rows(["id", "imageId", "question", "answer"], "testdev", "testdev_balanced_instructions"))
    image_rows = list(data.rows(["id", "image"], "testdev", "testdev_balanced_images"))
    images = unique_by(image_rows, "id", f"{data}, testdev_balanced_images")
    examples = []
    for number, row in enumerate(rows):
        if row["imageId"] not in images:
            raise ValueError(f"{data}, row {number}: testdev_balanced_images has no image {row['imageId']!r}.")
        examples.append(
            Example(
                id=str(row["id"]),
                prompt=row["question"] + INSTRUCTION,
                images=[images[row["imageId"]]["image"]],
                reference=str(row["answer"]),
            )
        )
    return examples


def _read_folder(data: Data) -> list[Example]:
    data.split_of_files("testdev")
    file = data.file("llava_gqa_testdev_balanced.jsonl")
    answer_file = data.file("data/testdev_balanced_questions.json", "testdev_balanced_questions.json")
    answers = read_json(answer_file)
    examples = []
    for row in read_jsonl(file, ["question_id", "image", "text"]):
        id = str(row["question_id"])
        if id not in answers:
            raise ValueError(f"{answer_file}: has no question {id!r}, which is in {file}.")
        examples.append(
            Example(
                id=id,
                prompt=row["text"],  # includes the instruction
                images=[data.image(answer_file.parent / "images", row["image"])],
                reference=str(check_fields(answers[id], ["answer"], f"{answer_file}, {id}")["answer"]),
            )
        )
    return examples


def prediction_of_llava(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def score(example: Example, answer: str) -> Score:
    letters, reference = (text.lower().translate(WITHOUT_PUNCTUATION) for text in (answer, example.reference))
    values = {
        "accuracy": exact_match(answer, example.reference),
        "llava/accuracy": float(prediction_of_llava(answer) == example.reference),
        "lmms_eval/accuracy": float(letters == reference),
    }
    return Score(values, is_parsed=bare(answer) != "", prediction=bare(answer))


def write_submission(records: Sequence[Record], folder: Path) -> Path:
    answers = {record.example.id: bare(record.answer) for record in records}
    return write_upload(folder / "testdev_balanced_predictions.json", answers, "questionId", "prediction")


TASK = Task(
    name="gqa",
    title="GQA",
    hub_id="lmms-lab-encoder/GQA",
    read=read,
    score=score,
    main_metric="llava/accuracy",
    write_submission=write_submission,
)
