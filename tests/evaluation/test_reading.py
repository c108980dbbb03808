"""Wrong data of benchmarks: errors name what is missing or has the wrong type, and where."""

import re

import datasets
import pytest

from sq_llava.evaluation import reading
from tests.evaluation_layouts import examples_of, stored, write_parquet


VQA_ROW = {"question_id": 1, "question": "Is it?", "answers": ["yes"], "ocr_tokens": ["a"]}
ROWS = {  # a correct row of each table
    "pope": {"question_id": "1", "question": "Is it?", "answer": "yes", "category": "random"},
    "textvqa": VQA_ROW,
    "vizwiz": VQA_ROW,
    "vqav2": VQA_ROW,
    "scienceqa": {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": ""},
    "mmbench": {"index": 1, "question": "Which?", "hint": "", "A": "a", "B": "b", "C": "", "D": "", "answer": "A"},
    "flickr30k": {"img_id": "1", "caption": ["a cat"]},
    "conceptual_captions": {"caption": "a cat"},
    "llava_bench": {"question": "What?", "caption": "a cat", "gpt_answer": "A cat.", "category": "conv"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, column, value, message",
    [
        ("pope", "question", 3, "question is 3, expected str"),
        ("pope", "question", None, "question is None, expected str"),
        ("pope", "category", None, "category is None, expected str"),
        # Without the check, a string would be scored as a list of its letters.
        ("vizwiz", "answers", "yes", "answers is 'yes', expected list or NoneType"),
        ("textvqa", "ocr_tokens", "abc", "ocr_tokens is 'abc', expected list"),
        ("scienceqa", "choices", "ab", "choices is 'ab', expected list"),
        ("vqav2", "answers", ["yes", None], "answers contains None, expected strings or objects"),
        ("vqav2", "answers", [{"text": "yes"}], "answers: has no answer. It has: text"),
        ("scienceqa", "answer", 2, "answer is 2, expected an index (from 0) of 2 choices"),
        ("scienceqa", "answer", -1, "answer is -1, expected an index"),
        ("scienceqa", "answer", "B", "answer is 'B', expected an index"),
        ("mmbench", "index", "first", "index is 'first', expected a number"),
        ("mmbench", "answer", "C", "answer is 'C', but the options are A, B"),
        ("conceptual_captions", "caption", None, "caption is None, expected str or list"),
        ("llava_bench", "gpt_answer", None, "gpt_answer is None, expected str"),
    ],
)
def test_value_of_the_wrong_type_is_named_with_its_row(tmp_path, task, column, value, message):
    good = {**ROWS[task], "image": stored()}
    write_parquet(tmp_path / "good" / "rows.parquet", [good])
    assert len(examples_of(task, tmp_path / "good")) == 1
    write_parquet(tmp_path / "bad" / "rows.parquet", [{**good, column: value}])
    with pytest.raises(ValueError, match=f"bad, row 0[:,] {re.escape(message)}"):
        examples_of(task, tmp_path / "bad")


def test_image_column_with_only_file_names_is_refused(tmp_path):
    datasets.Dataset.from_list([{**ROWS["pope"], "image": "1.png"}]).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(ValueError, match="column image has type string, expected images"):
        examples_of("pope", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_broken_parquet_file_is_named(tmp_path, content):
    (tmp_path / "test.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_broken_parquet_file_.*, test\.parquet: "):
        examples_of("pope", tmp_path)


def test_split_with_references_for_some_of_its_questions_is_refused(tmp_path):
    rows = [
        {**VQA_ROW, "question_id": n, "answers": answers, "image": stored()} for n, answers in ((1, ["a"]), (2, None))
    ]
    write_parquet(tmp_path / "val.parquet", rows)
    with pytest.raises(ValueError, match="1 of 2 examples have no reference, such as '2'"):
        examples_of("vizwiz", tmp_path, "val")


@pytest.mark.parametrize(
    "content, message",
    [
        ("null", "contains NoneType, expected list"),
        ('{"image": "a.jpg"}', "contains dict, expected list"),
        ('[{"image": "a.jpg", "question": "What?"}]', "row 0: has no answers"),
        ('[{"image": 3, "question": "What?", "answers": []}]', "row 0: image is 3, expected str"),
        ("[", "not valid JSON"),
    ],
)
def test_wrong_json_file_is_named_with_its_row(tmp_path, content, message):
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(ValueError, match=rf"val\.json[:,] {message}"):
        examples_of("vizwiz", tmp_path, "val")


@pytest.mark.parametrize("task", ["gqa", "mmbench", "pope", "scienceqa", "textvqa", "vizwiz", "vqav2"])
def test_missing_column_is_named_with_the_existing_ones(tmp_path, task):
    write_parquet(tmp_path / "rows.parquet", [{"text": "What?", "image": stored()}])
    with pytest.raises(ValueError, match=r"has no column .*question.*\. Its columns are: text, image\."):
        examples_of(task, tmp_path)


@pytest.mark.parametrize("task", ["gqa", "mmbench_cn", "pope", "scienceqa", "textvqa_no_ocr", "vizwiz", "vqav2"])
def test_missing_file_is_named_with_the_existing_ones(tmp_path, task):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"has neither Parquet files nor .*\.(jsonl|json|tsv)\. It contains: notes\.txt"
    ):
        examples_of(task, tmp_path)


@pytest.mark.parametrize("task, split", [("vqav2", "testdev"), ("textvqa", "test"), ("mmbench", "test")])
def test_missing_split_is_refused(tmp_path, task, split):
    write_parquet(tmp_path / "validation.parquet", [{"question": "What?"}])
    with pytest.raises(ValueError, match=f"has the splits validation, but not {split}. Choose one with --split"):
        examples_of(task, tmp_path, split)


def test_data_of_another_split_alone_is_not_used(tmp_path):
    write_parquet(tmp_path / "val-00000-of-00001.parquet", [{**ROWS["pope"], "image": stored()}])
    with pytest.raises(ValueError, match=r"has the splits val, but not test. Choose one with --split"):
        examples_of("pope", tmp_path)
    assert len(examples_of("pope", tmp_path, "val")) == 1
    (tmp_path / "val-00000-of-00001.parquet").rename(tmp_path / "pope.parquet")
    assert len(examples_of("pope", tmp_path)) == 1


def test_split_of_a_saved_dataset_is_chosen(tmp_path):
    rows = [{**ROWS["pope"], "question": name, "image": stored()} for name in ("test", "train")]
    saved = {row["question"]: datasets.Dataset.from_list([row]).cast_column("image", datasets.Image()) for row in rows}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")
    for split in (None, "test", "train"):
        [example] = examples_of("pope", tmp_path / "both", split)
        assert example.prompt.startswith(split or "test")
    with pytest.raises(ValueError, match=r"has the splits test, train, but not dev. Choose one"):
        examples_of("pope", tmp_path / "both", "dev")
    with pytest.raises(ValueError, match=r"has the splits test, train, but not validation. Choose one"):
        examples_of("textvqa", tmp_path / "both")
    saved["test"].save_to_disk(tmp_path / "one")
    assert len(examples_of("pope", tmp_path / "one")) == 1
    with pytest.raises(ValueError, match=r"--split train: the dataset in .*one has no splits. Leave --split out"):
        examples_of("pope", tmp_path / "one", "train")


@pytest.mark.parametrize(
    "task, split",
    [
        ("gqa", "testdev"), ("pope", "test"), ("textvqa", "validation"), ("mmvet", "test"), ("llava_bench", "train"),
        ("llava_bench_coco", "train"), ("conceptual_captions", "validation"), ("vizwiz", "test or val"),
        ("vqav2", "testdev or test or validation"), ("nocaps", "validation or val or test"),
    ],
)  # fmt: skip
def test_split_that_the_files_do_not_have_is_refused(tmp_path, task, split):
    with pytest.raises(ValueError, match=f"--split dev: the files of this task in .* are of the split {split}"):
        examples_of(task, tmp_path, "dev")


@pytest.mark.parametrize(
    "task, file, content, place",
    [
        ("vizwiz", "val.json", '[{"image": "a.jpg", "question": "What?", "answers": [{"answer": "%s"}]}]',
         r"val\.json, row 0, answers, row 0, answer"),
        ("pope", "llava_pope_test.jsonl", '{"question_id": 1, "image": "a", "text": "%s", "category": "random"}',
         r"llava_pope_test\.jsonl, line 1, text"),
    ],
)  # fmt: skip
def test_half_of_a_surrogate_pair_is_named_with_its_field(tmp_path, task, file, content, place):
    (tmp_path / file).write_text(content % r"\ud83d\ude00 and \ud83d")
    with pytest.raises(ValueError, match=rf"{place}: has half of a surrogate pair: '\\U0001f600 and \\ud83d'"):
        examples_of(task, tmp_path, "val" if task == "vizwiz" else None)


def test_files_may_begin_with_a_byte_order_mark(tmp_path):
    row = '{"image": "a.jpg", "question": "\\ud83d\\ude00?", "answers": ["yes"]}'
    (tmp_path / "val.json").write_text(f"[{row}]", encoding="utf-8-sig")
    [example] = examples_of("vizwiz", tmp_path, "val")
    assert example.prompt.startswith("\U0001f600?")
    (tmp_path / "rows.jsonl").write_text(f"{row}\n", encoding="utf-8-sig")
    assert reading.read_jsonl(tmp_path / "rows.jsonl", ["image"])[0]["image"] == "a.jpg"
    (tmp_path / "rows.tsv").write_text("index\tA\n1\tcat\n", encoding="utf-8-sig")
    assert reading.read_tsv(tmp_path / "rows.tsv", ["index"]) == [{"index": "1", "A": "cat"}]
    (tmp_path / "captions.tsv").write_text("A dog.\thttp://here\n", encoding="utf-8-sig")
    assert examples_of("conceptual_captions", tmp_path)[0].reference == ["A dog."]


@pytest.mark.parametrize(
    "task, asked",
    [
        ("gqa", ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev")),
        ("mmbench", ("lmms-lab-encoder/MMBench", "en", "dev")),
        ("mmbench_cn_lmms_eval", ("lmms-lab-encoder/MMBench", "cn", "dev")),
        ("pope", ("lmms-lab-encoder/POPE", None, "test")),
        ("scienceqa", ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test")),
        ("scienceqa_reasoning", ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", "test")),
        ("textvqa_no_ocr", ("lmms-lab-encoder/textvqa", None, "validation")),
        ("vizwiz", ("lmms-lab-encoder/VizWiz-VQA", None, "test")),
        ("vqav2", ("lmms-lab-encoder/VQAv2", None, "testdev")),
    ],
)
def test_hub_is_asked_for_the_part_that_the_paper_reports(monkeypatch, task, asked):
    calls = []

    def load_dataset(hub_id, config, split):
        calls.append((hub_id, config, split))
        return datasets.Dataset.from_dict({"text": ["What?"]})

    monkeypatch.setattr(reading.datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"{asked[0]}: has no column .* Its columns are: text"):
        examples_of(task, "hub")
    assert calls == [asked]


def test_question_without_an_id_has_the_number_of_its_row():
    assert [reading.id_of(row, 3) for row in ({}, {"question_id": None}, {"question_id": 0})] == [3, 3, 0]
