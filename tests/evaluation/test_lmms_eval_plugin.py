"""The model for lmms-eval. Tests that run lmms-eval itself are skipped if it is not installed."""

import ast
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from tests import tiny
from tests.evaluation_layouts import stored, write_parquet
from tests.project.test_layout import ROOT, path_of


QUESTIONS = [
    "what is it?",
    "is the shape a red circle? " * 5,
    "what colour?",
    "is it a square?",
    "what animal is this?",
]


@pytest.fixture
def model(tmp_path) -> str:
    return tiny.save_model(tmp_path / "model")


def test_entry_point_leads_to_the_class(monkeypatch):
    @dataclass
    class Manifest:
        model_id: str
        chat_class_path: str

    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, attribute = entry_points["sq_llava"].split(":")
    manifest = run_path(str(path_of(module)))[attribute]
    assert manifest.model_id == "sq_llava"
    module, class_name = manifest.chat_class_path.rsplit(".", 1)
    tree = ast.parse(path_of(module).read_text())
    assert class_name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_lmms_eval_finds_the_class():
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    from sq_llava.evaluation.lmms_eval_model import SQLlava
    from sq_llava.evaluation.lmms_eval_plugin import MANIFEST

    registry.register_manifest(MANIFEST)
    assert registry.get_model_class("sq_llava") is SQLlava


def write_task(folder: Path) -> None:
    """A task of lmms-eval about images in a table."""
    rows = [{"question": text, "answer": "red", "image": stored(number)} for number, text in enumerate(QUESTIONS)]
    write_parquet(folder / "test.parquet", rows)
    task = {
        "task": "local",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 6, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False},
        "metric_list": [{"metric": "words", "aggregation": "mean", "higher_is_better": True}],
    }
    functions = "doc_to_visual: !function utils.picture\nprocess_results: !function utils.score\n"
    (folder / "local.yaml").write_text(yaml.safe_dump(task) + functions)
    (folder / "utils.py").write_text(
        "def picture(doc):\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def score(doc, results):\n    return {'words': float(len(results[0].split()))}\n"
    )


def test_lmms_eval_gets_the_answers_of_the_assistant(model, tmp_path, monkeypatch):
    evaluator = pytest.importorskip("lmms_eval.evaluator")
    from lmms_eval.tasks import TaskManager

    from sq_llava import load
    from sq_llava.evaluation.lmms_eval_model import SQLlava

    write_task(tmp_path / "task")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = evaluator.simple_evaluate(
        model=SQLlava(model, batch_size=2, device="cpu", dtype="float32"),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path / "task"), include_defaults=False),
        log_samples=True,
    )
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    assistant = load(model, device="cpu", dtype="float32")
    expected = [assistant.answer([stored(n)], text, max_new_tokens=6) for n, text in enumerate(QUESTIONS)]
    assert [sample["filtered_resps"][0] for sample in samples] == expected
    assert len(set(expected)) > 2
    assert results["results"]["local"]["words,none"] == sum(len(text.split()) for text in expected) / len(QUESTIONS)


def request_of(content: list[dict], **settings) -> SimpleNamespace:
    message = {"role": "user", "content": content}
    return SimpleNamespace(args=("", lambda document: [message], settings, 0, "task", "test"))


def test_answers_are_in_the_order_of_different_requests(model):
    pytest.importorskip("lmms_eval")
    from sq_llava.evaluation.lmms_eval_model import SQLlava

    ours = SQLlava(model, batch_size=4, device="cpu", dtype="float32", system_message="Be brief.")
    ours.task_dict = {"task": {"test": [None]}}
    picture = {"type": "image", "url": tiny.picture(1)}
    text = {"type": "text", "text": "what is it?"}
    requests = [request_of([picture, text], max_new_tokens=4), request_of([text], max_new_tokens=4)]
    requests += [request_of([picture, text], max_new_tokens=2, until=["\n\n"]), requests[0]]
    answers = ours.generate_until(requests)
    assert answers == [ours.generate_until([request])[0] for request in requests]
    assert answers[0] == answers[3] != answers[1]
    assert answers[0].startswith(answers[2]) and answers[0] != answers[2]
    with pytest.raises(ValueError, match="has video or audio"):
        ours.generate_until([request_of([{"type": "video", "url": "a.mp4"}])])


@pytest.mark.parametrize(
    "given, taken",
    [
        ({"temperature": 0, "top_p": 1.0, "until": ["."]}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "do_sample": True, "max_new_tokens": 5}, {"max_new_tokens": 5, "do_sample": False}),
        ({"num_beams": 3, "temperature": 0.7}, {"max_new_tokens": 1024, "do_sample": False, "num_beams": 3}),
        ({"do_sample": True, "top_k": 7, "top_p": None}, {"max_new_tokens": 1024, "do_sample": True, "top_k": 7}),
    ],
)
def test_settings_of_tasks_are_converted_for_generate(given, taken):
    pytest.importorskip("lmms_eval")
    from sq_llava.evaluation.lmms_eval_model import generation_settings

    assert generation_settings(given) == taken
    with pytest.raises(ValueError, match="best_of is not supported"):
        generation_settings({**given, "best_of": 3})
