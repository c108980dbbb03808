"""Benchmarks with short answers: prompts, scores computed by hand, both layouts, submissions, wrong files."""

import json

import pytest

from sq_llava.evaluation import textvqa, vqav2
from sq_llava.evaluation.run import find_task
from sq_llava.evaluation.short_answers import check_upload
from sq_llava.evaluation.task import Example, Record
from tests.evaluation_layouts import (
    assess_answers,
    examples_of,
    figures,
    image_bytes,
    png,
    stored,
    write_image,
    write_json,
    write_jsonl,
    write_split,
)


W = "\nAnswer the question using a single word or phrase."
U = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


VQAV2 = {  # id -> image, question, human answers, answer of the model
    262148000: (1, "Is it red?", ["yes"] * 10, "Yes."),
    262148001: (1, "What colour?", ["red"] * 3 + ["crimson"] * 7, "red"),
    262148002: (2, "How many?", ["1"] + ["2"] * 9, "one"),
    262148003: (3, "Which two?", ["red blue"] * 2 + ["green"] * 8, "red,blue"),
}


def write_vqav2_validation(folder, layout):
    if layout == "parquet":
        rows = [
            {
                "question_id": id,
                "question": question,
                "image": stored(image),
                "answers": [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)],
            }
            for id, (image, question, answers, _) in VQAV2.items()
        ]
        write_split(folder / "data", "validation", rows)
        write_split(folder / "data", "testdev", rows[:1])
        return
    questions = [{"question_id": id, "question": row[1], "image_id": row[0]} for id, row in VQAV2.items()]
    answers = [{"question_id": id, "answers": [{"answer": each} for each in row[2]]} for id, row in VQAV2.items()]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answers[::-1]})
    for image in (1, 2, 3):
        write_image(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", image)


def test_vqav2_validation_is_scored_in_all_forms(tmp_path, layout):
    write_vqav2_validation(tmp_path / "vqav2", layout)
    answers = {str(id): row[3] for id, row in VQAV2.items()}
    result = assess_answers("vqav2", tmp_path / "vqav2", answers, tmp_path / "out", split="validation")
    assert figures(result) == pytest.approx(
        {
            "m4c/accuracy": (1 + 0.9 + 0.3 + 0) / 4,
            "m4c/accuracy_short": (1 + 1 + 1 / 3 + 0) / 4,
            "official/accuracy": (0 + 0.9 + 0.3 + 0.6) / 4,
            "official/accuracy_short": (0 + 1 + 1 / 3 + 2 / 3) / 4,
            "lmms_eval/accuracy": (1 + 0.9 + 0.3 + 0.6) / 4,
        }
    )
    assert not (tmp_path / "out" / "vqav2" / "vqav2.json").exists()
    [first, *_, last] = examples_of("vqav2", tmp_path / "vqav2", "validation")
    assert (first.prompt, image_bytes(first), image_bytes(last)) == ("Is it red?" + W, [png(1)], [png(3)])


def write_vqav2_test(folder, layout):
    """Three questions of test2015; two of them are also in test-dev."""
    asked = [{"question_id": 30 + n, "image": f"{n}.jpg", "text": f"What {n}?{W}"} for n in range(3)]
    write_jsonl(folder / "llava_vqav2_mscoco_test2015.jsonl", asked)
    if layout == "parquet":
        rows = [{"question_id": 30 + n, "question": f"What {n}?", "image": stored(n), "answers": None} for n in (1, 2)]
        write_split(folder / "data", "testdev", rows)
        return
    write_jsonl(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[1:])
    for n in range(3):
        write_image(folder / "test2015" / f"{n}.jpg", n)


@pytest.mark.parametrize("task", [textvqa, vqav2])
def test_ids_of_own_data_that_are_no_numbers_are_uploaded_as_they_are(tmp_path, task):
    records = [Record(Example(id, "What?", [], None), "What?", "A cat.") for id in ("7", "own-7")]
    entries = json.loads(task.write_submission(records, tmp_path).read_text())
    assert [entry["question_id"] for entry in entries] == [7, "own-7"]


def test_vqav2_upload_has_every_question_of_the_test_set(tmp_path, layout):
    write_vqav2_test(tmp_path / "vqav2", layout)
    answers = {"31": "Two cats.", "32": None}
    result = assess_answers("vqav2", tmp_path / "vqav2", answers, tmp_path / "out")
    file = tmp_path / "out" / "vqav2" / "vqav2.json"
    assert json.loads(file.read_text()) == [
        {"question_id": 30, "answer": ""},
        {"question_id": 31, "answer": "2 cats"},
        {"question_id": 32, "answer": ""},
    ]
    assert result.metrics == []
    assert result.missing == f"scored by a server: upload {file}"
    assert result.num_failed == 1
    assert examples_of("vqav2", tmp_path / "vqav2")[0].prompt == "What 1?" + W


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"1": "a"}, "contains dict, expected list"),
        ([{"question_id": 1, "answer": None}], "row 0: answer is None, expected int or str"),
        ([{"question_id": 1, "text": "a"}], "row 0: has no answer. It has: question_id, text"),
        ([{"question_id": 1, "answer": "a"}] * 2, "two rows have question_id 1"),
        ([{"question_id": 1, "answer": "a"}], "lacks answers for 1 ids, such as 2"),
        ([{"question_id": id, "answer": "a"} for id in (1, 2, 3)], "has an answer for 3, which is not a question"),
        ([{"question_id": id, "answer": "a"} for id in ("1", "2")], "lacks answers for 2 ids, such as 1"),
    ],
)
def test_upload_that_a_server_would_refuse_is_refused(tmp_path, entries, message):
    write_json(tmp_path / "upload.json", entries)
    with pytest.raises(ValueError, match=message):
        check_upload(tmp_path / "upload.json", [1, 2], "question_id")


GQA = {"201": ("n1", "Is it tall?", "yes"), "202": ("n2", "What is worn?", "t-shirt"), "203": ("n1", "Which?", "cat")}


def write_gqa(folder, layout):
    if layout == "parquet":
        rows = [{"id": id, "imageId": row[0], "question": row[1], "answer": row[2]} for id, row in GQA.items()]
        write_split(folder / "testdev_balanced_instructions", "testdev", rows)
        images = [{"id": f"n{n}", "image": stored(n)} for n in (2, 1)]
        write_split(folder / "testdev_balanced_images", "testdev", images)
        return
    rows = [{"question_id": id, "image": f"{row[0]}.jpg", "text": row[1] + W} for id, row in GQA.items()]
    write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    answers = {id: {"answer": row[2], "question": row[1]} for id, row in reversed(GQA.items())}
    write_json(folder / "data" / "testdev_balanced_questions.json", answers)
    for n in (1, 2):
        write_image(folder / "data" / "images" / f"n{n}.jpg", n)


def test_gqa_is_scored_by_exact_match(tmp_path, layout):
    write_gqa(tmp_path / "gqa", layout)
    answers = {"201": "Yes.", "202": "tshirt", "203": "Cat ."}
    result = assess_answers("gqa", tmp_path / "gqa", answers, tmp_path / "out")
    assert figures(result) == pytest.approx({"accuracy": 2 / 3, "llava/accuracy": 1 / 3, "lmms_eval/accuracy": 2 / 3})
    # The file has what `accuracy` compares.
    assert json.loads((tmp_path / "out" / "gqa" / "testdev_balanced_predictions.json").read_text()) == [
        {"questionId": "201", "prediction": "yes"},
        {"questionId": "202", "prediction": "tshirt"},
        {"questionId": "203", "prediction": "cat"},
    ]
    examples = examples_of("gqa", tmp_path / "gqa")
    assert [image_bytes(example) for example in examples] == [[png(1)], [png(2)], [png(1)]]
    assert examples[1].prompt == "What is worn?" + W


# LLaVA's script writes the answer without trailing periods, in lower case. GQA's eval.py then compares exactly.
@pytest.mark.parametrize(
    "answer, accuracy, llava, lmms_eval",
    [
        ("cat", 1, 1, 1),
        (" Cat.\n", 1, 1, 0),
        ("CAT..", 1, 1, 1),
        ("cat .", 1, 0, 0),
        ("cat. .", 1, 0, 0),
        ("'cat'", 0, 0, 1),
        ("a cat", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_gqa_has_the_accuracy_of_llava_and_of_lmms_eval(answer, accuracy, llava, lmms_eval):
    values = find_task("gqa").score(Example("1", "", [], "cat"), answer).values
    assert values == {"accuracy": accuracy, "llava/accuracy": llava, "lmms_eval/accuracy": lmms_eval}


def test_gqa_question_without_its_image_is_refused(tmp_path):
    write_gqa(tmp_path, "parquet")
    write_split(tmp_path / "testdev_balanced_images", "testdev", [{"id": "n1", "image": stored(1)}])
    with pytest.raises(ValueError, match="row 1: testdev_balanced_images has no image 'n2'"):
        examples_of("gqa", tmp_path)


VIZWIZ = {
    "VizWiz_val_00000000": ("what IS this?", ["soda"] * 4 + ["unanswerable"] * 6, "Soda"),
    "VizWiz_val_00000001": ("Can you read it?", ["unanswerable"] * 8 + ["no"] * 2, "no"),
}


def write_vizwiz_val(folder, layout):
    if layout == "parquet":
        rows = [
            {"question_id": id, "question": row[0], "image": stored(n), "answers": row[1]}
            for n, (id, row) in enumerate(VIZWIZ.items())
        ]
        write_split(folder / "data", "val", rows)
        return
    rows = [
        {"image": f"{id}.jpg", "question": row[0], "answers": [{"answer": each} for each in row[1]]}
        for id, row in VIZWIZ.items()
    ]
    write_json(folder / "val.json", rows)
    for n, id in enumerate(VIZWIZ):
        write_image(folder / "val" / f"{id}.jpg", n)


def test_vizwiz_val_is_scored(tmp_path, layout):
    write_vizwiz_val(tmp_path / "vizwiz", layout)
    answers = {id: row[2] for id, row in VIZWIZ.items()}
    result = assess_answers("vizwiz", tmp_path / "vizwiz", answers, tmp_path / "out", split="val")
    assert figures(result) == pytest.approx({"m4c/accuracy": (1 + 0.6) / 2, "m4c/accuracy_short": (1 + 2 / 3) / 2})
    [first, second] = examples_of("vizwiz", tmp_path / "vizwiz", "val")
    assert first.prompt == "What is this?" + U + W
    assert image_bytes(second) == [png(1)]


def test_vizwiz_upload_names_images_in_the_order_of_the_questions(tmp_path, layout):
    names = ["VizWiz_test_00000002", "VizWiz_test_00000001"]
    folder = tmp_path / "vizwiz"
    if layout == "parquet":
        rows = [{"question_id": name, "question": "What?", "image": stored(), "answers": None} for name in names]
        write_split(folder / "data", "test", rows)
    else:
        rows = [{"question_id": f"{n}.jpg", "image": f"{n}.jpg", "text": "What?" + U + W} for n in names]
        write_jsonl(folder / "llava_test.jsonl", rows)
        for name in names:
            write_image(folder / "test" / f"{name}.jpg")
    answers = {names[1]: "Unanswerable.", names[0]: "A dog"}
    result = assess_answers("vizwiz", folder, answers, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vizwiz" / "vizwiz.json").read_text()) == [
        {"image": "VizWiz_test_00000002.jpg", "answer": "dog"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"},
    ]
    assert result.metrics == []


TEXTVQA = [  # id, image, question, OCR tokens, human answers, answer of the model
    (34602, "img1", "what is the brand?", ["DAKOTA", "DIGITAL"], ["dakota"] * 10, "Dakota."),
    (34603, "img1", "What is the year?", [], ["1999"] * 2 + ["2000"] * 8, "1999"),
    (34604, "img2", "what is the brand?", ["nokia"], ["nokia"] * 10, "dakota"),
]


def textvqa_questions(rows):
    return [
        {"question_id": image, "image": f"{image}.jpg",
         "text": f"{question.capitalize()}\nReference OCR token: {', '.join(tokens)}{W}"}
        for _, image, question, tokens, _, _ in rows
    ]  # fmt: skip


def textvqa_annotations(rows):
    data = [
        {"question_id": id, "image_id": image, "question": question, "answers": answers}
        for id, image, question, _, answers, _ in rows
    ]
    return {"data": data}


def write_textvqa(folder, layout):
    if layout == "parquet":
        rows = [
            {"question_id": id, "image_id": image, "question": question, "image": stored(int(image[-1])),
             "ocr_tokens": tokens, "answers": answers}
            for id, image, question, tokens, answers, _ in TEXTVQA
        ]  # fmt: skip
        write_split(folder / "data", "validation", rows)
        return
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", textvqa_questions(TEXTVQA))
    write_json(folder / "TextVQA_0.5.1_val.json", textvqa_annotations(TEXTVQA[::-1]))
    for image in ("img1", "img2"):
        write_image(folder / "train_images" / f"{image}.jpg", int(image[-1]))


def test_textvqa_matches_annotations_by_image_and_question(tmp_path, layout):
    write_textvqa(tmp_path / "textvqa", layout)
    result = assess_answers("textvqa", tmp_path / "textvqa", {str(r[0]): r[5] for r in TEXTVQA}, tmp_path / "out")
    assert figures(result)["m4c/accuracy"] == pytest.approx((1 + 0.6 + 0) / 3)


def test_textvqa_prompts_with_and_without_ocr_tokens(tmp_path, layout):
    write_textvqa(tmp_path / "textvqa", layout)
    # Both tasks read the same folder.
    with_tokens, without = (examples_of(name, tmp_path) for name in ("textvqa", "textvqa_no_ocr"))
    assert with_tokens[0].prompt == "What is the brand?\nReference OCR token: DAKOTA, DIGITAL" + W
    assert with_tokens[1].prompt == "What is the year?\nReference OCR token: " + W
    assert [example.prompt for example in without[:2]] == ["What is the brand?" + W, "What is the year?" + W]
    assert [image_bytes(example) for example in without] == [[png(1)], [png(1)], [png(2)]]


POPE = [("random", "yes", "Yes"), ("random", "no", "There is not, I think."), ("popular", "yes", "no"),
        ("popular", "no", "No."), ("adversarial", "no", "yes"), ("adversarial", "yes", "Yes, there is.")]  # fmt: skip


def write_pope(folder, layout):
    if layout == "parquet":
        rows = [
            {"question_id": str(n), "question": f"Is there a {n}?", "answer": label, "image": stored(n),
             "category": category}
            for n, (category, label, _) in enumerate(POPE)
        ]  # fmt: skip
        write_split(folder / "data", "test", rows)
        return
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {n}?{W}", "category": category}
        for n, (category, _, _) in enumerate(POPE)
    ]
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    for category in ("random", "popular", "adversarial"):
        labels = [
            {"question_id": 1, "image": f"{n}.jpg", "label": row[1]}
            for n, row in enumerate(POPE)
            if row[0] == category
        ]
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels[::-1])
    for n in range(len(POPE)):
        write_image(folder / "val2014" / f"{n}.jpg", n)


def pope_answers(example):
    return POPE[int(example.id.split("/")[1])][2]


def test_pope_has_its_figures_for_each_category(tmp_path, layout):
    write_pope(tmp_path / "pope", layout)
    result = assess_answers("pope", tmp_path / "pope", pope_answers, tmp_path / "out")
    values = figures(result)
    assert {name: values[f"{name}/llava/f1"] for name in ("random", "popular", "adversarial")} == pytest.approx(
        {"random": 1.0, "popular": 0.0, "adversarial": 2 / 3}
    )
    assert values["llava/mean_f1"] == pytest.approx(5 / 9)
    assert values["llava/accuracy"] == pytest.approx(4 / 6)
    assert values["llava/yes_ratio"] == pytest.approx(3 / 6)
    assert values["adversarial/llava/precision"] == pytest.approx(1 / 2)
    # lmms-eval accepts only the word alone: "Yes", but not "No." or a sentence.
    assert values["lmms_eval/accuracy"] == pytest.approx(1 / 6)
    # Said and true: one. Said "yes" and false: one. Said "no" and false: one. Other answers are left out.
    assert [values[f"lmms_eval/{name}"] for name in ("precision", "recall", "f1")] == [0.5, 0.5, 0.5]
    assert values["lmms_eval/yes_ratio"] == pytest.approx(3 / 6)
    assert all(metric.standard_error is not None for metric in result.metrics if metric.num > 2)
    assert result.parsed_share == pytest.approx(4 / 6)
    first = next(e for e in examples_of("pope", tmp_path / "pope") if e.id == "random/0")
    assert (first.prompt, image_bytes(first)) == ("Is there a 0?" + W, [png(0)])


@pytest.mark.parametrize("failed", range(len(POPE)))
def test_pope_question_that_failed_counts_as_wrong(tmp_path, failed):
    write_pope(tmp_path / "pope", "parquet")
    examples = examples_of("pope", tmp_path / "pope")
    answers = {each.id: each.reference for each in examples} | {examples[failed].id: None}
    result = assess_answers("pope", tmp_path / "pope", answers, tmp_path / "out")
    assert figures(result)["llava/accuracy"] == pytest.approx(5 / 6)
    assert figures(result)["lmms_eval/accuracy"] == pytest.approx(5 / 6)
    assert result.num_failed == 1


VQAV2_ANSWERS = "v2_mscoco_val2014_annotations.json"
GQA_QUESTIONS, GQA_ANSWERS = "llava_gqa_testdev_balanced.jsonl", "data/testdev_balanced_questions.json"
TEXTVQA_QUESTIONS, TEXTVQA_ANSWERS = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
LABEL = {"image": "2.jpg", "label": "yes"}


@pytest.mark.parametrize(
    "write, file, lines, message",
    [
        (write_vqav2_validation, VQAV2_ANSWERS, [{"annotations": [{"question_id": 1, "answers": []}]}],
         r"annotations\.json: has no answers for question 262148000 of .*questions\.json"),
        (write_gqa, GQA_ANSWERS, [{"201": {"answer": "yes"}}],
         r"testdev_balanced_questions\.json: has no question '202', which is in .*jsonl"),
        (write_gqa, GQA_QUESTIONS, [{"question_id": "201", "text": "What?"}],
         r"llava_gqa_testdev_balanced\.jsonl, line 1: has no image\. It has: question_id"),
        (write_textvqa, TEXTVQA_ANSWERS, [textvqa_annotations(TEXTVQA[:2])],
         r"val\.json: lacks an annotation for \('img2', 'what is the brand\?'\), row 3 of"),
        (write_textvqa, TEXTVQA_QUESTIONS, textvqa_questions(TEXTVQA[1:]),
         r"ocr\.jsonl: lacks 1 questions of .*val\.json, such as \('img1', 'what is the br"),
        (write_pope, "coco/coco_pope_popular.json", [LABEL],
         r"coco_pope_popular\.json: has 1 labels, but .* has 2 questions"),
        (write_pope, "coco/coco_pope_popular.json", [LABEL] * 2,
         r"popular\.json: lacks a label for question 3 on 3\.jpg"),
        (write_pope, "coco/coco_pope_random.json", [{"image": "0.jpg", "label": "maybe"}] * 2,
         r"random\.json, row 1: label is 'maybe', expected 'yes' or 'no'"),
    ],
)  # fmt: skip
def test_wrong_file_is_named(tmp_path, write, file, lines, message):
    write(tmp_path, "folder")
    write_jsonl(tmp_path / file, lines)
    task, _, split = write.__name__.removeprefix("write_").partition("_")
    with pytest.raises(ValueError, match=message):
        examples_of(task, tmp_path, split or None)
