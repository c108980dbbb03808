"""`sq-llava doctor`: checks the training data of a recipe."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from sq_llava.cli.options import AsJson
from sq_llava.console import console, errors_in_one_line, examples, loading, messages_console
from sq_llava.early_checks import require_recipe
from sq_llava.output import new_folder_lock


app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=examples(
        "sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml",
        "sq-llava doctor --config recipe.yaml --dataset_path mine.json --image_root images --fix fixed",
        "The data of the demo:",
        "sq-llava doctor --config recipes/easy-vqa/stage2.yaml --model_name_or_path runs/demo/stage1 "
        "--dataset_path runs/demo/data/stage2_train.json --image_root runs/demo/images --limit 1000",
    ),
)
def doctor(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="Recipe. Other settings of training, e.g. --image_root, override it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Check about N rows, evenly spaced.")] = None,
    images: Annotated[bool, typer.Option(help="Check the image files.")] = True,
    lengths: Annotated[bool, typer.Option(help="Check the lengths in tokens.")] = True,
    fix: Annotated[Path | None, typer.Option(help="Write the rows without errors into this new folder.")] = None,
    num_proc: Annotated[
        int | None, typer.Option(min=1, help="Number of processes. Default: one per core for 20,000 rows or more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the training data of a recipe: every row, image header and length.

    Exit code 1: there are errors.
    """
    with errors_in_one_line(), ExitStack() as locks:
        if config is not None:
            require_recipe(config)
        if fix is not None:
            if limit is not None:
                raise ValueError("--fix needs all rows, but --limit checks only some of them: leave --limit out.")
            locks.enter_context(new_folder_lock(fix))
        with loading("Opening the data"):
            from sq_llava.doctor.check import data_check, examine
            from sq_llava.doctor.report import print_fixed, print_preview, print_report, write_sound_rows
            from sq_llava.training.settings import parse_settings

            # Nothing is trained, so a recipe for GPUs can be checked on any machine.
            settings = [*(["--config", config] if config else []), *context.args, "--use_cpu", "true"]
            recipe = parse_settings(settings)
            check = data_check(*recipe, read_images=images, measure_lengths=lengths)
        with Progress(console=messages_console, transient=True) as progress:
            report = examine(check, progress, limit, num_proc)
        if not as_json:
            print_report(report, console)
        try:
            if fix is not None:
                for source, entry in zip(report.summary["sources"], write_sound_rows(check, report, fix)):
                    source["fixed"] = entry
        finally:
            if as_json:
                print(json.dumps(report.to_json(), indent=2))
        if images and not as_json:
            print_preview(check, report, recipe[1].seed, console)
        if fix is not None:
            messages_console.print(
                f"Wrote {fix}. Replace the data settings of the recipe with:", markup=False, soft_wrap=True
            )
            print_fixed(report.summary["sources"], messages_console)
    if report.num_errors:
        raise typer.Exit(1)
