"""MMBench: questions with two to four options that test twenty abilities, in English and Chinese
(https://arxiv.org/abs/2307.06281).

    sq-llava evaluate --model M --tasks mmbench,mmbench_cn --data DIR

The data repeats each question with its options rotated, in rows with an index of 1,000,000 or more. `letter/accuracy`
uses only the original questions. `circular/accuracy`, the metric in the paper, counts a question as correct if all its
rotations are answered correctly; it is a share of questions, and computed only if the data has rotations. Options are
parsed by MMBench's rules. If they find no option, MMBench's server asks a language model; here the answer counts as
wrong and not parsed. `mmbench.xlsx` is for the server, which alone has the answers of the test split
(https://mmbench.opencompass.org.cn/mmbench-submission).

`mmbench_cn` uses LLaVA's prompt, `mmbench_cn_lmms_eval` that of lmms-eval 0.7.3: its line before the options is in
English, and a missing hint, which the Hub's table writes as "nan", is shown as "nan". LLaVA's folder is `mmbench` for
both languages, with the tables `mmbench_dev_20230712.tsv` and `mmbench_dev_cn_20231003.tsv` (index, question, hint, A
to D, answer, category, image in base64, ...). The Hub's configurations are `en` and `cn`. The options of a question
end before the first empty one. As in LLaVA, which reads the table with pandas, texts such as "NA", "null" and "None"
count as empty, also as the text of an option.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from openpyxl import Workbook, load_workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from sq_llava.evaluation import options
from sq_llava.evaluation.options import lettered
from sq_llava.evaluation.reading import Data, EncodedImage, TaskImage, read_tsv
from sq_llava.evaluation.task import Example, Record, Score, Task
from sq_llava.output import written_whole


FIELDS = ("index", "question", "hint", "A", "B", "C", "D", "image")
LETTERS = "ABCD"
FIRST_ROTATION = 1_000_000
FILES = {
    "en": ("mmbench_{split}_2*.tsv", "mmbench_{split}_en_*.tsv", "MMBench_{SPLIT}_EN*.tsv"),
    "cn": ("mmbench_{split}_cn_*.tsv", "MMBench_{SPLIT}_CN*.tsv"),
}
UPLOAD_COLUMNS = ("index", "question", *LETTERS, "prediction", "answer", "split")
# How a letter may be written. The forms are tried in this order.
FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
# What pandas reads as an empty cell. LLaVA also takes "nan" and "none" in any case for one.
EMPTY_CELLS = "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null"
EMPTY = {"", "#N/A N/A", *EMPTY_CELLS.split()}
# An image field of at most this many characters may be the index of another row that has the same image.
MAX_REFERENCE = 64


def prompt_of_llava(row: Mapping[str, Any], instruction: str) -> str:
    hint = text_of(row, "hint")
    text = f"{hint}\n{row['question']}" if hint else row["question"]
    return f"{text}\n{lettered(list(choices_of(row).values()))}{instruction}"


def prompt_of_lmms_eval(row: Mapping[str, Any]) -> str:
    """The prompt of lmms-eval 0.7.3 for a row of the Hub's table, without correction."""
    text = row["question"] if row["hint"] is None else f"{row['hint']} {row['question']}"
    choices = {letter: row.get(letter) for letter in options.LETTERS}
    lines = [f"{letter}. {choice}" for letter, choice in choices.items() if choice and choice != "nan"]
    listed = "\n".join(["There are several options:", *lines]).rstrip("\n")
    return f"{text} {listed}\n\n请直接使用所提供的选项字母作为答案回答。"


def read(data: Data, language: str, prompt_of: Callable[[Mapping[str, Any]], str]) -> list[Example]:
    if data.is_table:
        rows = [(row, row["image"]) for row in data.rows(FIELDS, default_split="dev", config=language)]
    else:
        rows = _read_tsv(data, language)
    for number, (row, _) in enumerate(rows):
        if not str(row["index"]).isdecimal():
            raise ValueError(f"{data}, row {number}: index is {row['index']!r}, expected a number.")
    num_rows = Counter(int(row["index"]) % FIRST_ROTATION for row, _ in rows)
    # Data without rotations has no circular accuracy.
    if set(num_rows.values()) == {1}:
        num_rows = {}
    return [
        _example(row, image, prompt_of, num_rows, f"{data}, row {number}") for number, (row, image) in enumerate(rows)
    ]


def _read_tsv(data: Data, language: str) -> list[tuple[dict[str, Any], TaskImage]]:
    split = data.split or "dev"
    file = data.file(*(name.format(split=split, SPLIT=split.upper()) for name in FILES[language]))
    rows = read_tsv(file, FIELDS)
    images = {row["index"]: row["image"] for row in rows}
    found = []
    for row in rows:
        row["hint"] = row["hint"] or None
        row.update({name: None for name in ("hint", *LETTERS) if row[name] and row[name] in EMPTY})
        text = row.pop("image")
        if len(text) <= MAX_REFERENCE and text in images:
            text = images[text]
        found.append((row, EncodedImage(text, f"{file.name}, index {row['index']}")))
    return found


def _example(row: dict[str, Any], image: TaskImage, prompt_of, num_rows: Mapping[int, int], place: str) -> Example:
    index = int(row["index"])
    choices = choices_of(row)
    answer = text_of(row, "answer") or None
    # The right option may be one that the prompt leaves out, such as "None".
    there = [letter for letter in LETTERS if row[letter] not in ("", "nan")]
    if answer is not None and answer not in there:
        raise ValueError(f"{place}: answer is {answer!r}, but the options are {', '.join(there) or 'empty'}.")
    return Example(
        id=str(index),
        prompt=prompt_of(row),
        images=[image],
        reference=answer,
        details={
            "question": row["question"],
            "choices": choices,
            "category": text_of(row, "category") or "uncategorized",
            "split": text_of(row, "split"),
            "num_rows": num_rows.get(index % FIRST_ROTATION),
        },
    )


def choices_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options by letter, up to the first empty one."""
    texts = {letter: text_of(row, letter) for letter in LETTERS}
    return dict(takewhile(lambda choice: choice[1], texts.items()))


def text_of(row: Mapping[str, Any], field: str) -> str:
    """The value of a field; "" if it is missing, or empty for LLaVA."""
    text = row.get(field)
    return "" if text is None or text in EMPTY or text.lower() in ("nan", "none") else text


def option_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """
    The option that an answer names, by MMBench's rules. The `FORMS` of a letter are tried in order. If exactly one
    letter is a word of the answer in this form, it is the option. If no form decides, the option is the one whose text
    is in the answer, unless several are. A bare "A" is an article if the answer has more than three words.

        >>> choices = {"A": "cat", "B": "dog"}
        >>> [option_of(text, choices) for text in ("B", "(B).", "A dog, I think: B.", "a dog", "A or B", "E")]
        ['B', 'B', 'B', 'B', None, 'E']
    """
    words = answer.split()
    for form in FORMS:
        letters = [letter for letter in options.LETTERS if form.format(letter) in words]
        is_article = form == "{}" and letters == ["A"] and len(words) > 3
        if len(letters) == 1 and not is_article:
            return letters[0]
    named = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def score(example: Example, answer: str) -> Score:
    option = option_of(answer, example.details["choices"])
    values = {}
    if example.reference is not None and int(example.id) < FIRST_ROTATION:
        values["letter/accuracy"] = float(option == example.reference)
    return Score(values, is_parsed=option in example.details["choices"], prediction=option)


def score_question(records: Sequence[Record]) -> dict[str, float]:
    """Circular accuracy of one question: 1 if all rows are right. Empty without rotations, or if rows are missing."""
    if records[0].example.reference is None or len(records) != records[0].example.details["num_rows"]:
        return {}
    return {"circular/accuracy": float(all(each.score.prediction == each.example.reference for each in records))}


def write_submission(records: Sequence[Record], folder: Path) -> Path:
    """Writes the Excel file that LLaVA uploads: one row per question, `prediction` is the model's unchanged answer."""
    path = folder / "mmbench.xlsx"
    workbook = Workbook()
    sheet = workbook.active
    sheet.append(UPLOAD_COLUMNS)
    for number, record in enumerate(records, start=2):
        for column, value in enumerate(_upload_row(record), start=1):
            cell = sheet.cell(number, column, value)
            if isinstance(value, str):
                cell.data_type = "s"  # otherwise "=3" becomes a formula
    with written_whole(path) as new:
        workbook.save(new)
    check_upload(path, [int(record.example.id) for record in records])
    return path


def _upload_row(record: Record) -> list[Any]:
    details = record.example.details
    choices = [details["choices"].get(letter) for letter in LETTERS]
    texts = [details["question"], *choices, record.answer, record.example.reference, details["split"]]
    return [int(record.example.id), *(text and ILLEGAL_CHARACTERS_RE.sub("", text) for text in texts)]


def check_upload(path: Path, indices: Sequence[int]) -> None:
    """Raises a `ValueError` if the file does not have the server's columns, or not exactly one row per index."""
    workbook = load_workbook(path, read_only=True)
    header, *rows = workbook.active.iter_rows(values_only=True)
    workbook.close()
    if header != UPLOAD_COLUMNS:
        raise ValueError(f"{path}: has the columns {header}, expected {UPLOAD_COLUMNS}.")
    if Counter(row[0] for row in rows) != Counter(indices):
        raise ValueError(f"{path}: must have exactly one row for each of the {len(indices)} questions.")


TASK = Task(
    name="mmbench",
    title="MMBench",
    hub_id="lmms-lab-encoder/MMBench",
    read=partial(read, language="en", prompt_of=partial(prompt_of_llava, instruction=options.INSTRUCTION)),
    score=score,
    unit=lambda example: int(example.id) % FIRST_ROTATION,
    score_unit=score_question,
    main_metric="circular/accuracy",
    breakdown="category",
    write_submission=write_submission,
)
CN_TASK = replace(
    TASK,
    name="mmbench_cn",
    title="MMBench-CN",
    folder="mmbench",
    read=partial(read, language="cn", prompt_of=partial(prompt_of_llava, instruction="\n请直接回答选项字母。")),
)
CN_LMMS_EVAL_TASK = replace(
    CN_TASK,
    name="mmbench_cn_lmms_eval",
    title="MMBench-CN, prompt of lmms-eval",
    read=partial(read, language="cn", prompt_of=prompt_of_lmms_eval),
)
