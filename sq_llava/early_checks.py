"""Checks that a command makes first, before it imports torch and transformers, which takes seconds.

    require_new_folder("full")  # ValueError: full is not empty: give a new folder.

Weights and data are not read: the library checks them when it opens them.
"""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path


DTYPES = ("float32", "bfloat16", "float16")
# The lock of an output folder (`sq_llava/output.py`). It does not count as content of the folder.
LOCK_FILE = ".sq-llava.lock"
# Files with these suffixes are the images of a folder; see `is_image_file`.
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


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


def require_key(variable: str) -> str:
    """
    Returns the key in an environment variable, without white space at its ends, which no header can transmit.

    Raises:
        ValueError: if the variable is not set, or is empty.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env: the environment variable {variable} is not set, or is empty.")
    return key


@cache
def register_heic() -> None:
    """Lets Pillow read HEIC, the format of phones, if pillow-heif is installed."""
    with suppress(ModuleNotFoundError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def require_image(path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if there is no such file, or its first bytes are not those of an image.
    """
    from PIL import Image

    if not Path(path).is_file():  # nor a pipe or a device
        raise ValueError(f"{path}: no such image.")
    with open(path, "rb") as file:
        start = file.read(16).ljust(16, b"\0")
    Image.init()
    register_heic()
    by_suffix = Image.EXTENSION.get(Path(path).suffix.lower())
    # A few old formats have no first bytes of their own: the suffix tells them.
    if not any(accepts(start) if accepts else name == by_suffix for name, (_, accepts) in Image.OPEN.items()):
        if start[4:8] == b"ftyp" and Path(path).suffix.lower() in (".heic", ".heif"):
            raise ValueError(f"{path}: a HEIC image needs pillow-heif: pip install pillow-heif.")
        raise ValueError(f"{path}: unknown image format, or a broken header. Save the image again as PNG or JPEG.")


def is_image_file(file: Path) -> bool:
    """Whether a file in a folder is one of its images, by its name. Hidden files, as macOS's `._dog.jpg`, are not."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def find_images(paths: list[Path]) -> list[Path]:
    """
    The image files among `paths`, and those in its folders, sorted by name.

    Raises:
        ValueError: for a path that does not exist, a folder without images, or a file that is not an image.
    """
    found = []
    for path in paths:
        if path.is_dir():
            images = sorted(filter(is_image_file, path.iterdir()))
            if not images:
                raise ValueError(f"{path}: this folder has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
            found += images
        else:
            found.append(path)
    for file in found:
        require_image(file)
    return found


def require_recipe(path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if there is no such file, or it is not a mapping of settings in YAML.
    """
    require_file(path, "--config")
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path}: contains {str(settings)[:40]!r}. Write settings as `name: value`.")


def require_recipe_of(args: list[str]) -> None:
    """Checks the recipe that follows `--config` in the arguments of a script, if there is one."""
    if "--config" in args:
        given = args[args.index("--config") + 1 :]
        if not given:
            raise ValueError("--config needs the path of a recipe.")
        require_recipe(given[0])


def require_new_folder(folder: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: if the folder is a file, is not empty, or is a mount point, which no other folder can replace.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder.")
    if folder.is_dir() and any(not file.name.startswith(LOCK_FILE) for file in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder.")
    if folder.is_mount():
        raise ValueError(f"{folder} is a mount point: give a new folder inside it, such as {folder / 'model'}.")


def require_dtype(dtype: str, option: str = "dtype", automatic: bool = True) -> None:
    """
    Args:
        option (`str`): Name of the option, for the error message.
        automatic (`bool`): Whether `"auto"` is allowed too.

    Raises:
        ValueError: if the name is not one of [`DTYPES`].
    """
    names = ("auto", *DTYPES) if automatic else DTYPES
    if dtype not in names:
        raise ValueError(f"{option} is {dtype!r}: give {', '.join(names[:-1])} or {names[-1]}.")


def require_device(device: str | None) -> None:
    """
    Raises:
        ValueError: if this machine has no such device.
    """
    if device in (None, "cpu", "cpu:0"):  # launchers give the first process cpu:0
        return
    import torch  # only torch knows the other devices

    there = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        there += [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
    if f"{device}:0" not in there and device not in there:
        raise ValueError(f"device is {device!r}, but this machine has only {', '.join(there)}.")
