"""The `sq-llava` command.

    sq-llava ask image.png --model runs/demo/model -n 5
    sq-llava answer image.png "what color is the shape?" --model runs/demo/model
    sq-llava chat image.png --model runs/demo/model
    sq-llava merge runs/demo/stage2 --out runs/demo/model
    sq-llava convert llava-hf/llava-1.5-7b-hf --out llava-7b
    sq-llava doctor --config recipes/sq-llava-7b/stage2.yaml
    sq-llava inspect runs/demo/model
    sq-llava push runs/demo/model org/name --dry-run
    sq-llava evaluate --model runs/demo/model --tasks easy_vqa --data runs/demo/data
    sq-llava generate-data llava captions.json --model gpt-4o --out runs/coco
    sq-llava serve runs/demo/model
    sq-llava demo runs/demo/model

Results go to standard output, progress and errors to standard error. Exit codes: 0 fine, 1 wrong input or no
such model (of the doctor: errors in the data; of inspect: a broken folder), 2 wrong usage, 130 stopped by Ctrl-C.
"""

from typing import Annotated

import typer

from sq_llava import __version__
from sq_llava.cli import (
    checkpoints,
    data,
    evaluate,
    generate_curated,
    generate_data,
    generate_self,
    page,
    recipes,
    serve,
    talk,
)
from sq_llava.console import console


# torch and transformers are imported inside the commands: `--help` answers at once.

app = typer.Typer(
    help="SQ-LLaVA: a vision-language model that asks as well as it answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (talk, checkpoints, data, evaluate, serve, page):
    app.add_typer(module.app)

generation = typer.Typer(
    help="Make instruction data: from captions and boxes, or from images alone.", no_args_is_help=True
)
for module in (generate_data, generate_curated, generate_self):
    generation.add_typer(module.app)
app.add_typer(generation, name="generate-data")
app.add_typer(recipes.app)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit
