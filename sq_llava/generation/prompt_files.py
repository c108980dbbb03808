"""Reads the files of prompts, which users can copy and edit: `sq-llava generate-data prompts METHOD NEW_FOLDER`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path


def read_prompt_file(path: Path, method: str) -> str:
    """
    The text of a file of prompts.

    Args:
        path (`Path`): The file.
        method (`str`): llava, captions, curate or self. The error message names it.

    Raises:
        ValueError: If the file is missing or empty.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text.strip():
        raise ValueError(
            f"{path}: the file is missing or empty. Copy the library's prompts with: "
            f"sq-llava generate-data prompts {method} NEW_FOLDER"
        )
    return text


def read_instructions(path: Path, method: str = "captions") -> list[str]:
    """
    The lines of a file, without empty lines and comments (`#`).

    Raises:
        ValueError: If no line is left.
    """
    lines = [line.strip() for line in read_prompt_file(path, method).splitlines()]
    instructions = [line for line in lines if line and not line.startswith("#")]
    if not instructions:
        raise ValueError(f"{path}: holds no instruction. Write one per line.")
    return instructions


def draw(instructions: Sequence[str], seed: int, id: str) -> str:
    """The instruction of a row. It depends only on the seed and the row's id."""
    return instructions[hash_of(f"{seed} {id}") % len(instructions)]


def hash_of(text: str) -> int:
    """A hash of 64 bits. Among some million texts, the chance of two equal hashes is about one in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
