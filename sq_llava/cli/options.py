"""Makes command options from the fields of dataclasses, and loads the model of a command.

    @dataclass(frozen=True)
    class AskSettings:
        num_questions: Annotated[int, Option("-n", min=1, help="Number of questions for each image.")] = 4

    @app.command()
    @takes_options
    def ask(image: Path, asking: Annotated[dict, OptionsOf(AskSettings, num_questions=1)]) -> None:
        settings = AskSettings(**asking)

Each field with an `Option` (or an `Argument`) becomes an option of the command. The command itself fills in the other
fields. Large libraries are imported only when a command needs them, so that `--help` is fast.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_type_hints

from typer import Argument, Option
from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

from sq_llava.console import loading
from sq_llava.early_checks import require_device, require_dtype
from sq_llava.inference.settings import Device, Dtype
from sq_llava.locations import find_config


class OptionsOf:
    """
    Marks a parameter of a command that takes the options of a dataclass. Its value is a dictionary: field -> value.

    Args:
        settings (`type`): The dataclass.
        prefix (`str`): Prefix of the options: with `judge`, the field `model` becomes `--judge-model`.
        panel (`str`, *optional*): Title above the options in the help.
        without (`tuple[str, ...]`): Fields that are not options of this command.
        defaults: Defaults that replace those of the dataclass.
    """

    def __init__(
        self,
        settings: type,
        prefix: str = "",
        panel: str | None = None,
        without: tuple[str, ...] = (),
        **defaults: Any,
    ):
        self.settings = settings
        self.prefix = prefix and f"{prefix}_"
        self.panel = panel
        self.without = without
        self.defaults = defaults

    def parameters(self) -> Iterator[Parameter]:
        hints = get_type_hints(self.settings, include_extras=True)
        for field in fields(self.settings):
            kind, *found = get_args(hints[field.name]) or [None]
            info = next((each for each in found if isinstance(each, ParameterInfo)), None)
            if info is None or field.name in self.without:
                continue
            name = self.prefix + field.name
            info = copy(info)
            info.rich_help_panel = self.panel or info.rich_help_panel
            if isinstance(info, OptionInfo):
                # Typer keeps the first name in `default`: here a short one (-n). A prefix leaves no short name.
                short = () if self.prefix or info.default is ... else (info.default,)
                info.default, info.param_decls = f"--{name.replace('_', '-')}", short
                if info.min is not None:
                    info.metavar = "N"  # shorter than "<float range>", so that 80 columns show the whole name
            default = self.defaults.get(field.name, field.default)
            default = Parameter.empty if default is MISSING else default
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each `OptionsOf` parameter of a command by a parameter for each option. Required options come first."""
    parameters, groups = [], {}
    for parameter in signature(command).parameters.values():
        options = next((each for each in get_args(parameter.annotation) if isinstance(each, OptionsOf)), None)
        if options is None:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
        else:
            own = list(options.parameters())
            groups[parameter.name] = {each.name.removeprefix(options.prefix): each.name for each in own}
            parameters += own

    @wraps(command)
    def run(**given: Any) -> None:
        settings = {
            group: {field: given.pop(name) for field, name in names.items()} for group, names in groups.items()
        }
        command(**given, **settings)

    # Arguments keep their order.
    parameters.sort(key=lambda parameter: parameter.default is not Parameter.empty and not _is_argument(parameter))
    run.__signature__ = Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_argument(parameter: Parameter) -> bool:
    return any(isinstance(each, ArgumentInfo) for each in get_args(parameter.annotation))


@dataclass(frozen=True)
class ModelOptions:
    """The arguments of [`load_model`]."""

    model: Annotated[str, Option("-m", help="Checkpoint or adapter folder, or a Hub id.")]
    device: Device = None
    dtype: Dtype = "auto"
    load_in_4bit: Annotated[bool, Option(help="Load vision tower and language model in 4 bits (bitsandbytes).")] = (
        False
    )
    load_in_8bit: Annotated[bool, Option(help="Load vision tower and language model in 8 bits (bitsandbytes).")] = (
        False
    )
    trust_chat_template: Annotated[
        bool, Option(help="Use the checkpoint's own chat template: a program without limits of time and memory.")
    ] = False


Model = Annotated[dict, OptionsOf(ModelOptions)]
# For commands whose model is an argument.
ModelArgument = Annotated[str, Argument(help="Checkpoint or adapter folder, or a Hub id.", show_default=False)]
Loading = Annotated[dict, OptionsOf(ModelOptions, without=("model",))]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def quiet_libraries() -> None:
    """Turns off the messages and progress bars of transformers. The command has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_model_options(model: str, device: str | None, dtype: str, **_: Any) -> None:
    """
    Checks the options of a model without importing a large library.

    Raises:
        ValueError: if the model, the device or the dtype does not exist.
    """
    require_dtype(dtype, "--dtype")
    find_config(model)
    require_device(device)


def load_model(
    model: str,
    device: str | None,
    dtype: str,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    trust_chat_template: bool = False,
):
    """Loads an [`Assistant`], with a message on standard error."""
    check_model_options(model, device, dtype)
    with loading("Loading the model"):
        quiet_libraries()
        from sq_llava.inference.assistant import load

        return load(model, device, dtype, load_in_4bit, load_in_8bit, trust_chat_template)
