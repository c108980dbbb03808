"""The options that the ways of making data share, and what a dry run says. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.console import console
from sq_llava.stopping import INTERRUPTED, STOPPED


SERVER = {"rich_help_panel": "Server"}
Out = Annotated[
    Path, typer.Option(help="Folder to write; the same command goes on where it stopped.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(min=1, help="The first so many of the input.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="i/n: only this part of the input, as one of n runs into the same --out.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked, and its price.")]
ChatModel = Annotated[
    str,
    typer.Option("--model", "-m", help="As the server names it; key: OPENAI_API_KEY.", show_default=False, **SERVER),
]
BaseUrl = Annotated[
    str | None, typer.Option(help="Of the OpenAI-compatible server, up to /v1; default: OpenAI's.", **SERVER)
]
Temperature = Annotated[float, typer.Option(min=0, help="1 for models that take no other.", **SERVER)]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer, thoughts included.", **SERVER)]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", **SERVER)]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds for one answer; then it is asked again.", **SERVER)]
MaxRequests = Annotated[int | None, typer.Option(min=0, help="Of all runs of a shard into --out.", **SERVER)]
MaxTotalTokens = Annotated[
    int | None, typer.Option(min=0, help="Of all runs of a shard into --out, prompts and answers.", **SERVER)
]
MaxCost = Annotated[
    float | None, typer.Option(min=0, help="Of all runs of a shard into --out, in the unit of the prices.", **SERVER)
]
Price = Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **SERVER)]
IMAGE_TOKENS = "An image is counted as, for caps and estimates; caps can be passed where the server counts more."
ImageTokens = Annotated[int, typer.Option(min=1, help=IMAGE_TOKENS, **SERVER)]


def exit_code(stopped: str | None) -> int:
    """Of a run that is not complete."""
    return STOPPED if stopped == INTERRUPTED else 1


def print_estimate(estimate) -> None:
    """What a dry run says of what is still to be asked."""
    cost = f": {estimate.cost:,.2f} if all are that long" if estimate.cost else ""
    console.print(
        f"{estimate.num_requests:,} requests, about {estimate.prompt_tokens:,} tokens of prompts and at most "
        f"{estimate.completion_tokens:,} of answers{cost}. Nothing was asked.",
        highlight=False,
        soft_wrap=True,
    )
