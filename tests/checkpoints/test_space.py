"""The Space that `sq-llava push --space` publishes for a model, on a small Hub."""

import re
import runpy

import pytest
import yaml
from typer.testing import CliRunner

from sq_llava.checkpoints import push as publishing
from sq_llava.checkpoints.space import lay_out_space, what_the_space_needs
from sq_llava.cli.main import app
from sq_llava.page import layout
from sq_llava.resources import CODE_FILES
from tests import ROOT
from tests.checkpoints.published import write_model
from tests.local_hub import LocalHub


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "model"
    write_model(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A small Hub. Pushes to it do not load the model in other processes."""
    samples = {"answer": "A cat.", "questions": ["Why?"]}
    monkeypatch.setattr(publishing, "check_loading", lambda *_, with_samples: samples if with_samples else None)
    monkeypatch.setattr(publishing, "check_published", lambda *_: None)
    with LocalHub() as hub:
        yield hub


def push(hub: LocalHub, *arguments) -> str:
    """Runs the command. Returns exit code and output in one line."""
    with hub.online():
        result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    return f"{result.exit_code}: {' '.join(result.output.split())}"


def test_space_has_the_page_the_library_and_the_model_s_name(hub, model):
    output = push(hub, model, "org/name", "--space")
    assert re.match(rf"0: .*Published the Space, which is built now: {hub.url}/spaces/org/name", output), output
    assert "CPU basic" in output and "it fits" in output and "Secrets: none are needed" in output
    space = hub.repositories["spaces/org/name"]
    assert (space.sdk, space.private, space.variables) == ("gradio", False, {"MODEL": "org/name"})
    files = hub.files("spaces/org/name")
    for name in (*CODE_FILES, "sq_llava/page/layout.py", "sq_llava/page/photos/cat.jpg"):
        assert files[name] == (ROOT / name).read_bytes(), name
    for name in ("app.py", "requirements.txt"):
        assert files[name] == (ROOT / "space" / name).read_bytes(), name
    assert files["sq_llava/model_card.md"] == (ROOT / "model_card.md").read_bytes()
    assert not [name for name in files if "__pycache__" in name or "/recipes/" in name]
    _, metadata, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(metadata)["models"] == ["org/name"] and yaml.safe_load(metadata)["app_file"] == "app.py"
    card = hub.files("org/name")["README.md"].decode()
    (commit,) = set(re.findall(r'revision="(\w{40})"', card))
    assert f"at commit `{commit}`" in text
    assert "| its answer | A cat. |" in card and "| it asks | Why? |" in card


def test_files_of_an_earlier_version_are_deleted_and_the_owner_s_are_kept(hub, model):
    push(hub, model, "org/name", "--space", "--no-samples")
    assert "## Example" not in hub.files("org/name")["README.md"].decode()
    with hub.online() as api:
        for name in ("sq_llava/old.py", "notes.txt"):
            api.upload_file(path_or_fileobj=b"", path_in_repo=name, repo_id="org/name", repo_type="space")
    assert push(hub, model, "org/name", "--space").startswith("0: ")
    assert "notes.txt" in hub.files("spaces/org/name") and "sq_llava/old.py" not in hub.files("spaces/org/name")


def test_private_model_gets_a_private_space_that_needs_a_token(hub, model):
    output = push(hub, model, "org/name", "--space", "--private")
    assert "add HF_TOKEN, a token that can read it" in output
    assert hub.repositories["spaces/org/name"].private
    assert b"writer" not in hub.files("spaces/org/name")["README.md"]
    assert '"url": "image.png"' in hub.files("org/name")["README.md"].decode()  # a URL would need a token


def test_space_that_shows_something_else_ends_a_push_before_anything_is_sent(hub, model, monkeypatch):
    with hub.online() as api:
        api.create_repo("org/name", repo_type="space", space_sdk="gradio")
        api.upload_file(path_or_fileobj=b"", path_in_repo="app.py", repo_id="org/name", repo_type="space")
    output = push(hub, model, "org/name", "--space")
    assert re.match("1: .*The Space org/name exists and shows something else", output)
    assert "org/name" not in hub.repositories


def test_space_shows_the_main_branch(hub, model):
    output = push(hub, model, "org/name", "--space", "--revision", "candidate")
    assert re.match("1: .*--space shows the model of the branch main: remove --revision candidate", output)


def test_dry_run_lists_the_files_of_the_space_and_sends_nothing(hub, model):
    output = push(hub, model, "org/name", "--space", "--dry-run")
    assert re.match(r"0: .*To the Space org/name.* app.py .*modeling_sq_llava.py .*sq_llava/page/ ", output), output
    assert "Hardware: " in output and "Nothing was uploaded" in output
    assert not hub.log


def test_large_model_needs_other_hardware():
    hardware, _, settings = what_the_space_needs(14_000_000_000, False, "https://hub/settings")
    assert "14.0 GB: it does not fit" in hardware and settings.endswith("https://hub/settings")


def test_app_of_the_space_starts_the_page_of_its_model(tmp_path, monkeypatch):
    started = {}

    class Page:
        def launch(self, **settings):
            started["settings"] = settings

    lay_out_space(tmp_path / "space", "org/name")
    monkeypatch.setenv("MODEL", "org/name")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setattr("sq_llava.load", lambda model: model, raising=False)
    monkeypatch.setattr(layout, "create_page", lambda model: started.update(model=model) or Page())
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    assert started["model"] == "org/name" and started["settings"]["server_name"] == "0.0.0.0"
