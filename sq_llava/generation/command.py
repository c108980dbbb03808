"""`sq-llava generate-data`: what is asked for on the command line.

    sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json \
        --model gpt-4o --max-cost 20 --input-price 2.5 --output-price 10 --out runs/coco

What a way of making data does stands in a module of its own; here are the options that the ways share.
"""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.evaluation.command import (
    JUDGE,
    JudgeBaseUrl,
    JudgeConcurrency,
    JudgeMaxCost,
    JudgeMaxRequests,
    JudgeMaxTokens,
    JudgePrice,
    JudgeTemperature,
)
from sq_llava.model_options import Device, Dtype, quiet_libraries


app = typer.Typer(
    name="generate-data",
    help="Make instruction data: from captions and boxes, or from images alone.",
    no_args_is_help=True,
)

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
MaxRequests = Annotated[int | None, typer.Option(min=0, help="Of all runs of a shard into --out.", **SERVER)]
MaxTotalTokens = Annotated[
    int | None, typer.Option(min=0, help="Of all runs of a shard into --out, prompts and answers.", **SERVER)
]
MaxCost = Annotated[
    float | None, typer.Option(min=0, help="Of all runs of a shard into --out, in the unit of the prices.", **SERVER)
]
Price = Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **SERVER)]
Batch = Annotated[bool, typer.Option("--batch", help="By the server's Batch API: slower, often cheaper.", **SERVER)]


def print_estimate(estimate) -> None:
    """What a dry run says of what is still to be asked."""
    cost = f", at most {estimate.cost:,.2f}" if estimate.cost else ""
    console.print(
        f"{estimate.num_requests:,} requests, about {estimate.prompt_tokens:,} tokens of prompts and at most "
        f"{estimate.completion_tokens:,} of answers{cost}. Nothing was asked.",
        highlight=False,
    )


FILTERS = {"rich_help_panel": "Filters: with others, the same command makes the set anew without a model"}


@app.command(
    name="self",
    epilog=examples(
        "sq-llava generate-data self --images photos --model org/sq-llava-7b -n 8 --out runs/self",
        "sq-llava generate-data self --images rows.json --image-root images --model runs/demo/model "
        '--after "what color is the shape?" --out runs/self',
        "sq-llava generate-data self --images photos --model org/sq-llava-7b --clip openai/clip-vit-base-patch32 "
        "--min-clip-score 0.5 --judge-model gpt-4o --judge-max-requests 1000 --out runs/self",
        "torchrun --nproc_per_node 8 -m sq_llava.cli generate-data self --images photos --model org/sq-llava-7b "
        "--shard 1/4 --out /shared/self",
    ),
)
def generate_self(
    images: Annotated[
        str,
        typer.Option(
            help="Folder of images, or a data set of training: its questions are ignored.", show_default=False
        ),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="SQ-LLaVA folder or Hub id.", show_default=False)],
    out: Out,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that the rows' image paths are relative to; default: that of --images.")
    ] = None,
    num_questions: Annotated[int, typer.Option("--num-questions", "-n", min=1, help="For each image.")] = 8,
    after: Annotated[str | None, typer.Option(help="What it answers first; default: it describes the image.")] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the questions' sampling.")] = 1.2,
    top_k: Annotated[int, typer.Option(min=1, help="Of the questions' sampling.")] = 300,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the questions' sampling.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a question, and of an answer.")] = 128,
    limit: Limit = None,
    seed: Seed = 0,
    shard: ShardOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images asked about together, on each process.")] = 4,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
    blank_test: Annotated[
        str,
        typer.Option(help="turn: its answer must change on a blank image; question: for one image; off.", **FILTERS),
    ] = "question",
    min_drop: Annotated[
        float, typer.Option(help="Log-probability a token that a blank image must cost the answer.", **FILTERS)
    ] = 0.0,
    min_log_probability: Annotated[float, typer.Option(help="Of an answer's tokens, the mean.", **FILTERS)] = -1.0,
    max_overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Of the words of two questions about an image.", **FILTERS)
    ] = 0.7,
    max_set_overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Of pairs of words, with all questions before.", **FILTERS)
    ] = 1.0,
    max_repeats: Annotated[int, typer.Option(min=1, help="Of one question, in the set.", **FILTERS)] = 100,
    max_per_type: Annotated[
        int | None, typer.Option(min=1, help="Turns of one type of question, in the set.", **FILTERS)
    ] = None,
    clip: Annotated[str | None, typer.Option(help="A whole CLIP, for CLIPScore.", **FILTERS)] = None,
    min_clip_score: Annotated[float | None, typer.Option(help="Needs --clip.", **FILTERS)] = None,
    judge_model: Annotated[str | None, typer.Option(help="Accepts or rejects what passed.", **JUDGE)] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="A text file: what it is told.", **JUDGE)] = None,
    judge_base_url: JudgeBaseUrl = None,
    judge_temperature: JudgeTemperature = 0.0,
    judge_max_tokens: JudgeMaxTokens = 256,
    judge_concurrency: JudgeConcurrency = 8,
    judge_max_requests: JudgeMaxRequests = None,
    judge_max_cost: JudgeMaxCost = None,
    judge_input_price: JudgePrice = None,
    judge_output_price: JudgePrice = None,
) -> None:
    """Images alone: a SQ-LLaVA asks about them, answers, and what passes the filters is kept."""
    with errors_in_one_line():
        with messages_console.status("Loading libraries"):
            from sq_llava.chat_client import ChatSettings
            from sq_llava.evaluation.questions import AskSettings
            from sq_llava.generation import self_generation
            from sq_llava.generation.filters import FilterSettings
            from sq_llava.generation.rows import Shard

            quiet_libraries()
        judge = None
        if judge_model is not None:
            judge = ChatSettings(
                judge_model,
                judge_base_url,
                temperature=judge_temperature,
                max_tokens=judge_max_tokens,
                concurrency=judge_concurrency,
                max_requests=judge_max_requests,
                max_cost=judge_max_cost,
                input_price=judge_input_price,
                output_price=judge_output_price,
                option_prefix="--judge-",
            )
        run = self_generation.SelfGeneration(
            model=model,
            images=images,
            out=out,
            ask=AskSettings(num_questions, after, temperature, top_k, top_p, max_new_tokens, seed),
            filters=FilterSettings(
                blank_test=blank_test,
                min_drop=min_drop,
                min_log_probability=min_log_probability,
                min_clip_score=min_clip_score,
                max_overlap=max_overlap,
                max_set_overlap=max_set_overlap,
                max_repeats=max_repeats,
                max_per_type=max_per_type,
                seed=seed,
            ),
            image_root=image_root,
            limit=limit,
            shard=Shard.parse(shard),
            clip=clip,
            judge=judge,
            judge_prompt=judge_prompt or self_generation.PROMPT,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
        )
        if dry_run:
            num_images, num_left, estimate = self_generation.estimate(run)
            console.print(
                f"{num_left:,} of {num_images:,} images are to be asked about, {num_questions} questions each."
            )
            if estimate is not None:
                print_estimate(estimate)
            return
        made = self_generation.generate(run)
    if made is not None:
        show_made(made, out)


def show_made(made, out: Path) -> None:
    """Prints what was made of images; exit code 1 where something is missing."""
    counts = f"{made.num_turns:,} turns about {made.num_images:,} images, {made.num_kept:,} kept"
    console.print(f"{counts} in {made.num_rows:,} rows. Left out:", highlight=False)
    for reason, count in sorted(made.left_out.items()):
        console.print(f"  {count:>7,}  {reason}", highlight=False)
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if made.num_failed:
        messages_console.print(f"[red]{made.num_failed} failed[/red]: see failures.jsonl.")
    if made.stopped is not None:
        messages_console.print(f"{made.num_open} are open: {made.stopped}", markup=False, soft_wrap=True)
    if made.num_failed or made.num_open:
        raise typer.Exit(1)


def print_outcome(asked, out: Path) -> None:
    """How a run ended. Exit code 1: there is more to be asked, or some of it failed."""
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if asked.failures:
        messages_console.print(
            f"{len(asked.failures):,} failed: see {out}/failures*.jsonl. The same command tries them again.",
            markup=False,
            soft_wrap=True,
        )
    if asked.stopped is not None:
        messages_console.print(f"{asked.num_open:,} are open: {asked.stopped}", markup=False, soft_wrap=True)
    if asked.failures or asked.stopped is not None:
        raise typer.Exit(1)


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
def llava(
    captions: Annotated[
        Path, typer.Argument(help="COCO's captions_*.json, or .jsonl: image, captions, boxes.", show_default=False)
    ],
    model: ChatModel,
    out: Out,
    instances: Annotated[Path | None, typer.Option(help="COCO's instances_*.json, for the boxes.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder of prompts and examples; default: the own.")] = None,
    shares: Annotated[
        str, typer.Option(help="Of the kinds of rows, by weight.")
    ] = "conversation=58,detail=23,reasoning=77",
    kinds_per_image: Annotated[int, typer.Option(min=1, max=3, help="Rows of each image, of different kinds.")] = 1,
    limit: Limit = None,
    seed: Seed = 0,
    shard: ShardOption = None,
    dry_run: DryRun = False,
    base_url: BaseUrl = None,
    temperature: Temperature = 0.7,
    max_tokens: MaxTokens = 1024,
    concurrency: Concurrency = 8,
    max_requests: MaxRequests = None,
    max_total_tokens: MaxTotalTokens = None,
    max_cost: MaxCost = None,
    input_price: Price = None,
    output_price: Price = None,
    batch: Batch = False,
) -> None:
    """From captions and boxes: conversations, descriptions and reasoning, by a text-only language model."""
    with errors_in_one_line():
        from sq_llava.chat_client import ChatSettings
        from sq_llava.generation import llava as making
        from sq_llava.generation.rows import Shard

        chat = ChatSettings(
            model=model,
            base_url=base_url,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            max_requests=max_requests,
            max_total_tokens=max_total_tokens,
            max_cost=max_cost,
            input_price=input_price,
            output_price=output_price,
        )
        settings = making.LlavaSettings(
            captions=captions,
            instances=instances,
            out=out,
            chat=chat,
            prompts=prompts or making.PROMPTS,
            shares=shares,
            kinds_per_image=kinds_per_image,
            limit=limit,
            seed=seed,
            shard=Shard.parse(shard),
            batch=batch,
        )
        if dry_run:
            print_estimate(making.estimate(settings))
            return
        asked = making.generate(settings, shlex.join(["sq-llava", *sys.argv[1:]]))
    print_outcome(asked, out)


@app.command(epilog=examples("sq-llava generate-data prompts llava my-prompts"))
def prompts(
    way: Annotated[str, typer.Argument(help="Whose: llava, ...", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
) -> None:
    """Copy the prompts and examples of a way of making data, to edit them and give them as --prompts."""
    with errors_in_one_line():
        own = Path(__file__).parent / "prompts"
        ways = sorted(path.name for path in own.iterdir() if path.is_dir())
        if way not in ways:
            raise ValueError(f"{way}: has no prompts; there are some for {', '.join(ways)}.")
        if folder.exists():
            raise ValueError(f"{folder}: is there already. Name a new folder.")
        shutil.copytree(own / way, folder)
    messages_console.print(f"Wrote {folder}", markup=False, soft_wrap=True)
