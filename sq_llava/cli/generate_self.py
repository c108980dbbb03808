"""`sq-llava generate-data self`: what is asked for on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.evaluate import (
    JUDGE,
    JudgeBaseUrl,
    JudgeConcurrency,
    JudgeMaxCost,
    JudgeMaxRequests,
    JudgeMaxTokens,
    JudgePrice,
    JudgeTemperature,
    check_images,
)
from sq_llava.cli.generation_options import (
    IMAGE_TOKENS,
    DryRun,
    Limit,
    Out,
    Seed,
    ShardOption,
    exit_code,
    print_estimate,
)
from sq_llava.cli.options import Device, Dtype, check_model_options, quiet_libraries
from sq_llava.console import console, errors_in_one_line, messages_console
from sq_llava.early_checks import require_folder
from sq_llava.locations import require_folder_or_id


FILTERS = {"rich_help_panel": "Filters: with others, the same command makes the set anew without a model"}


JudgeMaxTotalTokens = Annotated[
    int | None, typer.Option(min=0, help="Of all runs into --out, prompts and answers.", **JUDGE)
]
JudgeImageTokens = Annotated[int, typer.Option(min=1, help=IMAGE_TOKENS, **JUDGE)]


def generate_self(
    images: Annotated[
        str,
        typer.Argument(help="Folder of images, or a data set of training, without its questions.", show_default=False),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="SQ-LLaVA folder or Hub id.", show_default=False)],
    out: Out,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that image paths are relative to; default: that of the images.")
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
    balance_yes_no: Annotated[
        bool, typer.Option("--balance-yes-no", help='As many "yes" as "no", in the set.', **FILTERS)
    ] = False,
    clip: Annotated[str | None, typer.Option(help="A whole CLIP, for CLIPScore.", **FILTERS)] = None,
    min_clip_score: Annotated[float | None, typer.Option(help="Needs --clip.", **FILTERS)] = None,
    judge_model: Annotated[str | None, typer.Option(help="Accepts or rejects what passed.", **JUDGE)] = None,
    prompts: Annotated[Path | None, typer.Option(help="Folder with judge.txt; default: the own.", **JUDGE)] = None,
    judge_base_url: JudgeBaseUrl = None,
    judge_temperature: JudgeTemperature = 0.0,
    judge_max_tokens: JudgeMaxTokens = 256,
    judge_image_tokens: JudgeImageTokens = 4096,
    judge_concurrency: JudgeConcurrency = 8,
    judge_max_requests: JudgeMaxRequests = None,
    judge_max_total_tokens: JudgeMaxTotalTokens = None,
    judge_max_cost: JudgeMaxCost = None,
    judge_input_price: JudgePrice = None,
    judge_output_price: JudgePrice = None,
) -> None:
    """Images alone: a SQ-LLaVA asks about them, answers, and what passes the filters is kept."""
    with errors_in_one_line():
        check_images(images, image_root)
        check_model_options(model, device, dtype)
        if clip is not None:
            require_folder_or_id(clip, "--clip")
        if prompts is not None:
            require_folder(prompts)
        with messages_console.status("Loading libraries"):
            from sq_llava.evaluation.questions import AskSettings
            from sq_llava.generation import self_generation
            from sq_llava.generation.filters import FilterSettings
            from sq_llava.generation.rows import Shard
            from sq_llava.llm_client.client import ChatSettings

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
                max_total_tokens=judge_max_total_tokens,
                max_cost=judge_max_cost,
                input_price=judge_input_price,
                output_price=judge_output_price,
                image_tokens=judge_image_tokens,
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
                balance_yes_no=balance_yes_no,
                seed=seed,
            ),
            image_root=image_root,
            limit=limit,
            shard=Shard.parse(shard),
            clip=clip,
            judge=judge,
            prompts=prompts or self_generation.PROMPTS,
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
    console.print(f"{counts} in {made.num_rows:,} rows; left out:", highlight=False)
    for reason, count in sorted(made.left_out.items()):
        console.print(f"  {count:>7,}  {reason}", highlight=False)
    messages_console.print(f"Wrote {out}", markup=False, soft_wrap=True)
    if made.num_failed:
        messages_console.print(
            f"[red]{made.num_failed} failed[/red]: see failures*.jsonl. The same command tries them again."
        )
    if made.stopped is not None:
        messages_console.print(f"{made.num_open} are open: {made.stopped}", markup=False, soft_wrap=True)
    if made.num_failed or made.num_open:
        raise typer.Exit(exit_code(made.stopped))
