"""MM-Vet and LLaVA-Bench on tiny files in their layouts, graded by a server of this machine."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from sq_llava.cli.main import app
from sq_llava.evaluation import llava_bench, mmvet, run
from sq_llava.evaluation.judge import Judge, JudgeSettings
from sq_llava.evaluation.reading import Data
from sq_llava.evaluation.run import Evaluation, assess, evaluate
from sq_llava.evaluation.task import Record
from tests import tiny
from tests.chat_server import KEY, chat_server
from tests.evaluation_layouts import write_jsonl
from tests.processes import ended, fork, lines_of


pytestmark = pytest.mark.usefixtures("api_key")


def settings_of(server, **overrides) -> JudgeSettings:
    return JudgeSettings("judge", base_url=server.url, **overrides)


# question_id, category, question, reference answer, answer of the model, score of the reference, score of the model
PAIRS = [
    (0, "conv", "What is it?", "A red boat.", "A boat.", 8.0, 6.0),
    (1, "detail", "Describe it.", "A boat lies at the shore.", "A thing.", 10.0, 5.0),
    (2, "complex", "Why is it there?", "To fish.", "For fishing at dawn.", 9.0, 9.5),
    (3, "conv", "Is it big?", "It is small.", "Yes.", 7.0, 1.0),
]
CAPTIONS = ["A boat at a shore.", "It is red."]


def wild_folder(root: Path) -> Path:
    folder = root / "llava-bench-in-the-wild"
    (folder / "images").mkdir(parents=True)
    tiny.picture(1).save(folder / "images" / "001.jpg")
    questions = [{"question_id": id, "image": "001.jpg", "text": text, "category": c} for id, c, text, *_ in PAIRS]
    answers = [{"question_id": pair[0], "text": pair[3], "answer_id": f"gpt{pair[0]}"} for pair in PAIRS]
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "\n".join(CAPTIONS)}])
    write_jsonl(folder / "answers_gpt4.jsonl", answers[::-1])  # matched by id
    return folder


def coco_folder(root: Path) -> Path:
    folder = root / "coco2014_val_qa_eval"
    (folder / "val2014").mkdir(parents=True)
    tiny.picture(1).save(folder / "val2014" / "COCO_val2014_000000000001.jpg")
    image = "000000000001.jpg"
    write_jsonl(
        folder / "qa90_questions.jsonl",
        [{"question_id": id, "image": image, "text": text, "category": c} for id, c, text, *_ in PAIRS],
    )
    boxes = [{"category": "boat", "bbox": [0.1, 0.2, 0.5, 0.6]}]
    context = {"id": "1", "image": image, "captions": CAPTIONS, "instances": boxes}
    write_jsonl(folder / "caps_boxes_coco2014_val_80.jsonl", [context])
    answers = [{"question_id": pair[0], "text": pair[3], "answer_id": f"gpt{pair[0]}"} for pair in PAIRS]
    write_jsonl(folder / "qa90_gpt4_answer.jsonl", answers)
    return folder


def bench_table(root: Path, caption) -> Path:
    image = tiny.picture(1)
    rows = [
        {
            "question_id": id,
            "question": text,
            "category": c,
            "gpt_answer": gpt,
            "caption": caption,
            "image": image,
        }
        for id, c, text, gpt, *_ in PAIRS
    ]
    return write_table(root, rows, "train")


def write_table(root: Path, rows: list[dict], split: str) -> Path:
    (root / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def compare(request, number) -> str:
    """Scores the two answers of a prompt as PAIRS has it, and gives the first half a point more."""
    first, second = re.findall(r"\[Assistant \d\]\n(.*)\n\[End", request["messages"][1]["content"])
    scores = {text: score for pair in PAIRS for text, score in zip(pair[3:5], pair[5:7])}
    return f"{min(scores[first] + 0.5, 10)} {scores[second]}\nBecause."


def records_of(task, place: Path, answer_of: dict[str, str]) -> list[Record]:
    examples = task.read(Data.locate(str(place), task.name, task.hub_id, None, task.folder))
    return [Record(example, example.prompt, answer_of[example.id]) for example in examples]


ANSWERS = {str(pair[0]): pair[4] for pair in PAIRS}


def assessed(task, records, out: Path, judge: Judge | None = None):
    evaluation = Evaluation("model", [task.name], "data", out)
    (out / task.name).mkdir(parents=True, exist_ok=True)
    result = assess(task, records, evaluation, {"data_hashes": {task.name: ""}}, judge)
    return result, {metric.name: metric for metric in result.metrics}


# Unswapped, the reference has half a point more: 8.5 + 10 + 9.5 + 7.5; swapped, the model: 6.5 + 5.5 + 10 + 1.5.
RELATIVE = 100 * 21.5 / 35.5
SWAPPED = 100 * 23.5 / 34


@pytest.mark.parametrize("layout", ["folder", "table", "table of lists"])
def test_llava_bench_is_the_ratio_of_the_mean_scores(layout, tmp_path):
    place = {
        "folder": lambda: wild_folder(tmp_path / "data").parent,
        "table": lambda: bench_table(tmp_path / "data", "\n".join(CAPTIONS)),
        "table of lists": lambda: bench_table(tmp_path / "data", CAPTIONS),
    }[layout]()
    records = records_of(llava_bench.TASK, place, ANSWERS)
    with chat_server(compare) as server:
        result, metrics = assessed(llava_bench.TASK, records, tmp_path, Judge(settings_of(server), tmp_path))
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
    prompts = [request["messages"][1]["content"] for request in server.requests]
    assert all(prompt.startswith("[Context]\nA boat at a shore.\nIt is red.\n\n[Question]\n") for prompt in prompts)


def test_reviews_are_in_the_form_that_llava_summarizes(tmp_path):
    records = records_of(llava_bench.TASK, wild_folder(tmp_path), ANSWERS)
    with chat_server(compare) as server:
        assessed(llava_bench.TASK, records, tmp_path, Judge(settings_of(server), tmp_path))
    reviews = lines_of(tmp_path / "llava_bench" / "reviews.jsonl")
    assert reviews[1] == {
        "id": 2,
        "question_id": 1,
        "answer1_id": "gpt1",
        "answer2_id": 1,
        "category": "llava_bench_detail",
        "content": "10 5.0\nBecause.",
        "tuple": [10.0, 5.0],
    }
    reference, model = (sum(review["tuple"][place] for review in reviews) for place in (0, 1))
    assert 100 * model / reference == pytest.approx(RELATIVE)


def test_swapped_order_shows_what_the_judge_makes_of_the_place(tmp_path):
    records = records_of(llava_bench.TASK, wild_folder(tmp_path), ANSWERS)
    with chat_server(compare) as server:
        judge = Judge(settings_of(server, swap=True), tmp_path)
        _, metrics = assessed(llava_bench.TASK, records, tmp_path, judge)
    assert len(server.requests) == 8
    assert metrics["relative_score"].value == pytest.approx(RELATIVE)
    assert metrics["swapped/relative_score"].value == pytest.approx(SWAPPED)
    assert metrics["both_orders/relative_score"].value == pytest.approx((RELATIVE + SWAPPED) / 2)
    assert metrics["position_bias"].value == pytest.approx(SWAPPED - RELATIVE)
    assert metrics["position_bias"].standard_error > 0
    assert lines_of(tmp_path / "llava_bench" / "reviews_swapped.jsonl")[1]["tuple"] == [5.5, 10.0]


def test_review_that_cannot_be_read_enters_no_mean(tmp_path):
    def reply(request, number):
        said = compare(request, number)
        return "Both are fine." if "Describe it." in request["messages"][1]["content"] else said

    records = records_of(llava_bench.TASK, wild_folder(tmp_path), ANSWERS)
    with chat_server(reply) as server:
        result, metrics = assessed(llava_bench.TASK, records, tmp_path, Judge(settings_of(server), tmp_path))
    assert result.num_unjudged == 1
    assert metrics["relative_score"].value == pytest.approx(100 * 16.5 / 25.5)
    assert metrics["relative_score"].num == 3
    assert "detail/relative_score" not in metrics
    [listed] = [each for each in lines_of(tmp_path / "llava_bench" / "examples.jsonl") if each["judge_error"]]
    assert listed["id"] == "1"
    assert listed["prediction"] == "Both are fine."
    assert len(lines_of(tmp_path / "llava_bench" / "reviews.jsonl")) == 3


def test_example_without_an_answer_is_not_sent_and_has_the_lowest_score(tmp_path):
    records = records_of(llava_bench.TASK, wild_folder(tmp_path), ANSWERS)
    records[0] = replace(records[0], answer="", error="no such image")
    with chat_server(compare) as server:
        result, metrics = assessed(llava_bench.TASK, records, tmp_path, Judge(settings_of(server), tmp_path))
    assert len(server.requests) == 3
    assert result.num_failed == 1
    assert metrics["relative_score"].value == pytest.approx(100 * (1 + 15.5) / (10 + 27))
    assert metrics["relative_score"].num == 4


def test_coco_context_has_captions_and_boxes(tmp_path):
    records = records_of(llava_bench.COCO_TASK, coco_folder(tmp_path), ANSWERS)
    assert records[0].example.images[0].is_file()
    with chat_server(compare) as server:
        _, metrics = assessed(llava_bench.COCO_TASK, records, tmp_path, Judge(settings_of(server), tmp_path))
    assert metrics["relative_score"].value == pytest.approx(RELATIVE)
    prompt = server.requests[0]["messages"][1]["content"]
    assert "It is red.\n\nboat: [0.1, 0.2, 0.5, 0.6]\n\n[Question]" in prompt
    assert "label: [left, top, right, bottom]" in prompt
    assert lines_of(tmp_path / "llava_bench_coco" / "reviews.jsonl")[0]["category"] == "conv"


@pytest.mark.parametrize("text", ["8 7 6", "8", "", "Scores: 8 7", "0 7", "8 11", "8/10 7/10", "\n\nfine\n8 7"])
def test_review_without_two_scores_on_its_first_line_is_refused(text):
    with pytest.raises(ValueError, match=r"the first line is|are not from 1 to 10"):
        llava_bench.parse_review(text)
    assert llava_bench.parse_review("\n 8.5,  7\n1 2") == (8.5, 7.0)


def test_missing_and_doubled_ids_of_llava_bench_are_named(tmp_path):
    folder = wild_folder(tmp_path)
    answers = lines_of(folder / "answers_gpt4.jsonl")
    write_jsonl(folder / "answers_gpt4.jsonl", answers[1:])
    with pytest.raises(ValueError, match=r"answers_gpt4.jsonl: has no answer to the question_id 3 of .*questions"):
        records_of(llava_bench.TASK, folder, ANSWERS)
    write_jsonl(folder / "answers_gpt4.jsonl", [*answers, answers[0]])
    with pytest.raises(ValueError, match="question_id 3 is there twice"):
        records_of(llava_bench.TASK, folder, ANSWERS)
    write_jsonl(folder / "answers_gpt4.jsonl", answers)
    write_jsonl(folder / "context.jsonl", [{"image": "002.jpg", "caption": ""}])
    with pytest.raises(ValueError, match=r"context.jsonl: has no image '001.jpg'"):
        records_of(llava_bench.TASK, folder, ANSWERS)
    (folder / "context.jsonl").unlink()
    with pytest.raises(ValueError, match=r"nor context.jsonl. It holds: answers_gpt4.jsonl, images/, questions.jsonl"):
        records_of(llava_bench.TASK, folder, ANSWERS)


# id, question, ground truth, capabilities, answer of the model, grade
GRADED = [
    (0, "What is x?", "-1<AND>-5", ["ocr", "math"], "x = -1", 0.5),
    (1, "Which city?", "Rome<OR>Roma", ["rec", "know"], "It is Rome.", 1.0),
    (7, "How many?", "3", ["rec"], "Four", 0.0),
]
MMVET_ANSWERS = {f"v1_{row[0]}": row[4] for row in GRADED}


def mmvet_folder(root: Path) -> Path:
    folder = root / "mm-vet"
    (folder / "images").mkdir(parents=True)
    rows = {}
    for id, question, answer, capability, *_ in GRADED:
        tiny.picture(id).save(folder / "images" / f"v1_{id}.png")
        image = f"v1_{id}.png"
        rows[f"v1_{id}"] = {"imagename": image, "question": question, "answer": answer, "capability": capability}
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    asked = [{"question_id": id, "image": f"v1_{id}.png", "text": question} for id, question, *_ in GRADED]
    write_jsonl(folder / "llava-mm-vet.jsonl", asked[::-1])
    return folder


def mmvet_table(root: Path) -> Path:
    rows = [
        {"question_id": f"v1_{id}", "question": q, "answer": a, "capability": ",".join(c), "image": tiny.picture(id)}
        for id, q, a, c, *_ in GRADED
    ]
    return write_table(root, rows, "test")


def grade(request, number) -> str:
    """Grades the last row of the table as GRADED has it."""
    question, _, prediction, _ = request["messages"][0]["content"].split("\n")[-1].split("|")
    [value] = [row[5] for row in GRADED if (row[1], row[4]) == (question.strip(), prediction.strip())]
    return str(value)


@pytest.mark.parametrize("layout", ["folder", "table"])
@pytest.mark.parametrize("task", [mmvet.TASK, mmvet.LMMS_EVAL_TASK], ids=lambda task: task.name)
def test_mmvet_is_the_mean_grade_over_all_and_by_capability(task, layout, tmp_path):
    place = mmvet_folder(tmp_path).parent if layout == "folder" else mmvet_table(tmp_path / "table")
    records = records_of(task, place, MMVET_ANSWERS)
    with chat_server(grade) as server:
        _, metrics = assessed(task, records, tmp_path / "out", Judge(settings_of(server), tmp_path))
    figures = {name: (metric.value, metric.num) for name, metric in metrics.items()}
    assert figures == {
        "score": (0.5, 3),
        "ocr/score": (0.5, 1),
        "math/score": (0.5, 1),
        "rec/score": (0.5, 2),
        "know/score": (1.0, 1),
    }
    assert metrics["score"].standard_error == pytest.approx(0.5 / 3**0.5)
    rows = {request["messages"][0]["content"].split("\n")[-1] for request in server.requests}
    assert "What is x? | -1 <AND> -5 | x = -1 |" in rows
    submission = json.loads((tmp_path / "out" / task.name / "mmvet.json").read_text())
    assert submission == MMVET_ANSWERS


def test_mmvet_asks_as_llava_or_as_lmms_eval(tmp_path):
    folder = mmvet_folder(tmp_path)
    plain, prefixed = (
        {record.example.id: record.prompt for record in records_of(task, folder, MMVET_ANSWERS)}
        for task in (mmvet.TASK, mmvet.LMMS_EVAL_TASK)
    )
    assert plain["v1_0"] == "What is x?"
    assert prefixed["v1_0"].startswith("First please perform reasoning, and think step by step to provide best answer")
    assert prefixed["v1_0"].endswith("question: \n\nWhat is x?")


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("1", 1.0), (" 1.0\nAll.", 1.0), ("| .3 |", 0.3), ("**0.0**", 0.0), ("0.", 0.0)]
)
def test_grade_is_the_number_that_the_judge_begins_with(text, value):
    assert mmvet.parse_grade(text) == value


@pytest.mark.parametrize("text", ["", "good", "10", "1.5", "-1", "0,5", "1/2", "50%", "0.5.1", "the score is 1"])
def test_other_grades_are_refused(text):
    with pytest.raises(ValueError, match="no number from 0 to 1"):
        mmvet.parse_grade(text)


def test_without_a_judge_the_submission_is_written_and_the_figure_said_to_be_missing(tmp_path):
    records = records_of(mmvet.TASK, mmvet_folder(tmp_path), MMVET_ANSWERS)
    records[2] = replace(records[2], answer="", error="no such image")
    result, metrics = assessed(mmvet.TASK, records, tmp_path)
    assert metrics == {}
    assert "--judge-model" in result.missing
    failed = records[2].example.id
    submission = json.loads((tmp_path / "mmvet" / "mmvet.json").read_text())
    assert submission == {**MMVET_ANSWERS, failed: ""}
    assert [each["scores"] for each in lines_of(tmp_path / "mmvet" / "examples.jsonl")] == [None] * 3


def test_wrong_data_of_mmvet_is_named(tmp_path):
    folder = mmvet_folder(tmp_path)
    asked = lines_of(folder / "llava-mm-vet.jsonl")
    write_jsonl(folder / "llava-mm-vet.jsonl", [*asked, {**asked[0], "question_id": 99}])
    with pytest.raises(ValueError, match=r"mm-vet.json: has no v1_99, which .*llava-mm-vet.jsonl asks"):
        records_of(mmvet.TASK, folder, MMVET_ANSWERS)
    write_jsonl(folder / "llava-mm-vet.jsonl", [*asked, asked[0]])
    with pytest.raises(ValueError, match="question_id 7 is there twice"):
        records_of(mmvet.TASK, folder, MMVET_ANSWERS)
    (folder / "mm-vet.json").unlink()
    with pytest.raises(ValueError, match=r"nor mm-vet.json or .*It holds: images/, llava-mm-vet.jsonl"):
        records_of(mmvet.TASK, folder, MMVET_ANSWERS)


@pytest.fixture
def model(tmp_path) -> str:
    return tiny.save_model(tmp_path / "model")


@pytest.mark.slow
def test_run_that_a_cap_has_stopped_goes_on_where_it_was(model, tmp_path, monkeypatch):
    monkeypatch.setitem(run.TASKS, "mmvet", replace(mmvet.TASK, max_new_tokens=4))
    folder = mmvet_folder(tmp_path)
    evaluation = Evaluation(model, ["mmvet"], str(folder), tmp_path / "out", device="cpu", dtype="float32")
    with chat_server(lambda request, number: "0.25") as server:
        [result] = evaluate(replace(evaluation, judge=settings_of(server, max_requests=2)))
        assert result.metrics == []
        assert "--judge-max-requests 2" in result.missing
        assert json.loads((tmp_path / "out" / "results.json").read_text())["missing"] == {"mmvet": result.missing}
        assert (tmp_path / "out" / "mmvet" / "mmvet.json").is_file()
        [result] = evaluate(replace(evaluation, judge=settings_of(server)))
        assert len(server.requests) == 3
    assert result.missing is None
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [figures[0][name] for name in ("metric", "value", "num")] == ["score", 0.25, 3]
    assert figures[0]["judge"]["model"] == "judge"
    assert KEY not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*.json*"))


def test_key_is_missed_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    folder = mmvet_folder(tmp_path)
    evaluation = Evaluation("/no/model", ["mmvet"], str(folder), tmp_path / "out", judge=JudgeSettings("judge"))
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        evaluate(evaluation)


@pytest.mark.slow
def test_command_says_who_judges_and_what_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(run.TASKS, "mmvet", replace(mmvet.TASK, max_new_tokens=4))
    command = [
        "evaluate",
        "--model",
        model,
        "--tasks",
        "mmvet",
        "--data",
        str(mmvet_folder(tmp_path)),
        "--device",
        "cpu",
    ]
    command += ["--out", str(tmp_path / "out")]
    without = CliRunner().invoke(app, command)
    assert without.exit_code == 0, without.output
    assert "mmvet: graded by a judge: give --judge-model" in without.output
    with chat_server(lambda request, number: "1") as server:
        command += ["--judge-model", "judge", "--judge-base-url", server.url, "--judge-concurrency", "1"]
        capped = CliRunner().invoke(app, [*command, "--judge-max-requests", "2", "--judge-temperature", "1"])
        assert capped.exit_code == 1
        assert "stopped by --judge-max-requests 2" in capped.output
        done = CliRunner().invoke(app, [*command, "--judge-temperature", "1"])
        assert done.exit_code == 0, done.output
        assert {request["temperature"] for request in server.requests} == {1.0}
        assert len(server.requests) == 3
    with chat_server(lambda request, number: "no") as server:
        unread = CliRunner().invoke(app, [*command, "--judge-base-url", server.url, "--judge-attempts", "2"])
        assert len(server.requests) == 6
    assert unread.exit_code == 1
    assert "3 of 3 answers have no grade" in unread.output
    assert "mmvet: the judge gave no grade at all, first: not readable in 2 attempts: no number" in unread.output


@pytest.mark.slow
def test_cap_holds_for_both_models_of_a_comparison(model, tmp_path, monkeypatch):
    monkeypatch.setitem(run.TASKS, "mmvet", replace(mmvet.TASK, max_new_tokens=4))
    options = {"--model": model, "--against": model, "--data": mmvet_folder(tmp_path), "--out": tmp_path / "out"}
    options |= {"--tasks": "mmvet", "--device": "cpu", "--judge-model": "judge", "--judge-concurrency": 1}
    command = ["evaluate", *(str(part) for option in options.items() for part in option)]
    with chat_server(lambda request, number: "1") as server:
        capped = CliRunner().invoke(app, [*command, "--judge-base-url", server.url, "--judge-max-requests", "2"])
        assert capped.exit_code == 1
        assert len(server.requests) == 2
        for out in (tmp_path / "out", tmp_path / "out" / "against"):
            assert f"{out}, mmvet: stopped by --judge-max-requests 2" in capped.output
        assert f"Nothing to compare: see {tmp_path / 'out' / 'comparison'}" in capped.output
        done = CliRunner().invoke(app, [*command, "--judge-base-url", server.url, "--judge-max-requests", "6"])
        assert done.exit_code == 0, done.output
    assert len(server.requests) == 3  # the same model said the same


def evaluate_briefly(evaluation: run.Evaluation) -> None:
    run.TASKS["mmvet"] = replace(mmvet.TASK, max_new_tokens=4)
    run.evaluate(evaluation)


@pytest.mark.slow
def test_only_one_of_two_processes_asks_the_judge(model, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    data = str(mmvet_folder(tmp_path))
    with chat_server(lambda request, number: "1") as server:
        judge = JudgeSettings("judge", base_url=server.url)
        evaluation = run.Evaluation(model, ["mmvet"], data, out, device="cpu", batch_size=1, judge=judge)
        children = fork(evaluate_briefly, (evaluation,), log, processes=2)
        assert ended(children) == [0, 0], log.read_text()[-3000:]
    assert all((out / "mmvet" / f"answers-{rank}.jsonl").read_text() for rank in (0, 1))
    assert len(server.requests) == 3
    assert json.loads((out / "results.json").read_text())["results"][0]["value"] == 1.0
