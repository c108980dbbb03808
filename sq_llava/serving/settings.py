"""Limits of the server, and who may use it. The fields become options of `sq-llava serve`: no large imports here."""

import re
from dataclasses import dataclass
from typing import Annotated

from typer import Option


@dataclass(frozen=True)
class Limits:
    """
    Limits on each request, and on the number of requests.

    Args:
        max_body_bytes (`int`): Maximum size of a request, and of all its remote images together.
        max_pixels (`int`): Maximum total pixels of a request's images.
    """

    max_body_bytes: int = 20_000_000
    max_images: Annotated[int, Option(min=0, help="Maximum number of images in a request.")] = 8
    max_pixels: int = 64_000_000
    max_prompt_tokens: Annotated[
        int | None,
        Option(
            min=1, help="Maximum length of a client's prompt in tokens, images included. Default: the model's context."
        ),
    ] = None
    max_waiting: Annotated[
        int,
        Option(
            min=0,
            help="Maximum number of requests accepted in addition to --max-batch-size. Others are refused with status "
            "429.",
        ),
    ] = 64
    request_seconds: Annotated[
        float,
        Option(min=0.1, help="Maximum seconds from the first byte of a request to the last byte of its reply."),
    ] = 120.0
    header_seconds: Annotated[
        float, Option(min=0.1, help="Maximum seconds until the headers of a request are complete.")
    ] = 10.0
    allow_remote_images: Annotated[
        bool, Option(help="Download images from http(s) URLs, from public addresses only.")
    ] = False


AllowedHosts = Annotated[
    list[str] | None,
    Option(
        help="Name of the server that requests may have in their Host header, e.g. example.org or *.example.org, "
        "besides the names of this machine. Can be repeated. Default: with a loopback --host none, otherwise all."
    ),
]


@dataclass(frozen=True)
class Access:
    """
    Who may use the server, and which paths it has besides the API.

    Raises:
        ValueError: if a value of `cors` is not an origin.
    """

    allowed_hosts: AllowedHosts = None
    cors: Annotated[
        list[str] | None,
        Option(
            metavar="ORIGIN",
            help="Origin of web pages whose scripts may use the server, e.g. https://example.org. Can be repeated.",
        ),
    ] = None
    disable_metrics: Annotated[bool, Option(help="Close /metrics.")] = False
    disable_fastapi_docs: Annotated[bool, Option(help="Close /openapi.json.")] = False

    def __post_init__(self):
        for origin in self.cors or ():
            if origin != "*" and not re.fullmatch(r"https?://[^/\s?#@]+", origin):
                raise ValueError(
                    f"--cors {origin}: not an origin. Give scheme, name and port, e.g. https://example.org."
                )
