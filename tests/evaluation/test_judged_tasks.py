"""MM-Vet and LLaVA-Bench on tiny files in their layouts, graded by a local server."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.evaluation import llava_bench, mmvet, run
from sq_llava.evaluation.judge import Judge, JudgeSettings
from sq_llava.evaluation.run import Evaluation, evaluate
from tests import tiny
from tests.chat_server import KEY, chat_server
from tests.evaluation_layouts import (
    assess_answers,
    examples_of,
    metrics_of,
    run_evaluate,
    stored,
    write_image,
    write_json,
    write_jsonl,
    write_split,
)
from tests.processes import ended, fork, lines_of


pytestmark = pytest.mark.usefixtures("api_key")


# question_id, category, question, reference answer, answer of the model, score of the reference, score of the model
PAIRS = [
    (0, "conv", "What is it?", "A red boat.", "A boat.", 8.0, 6.0),
    (1, "detail", "Describe it.", "A boat lies at the shore.", "A thing.", 10.0, 5.0),
    (2, "complex", "Why is it there?", "To fish.", "For fishing at dawn.", 9.0, 9.5),
    (3, "conv", "Is it big?", "It is small.", "Yes.", 7.0, 1.0),
]
CAPTIONS = ["A boat at a shore.", "It is red."]
ANSWERS = {str(pair[0]): pair[4] for pair in PAIRS}
# The judge adds 0.5 to the first answer. Unswapped, the references get 8.5 + 10 + 9.5 + 7.5 (the maximum is 10);
# swapped, the model gets 6.5 + 5.5 + 10 + 1.5.
RELATIVE = 100 * 21.5 / 35.5
SWAPPED = 100 * 23.5 / 34


def write_bench(folder: Path, files: tuple[str, str, str], image: str, context: dict) -> Path:
    questions, contexts, answers = (folder / name for name in files)
    asked = [{"question_id": id, "image": image, "text": text, "category": c} for id, c, text, *_ in PAIRS]
    write_jsonl(questions, asked)
    write_jsonl(contexts, [{"image": image, **context}])
    known = [{"question_id": pair[0], "text": pair[3], "answer_id": f"gpt{pair[0]}"} for pair in PAIRS]
    write_jsonl(answers, known[::-1])  # in another order: answers are matched by id
    return folder


def wild_folder(root: Path) -> Path:
    folder = root / "llava-bench-in-the-wild"
    write_image(folder / "images" / "001.jpg", 1)
    files = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")
    return write_bench(folder, files, "001.jpg", {"caption": "\n".join(CAPTIONS)})


def coco_folder(root: Path) -> Path:
    folder = root / "coco2014_val_qa_eval"
    write_image(folder / "val2014" / "COCO_val2014_000000000001.jpg", 1)
    files = ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl")
    boxes = [{"category": "boat", "bbox": [0.1, 0.2, 0.5, 0.6]}]
    return write_bench(folder, files, "000000000001.jpg", {"captions": CAPTIONS, "instances": boxes})


def bench_table(root: Path, caption) -> Path:
    rows = [
        {"question_id": id, "question": text, "category": c, "gpt_answer": gpt, "caption": caption, "image": stored(1)}
        for id, c, text, gpt, *_ in PAIRS
    ]
    write_split(root / "data", "train", rows)
    return root


def review(request, number) -> str:
    """Scores the two answers of a prompt as PAIRS says, and adds 0.5 to the first."""
    first, second = re.findall(r"\[Assistant \d\]\n(.*)\n\[End", request["messages"][1]["content"])
    scores = {text: score for pair in PAIRS for text, score in zip(pair[3:5], pair[5:7])}
    return f"{min(scores[first] + 0.5, 10)} {scores[second]}\nBecause."


def judged(task: str, data: Path, answers, out: Path, reply, **settings):
    """The result of answers that a judge grades with `reply`, its metrics by name, and the requests to the judge."""
    with chat_server(reply) as server:
        judge = Judge(JudgeSettings("judge", base_url=server.url, **settings), [out / "judge.jsonl"])
        result = assess_answers(task, data, answers, out, judge=judge)
    return result, metrics_of(result), server.requests


@pytest.mark.parametrize("layout", ["folder", "table", "table of lists"])
def test_llava_bench_is_the_ratio_of_the_mean_scores(layout, tmp_path):
    data = {
        "folder": lambda: wild_folder(tmp_path / "data").parent,
        "table": lambda: bench_table(tmp_path / "data", "\n".join(CAPTIONS)),
        "table of lists": lambda: bench_table(tmp_path / "data", CAPTIONS),
    }[layout]()
    result, metrics, requests = judged("llava_bench", data, ANSWERS, tmp_path, review)
    assert metrics["relative_score"].value == pytest.approx(RELATIVE)
    assert metrics["relative_score"].num == 4
    assert metrics["relative_score"].standard_error > 1
    assert metrics["model_score"].value == 21.5 / 4
    assert metrics["conv/relative_score"].value == pytest.approx(100 * 7 / 16)
    assert metrics["conv/relative_score"].num == 2
    assert metrics["detail/relative_score"].value == pytest.approx(50)
    assert metrics["detail/relative_score"].standard_error is None
    assert metrics["complex/relative_score"].value == pytest.approx(100)
    assert result.judge["answered_by"] == ["judge-2026"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.judge["dates"][0])
    prompts = [request["messages"][1]["content"] for request in requests]
    assert all(prompt.startswith("[Context]\nA boat at a shore.\nIt is red.\n\n[Question]\n") for prompt in prompts)


def test_reviews_have_the_format_of_llavas_summary_script(tmp_path):
    judged("llava_bench", wild_folder(tmp_path), ANSWERS, tmp_path, review)
    reviews = lines_of(tmp_path / "llava_bench" / "reviews.jsonl")
    assert reviews[1] == {
        "id": 2, "question_id": 1, "answer1_id": "gpt1", "answer2_id": 1, "category": "llava_bench_detail",
        "content": "10 5.0\nBecause.", "tuple": [10.0, 5.0],
    }  # fmt: skip
    reference, model = (sum(each["tuple"][place] for each in reviews) for place in (0, 1))
    assert 100 * model / reference == pytest.approx(RELATIVE)


def test_swapped_order_measures_position_bias(tmp_path):
    _, metrics, requests = judged("llava_bench", wild_folder(tmp_path), ANSWERS, tmp_path, review, swap=True)
    assert len(requests) == 8
    assert metrics["relative_score"].value == pytest.approx(RELATIVE)
    assert metrics["swapped/relative_score"].value == pytest.approx(SWAPPED)
    assert metrics["both_orders/relative_score"].value == pytest.approx((RELATIVE + SWAPPED) / 2)
    assert metrics["position_bias"].value == pytest.approx(SWAPPED - RELATIVE)
    assert metrics["position_bias"].standard_error > 0
    assert lines_of(tmp_path / "llava_bench" / "reviews_swapped.jsonl")[1]["tuple"] == [5.5, 10.0]


def test_review_that_cannot_be_parsed_is_in_no_mean(tmp_path):
    def reply(request, number):
        is_detail = "Describe it." in request["messages"][1]["content"]
        return "Both are fine." if is_detail else review(request, number)

    result, metrics, _ = judged("llava_bench", wild_folder(tmp_path), ANSWERS, tmp_path, reply)
    assert result.num_unjudged == 1
    assert metrics["relative_score"].value == pytest.approx(100 * 16.5 / 25.5)
    assert metrics["relative_score"].num == 3
    assert "detail/relative_score" not in metrics
    [listed] = [each for each in lines_of(tmp_path / "llava_bench" / "examples.jsonl") if each["judge_error"]]
    assert (listed["id"], listed["prediction"]) == ("1", "Both are fine.")
    assert len(lines_of(tmp_path / "llava_bench" / "reviews.jsonl")) == 3


def test_example_without_an_answer_is_not_sent_and_gets_the_lowest_score(tmp_path):
    answers = {**ANSWERS, "0": None}
    result, metrics, requests = judged("llava_bench", wild_folder(tmp_path), answers, tmp_path, review)
    assert (len(requests), result.num_failed) == (3, 1)
    assert metrics["relative_score"].value == pytest.approx(100 * (1 + 15.5) / (10 + 27))
    assert metrics["relative_score"].num == 4


def test_coco_context_has_captions_and_boxes(tmp_path):
    folder = coco_folder(tmp_path)
    assert examples_of("llava_bench_coco", folder)[0].images[0].is_file()
    _, metrics, requests = judged("llava_bench_coco", folder, ANSWERS, tmp_path, review)
    assert metrics["relative_score"].value == pytest.approx(RELATIVE)
    prompt = requests[0]["messages"][1]["content"]
    assert "It is red.\n\nboat: [0.1, 0.2, 0.5, 0.6]\n\n[Question]" in prompt
    assert "label: [left, top, right, bottom]" in prompt
    assert lines_of(tmp_path / "llava_bench_coco" / "reviews.jsonl")[0]["category"] == "conv"


@pytest.mark.parametrize(
    "instance, message",
    [({"bbox": [0.1, 0.2, 0.5, 0.6]}, "has no category"), ({"category": "boat"}, "has no bbox"), ("boat", "is str")],
)
def test_box_without_its_fields_is_named(instance, message, tmp_path):
    folder = coco_folder(tmp_path)
    file = folder / "caps_boxes_coco2014_val_80.jsonl"
    [context] = lines_of(file)
    boxes = [*context["instances"], instance]
    write_jsonl(file, [{**context, "instances": boxes}])
    with pytest.raises(ValueError, match=rf"val_80\.jsonl, image '000000000001\.jpg', instance 1: {message}"):
        examples_of("llava_bench_coco", folder)


@pytest.mark.parametrize(
    "text",
    [
        "8 7 6",
        "8",
        "",
        "0 7",
        "8 11",
        "8/5 7/5",
        "80/100 70/100",
        "\n\nfine\n8 7",
        "8-7",
        "Assistant 2 is good: 8 7",
        "7",
    ],
)
def test_review_without_two_scores_on_its_first_line_is_refused(text):
    with pytest.raises(ValueError, match=r"the first line is .* expected two scores|expected numbers from 1 to 10"):
        llava_bench.parse_review(text)


REVIEWS = [
    "{0} {1}", "\n {0},  {1}\n1 2", "**{0} {1}**\nBecause.", "Scores: {0}, {1}", "**Scores:** {0} {1}",
    "{0}/10 {1}/10",
    "Scores:\n{0} {1}\nfine", "Assistant 1: {0}, Assistant 2: {1}", "- Assistant 1: {0}/10\n- Assistant 2: {1}/10\n",
    "### Final scores\n\n**{0}** and **{1}**.", "[[{0}, {1}]]", "{0} out of 10, {1} out of 10", "{0}; {1}",
    '{{"score_1": {0}, "score_2": {1}}}', "The score of Assistant 1 is {0} and the score of Assistant 2 is {1}.",
]  # fmt: skip


@given(scores=st.tuples(*[st.integers(10, 100).map(lambda tenths: tenths / 10)] * 2), form=st.sampled_from(REVIEWS))
@settings(deadline=None)
def test_review_is_read_in_every_form_that_judges_write(scores, form):
    assert llava_bench.parse_review(form.format(*scores)) == scores
    assert llava_bench.parse_review(form.format(*map(int, scores))) == tuple(map(int, scores))


def test_missing_and_duplicate_ids_of_llava_bench_are_named(tmp_path):
    folder = wild_folder(tmp_path)
    answers = lines_of(folder / "answers_gpt4.jsonl")
    write_jsonl(folder / "answers_gpt4.jsonl", answers[1:])
    with pytest.raises(ValueError, match=r"answers_gpt4.jsonl: has no answer for question_id 3 of .*questions"):
        examples_of("llava_bench", folder)
    write_jsonl(folder / "answers_gpt4.jsonl", [*answers, answers[0]])
    with pytest.raises(ValueError, match="two rows have question_id 3"):
        examples_of("llava_bench", folder)
    write_jsonl(folder / "answers_gpt4.jsonl", answers)
    write_jsonl(folder / "context.jsonl", [{"image": "002.jpg", "caption": ""}])
    with pytest.raises(ValueError, match=r"context.jsonl: has no image '001.jpg'"):
        examples_of("llava_bench", folder)
    (folder / "context.jsonl").unlink()
    with pytest.raises(ValueError, match=r"nor context.jsonl. It contains: answers_gpt4.jsonl, images/, questions"):
        examples_of("llava_bench", folder)


# id, question, ground truth, capabilities, answer of the model, grade
GRADED = [
    (0, "What is x?", "-1<AND>-5", ["ocr", "math"], "x = -1", 0.5),
    (1, "Which city?", "Rome<OR>Roma", ["rec", "know"], "It is Rome.", 1.0),
    (7, "How many?", "3", ["rec"], "Four", 0.0),
]
MMVET_ANSWERS = {f"v1_{row[0]}": row[4] for row in GRADED}


def write_mmvet(folder: Path, layout: str = "folder") -> Path:
    if layout == "parquet":
        rows = [
            {"question_id": f"v1_{id}", "question": q, "answer": a, "capability": ",".join(c), "image": stored(id)}
            for id, q, a, c, *_ in GRADED
        ]
        write_split(folder / "data", "test", rows)
        return folder
    rows = {
        f"v1_{id}": {"imagename": f"v1_{id}.png", "question": question, "answer": answer, "capability": capability}
        for id, question, answer, capability, *_ in GRADED
    }
    write_json(folder / "mm-vet.json", rows)
    asked = [{"question_id": id, "image": f"v1_{id}.png", "text": question} for id, question, *_ in GRADED]
    write_jsonl(folder / "llava-mm-vet.jsonl", asked[::-1])
    for id, *_ in GRADED:
        write_image(folder / "images" / f"v1_{id}.png", id)
    return folder


def grade(request, number) -> str:
    """Grades the last row of the table as GRADED says."""
    question, _, prediction, _ = request["messages"][0]["content"].split("\n")[-1].split("|")
    [value] = [row[5] for row in GRADED if (row[1], row[4]) == (question.strip(), prediction.strip())]
    return str(value)


@pytest.mark.parametrize("task", ["mmvet", "mmvet_lmms_eval"])
def test_mmvet_is_the_mean_grade_overall_and_by_capability(task, layout, tmp_path):
    write_mmvet(tmp_path / "mm-vet", layout)
    _, metrics, requests = judged(task, tmp_path, MMVET_ANSWERS, tmp_path / "out", grade)
    assert {name: (metric.value, metric.num) for name, metric in metrics.items()} == {
        "score": (0.5, 3),
        "ocr/score": (0.5, 1),
        "math/score": (0.5, 1),
        "rec/score": (0.5, 2),
        "know/score": (1.0, 1),
    }
    assert metrics["score"].standard_error == pytest.approx(0.5 / 3**0.5)
    rows = {request["messages"][0]["content"].split("\n")[-1] for request in requests}
    assert "What is x? | -1 <AND> -5 | x = -1 |" in rows
    assert json.loads((tmp_path / "out" / task / "mmvet.json").read_text()) == MMVET_ANSWERS


def test_mmvet_asks_as_llava_or_as_lmms_eval(tmp_path):
    folder = write_mmvet(tmp_path)
    plain, prefixed = (
        {example.id: example.prompt for example in examples_of(task, folder)} for task in ("mmvet", "mmvet_lmms_eval")
    )
    assert plain["v1_0"] == "What is x?"
    assert prefixed["v1_0"].startswith("First please perform reasoning, and think step by step to provide best answer")
    assert prefixed["v1_0"].endswith("question: \n\nWhat is x?")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5), ("1", 1.0), (" 1.0\nAll.", 1.0), ("| .3 |", 0.3), ("**0.0**", 0.0), ("0.", 0.0),
        ("Correctness: 0.7", 0.7), ("**Correctness**: 0.7", 0.7), ("**Score:** 0.7, as it is.", 0.7), ("0.7/1.0", 0.7),
        ("correctness = .7.", 0.7), ("The correctness score is 0.7.\nIt lacks x.", 0.7), ("### Grade: 1/1", 1.0),
        ('{"correctness": 0.7}', 0.7), ("the score is 1", 1.0),
    ],
)  # fmt: skip
def test_grade_is_the_number_that_the_judge_begins_with(text, value):
    assert mmvet.parse_grade(text) == value


@pytest.mark.parametrize(
    "text", ["", "good", "10", "1.5", "-1", "0,5", "1/2", "50%", "0.5.1", "Score: 7", "0.7/10", "Row 1: 0.7"]
)
def test_other_grades_are_refused(text):
    with pytest.raises(ValueError, match="does not begin with a number from 0 to 1"):
        mmvet.parse_grade(text)


def test_without_a_judge_the_submission_is_written_and_the_metric_is_missing(tmp_path):
    result = assess_answers("mmvet", write_mmvet(tmp_path), {**MMVET_ANSWERS, "v1_0": None}, tmp_path)
    assert result.metrics == []
    assert "--judge-model" in result.missing
    submission = json.loads((tmp_path / "mmvet" / "mmvet.json").read_text())
    assert submission == {**MMVET_ANSWERS, "v1_0": ""}
    assert [each["scores"] for each in lines_of(tmp_path / "mmvet" / "examples.jsonl")] == [None] * 3


def test_wrong_data_of_mmvet_is_named(tmp_path):
    write_mmvet(tmp_path)
    asked = lines_of(tmp_path / "llava-mm-vet.jsonl")
    write_jsonl(tmp_path / "llava-mm-vet.jsonl", [*asked, {**asked[0], "question_id": 99}])
    with pytest.raises(ValueError, match=r"mm-vet.json: lacks v1_99, which .*llava-mm-vet.jsonl asks"):
        examples_of("mmvet", tmp_path)
    write_jsonl(tmp_path / "llava-mm-vet.jsonl", [*asked, asked[0]])
    with pytest.raises(ValueError, match="two rows have question_id 7"):
        examples_of("mmvet", tmp_path)
    (tmp_path / "mm-vet.json").unlink()
    with pytest.raises(ValueError, match=r"nor mm-vet.json or .*It contains: images/, llava-mm-vet.jsonl"):
        examples_of("mmvet", tmp_path)


def test_missing_key_is_reported_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    data = str(write_mmvet(tmp_path / "data"))
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        evaluate(Evaluation("/no/model", ["mmvet"], data, tmp_path / "out", judge=JudgeSettings("judge")))


def shorten_answers() -> None:
    run.TASKS["mmvet"] = replace(mmvet.TASK, max_new_tokens=4)


@pytest.fixture
def options(tmp_path, monkeypatch) -> dict:
    """Options of an evaluation of a tiny model on MM-Vet, whose answers are short."""
    monkeypatch.setitem(run.TASKS, "mmvet", mmvet.TASK)  # restored after the test
    shorten_answers()
    model, data = tiny.save_model(tmp_path / "model"), str(write_mmvet(tmp_path / "data"))
    return {"model": model, "tasks": "mmvet", "data": data, "out": tmp_path / "out"}


def evaluation_of(options: dict, server, **settings) -> Evaluation:
    judge = JudgeSettings("judge", base_url=server.url, **settings)
    return Evaluation(**{**options, "tasks": ["mmvet"]}, device="cpu", dtype="float32", batch_size=1, judge=judge)


@pytest.mark.slow
def test_run_that_a_cap_stopped_is_resumed(options):
    out = options["out"]
    with chat_server(lambda request, number: "0.25") as server:
        [result] = evaluate(evaluation_of(options, server, max_requests=2))
        assert result.metrics == []
        assert "--judge-max-requests 2" in result.missing
        assert json.loads((out / "results.json").read_text())["missing"] == {"mmvet": result.missing}
        assert (out / "mmvet" / "mmvet.json").is_file()
        [result] = evaluate(evaluation_of(options, server))
        assert len(server.requests) == 3
    assert result.missing is None
    [first, *_] = json.loads((out / "results.json").read_text())["results"]
    assert (first["metric"], first["value"], first["num"], first["judge"]["model"]) == ("score", 0.25, 3, "judge")
    assert KEY not in "".join(file.read_text() for file in out.rglob("*.json*"))


@pytest.mark.slow
def test_command_says_who_judges_and_what_is_missing(options):
    without = run_evaluate(**options)
    assert without.exit_code == 0, without.output
    assert "mmvet: graded by a judge: set --judge-model" in without.output
    options |= {"judge_model": "judge", "judge_concurrency": 1}
    with chat_server(lambda request, number: "1") as server:
        capped = run_evaluate(**options, judge_base_url=server.url, judge_max_requests=2, judge_temperature=1)
        assert capped.exit_code == 1
        assert "stopped by --judge-max-requests 2" in capped.output
        done = run_evaluate(**options, judge_base_url=server.url, judge_temperature=1)
        assert done.exit_code == 0, done.output
        assert {request["temperature"] for request in server.requests} == {1.0}
        assert len(server.requests) == 3
    with chat_server(lambda request, number: "no") as server:
        unread = run_evaluate(**options, judge_base_url=server.url, judge_attempts=2)
        assert len(server.requests) == 6
    assert unread.exit_code == 1
    assert "3 of 3 answers have no grade" in unread.output
    reason = "Error of the first: no answer could be parsed in 2 attempts: 'no' does"
    assert f"mmvet: the judge graded no example. {reason}" in unread.output


@pytest.mark.slow
def test_cap_holds_for_both_models_of_a_comparison(options):
    options |= {"against": options["model"], "judge_model": "judge", "judge_concurrency": 1}
    out = options["out"]
    with chat_server(lambda request, number: "1") as server:
        capped = run_evaluate(**options, judge_base_url=server.url, judge_max_requests=2)
        assert capped.exit_code == 1
        assert len(server.requests) == 2
        for folder in (out, out / "against"):
            assert f"{folder}, mmvet: stopped by --judge-max-requests 2" in capped.output
        assert f"Nothing to compare: see {out / 'comparison'}" in capped.output
        done = run_evaluate(**options, judge_base_url=server.url, judge_max_requests=6)
        assert done.exit_code == 0, done.output
    assert len(server.requests) == 3  # the same model gave the same answers


@pytest.mark.slow
def test_only_one_of_two_processes_asks_the_judge(options, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    with chat_server(lambda request, number: "1") as server:
        children = fork(evaluate, (evaluation_of(options, server),), log, processes=2, prepare=(shorten_answers,))
        assert ended(children) == [0, 0], log.read_text()[-3000:]
    assert all((out / "mmvet" / f"answers-{rank}.jsonl").read_text() for rank in (0, 1))
    assert len(server.requests) == 3
    assert json.loads((out / "results.json").read_text())["results"][0]["value"] == 1.0
