"""`sq-llava generate-data llava`, `captions` and `prompts`: their options and their output.

    sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json \
        --model gpt-4o --max-cost 20 --input-price 2.5 --output-price 10 --out runs/coco

The options of each method are in `sq_llava/generation/settings.py`.
"""

import shutil
from collections.abc import Mapping
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
from sq_llava.output import command_line, folder_written_whole
from sq_llava.stopping import INTERRUPTED, STOPPED


SERVER = "Server"
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", help="i/n: split the input into n parts and process only part i. All parts share one --out."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what is left to do and what it costs at most. Nothing is sent.")
]

app = typer.Typer()


@app.command(
    epilog=examples(
        "sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json "
        "--model gpt-4o --out runs/coco --dry-run",
        "sq-llava generate-data llava mine.jsonl --model gpt-4o --out runs/mine --max-cost 5 --input-price 2.5 "
        "--output-price 10",
        "On several machines, each with its own server:",
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
    """Make conversations, descriptions and reasoning from captions and boxes.

    A text-only language model on a server writes them.
    """
    with errors_in_one_line():
        require_file(settings["captions"], "The captions")
        if settings["instances"] is not None:
            require_file(settings["instances"], "--instances")
        require_folder(settings["prompts"])
        from sq_llava.generation import llava as making

        run = LlavaSettings(chat=ChatSettings(**chat), shard=Shard.parse(shard), **settings)
        if dry_run:
            estimate, bad = making.estimate(run)
            print_bad_rows(bad)
            print_estimate(estimate)
            return
        made = making.generate(run, command_line())
    print_bad_rows(made.bad, run.out)
    num_texts = len(made.asked.results) + len(made.asked.unusable)
    left_out = ". Left out:" if made.reasons else ""
    console.print(f"{made.num_rows:,} rows from {num_texts:,} texts{left_out}", highlight=False)
    print_reasons(made.reasons)
    end_run(run.out, len(made.asked.failures), made.asked.num_open, made.asked.stopped, made.spent)


@app.command(epilog=examples("sq-llava generate-data prompts llava my-prompts"))
def prompts(
    method: Annotated[str, typer.Argument(help="llava, captions, curate or self.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
) -> None:
    """Copy the prompts and examples of a method, to edit them.

    Then give the folder to that method with --prompts.
    """
    with errors_in_one_line():
        methods = sorted(path.name for path in PROMPTS.iterdir() if path.is_dir())
        if method not in methods:
            raise ValueError(f"{method}: no such prompts. Give one of {', '.join(methods)}.")
        with folder_written_whole(folder) as new:
            shutil.copytree(PROMPTS / method, new, dirs_exist_ok=True)
    messages_console.print(f"Wrote {folder}", markup=False, soft_wrap=True)


@app.command(
    epilog=examples(
        "python -m spacy download en_core_web_sm",
        "sq-llava generate-data captions cc3m.jsonl --image-root images --spacy-model en_core_web_sm --out chosen",
        "On several machines, each with a part of the input. The last to finish chooses the captions:",
        "sq-llava generate-data captions cc3m.tsv --image-root images --spacy-model en_core_web_sm --out /shared/cc3m "
        "--shard 3/8",
    )
)
@takes_options
def captions(
    settings: Annotated[dict, OptionsOf(CaptionSettings)],
    shard: ShardOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the input and count captions.")] = False,
) -> None:
    """Make stage 1 data from captions.

    LLaVA's filter by noun phrases chooses the captions. Each gets an instruction.
    """
    with errors_in_one_line():
        require_file(settings["captions"], "The captions")
        require_folder(settings["image_root"])
        require_folder(settings["prompts"])
        from rich.progress import Progress

        from sq_llava.generation import captions as choosing

        run = CaptionSettings(shard=Shard.parse(shard), **settings)
        if dry_run:
            num_captions, num_left, bad = choosing.count(run)
            print_bad_rows(bad)
            console.print(
                f"{num_captions:,} captions with an image, {num_left:,} of them not yet read by spaCy.",
                highlight=False,
            )
            return
        with Progress(console=messages_console, transient=True) as progress:
            chosen = choosing.generate(run, command_line(), progress)
    choice, known = chosen.choice, chosen.known
    print_bad_rows(known.bad, run.out)
    if choice is None:
        messages_console.print("This shard is done. The captions are chosen when the other shards are done too.")
        return
    console.print(
        f"Chose {choice.taken.sum():,} of {known.is_sound.sum():,} captions, by {choice.num_phrases:,} noun phrases.",
        highlight=False,
    )
    messages_console.print(f"Wrote {run.out}", markup=False, soft_wrap=True)


def print_bad_rows(bad, out: Path | None = None) -> None:
    """Prints how many rows of the input cannot be used, and the first few of them. `out` holds the list of all."""
    if bad:
        place = f" {out / bad.file} lists them." if out is not None else ""
        lines = [f"{bad} cannot be used.{place}", *bad.shown()]
        messages_console.print("\n  ".join(lines), markup=False, highlight=False, soft_wrap=True)


def print_reasons(reasons: Mapping[str, int]) -> None:
    """Prints why texts were left out, and how many."""
    for reason, count in reasons.items():
        console.print(f"  {count:>7,}  {reason}", highlight=False)


def end_run(out: Path, num_failed: int, num_open: int, stopped: str | None, spent: str) -> None:
    """
    Prints how a run ended, and what the requests of all runs used. Exit code 1: some requests failed or are not done;
    130: stopped by Ctrl-C.
    """
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if spent:
        messages_console.print(f"All runs so far: {spent}.", markup=False, highlight=False, soft_wrap=True)
    if num_failed:
        place = escape(f"{out}/failures*.jsonl")
        messages_console.print(
            f"[red]{num_failed:,} failed[/red]: see {place}. Run the same command again to retry them.", soft_wrap=True
        )
    if stopped is not None:
        messages_console.print(f"{num_open:,} are not done: {stopped}", markup=False, soft_wrap=True)
    if num_failed or num_open or stopped is not None:
        raise typer.Exit(STOPPED if stopped == INTERRUPTED else 1)


def print_estimate(estimate) -> None:
    """Prints how many requests a run would still send, and their cost."""
    cost = f", with a cost of up to {estimate.cost:,.2f}" if estimate.cost else ""
    requests = "1 request" if estimate.num_requests == 1 else f"{estimate.num_requests:,} requests"
    console.print(
        f"{requests}, about {estimate.prompt_tokens:,} prompt tokens and at most "
        f"{estimate.completion_tokens:,} answer tokens{cost}. Nothing was sent.",
        highlight=False,
        soft_wrap=True,
    )
    if estimate.attempts > 1:
        console.print(f"Answers of a wrong form are asked for again: at most {estimate.attempts} times as much.")
