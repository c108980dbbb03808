"""What the code of a checkpoint may depend on. What the packages may import of one another: `make lint`."""

import ast
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# What travels with each checkpoint.
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


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("sq_llava/**/*.py"), *ROOT.glob("demo/*.py")])
def test_module_says_what_it_does(file):
    assert ast.get_docstring(ast.parse(file.read_text())), f"{file.name} has no docstring"
