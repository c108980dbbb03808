"""Fixtures of the training tests."""

from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """Models and data of a run: a CLIP, a Llama, and 16 rows, every third of them text-only."""
    return import_module("tests.runs").make_parts(tmp_path_factory.mktemp("parts"))
