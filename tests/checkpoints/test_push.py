"""What is pushed, and that others can load it: by the command, to a small Hub, and from it in fresh processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from typer.testing import CliRunner

from sq_llava import load
from sq_llava.checkpoints import push as publishing
from sq_llava.checkpoints.load import load_checkpoint
from sq_llava.checkpoints.provenance import write_provenance
from sq_llava.checkpoints.publication import prepare
from sq_llava.cli.main import app
from sq_llava.evaluation.results import hash_of_model
from sq_llava.resources import CODE_FILES
from sq_llava.training.adapter import LoraSize, add_adapter
from tests import ROOT, tiny
from tests.hub_checks import CHECKS
from tests.local_hub import LocalHub
from tests.warm_python import warm_python


pytestmark = pytest.mark.slow

# What lies about in the folders of people, and is nobody else's business.
NOT_PUBLISHED = (
    "optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "token", ".env", "run.log",
    "pytorch_model.bin", "notes.py",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm_loads():
    """Also those that the library starts in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python())
        yield


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


def process(arguments: list, hub: LocalHub, home: Path, token: str | None = "writer") -> subprocess.Popen:
    """A fresh process for which the small Hub is the Hub."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    # What a killed process leaves behind lies among the test's own files.
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
    """Runs `sq-llava` to its end; its output on one line."""
    running = process(["-m", "sq_llava", *arguments], hub, home, token)
    output = " ".join(running.communicate(timeout=300)[0].split())
    return f"{running.returncode}: {output}"


@contextmanager
def online(hub: LocalHub, token: str = "writer"):
    """The Hub's client in this process, which tests keep offline; `""` for no token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
        patch.setenv("HF_TOKEN", token)
        yield HfApi(endpoint=hub.url)


def command_here(arguments: list, hub: LocalHub) -> str:
    """As [`command`], in this process."""
    with online(hub):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return f"{result.exit_code}: {' '.join(result.output.split())}"


def write_model(folder: Path, seed: int) -> torch.Tensor:
    """A checkpoint in several files, with what does not belong on the Hub; returns its logits of `INPUTS`."""
    processor = tiny.tiny_processor()
    model = tiny.tiny_model(
        tiny.tiny_config(image_token_id=processor.image_token_id, vusr_token_id=processor.vusr_token_id), seed
    )
    model.generation_config.update(eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=0)
    model.config.text_config.name_or_path = "/home/somebody/models/llama"
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    write_provenance(folder, {"converted_from": "org/source"})
    for name in NOT_PUBLISHED:
        (folder / name).write_text("secret")
    for name in ("checkpoint-5", "runs"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "model.safetensors").write_text("secret")
    return logits_of(model)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**INPUTS).logits


INPUTS = tiny.tiny_inputs(tiny.tiny_config(image_token_id=tiny.tiny_processor().image_token_id))


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict:
    """
    org/model: pushed by a process that is killed, once more to its end, then with other weights; org/lora, a stage's
    output for PEFT. What the commands said, and what their models give.
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
    with online(hub) as api:
        publish(api, first, "org/model", branch="candidate")
        publish(api, second, "org/model")
        publish(api, second, "org/secret", private=True)

    expected["adapted"] = write_adapter(second, lora)
    with online(hub) as api:
        publish(api, lora, "org/lora", adapter_only=True, base_model="org/model")
    messages = hub.repositories["org/model"].messages
    commits = [commit for commit, message in messages.items() if message in ("First model", "Upload model")]
    expected["commits"] = dict(zip(("first", "second"), commits, strict=True))
    return {"home": home, "before": before, "log": log, "output": output, "expected": expected}


def publish(
    api: HfApi, folder: Path, repo_id: str, branch: str | None = None, private: bool = False, **settings
) -> str:
    """As the command, without the processes that load it."""
    publishing.check_rights(api, repo_id, private)
    with prepare(folder, repo_id, api=api, **settings) as publication:
        commit = publishing.upload(api, publication, private, branch)
        publishing.publish_card(api, publication, commit, branch)
    return commit


def write_adapter(base: Path, folder: Path) -> torch.Tensor:
    """The output of a training stage with random weights; returns its logits of `INPUTS`."""
    model, processor = load_checkpoint(str(base))
    peft_model = add_adapter(model, LoraSize(2, 4, 0.0), LoraSize(4, 8, 0.0), train_vusr=True)
    torch.manual_seed(2)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return logits_of(load_checkpoint(str(folder))[0].eval())


def test_first_push_goes_on_where_a_killed_one_stopped(hub, pushed):
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
    needed = {"config.json", "model.safetensors.index.json", "provenance.yaml", *CODE_FILES}
    assert needed <= hub.files("org/model").keys()
    assert "config.json" not in hub.files("org/lora")


def test_code_on_the_hub_is_this_sources_code(hub, pushed):
    for name in CODE_FILES:
        assert hub.files("org/model")[name] == (ROOT / name).read_bytes()


def test_card_names_the_commit_before_it_and_the_hashes_of_the_code(hub, pushed):
    repository = hub.repositories["org/model"]
    for commit in pushed["expected"]["commits"].values():
        card_commit = next(c for c, message in repository.messages.items() if message == f"Card of {commit[:8]}")
        card = hub.files("org/model", card_commit)["README.md"].decode()
        assert set(re.findall(r"[0-9a-f]{40}", re.sub(r"[0-9a-f]{64}", "", card))) == {commit}
        for name in CODE_FILES:
            assert f"| `{name}` | `{repository.commits[commit][name].sha256}` |" in card


def test_metadata_scores_and_message_are_the_owners(hub, pushed):
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


def test_command_says_what_it_sends_and_that_it_came_back_equal(pushed):
    assert re.match(r"0: .*model.safetensors.index.json.*Stays here: .*optimizer.pt", pushed["output"])
    assert "Published, identical to the local files: http://127.0.0.1" in pushed["output"]


def test_weights_of_the_model_before_are_gone_from_the_newest_commit(hub, pushed):
    with online(hub) as api, prepare(pushed["home"] / "lora", "org/model") as publication:
        assert "model.safetensors" in publication.files  # merged, in one file
        commit = publishing.upload(api, publication, branch="merged")
        files = hub.files("org/model", commit)
    assert {name for name in files if name.startswith("model")} == {"model.safetensors"} | {"modeling_sq_llava.py"}


def test_push_of_what_is_there_already_changes_nothing(hub, pushed):
    before = dict(hub.repositories["org/secret"].branches)
    with online(hub) as api:
        commit = publish(api, pushed["home"] / "second", "org/secret", private=True)
    assert hub.repositories["org/secret"].branches == before
    assert commit in hub.repositories["org/secret"].commits


def test_second_push_that_was_stopped_before_its_card_is_finished(hub, pushed):
    with online(hub) as api:
        publish(api, pushed["home"] / "first", "org/stopped")
        with prepare(pushed["home"] / "second", "org/stopped", api=api) as publication:
            uploaded = publishing.upload(api, publication)
        commit = publish(api, pushed["home"] / "second", "org/stopped")
        card = hub.files("org/stopped")["README.md"].decode()
        assert commit == uploaded
        assert set(publishing.PINNED.findall(card)) == {commit}
        assert publish(api, pushed["home"] / "second", "org/stopped") == commit


def test_commit_that_a_card_names_need_not_be_there(hub, pushed):
    with online(hub) as api:
        publish(api, pushed["home"] / "first", "org/rewritten")
        card = hub.files("org/rewritten")["README.md"]
        (named,) = set(publishing.PINNED.findall(card.decode()))
        elsewhere = card.replace(named.encode(), b"0" * 40)
        api.upload_file(path_or_fileobj=elsewhere, path_in_repo="README.md", repo_id="org/rewritten")
        head = hub.repositories["org/rewritten"].branches["main"]
        assert publish(api, pushed["home"] / "first", "org/rewritten") == head


def test_results_of_the_model_before_do_not_stay(hub, pushed):
    entry = {"metric": "f1", "value": 0.5, "num": 9, "dataset_id": "org/POPE"}
    results = {"results": [{"task": "pope", **entry}, {"task": "gqa", **entry}]}

    def published(model, results):
        with prepare(pushed["home"] / model, "org/scores", api=api) as publication:
            publishing.publish_card(api, publication, publishing.upload(api, publication), results=results)
        return {name for name in hub.files("org/scores") if name.startswith(".eval_results/")}

    with online(hub) as api:
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
    options = ["org/new", "--dry-run", "--eval-results", results]
    output = command_here(["push", home / "second", *options], hub)
    assert re.match(r"1: .*of_first.json: model_hash is \w{64}, but .*second has \w{64}\. The results belong", output)
    assert re.match(r"0: .*The model loads and answers\.", command_here(["push", home / "first", *options], hub))


def test_metadata_that_the_hub_refuses_end_a_push_before_a_repository_is_made(hub, pushed, monkeypatch):
    monkeypatch.setattr(publishing, "check_loading", lambda *_: pytest.fail("loaded"))
    output = command_here(["push", pushed["home"] / "first", "org/unlicensed", "--license", "nonsense"], hub)
    assert re.match("1: .*wrong metadata", output)
    assert "org/unlicensed" not in hub.repositories


def test_file_that_was_changed_on_the_hub_is_found(hub, pushed):
    with online(hub) as api, prepare(pushed["home"] / "second", "org/secret") as publication:
        commit = publishing.upload(api, publication)
        name = next(name for name in publication.files if name.endswith("2.safetensors") or "-00002-" in name)
        sha256 = hub.repositories["org/secret"].commits[commit][name].sha256
        content = hub.contents[sha256]
        hub.contents[sha256] = content[:-1] + bytes([content[-1] ^ 1])
        try:
            with pytest.raises(ValueError, match=f"{name} came back other than it was sent"):
                publishing.check_published(api, publication, commit)
        finally:
            hub.contents[sha256] = content


def test_adapter_is_compared_on_the_base_that_the_hub_has(hub, pushed, monkeypatch):
    home = pushed["home"]
    for name, value in {"HF_HOME": str(home / "hf_home"), **hub.environment("writer")}.items():
        monkeypatch.setenv(name, value)

    def compare(base: str) -> None:
        settings = {"adapter_only": True, "base_model": base}
        with online(hub) as api, prepare(home / "lora", "org/again", api=api, **settings) as publication:
            publishing.check_loading(publication)
            publishing.check_published(api, publication, publishing.upload(api, publication))

    with online(hub) as api:
        publish(api, home / "first", "org/other")
    with pytest.raises(
        ValueError, match=r"logits differ from those here by up to \S+: is the base on the Hub another"
    ):
        compare("org/other")
    compare("org/model")


def test_what_came_back_other_than_it_was_sent_gets_no_card(hub, pushed, monkeypatch):
    def fail(api, publication, commit):
        raise ValueError("the logits differ")

    monkeypatch.setattr(publishing, "_load_fresh", lambda *arguments: None)
    monkeypatch.setattr(publishing, "check_published", fail)
    output = command_here(["push", pushed["home"] / "first", "org/differs"], hub)
    assert re.match(r"1: .*the logits differ", output)
    assert "config.json" in hub.files("org/differs") and "README.md" not in hub.files("org/differs")


def test_adapter_names_the_commit_of_its_base_that_it_was_trained_on(hub, pushed, tmp_path, monkeypatch):
    shutil.copytree(pushed["home"] / "lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    trained_on = pushed["expected"]["commits"]["first"]
    config = {**json.loads(file.read_text()), "base_model_name_or_path": "org/model", "revision": trained_on}
    file.write_text(json.dumps(config))
    requests = []
    monkeypatch.setattr(publishing, "_load_fresh", lambda publication, name, request, *_: requests.append(request))
    monkeypatch.setattr(publishing, "load_file", lambda file: {})
    with (
        online(hub) as api,
        prepare(tmp_path / "lora", "org/pinned-lora", adapter_only=True, api=api) as publication,
    ):
        publishing.check_loading(publication)
        publishing.check_published(api, publication, publishing.upload(api, publication))
        newest = hub.repositories["org/model"].branches["main"]
    assert json.loads(hub.files("org/pinned-lora")["adapter_config.json"])["revision"] == trained_on
    assert [(request["base"], request["base_revision"]) for request in requests] == [("org/model", trained_on)] * 2
    assert f"The base is org/model as of {trained_on}; the newest commit is {newest}." in publication.notes


def test_only_what_is_fetched_needs_room(hub, pushed, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with prepare(pushed["home"] / "first", "org/new") as publication:
        assert publication.size > 1000
    with (
        online(hub) as api,
        pytest.raises(ValueError, match="make room, or let the variable TMPDIR"),
        prepare(pushed["home"] / "first", "org/new", api=api),
    ):
        pass


@pytest.mark.parametrize("is_base", [False, True], ids=["model", "base of an adapter"])
def test_other_code_than_this_librarys_is_refused(is_base, pushed, tmp_path):
    shutil.copytree(pushed["home"] / "second", tmp_path / "model")
    with (tmp_path / "model" / "modeling_sq_llava.py").open("a") as file:
        file.write("# mine")
    source, settings = tmp_path / "model", {}
    if is_base:
        source, settings = tmp_path / "lora", {"adapter_only": True, "base_model": "org/model"}
        shutil.copytree(pushed["home"] / "lora", source)
        config = json.loads((source / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "model")
        (source / "adapter_config.json").write_text(json.dumps(config))
    match = r"model/modeling_sq_llava.py is other code than this library's.* give --trust-remote-code"
    with pytest.raises(ValueError, match=match), prepare(source, "org/new", **settings):
        pass
    with prepare(source, "org/new", **settings, trust_remote_code=True) as publication:
        assert publication.files


def test_code_that_is_loaded_before_the_upload_gets_no_token(pushed, tmp_path, monkeypatch):
    shutil.copytree(pushed["home"] / "first", tmp_path / "model")
    with (tmp_path / "model" / "modeling_sq_llava.py").open("a") as file:
        file.write(
            "\nimport os\nassert not [name for name in os.environ if name.endswith(('HF_TOKEN', 'HUB_TOKEN'))]\n"
        )
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "secret")
    with prepare(tmp_path / "model", "org/new", trust_remote_code=True) as publication:
        publishing.check_loading(publication)


def test_dry_run_loads_the_model_and_sends_nothing(hub, pushed):
    before = len(hub.log)
    output = command(["push", pushed["home"] / "first", "org/new", "--dry-run"], hub, pushed["home"], token=None)
    assert re.match(
        r"0: .*model.safetensors.index.json.*Stays here: .*optimizer.pt.*The model loads and answers\.", output
    )
    assert hub.log[before:] == []


def test_folder_that_others_cannot_load_is_not_uploaded(pushed, tmp_path):
    broken = tmp_path / "broken"
    write_model(broken, 0)
    (broken / "configuration_sq_llava.py").unlink()
    with (
        prepare(broken, "org/broken") as publication,
        pytest.raises(ValueError, match=r"org/broken does not load, before any upload: .*configuration_sq_llava"),
    ):
        publishing.check_loading(publication)


def test_library_says_that_a_private_model_needs_a_token(hub, pushed):
    message = "(?s)org/secret: not in the cache, and could not be downloaded from the Hub: .*Repository Not Found"
    with online(hub, token=""), pytest.raises(ValueError, match=message):
        load("org/secret")


@pytest.mark.parametrize(
    ("token", "repo_id", "private", "message"),
    [
        ("", "org/model", False, "does not know who you are; `hf auth login`"),
        ("nonsense", "org/model", False, "does not know who you are; `hf auth login`"),
        ("reader", "org/model", False, "The token can only read"),
        ("stranger", "org/model", False, "stranger may not write to org, only to stranger"),
        ("writer", "org/model", True, "org/model is there and public"),
    ],
)
def test_missing_rights_are_said_before_any_work(token, repo_id, private, message, hub, pushed):
    before = len(hub.log)
    with online(hub, token) as api, pytest.raises(ValueError, match=message):
        publishing.check_rights(api, repo_id, private)
    assert not any(path.endswith("/commit/main") or method == "PUT" for method, path in hub.log[before:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "model"}, r"'model' \(the repository\) is no Hub id such as org/name"),
        ({"repo_id": "org/model", "adapter_only": True}, "is no adapter: leave --adapter-only out"),
        ({"repo_id": "org/model", "base_model": "org/base"}, "--base-model is org/base: it goes with --adapter-only"),
        (
            {"repo_id": "org/model", "source": "lora", "adapter_only": True},
            "a folder of this machine. Push that folder",
        ),
    ],
)
def test_wrong_requests_are_refused(settings, message, pushed):
    source = pushed["home"] / settings.pop("source", "first")
    with pytest.raises(ValueError, match=message), prepare(source, **settings):
        pass


def test_path_of_this_machine_in_a_configuration_is_refused(tmp_path):
    write_model(tmp_path / "model", 0)
    write_provenance(tmp_path / "model", {"stages": [{"data": [{"path": "/data/mine/train.json"}]}]})
    match = r"provenance.yaml, stages, data, path is /data/mine/train.json, a path of this machine"
    with pytest.raises(ValueError, match=match), prepare(tmp_path / "model", "org/model"):
        pass


def test_library_runs_no_code_of_a_folder(tmp_path):
    write_model(tmp_path / "model", 0)
    for name in CODE_FILES:
        with (tmp_path / "model" / name).open("a") as file:
            file.write(f"\nopen({str(tmp_path / 'code_ran')!r}, 'w').close()\n")
    assert load(str(tmp_path / "model"), device="cpu").answer(tiny.picture(), "What?", max_new_tokens=1) is not None
    assert not (tmp_path / "code_ran").exists()


@pytest.fixture(scope="module")
def results(hub, pushed, tmp_path_factory) -> dict[str, str]:
    """Traceback of each check of `hub_checks.py`, "" where it passed."""
    folder = tmp_path_factory.mktemp("stranger")
    torch.save(pushed["expected"], folder / "expected.pt")
    for name in ("model", "lora"):
        (folder / f"{name}.md").write_bytes(hub.files(f"org/{name}")["README.md"])
    (folder / "image.png").write_bytes(hub.files("org/model")["image.png"])
    script = ROOT / "tests" / "hub_checks.py"
    stranger = process(["-P", script, folder], hub, folder, token=None)
    output, _ = stranger.communicate(timeout=300)
    assert stranger.returncode == 0, output
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_stranger_in_a_fresh_process(check, results):
    assert not results[check], results[check]
