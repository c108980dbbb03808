"""A model on a server is scored as a local one: the same prompts and images, answers that are kept, clear errors."""

import base64
import io
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import GenerationConfig
from typer.testing import CliRunner

from sq_llava.cli.main import app as cli
from sq_llava.evaluation import run
from sq_llava.evaluation.results import read_records
from sq_llava.evaluation.run import Evaluation, evaluate
from sq_llava.evaluation.settings import ServerSettings
from sq_llava.inference.assistant import load
from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from tests import tiny
from tests.chat_server import Reply, chat_server, completion
from tests.evaluation_layouts import examples_of, figures, image_bytes, write_easy_vqa
from tests.serving.in_thread import in_thread


NUM_QUESTIONS = 5


@pytest.fixture
def data(tmp_path) -> Path:
    return write_easy_vqa(tmp_path / "data", [f"is it red? {number}" for number in range(NUM_QUESTIONS)], 2)


@pytest.fixture
def evaluation_at(data, tmp_path, monkeypatch):
    """An evaluation of the model "served" at a URL."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def evaluation(url: str, **settings) -> Evaluation:
        server = ServerSettings("served", base_url=url, **{"concurrency": 2, "retries": 0} | settings)
        return Evaluation("served", ["easy_vqa"], str(data), tmp_path / "out", server=server)

    return evaluation


def records_of(out: Path) -> list:
    return read_records(out / "easy_vqa" / "examples.jsonl")


def question_of(request: dict) -> str:
    return request["messages"][-1]["content"][-1]["text"]


def test_server_gets_the_prompt_the_image_and_the_greedy_limit_of_the_task(evaluation_at, data):
    def reply(request, number):
        return Reply("yes" if "0" in question_of(request) else "no", seconds=0.2)

    with chat_server(reply) as server:
        [result] = evaluate(replace(evaluation_at(server.url), system_message="Be brief."))
        assert server.most_at_once == 2
    assert figures(result)["accuracy"] == pytest.approx(1 / NUM_QUESTIONS)
    examples = {example.prompt: example for example in examples_of("easy_vqa", data)}
    assert len(server.requests) == NUM_QUESTIONS
    for request in server.requests:
        system, user = request["messages"]
        image, text = user["content"]
        assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        kind, _, content = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        sent, original = (
            Image.open(io.BytesIO(each))
            for each in (base64.b64decode(content), *image_bytes(examples.pop(text["text"])))
        )
        assert sent.convert("RGB").tobytes() == original.convert("RGB").tobytes()
        assert request["temperature"] == 0
        assert request.get("max_completion_tokens", request.get("max_tokens")) == run.TASKS["easy_vqa"].max_new_tokens
    assert examples == {}


def test_run_names_the_server_and_the_model(evaluation_at, tmp_path):
    with chat_server(lambda request, number: "yes") as server:
        evaluate(evaluation_at(server.url))
    note = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (note["model"], note["server"], note["model_hash"]) == ("served", server.url, None)
    assert f"| model | served (served at {server.url}) |" in (tmp_path / "out" / "report.md").read_text()
    assert records_of(tmp_path / "out")[0].prompt == "user: <image>\nis it red? 0"
    other = evaluation_at("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="contains answers of a run with server"):
        evaluate(other)


def test_run_stops_when_the_server_refuses_everything_and_resumes_from_there(evaluation_at):
    keys = []

    def reply(request, number):
        return "yes" if keys or "3" not in question_of(request) else Reply(status=401, body="{}")

    with chat_server(reply) as server:
        with pytest.raises(ConnectionError, match=r"served: the server refused: .*401.* Repeat the command to resume"):
            evaluate(evaluation_at(server.url, concurrency=1))
        asked = len(server.requests)
        keys.append("paid")
        [result] = evaluate(evaluation_at(server.url))
        assert len(server.requests) == NUM_QUESTIONS + 1  # only the refused one was sent twice
    assert 1 <= asked <= NUM_QUESTIONS
    assert (result.num_failed, figures(result)["accuracy"]) == (0, 1)


def test_second_run_asks_nothing_again(evaluation_at, tmp_path):
    with chat_server(lambda request, number: "yes") as server:
        evaluate(evaluation_at(server.url))
        (tmp_path / "out" / "easy_vqa" / "answers-0.jsonl").unlink()  # as after a kill within a batch
        evaluate(evaluation_at(server.url))
        assert len(server.requests) == NUM_QUESTIONS


def test_example_that_the_server_refuses_fails_alone(evaluation_at, tmp_path):
    def reply(request, number):
        if "3" in question_of(request):
            return Reply(status=400, body='{"error": {"message": "too long"}}')
        return Reply("yes", seconds=0.1)

    with chat_server(reply) as server:
        [result] = evaluate(evaluation_at(server.url))
    # The one that was refused is asked for once more, alone.
    assert len(server.requests) == NUM_QUESTIONS + 1 and server.most_at_once == 2
    errors = [record.error for record in records_of(tmp_path / "out")]
    assert [error is None for error in errors] == [True, True, True, False, True]
    assert "too long" in errors[3]
    assert (result.num_failed, figures(result)["accuracy"]) == (1, 0.8)


def test_answer_without_text_is_an_empty_answer(evaluation_at, tmp_path):
    with chat_server(lambda request, number: Reply(body=completion(""))) as server:
        [result] = evaluate(evaluation_at(server.url))
    assert (result.num_failed, figures(result)["accuracy"]) == (0, 0)
    assert {record.answer for record in records_of(tmp_path / "out")} == {""}


def test_answer_that_is_cut_at_the_limit_of_the_task_is_an_answer(evaluation_at, tmp_path):
    with chat_server(lambda request, number: Reply(body=completion("yes", finish_reason="length"))) as server:
        [result] = evaluate(evaluation_at(server.url))
    assert (result.num_failed, figures(result)["accuracy"]) == (0, 1)


def test_answer_that_a_filter_stops_fails_alone(evaluation_at, tmp_path):
    def reply(request, number):
        filtered = "3" in question_of(request)
        return Reply(body=completion("yes", finish_reason="content_filter" if filtered else "stop"))

    with chat_server(reply) as server:
        [result] = evaluate(evaluation_at(server.url))
    assert "content filter" in records_of(tmp_path / "out")[3].error
    assert result.num_failed == 1


def test_thoughts_are_not_part_of_the_answer(evaluation_at):
    with chat_server(lambda request, number: "<think>No? No!</think> yes") as server:
        [result] = evaluate(evaluation_at(server.url))
    assert figures(result)["accuracy"] == 1


@pytest.mark.parametrize("variable, key", [("OPENAI_API_KEY", "of-openai"), ("OTHER", "of-server"), (None, "none")])
def test_key_comes_from_its_own_variable(evaluation_at, monkeypatch, variable, key):
    monkeypatch.setenv("OPENAI_API_KEY", "of-openai")
    monkeypatch.setenv("OTHER", "of-server")
    if variable is None:
        monkeypatch.delenv("OPENAI_API_KEY")
    with chat_server(lambda request, number: "yes") as server:
        evaluate(evaluation_at(server.url, **({} if variable is None else {"api_key_env": variable})))
    assert set(server.authorizations) == {f"Bearer {key}"}


def test_missing_key_and_absent_server_are_said_before_any_question(evaluation_at, tmp_path):
    with pytest.raises(ValueError, match="--api-key-env: the environment variable MISSING is not set"):
        evaluate(evaluation_at("http://127.0.0.1:9/v1", api_key_env="MISSING"))
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/v1: no server answers \(ConnectError\)\. Start"):
        evaluate(evaluation_at("http://127.0.0.1:9/v1"))
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float16"}, "--dtype has no effect on a model on a server"),
        ({"batch_size": 4}, "--batch-size has no effect on a model on a server"),
        ({"base_url": None, "concurrency": 4}, "--concurrency needs --base-url"),
        ({"base_url": None, "api_key_env": "KEY"}, "--api-key-env needs --base-url"),
        ({"base_url": "localhost:8000"}, "give http"),
    ],
)
def test_options_that_do_not_fit_a_server_are_refused(options, message, data, tmp_path):
    options = {"model": "served", "base_url": "http://127.0.0.1:9/v1", "tasks": "easy_vqa", **options}
    given = {name: value for name, value in options.items() if value is not None}
    command = ["evaluate", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
    done = invoke([*command, f"--data={data}", f"--out={tmp_path / 'out'}"])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def invoke(command: list[str]):
    return CliRunner().invoke(cli, command)


def test_models_of_one_server_are_compared_in_one_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with chat_server(lambda request, number: "yes" if request["model"] == "org/good" else "no") as server:
        command = ["evaluate", "--base-url", server.url, "--tasks=easy_vqa", f"--data={data}", "--out"]
        # What it has spent before counts too.
        assert invoke([*command, str(tmp_path / "bad"), "--model=org/bad"]).exit_code == 0
        done = invoke([*command, str(tmp_path), "--model=org/bad", "--model=org/good"])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "models.md").read_text()
    assert "| task | metric | org/bad | org/good |" in table
    assert "| easy_vqa | accuracy | 0.0000 (0.0000 to 0.4345) | 1.0000 (0.5655 to 1.0000) |" in table
    assert f"Server, all runs so far: {2 * NUM_QUESTIONS} requests" in " ".join(done.output.split())
    content = json.loads((tmp_path / "good" / "comparison" / "comparison.json").read_text())
    assert content["first"] == str(tmp_path / "bad")
    assert [each["difference"] for each in content["differences"]] == [1.0, 1.0]


@contextmanager
def served(folder: str):
    """`sq-llava serve` in a thread of this process. Yields its URL."""
    app = create_app(load(folder, device="cpu", dtype="float32"), "served", Limits(request_seconds=60), 2)
    with in_thread(app) as port:
        yield f"http://127.0.0.1:{port}/v1"


@pytest.mark.slow
def test_model_on_our_server_has_the_answers_and_scores_of_the_local_model(evaluation_at, data, tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    settings = GenerationConfig.from_pretrained(folder)
    # Tokens of single bytes, of which an untrained model makes invalid text, which a stream shows in another way.
    settings.suppress_tokens += range(3, 259)
    settings.save_pretrained(folder)
    local = Evaluation(folder, ["easy_vqa"], str(data), tmp_path / "local", device="cpu", dtype="float32")
    [expected] = evaluate(local)
    with served(folder) as url:
        [result] = evaluate(evaluation_at(url))
    pairs = list(zip(records_of(tmp_path / "local"), records_of(tmp_path / "out"), strict=True))
    assert [first.answer for first, _ in pairs] == [second.answer for _, second in pairs]
    assert len({first.answer for first, _ in pairs}) > 1
    assert result.metrics == expected.metrics
