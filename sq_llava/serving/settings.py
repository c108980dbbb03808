"""What a request to the server may cost. The fields are options of the command, so nothing large is imported here."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option


@dataclass(frozen=True)
class Limits:
    """
    What a request may cost.

    Args:
        max_pixels (`int`): Of all images of a request, padded to squares.
    """

    max_body_bytes: int = 20_000_000
    max_images: Annotated[int, Option(min=0, help="Maximum number of images in a request.")] = 8
    max_pixels: int = 64_000_000
    max_prompt_tokens: Annotated[
        int | None,
        Option(min=1, help="Maximum length of a prompt, image tokens included. Default: the model's context."),
    ] = None
    max_waiting: Annotated[
        int, Option(min=0, help="Requests that may wait beside a full batch; one more gets the status 429.")
    ] = 64
    request_seconds: Annotated[
        float, Option(min=0.1, help="Maximum seconds from the first byte of a request to the last of its reply.")
    ] = 120.0
    allow_remote_images: Annotated[bool, Option(help="Fetch images by http(s), from public addresses only.")] = False
