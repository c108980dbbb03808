"""`sq-llava generate-data`: what is asked for on the command line.

    sq-llava generate-data llava captions_train2017.json --instances instances_train2017.json \
        --model gpt-4o --max-cost 20 --input-price 2.5 --output-price 10 --out runs/coco

What a way of making data does stands in a module of its own, the options that the ways share in `options.py`.
"""

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.generate_self import generate_self
from sq_llava.cli.generation_options import (
    SERVER,
    BaseUrl,
    ChatModel,
    Concurrency,
    DryRun,
    ImageTokens,
    Limit,
    MaxCost,
    MaxRequests,
    MaxTokens,
    MaxTotalTokens,
    Out,
    Price,
    Seed,
    ShardOption,
    Temperature,
    Timeout,
    exit_code,
    print_estimate,
)
from sq_llava.cli.options import Device, Dtype, check_model_options, quiet_libraries
from sq_llava.console import console, errors_in_one_line, examples, messages_console
from sq_llava.early_checks import require_file, require_folder
from sq_llava.resumable.run_note import command_line


app = typer.Typer(
    name="generate-data",
    help="Make instruction data: from captions and boxes, or from images alone.",
    no_args_is_help=True,
)


def print_outcome(made, out: Path) -> None:
    """How a run ended. Exit code 1: there is more to be asked, or some failed; 130: stopped."""
    asked = made.asked
    console.print(f"{made.num_rows:,} rows of {len(asked.results):,} texts", highlight=False)
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
        raise typer.Exit(exit_code(asked.stopped))


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
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
    max_total_tokens: MaxTotalTokens = None,
    max_cost: MaxCost = None,
    input_price: Price = None,
    output_price: Price = None,
) -> None:
    """From captions and boxes: conversations, descriptions and reasoning, by a text-only language model."""
    with errors_in_one_line():
        require_file(captions, "The captions")
        if instances is not None:
            require_file(instances, "--instances")
        if prompts is not None:
            require_folder(prompts)
        from sq_llava.generation import llava as making
        from sq_llava.generation.rows import Shard
        from sq_llava.llm_client.client import ChatSettings

        chat = ChatSettings(
            model=model,
            base_url=base_url,
            temperature=temperature,
            max_tokens=max_tokens,
            concurrency=concurrency,
            timeout=timeout,
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
        )
        if dry_run:
            print_estimate(making.estimate(settings))
            return
        made = making.generate(settings, command_line())
    print_outcome(made, out)


@app.command(epilog=examples("sq-llava generate-data prompts llava my-prompts"))
def prompts(
    way: Annotated[str, typer.Argument(help="Whose: llava, ...", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
) -> None:
    """Copy the prompts and examples of a way of making data, to edit them and give them as --prompts."""
    with errors_in_one_line():
        own = files("sq_llava.generation") / "prompts"
        ways = sorted(path.name for path in own.iterdir() if path.is_dir())
        if way not in ways:
            raise ValueError(f"{way}: has no prompts; there are some for {', '.join(ways)}.")
        if folder.exists():
            raise ValueError(f"{folder} is there already: give a new folder.")
        shutil.copytree(own / way, folder)
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
def captions(
    captions: Annotated[
        Path,
        typer.Argument(help=".json, .jsonl, .csv or .tsv with image, caption (and id) in a row.", show_default=False),
    ],
    image_root: Annotated[Path, typer.Option(help="Folder that the images are in.", show_default=False)],
    spacy_model: Annotated[
        str, typer.Option(help="Pipeline with a parser, by name or folder. None is downloaded.", show_default=False)
    ],
    out: Out,
    prompts: Annotated[Path | None, typer.Option(help="Folder with instructions.txt; default: the own.")] = None,
    num_proc: Annotated[int, typer.Option(min=1, help="Processes that spaCy reads with.")] = 1,
    limit: Limit = None,
    seed: Seed = 0,
    shard: ShardOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the input, and count.")] = False,
) -> None:
    """From captions: LLaVA's filter by noun phrases, and an instruction before each caption, for stage 1."""
    with errors_in_one_line():
        require_file(captions, "The captions")
        require_folder(image_root)
        if prompts is not None:
            require_folder(prompts)
        from rich.progress import Progress

        from sq_llava.generation import captions as choosing
        from sq_llava.generation.rows import Shard

        settings = choosing.CaptionSettings(
            captions=captions,
            image_root=image_root,
            out=out,
            spacy_model=spacy_model,
            prompts=prompts or choosing.PROMPTS,
            limit=limit,
            seed=seed,
            shard=Shard.parse(shard),
            num_proc=num_proc,
        )
        if dry_run:
            num_captions, num_left = choosing.count(settings)
            console.print(
                f"{num_captions:,} captions with an image, {num_left:,} still to be read by spaCy.", highlight=False
            )
            return
        with Progress(console=messages_console, transient=True) as progress:
            choice = choosing.generate(settings, command_line(), progress)
    if choice is None:
        messages_console.print("The phrases of this shard are there; those of others are missing: nothing is chosen.")
        return
    console.print(
        f"{choice.taken.sum():,} of {len(choice.taken):,} captions, by {choice.num_phrases:,} noun phrases.",
        highlight=False,
    )
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)


REPAIR = {"rich_help_panel": "Repair, by a server"}


@app.command(
    epilog=examples(
        "sq-llava generate-data curate photos --describer org/sq-llava-7b --out described",
        "sq-llava generate-data curate photos --model gpt-4o --repair-model gpt-4o-mini --max-requests 10000 "
        "--repair-max-requests 5000 --out described",
        "After a look at described/review.html, which saves decisions.json:",
        "sq-llava generate-data curate photos --describer org/sq-llava-7b --out described --decisions decisions.json",
        "On many machines, each with a server of its own:",
        "sq-llava generate-data curate photos --model NAME --base-url http://127.0.0.1:8000/v1 --out /shared/photos "
        "--shard 3/8",
    )
)
def curate(
    images: Annotated[Path, typer.Argument(help="Folder of images, with those below it.", show_default=False)],
    out: Out,
    describer: Annotated[str | None, typer.Option(help="SQ-LLaVA folder or Hub id; or give --model.")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="That describes, as the server names it; key: OPENAI_API_KEY.", **SERVER),
    ] = None,
    decisions: Annotated[Path | None, typer.Option(help="What was saved from the review sheet.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder of prompts; default: the own.")] = None,
    short: Annotated[int, typer.Option(min=0, help="A description of so many tokens or fewer is continued.")] = 80,
    limit: Limit = None,
    seed: Seed = 0,
    shard: ShardOption = None,
    dry_run: DryRun = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer of --describer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time, for --describer.")] = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    base_url: BaseUrl = None,
    temperature: Temperature = 0.0,
    max_tokens: MaxTokens = 1024,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    max_requests: MaxRequests = None,
    max_total_tokens: MaxTotalTokens = None,
    max_cost: MaxCost = None,
    image_tokens: ImageTokens = 4096,
    input_price: Price = None,
    output_price: Price = None,
    repair_model: Annotated[str | None, typer.Option(help="Text model; default: no repair.", **REPAIR)] = None,
    repair_base_url: Annotated[str | None, typer.Option(help="Default: --base-url.", **REPAIR)] = None,
    repair_max_requests: Annotated[int | None, typer.Option(min=0, help="As that without repair-.", **REPAIR)] = None,
    repair_max_total_tokens: Annotated[int | None, typer.Option(min=0, help="Likewise.", **REPAIR)] = None,
    repair_max_cost: Annotated[float | None, typer.Option(min=0, help="Likewise.", **REPAIR)] = None,
    repair_input_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **REPAIR)] = None,
    repair_output_price: Annotated[float | None, typer.Option(min=0, help="Of a million tokens.", **REPAIR)] = None,
) -> None:
    """From images alone: detailed descriptions, continued, repaired, filtered, and checked by a person."""
    with errors_in_one_line():
        if (describer is None) == (model is None):
            raise ValueError("Give either --describer, a model here, or --model, one behind a server.")
        require_folder(images)
        if decisions is not None:
            require_file(decisions, "--decisions")
        if prompts is not None:
            require_folder(prompts)
        if describer is not None:
            check_model_options(describer, device, dtype)
        with messages_console.status("Loading libraries"):
            from sq_llava.generation import curate as curating
            from sq_llava.generation import describing
            from sq_llava.generation.rows import Shard
            from sq_llava.llm_client.client import ChatClient, ChatSettings

            quiet_libraries()
        part = Shard.parse(shard)
        texts = describing.Prompts.read(prompts or describing.PROMPTS)
        common = {"temperature": temperature, "max_tokens": max_tokens, "concurrency": concurrency, "timeout": timeout}
        if describer is not None:
            local = describing.DescribeSettings(short, max_new_tokens, batch_size, device, dtype)
            looks = describing.LocalDescriber(describer, local, texts, out / part.name("descriptions.jsonl"))
        else:
            chat = ChatSettings(
                model,
                base_url,
                max_requests=max_requests,
                max_total_tokens=max_total_tokens,
                max_cost=max_cost,
                input_price=input_price,
                output_price=output_price,
                image_tokens=image_tokens,
                **common,
            )
            client = ChatClient(chat, out / part.name("answers.jsonl"), reads_only=dry_run)
            looks = describing.ServerDescriber(client, texts, short)
        repairs = None
        if repair_model is not None:
            chat = ChatSettings(
                repair_model,
                repair_base_url or base_url,
                max_requests=repair_max_requests,
                max_total_tokens=repair_max_total_tokens,
                max_cost=repair_max_cost,
                input_price=repair_input_price,
                output_price=repair_output_price,
                option_prefix="--repair-",
                **common,
            )
            client = ChatClient(chat, out / part.name("repairs.jsonl"), reads_only=dry_run)
            repairs = describing.Repairer(client, texts)
        settings = curating.CurateSettings(images, out, decisions, limit, seed, part)
        if dry_run:
            for name, estimate in curating.estimate(settings, looks, repairs).items():
                console.print(f"{name}:", highlight=False, markup=False)
                print_estimate(estimate)
            return
        made = curating.curate(settings, looks, repairs, command_line())
    show_curated(made, out)


def show_curated(made, out: Path) -> None:
    """Prints what was made of the images; exit code 1 where something is missing."""
    counts = f"{made.num_images:,} images, {made.num_continued:,} described in two steps, {made.num_kept:,} kept"
    left_out = "Left out:" if made.reasons else "None was left out."
    console.print(f"{counts}, {made.num_checked:,} of these checked by a person. {left_out}", highlight=False)
    for reason, count in made.reasons.items():
        console.print(f"  {count:>7,}  {reason}", highlight=False)
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if made.num_failed:
        messages_console.print(f"[red]{made.num_failed:,} failed[/red]: see failures*.jsonl.")
    if made.stopped is not None:
        messages_console.print(f"{made.num_open:,} are open: {made.stopped}", markup=False, soft_wrap=True)
    if made.num_failed or made.stopped is not None:
        raise typer.Exit(exit_code(made.stopped))


app.command(
    name="self",
    epilog=examples(
        "sq-llava generate-data self photos --model org/sq-llava-7b -n 8 --out runs/self",
        "sq-llava generate-data self rows.json --image-root images --model runs/demo/model "
        '--after "what color is the shape?" --out runs/self',
        "sq-llava generate-data self photos --model org/sq-llava-7b --clip openai/clip-vit-base-patch32 "
        "--min-clip-score 0.5 --judge-model gpt-4o --judge-max-requests 1000 --out runs/self",
        "torchrun --nproc_per_node 8 -m sq_llava generate-data self photos --model org/sq-llava-7b "
        "--shard 1/4 --out /shared/self",
    ),
)(generate_self)
