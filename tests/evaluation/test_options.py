"""Benchmarks with lettered options, ScienceQA and MMBench: prompts, parsers, rotations, ensembles, submissions."""

import base64
import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import load_workbook

from sq_llava.evaluation.comparison import flips
from sq_llava.evaluation.judge import Judge, JudgeSettings
from sq_llava.evaluation.mmbench import check_upload
from sq_llava.evaluation.mmbench import option_of as mmbench_option_of
from sq_llava.evaluation.report import main_entry
from sq_llava.evaluation.results import read_records, write_results
from sq_llava.evaluation.run import Evaluation, find_task, read_examples
from sq_llava.evaluation.scienceqa import concluded_option, option_of, option_of_lmms_eval, stated_option
from sq_llava.evaluation.scienceqa_ensemble import complement, disagreements, judged
from sq_llava.evaluation.task import Example, Record, Score, main_score
from tests.chat_server import Reply, chat_server
from tests.evaluation_layouts import (
    assess_answers,
    examples_of,
    figures,
    image_bytes,
    metrics_of,
    png,
    stored,
    write_image,
    write_json,
    write_split,
)


L = "\nAnswer with the option's letter from the given choices directly."


SCIENCEQA = [  # id, question, choices, answer, hint, whether it has an image
    ("5", "Which is  red?", ["the sky", "a rose"], 1, "Look  at it.", True),
    ("11", "Which is an animal?", ["dog", "oak", "rock"], 0, "", False),
    ("20", "Where is it?", ["north", "south"], 0, "", True),
]


def write_scienceqa(folder, layout):
    if layout == "parquet":
        rows = [
            {"image": stored(n) if has_image else None, "question": question, "choices": choices, "answer": answer,
             "hint": hint}
            for n, (_, question, choices, answer, hint, has_image) in enumerate(SCIENCEQA)
        ]  # fmt: skip
        write_split(folder / "ScienceQA-FULL", "test", rows)
        write_split(folder / "ScienceQA-IMG", "test", [row for row in rows if row["image"]])
        return
    problems, asked = {}, []
    for n, (id, question, choices, answer, hint, has_image) in enumerate(SCIENCEQA):
        problems[id] = {"question": question, "choices": choices, "answer": answer, "hint": hint,
                        "image": "image.png" if has_image else None}  # fmt: skip
        letters = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABC", choices, strict=False))
        value = (f"Context: {hint}\n" if hint else "") + f"{question}\n{letters}"
        row = {"id": id, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "-"}]}
        if has_image:
            row["image"] = f"{id}/image.png"
            row["conversations"][0]["value"] = f"<image>\n{value}"
            write_image(folder / "images" / "test" / id / "image.png", n)
        asked.append(row)
    write_json(folder / "problems.json", dict(reversed(problems.items())))
    write_json(folder / "pid_splits.json", {"test": [row[0] for row in SCIENCEQA], "val": []})
    write_json(folder / "llava_test_CQM-A.json", asked[::-1])


def by_question(answers):
    """Answers to the three questions, by their text: the Hub's table has other ids than LLaVA's folder."""
    return lambda example: next(answer for row, answer in zip(SCIENCEQA, answers) if row[1][:9] in example.prompt)


def test_scienceqa_asks_only_questions_with_an_image(tmp_path, layout):
    write_scienceqa(tmp_path / "scienceqa", layout)
    examples = {example.prompt: example for example in examples_of("scienceqa", tmp_path)}
    assert set(examples) == {
        "Context: Look  at it.\nWhich is  red?\nA. the sky\nB. a rose" + L,
        "Where is it?\nA. north\nB. south" + L,
    }
    assert [image_bytes(example) for example in sorted(examples.values(), key=lambda each: each.prompt)] == [
        [png(0)],
        [png(2)],
    ]
    result = assess_answers("scienceqa", tmp_path, by_question(["B.", None, "A"]), tmp_path / "out")
    assert figures(result) == {"llava/accuracy": 0.5, "accuracy": 1.0, "lmms_eval/accuracy": 1.0}
    assert result.parsed_share == 0.5


def test_scienceqa_all_asks_all_questions(tmp_path, layout):
    write_scienceqa(tmp_path / "scienceqa", layout)
    result = assess_answers("scienceqa_all", tmp_path, by_question(["B", "B. oak", "A. north"]), tmp_path / "out")
    values = figures(result)
    assert values["llava/accuracy"] == pytest.approx(2 / 3)
    assert (values["image/llava/accuracy"], values["text/llava/accuracy"]) == (1, 0)


def test_scienceqa_reasoning_asks_as_the_first_llava_does(tmp_path, layout):
    write_scienceqa(tmp_path / "scienceqa", layout)
    examples = examples_of("scienceqa_reasoning", tmp_path)
    assert [example.prompt for example in examples] == [
        "Which is red?\nContext: Look at it.\nOptions: (A) the sky (B) a rose",
        "Which is an animal?\nContext: N/A\nOptions: (A) dog (B) oak (C) rock",
        "Where is it?\nContext: N/A\nOptions: (A) north (B) south",
    ]
    assert [image_bytes(example) for example in examples] == [[png(0)], [], [png(2)]]
    answers = iter(["Roses are red. The answer is B.", "A", "The answer is A. Or: The answer is B."])
    result = assess_answers("scienceqa_reasoning", tmp_path, lambda _: next(answers), tmp_path / "out")
    # A letter alone is an answer, too.
    assert figures(result)["llava/accuracy"] == pytest.approx(2 / 3)
    assert result.parsed_share == pytest.approx(2 / 3)


def test_scienceqa_with_another_split_or_other_ids_is_refused(tmp_path):
    write_scienceqa(tmp_path, "folder")
    with pytest.raises(ValueError, match=r"pid_splits\.json: has no minitest\. It has: test, val"):
        examples_of("scienceqa_reasoning", tmp_path, "minitest")
    write_json(tmp_path / "pid_splits.json", {"test": ["5", "11"]})
    with pytest.raises(ValueError, match=r"must have the same ids, but '20' is in only one of them"):
        examples_of("scienceqa", tmp_path)
    write_json(tmp_path / "llava_test_CQM-A.json", [{"id": 5, "conversations": []}])  # numbers and texts
    with pytest.raises(ValueError, match=r"must have the same ids, but '11' is in only one of them"):
        examples_of("scienceqa", tmp_path)


@pytest.mark.parametrize(
    "answer, llava, lmms_eval, stated",
    [
        ("B", "B", "B", "B"),
        (" B\n", "B", "B", "B"),
        ("b", None, "B", "B"),
        ("B.", None, "B", "B"),
        ("(B)", None, None, "B"),
        ("B. a rose", "B", "B", "B"),
        ("B.a rose", None, "B", None),
        ("B: a rose", None, None, "B"),
        ("The answer is B.", "B", None, "B"),
        ("The answer is B, because", "B", None, "B"),
        ("The answer is B\n", None, None, "B"),  # LLaVA strips answers, and its pattern needs a character
        ("The answer is B\nIt is red.", None, None, "B"),
        ("The answer is B", None, None, "B"),
        ("The answer is Blue", "B", None, None),
        ("the answer is B.", None, None, "B"),
        ("I say that the answer is (B)", None, None, "B"),
        ("The answer is B. So the answer is B.", "B", None, "B"),
        ("The answer is B. Yes. The answer is B.", None, None, "B"),
        ("The answer is B. No: the answer is A. The answer is A.", None, None, None),
        ("A rose", None, None, None),
        ("The answer is I'm not sure", None, None, None),
        ("D", None, "D", None),  # there are only three options
        ("The answer is D.", None, None, None),
        ("", None, None, None),
    ],
)
def test_scienceqa_answers_are_parsed_as_llava_and_lmms_eval_do(answer, llava, lmms_eval, stated):
    assert option_of(answer, 3) == llava
    assert stated_option(answer, 3) == stated
    read = option_of_lmms_eval(answer)
    assert (read if read in list("ABCDE") else None) == lmms_eval


@given(st.text(alphabet="ABCDE. Theanswri\n", max_size=40), st.integers(2, 5))
def test_scienceqa_option_is_one_of_those_given(text, num_choices):
    assert option_of(text, num_choices) in {None, *"ABCDE"[:num_choices]}


@given(st.sampled_from("ABC"), st.text(alphabet="abc ,\n", max_size=30))
def test_conclusion_is_found_after_any_reasoning(letter, reasoning):
    assert concluded_option(f"{reasoning} The answer is {letter}.", 3) == letter


OPTIONS = st.dictionaries(st.sampled_from("123456"), st.sampled_from(["A", "B", None]))


@given(OPTIONS, OPTIONS, OPTIONS)
def test_ensembles_use_the_own_option_only_if_the_language_model_has_none(own, llm, decisions):
    for id, option in complement(own, llm).items():
        assert option == (own[id] if llm.get(id) is None else llm[id])
    assert all(own[id] != llm[id] for id in disagreements(own, llm))
    assert judged(own, llm, {}) == complement(own, llm)
    assert complement(own, {}) == own


def ensemble(tmp_path, monkeypatch, reply):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    write_scienceqa(tmp_path / "scienceqa", "parquet")
    answers = iter(["The answer is B.", "No idea.", "The answer is A."])
    with chat_server(lambda request, number: reply(request["messages"][-1]["content"])) as server:
        settings = JudgeSettings("chat", base_url=server.url, concurrency=1, retries=0)
        judge = Judge(settings, [tmp_path / "out" / "judge.jsonl"])
        return assess_answers(
            "scienceqa_reasoning", tmp_path, lambda _: next(answers), tmp_path / "out", judge=judge
        ), server


def test_language_model_complements_and_decides(tmp_path, monkeypatch):
    def reply(text):
        if "First answer: The answer is A." in text and "Second answer: The answer is B." in text:
            return "North is up. The answer is A."
        if "Which is red?" in text:
            return "I cannot see it."
        return "The answer is A." if "animal" in text else "The answer is B."

    result, server = ensemble(tmp_path, monkeypatch, reply)
    expected = {"llava": 2 / 3, "llm": 1 / 3, "complement": 2 / 3, "judge": 1}
    assert {name: figures(result)[f"{name}/accuracy"] for name in expected} == pytest.approx(expected)
    assert len(server.requests) == 4  # each question, and the disputed one again


def test_question_without_an_answer_of_the_server_is_in_no_ensemble(tmp_path, monkeypatch):
    result, _ = ensemble(
        tmp_path, monkeypatch, lambda text: Reply(status=500) if "animal" in text else "The answer is A."
    )
    metrics = metrics_of(result)
    assert metrics["llava/accuracy"].num == metrics["accuracy"].num == 3
    assert metrics["complement/accuracy"].num == metrics["judge/accuracy"].num == 2
    assert result.num_unjudged == 1
    record = read_records(tmp_path / "out" / "scienceqa_reasoning" / "examples.jsonl")[1]
    assert "500" in record.score.judge_error
    # The report sets its own accuracy beside the paper's, because that leaves out no question.
    write_results([result], tmp_path / "out", {"data_hashes": {"scienceqa_reasoning": "-"}})
    run = json.loads((tmp_path / "out" / "results.json").read_text())
    assert main_entry(run, find_task("scienceqa_reasoning"))["num"] == 3
    assert main_score(find_task("scienceqa_reasoning"), record) == 0


def test_question_without_a_decision_counts_in_the_other_ensembles(tmp_path, monkeypatch):
    def reply(text):
        return Reply(status=500) if "First answer" in text else "The answer is B."

    result, _ = ensemble(tmp_path, monkeypatch, reply)
    metrics = metrics_of(result)
    assert metrics["llm/accuracy"].num == metrics["complement/accuracy"].num == 3
    assert (metrics["judge/accuracy"].num, result.num_unjudged) == (2, 1)


MMBENCH = [  # index, question, hint, options, answer, category
    (7, "=Which is red?", "A picture of a garden.", ["sky", "rose", "Nothing", ""], "B", "colour"),
    (1_000_007, "=Which is red?", "A picture of a garden.", ["rose", "Nothing", "sky", ""], "A", "colour"),
    (2_000_007, "=Which is red?", "A picture of a garden.", ["Nothing", "sky", "rose", ""], "C", "colour"),
    (9, "Where\tis\nit?", "", ["left", "right", "", "never"], "A", "place"),
    (1_000_009, "Where\tis\nit?", "", ["right", "left", "", "never"], "B", "place"),
]
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "split"]


def mmbench_rows(rows, split="dev"):
    return [
        [index, question, hint, *options, answer, category, None, "s", split]
        for index, question, hint, options, answer, category in rows
    ]


def write_mmbench(folder, layout, rows=MMBENCH, language="en", split="dev"):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(COLUMNS, row)) for row in mmbench_rows(rows, split)]
    if layout == "parquet":
        for row in rows:
            row["image"] = stored(row["index"] % 10)
            # Empty fields are "nan" in the Hub's table.
            row.update({name: row[name] or "nan" for name in ("hint", "C", "D", "answer")})
        write_split(folder / language, split, rows)
        return
    name = {"en": f"mmbench_{split}_20230712.tsv", "cn": f"mmbench_{split}_cn_20231003.tsv"}[language]
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(COLUMNS)
        for row in rows:
            image = base64.b64encode(png(row["index"] % 10)).decode()
            # Some tables have each image once, and in other rows the index of that row.
            row["image"] = image if row["index"] < 2_000_000 else str(row["index"] % 1_000_000)
            writer.writerow([row[column] for column in COLUMNS])


def test_mmbench_prompt_has_hint_and_options_up_to_the_first_empty_one(tmp_path, layout):
    write_mmbench(tmp_path / "mmbench", layout)
    examples = {example.id: example for example in examples_of("mmbench", tmp_path)}
    assert examples["7"].prompt == "A picture of a garden.\n=Which is red?\nA. sky\nB. rose\nC. Nothing" + L
    assert examples["9"].prompt == "Where\tis\nit?\nA. left\nB. right" + L
    assert image_bytes(examples["2000007"]) == image_bytes(examples["7"]) == [png(7)]


def test_chinese_mmbench_has_the_prompts_of_llava_and_of_lmms_eval(tmp_path, layout):
    # Both languages are in one folder.
    write_mmbench(tmp_path / "mmbench", layout)
    write_mmbench(tmp_path / "mmbench", layout, [(7, "哪个是红色的？", "", ["天空", "玫瑰", "", ""], "B", "c")], "cn")
    [llava], [lmms_eval] = (examples_of(name, tmp_path) for name in ("mmbench_cn", "mmbench_cn_lmms_eval"))
    assert llava.prompt == "哪个是红色的？\nA. 天空\nB. 玫瑰\n请直接回答选项字母。"
    hint = "nan " if layout == "parquet" else ""  # lmms-eval shows the "nan" of the Hub's table
    question = f"{hint}哪个是红色的？ There are several options:\nA. 天空\nB. 玫瑰"
    assert lmms_eval.prompt == question + "\n\n请直接使用所提供的选项字母作为答案回答。"


@pytest.mark.parametrize("text", ["NA", "N/A", "None", "none", "NONE", "null", "NULL", "nan", "NaN"])
def test_mmbench_cell_that_pandas_reads_as_empty_is_empty_as_in_llava(text, tmp_path):
    write_mmbench(tmp_path, "folder", [(7, "Which?", text, ["sky", "rose", text, "sea"], "C", "c")])
    [example] = examples_of("mmbench", tmp_path)
    assert example.prompt == "Which?\nA. sky\nB. rose" + L
    assert example.reference == "C"  # nobody can choose it, as in LLaVA
    assert example.details["choices"] == {"A": "sky", "B": "rose"}


@pytest.mark.parametrize("text", ["Nothing", "no", "0", "NA.", "Null"])
def test_mmbench_cell_with_other_text_is_kept(text, tmp_path):
    write_mmbench(tmp_path, "folder", [(7, "Which?", text, ["sky", text, "", ""], "B", "c")])
    [example] = examples_of("mmbench", tmp_path)
    assert example.prompt == f"{text}\nWhich?\nA. sky\nB. {text}" + L


def test_mmbench_answer_without_an_option_is_refused(tmp_path, layout):
    write_mmbench(tmp_path, layout, [(7, "Which?", "", ["sky", "rose", "", ""], "C", "c")])
    with pytest.raises(ValueError, match="row 0: answer is 'C', but the options are A, B"):
        examples_of("mmbench", tmp_path)


def test_mmbench_counts_a_question_as_correct_if_all_its_rotations_are(tmp_path, layout):
    write_mmbench(tmp_path / "mmbench", layout)
    answers = {"7": "B", "1000007": "A. rose", "2000007": "the rose", "9": "A", "1000009": "A"}
    result = assess_answers("mmbench", tmp_path, answers, tmp_path / "out")
    assert figures(result) == {
        "letter/accuracy": 1.0,
        "circular/accuracy": 0.5,
        "colour/letter/accuracy": 1.0,
        "colour/circular/accuracy": 1.0,
        "place/letter/accuracy": 1.0,
        "place/circular/accuracy": 0.0,
    }
    assert metrics_of(result)["letter/accuracy"].num == metrics_of(result)["circular/accuracy"].num == 2
    assert metrics_of(result)["circular/accuracy"].standard_error == pytest.approx(0.5)
    failed = assess_answers("mmbench", tmp_path, {**answers, "2000007": None}, tmp_path / "out2")
    assert figures(failed)["circular/accuracy"] == 0
    assert failed.num_failed == 1


def test_mmbench_without_rotations_has_no_circular_accuracy(tmp_path, layout):
    write_mmbench(tmp_path / "mmbench", layout, [row for row in MMBENCH if row[0] < 1_000_000])
    result = assess_answers("mmbench", tmp_path, {"7": "B", "9": "left?"}, tmp_path / "out")
    assert figures(result) == dict.fromkeys(["letter/accuracy", "colour/letter/accuracy", "place/letter/accuracy"], 1)


def test_mmbench_limit_takes_whole_questions(tmp_path, layout):
    rows = [(number + rotation, *MMBENCH[3][1:]) for rotation in (0, 1_000_000) for number in range(20)]
    write_mmbench(tmp_path, layout, rows)
    examples = read_examples(find_task("mmbench"), Evaluation("-", [], str(tmp_path), tmp_path, limit=10))
    assert [example.id for example in examples] == [
        str(number + rotation) for rotation in (0, 1_000_000) for number in range(0, 20, 4)
    ]
    assert len(read_examples(find_task("mmbench"), Evaluation("-", [], str(tmp_path), tmp_path, limit=1))) == 2


def test_rotation_that_is_not_parsed_is_a_change_for_the_worse():
    example = Example("1000007", "", [], "B")
    right, unparsed = (Record(example, "", "", score=Score({}, prediction=option)) for option in ("B", None))
    assert [line["change"] for line in flips(find_task("mmbench"), [(right, unparsed)])] == [-1]


def test_mmbench_submission_of_the_test_split_has_a_row_for_each_question(tmp_path, layout):
    rows = [(*row[:4], "", row[5]) for row in MMBENCH]
    write_mmbench(tmp_path / "mmbench", layout, rows, split="test")
    answers = {"7": "=B", "1000007": "A\x07", "2000007": None, "9": "A", "1000009": "A"}
    result = assess_answers("mmbench", tmp_path, answers, tmp_path / "out", split="test")
    file = tmp_path / "out" / "mmbench" / "mmbench.xlsx"
    assert result.metrics == []
    assert result.missing == f"scored by a server: upload {file}"
    header, *written = load_workbook(file, data_only=True).active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert written[0] == (7, "=Which is red?", "sky", "rose", "Nothing", None, "=B", None, "test")
    assert [row[6] for row in written[1:]] == ["A", None, "A", "A"]
    with pytest.raises(ValueError, match="must have exactly one row for each of the 2 questions"):
        check_upload(file, [7, 9])


def test_mmbench_table_with_a_broken_row_is_refused(tmp_path):
    write_mmbench(tmp_path, "folder", MMBENCH[:1])
    file = tmp_path / "mmbench_dev_20230712.tsv"
    file.write_text(file.read_text() + "8\tWhat?\n")
    with pytest.raises(ValueError, match=r"dev_20230712\.tsv, row 1: must have 12 fields, one per column"):
        examples_of("mmbench", tmp_path)


def test_duplicate_mmbench_index_is_refused(tmp_path, layout):
    write_mmbench(tmp_path, layout, [*MMBENCH, MMBENCH[3]])
    with pytest.raises(ValueError, match="has 2 examples with the id '9'"):
        examples_of("mmbench", tmp_path)


def test_mmbench_image_that_is_not_base64_fails_its_example(tmp_path):
    write_mmbench(tmp_path, "folder", MMBENCH[:1])
    file = tmp_path / "mmbench_dev_20230712.tsv"
    file.write_text(file.read_text().replace(base64.b64encode(png(7)).decode(), "???"))
    [example] = examples_of("mmbench", tmp_path)
    with pytest.raises(ValueError, match=r"mmbench_dev_20230712\.tsv, index 7: the image is not valid base64"):
        example.images[0].read()


CHOICES = {"A": "cat", "B": "dog", "C": "catfish"}


@pytest.mark.parametrize(
    "answer, option",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("(B).", "B"),
        ("B: dog", "B"),
        ("B. A dog runs here", "B"),
        ("A dog runs here", "B"),  # an article, and the option's text
        ("A. A dog runs here", "A"),
        ("A dog", "A"),  # in up to three words a bare A is a letter
        ("A or B", None),
        ("D, or rather B", "B"),  # a bare letter wins over one with a mark
        ("dog", "B"),
        ("The DOG.", "B"),
        ("a catfish", None),  # contains "cat", too
        ("bird", None),
        ("D", "D"),  # not an option, counts as wrong
        ("", None),
    ],
)
def test_mmbench_option_is_found_by_its_letter_or_its_text(answer, option):
    assert mmbench_option_of(answer, CHOICES) == option
