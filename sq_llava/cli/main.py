"""The `sq-llava` command.

    sq-llava ask runs/demo/images/test/images/0.png --model runs/demo/model -n 5
    sq-llava answer runs/demo/images/test/images/0.png "what color is the shape?" --model runs/demo/model
    sq-llava serve runs/demo/model
    sq-llava COMMAND --help

Results go to standard output, progress and errors to standard error. Exit codes: 0 success; 1 wrong input or
incomplete results (`doctor`: errors in the data; `inspect`: broken checkpoint); 2 wrong usage; 130 stopped by Ctrl-C.
"""

from typing import Annotated

import typer

from sq_llava import __version__
from sq_llava.cli import (
    chat,
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
from sq_llava.console import console, examples


# torch and transformers are imported inside the commands, so that `--help` is fast.

app = typer.Typer(
    help="SQ-LLaVA: a vision-language model that answers questions about images, and asks them.",
    epilog=examples(
        'sq-llava answer runs/demo/images/test/images/0.png "what color is the shape?" --model runs/demo/model',
        "sq-llava ask --help",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (talk, chat, checkpoints, data, evaluate, serve, page):
    app.add_typer(module.app)

generation = typer.Typer(
    help="Make training data from captions and boxes, or from images alone.",
    no_args_is_help=True,
    epilog=examples("sq-llava generate-data self photos --model org/sq-llava-7b --out runs/self"),
)
for module in (generate_data, generate_curated, generate_self):
    generation.add_typer(module.app)
app.add_typer(generation, name="generate-data")
app.add_typer(recipes.app)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit
