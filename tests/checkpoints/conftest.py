"""Fixtures for the tests of checkpoints."""

from pathlib import Path

import pytest

from tests import released


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    """Language models (`base`, `tied`, `llava-base`) and vision towers (`clip`, `tower`) for released checkpoints."""
    root = tmp_path_factory.mktemp("parts")
    released.write_language_model(root / "base")
    released.write_language_model(root / "tied", tie_word_embeddings=True, tokenizer="fast_only", safetensors=True)
    released.write_language_model(root / "llava-base", llava=True)
    released.write_clip(root / "clip")
    released.write_clip(root / "tower", whole=False, safetensors=True)
    return root


@pytest.fixture
def lora(parts, tmp_path) -> Path:
    """A LoRA release on `base` and `clip`."""
    return released.write_sq_llava_lora(tmp_path / "source", base=parts / "base", vision=parts / "clip")


@pytest.fixture
def llava(parts, tmp_path) -> Path:
    """A complete LLaVA of the original code, which names `clip` as its tower."""
    return released.write_llava(tmp_path / "source", vision=parts / "clip")


@pytest.fixture
def llava_hf(tmp_path) -> Path:
    """A LLaVA in the format of transformers."""
    return released.write_llava_hf(tmp_path / "source")
