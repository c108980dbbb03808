"""ScienceQA: school questions with two to five options, some about an image (https://scienceqa.github.io).

    sq-llava evaluate --model M --tasks scienceqa --data DIR

`scienceqa` asks only the questions with an image and wants a letter, as LLaVA-1.5 does; the paper reports this task
(SQA-I). `scienceqa_all` also asks the questions without an image. `scienceqa_reasoning` asks all questions as the
first LLaVA does: the model reasons and ends with "The answer is B." With `--judge-model`, it also computes ensembles
with a language model that does not see the image (`scienceqa_ensemble.py`).

`llava/accuracy` parses an answer as LLaVA does: "B", or "B. " at the beginning, or "The answer is B" exactly once and
followed by any character. Otherwise the answer counts as wrong and not parsed (LLaVA's code for the ensembles chooses
a random option). `lmms_eval/accuracy` (0.7.3) also accepts "b" and "B." without a following space, but not the
sentence. `accuracy` accepts what people would: also "(B)", "b)", and "the answer is B" at the end or several times.

The Hub's table (configurations ScienceQA-IMG and ScienceQA-FULL: image, question, choices, answer, hint) has no ids,
so the id is the row number. LLaVA's folder: `llava_test_CQM-A.json` (id, image, conversations), ScienceQA's own
`problems.json` and `pid_splits.json`, and `images/test`. `scienceqa_reasoning` needs only the last three.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sq_llava.evaluation import scienceqa_ensemble
from sq_llava.evaluation.options import INSTRUCTION, LETTERS, lettered
from sq_llava.evaluation.reading import Data, TaskImage, check_fields, read_json, read_json_rows, unique_by
from sq_llava.evaluation.task import Example, Score, Task


FIELDS = ("question", "choices", "answer", "hint")


def prompt_for_letter(row: dict[str, Any]) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{lettered(row['choices'])}{INSTRUCTION}"


def prompt_for_reasoning(row: dict[str, Any]) -> str:
    """LLaVA's `QCM` format, which leaves out the word "Question: "."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    prompt = f"{row['question']}\nContext: {(row['hint'] or '').strip() or 'N/A'}\nOptions: {options}"
    return prompt.replace("  ", " ").strip()


def read_images(data: Data) -> list[Example]:
    if data.is_table:
        return [each for each in _read_table(data, "ScienceQA-IMG", prompt_for_letter) if each.images]
    return [example for example in _read_folder(data) if example.images]


def read_all(data: Data) -> list[Example]:
    return _read_table(data, "ScienceQA-FULL", prompt_for_letter) if data.is_table else _read_folder(data)


def read_reasoning(data: Data) -> list[Example]:
    if data.is_table:
        return _read_table(data, "ScienceQA-FULL", prompt_for_reasoning)
    problems = _problems(data)
    return [
        _example(id, row, prompt_for_reasoning(row), _images(data, row["image"] and f"{id}/{row['image']}"), id)
        for id, row in problems.items()
    ]


def _read_table(data: Data, config: str, prompt_of) -> list[Example]:
    rows = data.rows([*FIELDS, "image"], default_split="test", config=config)
    return [
        _example(str(number), row, prompt_of(row), [row["image"]] * row["image"].is_there(), f"{data}, row {number}")
        for number, row in enumerate(rows)
    ]


def _read_folder(data: Data) -> list[Example]:
    file = data.file(f"llava_{data.split or 'test'}_CQM-A.json")
    problems = _problems(data)
    rows_of = unique_by(read_json_rows(file, ["id", "conversations"]), "id", str(file))
    if rows_of.keys() != problems.keys():
        id = min(rows_of.keys() ^ problems.keys(), key=str)
        raise ValueError(f"{file} and pid_splits.json must have the same ids, but {id!r} is in only one of them.")
    examples = []
    for id, row in rows_of.items():
        turn = next(iter(row["conversations"]), None)
        text = check_fields(turn, ["value"], f"{file}, {id}, first turn")["value"].replace("<image>", "").strip()
        # LLaVA's script adds the instruction to the text of the file.
        prompt = text.removesuffix(INSTRUCTION) + INSTRUCTION
        examples.append(_example(id, problems[id], prompt, _images(data, row.get("image")), id))
    return examples


def _problems(data: Data) -> dict[str, dict[str, Any]]:
    """The questions of the split, by id."""
    file, split_file, split = data.file("problems.json"), data.file("pid_splits.json"), data.split or "test"
    problems = read_json(file)
    chosen = {}
    for id in check_fields(read_json(split_file), [split], str(split_file))[split]:
        if id not in problems:
            raise ValueError(f"{file}: has no id {id!r}, which {split_file} lists in {split}.")
        chosen[id] = check_fields(problems[id], [*FIELDS, "image"], f"{file}, {id}")
    return chosen


def _images(data: Data, name: str | None) -> list[Path]:
    return [data.image(data.folder / "images" / (data.split or "test"), name)] if name else []


def _example(id: str, row: dict[str, Any], prompt: str, images: Sequence[TaskImage], place: str) -> Example:
    num_choices = len(row["choices"])
    if row["answer"] not in range(num_choices) or num_choices > len(LETTERS):
        raise ValueError(f"{place}: answer is {row['answer']!r}, expected an index (from 0) of {num_choices} choices.")
    return Example(
        id=id,
        prompt=prompt,
        images=images,
        reference=LETTERS[row["answer"]],
        details={"num_choices": num_choices, "kind": "image" if images else "text"},
    )


def option_of(answer: str, num_choices: int) -> str | None:
    """
    The letter that LLaVA's parser finds in an answer; `None` if it finds none.

        >>> option_of("B", 3), option_of("B. blue", 3), option_of("Grass is green. The answer is C.", 3)
        ('B', 'B', 'C')
        >>> option_of("b", 3), option_of("B.", 3), option_of("D", 3), option_of("The answer is A. The answer is B.", 3)
        (None, None, None, None)
    """
    text = answer.strip()
    if text in list(LETTERS):
        letter = text
    elif re.match(r"[A-E]\. ", text):
        letter = text[0]
    else:
        return concluded_option(text, num_choices)
    return letter if letter in LETTERS[:num_choices] else None


def concluded_option(answer: str, num_choices: int) -> str | None:
    """
    The letter of "The answer is B." if a text has these words exactly once; else `None`. As in LLaVA, any character
    but a line break may follow the letter, and one must.
    """
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 and found[0] in LETTERS[:num_choices] else None


def option_of_lmms_eval(answer: str) -> str:
    text = answer.strip()
    return text[0] if len(text) > 1 and text[0].isupper() and text[1] == "." else text.upper()


def stated_option(answer: str, num_choices: int) -> str | None:
    """
    The letter that an answer states: alone, at the beginning, or in "the answer is". `None` if there is none, or if
    "the answer is" occurs with different letters.

        >>> [stated_option(text, 3) for text in ("(b)", "B: blue", "It is red, so the answer is C", "A dog", "E")]
        ['B', 'B', 'C', None, None]
    """
    text = answer.strip()
    letters = [match[1] for match in re.finditer(r"(?i:\banswer is:?) *\(?([A-Z])\b(?!')", text)]
    if (first := re.match(r"\(?([A-Za-z])(?:[.:)]+(?=\s|$)|$)", text)) is not None:
        letters = [first[1]]
    options = {letter.upper() for letter in letters}
    return options.pop() if len(options) == 1 and options <= set(LETTERS[:num_choices]) else None


def score_reasoning(example: Example, answer: str) -> Score:
    num_choices = example.details["num_choices"]
    option = option_of(answer, num_choices)
    values = {
        "llava/accuracy": float(option == example.reference),
        "accuracy": float(stated_option(answer, num_choices) == example.reference),
    }
    return Score(values, is_parsed=option is not None, prediction=option)


def score(example: Example, answer: str) -> Score:
    common = score_reasoning(example, answer)
    lmms_eval = float(option_of_lmms_eval(answer) == example.reference)
    return replace(common, values={**common.values, "lmms_eval/accuracy": lmms_eval})


TASK = Task(
    name="scienceqa",
    title="ScienceQA, questions with an image",
    hub_id="lmms-lab-encoder/ScienceQA",
    read=read_images,
    score=score,
    main_metric="llava/accuracy",
    max_new_tokens=1024,
)
ALL_TASK = replace(TASK, name="scienceqa_all", title="ScienceQA", folder="scienceqa", read=read_all, breakdown="kind")
REASONING_TASK = replace(
    ALL_TASK,
    name="scienceqa_reasoning",
    title="ScienceQA, reasoning first",
    read=read_reasoning,
    score=score_reasoning,
    judge=partial(scienceqa_ensemble.judge, option_of=concluded_option),
)
