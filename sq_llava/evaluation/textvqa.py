"""TextVQA: questions about text in images, with ten human answers each (https://textvqa.org).

    sq-llava evaluate --model M --tasks textvqa,textvqa_no_ocr --data DIR

The prompts of `textvqa` include the words that an OCR program found, as in LLaVA; the paper reports this task (about
58 for LLaVA-1.5-7B). `textvqa_no_ocr` leaves them out, as lmms-eval does (about 46). Both use the same metric.
Questions of a Hub table are capitalized (first letter upper case, the rest lower case), as in both projects.

LLaVA's folder: `llava_textvqa_val_v051_ocr.jsonl` (question_id, which is the id of an image; image, text),
`TextVQA_0.5.1_val.json` and the images in `train_images`. An image can have several questions, so annotations are
matched by image and question, ignoring case.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sq_llava.evaluation.metrics import normalize_m4c
from sq_llava.evaluation.reading import Data, read_json_list, read_jsonl
from sq_llava.evaluation.short_answers import (
    INSTRUCTION,
    human_answers,
    official_id,
    read_table,
    score,
    write_upload,
)
from sq_llava.evaluation.task import Example, Record, Task


OCR = "\nReference OCR token: "


def read(data: Data) -> list[Example]:
    if not data.is_table:
        return _read_folder(data)
    return read_table(data, "validation", _prompt, "ocr_tokens")


def _prompt(row: dict[str, Any]) -> str:
    return row["question"].capitalize() + OCR + ", ".join(row["ocr_tokens"]) + INSTRUCTION


def _read_folder(data: Data) -> list[Example]:
    data.split_of_files("validation", "val")
    file, answer_file = data.file("llava_textvqa_val_v051_ocr.jsonl"), data.file("TextVQA_0.5.1_val.json")
    waiting = _annotations(answer_file)
    examples = []
    for number, row in enumerate(read_jsonl(file, ["question_id", "image", "text"]), start=1):
        question = row["text"].split("\n")[0]
        key = (row["question_id"], question.lower())
        if not waiting.get(key):
            raise ValueError(f"{answer_file}: lacks an annotation for {key}, row {number} of {file}.")
        # If a question about an image is annotated twice, it is also asked twice, so either annotation fits.
        annotation = waiting[key].pop(0)
        examples.append(
            Example(
                id=str(annotation["question_id"]),
                prompt=row["text"],  # includes the OCR tokens and the instruction
                images=[data.image(file.parent / "train_images", row["image"])],
                reference=human_answers(annotation, f"{answer_file}, {key}"),
            )
        )
    left = [key for key, annotations in waiting.items() if annotations]
    if left:
        raise ValueError(f"{file}: lacks {len(left)} questions of {answer_file}, such as {left[0]}.")
    return examples


def _annotations(file: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_json_list(file, "data", ["question_id", "image_id", "question", "answers"]):
        found.setdefault((row["image_id"], row["question"].lower()), []).append(row)
    return found


def read_without_ocr(data: Data) -> list[Example]:
    return [replace(example, prompt=example.prompt.split("\n")[0] + INSTRUCTION) for example in read(data)]


def write_submission(records: Sequence[Record], folder: Path) -> Path | None:
    """Writes `[{question_id, answer}, ...]` for the test split. `None` for a split that is scored here."""
    if records[0].example.reference is not None:
        return None
    answers = {official_id(record.example.id): normalize_m4c(record.answer) for record in records}
    return write_upload(folder / "textvqa.json", answers, "question_id")


TASK = Task(
    name="textvqa",
    title="TextVQA",
    hub_id="lmms-lab-encoder/textvqa",
    read=read,
    score=score,
    main_metric="m4c/accuracy",
    write_submission=write_submission,
)
NO_OCR_TASK = replace(
    TASK, name="textvqa_no_ocr", title="TextVQA without OCR tokens", folder="textvqa", read=read_without_ocr
)
