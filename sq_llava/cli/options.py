"""What the commands that run a model share: its options, and how it is loaded.

Nothing heavy is imported before a command needs it: `--help` answers at once.
"""

from typing import Annotated

import typer

from sq_llava.console import messages_console
from sq_llava.early_checks import require_device, require_dtype, require_model


Model = Annotated[
    str, typer.Option("--model", "-m", help="Checkpoint or adapter folder, or a Hub id.", show_default=False)
]
ModelArgument = Annotated[str, typer.Argument(help="Checkpoint or adapter folder, or a Hub id.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest text to generate, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.01, help="Of the questions' sampling.")]
TopK = Annotated[int, typer.Option(min=1, help="Of the questions' sampling.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the questions' sampling.")]
Seed = Annotated[int | None, typer.Option(help="For the same questions again.")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the first of these there is.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
LoadIn4Bit = Annotated[bool, typer.Option("--load-in-4bit", help="Hold the towers in 4 bits, by bitsandbytes.")]
LoadIn8Bit = Annotated[bool, typer.Option("--load-in-8bit", help="Hold the towers in 8 bits, by bitsandbytes.")]


def quiet_libraries() -> None:
    """Leaves standard error to the command's own messages and bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_model_options(model: str, device: str | None, dtype: str) -> None:
    """
    Raises:
        ValueError: before a large library is imported, for a model that is not there or a wrong device or dtype.
    """
    require_dtype(dtype, "--dtype")
    require_model(model)
    require_device(device)


def load_model(model: str, device: str | None, dtype: str, load_in_4bit: bool = False, load_in_8bit: bool = False):
    """An [`Assistant`], loaded while the terminal says so."""
    check_model_options(model, device, dtype)
    with messages_console.status("Loading the model"):
        quiet_libraries()
        from sq_llava.inference.assistant import load

        return load(model, device, dtype, load_in_4bit, load_in_8bit)
