"""The imports of a checkpoint's code, and the functions that docs/architecture.md names.

`make lint` checks what the packages may import from each other.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests import ROOT


# The files that are saved with each checkpoint.
HUB_CODE = ["configuration_sq_llava", "image_processing_sq_llava", "processing_sq_llava", "modeling_sq_llava"]


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imports(module: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", HUB_CODE)
def test_code_of_a_checkpoint_needs_only_torch_transformers_and_pil(module):
    allowed = {"torch", "transformers", "PIL", *HUB_CODE, *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(module)} <= allowed


LIBRARY = [
    *(path_of(module) for module in HUB_CODE),
    *ROOT.glob("sq_llava/**/*.py"),
    *ROOT.glob("demo/*.py"),
    *ROOT.glob("benchmarks/*.py"),
    *ROOT.glob("examples/**/*.py"),
    ROOT / "train_sft.py",
]


def calls_in(file: Path):
    """The methods that a file calls or passes on: the name before the dot, the method, and the keywords."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            words = calls[id(node)].keywords if id(node) in calls else []  # a method that is passed on has none
            yield ast.unparse(node.value), node.attr, {word.arg: word.value for word in words}


def test_each_load_says_that_no_code_of_a_model_or_of_a_pickle_is_run():
    """Without `trust_remote_code`, auto classes ask on the terminal. SQLlavaProcessor itself says it for its parts."""
    found = {}
    for file in LIBRARY:
        for name, method, keywords in calls_in(file):
            is_auto = name.startswith("Auto") or (name.endswith("Processor") and name != "SQLlavaProcessor")
            if is_auto and method in ("from_pretrained", "from_config"):
                value = ast.unparse(keywords["trust_remote_code"]) if "trust_remote_code" in keywords else "not said"
                found.setdefault(value, set()).add(file.name)
            if (name, method) == ("torch", "load"):
                assert ast.unparse(keywords["weights_only"]) == "True", file
            # Our own unpickler accepts only an index of shards.
            assert (name, method) not in (
                ("pickle", "load"),
                ("pickle", "loads"),
                ("dill", "load"),
                ("joblib", "load"),
            )
    # The process that checks a push, and other models in `sq-llava evaluate --trust-remote-code`.
    assert found.pop("True") == {"fresh_load.py"} and found.pop("trust_remote_code") == {"other_models.py"}
    assert found.keys() == {"False"} and "compose.py" in found["False"]


def test_reading_a_recipe_needs_no_model_no_peft_and_no_doctor():
    """Only modules of this project are followed: TRL imports PEFT itself."""
    reached, waiting = set(), ["sq_llava.training.settings"]
    while waiting:
        module = waiting.pop()
        if module not in reached and path_of(module).is_file():
            reached.add(module)
            waiting += imports(module)
    heavy = ("modeling_sq_llava", "sq_llava.checkpoints", "sq_llava.doctor", "sq_llava.training.adapter")
    assert "sq_llava.data.sources" in reached
    assert not [module for module in reached if module.startswith(heavy) or "peft" in imports(module)]


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("sq_llava/**/*.py"), *ROOT.glob("demo/*.py")])
def test_module_says_what_it_does(file):
    assert ast.get_docstring(ast.parse(file.read_text())), f"{file.name} has no docstring"


@pytest.mark.parametrize("page", ["architecture", "security"])
def test_functions_and_tests_on_a_page_are_where_it_says(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    found = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", text)
    assert len(found) > 20
    for name, file in found:
        body = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            inner = [node.body for node in body if getattr(node, "name", None) == part]
            assert inner, f"{file} has no {name}"
            body = inner[0]
