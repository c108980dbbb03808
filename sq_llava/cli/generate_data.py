"""`sq-llava generate-data`: what is asked for on the command line.

    sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json \
        --model gpt-4o --max-cost 20 --input-price 2.5 --output-price 10 --out runs/coco

The options of each way of making data stand in `sq_llava/generation/settings.py`.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sq_llava.cli.options import OptionsOf, takes_options
from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.early_checks import require_file, require_folder
from sq_llava.generation.rows import Shard
from sq_llava.generation.settings import PROMPTS, CaptionSettings, LlavaSettings
from sq_llava.llm_client.settings import ChatSettings
from sq_llava.resumable.run_note import command_line
from sq_llava.stopping import INTERRUPTED, STOPPED


SERVER = "Server"
ShardOption = Annotated[
    str | None, typer.Option("--shard", help="i/n: use only part i of n of the input; all parts share one --out.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be asked, and what it would cost.")]

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json "
        "--model gpt-4o --out runs/coco --dry-run",
        "sq-llava generate-data llava mine.jsonl --model gpt-4o --out runs/mine --max-cost 5 --input-price 2.5 "
        "--output-price 10",
        "On many machines, each with a server of its own:",
        "sq-llava generate-data llava mine.jsonl --model NAME --base-url http://127.0.0.1:8000/v1 --out /shared/mine "
        "--shard 3/8",
    )
)
@takes_options
def llava(
    settings: Annotated[dict, OptionsOf(LlavaSettings, instances=None)],
    chat: Annotated[dict, OptionsOf(ChatSettings, panel=SERVER, without=("image_tokens",), temperature=0.7)],
    shard: ShardOption = None,
    dry_run: DryRun = False,
) -> None:
    """From captions and boxes: conversations, descriptions and reasoning, by a text-only language model."""
    with errors_in_one_line():
        require_file(settings["captions"], "The captions")
        if settings["instances"] is not None:
            require_file(settings["instances"], "--instances")
        require_folder(settings["prompts"])
        from sq_llava.generation import llava as making

        run = LlavaSettings(chat=ChatSettings(**chat), shard=Shard.parse(shard), **settings)
        if dry_run:
            print_estimate(making.estimate(run))
            return
        made = making.generate(run, command_line())
    console.print(f"{made.num_rows:,} rows of {len(made.asked.results):,} texts", highlight=False)
    end_run(run.out, len(made.asked.failures), made.asked.num_open, made.asked.stopped)


@app.command(epilog=examples("sq-llava generate-data prompts llava my-prompts"))
def prompts(
    way: Annotated[str, typer.Argument(help="Way of making data: llava, ...", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
) -> None:
    """Copy the prompts and examples of a way of making data, to edit them and give them as --prompts."""
    with errors_in_one_line():
        ways = sorted(path.name for path in PROMPTS.iterdir() if path.is_dir())
        if way not in ways:
            raise ValueError(f"{way}: has no prompts; there are some for {', '.join(ways)}.")
        if folder.exists():
            raise ValueError(f"{folder} is there already: give a new folder.")
        shutil.copytree(PROMPTS / way, folder)
    messages_console.print(f"Wrote {folder}", markup=False, soft_wrap=True)


@app.command(
    epilog=examples(
        "python -m spacy download en_core_web_sm",
        "sq-llava generate-data captions cc3m.jsonl --image-root images --spacy-model en_core_web_sm --out chosen",
        "On many machines, which read a part each; the last one to be ready chooses:",
        "sq-llava generate-data captions cc3m.tsv --image-root images --spacy-model en_core_web_sm --out /shared/cc3m "
        "--shard 3/8",
    )
)
@takes_options
def captions(
    settings: Annotated[dict, OptionsOf(CaptionSettings)],
    shard: ShardOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the input, and count.")] = False,
) -> None:
    """From captions: LLaVA's filter by noun phrases, and an instruction before each caption, for stage 1."""
    with errors_in_one_line():
        require_file(settings["captions"], "The captions")
        require_folder(settings["image_root"])
        require_folder(settings["prompts"])
        from rich.progress import Progress

        from sq_llava.generation import captions as choosing

        run = CaptionSettings(shard=Shard.parse(shard), **settings)
        if dry_run:
            num_captions, num_left = choosing.count(run)
            console.print(
                f"{num_captions:,} captions with an image, {num_left:,} still to be read by spaCy.", highlight=False
            )
            return
        with Progress(console=messages_console, transient=True) as progress:
            choice = choosing.generate(run, command_line(), progress)
    if choice is None:
        messages_console.print("The phrases of this shard are there; those of others are missing: nothing is chosen.")
        return
    console.print(
        f"{choice.taken.sum():,} of {len(choice.taken):,} captions, by {choice.num_phrases:,} noun phrases.",
        highlight=False,
    )
    messages_console.print(f"Wrote {run.out}", markup=False, soft_wrap=True)


def end_run(out: Path, num_failed: int, num_open: int, stopped: str | None) -> None:
    """Says how a run ended. Exit code 1: some failed, or there is more to be asked; 130: stopped by Ctrl-C."""
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if num_failed:
        place = escape(f"{out}/failures*.jsonl")
        messages_console.print(
            f"[red]{num_failed:,} failed[/red]: see {place}. The same command tries them again.", soft_wrap=True
        )
    if stopped is not None:
        messages_console.print(f"{num_open:,} are open: {stopped}", markup=False, soft_wrap=True)
    if num_failed or num_open or stopped is not None:
        raise typer.Exit(STOPPED if stopped == INTERRUPTED else 1)


def print_estimate(estimate) -> None:
    """What a dry run says of what is still to be asked."""
    cost = f": {estimate.cost:,.2f} if all are that long" if estimate.cost else ""
    console.print(
        f"{estimate.num_requests:,} requests, about {estimate.prompt_tokens:,} tokens of prompts and at most "
        f"{estimate.completion_tokens:,} of answers{cost}. Nothing was asked.",
        highlight=False,
        soft_wrap=True,
    )
