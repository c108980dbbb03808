"""`sq-llava generate-data self`: its options and its output."""

from pathlib import Path
from typing import Annotated

import typer

from sq_llava.cli.evaluate import check_asking
from sq_llava.cli.generate_data import DryRun, ShardOption, end_run, print_estimate, print_reasons
from sq_llava.cli.options import OptionsOf, quiet_libraries, takes_options
from sq_llava.console import console, errors_in_one_line, examples, loading
from sq_llava.early_checks import require_folder
from sq_llava.generation.rows import Shard
from sq_llava.generation.settings import FilterSettings, SelfGeneration
from sq_llava.inference.settings import AskSettings
from sq_llava.llm_client.settings import ChatSettings


FILTERS = "Filters (the same command with other filters does not run the model again)"
JUDGE = "Judge of the filtered rows (needs --judge-model)"

app = typer.Typer()


@app.command(
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
)
@takes_options
def generate_self(
    settings: Annotated[dict, OptionsOf(SelfGeneration)],
    asking: Annotated[dict, OptionsOf(AskSettings, num_questions=8, max_new_tokens=128)],
    filters: Annotated[dict, OptionsOf(FilterSettings, panel=FILTERS)],
    judge: Annotated[
        dict, OptionsOf(ChatSettings, prefix="judge", panel=JUDGE, model=None, max_tokens=256, attempts=3)
    ],
    shard: ShardOption = None,
    dry_run: DryRun = False,
) -> None:
    """Make conversations about images: an SQ-LLaVA asks and answers.

    Turns that pass the filters are kept.
    """
    with errors_in_one_line():
        check_asking(**settings)
        require_folder(settings["prompts"])
        with loading():
            from sq_llava.generation import self_generation

            quiet_libraries()
        run = SelfGeneration(
            ask=AskSettings(**asking),
            filters=FilterSettings(seed=asking["seed"], **filters),
            judge=ChatSettings(option_prefix="--judge-", **judge) if judge["model"] is not None else None,
            shard=Shard.parse(shard),
            **settings,
        )
        if dry_run:
            num_images, num_left, estimate = self_generation.estimate(run)
            console.print(
                f"{num_left:,} of {num_images:,} images are left, with {run.ask.num_questions} questions each."
            )
            if estimate is not None:
                print_estimate(estimate)
            return
        made = self_generation.generate(run)
    if made is not None:
        _show_made(made, run.out)


def _show_made(made, out: Path) -> None:
    """Prints what was made of the images. Exit code 1: something is missing."""
    counts = f"{made.num_turns:,} turns about {made.num_images:,} images, {made.num_kept:,} kept"
    console.print(f"{counts} in {made.num_rows:,} rows. Left out:", highlight=False)
    print_reasons(dict(sorted(made.left_out.items())))
    end_run(out, made.num_failed, made.num_open, made.stopped, made.spent)
