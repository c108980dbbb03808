"""What a command refuses at once: it imports neither torch nor transformers, whose import takes seconds.

    require_model("nope")                  # nope: no such folder. Give one with a model, or a Hub id such as org/name.
    require_new_folder(Path("full"))       # full is not empty: give a new folder.

What it does not do: read weights or data. The library checks those when it opens them.
"""

import os
import warnings
from pathlib import Path

from sq_llava.locations import find_config, require_folder_or_id


DTYPES = ("float32", "bfloat16", "float16")
# The files that a folder of images is taken to hold.
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def require_model(model: str, revision: str | None = None) -> str:
    """
    Returns the folder or the Hub id of a model.

    Raises:
        ValueError: if there is no such folder, it holds no model, or the Hub has no such model.
    """
    find_config(model, revision)
    return str(require_folder_or_id(model) or model)


def require_folder(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if there is no such folder.
    """
    if not Path(folder).expanduser().is_dir():
        raise ValueError(f"{folder}: no such folder.")


def require_file(path: str | os.PathLike, role: str) -> None:
    """
    Raises:
        ValueError: if there is no such file.
    """
    if not Path(path).expanduser().is_file():
        raise ValueError(f"{role} {path}: no such file.")


def require_image(path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if there is no such file, or no header of an image in it. Pixels are decoded when it is opened.
    """
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such image.")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path):
            pass
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: is of no known image format, or its header is broken. Save it anew as PNG or JPEG."
        ) from error


def find_images(paths: list[Path]) -> list[Path]:
    """
    The files of `paths`, and the images in its folders, sorted by name.

    Raises:
        ValueError: for a path that is not there, a folder without an image, or a file that is no image.
    """
    found = []
    for path in paths:
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise ValueError(f"{path} is a folder without images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            found += images
        else:
            found.append(path)
    for file in found:
        require_image(file)
    return found


def require_recipe(path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if there is no such file, or it holds no settings in YAML.
    """
    require_file(path, "--config")
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: holds {str(settings)[:40]!r}, not settings (name: value).")


def require_recipe_of(args: list[str]) -> None:
    """As `require_recipe`, for the recipe that the arguments of a script name, if they name one."""
    if "--config" in args:
        given = args[args.index("--config") + 1 :]
        if not given:
            raise ValueError("--config: which recipe?")
        require_recipe(given[0])


def require_new_folder(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if something would be written over.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder.")


def require_dtype(dtype: str, option: str = "dtype", automatic: bool = True) -> None:
    """
    Raises:
        ValueError: for a name that is not one of [`DTYPES`] (or `"auto"`).
    """
    names = ("auto", *DTYPES) if automatic else DTYPES
    if dtype not in names:
        raise ValueError(f"{option} is {dtype!r}: give {', '.join(names[:-1])} or {names[-1]}.")


def require_device(device: str | None) -> None:
    """
    Raises:
        ValueError: if this machine has no such device.
    """
    if device in (None, "cpu", "cpu:0"):  # the last is what launchers give the first process
        return
    import torch  # it alone knows

    there = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        there += [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    if f"{device}:0" not in there and device not in there:
        raise ValueError(f"device is {device!r}, which is not here. This machine has {', '.join(there)}.")
