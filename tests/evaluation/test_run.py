"""A whole evaluation: answers in batches, on several processes, after a kill; what is written and refused."""

import json
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from sq_llava.evaluation import easy_vqa, run
from sq_llava.evaluation.answering import by_images
from sq_llava.evaluation.results import hash_of_model
from sq_llava.evaluation.run import Evaluation, evaluate
from sq_llava.evaluation.task import Example
from sq_llava.inference.assistant import load
from sq_llava.inference.settings import SelfQuestioning
from tests import tiny
from tests.evaluation_layouts import evaluate_command, stored, write_easy_vqa, write_json, write_parquet
from tests.processes import ended, fork, lines_of, locked_by_another_process, sq_llava
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


NUM_QUESTIONS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Questions of very different lengths about four images."""
    questions = ["is the shape a red circle? " * (number % 5 + 1) for number in range(NUM_QUESTIONS)]
    return write_easy_vqa(tmp_path_factory.mktemp("data"), questions, num_images=4)


@pytest.fixture
def own_data(data, tmp_path) -> Path:
    """A copy of the data that a test may change."""
    return shutil.copytree(data, tmp_path / "data")


@pytest.fixture
def evaluation(model, data, tmp_path) -> Evaluation:
    return Evaluation(model, ["easy_vqa"], str(data), tmp_path / "out", device="cpu", dtype="float32")


def examples_of(out: Path) -> list[dict]:
    return lines_of(out / "easy_vqa" / "examples.jsonl")


def command_of(evaluation: Evaluation, **more) -> list[str]:
    options = {"model": evaluation.model, "data": evaluation.data, "out": evaluation.out, **more}
    return evaluate_command(tasks="easy_vqa", **options)


@pytest.fixture(scope="module")
def one_by_one(model, data, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("single") / "out"
    evaluate(Evaluation(model, ["easy_vqa"], str(data), out, device="cpu", dtype="float32", batch_size=1))
    return examples_of(out)


def test_batches_answer_as_single_prompts_do(evaluation, one_by_one):
    evaluate(replace(evaluation, batch_size=7))
    assert examples_of(evaluation.out) == one_by_one
    assert len({example["answer"] for example in one_by_one}) > 4  # the answers are not all the same


def test_model_can_ask_itself_before_each_answer(evaluation, data):
    asking = replace(evaluation, limit=3, thinking=SelfQuestioning(1, own_tokens=4))
    evaluate(asking)
    assistant = load(evaluation.model, device="cpu", dtype="float32")
    rows = {row["id"]: row for row in json.loads((data / "test.json").read_text())}
    for example in examples_of(evaluation.out):
        row = rows[example["id"]]
        question = row["conversations"][0]["value"].removeprefix("<image>\n")
        requests = [(data / "images" / row["image"], question)]
        [found] = assistant.consider_batch(requests, asking.thinking, easy_vqa.TASK.max_new_tokens, seeds=[0])
        assert example["answer"] == found.answer
    with pytest.raises(
        ValueError, match="self_questioning '1 self-questions, 1 votes, seed 0', but this run has None"
    ):
        evaluate(replace(evaluation, limit=3))


def test_questions_about_one_image_are_grouped_longest_first():
    prompts = {"a": "xxx", "b": "x", "c": "xxxxx", "d": "xx", "e": "x" * 9}
    images = {"a": [Path("1")], "b": [Path("2")], "c": [Path("2")], "d": [Path("1")], "e": []}
    examples = [Example(name, "", images[name], None) for name in prompts]
    assert [example.id for example in by_images(examples, prompts)] == ["c", "b", "a", "d", "e"]


def test_examples_are_in_the_order_of_the_data_with_prompt_and_reference(one_by_one):
    assert [example["id"] for example in one_by_one] == [f"q{number}" for number in range(NUM_QUESTIONS)]
    assert one_by_one[0]["prompt"].endswith("USER: <image>\nis the shape a red circle?  ASSISTANT:")
    assert one_by_one[0]["reference"] == "yes"


@pytest.mark.long
def test_two_processes_write_what_one_writes(evaluation, one_by_one):
    launch = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "sq_llava", *command_of(evaluation)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert examples_of(evaluation.out) == one_by_one
    shares = [(evaluation.out / "easy_vqa" / f"answers-{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert sum(shares) == NUM_QUESTIONS
    assert min(shares) > 0


def test_killed_run_resumes_without_answering_again(evaluation, one_by_one, tmp_path):
    log = tmp_path / "log"
    (child,) = fork(sq_llava, command_of(evaluation, batch_size=1), log)
    answers = evaluation.out / "easy_vqa" / "answers-0.jsonl"
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 2):
        assert child.is_alive(), log.read_text()[-3000:]
        time.sleep(0.01)
    child.kill()
    assert ended([child]) == [-signal.SIGKILL]
    kept = answers.read_bytes()
    assert kept.count(b"\n") < NUM_QUESTIONS
    evaluate(replace(evaluation, dtype="auto"))
    assert examples_of(evaluation.out) == one_by_one
    lines = answers.read_bytes().splitlines()
    assert len(lines) == NUM_QUESTIONS
    assert lines[:2] == kept.splitlines()[:2]


def test_second_run_into_a_folder_is_refused_before_it_loads_a_model(evaluation, monkeypatch):
    monkeypatch.setattr(run, "load_any", None)
    with locked_by_another_process(evaluation.out), pytest.raises(ValueError, match=r"out: another run writes into"):
        evaluate(evaluation)


def test_run_that_fails_before_its_first_answer_does_not_claim_the_folder(evaluation, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(run, "load_any", Mock(side_effect=ValueError("no such model")))
        with pytest.raises(ValueError, match="no such model"):
            evaluate(replace(evaluation, limit=1, system_message="You see."))
        assert not evaluation.out.exists()
    evaluate(replace(evaluation, limit=1))
    assert json.loads((evaluation.out / "run.json").read_text())["system_message"] is None


def test_failed_example_is_recorded_and_counted(evaluation, data, own_data, one_by_one):
    image = own_data / "images" / "2.png"
    image.write_bytes(image.read_bytes()[:100])
    [result] = evaluate(replace(evaluation, data=str(own_data)))
    examples = examples_of(evaluation.out)
    failed = [example for example in examples if example["error"] is not None]
    assert {example["images"][0] for example in failed} == {str(image)}
    assert "cannot be read as an image" in failed[0]["error"]
    assert result.num_failed == len(failed) == NUM_QUESTIONS // 4
    accuracy = result.metrics[0]
    assert accuracy.num == NUM_QUESTIONS  # a failure counts as wrong, it is not left out
    others = [example for example in one_by_one if not example["images"][0].endswith("2.png")]
    assert [example["answer"] for example in examples if example["error"] is None] == [o["answer"] for o in others]
    shutil.copy(data / "images" / "2.png", image)  # the image is repaired, and the run resumes
    assert evaluate(replace(evaluation, data=str(own_data)))[0].num_failed == 0
    assert [example["answer"] for example in examples_of(evaluation.out)] == [o["answer"] for o in one_by_one]


def test_unreadable_image_in_a_table_fails_only_its_example(evaluation, tmp_path):
    secret = tmp_path / "secret.png"
    tiny.picture(5).save(secret)
    images = [stored(), None, {"bytes": b"no image", "path": "a.png"}, {"bytes": None, "path": str(secret)}]
    rows = [
        {"question_id": str(n), "question": "Is it red?", "answer": "no", "category": "random", "image": image}
        for n, image in enumerate(images)
    ]
    write_parquet(tmp_path / "pope" / "test.parquet", rows)
    [result] = evaluate(replace(evaluation, tasks=["pope"], data=str(tmp_path)))
    whole, *errors = [line["error"] for line in lines_of(evaluation.out / "pope" / "examples.jsonl")]
    assert whole is None
    assert [error is not None and error.split("(")[0] for error in errors] == [
        "ValueError: row 1: column image holds no image bytes.",
        "ValueError: a.png: cannot be read as an image ",
        "ValueError: row 3: column image holds no image bytes.",  # its path is not followed
    ]
    assert (result.num, result.num_failed) == (4, 3)


def test_folder_can_have_other_tasks_but_not_answers_of_a_different_run(evaluation, tmp_path):
    evaluate(replace(evaluation, limit=4))
    with pytest.raises(ValueError, match="system_message None"):
        evaluate(replace(evaluation, limit=4, system_message="You see."))
    row = {"question_id": "1", "category": "random", "question": "Is there a dog?", "answer": "no"}
    write_parquet(tmp_path / "pope" / "test.parquet", [row | {"image_source": "a", "image": stored(1)}])
    evaluate(replace(evaluation, tasks=["pope"], data=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has a line for 'q\d+', which is not in the input: .* --limit differs"):
        evaluate(replace(evaluation, limit=5))
    results = json.loads((evaluation.out / "results.json").read_text())
    assert list(results["data_hashes"]) == ["easy_vqa", "pope"]
    assert {entry["task"] for entry in results["results"]} == {"easy_vqa", "pope"}
    assert (results["limit"], results["earlier"]["easy_vqa"]["limit"]) == (None, 4)
    report = (evaluation.out / "report.md").read_text()
    assert "## easy-VQA" in report and "| earlier run, easy_vqa | 20" in report


def test_hash_of_an_adapter_depends_on_its_base(tmp_path):
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(tmp_path / "base")})
    hashes = set()
    for weights in (b"one", b"two"):
        (tmp_path / "base" / "model.safetensors").write_bytes(weights)
        hashes.add(hash_of_model(str(tmp_path / "adapter")))
    assert len(hashes) == 2


def test_model_on_the_hub_is_identified_by_its_commit(tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "models--org--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path)
    assert hash_of_model("org/model") == commit
    with pytest.raises(ValueError, match="org/other: not in the cache, and could not be downloaded from the Hub"):
        hash_of_model("org/other")


def test_limit_spaces_examples_evenly(evaluation):
    evaluate(replace(evaluation, limit=3))
    assert [example["id"] for example in examples_of(evaluation.out)] == ["q0", "q8", "q16"]


def test_task_named_twice_is_scored_once(evaluation):
    assert len(evaluate(replace(evaluation, tasks=["easy_vqa", "easy_vqa"], limit=1))) == 1


def test_system_message_is_in_the_prompt(evaluation):
    evaluate(replace(evaluation, limit=1, system_message="Be brief."))
    assert "Be brief. USER:" in examples_of(evaluation.out)[0]["prompt"]


def test_results_say_what_was_run_and_on_what(evaluation, model):
    evaluate(replace(evaluation, limit=8))
    results = json.loads((evaluation.out / "results.json").read_text())
    assert results["model"] == model
    assert results["packages"].keys() >= {"torch", "transformers"}
    assert all(len(results[name]) == 64 for name in ("model_hash", "code_hash"))
    [overall] = [entry for entry in results["results"] if entry["metric"] == "accuracy"]
    assert overall["num"] == 8
    assert overall["value"] == sum(e["scores"]["accuracy"] for e in examples_of(evaluation.out)) / 8


def test_hash_of_the_data_depends_on_the_images(evaluation, own_data, tmp_path, monkeypatch):
    evaluation = replace(evaluation, data=str(own_data), limit=4)
    evaluate(evaluation)
    before = json.loads((evaluation.out / "results.json").read_text())["data_hashes"]
    tiny.picture(99).save(own_data / "images" / "0.png")
    with monkeypatch.context() as context:
        context.setattr(run, "load_any", None)
        with pytest.raises(ValueError, match=r"answers-0\.jsonl: the line for 'q\d+' is about other data"):
            evaluate(evaluation)
    evaluate(replace(evaluation, out=tmp_path / "other"))
    assert json.loads((tmp_path / "other" / "results.json").read_text())["data_hashes"] != before


def test_answers_to_a_part_are_used_for_the_whole(evaluation, one_by_one):
    evaluate(replace(evaluation, limit=4))
    evaluate(evaluation)
    assert [example["answer"] for example in examples_of(evaluation.out)] == [o["answer"] for o in one_by_one]
    assert len(lines_of(evaluation.out / "easy_vqa" / "answers-0.jsonl")) == NUM_QUESTIONS


def test_unknown_task_and_missing_data_are_named(evaluation, tmp_path):
    with pytest.raises(ValueError, match=r"--tasks pop: unknown task. Choose from: .*pope"):
        evaluate(replace(evaluation, tasks=["pop"]))
    with pytest.raises(ValueError, match="no such folder, and not the id of a dataset"):
        evaluate(replace(evaluation, data=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither Parquet files nor test.json. It contains: nothing\."):
        evaluate(replace(evaluation, data=str(tmp_path / "empty")))


def test_duplicate_ids_and_images_outside_of_the_folder_are_refused(evaluation, own_data):
    rows = json.loads((own_data / "test.json").read_text())
    write_json(own_data / "test.json", [*rows, rows[3]])
    with pytest.raises(ValueError, match="has 2 examples with the id 'q3'"):
        evaluate(replace(evaluation, data=str(own_data)))
    write_json(own_data / "test.json", [{**rows[0], "image": "../secret.png"}])
    with pytest.raises(ValueError, match=r"'\.\./secret.png' is outside of"):
        evaluate(replace(evaluation, data=str(own_data)))


def test_other_models_of_transformers_are_scored(evaluation, tmp_path):
    processor = tiny.tiny_processor()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny.TINY_VISION),
        text_config=LlamaConfig(**{**tiny.TINY_LLAMA, "pad_token_id": processor.tokenizer.pad_token_id}),
        image_token_index=processor.image_token_id,
        image_seq_length=9,
    )
    folder = tmp_path / "llava"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}"
        "{% endfor %}\n{% endfor %}assistant:"
    )
    LlavaProcessor(
        tiny.tiny_image_processor(), processor.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    [result] = evaluate(replace(evaluation, model=str(folder), limit=4))
    assert result.num_failed == 0, examples_of(evaluation.out)[0]["error"]
    assert examples_of(evaluation.out)[0]["prompt"].startswith("user: <image>is the shape")
