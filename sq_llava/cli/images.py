"""The images that a command is given: files, folders of images, URLs, and `-` for standard input."""

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from sq_llava.console import console, messages_console
from sq_llava.early_checks import find_images, require_image


# Larger ones are refused, from a URL and from standard input.
MAX_BYTES = 100_000_000


@contextmanager
def image_files(given: list[str] | None, example: str) -> Iterator[dict[Path, str]]:
    """
    Yields the images as files, each with its name for the user. What is downloaded is deleted at the end.

    Args:
        given (`list[str]`, *optional*): Paths, URLs or `-`. Default: a terminal's user is offered a photo that comes
            with the package.
        example (`str`): The command with `IMAGE` in place of an image, for the error without a terminal.

    Raises:
        ValueError: if there is no image, or one cannot be read or downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for number, text in enumerate(given or [_offered(example)]):
            if text == "-" or text.startswith(("http://", "https://")):
                file = Path(folder) / f"{number}.image"
                file.write_bytes(_standard_input() if text == "-" else _download(text))
                found[file] = "standard input" if text == "-" else text
                with named(file, found[file]):
                    require_image(file)
            else:
                found |= {file: str(file) for file in find_images([Path(text)])}
        yield found


def _offered(example: str) -> str:
    photo = files("sq_llava.page") / "photos" / "cat.jpg"
    if not (sys.stdin and sys.stdin.isatty() and console.is_terminal):
        raise ValueError(
            f"No image is given. To try a photo that comes with the package: {example.replace('IMAGE', str(photo))}"
        )
    answer = console.input(f"No image is given. Use the photo of a cat that comes with the package ({photo})? [Y/n] ")
    if answer.strip().lower() not in ("", "y", "yes"):
        raise ValueError("No image is given.")
    return str(photo)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError("-: standard input is closed.")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if not data:
        raise ValueError("-: standard input is empty.")
    if len(data) > MAX_BYTES:
        raise ValueError(f"-: standard input has more than {MAX_BYTES:,} bytes.")
    return data


def _download(url: str) -> bytes:
    """Downloads an image by the rules of the server: from public addresses only, within ten seconds."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise ValueError(f"{url}: HF_HUB_OFFLINE is set, so nothing is downloaded. Give the image as a file.")
    from sq_llava.serving.images import fetch

    messages_console.print(f"Downloading {url}", markup=False, soft_wrap=True)
    try:
        return asyncio.run(fetch(url, MAX_BYTES))
    except ValueError as error:
        reason = str(error.__cause__ or "")  # the server keeps it from its clients
        raise ValueError(f"{url} {error}{reason and f' ({reason})'}.") from error


@contextmanager
def named(file: Path, name: str) -> Iterator[None]:
    """In a `ValueError`, puts the name in the place of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), name)) from error
