"""Missing files and models are refused in one line, before the seconds that importing torch takes."""

import json
import subprocess
import sys

import pytest

from sq_llava.early_checks import require_device
from sq_llava.locations import find_config
from tests import ROOT, tiny


pytestmark = pytest.mark.slow

NO_MODEL = "nope: no such folder. Give a folder with a model, or a Hub id such as org/name."
CASES = {
    "ask a.png --model nope": NO_MODEL,
    "answer a.png Hi --model nope": NO_MODEL,
    "answer none.png Hi --model model": "none.png: no such image.",
    "answer text.png Hi --model model": "text.png: unknown image format, or a broken header",
    "answer a.png Hi --model empty": "empty has neither config.json nor adapter_config.json",
    "answer a.png Hi --model model --dtype half": "--dtype is 'half': give auto, float32, bfloat16 or float16.",
    "chat a.png --model nope": NO_MODEL,
    "chat none.png --model model": "none.png: no such image.",
    "serve nope": NO_MODEL,
    "demo nope": NO_MODEL,
    "prototypes a.png --out b.png --model nope": NO_MODEL,
    "prototypes a.png --out a.png --model model": "--out a.png is the input image",
    "prototypes a.png --out none/b.png --model model": "none: no such folder.",
    "evaluate --tasks pope --data empty --model nope": NO_MODEL,
    "evaluate --tasks pope --data none --model model": "--data none: no such folder",
    "evaluate --tasks pope --data empty --against none --model model": "none (--against): no such folder.",
    "evaluate-questions --images empty --model nope": NO_MODEL,
    "evaluate-questions --images none --model model": "none: no such folder or file.",
    "generate-data self empty --out out --model nope": NO_MODEL,
    "generate-data self none --out out --model model": "none: no such folder or file.",
    "generate-data curate empty --out out --describer nope": NO_MODEL,
    "generate-data curate none --out out --describer model": "none: no such folder.",
    "generate-data llava none.json --out out --model gpt": "The captions none.json: no such file.",
    "generate-data captions none.json --image-root . --out out --spacy-model en": "The captions none.json: no such",
    "generate-data prompts llava full": "full is not empty: give a new folder.",
    "merge nope --out out": "nope: no such folder.",
    "merge model --out full": "full is not empty: give a new folder.",
    "merge model --out a.png": "a.png is a file: give a new folder.",
    "push nope org/name": "nope: no such folder.",
    "push model org/name --eval-results none.json": "--eval-results none.json: no such file.",
    "inspect nope": NO_MODEL,
    "convert nope --out out": "nope (the source): no such folder.",
    "convert model --base nope --out out": "nope (--base): no such folder.",
    "convert model --out full": "full is not empty: give a new folder.",
    "convert model --out out --dtype int8": "--dtype is 'int8'",
    "doctor --config nope.yaml": "--config nope.yaml: no such file.",
    "doctor --config list.yaml": "--config list.yaml: contains '[1, 2]'. Write settings as",
}
RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from sq_llava.cli.main import app

for line in sys.stdin:
    result = CliRunner().invoke(app, line.split())
    large = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    print(json.dumps([result.exit_code, result.stdout, result.stderr, large]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list]:
    """The outcome of each command. All of them run in one process, in a folder with a few files."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("empty", "full", "model"):
        (folder / name).mkdir()
    (folder / "full" / "file").touch()
    (folder / "model" / "config.json").write_text("{}")
    tiny.picture().save(folder / "a.png")
    (folder / "text.png").write_text("no picture")
    (folder / "list.yaml").write_text("[1, 2]")
    (folder / "broken.yaml").write_text("stage: [align")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL], cwd=folder, input="\n".join(CASES), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", CASES)
def test_wrong_input_is_refused_at_once_in_one_line(outcomes, command):
    code, output, errors, large = outcomes[command]
    assert (code, output, large) == (1, "", [])
    assert errors.startswith(f"Error: {CASES[command]}") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["none.yaml"], "--config none.yaml: no such file."), ([], "--config needs the path of a recipe.")],
)
def test_training_refuses_a_missing_recipe_before_it_imports_torch(arguments, message, tmp_path):
    watch = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {}, "
    command = [sys.executable, "-c", f"{watch}'__main__')", str(ROOT / "train_sft.py"), "--config", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"Error: {message}\n")


@pytest.mark.parametrize("device", ["foo", "cuda:7", "cpu:1"])
def test_missing_device_is_refused_and_the_available_ones_are_named(device):
    with pytest.raises(ValueError, match=rf"device is '{device}', but this machine has only cpu"):
        require_device(device)


def test_model_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").touch()
    assert find_config("~/model") == tmp_path / "model" / "adapter_config.json"
