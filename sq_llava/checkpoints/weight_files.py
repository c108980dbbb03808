"""Finds the weight files of a model, reads their headers, and maps their tensors into memory.

    >>> [header.name for file in find_weight_files(folder) for header in WeightFile(file).headers()]

It reads `.safetensors` and `.bin` files, and never runs code in a pickle. `sq_llava/checkpoints/weights.py` decides
which weight of the model a tensor becomes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import SafetensorError, safe_open

from sq_llava.json_text import read_json


if TYPE_CHECKING:
    import torch

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Torch's names for the dtypes of safetensors.
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
SAFETENSORS_NAMES = {f"torch.{ours}": name for name, ours in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Tensor:
    """The header of a tensor in a file; `dtype` as safetensors names it, such as `"BF16"`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class WeightFile:
    """
    The tensors of one `.bin` or `.safetensors` file by name. The file is mapped into memory: a tensor is only read
    when it is used.

    Raises:
        ValueError: if the file is missing, damaged or cut off, or holds anything other than tensors.
    """

    def __init__(self, file: Path):
        self.file = file
        self.mapped = _open_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self.mapped[name] if isinstance(self.mapped, dict) else self.mapped.get_tensor(name)

    def headers(self) -> list[Tensor]:
        if isinstance(self.mapped, dict):
            found = {
                name: (tensor.shape, SAFETENSORS_NAMES.get(str(tensor.dtype), str(tensor.dtype)))
                for name, tensor in self.mapped.items()
            }
        else:
            tensors = parse_local_safetensors_file_metadata(self.file).tensors
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        return [Tensor(self.file, name, tuple(shape), dtype) for name, (shape, dtype) in found.items()]


def read_headers(folder: Path) -> Iterator[Tensor]:
    """The headers of all weights of a model."""
    for file in find_weight_files(folder):
        yield from WeightFile(file).headers()


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """
    The weight files of a model, safetensors rather than pickles. With an index, these are all files that it lists,
    even if some are missing.
    """
    for index, single in zip(INDEXES, SINGLE_FILES):
        if (folder / index).is_file():
            return tuple(folder / name for name in sorted(set(read_weight_map(folder / index).values())))
        if (folder / single).is_file():
            return (folder / single,)
    return ()


def read_weight_map(index: Path) -> dict[str, str]:
    """
    The file of each tensor, from an index.

    Raises:
        ValueError: if the index lists no files, or a file outside its own folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index}: weight_map is {weight_map!r}, but must map each tensor to a file. Download it again."
        )
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(
                f"{index}: weight_map holds {name!r}, which is not a file in the same folder. Download it again."
            )
    return weight_map


def read_pickle(file: Path) -> dict[str, "torch.Tensor"]:
    """
    The tensors of a `.bin` file, mapped into memory and not read yet. No code in it is run.

    Raises:
        ValueError: if it holds anything other than tensors, or is cut off.
    """
    import torch  # takes seconds, and headers of safetensors do not need it

    state = load_plain(file)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{file} does not hold named tensors. Give the weights of a model.")
    return state


def load_plain(file: Path) -> Any:
    """
    The content of a file of `torch.save`: tensors, numbers, texts and containers of them. The tensors are mapped into
    memory and not read yet.

    Raises:
        ValueError: if it holds anything else, such as code, or is cut off.
    """
    import torch  # see `read_pickle`

    try:
        # Files of torch before 1.6 are not zip archives and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file.") from error
    except Exception as error:  # torch documents no common class for errors of damaged archives and pickles
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} was not loaded: it is damaged, or holds more than tensors, such as code that would be run "
            f"({type(error).__name__}: {reason}). Download it again from a source that you trust."
        ) from error


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _open_safetensors(file: Path):
    """Opens a file with `safe_open`, which also checks that it is not cut off. Errors name the file."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file.") from error
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}). Download it again.") from error
