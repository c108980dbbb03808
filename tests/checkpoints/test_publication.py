"""Preparing a push, without a Hub: the files that are published, and the folders that are refused."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from sq_llava import load
from sq_llava.checkpoints import push as publishing
from sq_llava.checkpoints.provenance import write_provenance
from sq_llava.checkpoints.publication import prepare
from sq_llava.resources import CODE_FILES
from tests import tiny
from tests.checkpoints.published import append_code, write_adapter, write_model
from tests.released import edit_json


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A model, and an adapter on it."""
    root = tmp_path_factory.mktemp("written")
    write_model(root / "model")
    write_adapter(root / "model", root / "lora")
    return root


@pytest.fixture
def model(written, tmp_path) -> Path:
    return Path(shutil.copytree(written / "model", tmp_path / "model"))


def test_a_push_needs_room_for_the_download_and_a_dry_run_does_not(written, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with prepare(written / "model", "org/new") as publication:
        assert publication.size > 1000
    with (
        pytest.raises(ValueError, match="Free some space, or set the variable TMPDIR"),
        prepare(written / "model", "org/new", api=HfApi()),
    ):
        pass


@pytest.mark.parametrize("is_base", [False, True], ids=["model", "base of an adapter"])
def test_changed_code_is_refused(is_base, written, model, tmp_path):
    append_code(model, "# mine")
    source, settings = model, {}
    if is_base:
        source, settings = tmp_path / "lora", {"adapter_only": True, "base_model": "org/model"}
        shutil.copytree(written / "lora", source)
        edit_json(source / "adapter_config.json", base_model_name_or_path=str(model))
    match = r"model/modeling_sq_llava.py differs from this library's code.* give --trust-remote-code"
    with pytest.raises(ValueError, match=match), prepare(source, "org/new", **settings):
        pass
    with prepare(source, "org/new", **settings, trust_remote_code=True) as publication:
        assert publication.files


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("module", ["folder/module", "org/name--module", "module"])
def test_folder_that_names_other_code_is_refused_before_it_runs(file, module, model, tmp_path):
    for place in (model, model / "folder"):
        place.mkdir(exist_ok=True)
        (place / "module.py").write_text(f"open({str(tmp_path / 'code_ran')!r}, 'w').close()\n")
    name = f"{module}.Class"
    edit_json(model / file, auto_map={"AutoConfig": name, "AutoTokenizer": [name, name], "AutoProcessor": name})
    match = rf"{file}: auto_map, AutoConfig is '{module}.Class'; .*, AutoTokenizer is .*, AutoProcessor is"
    with pytest.raises(ValueError, match=match), prepare(model, "org/x"):
        pass
    assert not (tmp_path / "code_ran").exists()


def test_base_of_an_adapter_that_names_other_code_is_refused(written, model, tmp_path):
    source = Path(shutil.copytree(written / "lora", tmp_path / "lora"))
    edit_json(source / "adapter_config.json", base_model_name_or_path=str(model))
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").touch()
    settings = {"adapter_only": True, "base_model": "org/model"}
    with pytest.raises(ValueError, match=r"model: custom_generate/generate\.py"), prepare(source, "org/x", **settings):
        pass
    with prepare(source, "org/x", **settings, trust_remote_code=True) as publication:
        assert publication.files


@pytest.mark.long
def test_code_that_is_run_before_the_upload_gets_no_token(model, monkeypatch):
    names = "[name for name in os.environ if name.endswith(('HF_TOKEN', 'HUB_TOKEN'))]"
    append_code(model, f"import os\nassert not {names}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "secret")
    with prepare(model, "org/new", trust_remote_code=True) as publication:
        publishing.check_loading(publication)


@pytest.mark.long
def test_folder_that_others_cannot_load_is_not_uploaded(model):
    (model / "configuration_sq_llava.py").unlink()
    match = r"org/broken cannot be loaded; nothing was uploaded: .*configuration_sq_llava"
    with prepare(model, "org/broken") as publication, pytest.raises(ValueError, match=match):
        publishing.check_loading(publication)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "model"}, r"'model' \(the repository\) is not a Hub id such as org/name"),
        ({"repo_id": "org/model", "adapter_only": True}, r"is not an adapter\. Remove --adapter-only"),
        ({"repo_id": "org/model", "base_model": "org/base"}, "--base-model is org/base, but it needs --adapter-only"),
        (
            {"repo_id": "org/model", "source": "lora", "adapter_only": True},
            "a folder on this machine. Push that folder",
        ),
    ],
)
def test_wrong_requests_are_refused(settings, message, written):
    source = written / settings.pop("source", "model")
    with pytest.raises(ValueError, match=message), prepare(source, **settings):
        pass


def test_local_path_in_a_configuration_is_refused(model):
    stage = {"stage": "align", "rows": 1, "steps": 1, "settings": {}, "versions": {}}
    write_provenance(model, {"stages": [stage | {"data": [{"path": "/data/mine/train.json"}]}]})
    match = r"provenance.yaml, stages, data, path is /data/mine/train.json, a path on this machine"
    with pytest.raises(ValueError, match=match), prepare(model, "org/model"):
        pass


def test_library_runs_no_code_of_a_folder(model, tmp_path):
    for name in CODE_FILES:
        append_code(model, f"open({str(tmp_path / 'code_ran')!r}, 'w').close()", name)
    assert load(str(model), device="cpu").answer(tiny.picture(), "What?", max_new_tokens=1) is not None
    assert not (tmp_path / "code_ran").exists()
