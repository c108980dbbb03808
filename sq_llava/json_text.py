"""Reads JSON that others wrote: errors are a `ValueError` that names the file.

>>> read_json(Path("config.json"))["model_type"]
"""

import json
from pathlib import Path
from typing import Any


# Largest JSON file of a model. The tokenizers with the largest vocabularies have about 35 MB.
MOST_BYTES = 2**28


def parse_json(text: str | bytes) -> Any:
    """
    Like `json.loads`.

    Raises:
        ValueError: if it is not JSON. `json.loads` raises a `RecursionError` for JSON that is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path) -> dict:
    """
    The fields of a JSON file of a model.

    Raises:
        ValueError: if it is cut off, damaged or very large, or does not hold an object.
    """
    if (num_bytes := file.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{file} has {num_bytes:,} bytes, which is too large for a file of settings.")
    try:
        fields = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {str(fields)[:40]!r}, not a JSON object. Download it again.")
    return fields


def read_json_if_there(file: Path) -> dict | None:
    return read_json(file) if file.is_file() else None
