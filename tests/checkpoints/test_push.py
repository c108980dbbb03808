"""Pushes to a small Hub by the command, and loading what was pushed in processes without this library."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from typer.testing import CliRunner

from sq_llava import load
from sq_llava.checkpoints import push as publishing
from sq_llava.checkpoints.publication import prepare
from sq_llava.cli.main import app
from sq_llava.evaluation.results import hash_of_model
from sq_llava.resources import CODE_FILES
from tests import ROOT
from tests.checkpoints.published import INPUTS, NOT_PUBLISHED, append_code, write_adapter, write_model
from tests.hub_checks import CHECKS
from tests.local_hub import LocalHub
from tests.released import edit_json
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def warm_loads():
    """Also for the processes that the library starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        yield


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


def process(arguments: list, hub: LocalHub, home: Path, token: str | None = "writer") -> subprocess.Popen:
    """Starts a process that uses the small Hub."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    # A killed process leaves files behind; they stay in the test's own folder.
    variables = {
        "HF_HOME": str(home / "hf_home"),
        "TMPDIR": str(home),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return subprocess.Popen(
        [warm_python(), *map(str, arguments)],
        cwd=home,
        env={**kept, **variables, **hub.environment(token)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def command(arguments: list, hub: LocalHub, home: Path, token: str | None = "writer") -> str:
    """Runs `sq-llava` in a process. Returns exit code and output in one line."""
    running = process(["-m", "sq_llava", *arguments], hub, home, token)
    output = " ".join(running.communicate(timeout=300)[0].split())
    return f"{running.returncode}: {output}"


def command_here(arguments: list, hub: LocalHub) -> str:
    """Like [`command`], in this process."""
    with hub.online():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return f"{result.exit_code}: {' '.join(result.output.split())}"


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict:
    """
    org/model is pushed by a process that is killed, then again to its end, then with other weights; org/lora is a
    stage's output for PEFT. Returns outputs of the commands and logits of the models.
    """
    home = tmp_path_factory.mktemp("publishing")
    first, second, lora = (home / name for name in ("first", "second", "lora"))
    expected = {"inputs": INPUTS, "first": write_model(first, 0), "second": write_model(second, 1)}

    hub.hold_after = 1
    killed = process(["-m", "sq_llava", "push", first, "org/model"], hub, home)
    arrived = hub.held.wait(120)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert arrived
    hub.hold_after = None
    before, hub.log[:] = list(hub.stored), []
    results = home / "results.json"
    scores = [{"task": "pope", "metric": "f1", "value": 0.8125, "num": 9, "dataset_id": "org/POPE"}]
    results.write_text(json.dumps({"date": "2026-11-21", "command": "evaluate", "results": scores}))
    options = ["--eval-results", results, "--license", "apache-2.0", "--language", "en", "--message", "First model"]
    output = command(["push", first, "org/model", *options], hub, home)
    assert output.startswith("0: "), output
    log = list(hub.log)
    with hub.online() as api:
        publish(api, first, "org/model", branch="candidate")
        publish(api, second, "org/model")
        publish(api, second, "org/secret", private=True)

    expected["adapted"] = write_adapter(second, lora)
    with hub.online() as api:
        publish(api, lora, "org/lora", adapter_only=True, base_model="org/model")
    messages = hub.repositories["org/model"].messages
    commits = [commit for commit, message in messages.items() if message in ("First model", "Upload model")]
    expected["commits"] = dict(zip(("first", "second"), commits, strict=True))
    return {"home": home, "before": before, "log": log, "output": output, "expected": expected}


def publish(
    api: HfApi, folder: Path, repo_id: str, branch: str | None = None, private: bool = False, **settings
) -> str:
    """Like the command, without the processes that load the model."""
    publishing.check_rights(api, repo_id, private)
    with prepare(folder, repo_id, api=api, **settings) as publication:
        commit = publishing.upload(api, publication, private, branch)
        publishing.publish_card(api, publication, commit, branch)
    return commit


@pytest.mark.long
def test_first_push_resumes_a_killed_one(hub, pushed):
    assert len(pushed["before"]) == 1
    assert len(set(hub.stored)) == len(hub.stored), "a file was sent twice"
    sent = [path for method, path in pushed["log"] if method == "PUT"]
    weights = [name for name in hub.files("org/model") if name.endswith((".safetensors", ".png"))]
    assert len(weights) > 3
    assert len(sent) == len(weights) - 1


def test_only_what_a_model_needs_is_published(hub, pushed):
    for repo_id in ("org/model", "org/lora"):
        files = hub.files(repo_id)
        assert not {name for name in files if name in NOT_PUBLISHED or "/" in name} - {".eval_results/pope.yaml"}
        assert not any(b"secret" in content or b"/home/" in content for content in files.values())
        assert str(pushed["home"]).encode() not in b"".join(files.values())
    for name in CODE_FILES:
        assert hub.files("org/model")[name] == (ROOT / name).read_bytes()
    needed = {"config.json", "model.safetensors.index.json", "provenance.yaml"}
    assert needed <= hub.files("org/model").keys()
    assert "config.json" not in hub.files("org/lora")


def test_card_names_the_commit_before_it_and_the_hashes_of_the_code(hub, pushed):
    repository = hub.repositories["org/model"]
    for commit in pushed["expected"]["commits"].values():
        card_commit = next(c for c, message in repository.messages.items() if message == f"Card of {commit[:8]}")
        card = hub.files("org/model", card_commit)["README.md"].decode()
        assert set(re.findall(r"[0-9a-f]{40}", re.sub(r"[0-9a-f]{64}", "", card))) == {commit}
        for name in CODE_FILES:
            assert f"| `{name}` | `{repository.commits[commit][name].sha256}` |" in card


def test_metadata_scores_and_message_are_those_of_the_options(hub, pushed):
    card_commit = next(c for c, m in hub.repositories["org/model"].messages.items() if m.startswith("Card of"))
    files = hub.files("org/model", card_commit)
    card, entries = (files[name].decode() for name in ("README.md", ".eval_results/pope.yaml"))
    assert "license: apache-2.0" in card and "language:\n- en" in card
    assert "| pope | f1 | 0.8125 | 9 |" in card
    assert "id: org/POPE" in entries


def test_license_is_kept_and_scores_of_other_weights_are_not(hub, pushed):
    card = hub.files("org/model")["README.md"].decode()
    assert "license: apache-2.0" in card and "language:\n- en" in card
    assert "| pope |" not in card


def test_command_reports_what_it_sends_and_that_the_result_is_equal(pushed):
    assert re.match(r"0: .*model.safetensors.index.json.*Not uploaded: .*optimizer.pt", pushed["output"])
    assert "Published, identical to the local files: http://127.0.0.1" in pushed["output"]


def test_weights_of_an_earlier_model_are_deleted_in_the_newest_commit(hub, pushed):
    with hub.online() as api, prepare(pushed["home"] / "lora", "org/model") as publication:
        assert "model.safetensors" in publication.files  # merged, in one file
        commit = publishing.upload(api, publication, branch="merged")
        files = hub.files("org/model", commit)
    assert {name for name in files if name.startswith("model")} == {"model.safetensors"} | {"modeling_sq_llava.py"}


def test_push_of_an_unchanged_model_changes_nothing(hub, pushed):
    before = dict(hub.repositories["org/secret"].branches)
    with hub.online() as api:
        commit = publish(api, pushed["home"] / "second", "org/secret", private=True)
    assert hub.repositories["org/secret"].branches == before
    assert commit in hub.repositories["org/secret"].commits


def test_push_that_was_interrupted_before_its_card_is_completed(hub, pushed):
    with hub.online() as api:
        publish(api, pushed["home"] / "first", "org/stopped")
        with prepare(pushed["home"] / "second", "org/stopped", api=api) as publication:
            uploaded = publishing.upload(api, publication)
        commit = publish(api, pushed["home"] / "second", "org/stopped")
        card = hub.files("org/stopped")["README.md"].decode()
        assert commit == uploaded
        assert set(publishing.PINNED.findall(card)) == {commit}
        assert publish(api, pushed["home"] / "second", "org/stopped") == commit


def test_commit_in_a_card_may_be_missing_on_the_hub(hub, pushed):
    with hub.online() as api:
        publish(api, pushed["home"] / "first", "org/rewritten")
        card = hub.files("org/rewritten")["README.md"]
        (named,) = set(publishing.PINNED.findall(card.decode()))
        elsewhere = card.replace(named.encode(), b"0" * 40)
        api.upload_file(path_or_fileobj=elsewhere, path_in_repo="README.md", repo_id="org/rewritten")
        head = hub.repositories["org/rewritten"].branches["main"]
        assert publish(api, pushed["home"] / "first", "org/rewritten") == head


def test_results_of_an_earlier_model_are_deleted(hub, pushed):
    entry = {"metric": "f1", "value": 0.5, "num": 9, "dataset_id": "org/POPE"}
    results = {"results": [{"task": "pope", **entry}, {"task": "gqa", **entry}]}

    def published(model, results):
        with prepare(pushed["home"] / model, "org/scores", api=api) as publication:
            publishing.publish_card(api, publication, publishing.upload(api, publication), results=results)
        return {name for name in hub.files("org/scores") if name.startswith(".eval_results/")}

    with hub.online() as api:
        both = {".eval_results/pope.yaml", ".eval_results/gqa.yaml"}
        assert published("first", results) == both
        assert published("first", None) == both
        assert published("first", {"results": results["results"][:1]}) == {".eval_results/pope.yaml"}
        assert published("second", None) == set()


def test_results_of_other_weights_are_refused(hub, pushed, monkeypatch):
    home = pushed["home"]
    scores = [{"task": "pope", "metric": "f1", "value": 0.8125, "num": 9}]
    results = home / "of_first.json"
    results.write_text(json.dumps({"model_hash": hash_of_model(str(home / "first")), "results": scores}))
    monkeypatch.setattr(publishing, "_load_fresh", lambda *arguments: None)
    options = ["org/new", "--dry-run", "--no-samples", "--eval-results", results]
    output = command_here(["push", home / "second", *options], hub)
    assert re.match(r"1: .*of_first.json: model_hash is \w{64}, but .*second has \w{64}\. The results belong", output)
    assert re.match(r"0: .*The model loads and answers\.", command_here(["push", home / "first", *options], hub))


def test_metadata_that_the_hub_refuses_ends_a_push_before_a_repository_is_made(hub, pushed, monkeypatch):
    monkeypatch.setattr(publishing, "check_loading", lambda *_: pytest.fail("loaded"))
    output = command_here(["push", pushed["home"] / "first", "org/unlicensed", "--license", "nonsense"], hub)
    assert re.match("1: .*wrong metadata", output)
    assert "org/unlicensed" not in hub.repositories


def test_file_that_was_changed_on_the_hub_is_found(hub, pushed):
    with hub.online() as api, prepare(pushed["home"] / "second", "org/secret") as publication:
        commit = publishing.upload(api, publication)
        name = next(name for name in publication.files if name.endswith("2.safetensors") or "-00002-" in name)
        sha256 = hub.repositories["org/secret"].commits[commit][name].sha256
        content = hub.contents[sha256]
        hub.contents[sha256] = content[:-1] + bytes([content[-1] ^ 1])
        try:
            with pytest.raises(ValueError, match=f"{name} differs from the file that was sent"):
                publishing.check_published(api, publication, commit)
        finally:
            hub.contents[sha256] = content


@pytest.mark.long
def test_adapter_is_compared_on_the_base_that_the_hub_has(hub, pushed, monkeypatch):
    home = pushed["home"]
    for name, value in {"HF_HOME": str(home / "hf_home"), **hub.environment("writer")}.items():
        monkeypatch.setenv(name, value)

    def compare(base: str) -> None:
        settings = {"adapter_only": True, "base_model": base}
        with hub.online() as api, prepare(home / "lora", "org/again", api=api, **settings) as publication:
            publishing.check_loading(publication)
            publishing.check_published(api, publication, publishing.upload(api, publication))

    with hub.online() as api:
        publish(api, home / "first", "org/other")
    with pytest.raises(ValueError, match=r"logits differ from the local ones by up to \S+ Does its base on the Hub"):
        compare("org/other")
    compare("org/model")


def test_code_of_a_base_on_the_hub_is_checked_before_it_is_run(hub, pushed, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in pushed["home"].glob("second/*.*"):
        if file.is_file():
            shutil.copy(file, base)
    append_code(base, "raise RuntimeError('the code has run')")
    hub.add("org/changed", base)
    settings = {"adapter_only": True, "base_model": "org/changed"}
    match = r"org/changed: .*modeling_sq_llava\.py differs from this library's code"
    with hub.online() as api, pytest.raises(ValueError, match=match):
        prepare(pushed["home"] / "lora", "org/again", api=api, **settings).__enter__()


def test_upload_that_differs_gets_no_card(hub, pushed, monkeypatch):
    def fail(api, publication, commit):
        raise ValueError("the logits differ")

    monkeypatch.setattr(publishing, "_load_fresh", lambda *arguments: None)
    monkeypatch.setattr(publishing, "check_published", fail)
    output = command_here(["push", pushed["home"] / "first", "org/differs", "--no-samples"], hub)
    assert re.match(r"1: .*the logits differ", output)
    assert "config.json" in hub.files("org/differs") and "README.md" not in hub.files("org/differs")


def test_adapter_names_the_commit_of_its_base_that_it_was_trained_on(hub, pushed, tmp_path, monkeypatch):
    shutil.copytree(pushed["home"] / "lora", tmp_path / "lora")
    trained_on = pushed["expected"]["commits"]["first"]
    edit_json(tmp_path / "lora" / "adapter_config.json", base_model_name_or_path="org/model", revision=trained_on)
    requests = []
    monkeypatch.setattr(publishing, "_load_fresh", lambda publication, name, request, *_: requests.append(request))
    monkeypatch.setattr(publishing, "load_file", lambda file: {})
    with (
        hub.online() as api,
        prepare(tmp_path / "lora", "org/pinned-lora", adapter_only=True, api=api) as publication,
    ):
        publishing.check_loading(publication)
        publishing.check_published(api, publication, publishing.upload(api, publication))
        newest = hub.repositories["org/model"].branches["main"]
    assert json.loads(hub.files("org/pinned-lora")["adapter_config.json"])["revision"] == trained_on
    assert [(request["base"], request["base_revision"]) for request in requests] == [("org/model", trained_on)] * 2
    assert f"The base is org/model at commit {trained_on}. Its newest commit is {newest}." in publication.notes


def test_dry_run_loads_the_model_and_sends_nothing(hub, pushed):
    before = len(hub.log)
    output = command(["push", pushed["home"] / "first", "org/new", "--dry-run"], hub, pushed["home"], token=None)
    assert re.match(
        r"0: .*model.safetensors.index.json.*Not uploaded: .*optimizer.pt.*The model loads and answers\.", output
    )
    assert hub.log[before:] == []


def test_library_reports_that_a_private_model_needs_a_token(hub, pushed):
    message = r"(?s)org/secret.* the Hub: .*Repository Not Found"
    with hub.online(""), pytest.raises(ValueError, match=message):
        load("org/secret")


@pytest.mark.parametrize(
    ("token", "repo_id", "private", "message"),
    [
        ("", "org/model", False, "You are not logged in to the Hub. Run `hf auth login`"),
        ("nonsense", "org/model", False, "You are not logged in to the Hub. Run `hf auth login`"),
        ("reader", "org/model", False, "The token can only read"),
        ("stranger", "org/model", False, "stranger may not write to org, only to stranger"),
        ("writer", "org/model", True, "org/model exists and is public"),
    ],
)
def test_missing_rights_are_reported_before_any_work(token, repo_id, private, message, hub, pushed):
    before = len(hub.log)
    with hub.online(token) as api, pytest.raises(ValueError, match=message):
        publishing.check_rights(api, repo_id, private)
    assert not any(path.endswith("/commit/main") or method == "PUT" for method, path in hub.log[before:])


@pytest.fixture(scope="module")
def results(hub, pushed, tmp_path_factory) -> dict[str, str]:
    """The traceback of each check of `hub_checks.py`, or "" if it passed."""
    folder = tmp_path_factory.mktemp("user")
    torch.save(pushed["expected"], folder / "expected.pt")
    for name in ("model", "lora"):
        (folder / f"{name}.md").write_bytes(hub.files(f"org/{name}")["README.md"])
    (folder / "image.png").write_bytes(hub.files("org/model")["image.png"])
    script = ROOT / "tests" / "hub_checks.py"
    user = process(["-P", script, folder], hub, folder, token=None)
    output, _ = user.communicate(timeout=300)
    assert user.returncode == 0, output
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_use_in_a_process_without_this_library(check, results):
    assert not results[check], results[check]
